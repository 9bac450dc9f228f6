"""FIFO-Diffusion: Generating Infinite Videos from Text without Training (arXiv 2405.11473), a baseline of the paper.

A queue holds one latent frame at each noise level of the walk, in time order: almost clean at its head, pure noise at
its tail. A turn takes every frame one step further (diagonal denoising); the head is then clean and leaves, the others
move up, new noise enters at the tail. The queue is longer than the model's window, so several windows lie over it, and
none of them spans all levels (latent partitioning). With lookahead they overlap by half and the noisier half of each
counts: those frames saw cleaner ones before them. At the head these are frames that have left already, the context.

Written from the authors' code (github.com/jjihwan/FIFO-Diffusion_public); [ours] marks what is not from there. The
model must take a timestep for every frame. Uses torch and syncos.py.

    step    of the walk, one a place in the queue; turn: one move of the whole queue
    place   in the queue with its context: 0, 1, ..., context + S - 1
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import syncos as S
from syncos import Level, PredictX0


@dataclass(frozen=True)
class FifoSettings:
    lookahead: bool = True  # twice the evaluations
    eta: float = 1.0  # DDIM's: 1 new noise as in DDPM [authors], better in the tiny world; 0 none, as SynCoS
    one_prompt: bool = False  # all windows see that of the frame that leaves [authors]; else of their own frames [ours]

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}.")


def stack_levels(levels: Sequence, device: torch.device) -> Level:
    """A level of each frame as one that broadcasts. levels: F of them, or B lists of f. t: F or B x f, float64, on the
    CPU; alpha and sigma: with three axes more, for C x H x W, float32."""
    t, alpha, sigma = torch.tensor(levels, dtype=torch.float64).unbind(-1)
    return Level(t, *(x[..., None, None, None].float().to(device) for x in (alpha, sigma)))


def queue_windows(steps: int, size: int, settings: FifoSettings) -> tuple[int, list[slice]]:
    """The number of context frames, and the windows over context and queue; without their first `context` frames they
    cover the queue. [ours, for any number of steps and odd sizes; where they still overlap they are averaged]

    Raises ValueError if the queue is shorter than a window.
    """
    if steps < size:
        raise ValueError(f"FIFO-Diffusion's queue, a frame a step, must hold a window; take at least {size} steps.")
    context = size // 2 if settings.lookahead else 0
    return context, S.make_windows(context + steps, size, size - context)


def count_turns(steps: int, size: int, frames: int) -> int:
    """Of the whole run; in the first, steps - size, copies of the base clip's first frame leave."""
    return steps - size + frames


def count_evaluations(steps: int, size: int, turns: int, settings: FifoSettings) -> int:
    """How many windows the base clip and so many turns send through the model."""
    _, windows = queue_windows(steps, size, settings)
    return steps + turns * len(windows)


def renew(noise: Tensor, fresh: Tensor, now: Level, after: Level, eta: float) -> Tensor:
    """DDIM's noise for a step from `now` to `after`, Eq. 12 and 16 of the DDIM paper: a part of it is fresh."""
    share = eta * (1 - (now.alpha * after.sigma / (after.alpha * now.sigma)) ** 2).sqrt()  # F 1 1 1
    return (1 - share**2).sqrt() * noise + share * fresh


@torch.no_grad()
def fifo(
    predict_x0: PredictX0,
    latents: Tensor,
    levels: Sequence[Level],
    size: int,
    prompts: Sequence[str],
    settings: FifoSettings,
    generator: torch.Generator,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    start: int = 0,
    x0: Tensor | None = None,
) -> Tensor:
    """Sample a long video frame by frame, after a base clip by plain DDIM that fills the queue.

    predict_x0: as in syncos.py, with timesteps B x f; latents: the initial noise, F x C x H x W, float32, of which the
    base clip takes the first window's; size: a window's frames f; prompts: one a frame, F of them; generator: on the
    CPU, the source of all other randomness.
    callback(turn, t, x0, latents) is called after every turn, with the timestep of the frame that leaves, the video as
    far as it is known (frames that left and estimates of those in the queue, else 0) and the queue. To go on with a run
    that was stopped: as for `syncos.syncos`, with these.
    Returns the clean latents, F x C x H x W. Raises ValueError if the arguments do not fit together.
    """
    if start == 0 and len(latents) != len(prompts):
        raise ValueError(f"There are {len(latents)} latent frames but {len(prompts)} prompts; give one for each frame.")
    steps, F = len(levels) - 1, len(prompts)
    context, windows = queue_windows(steps, size, settings)
    turns = count_turns(steps, size, F)
    early = turns - F  # before the first frame of the video leaves; what leaves then is thrown away
    draw = lambda n: torch.randn(n, *latents.shape[1:], generator=generator).to(latents.device)  # noqa: E731
    at = [steps - 1] * context + [*reversed(range(steps))]  # the step of each place
    now, after = (stack_levels([levels[step + k] for step in at], latents.device) for k in (0, 1))

    # the base clip, noised, at the noisy end; copies of its first frame before it
    if start == 0:
        ddim = S.Settings(stride=size, **S.METHODS["gen-l-video"])
        clip = S.syncos(predict_x0, latents[:size], levels, [slice(0, size)], prompts[:1], ddim, generator)
        source = [max(0, place - context - early) for place in range(len(at))]
        x0, latents = torch.zeros_like(latents), S.revert(clip[source], draw(len(at)), now)

    for turn in range(start, turns):
        head = turn - early  # the frame of the video that leaves
        places = [context if settings.one_prompt else w.start + size // 2 for w in windows]
        texts = [prompts[min(max(head + place - context, 0), F - 1)] for place in places]

        # all windows, each frame at its own level
        noisy, t = (torch.stack([x[w] for w in windows]) for x in (latents, now.t))  # W f C H W, W f
        clean = S.fuse(predict_x0(noisy, t, texts).float(), windows, len(at), [context] * len(windows))

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
