"""What makes a long run safe: saved state, resume, signals, previews."""

import json
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from backbones import Backbone, check_finite
from extras import videos as V
from extras.baselines import Method, Plan
from extras.processes import main_process
from prompts import Story

TROUBLE = (KeyboardInterrupt, OSError, FloatingPointError, torch.OutOfMemoryError)  # what can happen to a good plan
OUT_OF_MEMORY = (
    "The GPU's memory is not enough. What helps, the cheapest first: --window_batch 1, --vae_tiling (decoding, "
    "CogVideoX), --offload model, --offload sequential (much slower)."
)


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
        about |= dict(texts=self.plan.texts, stride=r.stride)
        about |= dict(methods={name: [type(m).__name__, asdict(m)] for name, m in self.methods.items()})
        return json.loads(json.dumps(about))

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
        for i, ((start, stop), text) in enumerate(zip(plan.spans, self.story.local_prompts), 1):
            lines.append(f"event {i}, {start * seconds:.1f} to {stop * seconds:.1f} s: {text}")
        return "\n".join(lines)


@dataclass
class State:
    """How far a run has come; sampling resumes from it bit for bit."""

    about: dict[str, Any]  # Run.about
    done: dict[str, Tensor] = field(default_factory=dict)  # latents of the methods that are finished
    step: int = 0  # steps done by the next method, and what it then had: latents, x0, generator
    now: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, list[Tensor]] = field(default_factory=dict)  # of each method, the small x0 of each step
    saved: bool = False  # is there a file of this run?

    def save(self, path: Path) -> None:
        """Raises OSError."""
        tensors = {f"done {k}": v for k, v in self.done.items()} | {f"now {k}": v for k, v in self.now.items()}
        tensors |= {f"trace {k}": v for k, v in self.traces().items()}
        V.write_tensors(path, "state", tensors, dict(step=self.step, about=self.about))
        self.saved = True

    def traces(self) -> dict[str, Tensor]:
        """The trace of each method: steps x F x D."""
        return {name: torch.stack(steps) for name, steps in self.trace.items()}

    @classmethod
    def read(cls, path: Path, about: dict[str, Any]) -> "State":
        """Raises ValueError if the file is not the state of a run like `about`."""
        tensors, saved = V.read_tensors(path, "state")
        for key, value in about.items():
            if (other := saved["about"].get(key)) != value:
                raise ValueError(f"{path} belongs to another run: its {key} is {other}, and {value} was asked for.")
        part = lambda kind: {k.split(" ", 1)[1]: v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
        traces = {name: list(trace) for name, trace in part("trace ").items()}
        return cls(about, part("done "), saved["step"], part("now "), traces, saved=True)


def sample(
    run: Run,
    backbone: Backbone,
    state: State,
    path: Path | None = None,
    look: Callable[[str, int, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Latents of each method, F x C x H x W, all from the same initial noise.

    Resumes from `state` and keeps it up to date, on disk too if there is a path;
    look(method, step, x0) after each step.
    """
    plan, r = run.plan, run.plan.recipe
    backbone.set_levels(plan.levels)
    for name, method in run.methods.items():
        if name in state.done:
            continue
        generator = torch.Generator().manual_seed(run.seed)
        latents, x0 = torch.randn(r.latent_frames, *r.latent, generator=generator), None
        if state.step:
            latents, x0 = state.now["latents"], state.now["x0"].to(run.device)
            generator.set_state(state.now["generator"])

        def keep(step, t, x0, latents, name=name, generator=generator):
            check_finite(f"{name}'s estimate after step {step + 1}, t = {t:g},", x0)  # else the state stays as it was
            now = dict(latents=latents.cpu(), x0=x0.cpu(), generator=generator.get_state())
            state.step, state.now = step + 1, now
            small = torch.nn.functional.adaptive_avg_pool2d(x0, 4).flatten(1)  # F 16C: enough to see where it goes
            state.trace.setdefault(name, []).append(small.cpu())
            if path and main_process():
                state.save(path)
            if look:
                look(name, step, x0)

        total, behind = (method.evaluations(plan, n) for n in (method.steps(plan), state.step))
        bar = tqdm(total=total, initial=behind, desc=name, unit="window", smoothing=0.05, disable=not main_process())
        with bar:
            latents = latents.to(run.device)
            latents = method.sample(backbone, plan, latents, generator, keep, bar.update, state.step, x0)
        state.done[name] = latents.cpu()
        state.step, state.now = 0, {}
    return state.done


def preview(path: Path, run: Run, backbone: Backbone, x0: Tensor, title: str) -> None:
    """A contact sheet of the estimate: each event's middle frame, decoded from three latents.

    If that fails, for lack of memory or at values that are not
    finite, it says so and the run continues.
    """
    picked, rows, c, F = {}, [], run.plan.recipe.frames_per_latent, len(x0)
    for (start, stop), text in zip(run.plan.spans, run.story.local_prompts):
        middle = min(max(round((start + stop) / 2 * F), 1), F - 2)
        number = c * middle
        try:
            picked[number] = list(backbone.preview(x0[middle - 1 : middle + 2]))[c]
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            return V.say(f"No preview: {str(error).splitlines()[0]}")
        rows.append(([number], text))
    V.contact_sheet(path, {"": picked}, rows, title)


def keep_state(state: State, path: Path) -> str:
    """Save the state of a run that stops, if there is any, and say how to resume it."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if main_process() and (state.step or state.done):
            state.save(path)
    except OSError:
        pass  # an earlier step may be safe
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return f"The state is safe; the same command with --resume {path} continues." if state.saved else ""


def stopped(error: BaseException, safe: str = "") -> SystemExit:
    """The end of a run that cannot continue: why, in a sentence, and what is
    safe on disk. One process speaks."""
    why = {KeyboardInterrupt: "Stopped.", torch.OutOfMemoryError: OUT_OF_MEMORY}.get(type(error), str(error))
    return SystemExit(f"{why} {safe}".strip() if main_process() else 1)
