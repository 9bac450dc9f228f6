"""A baseline: CSD, "Collaborative Score Distillation for Consistent Visual Editing" (arXiv
2307.04787).

One optimisation makes the whole video from noise. Each iteration draws a minibatch of windows, a
timestep and new noise, and one optimiser takes a step along the scores that the windows mix
(`syncos.csd_gradient`). SynCoS's stage 2 differs: it starts from stage 1's estimate, with a new
optimiser, at a grounded timestep with fixed noise.

The result is that of one long call of `syncos.csd_refine`. This file adds what a long run needs:
progress and resuming.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import syncos as S
from extras.baselines import Callback, Plan
from extras.processes import in_batches
from syncos import Level, PredictX0


@dataclass(frozen=True)
class CSD:
    """The settings, and the method (`extras.baselines.Method`). A step is one iteration."""

    iters: int | None = None  # None: as many as SynCoS's number of model evaluations allows [ours]
    batch: int = 4  # windows per minibatch, as in SynCoS [ours]
    lr: float = 0.2  # AdamW's learning rate [ours: the most coherent of 0.05, 0.1 and 0.2 on the tiny model]

    options: ClassVar = ("stride", "window_batch", "csd_batch", "t_min", "csd_iters")  # the last two by `steps`

    def check(self, plan: Plan) -> None:
        if not any(level.alpha > 0 for level in plan.levels[:-1]):
            raise ValueError("csd needs timesteps below pure noise; use at least 2 steps.")

    def steps(self, plan: Plan) -> int:
        budget = S.count_evaluations(plan.levels, plan.windows, plan.recipe.settings)
        return self.iters or budget // self.evaluations(plan, 1)

    def evaluations(self, plan: Plan, steps: int) -> int:
        return steps * min(self.batch, len(plan.windows))

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        return plan.spans

    def describe(self, plan: Plan) -> str:
        return f"{self.steps(plan)} iterations of {self.evaluations(plan, 1)} windows, learning rate {self.lr:g}"

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        predict_x0 = in_batches(backbone.predict_x0, plan.recipe.window_batch, done)
        prompts, settings = [plan.texts[event] for event in plan.events], replace(self, iters=self.steps(plan))
        rest = (plan.levels, plan.windows, prompts, settings, generator, callback, start, x0)
        return csd(predict_x0, latents, *rest)


@torch.no_grad()
def csd(
    predict_x0: PredictX0,
    latents: Tensor,
    levels: Sequence[Level],
    windows: Sequence[slice],
    prompts: Sequence[str],
    settings: CSD,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """Sample a long video, one iteration per turn. Arguments as for `syncos.syncos`, with
    `settings.iters` a number.

    callback(iteration, t, x0, moments) is called after every iteration, with AdamW's two moments,
    2 x F x C x H x W. A stopped run resumes from them in place of `latents`; the rest as for
    `Method.sample`.
    """
    levels = [level for level in levels[:-1] if level.alpha > 0]
    x = (x0 if start else latents).float().clone()
    optimizer = torch.optim.AdamW([x], lr=settings.lr)
    if start:
        first, second = latents.clone()
        optimizer.state[x] = dict(step=torch.tensor(float(start)), exp_avg=first, exp_avg_sq=second)

    for iteration in range(start, settings.iters):
        level = levels[torch.randint(len(levels), (), generator=generator)]
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        picked = torch.randperm(len(windows), generator=generator)[: settings.batch].tolist()

        clean, eps = (torch.stack([tensor[windows[i]] for i in picked]) for tensor in (x, noise))  # B f C H W each
        noisy = level.alpha * clean + level.sigma * eps
        predicted = predict_x0(noisy, level.t, [prompts[i] for i in picked]).float()

        gradient = S.csd_gradient(clean, noisy, predicted, level)
        x.grad = S.fuse(gradient, [windows[i] for i in picked], len(x))
        optimizer.step()

        if callback:
            moments = torch.stack([optimizer.state[x][name] for name in ("exp_avg", "exp_avg_sq")])
            callback(iteration, level.t, x.clone(), moments)
    return x
