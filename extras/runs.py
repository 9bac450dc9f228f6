"""Runs: what is sampled, and how, with a state that a stopped run resumes from, and previews."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from backbones import Backbone, check_finite, free_memory
from extras import videos as V
from extras.baselines import Method, Plan
from extras.endings import undisturbed
from extras.errors import first_line
from extras.meeting import main_process
from extras.states import State
from prompts import Story


@dataclass(frozen=True)
class Run:
    """A plan, the methods that sample it from the same initial noise, and where."""

    plan: Plan
    story: Story
    methods: dict[str, Method]
    device: str
    dtype: torch.dtype
    seed: int

    def about(self) -> dict[str, Any]:
        """Everything that shapes the latents, as JSON has it."""
        r = self.plan.recipe
        about = dict(model=r.model, dtype=str(self.dtype), seed=self.seed, frames=r.latent_frames, window=r.window)
        about |= dict(latent=r.latent, steps=r.num_inference_steps, guidance_scale=r.guidance_scale)
        about |= dict(texts=self.plan.texts, durations=self.plan.durations, stride=r.stride)
        about |= dict(shared_noise=r.settings.shared_noise)
        about |= dict(methods={name: [type(m).__name__, asdict(m)] for name, m in self.methods.items()})
        return json.loads(json.dumps(about))

    @property
    def spans(self) -> list[tuple[float, float]]:
        """Start and end of each event, 0 to 1: the methods' own if they agree."""
        first, *others = [method.spans(self.plan) for method in self.methods.values()]
        return first if all(other == first for other in others) else self.plan.spans

    def describe(self) -> str:
        """The plan as the demo prints it."""
        r, plan = self.plan.recipe, self.plan
        lines = [
            f"{r.model} on {self.device}, {str(self.dtype).removeprefix('torch.')}, guidance {r.guidance_scale:g}, "
            f"seed {self.seed}",
            f"{r.num_frames} frames at {r.fps:g} fps = {r.latent_frames} latent frames: {len(plan.windows)} windows of "
            f"{r.window}, stride {r.stride}; {r.num_inference_steps} steps",
        ]
        for name, method in self.methods.items():
            count, more = method.evaluations(plan, method.steps(plan)), method.describe(plan)
            lines.append(f"{name}: {count} model evaluations (windows)" + f"; {more}" * bool(more))
        total = sum(method.evaluations(plan, method.steps(plan)) for method in self.methods.values())
        times = [f"{total * each / 60:.0f} min on one {gpu}" for gpu, each in r.seconds.items()]
        if r.needs_gpu:
            lines.append(f"time, predicted from public figures: {' or '.join(times) or 'not known'}")
        if self.story.global_prompt:
            lines.append(f"global: {self.story.global_prompt}")
        seconds = r.num_frames / r.fps
        for i, ((start, stop), text) in enumerate(zip(self.spans, self.story.local_prompts), 1):
            lines.append(f"event {i}, {start * seconds:.1f} to {stop * seconds:.1f} s: {text}")
        return "\n".join(lines)


def sample(
    run: Run,
    backbone: Backbone,
    state: State,
    path: Path | None = None,
    look: Callable[[str, int, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Latents of each method, F x C x H x W, all from the same initial noise.

    Resumes from `state` and keeps it up to date, on disk too if there is a path; look(method, step,
    x0) after each step.
    """
    plan = run.plan
    backbone.set_levels(plan.levels)
    for name, method in run.methods.items():
        if name in state.done:
            continue
        generator = torch.Generator().manual_seed(run.seed)
        latents, x0 = plan.noise(generator), None
        if state.step:
            latents, x0 = state.now["latents"], state.now["x0"].to(run.device)
            generator.set_state(state.now["generator"])

        def keep(step, t, x0, latents, name=name, generator=generator):
            check_finite(f"{name}'s estimate after step {step + 1}, t = {t:g},", x0)  # else the state stays as it was
            now = dict(latents=latents.cpu(), x0=x0.cpu(), generator=generator.get_state())
            small = torch.nn.functional.adaptive_avg_pool2d(now["x0"], 4).flatten(1)  # F 16C; MPS cannot pool all sizes
            with undisturbed():
                state.step, state.now = step + 1, now
                state.trace.setdefault(name, []).append(small)
                if path and main_process():
                    state.save(path)
            if look:
                look(name, step, x0)

        total, behind = (method.evaluations(plan, n) for n in (method.steps(plan), state.step))
        bar = tqdm(total=total, initial=behind, desc=name, unit="window", smoothing=0.05, disable=not main_process())
        with bar:
            latents = latents.to(run.device)
            latents = method.sample(backbone, plan, latents, generator, keep, bar.update, state.step, x0).cpu()
        with undisturbed():
            state.done[name], state.step, state.now = latents, 0, {}
    return state.done


def preview(path: Path, run: Run, backbone: Backbone, x0: Tensor, title: str) -> None:
    """A contact sheet of the estimate: each event's middle frame, decoded from three latents.

    Whatever fails here, it says so and the run continues.
    """
    picked, rows, c, F = {}, [], run.plan.recipe.frames_per_latent, len(x0)
    try:
        for (start, stop), text in zip(run.spans, run.story.local_prompts):
            middle = min(max(round((start + stop) / 2 * F), 1), F - 2)
            number = c * middle
            picked[number] = list(backbone.preview(x0[middle - 1 : middle + 2]))[c]
            rows.append(([number], text))
        V.contact_sheet(path, {"": picked}, rows, title)
    except Exception as error:  # of whatever kind: a picture is not worth a run
        V.say(f"No preview: {first_line(error)}")
    free_memory()
