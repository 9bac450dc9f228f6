"""A baseline: DiTCtrl, tuning-free multi-prompt longer video generation (arXiv 2412.18597).

Each step denoises all windows of the long latent and averages their clean estimates, as Gen-L-Video
does. Two things are added. Between two events lie windows whose text glides from one prompt to the
next, and windows are averaged with triangular weights (latent blending). And windows are denoised
in pairs of neighbours, source and target: in the last blocks of the network, in some steps, the
target attends to the keys and values of the source instead of its own.

Written from the authors' code (github.com/TencentARC/DiTCtrl); [ours] marks what is not from there.
The model must have one attention over text and video tokens. Left out: masks that share foreground
and background separately, which are off by default in the code and have no effect in the authors'
own ablation (consistency .849 with and without). Left out as well: "dynamic" guidance, whose code
takes the timestep for the step's index and so jumps between 1 and 7. Guidance is constant here, as
for all other methods. [ours]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor

import syncos as S
from backbones import Backbone, CogVideoX
from extras.baselines import Callback, Plan
from extras.processes import in_batches
from prompts import event_spans
from syncos import Level, PredictX0


@dataclass(frozen=True)
class DiTCtrl:
    """The settings, and the method as `extras.baselines.Method` has it.

    The windows are the plan's. CogVideoX's 13 latent frames at stride 4 overlap by 9; with 2
    transitions this is the default of the authors' code. Their paper has an overlap of 6 (stride 7)
    and 1 transition.
    """

    transitions: int = 2  # windows with mixed texts between two events
    sharing: tuple[float, float] = (500, 979)  # timesteps low <= t < high that share [authors: steps 2 to 24 of 50]
    depth: float = 1 / 6  # share of the blocks that share, the last ones [authors: 25 to 29 of 30]
    sde: bool = False  # SDE-DPM-Solver++(2M) [authors]; else DDIM, as all other methods [ours]

    options: ClassVar = ("stride", "window_batch")

    def check(self, plan: Plan) -> None:
        r, events = plan.recipe, len(plan.texts)
        if not issubclass(r.backbone, CogVideoX):
            raise ValueError("ditctrl needs joint attention over text and video, which only CogVideoX has here.")
        if events < 2:
            raise ValueError("ditctrl joins events and this story has only one; use at least two.")
        if len(set(plan.durations or ())) > 1:
            raise ValueError("ditctrl gives all events the same time; leave out their durations.")
        each = r.frames_per_latent * (self.transitions + 1) * r.stride  # video frames per further event
        frames = r.frames_per_latent * (r.window - 1) + 1 + (events - 1) * each
        if frames != r.num_frames:
            fits = f"use --num_frames {frames} for {events} events ({each} more for each further event)."
            odd = f"{events} events would make {frames} frames, which the model cannot decode; use another --stride."
            decodable = (frames - 1) % r.frames_step == 0
            raise ValueError(f"ditctrl's length follows from the number of events: {fits if decodable else odd}")

    def shares(self, level: Level) -> bool:
        return self.sharing[0] <= level.t < self.sharing[1]

    def steps(self, plan: Plan) -> int:
        return len(plan.levels) - 1

    def evaluations(self, plan: Plan, steps: int) -> int:
        windows = len(plan.windows)  # 10 in 50 steps: 684; 900 by the authors' code, which evaluates pairs in all steps
        return sum(2 * (windows - 1) if self.shares(level) else windows for level in plan.levels[:steps])

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        nearest = [int(i / (self.transitions + 1) + 0.5) for i in range(len(plan.windows))]  # event of most of the text
        return event_spans(plan.windows, nearest)

    def describe(self, plan: Plan) -> str:
        shared = sum(self.shares(level) for level in plan.levels[:-1])
        mixed = self.transitions * (len(plan.texts) - 1)
        return f"keys and values shared in {shared} steps, texts mixed in {mixed} windows"

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        batch, texts = plan.recipe.window_batch, mix_texts(backbone, plan.texts, self.transitions)
        predict_x0 = in_batches(backbone.predict_x0, batch, done)
        with pair_predictor(backbone, self.depth) as predict_pairs:
            predict_pairs = in_batches(predict_pairs, 2 * max(1, batch // 2), done)  # even: pairs stay together
            rest = (plan.levels, plan.windows, texts, self, generator, callback, start, x0)
            return ditctrl(predict_x0, predict_pairs, latents, *rest)


# --------------------------------------------------------------------------------------------------
# The method


def blend(parts: Tensor, windows: Sequence[slice], counts: Sequence[int], frames: int) -> Tensor:
    """Average overlapping windows, weighted by a triangle: 1/f, 3/f, ..., 1, ..., 3/f, 1/f (odd f).

    parts: N x f x C x H x W, one per window; counts: how often each counts. Returns F x C x H x W.
    """
    f = parts.shape[1]
    triangle = torch.tensor([min(2 * j + 1, 2 * (f - j) - 1) / f for j in range(f)])
    weights = (torch.tensor(counts)[:, None] * triangle)[..., None, None, None].to(parts)  # N f 1 1 1
    return S.fuse(weights * parts, windows, frames) / S.fuse(weights, windows, frames)


def sde_step(x: Tensor, x0: Tensor, last: Tensor | None, levels: Sequence[Level], step: int, noise: Tensor) -> Tensor:
    """A step of SDE-DPM-Solver++(2M) (arXiv 2211.01095), from levels[step] to the next.

    x, x0, last (the previous step's x0), noise (N(0, I)): of one shape. With lambda = log(alpha /
    sigma), h is the step in lambda. Steps from and to infinite lambda, pure noise and clean, are of
    first order.
    """
    before, level, after = levels[max(step - 1, 0)], levels[step], levels[step + 1]
    decay = level.alpha * after.sigma / (after.alpha * level.sigma)  # e^-h
    if step > 0 and before.alpha > 0 and after.sigma > 0:
        ratio = log(decay) / log(before.alpha * level.sigma / (level.alpha * before.sigma))  # h / h of the last step
        x0 = x0 + ratio / 2 * (x0 - last)
    noise_share = (1 - decay**2) ** 0.5
    return S.revert((1 - decay**2) * x0, decay / level.sigma * x + noise_share * noise, after)


@torch.no_grad()
def ditctrl(
    predict_x0: PredictX0,
    predict_pairs: PredictX0,
    latents: Tensor,
    levels: Sequence[Level],
    windows: Sequence[slice],
    texts: Sequence[str],
    settings: DiTCtrl,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """Sample a long video; one denoising step per turn of the loop.

    predict_x0: as in syncos.py; predict_pairs: the same for source and target in turn, where each
    target uses its source's keys and values; latents: the initial noise, F x C x H x W, float32;
    texts: one per window, some mixed; generator: on the CPU, for the SDE. callback, start, x0:
    as for `Method.sample`.
    Returns the clean latents, F x C x H x W. Raises ValueError if the arguments do not fit
    together.
    """
    if len(texts) != len(windows) or len(windows) < 2:
        raise ValueError(f"There are {len(windows)} windows and {len(texts)} texts; give one for each, at least two.")
    x = latents.float()
    every = range(len(windows))
    pairs = [k for source in every[:-1] for k in (source, source + 1)]  # 0 1 1 2 2 3 ...
    for step in range(start, len(levels) - 1):
        level, last = levels[step], x0

        # all windows. Inner ones count twice: once as the target of the one before, once as the
        # source of the next. The source keeps its own keys and values; without sharing the two are
        # the same, so one evaluation will do [ours]
        shared = settings.shares(level)
        picked, counts = (pairs, [1] * len(pairs)) if shared else (every, [pairs.count(k) for k in every])
        noisy = torch.stack([x[windows[k]] for k in picked])  # N f C H W
        parts = (predict_pairs if shared else predict_x0)(noisy, level.t, [texts[k] for k in picked]).float()
        x0 = blend(parts, [windows[k] for k in picked], counts, len(x))

        # one step of the solver on the whole video
        if settings.sde:
            x = sde_step(x, x0, last, levels, step, torch.randn(x.shape, generator=generator).to(x.device))
        else:
            x = S.revert(x0, S.implied_noise(x, x0, level), levels[step + 1])

        if callback:
            callback(step, level.t, x0, x)
    return x


# --------------------------------------------------------------------------------------------------
# What touches the network


def mix_texts(backbone: Backbone, texts: Sequence[str], transitions: int) -> list[str]:
    """The text of each window: each event's prompt, and between two of them mixtures of their
    encodings, token by token, which `backbone.texts` then has."""
    keys, n = [], transitions + 1
    for a, b in zip(texts, texts[1:]):
        keys.append(a)
        for u in (i / n for i in range(1, n)):
            keys.append(f"{1 - u:.3f} x {a} + {u:.3f} x {b}")
            mixed = ((1 - u) * x + u * y for x, y in zip(backbone.texts[a], backbone.texts[b]))
            backbone.texts[keys[-1]] = tuple(mixed)
    return [*keys, texts[-1]]


@contextmanager
def pair_predictor(backbone: Backbone, depth: float) -> Iterator[PredictX0]:
    """Within this context: `predict_x0` for windows in pairs, source and target in turn.

    In the last blocks the target takes all keys and values of its source, of text and video tokens
    alike, in both halves of guidance: each odd row of the batch takes those of the row before. They
    are replaced as they leave their projections; the norm and the rotation that follow treat all
    rows alike.
    """
    transformer, sharing = backbone.pipe.transformer, False

    def share(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
        return out[::2].repeat_interleave(2, 0) if sharing else out

    def predict_pairs(latents: Tensor, t: float, prompts: list[str]) -> Tensor:
        nonlocal sharing
        if len(prompts) % 2:
            raise ValueError(f"Windows must come in pairs, got {len(prompts)} of them; use an even batch.")
        sharing = True
        try:
            return backbone.predict_x0(latents, t, prompts)
        finally:
            sharing = False

    if transformer._compiled_call_impl:
        torch.compiler.reset()  # what was compiled without hooks would silently pass over them
    blocks = transformer.transformer_blocks
    shared = [block.attn1 for block in blocks[-max(1, int(depth * len(blocks))) :]]
    hooks = [layer.register_forward_hook(share) for attention in shared for layer in (attention.to_k, attention.to_v)]
    try:
        yield predict_pairs
    finally:
        for hook in hooks:
            hook.remove()
