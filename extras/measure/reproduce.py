"""Measure videos of the tiny world: single clips, and four-event videos whose prompts leave colour
and place open.

    python -m extras.measure.reproduce quality
        single clips from full captions: how far are they from a clean picture, and how many have
        the right shape, colour, place and action?
    python -m extras.measure.reproduce looks
        single clips from prompts that leave colour and place open: does the noise choose them, or
        the prompt?
    python -m extras.measure.reproduce coherence
        four-event videos, SynCoS vs. Gen-L-Video or any settings: do the windows show one identity
        (colour and place), and do they follow their prompts?
    python -m extras.measure.reproduce tables
        the same for the rows of the paper's tables; `extras.measure.plots` plots them

Videos are read by fitting the world's own renderer to their frames. Each result is appended to a
file at once, so interrupted commands resume.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from extras.baselines import Method, Plan
from extras.measure.evaluate import Watch, check_packages, consistency, seam_ratio, window_joins
from extras.methods import METHODS, SynCoS
from extras.models import RECIPES, get_recipe
from extras.tiny import world as W
from prompts import Story
from syncos import ABLATIONS, Settings, count_evaluations, implied_noise, revert, syncos_step

NAMES = ["shape", "colour", "place", "action"]


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    means = x[torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))].mean(1)
    return x.mean().item(), *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def interval(values: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(values))


# --------------------------------------------------------------------------------------------------
# The model, and what its videos show


class TinyModel:
    """A tiny model, or another of its kind from a folder. guidance_scale: the recipe's if None."""

    def __init__(self, folder: str, dtype: str, backbone: str = "tiny", guidance_scale: float | None = None,
                 device: str = "cpu"):  # fmt: skip
        torch.backends.cudnn.allow_tf32 = False  # float32 is to mean the same on every device
        recipe = get_recipe(backbone, folder)
        self.recipe = recipe if guidance_scale is None else replace(recipe, guidance_scale=guidance_scale)
        self.backbone = self.recipe.backbone(folder, device, getattr(torch, dtype), self.recipe.guidance_scale)
        self.backbone.load()
        self.fitter = W.Fitter()
        weights = b"".join(path.read_bytes() for path in sorted(Path(folder).rglob("*.safetensors")))
        self.name = f"{hashlib.sha256(weights).hexdigest()[:12]} {dtype} {self.backbone.guidance_scale}"

    def video(self, latents: Tensor) -> Tensor:
        """Latents F C H W -> video T 3 H W in [0, 1]."""
        return torch.stack([torch.from_numpy(f) for f in self.backbone.decode(latents)]).permute(0, 3, 1, 2) / 255

    def distances(self, video: Tensor) -> list[float]:
        """Mean square distance of each frame, T 3 H W, from the picture of the closest fit."""
        story, motion = self.fitter(video)
        picture = W.render(torch.tensor([story]), self.fitter.refine(video, story, motion)[None])[0]
        return (picture - video).square().mean((1, 2, 3)).tolist()

    def read(self, latents: Tensor, windows: list[slice]) -> dict:
        """What a video shows: the story and the object's colour in each window, the mean square
        distance of each latent frame from the nearest picture of these stories, its sharpness
        relative to that picture, the similarity of the windows' middle frames as pictures (noise
        included), and the values of `Watch`."""
        watch, fits, colors, motions = Watch(), [], [], {}
        for frame in (video := self.video(latents)):
            watch(frame.permute(1, 2, 0).mul(255).round().byte().numpy())
        each = self.recipe.frames_per_latent
        for w in windows:
            span = slice(each * w.start, each * (w.stop - 1) + 1)
            clip = video[span][::each]
            story, motion = self.fitter(clip)
            fits.append(story)
            colors.append(W.color_within(clip, story, motion))
            looks = motions.setdefault(story[:3], torch.full((len(video), 3), torch.nan))
            frames = span.stop - span.start
            looks[span] = F.interpolate(motion.T[None], frames, mode="linear", align_corners=True)[0].T
        nearest, edges = torch.full((len(video),), torch.inf), torch.ones(len(video))
        for look, motion in motions.items():
            at = (~motion.isnan().any(1)).nonzero()[:, 0]
            story = (*look, 0)
            picture = W.render(torch.tensor([story]), self.fitter.refine(video[at], story, motion[at])[None])[0]
            distance = (picture - video[at]).square().mean((1, 2, 3))
            closer = distance < nearest[at]
            nearest[at[closer]] = distance[closer]
            edges[at[closer]] = (slopes(video[at]) / slopes(picture))[closer]
        frames = [nearest[:1].mean().item(), *nearest[1:].view(-1, each).mean(1).tolist()]
        middles = video[[each * (w.start + w.stop - 1) // 2 for w in windows]].flatten(1)
        seams = seam_ratio(watch.differences, window_joins(windows, each))
        return dict(
            fits=fits,
            colors=colors,
            frames=frames,
            sharpness=edges.mean().item(),
            pictures=consistency(middles - middles.mean(1, keepdim=True)),  # so the cosine is a correlation
            motion=watch.motion,
            seams=seams,
            scenes=watch.scenes,
        )


def slopes(video: Tensor) -> Tensor:
    """Energy of differences between neighbouring pixels, which blur lowers: T 3 H W -> T."""
    return sum(video.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3))


# --------------------------------------------------------------------------------------------------
# Single clips


def sample_clips(model: TinyModel, noise: Tensor, captions: list[str], steps: int) -> list[Tensor]:
    """Videos, T 3 H W each, by plain DDIM. noise: n f C H W; n captions."""
    backbone, x = model.backbone, noise
    levels = backbone.levels(steps)
    backbone.encode(captions)
    for level, prev in zip(levels, levels[1:]):
        x0 = backbone.predict_x0(x, level.t, captions)
        x = revert(x0, implied_noise(x, x0, level), prev)
    return [model.video(z) for z in x]


def quality(model: TinyModel, n: int, done: dict, keep: Callable) -> None:
    """Print the quality of n clips of random stories, in 50 steps, ten at a time."""
    for batch in tqdm(range(0, n, 10), desc="clips / 10"):
        key = f"clips {model.name} {batch}"
        if key in done:
            continue
        generator = torch.Generator().manual_seed(batch)
        stories = W.sample_stories(10, generator)
        noise = torch.randn(10, model.recipe.window, *model.recipe.latent, generator=generator)
        videos = sample_clips(model, noise, [W.caption(s) for s in stories], steps=50)
        keep(key, [[model.fitter(v)[0], s, model.distances(v)] for v, s in zip(videos, stories.tolist())])
    clips = [clip for batch in range(0, n, 10) for clip in done[f"clips {model.name} {batch}"]]
    pairs = [(got, asked) for got, asked, _ in clips]
    print(f"{len(clips)} clips from full captions, mean square distance x 1000 from the picture of their own fit:")
    print(f"  clip {interval([1000 * statistics.mean(distances) for *_, distances in clips])}")
    print(f"  its worst frame {interval([1000 * max(distances) for *_, distances in clips])}")
    print("Share that is correct (95 % bootstrap interval, as above):")
    for i, name in enumerate(NAMES):
        print(f"  {name:8} {interval([float(got[i] == asked[i]) for got, asked in pairs])}")
    for i, phrase in enumerate(W.ACTIONS.values()):
        right = [[float(g == a) for g, a in zip(got, asked)] for got, asked in pairs if asked[3] == i]
        shares = ", ".join(f"{name} {sum(column) / len(right):.2f}" for name, column in zip(NAMES, zip(*right)))
        print(f"  {len(right)} clips of {phrase!r}: {shares}")


def looks(model: TinyModel, n: int, done: dict, keep: Callable) -> None:
    """Print how often two of n clips agree in colour and place: clips of one noise whose local
    prompts differ, and clips of one prompt whose noises differ."""
    captions, seen = [f"A ball. {action}" for action in W.ACTIONS.values()], []
    for seed in tqdm(range(n // len(captions)), desc=f"clips / {len(captions)}"):
        if (key := f"looks {model.name} {seed}") not in done:
            generator = torch.Generator().manual_seed(500 + seed)
            noise = torch.randn(1, model.recipe.window, *model.recipe.latent, generator=generator)
            noise = noise.expand(len(captions), *noise.shape[1:])
            videos = sample_clips(model, noise, captions, model.recipe.num_inference_steps)
            keep(key, [model.fitter(video)[0] for video in videos])
        seen.append(done[key])
    agree = lambda clips, i: [float(a[i] == b[i]) for a, b in itertools.combinations(clips, 2)]  # noqa: E731
    for i, name in enumerate(NAMES[1:3], 1):
        noise = [statistics.mean(agree(clips, i)) for clips in seen]
        prompt = [statistics.mean(agree(clips, i)) for clips in zip(*seen)]
        print(f"same {name}: {interval(noise)} with the same noise, {interval(prompt)} with the same prompt")


# --------------------------------------------------------------------------------------------------
# Long videos


def scenario(seed: int) -> tuple[Story, list[int], int]:
    """A four-event story of one shape, colour and place left open; its actions and shape."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    shape = int(torch.randint(len(W.SHAPES), (), generator=generator))
    actions = torch.randperm(len(W.ACTIONS), generator=generator)[:4].tolist()
    return Story(f"A {W.SHAPES[shape]}.", tuple(list(W.ACTIONS.values())[a] for a in actions)), actions, shape


def consistency_of(labels: Sequence) -> float:
    """VBench's formula on the windows' labels: the cosine of equal labels is 1, else 0."""
    _, index = torch.tensor(labels).unique(dim=0, return_inverse=True)
    return consistency(F.one_hot(index).float())


@dataclass(frozen=True)
class Varied(SynCoS):
    """SynCoS whose settings vary over the steps. [ours]"""

    first: int = 0  # number of steps at the start that use `before`
    before: Settings = Settings()
    fading: bool = False  # multiply stage 2's learning rate by sigma

    def evaluations(self, plan: Plan, steps: int) -> int:
        levels, cut = plan.levels[: steps + 1], min(self.first, steps)
        parts = ((levels[: cut + 1], self.before), (levels[cut:], self.settings))
        return sum(count_evaluations(part, plan.windows, settings) for part, settings in parts)

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        prompts, x, x0 = [plan.texts[event] for event in plan.events], latents, latents
        for step, level in enumerate(plan.levels[:-1]):
            own = self.before if step < self.first else self.settings
            own = replace(own, csd_lr=own.csd_lr * level.sigma) if self.fading else own
            rest = (step, plan.levels, plan.windows, prompts, own, generator)
            x0, x = syncos_step(backbone.predict_x0, x, x0, *rest, at_once=len(prompts))
        return x


def make_video(model: TinyModel, seed: int, change: dict) -> tuple[Plan, Method]:
    """Plan and method of a scenario. change: the method's name ("method", default syncos) and its
    fields; "steps", "num_frames", "stride", "shared_noise"; "structured", whether windows see the
    global prompt; "events", how many of the four are told; "first": [n, changes], for other
    settings in the first n steps, and "fading" (see `Varied`). Raises ValueError or TypeError."""
    change, recipe = dict(change), model.recipe
    name, structured = change.pop("method", "syncos"), change.pop("structured", True)
    story, *_ = scenario(seed)
    story = replace(story, local_prompts=story.local_prompts[: change.pop("events", None)])
    steps = change.pop("steps", recipe.num_inference_steps)
    recipe = replace(recipe, num_inference_steps=steps, num_frames=change.pop("num_frames", recipe.num_frames))
    recipe = replace(recipe, stride=change.pop("stride", recipe.stride))
    own = replace(recipe.settings, shared_noise=change.pop("shared_noise", recipe.settings.shared_noise))
    recipe = replace(recipe, settings=own)
    if name == "syncos":
        fading, (first, before) = change.pop("fading", False), change.pop("first", (0, {}))
        settings = replace(recipe.settings, **change)
        method, recipe = SynCoS(settings), replace(recipe, settings=settings)
        if first or fading:
            method = Varied(settings, first, replace(settings, **before), fading)
    else:
        method = replace(METHODS[name](recipe.settings), **change)
    plan = Plan(recipe, tuple(story.event_prompts(structured)))
    method.check(plan)
    return plan, method


def read_change(text: str, model: TinyModel) -> dict:
    """Parse a method's name, or settings as JSON, for `make_video`. Raises ValueError."""
    if text in METHODS:
        return dict(method=text)
    try:
        make_video(model, 0, change := json.loads(text))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{text} is neither one of {', '.join(METHODS)} nor settings as JSON: {error}") from None
    return change


def long_video(model: TinyModel, seed: int, change: dict, done: dict, keep: Callable) -> dict[str, float]:
    """Measures of a scenario's video; see `make_video`. All methods get the same noise."""
    plan, method = make_video(model, seed, change)
    recipe, backbone, windows, events = plan.recipe, model.backbone, plan.windows, plan.events
    steps, structured = recipe.num_inference_steps, change.get("structured", True)
    key = f"video {model.name} {method} {recipe.num_frames} {steps} {seed}" + " local" * (not structured)
    if recipe.stride != model.recipe.stride:
        key += f" stride {recipe.stride}"
    if "events" in change:
        key += f" events {change['events']}"
    key += " shared noise" * recipe.settings.shared_noise
    if key not in done:
        try:
            check_packages("cv2", "scenedetect")
        except ValueError as error:
            raise SystemExit(f"reproduce.py: {error}") from None
        backbone.encode(plan.texts)
        backbone.set_levels(plan.levels)
        generator = torch.Generator().manual_seed(seed)
        latents = method.sample(backbone, plan, plan.noise(generator), generator)
        keep(key, model.read(latents, windows) | dict(events=events))
    seen, (_, actions, shape) = done[key], scenario(seed)
    events = seen["events"]  # as the windows were told
    shapes, colors, places, _ = zip(*seen["fits"])
    follows = [float(fit[3] == actions[e]) for fit, e in zip(seen["fits"], events)]
    meets = [len(set(events[max(i - 1, 0) : i + 2])) > 1 for i in range(len(events))]  # next to another event's window
    values = {
        "subject consistency": consistency_of(list(zip(shapes, colors))),
        "background consistency": consistency_of(places),
        "identities": len(set(zip(colors, places))),
        "structure flicker": sum(a[:3] != b[:3] for a, b in zip(seen["fits"], seen["fits"][1:])),
        "local fidelity": statistics.mean(follows),
        "at joins": statistics.mean([f for f, meet in zip(follows, meets) if meet] or [math.nan]),
        "elsewhere": statistics.mean([f for f, meet in zip(follows, meets) if not meet] or [math.nan]),
        "global fidelity": statistics.mean(s == shape for s in shapes),
        "distance x 1000": 1000 * statistics.mean(seen.get("frames") or [seen["distance"]]),
        "motion x 1000": 1000 * seen["motion"],
    }
    if each := seen.get("frames"):  # smears: frames where windows of another event begin, and the next ones
        starts = [w.start for w, a, b in zip(windows[1:], events, events[1:]) if a != b]
        joins = [each[k] for start in starts for k in (start, start + 1)] or [math.nan]
        values["worst frame x 1000"], values["joins x 1000"] = 1000 * max(each), 1000 * statistics.mean(joins)
    if "colors" in seen:
        values["colour drift"] = torch.pdist(torch.tensor(seen["colors"])).mean().item()
    others = {"pictures": "picture consistency", "sharpness": "sharpness", "seams": "seams", "scenes": "scenes"}
    values |= {name: seen[k] for k, name in others.items() if k in seen}
    return values | {"evaluations": method.evaluations(plan, method.steps(plan))}


# --------------------------------------------------------------------------------------------------
# The paper's tables

MEASURES = [  # of the content, and of the pictures
    ["subject consistency", "background consistency", "local fidelity", "global fidelity", "at joins", "elsewhere",
     "identities", "colour drift", "structure flicker"],
    ["picture consistency", "distance x 1000", "worst frame x 1000", "joins x 1000", "sharpness", "motion x 1000",
     "seams", "scenes"],
]  # fmt: skip
TABLE_1, TABLE_2, TABLE_3 = (0.8892, 0.9457, 0.354, 0.341), (0.864, 0.927, 0.381), (0.8270, 0.9185, 0.348, 0.325)
TABLE_5, TABLE_5_UNET = (0.864, 0.927, 0.381), (0.911, 0.947, 0.365)
TABLES = {  # row: (change, (the paper's numbers for the row, those for SynCoS in the same table)); the numbers
    # are consistency of subject and background, local and global fidelity (Table 2: one fidelity)
    "SynCoS": ({}, None),
    "the paper's settings": (dict(t_min=800, csd_iters=20, csd_lr=0.5, steps=50), None),
    "2 iterations": (dict(csd_iters=2), None),
    "1 iteration": (dict(csd_iters=1), None),
    "1 iteration, 20 steps": (dict(csd_iters=1, steps=20), None),
    "Gen-L-Video": (dict(method="gen-l-video"), ((0.8134, 0.8946, 0.351, 0.324), TABLE_1)),
    "FIFO-Diffusion": (dict(method="fifo", steps=50), ((0.8354, 0.9072, 0.327, 0.323), TABLE_1)),  # a long enough queue
    "DiTCtrl": (dict(method="ditctrl"), ((0.821, 0.916, 0.394), TABLE_5)),
    "DiTCtrl, SDE": (dict(method="ditctrl-sde"), ((0.821, 0.916, 0.394), TABLE_5)),  # the authors' solver
    "CSD": (dict(method="csd"), None),
    "CSD, learning rate 1": (dict(method="csd", lr=1.0), None),  # SynCoS's
    "stage 2 alone": (dict(method="stage-2-alone"), ((0.7888, 0.9163, 0.300, 0.305), TABLE_3)),
    "w/o stage 1": (ABLATIONS["stage-1"], None),
    "w/o stage 2, its noise kept": (ABLATIONS["stage-2-keep-noise"], None),
    "w/o stage 3": (ABLATIONS["stage-3"], None),
    "w/o grounded timestep": (ABLATIONS["grounded-timestep"], ((0.803, 0.899, 0.364), TABLE_2)),
    "w/o fixed noise": (ABLATIONS["fixed-noise"], ((0.817, 0.904, 0.382), TABLE_2)),
    "w/o t_min": (ABLATIONS["t-min"], ((0.724, 0.854, 0.373), TABLE_2)),
    "w/o structured prompt": (dict(structured=False), ((0.837, 0.903, 0.362), TABLE_2)),
}
OWN = dict(shared_noise=False)
TABLES_UNET = {  # the same for tiny-unet, whose recipe shares the noise; Video-Infinity is read clip by clip
    "SynCoS": ({}, None),
    "SynCoS, own noise": (OWN, None),
    "Gen-L-Video": (dict(method="gen-l-video", **OWN), None),
    "Video-Infinity": (dict(method="video-infinity", stride=16, **OWN), ((0.879, 0.943, 0.365), TABLE_5_UNET)),
    "stage 2 alone": (dict(method="stage-2-alone"), None),
}
SUMMARY = ["subject consistency", "background consistency", "local fidelity", "identities", "distance x 1000"]
PAPERS = {  # measure: index of its number. Subject consistency appears twice, as the paper's features see noise too
    "subject consistency": 0, "background consistency": 1, "local fidelity": 2, "global fidelity": 3,
    "picture consistency": 0,
}  # fmt: skip


def verdict(differences: list[float], papers: float) -> str:
    """Whether a row differs from SynCoS in the direction that the paper reports."""
    mean, low, high = bootstrap(differences)
    if low <= 0 <= high:
        return "not distinguishable"
    return "reproduced" if mean * papers > 0 else "not reproduced"


def measure_rows(model, seeds: range, rows: dict[str, tuple], done: dict, keep: Callable) -> dict[str, list[dict]]:
    """Values of every row's videos, one per scenario. rows: like TABLES."""
    videos: dict[str, list[dict]] = {}
    with tqdm(total=len(rows) * len(seeds), unit="video") as bar:
        for name, (change, _) in rows.items():
            bar.set_description(name)
            videos[name] = []
            for seed in seeds:
                videos[name].append(long_video(model, seed, change, done, keep))
                bar.update()
    return videos


def differences(videos: dict[str, list[dict]], name: str, measure: str) -> list[float]:
    """A row minus the first one, per scenario."""
    return [a[measure] - b[measure] for a, b in zip(videos[name], next(iter(videos.values())))]


def papers_pair(row: tuple, measure: str) -> tuple[float, float] | None:
    """The paper's numbers for a row of TABLES and for SynCoS in the same table, or None."""
    k = PAPERS.get(measure, math.inf)
    return (row[1][0][k], row[1][1][k]) if row[1] and k < len(row[1][0]) else None


def print_tables(videos: dict[str, list[dict]], rows: dict[str, tuple]) -> None:
    """Print Markdown tables: a summary, the rows' means, and their differences from the first row
    per scenario, with the paper's numbers and the verdict where there are some."""
    first, *others = rows
    head = lambda measures: f"| | {' | '.join(measures)} |\n" + "|---" * (len(measures) + 1) + "|"  # noqa: E731
    print(f"{len(videos[first])} scenarios of four events; means\n\n{head(['evaluations', *SUMMARY])}")
    for name, each in videos.items():
        means = [f"{statistics.mean(v[m] for v in each):.2f}" for m in SUMMARY]
        print(f"| {name} | {each[0]['evaluations']} | {' | '.join(means)} |")
    print("\nMean [95 % bootstrap interval]")
    for group in MEASURES:
        measures = [measure for measure in group if measure in videos[first][0]]
        print(f"\n{head(measures)}")
        for name, each in videos.items():
            print(f"| {name} | {' | '.join(interval([v[m] for v in each]) for m in measures)} |")
        print(f"\nDifference from {first} per scenario; in brackets, the paper's row and {first}\n\n{head(measures)}")
        for name in others:
            cells = []
            for m in measures:
                cells.append(interval(d := differences(videos, name, m)))
                if pair := papers_pair(rows[name], m):
                    cells[-1] += " (paper: {:.3g} - {:.3g})".format(*pair) + f" *{verdict(d, pair[0] - pair[1])}*"
            print(f"| {name} | {' | '.join(cells)} |")


SEEDS = dict(coherence=(100, 120), tables=(110, 170))  # settings are chosen on 0 to 19 only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "looks", "coherence", "tables"])
    parser.add_argument("--backbone", choices=["tiny", "tiny-unet"], default="tiny", help="(default: %(default)s)")
    parser.add_argument("--model", help="the folder of another model of that kind")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="of the model; noise is drawn on the CPU (default: cpu)")
    parser.add_argument("--guidance_scale", type=float, help="(default: the recipe's)")
    parser.add_argument("--clips", type=int, default=200, help="for quality and looks (default: 200)")
    parser.add_argument("--scenarios", type=int, nargs=2, help=f"first and last + 1 (default: {SEEDS})")
    parser.add_argument("--methods", nargs="+", default=["syncos", "gen-l-video"], help="for coherence: names, or "
                        'changes to the settings as JSON, e.g. \'{"t_min": 600, "steps": 25}\'')  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share the scenarios")
    parser.add_argument("--results", type=Path, default=Path("reproduce.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    folder = args.model or RECIPES[args.backbone].model
    model = TinyModel(folder, args.dtype, args.backbone, args.guidance_scale, args.device)
    try:
        rows = {method: (read_change(method, model), None) for method in args.methods}
    except ValueError as error:
        parser.error(f"--methods: {error}")
    if args.what == "tables":
        rows = TABLES_UNET if args.backbone == "tiny-unet" else TABLES

    if args.what not in ("quality", "looks"):
        first, last = args.scenarios or SEEDS[args.what]
        if args.jobs > 1:  # others each measure part of the scenarios; then this one finds all results done
            cuts = [first + (last - first) * i // args.jobs for i in range(args.jobs + 1)]
            parts = [["--scenarios", str(a), str(b), "--jobs", "1"] for a, b in zip(cuts, cuts[1:]) if a < b]
            command = [sys.executable, "-m", "extras.measure.reproduce", *sys.argv[1:]]
            alone, quiet = os.environ | {"OMP_NUM_THREADS": "1"}, {"TQDM_DISABLE": "1"}
            others = [
                subprocess.Popen(command + part, stdout=subprocess.DEVNULL, env=alone | (quiet if i else {}))
                for i, part in enumerate(parts)  # only the first one shows its progress bar
            ]
            if any([other.wait() for other in others]):
                raise SystemExit(1)

    done = dict(map(json.loads, args.results.read_text().splitlines())) if args.results.exists() else {}

    def keep(key, value):
        done[key] = json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}"))
        with args.results.open("a") as file:
            file.write(json.dumps([key, done[key]]) + "\n")

    if args.what in ("quality", "looks"):
        dict(quality=quality, looks=looks)[args.what](model, args.clips, done, keep)
    else:
        print_tables(measure_rows(model, range(first, last), rows, done, keep), rows)


if __name__ == "__main__":
    main()
