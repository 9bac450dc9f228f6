"""SynCoS: Synchronized Coupled Sampling for multi-event long video generation (arXiv 2503.08605).

A text-to-video diffusion model makes clips of f latent frames. SynCoS makes F >> f frames with it,
without training: several events in turn, one subject and one scene throughout. Every denoising step
couples three stages:

    1. temporal_codenoise   local:   predict each window on its own, average overlaps     (DDIM)
    2. csd_refine           global:  pull all windows towards one coherent video          (CSD)
    3. revert                        noise the result to the previous timestep

The model enters only through a function:

    predict_x0(latents, t, prompts) -> x0
        latents   B x f x C x H x W, float32: noisy windows, all at timestep t
        t         the timestep as the model's scheduler counts it, always that of one of the levels
        prompts   list of B strings
        x0        B x f x C x H x W, float32: the clean estimates, guidance already applied

Any callable will do; it is never differentiated. It gets one window at a time, B = 1, unless
`at_once` says more. The caller gives each window its prompt (prompts.py shares windows out among
events). This file needs only torch: copy it anywhere.

Notation:
    alpha, sigma   x_t = alpha x0 + sigma eps. The DDIM paper's alpha is our alpha squared
                   (alpha-bar, alphas_cumprod)
    step           index into the noise schedule, 0, 1, 2, ...
    timestep t     what the model is told, 999, 979, ...
    stage          one of the three above; every step has all three
    window         f consecutive latent frames (the paper's "chunk")
    frame          always a latent frame in this file
    evaluation     one window through `predict_x0`; with guidance, two passes of the network

[ours] marks a choice that the paper leaves open.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

PredictX0 = Callable[[Tensor, float, list[str]], Tensor]


# --------------------------------------------------------------------------------------------------
# The noise schedule: two numbers per timestep


class Level(NamedTuple):
    """One noise level: x_t = alpha x0 + sigma eps."""

    t: float  # the timestep that the model is told; -1 for the final level
    alpha: float  # 0 at zero terminal SNR
    sigma: float  # 0 when clean


def diffusion_levels(alphas_cumprod: Tensor, timesteps: Sequence[int], final_alpha_cumprod: float = 1.0) -> list[Level]:
    """Noise levels of DDIM sampling, for models that predict v or eps (the paper's preliminaries).

    alphas_cumprod: the scheduler's table, one entry per training timestep; timesteps: one per step,
    descending, as the scheduler lists them; final_alpha_cumprod: 1 ends clean (diffusers'
    `set_alpha_to_one=True`). Returns one level per step and the final one, t = -1, which no model
    sees. Raises ValueError if the timesteps do not descend.

    The next level is the next list entry; `t - 1000 // steps` is wrong where the number of steps
    does not divide 1000.
    """
    _check_descending(timesteps)
    abar = [float(alphas_cumprod[t]) for t in timesteps] + [final_alpha_cumprod]
    return [Level(t, a**0.5, (1 - a) ** 0.5) for t, a in zip([*map(int, timesteps), -1], abar)]


def flow_levels(sigmas: Sequence[float], timesteps: Sequence[float]) -> list[Level]:
    """Noise levels of a rectified flow: alpha = 1 - sigma (the paper's appendix).

    sigmas: one per step and the final 0, as diffusers' flow schedulers list them; timesteps:
    one per step, descending. Returns one level per step and the final one. Raises ValueError if the
    two lists do not fit together.
    """
    _check_descending(timesteps)
    if len(sigmas) != len(timesteps) + 1:
        raise ValueError(
            f"{len(timesteps)} timesteps need {len(timesteps) + 1} sigmas (the last is 0), got {len(sigmas)}."
        )
    return [Level(float(t), 1 - float(s), float(s)) for t, s in zip([*timesteps, -1], sigmas)]


def _check_descending(timesteps: Sequence[float]) -> None:
    if len(timesteps) == 0 or any(a <= b for a, b in zip(timesteps, timesteps[1:])):
        raise ValueError(f"Timesteps must be a descending list, from noise to clean, got {list(timesteps)[:5]}...")


def to_x0(output: Tensor, latents: Tensor, level: Level, prediction: str) -> Tensor:
    """The clean estimate x0 from a model's output (the paper's appendix). Tensors of one shape.

    prediction: "v_prediction", "epsilon" (diffusers' words) or "flow". v and flow are exact at zero
    terminal SNR. An eps-prediction says nothing about x0 there, so alpha = 0 raises ValueError.
    """
    if prediction == "v_prediction":
        return level.alpha * latents - level.sigma * output
    if prediction == "flow":
        return latents - level.sigma * output
    if prediction != "epsilon":
        raise ValueError(f'Prediction must be "v_prediction", "epsilon" or "flow", got "{prediction}".')
    if level.alpha == 0:
        raise ValueError(f"An eps-prediction has no x0 at zero SNR (t = {level.t}); start at a lower timestep.")
    return (latents - level.sigma * output) / level.alpha


def implied_noise(latents: Tensor, x0: Tensor, level: Level) -> Tensor:
    """eps = (x_t - alpha x0) / sigma, in any one shape. Passed to `revert` it gives a DDIM step
    (the DDIM paper's Eq. 12, eta = 0)."""
    return (latents - level.alpha * x0) / level.sigma


# --------------------------------------------------------------------------------------------------
# Windows over the long latent, and their fusion


def make_windows(frames: int, size: int, stride: int) -> list[slice]:
    """Windows of `size` frames, `stride` apart: the paper's chunks.

    The last one is moved back to end at `frames`. Raises ValueError if a window does not fit or if
    windows would leave gaps.
    """
    if size < 1 or size > frames:
        raise ValueError(f"A window of {size} latent frames does not fit into {frames}; make the video longer.")
    if not 1 <= stride <= size:
        raise ValueError(f"The stride must be between 1 and the window's {size} latent frames, got {stride}.")
    starts = [*range(0, frames - size, stride), frames - size]
    return [slice(s, s + size) for s in starts]


def fuse(parts: Iterable[Tensor], windows: Sequence[slice], frames: int) -> Tensor:
    """Average windows where they overlap: sum of values / number of windows (Fig. 5).

    parts: one per window, f x C x H x W each, consumed one at a time. Returns F x C x H x W, zero
    where no window lies. Raises ValueError if `windows` is empty or does not match `parts`.
    """
    if not windows:
        raise ValueError("fuse() got no windows to fuse; pass at least one.")
    total, count = None, torch.zeros(frames)
    for part, window in zip(parts, windows, strict=True):
        total = part.new_zeros(frames, *part.shape[1:]) if total is None else total
        total[window] += part
        count[window] += 1
    return total / count.clamp(min=1).to(total).view(-1, *[1] * (total.ndim - 1))


# --------------------------------------------------------------------------------------------------
# Stage 1: temporal co-denoising, local


@torch.no_grad()
def temporal_codenoise(
    predict_x0: PredictX0,
    latents: Tensor,
    t: float,
    windows: Sequence[slice],
    prompts: Sequence[str],
    at_once: int = 1,
) -> Tensor:
    """x0 = fuse({predict_x0(x_t[window i], t, c_i)}): each window by its prompt (stage 1, Fig. 5).

    latents: x_t of the long video, F x C x H x W; prompts: one per window; at_once: windows per
    call of `predict_x0`. Returns x0, F x C x H x W, float32. Neighbours agree where they overlap;
    nothing ties distant windows together.
    """
    return fuse(_predict(predict_x0, [latents[w] for w in windows], t, prompts, at_once), windows, len(latents))


def _predict(
    predict_x0: PredictX0, noisy: Sequence[Tensor], t: float, prompts: Sequence[str], at_once: int
) -> Iterator[Tensor]:
    """x0 of each window, f x C x H x W, from calls with `at_once` of them."""
    for i in range(0, len(noisy), at_once):
        yield from predict_x0(torch.stack(noisy[i : i + at_once]), t, list(prompts[i : i + at_once])).float()


# --------------------------------------------------------------------------------------------------
# Stage 2: refinement by collaborative score distillation (CSD), global


def rbf_kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The RBF kernel of SVGD, and the matrix that sums its gradients (stage 2; CSD).

        k(X, Y) = exp(-|X - Y|^2 / h),   h = median |X_i - X_j|^2 / log(B + 1) over i != j

    x: B x D. Returns K and M, B x B each: sum_j d k(X_j, X_i) / d X_j = (M x)_i, which repels
    window i.

    M = 2/h L with the graph Laplacian L = diag(K 1) - K: one matrix product, no B x B x D tensor of
    differences. [ours] The median leaves out the zeros on the diagonal, which make h = 0 for B = 2
    in the CSD code. If h is still 0 (B = 1, or identical windows), equal windows have k = 1 and
    nothing repels: plain score distillation.

    In high dimension all distances between noised windows are nearly equal. At CogVideoX-2B's size
    K is 1 on the diagonal and 1/(B + 1) elsewhere, to within 1 %. The repulsion's share of the
    gradient depends on the model: at t = 979 it is 2e-3 for residuals x0 - predicted of rms 0.1,
    and grows as they shrink (9e-3 for 0.02).
    """
    B = len(x)
    d2 = torch.stack([(x - row).square().sum(1) for row in x])  # B B, exact for near windows too
    off_diagonal = d2[~torch.eye(B, dtype=torch.bool, device=x.device)]
    h = off_diagonal.median() / torch.tensor(B + 1.0).log() if B > 1 else d2[0, 0]  # B = 1: 0
    if h == 0:
        return (d2 == 0).to(x), torch.zeros_like(d2)
    K = torch.exp(-d2 / h)
    neighbours = K - torch.eye(B, device=x.device)
    laplacian = torch.diag(neighbours.sum(1)) - neighbours  # the diagonal's 1s cancel, so leave them out
    return K, 2 / h * laplacian


@torch.no_grad()
def csd_gradient(x0: Tensor, noisy: Tensor, predicted: Tensor, level: Level) -> Tensor:
    """The descent direction that mixes the scores of a minibatch (stage 2; CSD, arXiv 2307.04787).

        g_i = w(t)/B sum_j [ k(X_j, X_i) (eps_hat_j - eps_j) - d k(X_j, X_i) / d X_j ]
        X = alpha x0 + sigma eps

    x0, noisy (X) and predicted (the model's estimates from X): B x f x C x H x W. Returns g in that
    shape; x0 - lr g is the update. w(t) = sigma^2 (CSD); under AdamW a constant factor has no
    effect.

    The sign of the kernel's gradient [ours]: the papers print "+"; the CSD code uses "-", under
    which windows repel when the scores vanish. We use "-". The residual eps_hat - eps is computed
    as alpha/sigma (x0 - predicted): a difference of two noises loses precision at high noise.
    """
    B, w = len(x0), level.sigma**2 / len(x0)
    x0, X, predicted = (x.reshape(B, -1) for x in (x0, noisy, predicted))  # B D
    K, M = rbf_kernel(X)
    mixed = (w * level.alpha / level.sigma * K) @ (x0 - predicted)  # factors go to the small matrices
    return (mixed - (w * M) @ X).view_as(noisy)


@torch.no_grad()
def csd_refine(
    predict_x0: PredictX0,
    x0: Tensor,
    levels: Sequence[Level],
    noise: Tensor | None,
    windows: Sequence[slice],
    prompts: Sequence[str],
    generator: torch.Generator,
    iters: int = 20,
    batch: int = 4,
    lr: float = 0.5,
    at_once: int = 1,
) -> Tensor:
    """Refine x0 of the long video, F x C x H x W, towards global coherence (stage 2, Fig. 5).

    Each iteration takes a random minibatch of windows, noises them to the *grounded timestep* with
    their slices of the *fixed baseline noise*, predicts, mixes the scores by `csd_gradient`, fuses
    the gradients over overlaps, and makes one AdamW step. Windows far apart in time meet in a
    minibatch: that is what makes the video one.

    levels: a list. One level, the step's own, is the grounded timestep; from a longer list each
    iteration draws at random (ablation). noise: the baseline noise, F x C x H x W; None: new noise
    in each iteration (ablation). prompts: one per window; at_once: windows per call of
    `predict_x0`. Costs iters x min(batch, windows) evaluations.

    [ours] AdamW starts afresh in each call, with torch's defaults except the learning rate. Its
    weight decay, 0.01, shrinks x0 by 10 % in 20 iterations at lr 0.5. Its momentum also moves
    frames that a minibatch did not touch. [ours] Levels at zero SNR are skipped: X holds no trace
    of x0 there, and Adam would amplify rounding noise. If no other level is left, x0 comes back
    unchanged.
    """
    levels = [level for level in levels if level.alpha > 0]
    if not levels:
        return x0.clone()
    x0 = x0.float().clone()
    optimizer = torch.optim.AdamW([x0], lr=lr)
    for _ in range(iters):
        level = levels[torch.randint(len(levels), (), generator=generator)]
        eps = _randn_like(x0, generator) if noise is None else noise
        picked = torch.randperm(len(windows), generator=generator)[:batch].tolist()

        clean, eps = (torch.stack([x[windows[i]] for i in picked]) for x in (x0, eps))  # B f C H W each
        noisy = level.alpha * clean + level.sigma * eps
        predicted = torch.stack([*_predict(predict_x0, [*noisy], level.t, [prompts[i] for i in picked], at_once)])

        gradient = csd_gradient(clean, noisy, predicted, level)
        x0.grad = fuse(gradient, [windows[i] for i in picked], len(x0))
        optimizer.step()
    x0.grad = None
    return x0


def _randn_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise drawn on the CPU, so that a seed gives the same video on every device."""
    return torch.randn(x.shape, generator=generator).to(x.device)


def share_noise(noise: Tensor, windows: Sequence[slice], generator: torch.Generator) -> Tensor:
    """Give all windows the same noise, each in another order: the frames that one window leaves
    behind return, shuffled, as the new frames of the next. [ours; FreeNoise, arXiv 2310.15169, does
    this to the initial noise]

    noise: the initial or the baseline noise, F x C x H x W. Returns the same shape.
    """
    noise = noise.clone()
    for window, following in zip(windows, windows[1:]):
        behind = window.start + torch.randperm(following.start - window.start, generator=generator)
        noise[window.stop : following.stop] = noise[behind.to(noise.device)]
    return noise


def _baseline_noise(x: Tensor, windows: Sequence[slice], shared: bool, generator: torch.Generator) -> Tensor:
    """The noise that stages 2 and 3 of one step share, F x C x H x W like x."""
    noise = _randn_like(x, generator)
    return share_noise(noise, windows, generator) if shared else noise


# --------------------------------------------------------------------------------------------------
# Stage 3: back to the sampling trajectory


@torch.no_grad()
def revert(x0: Tensor, noise: Tensor, level: Level) -> Tensor:
    """x_prev = alpha_prev x0 + sigma_prev noise, in any one shape (stage 3, Fig. 5).

    With the baseline noise of stage 2, sampling continues where the refinement left off; with
    `implied_noise` this is plain DDIM.
    """
    return level.alpha * x0 + level.sigma * noise


# --------------------------------------------------------------------------------------------------
# The method: three stages, coupled at every step


@dataclass(frozen=True)
class Settings:
    """The paper's settings, and switches that give exactly its ablations (see `ABLATIONS`)."""

    t_min: float = 800  # stage 2 runs while t > t_min [paper: 800 to 900]
    csd_iters: int = 20  # iterations of stage 2 per step [paper: 20 to 50]
    csd_batch: int = 4  # windows per minibatch [ours: about 4, from the paper's running times]
    csd_lr: float = 0.5  # AdamW's learning rate [paper: 0.5 to 1]

    codenoise: bool = True  # stage 1. If off, x0 is carried over from the previous step (initially x_T)
    refine: bool = True  # stage 2
    revert: bool = True  # stage 3. If off, the next step starts from x0, with no noise added [ours]
    grounded: bool = True  # stage 2 at the step's own t; else at a random one in each iteration
    noise: str = "fixed"  # above t_min: "fixed" baseline noise, "fresh" at every use, or "implied" by x_t and x0 (DDIM)
    shared_noise: bool = False  # all windows get the same baseline noise [ours]; give them the same initial one, too

    def __post_init__(self):
        for name in ("csd_iters", "csd_batch"):
            if not isinstance(value := getattr(self, name), Integral) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}.")
        if math.isnan(self.t_min) or not 0 <= self.csd_lr < math.inf:
            raise ValueError(f"t_min must be a number and csd_lr at least 0, got {self.t_min} and {self.csd_lr}.")
        if self.noise not in ("fixed", "fresh", "implied"):
            raise ValueError(f'noise must be "fixed", "fresh" or "implied", got "{self.noise}".')
        if not self.codenoise and not self.refine:
            raise ValueError("Without stages 1 and 2 (codenoise, refine) the model is never asked; keep one of them.")


GEN_L_VIDEO = dict(refine=False, noise="implied")  # stages 1 and 3: co-denoising by DDIM alone (Table 1, Fig. 4)
STAGE_2_ALONE = dict(codenoise=False, revert=False, t_min=-1)  # from noise, at every step (Table 3); not published CSD
ABLATIONS = {  # what to change in Settings for each ablation of Tables 2 and 3 and Figures 7 and 9
    "stage-1": dict(codenoise=False),  # below t_min nothing is left to do, so x0 stays as stage 2 left it
    "stage-2": GEN_L_VIDEO,
    "stage-2-keep-noise": dict(refine=False, noise="fixed"),  # stage 2 skipped, its noise kept for stage 3
    "stage-3": dict(revert=False),
    "grounded-timestep": dict(grounded=False),
    "fixed-noise": dict(noise="fresh"),
    "t-min": dict(t_min=-1),  # stage 2 at every step
}


def ablate(settings: Settings, parts: Iterable[str]) -> Settings:
    """The settings without these parts (names of `ABLATIONS`), in whatever order.

    Raises ValueError if two parts contradict each other, if one has nothing to act on without the
    others, or if nothing is left to do.
    """
    changes: dict[str, tuple] = {}
    for part in parts:
        for name, value in ABLATIONS[part].items():
            other, already = changes.setdefault(name, (part, value))
            if already != value:
                raise ValueError(f"{other} and {part} contradict each other ({name} is {already} or {value}).")
    ablated = replace(settings, **{name: value for name, (_, value) in changes.items()})
    for name, acts in dict(grounded=ablated.refine, t_min=ablated.refine or ablated.noise != "implied").items():
        if name in changes and not acts:
            raise ValueError(f"Without stage 2 there is nothing for {changes[name][0]} to act on; leave it out.")
    return ablated


def refine_levels(step: int, levels: Sequence[Level], settings: Settings) -> Sequence[Level]:
    """The levels that stage 2 may use at a step: its own (grounded, Fig. 7), all, or none."""
    if not settings.refine or levels[step].t <= settings.t_min:
        return []
    return levels[step : step + 1] if settings.grounded else levels[:-1]


def refined_steps(levels: Sequence[Level], settings: Settings) -> list[int]:
    """The steps in which stage 2 has a level with a signal, and so does something."""
    steps = range(len(levels) - 1)
    return [i for i in steps if any(level.alpha > 0 for level in refine_levels(i, levels, settings))]


def count_evaluations(levels: Sequence[Level], windows: Sequence[slice], settings: Settings) -> int:
    """Number of evaluations, i.e. of windows that `syncos` sends to `predict_x0`."""
    per_refinement = settings.csd_iters * min(settings.csd_batch, len(windows))
    refined = len(refined_steps(levels, settings)) * per_refinement
    return (len(levels) - 1) * len(windows) * settings.codenoise + refined


@torch.no_grad()
def syncos_step(
    predict_x0: PredictX0,
    x: Tensor,
    x0: Tensor,
    step: int,
    levels: Sequence[Level],
    windows: Sequence[slice],
    prompts: Sequence[str],
    settings: Settings,
    generator: torch.Generator,
    at_once: int = 1,
) -> tuple[Tensor, Tensor]:
    """One denoising step, all three stages (Fig. 5): from x_t and the last step's x0 to this step's
    x0 and the next x_t, F x C x H x W each. Other arguments as for `syncos`, which checks them.

    To resume a stopped run bit for bit, take the remaining steps in turn, from what the last step
    returned and with the generator in the state that it then had.
    """
    s, level, prev = settings, levels[step], levels[step + 1]

    # stage 1: local
    if s.codenoise:
        x0 = temporal_codenoise(predict_x0, x, level.t, windows, prompts, at_once)

    # baseline noise: drawn once per step, shared by stages 2 and 3; at or below t_min, DDIM's
    # implied noise [ours]
    baseline = s.noise != "implied" and level.t > s.t_min
    noise = _baseline_noise(x, windows, s.shared_noise, generator) if baseline else implied_noise(x, x0, level)

    # stage 2: global, grounded at t
    if candidates := refine_levels(step, levels, s):
        eps = None if s.noise == "fresh" else noise
        options = (s.csd_iters, s.csd_batch, s.csd_lr, at_once)
        x0 = csd_refine(predict_x0, x0, candidates, eps, windows, prompts, generator, *options)

    # stage 3: back to the previous timestep
    return x0, revert(x0, noise, prev) if s.revert else x0


def syncos(
    predict_x0: PredictX0,
    latents: Tensor,
    levels: Sequence[Level],
    windows: Sequence[slice],
    prompts: Sequence[str],
    settings: Settings,
    generator: torch.Generator,
    callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
    at_once: int = 1,
) -> Tensor:
    """Sample a long video: the paper's whole method (Fig. 5).

    latents: the initial noise, F x C x H x W, float32 (with settings.shared_noise, from
    `share_noise`); levels: from `diffusion_levels` or `flow_levels`; windows: from `make_windows`;
    prompts: one per window; generator: on the CPU, the source of all randomness; at_once: windows
    per call of `predict_x0`.
    callback(step, t, x0, latents) is called after every step with its estimate and its result.
    Returns the clean latents, F x C x H x W. Raises ValueError if arguments do not fit together or
    no stage would ask the model; warns if stage 2 is asked for and never runs.
    """
    if len(prompts) != len(windows):
        raise ValueError(f"There are {len(windows)} windows but {len(prompts)} prompts; give one for each window.")
    if set().union(*(range(w.start, w.stop) for w in windows)) != set(range(len(latents))):
        raise ValueError(f"The windows must cover the {len(latents)} latent frames and no others; see make_windows.")
    if generator.device.type != "cpu":
        raise ValueError("The generator must be on the CPU, so that a seed gives the same video on every device.")
    if settings.refine and not refined_steps(levels, settings):
        never = f"Stage 2 never runs: no timestep with a signal is above t_min = {settings.t_min:g}"
        if not settings.codenoise:
            raise ValueError(f"{never}. Without stage 1 the model is never asked; lower t_min.")
        warnings.warn(f"{never} (the first is {levels[0].t:g}). Lower t_min, or choose refine=False.", stacklevel=2)

    x = x0 = latents.float()
    for step, level in enumerate(levels[:-1]):
        x0, x = syncos_step(predict_x0, x, x0, step, levels, windows, prompts, settings, generator, at_once)
        if callback:
            callback(step, level.t, x0, x)
    return x
