"""Measure what the tiny world shows: single clips, and four-event videos whose colour and place are left open.

    python measure/reproduce.py quality      single clips of full captions: how far they are from a clean picture, the
                                             share that is right in shape, colour, place and action
    python measure/reproduce.py coherence    four-event videos, SynCoS against Gen-L-Video or any settings: do the
                                             windows show one identity (colour and place), do they follow their prompts
    python measure/reproduce.py chart        the same against the number of model evaluations, for many settings
    python measure/reproduce.py tables       the same for the rows of the paper's Tables 1 to 3

Two denoisers: "tiny", the trained model, read by fitting the world's own renderer to its frames, and "exact", the
posterior mean over a few hundred rendered clips, which needs no training. Each result is kept in a file as it comes;
the same command goes on where it was stopped.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

import world as W  # noqa: E402
from backbones import get_recipe  # noqa: E402
from evaluate import Watch, consistency, seam_ratio, window_joins  # noqa: E402
from fifo import FifoSettings, count_turns, fifo, stack_levels  # noqa: E402
from fifo import count_evaluations as count_fifo  # noqa: E402
from prompts import Story, assign_events, frame_events  # noqa: E402
from syncos import ABLATIONS, METHODS, count_evaluations, implied_noise, make_windows, revert, syncos  # noqa: E402

NAMES = ["shape", "colour", "place", "action"]


def bootstrap(values: list[float], draws: int = 10000) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    means = x[torch.randint(len(x), (draws, len(x)), generator=torch.Generator().manual_seed(0))].mean(1)
    return x.mean().item(), *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def interval(values: list[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(values))


# ----------------------------------------------------------------------------------------------------------------------
# The two denoisers: encode, levels and predict_x0 as a backbone has them; read(x, windows) says what a video shows


class TinyModel:
    """The trained model, or another of its kind from a folder."""

    def __init__(self, folder: str, dtype: str):
        self.recipe = get_recipe("tiny", folder)
        backbone = self.recipe.backbone(folder, "cpu", getattr(torch, dtype), self.recipe.guidance_scale)
        backbone.load()
        self.encode, self.levels, self.predict_x0 = backbone.encode, backbone.levels, backbone.predict_x0
        self.decode, self.fitter = backbone.decode, W.Fitter()
        weights = b"".join(path.read_bytes() for path in sorted(Path(folder).rglob("*.safetensors")))
        self.name = (
            f"{hashlib.sha256(weights).hexdigest()[:12]} {dtype} {backbone.guidance_scale}"  # what results are of
        )

    def video(self, latents: Tensor) -> Tensor:
        """Latents F C H W -> video T 3 H W in [0, 1]."""
        return torch.stack([torch.from_numpy(f) for f in self.decode(latents)]).permute(0, 3, 1, 2) / 255

    def distances(self, video: Tensor) -> list[float]:
        """Of each frame of a clip, T 3 H W, the mean square distance from the picture of the clip's closest fit."""
        story, motion = self.fitter(video)
        picture = W.render(torch.tensor([story]), self.fitter.refine(video, story, motion)[None])[0]
        return (picture - video).square().mean((1, 2, 3)).tolist()

    def read(self, latents: Tensor, windows: list[slice]) -> dict:
        """What a video shows: the story of each window, the mean square distance of each latent frame from the nearest
        of these stories' own pictures, how sharp it is beside that, how alike the windows' middle frames are as
        pictures, noise and all, and what `Watch` sees."""
        watch, fits, motions = Watch(), [], {}
        for frame in (video := self.video(latents)):
            watch(frame.permute(1, 2, 0).mul(255).round().byte().numpy())
        for w in windows:
            span = slice(4 * w.start, 4 * w.start + W.FRAMES)
            story, motion = self.fitter(video[span][::4])
            fits.append(story)
            looks = motions.setdefault(story[:3], torch.full((len(video), 3), torch.nan))
            looks[span] = F.interpolate(motion.T[None], W.FRAMES, mode="linear", align_corners=True)[0].T
        nearest, edges = torch.full((len(video),), torch.inf), torch.ones(len(video))
        for look, motion in motions.items():
            at = (~motion.isnan().any(1)).nonzero()[:, 0]
            story = (*look, 0)
            picture = W.render(torch.tensor([story]), self.fitter.refine(video[at], story, motion[at])[None])[0]
            distance = (picture - video[at]).square().mean((1, 2, 3))
            closer = distance < nearest[at]
            nearest[at[closer]] = distance[closer]
            edges[at[closer]] = (slopes(video[at]) / slopes(picture))[closer]
        frames = [nearest[:1].mean().item(), *nearest[1:].view(-1, 4).mean(1).tolist()]
        middles = video[[4 * w.start + W.FRAMES // 2 for w in windows]].flatten(1)
        seams = seam_ratio(watch.differences, window_joins(windows))
        return dict(
            fits=fits,
            frames=frames,
            sharpness=edges.mean().item(),
            pictures=consistency(middles - middles.mean(1, keepdim=True)),  # a cosine is then a correlation
            motion=watch.motion,
            seams=seams,
            scenes=watch.scenes,
        )


def slopes(video: Tensor) -> Tensor:
    """The energy of differences between neighbouring pixels, which blur lowers: T 3 H W -> T."""
    return sum(video.diff(dim=axis).square().mean((1, 2, 3)) for axis in (2, 3))


class Exact:
    """The posterior mean over rendered clips: 13 frames of 8x8 pixels in [-1, 1], an action from each of 25 phases, in
    5 colours and 4 places. The actions go round, so that neighbouring windows can agree exactly."""

    name, SIZE, PHASES = "exact", 8, 25

    def __init__(self):
        self.recipe = replace(get_recipe("tiny"), latent=(3, self.SIZE, self.SIZE))

    def levels(self, steps: int) -> list:
        levels = self.recipe.backbone.make_levels(self.recipe.scheduler, steps)
        self.at = {level.t: level for level in levels}
        return levels

    def encode(self, prompts: list[str]) -> None:
        """Renders the clips of each prompt: "A star. It jumps."; one shape for all."""
        which = lambda names, prompt: next(i for i, name in enumerate(names) if name in prompt)  # noqa: E731
        self.shape = which(W.SHAPES, prompts[0])
        self.actions = {p: which(W.ACTIONS.values(), p) for p in dict.fromkeys(prompts)}
        self.clips = {p: self.render(self.shape, action) for p, action in self.actions.items()}

    @functools.cache  # noqa: B019
    def render(self, shape: int, action: int) -> Tensor:
        """Clips, 500 x D, ordered by colour, place and phase."""
        phase = (torch.arange(self.PHASES)[:, None] + torch.arange(self.recipe.window)) % self.PHASES / self.PHASES
        x, s, hop = torch.full_like(phase, 0.5), torch.ones_like(phase), torch.zeros_like(phase)
        if action == 2:
            hop = 0.25 * torch.sin(torch.pi * phase)
        elif action < 2:
            x = 0.2 + 0.6 * (phase if action == 0 else 1 - phase)
        else:
            s = 0.65 + 0.7 * (phase if action == 3 else 1 - phase)
        motion = torch.stack([x, W.GROUND - W.RADIUS * s - hop, s], -1)
        looks = [[shape, color, place, action] for color in range(len(W.COLORS)) for place in range(len(W.BACKGROUNDS))]
        stories = torch.tensor(looks).repeat_interleave(self.PHASES, 0)
        video = W.render(stories, motion.repeat(len(looks), 1, 1))
        return F.avg_pool2d(video.flatten(0, 1), W.SIZE // self.SIZE).view(len(stories), -1) * 2 - 1

    def predict_x0(self, latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        t = t.tolist() if isinstance(t, Tensor) else [[t] * latents.shape[1]] * len(latents)
        level, out = stack_levels([[self.at[each] for each in row] for row in t], latents.device), []
        weights = [x.expand_as(latents).flatten(1) for x in (level.alpha / level.sigma**2, level.alpha / level.sigma)]
        for x, prompt, each, per_clip in zip(latents.flatten(1), prompts, *weights):
            clips = self.clips[prompt]
            logits = clips @ (each * x) - clips.square() @ (per_clip**2 / 2)  # -|x - a clip|^2 / 2 s^2 + constant
            out.append(logits.softmax(0) @ clips)
        return torch.stack(out).view_as(latents)

    def read(self, latents: Tensor, windows: list[slice]) -> dict:
        """What a video shows: the story of the clip that is nearest to each window, the mean square distance from it,
        and the mean difference between frames. All of pixels in [0, 1]."""
        fits, distances = [], []
        for w in windows:
            nearest = {p: (clips - latents[w].flatten()).square().mean(1).min(0) for p, clips in self.clips.items()}
            prompt, (distance, n) = min(nearest.items(), key=lambda item: item[1].values)
            look = n.item() // self.PHASES
            fits.append((self.shape, look // len(W.BACKGROUNDS), look % len(W.BACKGROUNDS), self.actions[prompt]))
            distances.append(distance.item() / 4)
        motion = (latents[1:] - latents[:-1]).abs().mean().item() / 2
        return dict(fits=fits, distance=statistics.mean(distances), motion=motion)


# ----------------------------------------------------------------------------------------------------------------------
# Single clips


def quality(model: TinyModel, n: int, done: dict, keep: Callable) -> None:
    """n clips of random stories, ten at a time, by plain DDIM in 50 steps."""
    levels = model.levels(50)
    for batch in tqdm(range(0, n, 10), desc="clips / 10"):
        key = f"clips {model.name} {batch}"
        if key in done:
            continue
        generator = torch.Generator().manual_seed(batch)
        stories = W.sample_stories(10, generator)
        captions = [W.caption(s) for s in stories]
        model.encode(captions)
        x = torch.randn(10, model.recipe.window, *model.recipe.latent, generator=generator)
        for level, prev in zip(levels, levels[1:]):
            x0 = model.predict_x0(x, level.t, captions)
            x = revert(x0, implied_noise(x, x0, level), prev)
        videos = [model.video(z) for z in x]
        keep(key, [[model.fitter(v)[0], s, model.distances(v)] for v, s in zip(videos, stories.tolist())])
    clips = [clip for batch in range(0, n, 10) for clip in done[f"clips {model.name} {batch}"]]
    pairs = [(got, asked) for got, asked, _ in clips]
    print(f"{len(clips)} clips of full captions, mean square distance x 1000 from the picture of their own fit:")
    print(f"  of a clip {interval([1000 * statistics.mean(distances) for *_, distances in clips])}")
    print(f"  of its worst frame {interval([1000 * max(distances) for *_, distances in clips])}")
    print("Share that is right (95 % bootstrap interval, as above):")
    for i, name in enumerate(NAMES):
        print(f"  {name:8} {interval([float(got[i] == asked[i]) for got, asked in pairs])}")
    for i, phrase in enumerate(W.ACTIONS.values()):
        right = [[float(g == a) for g, a in zip(got, asked)] for got, asked in pairs if asked[3] == i]
        shares = ", ".join(f"{name} {sum(column) / len(right):.2f}" for name, column in zip(NAMES, zip(*right)))
        print(f"  {len(right)} clips of {phrase!r}: {shares}")


# ----------------------------------------------------------------------------------------------------------------------
# Long videos


def scenario(seed: int) -> tuple[Story, list[int], int]:
    """A four-event story of one shape whose colour and place are open; its actions, and the shape."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    shape = int(torch.randint(len(W.SHAPES), (), generator=generator))
    actions = torch.randperm(len(W.ACTIONS), generator=generator)[:4].tolist()
    return Story(f"A {W.SHAPES[shape]}.", tuple(list(W.ACTIONS.values())[a] for a in actions)), actions, shape


def consistency_of(labels: Sequence) -> float:
    """VBench's formula for windows whose features are what they show: a cosine is 1 where that is equal, else 0."""
    _, index = torch.tensor(labels).unique(dim=0, return_inverse=True)
    return consistency(F.one_hot(index).float())


def read_change(text: str) -> dict:
    """A method's name, or settings as JSON, as a change for `long_video`. Raises ValueError."""
    if text in METHODS or text == "fifo":
        return METHODS.get(text, dict(fifo={}))
    try:
        change = json.loads(text)
        ours = ("num_frames", "steps", "structured", "fading", "fifo")
        FifoSettings(**change.get("fifo", {}))
        replace(get_recipe("tiny").settings, **{k: v for k, v in change.items() if k not in ours})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{text} is neither one of {', '.join([*METHODS, 'fifo'])} nor settings as JSON: {error}"
        ) from None
    return change


def syncos_fading(predict_x0, latents, levels, windows, prompts, settings, generator) -> Tensor:
    """`syncos`, step by step, each with its own learning rate of stage 2: the settings' times sigma."""
    x, estimates = latents, [None]
    for step, level in enumerate(levels[:-1]):
        own = replace(settings, csd_lr=settings.csd_lr * level.sigma)
        keep = lambda step, t, x0, x: estimates.append(x0)  # noqa: E731
        x = syncos(predict_x0, x, levels[: step + 2], windows, prompts, own, generator, keep, step, estimates[-1])
    return x


def long_video(model, seed: int, change: dict, done: dict, keep: Callable) -> dict[str, float]:
    """What a scenario's windows show, and its model evaluations, with some settings changed; from the same noise.

    change: fields of Settings; num_frames; steps; structured, whether windows see the global prompt too; fading, by
    `syncos_fading`; fifo, fields of FifoSettings: by that method.
    """
    change, recipe = dict(change), model.recipe
    frames, structured = change.pop("num_frames", recipe.num_frames), change.pop("structured", True)
    fading = change.pop("fading", False)
    steps, queue = change.pop("steps", recipe.num_inference_steps), change.pop("fifo", None)
    settings = replace(recipe.settings, **change) if queue is None else FifoSettings(**queue)
    levels, size, stride = model.levels(steps), recipe.window, change.get("stride", recipe.settings.stride)
    windows = make_windows((frames - 1) // 4 + 1, size, stride)
    story, actions, shape = scenario(seed)
    events = assign_events(windows, len(actions))
    if queue is None:
        method, of, events_of = syncos_fading if fading else syncos, windows, events
        count = count_evaluations(levels, windows, settings)
    else:
        method, of, events_of = fifo, size, frame_events(windows, events)
        count = count_fifo(steps, size, count_turns(steps, size, windows[-1].stop), settings)
    key = f"video {model.name} {settings} {frames} {steps} {seed}" + " local" * (not structured) + " fading" * fading
    if key not in done:
        prompts = story.event_prompts(structured)
        model.encode(prompts)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(windows[-1].stop, *recipe.latent, generator=generator)
        each = [prompts[e] for e in events_of]
        keep(key, model.read(method(model.predict_x0, noise, levels, of, each, settings, generator), windows))
    seen = done[key]
    shapes, colors, places, _ = zip(*seen["fits"])
    follows = [float(fit[3] == actions[e]) for fit, e in zip(seen["fits"], events)]
    meets = [len(set(events[max(i - 1, 0) : i + 2])) > 1 for i in range(len(events))]  # another event's window beside
    values = {
        "subject consistency": consistency_of(list(zip(shapes, colors))),
        "background consistency": consistency_of(places),
        "identities": len(set(zip(colors, places))),
        "structure flicker": sum(a[:3] != b[:3] for a, b in zip(seen["fits"], seen["fits"][1:])),
        "local fidelity": statistics.mean(follows),
        "at joins": statistics.mean([f for f, meet in zip(follows, meets) if meet]),
        "elsewhere": statistics.mean([f for f, meet in zip(follows, meets) if not meet] or [math.nan]),
        "global fidelity": statistics.mean(s == shape for s in shapes),
        "distance x 1000": 1000 * statistics.mean(seen.get("frames") or [seen["distance"]]),
        "motion x 1000": 1000 * seen["motion"],
    }
    if each := seen.get("frames"):  # smears: where windows of another event begin, and the frame after it
        starts = [w.start for w, a, b in zip(windows[1:], events, events[1:]) if a != b]
        joins = [each[k] for start in starts for k in (start, start + 1)]
        values["worst frame x 1000"], values["joins x 1000"] = 1000 * max(each), 1000 * statistics.mean(joins)
    others = {"pictures": "picture consistency", "sharpness": "sharpness", "seams": "seams", "scenes": "scenes"}
    return values | {name: seen[k] for k, name in others.items() if k in seen} | {"evaluations": count}


GEN_L_VIDEO, RENOISING = METHODS["gen-l-video"], ABLATIONS["stage-2-keep-noise"]
CHART_BASE = dict(steps=50, t_min=500, csd_iters=5, csd_batch=4, csd_lr=0.5)
CHART = {  # what is changed from that
    "Gen-L-Video": [GEN_L_VIDEO],
    "re-noising alone, t_min 300 to 800": [RENOISING | dict(t_min=t) for t in (300, 400, 500, 600, 800)],
    "SynCoS, t_min 300 to 800": [dict(t_min=t) for t in (300, 400, 500, 600, 800)],
    "SynCoS, the paper's t_min 800, 20 iterations": [dict(t_min=800, csd_iters=20)],
    "SynCoS, 2 iterations, t_min 300 to 600": [dict(csd_iters=2, t_min=t) for t in (300, 400, 500, 600)],
    "SynCoS, B 2, 4, 10": [dict(csd_batch=n) for n in (2, 4, 10)],
}
EXACT = {  # with the exact denoiser only: the trained model would take hours
    "SynCoS, learning rate 0.25, 0.5, 1": [dict(csd_lr=lr) for lr in (0.25, 0.5, 1.0)],
    "SynCoS, 2 to 50 iterations": [dict(csd_iters=n) for n in (2, 5, 20, 50)],
    "SynCoS, no weight decay": [dict(csd_weight_decay=0.0)],
}
LONG = {  # lengths, in base clips; with the exact denoiser only, too
    name: [change | dict(num_frames=48 * times + 1) for times in (5, 10, 20)]
    for name, change in {"Gen-L-Video": GEN_L_VIDEO, "re-noising alone": RENOISING, "SynCoS": {}}.items()
}


def chart(models: list, seeds: range, path: Path, done: dict, keep: Callable) -> None:
    """A table of all families of settings, and a picture of those at the base length against evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = ["identities", "local fidelity", "motion x 1000", "distance x 1000"]
    figure, axes = plt.subplots(len(shown), len(models), figsize=(6 * len(models), 11), sharex=True, squeeze=False)
    for column, model in zip(axes.T, models):
        print(f"{model.name}: {len(seeds)} scenarios; mean [95 % bootstrap interval]")
        print(f"{'':64}{'evaluations':>12}" + "".join(f"{name[:20]:>24}" for name in shown))
        more = model.name == "exact"
        for families, drawn in ((CHART | (EXACT if more else {}), True), (LONG if more else {}, False)):
            for family, changes in families.items():
                points = []
                for change in changes:
                    about = f"{model.name[:6]} {family} {change}"
                    values = [
                        long_video(model, seed, CHART_BASE | change, done, keep)
                        for seed in tqdm(seeds, about, leave=False)
                    ]
                    points.append({name: [v[name] for v in values] for name in values[0]})
                    evaluations = points[-1]["evaluations"][0]
                    figures = "".join(f"{interval(points[-1][name]):>24}" for name in shown)
                    print(f"{family[:24]:26}{json.dumps(change)[:36]:38}{evaluations:12}{figures}")
                for axis, name in zip(column, shown) if drawn else ():
                    mean, low, high = torch.tensor([bootstrap(p[name]) for p in points]).T
                    x = [p["evaluations"][0] / 500 for p in points]
                    style = "o-" if len(points) > 1 else "s"
                    axis.errorbar(x, mean, (mean - low, high - mean), fmt=style, label=family, capsize=2, alpha=0.8)
                    axis.set_ylabel(name)
        column[0].set_title(f"{model.name} denoiser" if model.name == "exact" else "tiny model")
        column[-1].set_xlabel("model evaluations / Gen-L-Video's")
        column[-1].set_xscale("log")
        column[-1].set_xticks(ticks := [1, 1.5, 2, 3, 5, 10], ticks, minor=False)
        column[-1].minorticks_off()
    axes[0, -1].legend(
        *axes[0, 0].get_legend_handles_labels(), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    figure.savefig(path, format="png", bbox_inches="tight", dpi=80)


# ----------------------------------------------------------------------------------------------------------------------
# The paper's tables

MEASURES = [  # of what is shown, and of the pictures
    ["subject consistency", "background consistency", "local fidelity", "global fidelity", "at joins", "elsewhere",
     "identities", "structure flicker"],
    ["picture consistency", "distance x 1000", "worst frame x 1000", "joins x 1000", "sharpness", "motion x 1000",
     "seams", "scenes"],
]  # fmt: skip
TABLE_1, TABLE_2, TABLE_3 = (0.8892, 0.9457, 0.354, 0.341), (0.864, 0.927, 0.381), (0.8270, 0.9185, 0.348, 0.325)
TABLES = {  # row: what is changed; the paper's consistency of subject and background, local and global fidelity (one
    # fidelity in Table 2): the row's, and those of SynCoS in the same table
    "SynCoS": ({}, None),
    "Gen-L-Video": (GEN_L_VIDEO, ((0.8134, 0.8946, 0.351, 0.324), TABLE_1)),
    "FIFO-Diffusion": (dict(fifo={}, steps=50), ((0.8354, 0.9072, 0.327, 0.323), TABLE_1)),  # a long enough queue
    "CSD alone": (METHODS["csd"], ((0.7888, 0.9163, 0.300, 0.305), TABLE_3)),
    "w/o stage 1": (ABLATIONS["stage-1"], None),
    "w/o stage 2, its noise kept": (RENOISING, None),
    "w/o stage 3": (ABLATIONS["stage-3"], None),
    "w/o grounded timestep": (ABLATIONS["grounded-timestep"], ((0.803, 0.899, 0.364), TABLE_2)),
    "w/o fixed noise": (ABLATIONS["fixed-noise"], ((0.817, 0.904, 0.382), TABLE_2)),
    "w/o t_min": (ABLATIONS["t-min"], ((0.724, 0.854, 0.373), TABLE_2)),
    "w/o structured prompt": (dict(structured=False), ((0.837, 0.903, 0.362), TABLE_2)),
}
PAPERS = {  # which of these numbers is a measure's. Subject consistency's twice, as the paper's features see noise too
    "subject consistency": 0, "background consistency": 1, "local fidelity": 2, "global fidelity": 3,
    "picture consistency": 0,
}  # fmt: skip


def verdict(differences: list[float], papers: float) -> str:
    """Does a row differ from SynCoS in the direction that the paper reports?"""
    mean, low, high = bootstrap(differences)
    if low <= 0 <= high:
        return "not distinguishable"
    return "reproduced" if mean * papers > 0 else "not reproduced"


def compare(model, seeds: range, rows: dict[str, tuple], done: dict, keep: Callable) -> None:
    """Tables in Markdown: the rows' means; and what tells each from the first, scenario by scenario, with the paper's
    numbers and the verdict where it has some. rows: as TABLES."""
    videos: dict[str, list[dict]] = {}
    with tqdm(total=len(rows) * len(seeds), unit="video") as bar:
        for name, (change, _) in rows.items():
            bar.set_description(name)
            videos[name] = []
            for seed in seeds:
                videos[name].append(long_video(model, seed, change, done, keep))
                bar.update()
    first, *others = rows
    print(f"{len(seeds)} scenarios of four events; mean [95 % bootstrap interval]")
    for group in MEASURES:
        measures = [measure for measure in group if measure in videos[first][0]]
        head = f"| | {' | '.join(measures)} |\n" + "|---" * (len(measures) + 1) + "|"
        print(f"\n{head}")
        for name, each in videos.items():
            print(f"| {name} | {' | '.join(interval([v[m] for v in each]) for m in measures)} |")
        print(f"\nMinus {first}, scenario by scenario; in brackets the paper's row and {first}\n\n{head}")
        for name in others:
            differences = [[a[m] - b[m] for a, b in zip(videos[name], videos[first])] for m in measures]
            cells = [interval(d) for d in differences]
            theirs, syncos_ = rows[name][1] or ((), ())
            for i, k in enumerate(PAPERS.get(measure, 4) for measure in measures):
                if k < len(theirs):
                    papers = theirs[k] - syncos_[k]
                    cells[i] += f" (paper: {theirs[k]:.3g} - {syncos_[k]:.3g}) *{verdict(differences[i], papers)}*"
            print(f"| {name} | {' | '.join(cells)} |")


SEEDS = dict(chart=(0, 20), coherence=(100, 120), tables=(110, 170))  # settings are chosen by the chart's alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["quality", "coherence", "chart", "tables"])
    parser.add_argument("--denoisers", nargs="+", choices=["tiny", "exact"], help="(default: tiny; chart: both)")
    parser.add_argument("--model", default=str(ROOT / "tiny" / "checkpoint"), help="another tiny model's folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="(default: %(default)s)")
    parser.add_argument("--clips", type=int, default=200, help="for quality (default: 200)")
    parser.add_argument("--scenarios", type=int, nargs=2, help=f"first and last + 1 (default: {SEEDS})")
    parser.add_argument("--methods", nargs="+", default=["syncos", "gen-l-video"], help="for coherence: names, or "
                        'changes to the settings as JSON, e.g. \'{"t_min": 600, "steps": 25}\'')  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that share the scenarios")
    parser.add_argument("--output_path", type=Path, default=Path("chart.png"), help="for chart (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path("reproduce.jsonl"), help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        rows = {method: (read_change(method), None) for method in args.methods}
    except ValueError as error:
        parser.error(f"--methods: {error}")
    if args.what == "tables":
        rows = TABLES

    if args.what != "quality":
        first, last = args.scenarios or SEEDS[args.what]
        if args.jobs > 1:  # others measure a part of the scenarios each, this one then finds all results done
            cuts = [first + (last - first) * i // args.jobs for i in range(args.jobs + 1)]
            parts = [
                ["--scenarios", str(a), str(b), "--jobs", "1", "--output_path", os.devnull]
                for a, b in zip(cuts, cuts[1:])
                if a < b
            ]
            command, alone = [sys.executable, *sys.argv], os.environ | {"OMP_NUM_THREADS": "1"}
            others = [
                subprocess.Popen(
                    command + part, stdout=subprocess.DEVNULL, env=alone | ({"TQDM_DISABLE": "1"} if i else {})
                )
                for i, part in enumerate(parts)  # the first one's progress bar stands for all
            ]
            if any([other.wait() for other in others]):
                raise SystemExit(1)

    make = {"exact": Exact, "tiny": lambda: TinyModel(args.model, args.dtype)}
    models = [make[name]() for name in args.denoisers or (["exact", "tiny"] if args.what == "chart" else ["tiny"])]
    done = dict(map(json.loads, args.results.read_text().splitlines())) if args.results.exists() else {}

    def keep(key, value):
        done[key] = json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.4g}"))
        with args.results.open("a") as file:
            file.write(json.dumps([key, done[key]]) + "\n")

    if args.what == "quality":
        quality(models[0], args.clips, done, keep)
    elif args.what == "chart":
        chart(models, range(first, last), args.output_path, done, keep)
    else:
        compare(models[0], range(first, last), rows, done, keep)


if __name__ == "__main__":
    main()
