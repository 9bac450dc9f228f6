"""Measure a video: does it stay one video, does it do what its story says, does it move?

    python measure/evaluate.py VIDEO --story story.json     {"global": "...", "local": ["...", ...]}, or --scenario NAME
    python measure/evaluate.py --trajectories trace.safetensors     a picture of what `demo.py --trace` recorded

The first prints the measures and writes them, with the curve of drift, to VIDEO's name with .scores.json:

    subject consistency      VBench's formula and features: DINO ViT-B/16, the first token
    background consistency   VBench's formula and features: CLIP ViT-B/32, image
    drift                    mean cosine of the subject's features of frames that are d apart, for every d; what happens
                             far apart, the two averages above hide [ours]
    global, local fidelity   mean cosine of CLIP's features of the frames and of the text: of the global prompt, of the
                             local prompt of each frame's event
    scenes                   by PySceneDetect's ContentDetector at its defaults
    seam ratio               frame difference where a window begins or ends, against the median elsewhere; 1: no seams
                             [ours]
    motion                   mean absolute frame difference, pixels in [0, 1]; always beside the rest, for a still image
                             is perfectly consistent

Numbers compare with VBench's tables only if models, lengths and prompts are theirs; captions would count, so leave
them out. Frames stream through: memory grows by their features only.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import prompts as P  # noqa: E402
from syncos import make_windows  # noqa: E402
from videos import check_device, check_output, read_frames, read_tensors  # noqa: E402

DINO, CLIP = "facebook/dino-vitb16", "openai/clip-vit-base-patch32"
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean and deviation of the training images
OPENAI = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


# ----------------------------------------------------------------------------------------------------------------------
# The formulas


def consistency(features: Tensor) -> float:
    """VBench's: features T x D of the frames; for each but the first, the mean of its clipped cosine similarity to the
    one before and to the first; averaged."""
    f = F.normalize(features, dim=-1)
    before, first = (f[1:] * f[:-1]).sum(-1), f[1:] @ f[0]
    return ((before.clamp(min=0) + first.clamp(min=0)) / 2).mean().item()


def drift(features: Tensor) -> list[float]:
    """Mean cosine of frames 1, 2, ..., T - 1 apart; features T x D."""
    f = F.normalize(features, dim=-1)
    return [(f[d:] * f[:-d]).sum(-1).mean().item() for d in range(1, len(f))]


def fidelity(features: Tensor, text: Tensor) -> float:
    """Mean cosine of frames T x D with a text, D."""
    return F.cosine_similarity(features, text[None], dim=-1).mean().item()


def seam_ratio(differences: Sequence[float], joins: Iterable[int]) -> float:
    """Mean frame difference at the joins over the median elsewhere. differences[i] is between frames i and i + 1, a
    join the number of the first frame behind it. 1 if there are no joins or nothing moves."""
    before = {join - 1 for join in joins}
    there = [d for i, d in enumerate(differences) if i in before]
    usual = statistics.median([d for i, d in enumerate(differences) if i not in before])
    if not any(there) and (not there or usual == 0):
        return 1.0
    return statistics.mean(there) / usual if usual else math.inf


def window_joins(windows: Sequence[slice], frames_per_latent: int = 4) -> list[int]:
    """Video frames at which a window begins or the frame after it ends; latent frame k > 0 ends with frame 4 k."""
    edges = {edge for w in windows for edge in (w.start, w.stop)} - {0, windows[-1].stop}
    return sorted(frames_per_latent * (edge - 1) + 1 for edge in edges)


class Watch:
    """What needs no network: frame differences, and scenes. Feed it frames, H x W x 3 uint8, one by one."""

    def __init__(self, fps: float = 8):
        from scenedetect import ContentDetector

        self.detector, self.fps, self.frames, self.last = ContentDetector(), float(fps), 0, None
        self.differences: list[float] = []
        self.scenes = 1

    def __call__(self, frame: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        self.scenes += len(self.detector.process_frame(FrameTimecode(self.frames, self.fps), bgr))
        self.frames += 1
        if self.last is not None:
            self.differences.append(np.abs(frame.astype(np.float32) - self.last).mean().item() / 255)
        self.last = frame.astype(np.float32)

    @property
    def motion(self) -> float:
        return statistics.mean(self.differences)


# ----------------------------------------------------------------------------------------------------------------------
# The networks


class Networks:
    """DINO and CLIP by hub id or folder. Raises ValueError if one cannot be loaded."""

    def __init__(self, dino: str = DINO, clip: str = CLIP, device: str = "cpu"):
        from transformers import AutoTokenizer, CLIPModel, ViTModel

        self.device = device
        try:
            self.dino = ViTModel.from_pretrained(dino, add_pooling_layer=False).eval().to(device)
            self.clip = CLIPModel.from_pretrained(clip).eval().to(device)
            self.tokenizer = AutoTokenizer.from_pretrained(clip)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load {dino} and {clip}: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def subject(self, frames: Tensor) -> Tensor:
        """Frames n x 3 x H x W in [0, 1] -> n x D: whole frames, the shorter side as the network wants it."""
        size = self.dino.config.image_size
        x = normalize(shorter_side(frames.to(self.device), size, "bilinear"), IMAGENET)
        return self.dino(x, interpolate_pos_encoding=True).last_hidden_state[:, 0].float().cpu()

    @torch.no_grad()
    def background(self, frames: Tensor) -> Tensor:
        """Frames n x 3 x H x W in [0, 1] -> n x D: the square in the middle."""
        size = self.clip.config.vision_config.image_size
        x = shorter_side(frames.to(self.device), size, "bicubic").clamp(0, 1)
        top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
        x = normalize(x[..., top : top + size, left : left + size], OPENAI)
        return self.clip.get_image_features(pixel_values=x).pooler_output.float().cpu()

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.device)).pooler_output.float().cpu()


def normalize(x: Tensor, moments: Tensor) -> Tensor:
    mean, std = moments.to(x)[:, :, None, None]
    return (x - mean) / std


def shorter_side(x: Tensor, size: int, mode: str) -> Tensor:
    """n x 3 x H x W, its shorter side resized to `size`."""
    height, width = x.shape[-2:]
    shape = (size, max(size, size * width // height)) if height < width else (max(size, size * height // width), size)
    return F.interpolate(x, shape, mode=mode, antialias=True, align_corners=False)


# ----------------------------------------------------------------------------------------------------------------------
# A video


def place_story(
    path: Path, story: P.Story, window: int, stride: int, frames_per_latent: int = 4
) -> tuple[list[slice], list[tuple[int, int]]]:
    """How a video was made: its windows, in latent frames, and from which to which video frame each event lasts.

    Raises ValueError if the video cannot be read, is too short, or has too few windows for the story.
    """
    count = sum(1 for _ in read_frames(path)[0])
    if count < 2:
        raise ValueError(f"{path} has {count} frame; at least two are needed.")
    latents = (count - 1) // frames_per_latent + 1
    windows = make_windows(latents, min(window, latents), min(stride, window, latents))
    spans = P.event_spans(windows, P.assign_events(windows, len(story.local_prompts)))
    return windows, [(int(a * count), int(b * count)) for a, b in spans]


def evaluate(
    path: Path,
    story: P.Story,
    windows: Sequence[slice],
    spans: Sequence[tuple[int, int]],
    networks: Networks,
    batch: int = 16,
    frames_per_latent: int = 4,
) -> dict:
    """All measures of a video; windows and spans are `place_story`'s."""
    frames, fps = read_frames(path)
    watch, subject, background = Watch(fps), [], []
    frames = iter(tqdm(frames, desc="frames", unit="frame", total=spans[-1][1]))
    while group := list(islice(frames, batch)):
        for frame in group:
            watch(frame)
        pictures = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).float() / 255
        subject.append(networks.subject(pictures))
        background.append(networks.background(pictures))
    subject, background = torch.cat(subject), torch.cat(background)
    whole, *texts = networks.text([story.global_prompt, *story.local_prompts])
    events = [fidelity(background[a:b], text) for (a, b), text in zip(spans, texts)]
    return {
        "frames": watch.frames,
        "subject consistency": consistency(subject),
        "background consistency": consistency(background),
        "global fidelity": fidelity(background, whole) if story.global_prompt else None,
        "local fidelity": statistics.mean(events),
        "scenes": watch.scenes,
        "seam ratio": seam_ratio(watch.differences, window_joins(windows, frames_per_latent)),
        "motion": watch.motion,
        "local fidelity of each event": events,
        "drift": drift(subject),
    }


# ----------------------------------------------------------------------------------------------------------------------
# A picture: how the estimates developed (the paper's Figure 3)


def principal_plane(traces: Sequence[Tensor]) -> list[Tensor]:
    """The same two axes for all: traces steps x F x D -> steps x F x 2. The first two principal components of the last
    steps of all, with their mean at 0. (t-SNE would tear apart what is near and draw gaps of any size; here distances
    mean the same in every panel.)"""
    ends = torch.cat([trace[-1] for trace in traces]).double()
    mean = ends.mean(0)
    axes = torch.linalg.svd(ends - mean, full_matrices=False).Vh[:2]
    return [(trace.double() - mean) @ axes.T for trace in traces]


def plot_trajectories(path: Path, picture: Path) -> None:
    """One panel a method, one line a latent frame, coloured by its place in the video, faint at first, vivid at last.

    Raises ValueError if the file holds no trace.
    """
    traces, about = read_tensors(path, "trace")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection

    figure, axes = plt.subplots(
        1, len(traces), figsize=(4.5 * len(traces), 4.5), sharex=True, sharey=True, squeeze=False
    )
    for axis, name, plane in zip(axes[0], traces, principal_plane(list(traces.values()))):
        steps, frames, _ = plane.shape
        for f in range(frames):
            line = plane[:, f]
            color = np.array(plt.cm.turbo(f / max(frames - 1, 1)))
            colors = np.tile(color, (steps - 1, 1))
            colors[:, 3] = np.linspace(0.03, 0.8, steps - 1) ** 2
            axis.add_collection(LineCollection(torch.stack([line[:-1], line[1:]], 1).numpy(), colors=colors))
            axis.scatter(*line[-1], color=color, s=14, zorder=3)
        axis.autoscale()
        axis.set(title=name, xticks=[], yticks=[])
    bar = plt.cm.ScalarMappable(cmap="turbo", norm=plt.Normalize(0, about["num_frames"] - 1))
    figure.colorbar(bar, ax=axes[0].tolist(), label="video frame")
    figure.savefig(picture, bbox_inches="tight", dpi=80)


def describe(scores: dict) -> str:
    lines = [f"{name:24} {value:.4g}" for name, value in scores.items() if isinstance(value, (int, float))]
    curve = scores["drift"]
    far = sorted({min(d, len(curve)) for d in (1, 8, 32, 128, len(curve))})
    return "\n".join([*lines, "drift                    " + ", ".join(f"{curve[d - 1]:.3f} at {d}" for d in far)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--story", metavar="FILE", help='JSON file: {"global": "...", "local": ["...", ...]}')
    group.add_argument("--scenario", choices=P.SCENARIOS, metavar="NAME", help="a ready story of demo.py")
    group.add_argument("--trajectories", type=Path, metavar="FILE", help="draw a trace into FILE's name with .png")
    parser.add_argument("--window", type=int, default=13, help="of the video's windows, latent frames (default: 13)")
    parser.add_argument("--stride", type=int, default=4, help="between them, latent frames (default: 4)")
    parser.add_argument("--frames_per_latent", type=int, default=4, help="1 for videocrafter2 (default: 4)")
    parser.add_argument("--dino", default=DINO, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--clip", default=CLIP, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="frames through a network at once (default: 16)")
    parser.add_argument("--output_path", type=Path, help="(default: VIDEO's name with .scores.json)")
    args = parser.parse_args(argv)
    try:
        if args.trajectories:
            path = args.output_path or args.trajectories.with_suffix(".png")
            check_output(path, (".png",))
            plot_trajectories(args.trajectories, path)
            print(f"Wrote {path}")
            return
        if not args.video:
            raise ValueError("Name the video: evaluate.py VIDEO --story FILE.")
        path = args.output_path or args.video.with_suffix(".scores.json")
        check_output(path, (".json",))
        story = P.SCENARIOS[args.scenario] if args.scenario else P.load_story(args.story)
        check_device(args.device)
        if min(args.batch, args.window, args.stride, args.frames_per_latent) < 1:
            raise ValueError("--batch, --window, --stride and --frames_per_latent must be at least 1.")
        windows, spans = place_story(args.video, story, args.window, args.stride, args.frames_per_latent)
        networks = Networks(args.dino, args.clip, args.device)
    except ValueError as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    scores = evaluate(args.video, story, windows, spans, networks, args.batch, args.frames_per_latent)
    print(describe(scores))
    path.write_text(json.dumps(scores, indent=1) + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
