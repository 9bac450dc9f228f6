"""Measure a video: does it stay consistent, does it follow its story, does it move?

    python -m extras.measure.evaluate VIDEO --story story.json     (or --scenario NAME)
    python -m extras.measure.evaluate --trajectories trace.safetensors
                                              plots what `demo.py --trace` recorded

The first prints the measures and writes them, with the drift curve, to VIDEO's name with
.scores.json:

    subject consistency      VBench's formula and features: DINO ViT-B/16, the first token
    background consistency   VBench's formula and features: CLIP ViT-B/32, image
    drift                    mean cosine of the subject features of frames d apart, for every d;
                             shows changes over long distances, which the two averages above hide
                             [ours]
    global, local fidelity   mean cosine of the CLIP features of frames and text: the global prompt,
                             or the local prompt of each frame's event
    scenes                   number found by PySceneDetect's ContentDetector with its defaults
    seam ratio               mean frame difference where a window begins or ends, divided by the
                             median elsewhere; 1: no seams [ours]
    motion                   mean absolute frame difference, pixels in [0, 1]; read it with the
                             rest, because a still image is perfectly consistent
    linear smoothness        VBench's formula of motion smoothness, with the mean of a frame's
                             neighbours; VBench uses a network, AMT, which no package provides, so
                             its numbers differ [ours]

and, after `pip install pyiqa torchvision`, if their weights are available:

    dynamic degree           VBench's formula, with torchvision's RAFT: 1 if a quarter of the video
                             moves much, else 0
    aesthetic quality        VBench's formula and weights: LAION's linear head on CLIP ViT-L/14,
                             divided by 10
    imaging quality          VBench's formula and weights: pyiqa's MUSIQ for SPAQ, divided by 100

Numbers compare with VBench's tables only for the same models, lengths and prompts.
Measure videos without captions, which would affect the scores. Frames are streamed:
memory grows only by their features.
"""

import argparse
import importlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, ViTModel

import prompts as P
from extras.devices import missing_device
from extras.errors import first_line
from extras.loading import (
    check_pointers,
    fill,
    load_network,
    load_tokenizer,
    read_checkpoint,
)  # fmt: skip
from extras.videos import check_output, count_frames, open_streams, read_frames, read_tensors
from syncos import make_windows

DINO, CLIP, LARGE_CLIP = "facebook/dino-vitb16", "openai/clip-vit-base-patch32", "openai/clip-vit-large-patch14"
LAION = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth"
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # mean and deviation of the training images
OPENAI = torch.tensor([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


# --------------------------------------------------------------------------------------------------
# The formulas


def consistency(features: Tensor) -> float:
    """VBench's formula for frame features T x D: for each frame but the first, the mean of its
    clipped cosine similarities to the previous and to the first frame; averaged."""
    f = F.normalize(features, dim=-1)
    before, first = (f[1:] * f[:-1]).sum(-1), f[1:] @ f[0]
    return ((before.clamp(min=0) + first.clamp(min=0)) / 2).mean().item()


def drift(features: Tensor) -> list[float]:
    """Mean cosine of frames 1, 2, ..., T - 1 apart, from features T x D."""
    f = F.normalize(features, dim=-1)
    return [(f[d:] * f[:-d]).sum(-1).mean().item() for d in range(1, len(f))]


def fidelity(features: Tensor, text: Tensor) -> float:
    """Mean cosine of frames T x D and a text, D."""
    return F.cosine_similarity(features, text[None], dim=-1).mean().item()


def seam_ratio(differences: Sequence[float], joins: Iterable[int]) -> float:
    """Mean frame difference at the joins divided by the median elsewhere. differences[i] is between
    frames i and i + 1; a join is the number of the first frame after it. 1 if there are no joins or
    nothing moves; infinite if only the joins move."""
    before = {join - 1 for join in joins}
    there = [d for i, d in enumerate(differences) if i in before]
    usual = statistics.median([d for i, d in enumerate(differences) if i not in before] or [0.0])
    if not any(there) and (not there or usual == 0):
        return 1.0
    return statistics.mean(there) / usual if usual else math.inf


def window_joins(windows: Sequence[slice], frames_per_latent: int = 4) -> list[int]:
    """Video frames that begin a window or follow its end; latent frame k ends with frame 4 k."""
    edges = {edge for w in windows for edge in (w.start, w.stop)} - {0, windows[-1].stop}
    return sorted(frames_per_latent * (edge - 1) + 1 for edge in edges)


class Watch:
    """Measures without a network: frame differences and scenes. Call it with frames, H x W x 3
    uint8, one by one."""

    def __init__(self, fps: float = 8):
        from scenedetect import ContentDetector

        self.detector, self.fps, self.frames, self.last, self.even = ContentDetector(), float(fps), 0, None, None
        self.differences: list[float] = []
        self.lost: list[float] = []  # error of every second frame against the mean of its neighbours
        self.scenes = 1

    def __call__(self, frame: np.ndarray) -> None:
        from scenedetect import FrameTimecode

        bgr = np.ascontiguousarray(frame[:, :, ::-1])
        self.scenes += len(self.detector.process_frame(FrameTimecode(self.frames, self.fps), bgr))
        self.frames += 1
        if self.last is not None:
            self.differences.append(np.abs(frame.astype(np.float32) - self.last).mean().item() / 255)
        if self.frames % 2:
            if self.even is not None:
                between = (self.even + frame) / 2
                self.lost.append(np.abs(self.last - between).mean().item() / 255)
            self.even = frame.astype(np.float32)
        self.last = frame.astype(np.float32)

    @property
    def motion(self) -> float:
        return statistics.mean(self.differences)

    @property
    def smoothness(self) -> float:
        return 1 - statistics.mean(self.lost) if self.lost else 1.0


# --------------------------------------------------------------------------------------------------
# The networks


def check_packages(*names: str) -> None:
    """Raises ValueError if one of these packages cannot be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(f"{name} is missing ({error}): pip install -r extras/requirements.txt") from error


class Networks:
    """DINO and CLIP by hub id or folder. Raises ValueError if one cannot be loaded."""

    def __init__(self, dino: str = DINO, clip: str = CLIP, device: str = "cpu"):
        self.device = device
        vit = SimpleNamespace(from_pretrained=partial(ViTModel.from_pretrained, add_pooling_layer=False))
        self.dino = load_network(vit, dino, "", torch.float32).to(device)
        self.clip = load_network(CLIPModel, clip, "", torch.float32).to(device)
        self.tokenizer = load_tokenizer(clip, "")

    @torch.no_grad()
    def subject(self, frames: Tensor) -> Tensor:
        """Frames n x 3 x H x W in [0, 1] -> n x D, the shorter side at the network's size."""
        size = self.dino.config.image_size
        x = normalize(shorter_side(frames.to(self.device), size, "bilinear"), IMAGENET)
        return self.dino(x, interpolate_pos_encoding=True).last_hidden_state[:, 0].float().cpu()

    @torch.no_grad()
    def background(self, frames: Tensor) -> Tensor:
        """Frames n x 3 x H x W in [0, 1] -> n x D: the centre square."""
        return clip_features(self.clip, frames.to(self.device)).cpu()

    @torch.no_grad()
    def text(self, texts: list[str]) -> Tensor:
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.clip.get_text_features(**tokens.to(self.device)).pooler_output.float().cpu()


def clip_features(clip: torch.nn.Module, frames: Tensor) -> Tensor:
    """Frames n x 3 x H x W in [0, 1] -> n x D, from the centre square."""
    size = clip.config.vision_config.image_size
    x = shorter_side(frames, size, "bicubic").clamp(0, 1)
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    x = normalize(x[..., top : top + size, left : left + size], OPENAI)
    return clip.get_image_features(pixel_values=x).pooler_output.float()


def normalize(x: Tensor, moments: Tensor) -> Tensor:
    mean, std = moments.to(x)[:, :, None, None]
    return (x - mean) / std


def shorter_side(x: Tensor, size: int, mode: str) -> Tensor:
    """Resize n x 3 x H x W: the shorter side to `size`."""
    height, width = x.shape[-2:]
    shape = (size, max(size, size * width // height)) if height < width else (max(size, size * height // width), size)
    return F.interpolate(x, shape, mode=mode, antialias=True, align_corners=False)


# --------------------------------------------------------------------------------------------------
# Measures that need another library: objects that are called with frames, n x 3 x H x W in [0, 1],
# and have a value


class DynamicDegree:
    """VBench's: at 8 frames per second, does the flow exceed 6 pixels of 256 in a quarter of them?

    A flow counts as the mean length of its 5 % longest vectors. flow: two frames,
    1 x 3 x H x W -> 2 x H x W.
    """

    def __init__(self, flow: Callable[[Tensor, Tensor], Tensor]):
        self.flow, self.seen, self.last, self.lengths = flow, 0, None, []

    def __call__(self, frames: Tensor, fps: float) -> None:
        for frame in frames.split(1):
            if self.seen % max(1, round(fps / 8)) == 0:
                if self.last is not None:
                    lengths = self.flow(self.last, frame).norm(dim=0).flatten()
                    self.lengths.append(lengths.topk(int(0.05 * len(lengths))).values.mean().item())
                self.last = frame
            self.seen += 1

    @property
    def value(self) -> float:
        moved = sum(length > 6 * min(self.last.shape[-2:]) / 256 for length in self.lengths)
        return float(moved >= round(4 * (len(self.lengths) + 1) / 16))


class MeanScore:
    """Mean over all frames of score(frames), n numbers, divided by `best`."""

    def __init__(self, score: Callable[[Tensor], Tensor], best: float):
        self.score, self.best, self.scores = score, best, []

    def __call__(self, frames: Tensor, fps: float) -> None:
        self.scores += self.score(frames).flatten().tolist()

    @property
    def value(self) -> float:
        return statistics.mean(self.scores) / self.best


@torch.no_grad()
def load_flow(weights: str | None, device: str) -> DynamicDegree:
    """Load RAFT, trained on FlyingChairs and FlyingThings like VBench's.
    `weights`: a file, else torchvision's."""
    from torchvision.models.optical_flow import Raft_Large_Weights, raft_large

    raft = raft_large(weights=None if weights else Raft_Large_Weights.C_T_V1)
    if weights:
        fill(raft, read_checkpoint(weights), weights)
    raft.eval().to(device)

    @torch.no_grad()
    def flow(a: Tensor, b: Tensor) -> Tensor:
        height, width = a.shape[-2:]
        if min(height, width) < 128:
            raise ValueError(f"RAFT needs frames of at least 128 x 128 pixels, got {height} x {width}.")
        both = F.pad(torch.cat([a, b]).to(device) * 2 - 1, (0, -width % 8, 0, -height % 8), mode="replicate")
        return raft(both[:1], both[1:], num_flow_updates=20)[-1][0, :, :height, :width].cpu()

    return DynamicDegree(flow)


def load_aesthetic(weights: str | None, device: str, clip: str = LARGE_CLIP) -> MeanScore:
    """Load the scorer. `weights`: a file with the linear head, else LAION's."""
    download = torch.hub.load_state_dict_from_url
    state = read_checkpoint(weights) if weights else download(LAION, map_location="cpu", weights_only=True)
    network = load_network(CLIPModel, clip, "", torch.float32).to(device)
    head = torch.nn.Linear(network.config.projection_dim, 1)
    fill(head, {name: x.float() for name, x in state.items()}, weights or LAION)

    @torch.no_grad()
    def score(frames: Tensor) -> Tensor:
        features = F.normalize(clip_features(network, frames.to(device)).cpu(), dim=-1)
        return head(features)

    return MeanScore(score, 10)


def load_imaging(weights: str | None, device: str) -> MeanScore:
    """Load MUSIQ. `weights`: pyiqa's file for SPAQ, else its download. Scales the longer side to at
    most 512 pixels."""
    import pyiqa

    if weights:
        check_pointers(Path(weights))
    options = dict(pretrained_model_path=weights) if weights else {}
    musiq = pyiqa.create_metric("musiq-spaq", device=torch.device(device), **options)

    @torch.no_grad()
    def score(frames: Tensor) -> Tensor:
        scale = min(1.0, 512 / max(frames.shape[-2:]))
        shape = [round(side * scale) for side in frames.shape[-2:]]
        small = F.interpolate(frames, shape, mode="bilinear", antialias=False) if scale < 1 else frames
        return musiq(small.clamp(0, 1).to(device)).cpu()

    return MeanScore(score, 100)


EXTRAS = {"dynamic degree": load_flow, "aesthetic quality": load_aesthetic, "imaging quality": load_imaging}


def load_extras(weights: Mapping[str, str | None], device: str) -> dict[str, DynamicDegree | MeanScore]:
    """Load the EXTRAS that have library and weights; print a line for each of the others. Raises
    ValueError if weights that are given cannot be loaded."""
    found = {}
    for name, load in EXTRAS.items():
        try:
            found[name] = load(weights.get(name), device)
        except ImportError as error:
            print(f"{name}: left out because {error.name} is missing: pip install pyiqa torchvision")
        except Exception as error:  # of many kinds: no connection, damaged files, other keys
            if weights.get(name):
                raise ValueError(f"{name}: cannot load {weights[name]}: {first_line(error)}") from error
            print(f"{name}: left out because its weights cannot be loaded: {first_line(error)}")
    return found


# --------------------------------------------------------------------------------------------------
# A video


def place_story(
    path: Path, story: P.Story, window: int, stride: int, frames_per_latent: int = 4
) -> tuple[list[slice], list[tuple[int, int]]]:
    """Layout of a video: its windows in latent frames, and the first and last + 1 video frame of
    each event.

    Raises ValueError if the video cannot be read or is too short for the story.
    """
    count = count_frames(path)
    if count < 2:
        raise ValueError(f"{path} has {count} frame; at least two are needed.")
    latents = (count - 1) // frames_per_latent + 1
    windows = make_windows(latents, min(window, latents), min(stride, window, latents))
    spans = P.event_spans(windows, P.assign_events(windows, len(story.local_prompts), story.durations))
    return windows, [(int(a * count), int(b * count)) for a, b in spans]


def evaluate(
    path: Path,
    story: P.Story,
    windows: Sequence[slice],
    spans: Sequence[tuple[int, int]],
    networks: Networks,
    batch: int = 16,
    frames_per_latent: int = 4,
    extras: Mapping[str, DynamicDegree | MeanScore] | None = None,
) -> dict:
    """All measures of a video, with windows and spans from `place_story` and extras from
    `load_extras`. An extra that cannot be measured is left out, with a line."""
    frames, fps = read_frames(path)
    watch, subject, background, extras = Watch(fps), [], [], dict(extras or {})
    frames = iter(tqdm(frames, desc="frames", unit="frame", total=spans[-1][1]))
    while group := list(islice(frames, batch)):
        for frame in group:
            watch(frame)
        pictures = torch.from_numpy(np.stack(group)).permute(0, 3, 1, 2).float() / 255
        subject.append(networks.subject(pictures))
        background.append(networks.background(pictures))
        for name, measure in list(extras.items()):
            try:
                measure(pictures, fps)
            except ValueError as error:
                print(f"{name}: left out: {error}")
                del extras[name]
    subject, background = torch.cat(subject), torch.cat(background)
    whole, *texts = networks.text([story.global_prompt, *story.local_prompts])
    events = [fidelity(background[a:b], text) for (a, b), text in zip(spans, texts)]
    seams = seam_ratio(watch.differences, window_joins(windows, frames_per_latent))
    return {
        "frames": watch.frames,
        "subject consistency": consistency(subject),
        "background consistency": consistency(background),
        "global fidelity": fidelity(background, whole) if story.global_prompt else None,
        "local fidelity": statistics.mean(events),
        "scenes": watch.scenes,
        "seam ratio": seams if math.isfinite(seams) else None,  # JSON has no infinity
        "motion": watch.motion,
        "linear smoothness": watch.smoothness,
        **{name: measure.value for name, measure in extras.items()},
        "local fidelity of each event": events,
        "drift": drift(subject),
    }


# --------------------------------------------------------------------------------------------------
# A plot: how the estimates develop (the paper's Figure 3)


def principal_plane(traces: Sequence[Tensor]) -> list[Tensor]:
    """Project traces steps x F x D -> steps x F x 2 on shared axes: the first two principal
    components of all traces' last steps, with their mean at 0. (t-SNE would separate near points
    and draw gaps of any size; here distances mean the same in every panel.)"""
    ends = torch.cat([trace[-1] for trace in traces]).double()
    mean = ends.mean(0)
    axes = torch.linalg.svd(ends - mean, full_matrices=False).Vh[:2]
    return [(trace.double() - mean) @ axes.T for trace in traces]


def plot_trajectories(path: Path, picture: Path) -> None:
    """Plot a panel per method, a line per latent frame, coloured by its position, faint to vivid.

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
    if scores["seam ratio"] is None:
        lines.append("seam ratio               infinite: only the joins of windows move")
    curve = scores["drift"]
    far = sorted({min(d, len(curve)) for d in (1, 8, 32, 128, len(curve))})
    return "\n".join([*lines, "drift                    " + ", ".join(f"{curve[d - 1]:.3f} at {d}" for d in far)])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path, nargs="?")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--story", metavar="FILE", help='JSON file: {"global": "...", "local": ["...", ...]}')
    group.add_argument("--scenario", choices=P.SCENARIOS, metavar="NAME", help="a ready-made story of demo.py")
    group.add_argument("--trajectories", type=Path, metavar="FILE", help="plot a trace to FILE's name with .png")
    parser.add_argument("--window", type=int, default=13, help="window size in latent frames (default: 13)")
    parser.add_argument("--stride", type=int, default=4, help="window stride in latent frames (default: 4)")
    parser.add_argument("--frames_per_latent", type=int, default=4, help="1 for videocrafter2 (default: 4)")
    parser.add_argument("--dino", default=DINO, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--clip", default=CLIP, help="hub id or folder (default: %(default)s)")
    parser.add_argument("--raft", metavar="FILE", help="weights for the dynamic degree (default: torchvision's)")
    parser.add_argument("--laion", metavar="FILE", help="head for the aesthetic quality (default: LAION's)")
    parser.add_argument("--musiq", metavar="FILE", help="weights for the imaging quality (default: pyiqa's)")
    parser.add_argument("--no_extras", action="store_true", help="omit these three")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="frames per network call (default: 16)")
    parser.add_argument("--output_path", type=Path, help="(default: VIDEO's name with .scores.json)")
    args = parser.parse_args(argv)
    open_streams()
    try:
        if args.trajectories:
            check_packages("matplotlib")
            path = args.output_path or args.trajectories.with_suffix(".png")
            check_output(path, (".png",))
            plot_trajectories(args.trajectories, path)
            print(f"Wrote {path}")
            return
        if not args.video:
            raise ValueError("No video is given; use evaluate.py VIDEO --story FILE.")
        path = args.output_path or args.video.with_suffix(".scores.json")
        check_output(path, (".json",))
        story = P.SCENARIOS[args.scenario] if args.scenario else P.load_story(args.story)
        if missing := missing_device(args.device):
            raise ValueError(missing)
        if min(args.batch, args.window, args.stride, args.frames_per_latent) < 1:
            raise ValueError("--batch, --window, --stride and --frames_per_latent must be at least 1.")
        check_packages("cv2", "scenedetect")
        windows, spans = place_story(args.video, story, args.window, args.stride, args.frames_per_latent)
        for file in filter(None, (args.raft, args.laion, args.musiq)):
            if not Path(file).is_file():
                raise ValueError(f"The file {file} does not exist.")
        networks = Networks(args.dino, args.clip, args.device)
        weights = dict(zip(EXTRAS, (args.raft, args.laion, args.musiq)))
        extras = {} if args.no_extras else load_extras(weights, args.device)
        scores = evaluate(args.video, story, windows, spans, networks, args.batch, args.frames_per_latent, extras)
        text = json.dumps(scores, indent=1, allow_nan=False)  # raises ValueError
    except ValueError as error:
        reason = "A measure is not finite; weights of a network are damaged." if "compliant" in str(error) else error
        parser.exit(2, f"evaluate.py: {reason}\n")
    print(describe(scores))
    path.write_text(text + "\n")
    print(f"Wrote {path}")


if __name__ == "__main__":
    main()
