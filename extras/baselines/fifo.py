"""A baseline: "FIFO-Diffusion: Generating Infinite Videos from Text without Training" (arXiv
2405.11473).

A queue holds one latent frame at each noise level, in time order: almost clean at its head, pure
noise at its tail. In each turn every frame is denoised by one step (diagonal denoising). The head
is then clean and leaves, the others move up, and new noise enters at the tail. The queue is longer
than the model's window, so several windows lie over it, none of which spans all levels (latent
partitioning). With lookahead they overlap by half, and only the noisier half of each counts: those
frames were denoised with cleaner ones before them. At the head these are frames that have left
already, the context.

Written from the authors' code (github.com/jjihwan/FIFO-Diffusion_public); [ours] marks what is not
from there. The model must take a timestep per frame. CogVideoX-1.5 cannot: frames share tokens.

    step     of the noise schedule, one per position in the queue; turn: one move of the whole queue
    position in the queue with its context: 0, 1, ..., context + S - 1
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import syncos as S
from backbones import Backbone, CogVideoX
from extras.baselines import Callback, Plan
from extras.processes import in_batches
from syncos import Level


def frame_events(plan: Plan) -> list[int]:
    """Event of each latent frame: the one whose span contains its middle."""
    frames = plan.recipe.latent_frames
    return [next(e for e, (_, stop) in enumerate(plan.spans) if (k + 0.5) / frames < stop) for k in range(frames)]


@dataclass(frozen=True)
class Fifo:
    """The settings, and the method as `extras.baselines.Method` has it."""

    lookahead: bool = True  # twice the evaluations
    eta: float = 1.0  # DDIM's: 1 new noise as in DDPM [authors], better in the tiny world; 0 none, as SynCoS
    one_prompt: bool = False  # all windows see that of the frame that leaves [authors]; else of their own frames [ours]

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}.")

    options: ClassVar = ("stride", "window_batch")  # the stride places the events

    def check(self, plan: Plan) -> None:
        if not plan.recipe.backbone.frame_timesteps:
            raise ValueError("fifo needs a timestep per latent frame, and this backbone's network takes one per clip.")
        queue_windows(plan.recipe.num_inference_steps, plan.recipe.window, self)

    def steps(self, plan: Plan) -> int:
        return count_turns(plan.recipe.num_inference_steps, plan.recipe.window, plan.recipe.latent_frames)

    def evaluations(self, plan: Plan, steps: int) -> int:
        return count_evaluations(plan.recipe.num_inference_steps, plan.recipe.window, steps, self) if steps else 0

    def spans(self, plan: Plan) -> list[tuple[float, float]]:
        return plan.spans

    def describe(self, plan: Plan) -> str:
        return f"{self.steps(plan)} turns of a queue of {plan.recipe.num_inference_steps} frames"

    def sample(self, backbone, plan, latents, generator, callback=None, done=lambda n: None, start=0, x0=None):
        predict = in_batches(frame_predictor(backbone), plan.recipe.window_batch, done)
        prompts = [plan.texts[event] for event in frame_events(plan)]
        with frame_norms(backbone):
            return fifo(
                predict, latents, plan.levels, plan.recipe.window, prompts, self, generator, callback, start, x0
            )


# --------------------------------------------------------------------------------------------------
# The method


def stack_levels(levels: Sequence[Level], device: torch.device) -> Level:
    """The levels of F frames as one that broadcasts. t: F, float64, on the CPU; alpha and sigma:
    F x 1 x 1 x 1."""
    t, alpha, sigma = torch.tensor(levels, dtype=torch.float64).unbind(-1)
    return Level(t, *(x[:, None, None, None].float().to(device) for x in (alpha, sigma)))


def queue_windows(steps: int, size: int, settings: Fifo) -> tuple[int, list[slice]]:
    """The number of context frames, and the windows over context and queue; without their first
    `context` frames they cover the queue. [ours, for any number of steps and odd sizes; where they
    still overlap they are averaged]

    Raises ValueError if the queue is shorter than a window.
    """
    if steps < size:
        raise ValueError(
            f"FIFO-Diffusion's queue has one frame per step and must hold a window; use at least {size} steps."
        )
    context = size // 2 if settings.lookahead else 0
    return context, S.make_windows(context + steps, size, size - context)


def count_turns(steps: int, size: int, frames: int) -> int:
    """Turns of a run. The first `steps - size` flush copies of the base clip's first frame."""
    return steps - size + frames


def count_evaluations(steps: int, size: int, turns: int, settings: Fifo) -> int:
    """Number of windows that the base clip and `turns` turns send through the model."""
    _, windows = queue_windows(steps, size, settings)
    return steps + turns * len(windows)


def renew(noise: Tensor, fresh: Tensor, now: Level, after: Level, eta: float) -> Tensor:
    """DDIM's noise for a step from `now` to `after`, partly fresh (DDIM paper, Eq. 12 and 16)."""
    share = eta * (1 - (now.alpha * after.sigma / (after.alpha * now.sigma)) ** 2).sqrt()  # F 1 1 1
    return (1 - share**2).sqrt() * noise + share * fresh


@torch.no_grad()
def fifo(
    predict_x0: Callable[[Tensor, float | Tensor, list[str]], Tensor],
    latents: Tensor,
    levels: Sequence[Level],
    size: int,
    prompts: Sequence[str],
    settings: Fifo,
    generator: torch.Generator,
    callback: Callback | None = None,
    start: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """Sample a long video frame by frame, after a base clip by plain DDIM that fills the queue.

    predict_x0: as in syncos.py, but it also takes timesteps B x f, see `frame_predictor`; latents:
    the initial noise, F x C x H x W, float32, whose first window becomes the base clip; size: a
    window's frames f; prompts: one per frame, F of them; generator: on the CPU, the source of all
    other randomness.
    callback(turn, t, x0, latents) is called after every turn, with the timestep of the frame that
    leaves, the video as far as it is known (frames that left and estimates of those in the queue,
    else 0) and the queue. To resume a stopped run, pass these as for `Method.sample`.
    Returns the clean latents, F x C x H x W. Raises ValueError if the arguments do not fit
    together.
    """
    if start == 0 and len(latents) != len(prompts):
        raise ValueError(f"There are {len(latents)} latent frames but {len(prompts)} prompts; give one for each frame.")
    steps, F = len(levels) - 1, len(prompts)
    context, windows = queue_windows(steps, size, settings)
    counted = [slice(w.start + context, w.stop) for w in windows]
    turns = count_turns(steps, size, F)
    early = turns - F  # turns before the first frame of the video leaves; what leaves then is thrown away
    draw = lambda n: torch.randn(n, *latents.shape[1:], generator=generator).to(latents.device)  # noqa: E731
    at = [steps - 1] * context + [*reversed(range(steps))]  # the step of each position
    now, after = (stack_levels([levels[step + k] for step in at], latents.device) for k in (0, 1))

    # the base clip, noised, at the noisy end; copies of its first frame before it
    if start == 0:
        ddim = S.Settings(**S.GEN_L_VIDEO)
        clip = S.syncos(predict_x0, latents[:size], levels, [slice(0, size)], prompts[:1], ddim, generator)
        source = [max(0, position - context - early) for position in range(len(at))]
        x0, latents = torch.zeros_like(latents), S.revert(clip[source], draw(len(at)), now)

    for turn in range(start, turns):
        head = turn - early  # the frame of the video that leaves
        positions = [context if settings.one_prompt else w.start + size // 2 for w in windows]
        texts = [prompts[min(max(head + position - context, 0), F - 1)] for position in positions]

        # all windows, each frame at its own level
        noisy, t = (torch.stack([x[w] for w in windows]) for x in (latents, now.t))  # W f C H W, W f
        clean = S.fuse(predict_x0(noisy, t, texts).float()[:, context:], counted, len(at))

        # every frame of the queue one step further
        noise = S.implied_noise(latents, clean, now)
        if settings.eta:
            noise = renew(noise, draw(len(at)), now, after, settings.eta)
        moved = torch.cat([latents[:context], S.revert(clean, noise, after)[context:]])

        # the head leaves, noise enters
        first, last = max(head, 0), min(head + steps, F)  # of the video's frames in the queue, and last + 1
        x0 = torch.cat([x0[:first], clean[first - head + context : last - head + context], x0[last:]])
        if head >= 0:
            x0[head] = moved[context]
        latents = torch.cat([moved[1:], draw(1)])

        if callback:
            callback(turn, levels[-2].t, x0, latents)
    return x0


# --------------------------------------------------------------------------------------------------
# A timestep per frame


def frame_predictor(backbone: Backbone) -> Callable[[Tensor, float | Tensor, list[str]], Tensor]:
    """`predict_x0` that takes one timestep for all windows, or B x f of them, one per frame."""

    def predict_x0(latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        if not isinstance(t, Tensor):
            return backbone.predict_x0(latents, t, prompts)
        output, x0 = backbone.guided(latents, t, prompts), torch.empty_like(latents)
        for b, times in enumerate(t.tolist()):
            for f, time in enumerate(times):
                x0[b, f] = S.to_x0(output[b, f], latents[b, f], backbone.at[time], backbone.prediction)
        return x0

    return predict_x0


@contextmanager
def frame_norms(backbone: Backbone) -> Iterator[None]:
    """Within this context CogVideoX takes a timestep per frame, B f of them; diffusers' transformer
    has one per clip.

    Its embedded timesteps go to three kinds of norms and nowhere else. Those get the embeddings of
    all frames, B f x D instead of B x D, and treat each frame's tokens as a sample of their own.
    With B x D they do what they always did.
    """
    if not isinstance(backbone, CogVideoX):
        yield
        return
    from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero

    class FrameLayerNormZero(CogVideoXLayerNormZero):
        def forward(self, video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            """Tokens of the video (B, S, D) and of the text (B, L, D), temb (B n, D), n 1 or
            f -> both, and gates.

            The text's tokens, which have no frame, get the middle frame's timestep. [ours]
            """
            B, n = len(video), len(temb) // len(video)
            if n == 1:
                return super().forward(video, text, temb)
            frames = video.unflatten(1, (n, -1)).flatten(0, 1)  # B n, S / n, D
            frames, _, gate, _ = super().forward(frames, frames[:, :0], temb)
            _, text, _, text_gate = super().forward(video[:, :0], text, temb.unflatten(0, (B, n))[:, n // 2])
            video, gate = (x.unflatten(0, (B, n)).flatten(1, 2) for x in (frames, gate.expand_as(frames)))  # B S D
            return video, text, gate, text_gate

    class FrameAdaLayerNorm(AdaLayerNorm):
        def forward(self, video: Tensor, timestep: None = None, temb: Tensor | None = None) -> Tensor:
            """Tokens (B, S, D), temb (B n, D) -> (B, S, D)."""
            return super().forward(video.reshape(len(temb), -1, video.shape[-1]), temb=temb).view_as(video)

    transformer = backbone.pipe.transformer
    norms = [norm for block in transformer.transformer_blocks for norm in (block.norm1, block.norm2)]
    frames = {norm: FrameLayerNormZero for norm in norms} | {transformer.norm_out: FrameAdaLayerNorm}
    plain = {norm: norm.__class__ for norm in frames}
    try:
        for norm, kind in frames.items():
            norm.__class__ = kind
        yield
    finally:
        for norm, kind in plain.items():
            norm.__class__ = kind
