"""The method against oracles: diffusers' schedulers, exact denoisers, autograd, naive loops."""

import ast
import math
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, DDIMScheduler
from helpers import ABAR, ROOT, Gaussian, make_flow, maxdiff, randn, rng

import syncos as S

LEVELS = S.diffusion_levels(ABAR, list(range(999, 0, -50)))
SMALL = S.Settings(t_min=500, csd_iters=3, csd_batch=3)
VARIANTS = {"syncos": {}, "gen-l-video": S.GEN_L_VIDEO, "stage-2-alone": S.STAGE_2_ALONE, **S.ABLATIONS}


def run(settings=SMALL, denoiser=None, seed=0, **options):
    windows = S.make_windows(11, 5, 2)
    prompts = [str(i / len(windows)) for i in range(len(windows))]
    return S.syncos(
        denoiser or Gaussian(LEVELS), randn(11, 2, 3, 3), LEVELS, windows, prompts, settings, rng(seed), **options
    )


# --------------------------------------------------------------------------------------------------
# The noise schedule


@pytest.mark.parametrize("scheduler", [DDIMScheduler, CogVideoXDDIMScheduler])
@pytest.mark.parametrize("prediction, spacing, steps", [
    ("v_prediction", "trailing", 50), ("v_prediction", "leading", 20), ("epsilon", "trailing", 20),
    ("epsilon", "leading", 10),
])  # fmt: skip
def test_one_window_is_ddim(scheduler, prediction, spacing, steps):
    """Stages 1 and 3 over one window equal diffusers' DDIM, eta = 0, over the whole trajectory."""
    snr0 = prediction == "v_prediction" and spacing != "leading"
    args = dict(prediction_type=prediction, timestep_spacing=spacing, rescale_betas_zero_snr=snr0, clip_sample=False)
    ddim = scheduler(**args, **({"snr_shift_scale": 1.0} if scheduler is CogVideoXDDIMScheduler else {}))
    ddim.set_timesteps(steps)
    levels = S.diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))
    weight = randn(2, 2, seed=3) * 0.3

    def model(x, t):  # any fixed function of x and t
        return torch.einsum("...chw,cd->...dhw", torch.tanh(x), weight) + t / 1000

    expected = x = randn(4, 2, 3, 3)
    for t in ddim.timesteps:
        expected = ddim.step(model(expected, t.item()), t, expected, return_dict=False)[0]

    at = {level.t: level for level in levels}
    predict_x0 = lambda x, t, prompts: S.to_x0(model(x, t), x, at[t], prediction)  # noqa: E731
    settings, trace = S.Settings(**S.GEN_L_VIDEO), []
    result = S.syncos(
        predict_x0, x, levels, [slice(0, 4)], ["a"], settings, rng(), callback=lambda step, t, *_: trace.append(t)
    )
    assert trace == ddim.timesteps.tolist()
    assert maxdiff(result, expected) < 1e-4 * max(1, expected.abs().max().item())


def test_levels_are_right_where_steps_do_not_divide_1000():
    """Trailing spacing with 30 steps: the list's own neighbours, not t - 1000 // 30."""
    ddim = DDIMScheduler(timestep_spacing="trailing")
    ddim.set_timesteps(30)
    levels = S.diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist())
    assert [level.t for level in levels[:-1]] == ddim.timesteps.tolist()
    for level in levels[:-1]:
        assert level.alpha**2 == pytest.approx(float(ddim.alphas_cumprod[level.t]))
    assert levels[-1] == (-1, 1.0, 0.0)


def test_conversions_invert_their_definitions_and_hold_at_zero_snr():
    x0, eps = randn(2, 3, 4, seed=1), randn(2, 3, 4, seed=2)
    for a, s in [(0.8, 0.6), (0.01, math.sqrt(1 - 1e-4)), (0.0, 1.0)]:
        level, x = S.Level(5, a, s), a * x0 + s * eps
        assert maxdiff(S.to_x0(a * eps - s * x0, x, level, "v_prediction"), x0) < 1e-6
        if a > 0:
            assert maxdiff(S.to_x0(eps, x, level, "epsilon"), x0) < 1e-4
            assert maxdiff(S.implied_noise(x, x0, level), eps) < 1e-5
        flow = S.Level(5, 1 - s, s)
        assert maxdiff(S.to_x0(eps - x0, flow.alpha * x0 + s * eps, flow, "flow"), x0) < 1e-6
    with pytest.raises(ValueError, match="zero SNR"):
        S.to_x0(eps, eps, LEVELS[0], "epsilon")
    with pytest.raises(ValueError, match="flow"):
        S.to_x0(eps, eps, LEVELS[1], "sample")


def test_schedules_refuse_what_does_not_descend():
    for timesteps in ([], [1, 2, 3], [5, 5]):
        with pytest.raises(ValueError, match="descending"):
            S.diffusion_levels(ABAR, timesteps)
    with pytest.raises(ValueError, match="sigmas"):
        S.flow_levels([1.0, 0.5], [1000, 500])


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon", "flow"])
def test_gaussian_prior_in_closed_form(prediction):
    """One window, stages 1 and 3: on a Gaussian, DDIM is linear, x_prev = c x_t + d, with c and d
    known per step.

    The model predicts v, eps or a flow; the closed form is the same.
    """
    mean, std = 0.7, 0.5
    levels = {"v_prediction": LEVELS, "epsilon": LEVELS[1:], "flow": make_flow()}[prediction]
    posterior = Gaussian(levels, std)
    at = {level.t: level for level in levels}

    def predict(x, t, prompts):
        _, a, s = at[t]
        x0 = posterior(x, t, prompts)
        if prediction == "v_prediction":  # v = alpha eps - sigma x0, with sigma eps = x - alpha x0
            output = (a * x - x0) / s
        else:
            eps = (x - a * x0) / s
            output = eps if prediction == "epsilon" else eps - x0
        return S.to_x0(output, x, at[t], prediction)

    x = randn(5, 2, 3, 3)
    settings = S.Settings(**S.GEN_L_VIDEO)
    result = S.syncos(predict, x, levels, [slice(0, 5)], [str(mean)], settings, rng())

    expected = x.double()  # each step changes only the scale of x_t - alpha_t mean
    for (_, a, s), (_, ap, sp) in zip(levels, levels[1:]):
        var, cov = a**2 * std**2 + s**2, ap * a * std**2 + sp * s
        expected = ap * mean + cov / var * (expected - a * mean)
    assert maxdiff(result.double(), expected) < 1e-4


@pytest.mark.parametrize("levels", [LEVELS, LEVELS[1:], make_flow()], ids=["v", "eps", "flow"])
def test_full_method_lands_on_a_gaussian_prior(levels):
    """The whole loop, stage 2 included, samples around the prior's mean for every schedule."""
    windows = S.make_windows(21, 5, 4)
    settings = S.Settings(t_min=600, csd_iters=5, csd_lr=0.1)
    x = S.syncos(Gaussian(levels), randn(21, 4, 6, 6), levels, windows, ["0.7"] * len(windows), settings, rng())
    assert abs(x.mean().item() - 0.7) < 0.05
    assert 0.2 < x.std().item() < 0.6


# --------------------------------------------------------------------------------------------------
# Windows


def test_windows_cover_every_frame_and_fuse_is_a_partition_of_unity():
    for frames in range(1, 40):
        size = min(frames, 13)
        for stride in range(1, size + 1):
            windows = S.make_windows(frames, size, stride)
            starts = [w.start for w in windows]
            assert starts[0] == 0 and windows[-1].stop == frames and starts == sorted(set(starts))
            assert all(w.stop - w.start == size for w in windows)
            assert all(b - a <= stride for a, b in zip(starts, starts[1:]))
            x = randn(frames, 2, 1, 3)
            assert maxdiff(S.fuse(torch.stack([x[w] for w in windows]), windows, frames), x) < 1e-6


def test_the_papers_plan():
    assert [w.start for w in S.make_windows(49, 13, 4)] == [0, 4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert [w.start for w in S.make_windows(20, 13, 4)] == [0, 4, 7]  # the last one moved back


@pytest.mark.parametrize("context", [0, 1, 2])
def test_fuse_is_the_naive_average(context):
    """Also for parts without their first frames, as FIFO-Diffusion omits its context."""
    windows = S.make_windows(11, 4, 2)
    parts, counted = randn(len(windows), 4, 2, 3, 3), [slice(w.start + context, w.stop) for w in windows]
    fused = S.fuse(parts[:, context:], counted, 11)
    for frame in range(11):
        values = [p[frame - w.start] for p, w, c in zip(parts, windows, counted) if c.start <= frame < c.stop]
        expected = sum(values) / len(values) if values else torch.zeros(2, 3, 3)
        assert maxdiff(fused[frame], expected) < 1e-6


def test_windows_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        S.make_windows(12, 13, 4)
    for stride in (0, 14):
        with pytest.raises(ValueError, match="stride"):
            S.make_windows(49, 13, stride)


def test_codenoise_gives_each_window_its_prompt_a_few_windows_at_a_time():
    x, windows, sizes = randn(100, 2, 3, 3), S.make_windows(100, 5, 2), []

    def predict(x, t, prompts):
        sizes.append((len(x), len(prompts)))
        return x * torch.tensor([float(p) for p in prompts]).view(-1, 1, 1, 1, 1)

    prompts = [str(i) for i in range(len(windows))]
    fused = S.temporal_codenoise(predict, x, 999, windows, prompts)
    assert sizes == [(1, 1)] * 49
    for frame in range(100):
        numbers = [i for i, w in enumerate(windows) if w.start <= frame < w.stop]
        assert maxdiff(fused[frame], x[frame] * sum(numbers) / len(numbers)) < 1e-4
    assert torch.equal(S.temporal_codenoise(predict, x, 999, windows, prompts, at_once=24), fused)
    assert sizes[49:] == [(24, 24), (24, 24), (1, 1)]


# --------------------------------------------------------------------------------------------------
# Stage 2


def naive_kernel(x):
    """k and sum_j dk(X_j, X_i)/dX_j by a double loop with autograd, in float64."""
    x, B = x.double(), len(x)
    distances = [((x[i] - x[j]) ** 2).sum() for i in range(B) for j in range(B) if i != j]
    h = torch.stack(distances).median() / math.log(B + 1)
    K, R = torch.zeros(B, B).double(), torch.zeros_like(x)
    for i in range(B):
        for j in range(B):
            xj = x[j].clone().requires_grad_()
            k = torch.exp(-((xj - x[i]) ** 2).sum() / h)
            K[j, i], R[i] = k.detach(), R[i] + torch.autograd.grad(k, xj)[0]
    return K, R


@pytest.mark.parametrize("B, scale", [(2, 1e-3), (3, 30.0), (4, 1.0), (8, 1.0)])
def test_kernel_and_its_gradient(B, scale):
    x = randn(B, 60, seed=B) * scale
    K, M = S.rbf_kernel(x)
    R = M @ x
    naive_K, naive_R = naive_kernel(x)
    assert maxdiff(K.double(), naive_K) < 1e-5
    assert maxdiff(R.double(), naive_R) < 1e-5 * naive_R.abs().max()


@pytest.mark.parametrize("spread", [1.0, 1e-2])
def test_kernel_at_full_size(spread):
    """CogVideoX-2B's windows, 13 x 16 x 60 x 90, far apart and near, by float64 distances."""
    B = 4
    x = randn(1, 13 * 16 * 60 * 90) + spread * randn(B, 13 * 16 * 60 * 90, seed=1)
    K, M = S.rbf_kernel(x)
    wide = x.double()
    d2 = torch.stack([(wide - row).square().sum(1) for row in wide])
    h = d2[~torch.eye(B, dtype=torch.bool)].median() / math.log(B + 1)
    expected = torch.exp(-d2 / h)
    others = expected - torch.eye(B)
    assert maxdiff(K / expected, torch.ones(B, B)) < 1e-5
    assert maxdiff(M / (2 / h * (torch.diag(others.sum(1)) - others)), torch.ones(B, B)) < 1e-5
    assert maxdiff(others * (B + 1), 1 - torch.eye(B)) < 0.01  # as rbf_kernel's docstring says


@pytest.mark.parametrize("rms, share", [(0.1, 2e-3), (0.02, 9e-3)])
def test_the_repulsions_share_at_full_size(rms, share):
    """As rbf_kernel's docstring says."""
    level = S.Level(979, 0.0052148, 0.9999864)  # the second of 50 steps of CogVideoX-2B
    x0, eps, residual = (randn(4, 13 * 16 * 60 * 90, seed=i) for i in range(3))
    noisy = level.alpha * x0 + level.sigma * eps
    repulsion = S.csd_gradient(x0, noisy, x0, level)
    gradient = S.csd_gradient(x0, noisy, x0 - rms * residual, level)
    assert repulsion.norm() / (gradient - repulsion).norm() == pytest.approx(share, rel=0.15)


def test_kernel_of_one_or_identical_windows_is_plain_distillation():
    level = LEVELS[3]
    for x in (randn(1, 6), randn(1, 6).expand(4, 6), torch.cat([randn(1, 6).expand(3, 6), randn(1, 6, seed=1)])):
        K, M = S.rbf_kernel(x.contiguous())
        assert K.isfinite().all() and M.eq(0).all()
        assert torch.equal(K, (torch.cdist(x, x) == 0).float())
    x0, noisy, predicted = (randn(1, 2, 1, 1, 3, seed=i) for i in range(3))
    expected = level.sigma**2 * level.alpha / level.sigma * (x0 - predicted)
    assert maxdiff(S.csd_gradient(x0, noisy, predicted, level), expected) < 1e-6


@pytest.mark.parametrize("B", [2, 5])
def test_windows_repel_when_scores_are_zero(B):
    """With predictions equal to x0, a step moves windows away from the others' weighted mean."""
    x0 = randn(B, 2, 1, 3, 3)
    g = S.csd_gradient(x0, LEVELS[5].alpha * x0, x0, LEVELS[5])
    before, after = torch.pdist(x0.view(B, -1)), torch.pdist((x0 - 0.1 * g).view(B, -1))
    assert after.sum() > before.sum() and (after > before).all()


@pytest.mark.parametrize("step", [1, 15])
def test_gradient_against_the_formula_in_float64(step):
    """g_i = w/B sum_j [k(X_j, X_i)(eps_hat_j - eps_j) - dk(X_j, X_i)/dX_j], as in CSD's code."""
    B, (_, a, s) = 4, LEVELS[step]
    x0, predicted, eps = (randn(B, 3, 2, 2, 2, seed=i).double() for i in range(3))
    X = a * x0 + s * eps
    eps_hat = (X - a * predicted) / s
    K, R = naive_kernel(X.reshape(B, -1))
    expected = torch.zeros_like(x0)
    for i in range(B):
        for j in range(B):
            expected[i] += K[j, i] * (eps_hat[j] - eps[j])
        expected[i] -= R[i].view_as(x0[i])
    expected *= s**2 / B
    got = S.csd_gradient(x0.float(), X.float(), predicted.float(), LEVELS[step])
    assert maxdiff(got.double(), expected) < 1e-5 * expected.abs().max()


def test_residual_keeps_its_digits_at_high_noise():
    """At alpha = 1e-4 a difference of noises in float32 is wrong by more than 10 %; ours is not."""
    level = S.Level(998, 1e-4, (1 - 1e-8) ** 0.5)
    x0, eps = randn(1, 2, 2, 4, 4), randn(1, 2, 2, 4, 4, seed=1)
    predicted = x0 + 1e-3 * randn(1, 2, 2, 4, 4, seed=2)
    exact = level.sigma * level.alpha * (x0.double() - predicted.double())
    naive = level.sigma**2 * ((level.alpha * x0 + level.sigma * eps - level.alpha * predicted) / level.sigma - eps)
    noisy = level.alpha * x0 + level.sigma * eps
    assert maxdiff(S.csd_gradient(x0, noisy, predicted, level).double(), exact) < 1e-3 * exact.abs().max()
    assert maxdiff(naive.double(), exact) > 0.1 * exact.abs().max()


def test_refine_against_a_transcription_in_float64():
    """Three iterations over all windows: loops, differences of noises, torch's AdamW, float64."""
    level, windows, noise, start = LEVELS[6], S.make_windows(9, 5, 2), randn(9, 2, 2, 2, seed=5), randn(9, 2, 2, 2)
    prompts, model = ["0.1", "0.5", "0.9"], Gaussian(LEVELS)
    got = S.csd_refine(model, start, [level], noise, windows, prompts, rng(), iters=3, batch=3, lr=0.3)

    x0 = start.double().clone().requires_grad_()
    adamw = torch.optim.AdamW([x0], lr=0.3)
    for _ in range(3):
        grad, count = torch.zeros_like(x0), torch.zeros(9, 1, 1, 1)
        X = torch.stack([level.alpha * x0.detach()[w] + level.sigma * noise.double()[w] for w in windows])
        predicted = model(X.float(), level.t, prompts).double()
        K, R = naive_kernel(X.reshape(3, -1))
        for i, w in enumerate(windows):
            mixed = -R[i].view(5, 2, 2, 2)
            for j, v in enumerate(windows):
                mixed = mixed + K[j, i] * ((X[j] - level.alpha * predicted[j]) / level.sigma - noise.double()[v])
            grad[w] += level.sigma**2 / 3 * mixed
            count[w] += 1
        x0.grad = grad / count
        adamw.step()
    assert maxdiff(got.double(), x0.detach()) < 1e-4


def test_refine_does_nothing_at_zero_snr_and_never_changes_its_input():
    x0, noise, windows = randn(9, 2, 2, 2), randn(9, 2, 2, 2, seed=1), S.make_windows(9, 5, 2)
    model, kept = Gaussian(LEVELS), randn(9, 2, 2, 2)
    assert LEVELS[0].alpha == 0
    assert torch.equal(S.csd_refine(model, x0, LEVELS[:1], noise, windows, ["0"] * 3, rng()), x0) and model.calls == 0
    refined = S.csd_refine(model, x0, LEVELS[3:4], noise, windows, ["0"] * 3, rng())
    assert torch.equal(x0, kept) and not torch.equal(refined, x0) and not refined.requires_grad


def test_small_minibatches_stay_finite():
    for batch in (1, 2):
        assert run(replace(SMALL, csd_batch=batch)).isfinite().all()


# --------------------------------------------------------------------------------------------------
# The loop


def test_same_seed_same_video_whatever_the_window_batch():
    model = Gaussian(LEVELS)

    def one_by_one(x, t, prompts):
        return torch.cat([model(x[i : i + 1], t, prompts[i : i + 1]) for i in range(len(x))])

    first = run()
    assert torch.equal(first, run())
    assert maxdiff(first, run(denoiser=one_by_one)) < 1e-5
    assert maxdiff(first, run(seed=1)) > 1e-3


def test_every_variant_differs_and_its_evaluations_are_counted_beforehand():
    results = {}
    for name, changes in VARIANTS.items():
        settings, model = replace(SMALL, **changes), Gaussian(LEVELS)
        x = results[name] = run(settings, model)
        assert model.calls == S.count_evaluations(LEVELS, S.make_windows(11, 5, 2), settings), name
        assert x.isfinite().all() and (name == "syncos" or maxdiff(x, results["syncos"]) > 1e-3), name
    assert torch.equal(results["stage-2"], results["gen-l-video"])
    assert maxdiff(results["stage-2-keep-noise"], results["stage-2"]) > 1e-3


def test_the_papers_numbers_of_evaluations():
    ddim = CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ddim.set_timesteps(50)
    levels = S.diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist())
    windows = S.make_windows(49, 13, 4)
    assert S.count_evaluations(levels, windows, S.Settings(**S.GEN_L_VIDEO)) == 500
    # t_min 800: steps 999, 979, ..., 819, of which 999 has no signal
    assert S.count_evaluations(levels, windows, S.Settings(t_min=800)) == 500 + 9 * 20 * 4


def test_ablations_do_what_they_say():
    """The timesteps that stage 2 uses, seen through the model's inputs."""

    def stage2_inputs(**changes):
        seen, model, windows = [], Gaussian(LEVELS), S.make_windows(11, 5, 2)
        settings = replace(SMALL, csd_batch=len(windows) - 1, **changes)

        def spy(x, t, prompts):
            if len(x) < len(windows):
                seen.append(t)
            return model(x, t, prompts)

        run(settings, spy, at_once=len(windows))
        return seen

    coupled = [level.t for level in LEVELS if level.t > 500 and level.alpha > 0]
    assert stage2_inputs() == [t for t in coupled for _ in range(3)]  # grounded
    assert stage2_inputs(noise="fresh") == [t for t in coupled for _ in range(3)]
    assert len(set(stage2_inputs(grounded=False))) > len(coupled)  # any of the schedule's timesteps
    assert len(stage2_inputs(t_min=-1)) == 3 * (len(LEVELS) - 2)


def test_baseline_noise_is_shared_by_stages_2_and_3():
    """One frame, one window, a model that always answers 0: stages 2 and 3 show their noise."""
    seen, states = {}, {}

    def model(x, t, prompts):
        seen.setdefault(t, []).append(x[0])
        return torch.zeros_like(x)

    settings = S.Settings(t_min=0, csd_iters=2, csd_lr=0.0)
    S.syncos(model, randn(3, 1, 2, 2), LEVELS, [slice(0, 3)], ["a"], settings, rng(),
             callback=lambda step, t, x0, x: states.update({t: x}))  # fmt: skip
    for level, prev in zip(LEVELS[1:-2], LEVELS[2:]):
        stage1, first, second = seen[level.t]
        assert torch.equal(first, second)
        assert maxdiff(first / level.sigma, states[level.t] / prev.sigma) < 1e-5
        assert maxdiff(stage1 / level.sigma, first / level.sigma) > 1e-2  # new at each step


@pytest.mark.parametrize("frames, stride", [(49, 4), (64, 8), (50, 7), (13, 4)])  # of 50, the last window moves back
def test_shared_noise_is_the_same_in_every_window(frames, stride):
    noise, windows = randn(frames, 1, 2, 2), S.make_windows(frames, 13, stride)
    shared = S.share_noise(noise, windows, rng())
    for window in windows:
        assert sorted(shared[window].flatten(1).tolist()) == sorted(noise[:13].flatten(1).tolist())
    assert torch.equal(noise, randn(frames, 1, 2, 2)) and torch.equal(shared, S.share_noise(noise, windows, rng()))


def test_stages_2_and_3_share_the_shared_noise():
    inputs, states = [], []

    def model(x, t, prompts):
        inputs.append(x)
        return torch.zeros_like(x)

    settings = S.Settings(t_min=0, csd_iters=1, csd_lr=0.0, shared_noise=True)
    S.syncos(model, randn(5, 1, 2, 2), LEVELS[-4:], S.make_windows(5, 3, 2), ["a", "b"], settings, rng(),
             callback=lambda *state: states.append(state[-1]), at_once=2)  # fmt: skip
    ordered = lambda frames: frames.flatten(1)[frames.flatten(1)[:, 0].argsort()]  # noqa: E731
    for refined, x, level, prev in zip(inputs[1::2], states, LEVELS[-4:-2], LEVELS[-3:-1]):  # x0 is 0 throughout
        a, b = (ordered(window / level.sigma) for window in refined)
        assert maxdiff(a, b) < 1e-5 and maxdiff(a, ordered(x[:3] / prev.sigma)) < 1e-5


def test_below_t_min_the_step_is_ddim():
    trace = []
    run(callback=lambda step, t, x0, x: trace.append((t, x0, x)))
    for (_, _, x), (t, x0, x_prev), level, prev in zip(trace, trace[1:], LEVELS[1:], LEVELS[2:]):
        if t <= SMALL.t_min:
            assert maxdiff(S.revert(x0, S.implied_noise(x, x0, level), prev), x_prev) < 1e-6


def test_loop_refuses_what_does_not_fit():
    windows, x = S.make_windows(9, 5, 4), randn(9, 2, 2, 2)
    with pytest.raises(ValueError, match="windows"):
        S.syncos(Gaussian(LEVELS), x, LEVELS, windows, ["0"], SMALL, rng())
    with pytest.raises(ValueError, match="cover"):
        S.syncos(Gaussian(LEVELS), x, LEVELS, windows[:1], ["0"], SMALL, rng())
    with pytest.raises(ValueError, match="no windows to fuse"):
        S.fuse([], [], 3)


def test_settings_refuse_what_they_cannot_do():
    for bad in (
        dict(csd_batch=0), dict(csd_iters=2.5), dict(csd_iters=torch.tensor(2)), dict(csd_lr=-1), dict(t_min=math.nan),
        dict(csd_lr=math.inf), dict(noise="pink"), dict(codenoise=False, refine=False),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(SMALL, **bad)
    assert replace(SMALL, csd_iters=np.int64(2)) == replace(SMALL, csd_iters=2)


def test_stage_2_that_never_runs_is_told():
    flow = make_flow()
    unit = [level._replace(t=level.t / 1000) for level in flow]  # t from 1 to 0: none is above 800
    windows, x = S.make_windows(9, 5, 4), randn(9, 2, 2, 2)
    with pytest.warns(UserWarning, match="Stage 2 never runs.* 800 .*first is 1"):
        S.syncos(Gaussian(unit), x, unit, windows, ["0", "1"], S.Settings(csd_iters=1), rng())
    with pytest.raises(ValueError, match="never asked"):
        S.syncos(Gaussian(unit), x, unit, windows, ["0", "1"], S.Settings(csd_iters=1, codenoise=False), rng())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        S.syncos(Gaussian(flow), x, flow, windows, ["0", "1"], S.Settings(csd_iters=1), rng())
        S.syncos(Gaussian(unit), x, unit, windows, ["0", "1"], S.Settings(**S.GEN_L_VIDEO), rng())


def test_one_window_at_a_time_unless_asked():
    sizes, model = [], Gaussian(LEVELS)

    def spy(x, t, prompts):
        sizes.append(len(x))
        return model(x, t, prompts)

    alone, three = run(denoiser=spy, at_once=1), run(denoiser=lambda *args: model(*args), at_once=3)
    assert set(sizes) == {1} and maxdiff(alone, three) < 1e-5


def test_ablations_combine_in_any_order_or_are_refused():
    for parts in [pair for n in (2, 3) for pair in combinations(S.ABLATIONS, n)]:
        seen = set()
        for order in permutations(parts):
            try:
                seen.add(S.ablate(SMALL, order))
            except ValueError:
                seen.add("refused")
        assert len(seen) == 1, parts
    assert S.ablate(SMALL, ["fixed-noise", "t-min"]) == replace(SMALL, noise="fresh", t_min=-1)
    for parts, why in {
        ("stage-1", "stage-2"): "never asked",
        ("stage-2", "fixed-noise"): "contradict",
        ("stage-2", "stage-2-keep-noise"): "contradict",
        ("stage-2", "t-min"): "nothing for t-min",
        ("grounded-timestep", "stage-2-keep-noise"): "nothing for grounded-timestep",
    }.items():
        with pytest.raises(ValueError, match=why):
            S.ablate(SMALL, parts)


def test_a_stopped_run_resumes_and_the_loop_keeps_its_input():
    """From the state after any step, bit for bit."""
    generator, steps = rng(), []
    keep = lambda step, t, x0, x: steps.append((step + 1, x0, x, generator.get_state()))  # noqa: E731
    noise, windows, prompts = randn(9, 2, 2, 2), S.make_windows(9, 5, 4), ["0", "1"]
    whole = S.syncos(Gaussian(LEVELS), noise, LEVELS, windows, prompts, SMALL, generator, keep)
    assert torch.equal(noise, randn(9, 2, 2, 2)) and len(steps) == len(LEVELS) - 1
    for start, x0, x, state in steps[::6]:
        kept = x.clone()
        generator.set_state(state)
        again, rest = x, (LEVELS, windows, prompts, SMALL, generator)
        for step in range(start, len(LEVELS) - 1):
            x0, again = S.syncos_step(Gaussian(LEVELS), again, x0, step, *rest)
        assert torch.equal(again, whole) and torch.equal(x, kept)


def test_file_works_alone(tmp_path):
    """Copied into an empty project it runs, and imports only torch and the standard library."""
    shutil.copy(ROOT / "syncos.py", tmp_path)
    code = """
import sys, torch, syncos as S
levels = S.diffusion_levels(torch.linspace(0.999, 0, 1000).double(), range(999, 0, -100))
windows = S.make_windows(9, 5, 2)
x = S.syncos(lambda x, t, p: x * 0.5, torch.randn(9, 2, 2, 2), levels, windows, list("abc"),
             S.Settings(t_min=500, csd_iters=2), torch.Generator().manual_seed(0))
assert x.shape == (9, 2, 2, 2) and x.isfinite().all()
assert not {"diffusers", "transformers", "backbones", "prompts"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def imports(path, everywhere=True):
    """What a file imports, `a.b.c` for `from a.b import c`; else only at its top level."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_imports_point_one_way():
    """The method knows no backbone, backbones no baseline; only tests import the demo."""
    within = lambda name, package: f"{name}.".startswith(f"{package}.")  # noqa: E731
    assert {name.split(".")[0] for name in imports(ROOT / "syncos.py")} <= {"torch", *sys.stdlib_module_names}
    assert not any(within(name, "extras") for name in imports(ROOT / "backbones.py", everywhere=False))
    files = [*ROOT.glob("*.py"), *ROOT.glob("extras/**/*.py")]
    assert len(files) > 15
    for path in files:
        room, forbidden = path.relative_to(ROOT).as_posix(), ["demo", "helpers", "conftest"]
        if room == "backbones.py":
            forbidden += ["extras.baselines", "extras.models"]
        if not room.startswith("extras/measure/"):
            forbidden += ["extras.measure"]
        assert not [n for n in imports(path) if any(within(n, f) for f in forbidden)], room


# --------------------------------------------------------------------------------------------------
# The purpose


class Clips:
    """Exact denoiser over a finite set of clips: a softmax over the distances to them.

    A clip is F frames of a 1 x 8 x 8 picture: a bright dot before one of four backgrounds (its
    identity), moving right or left from any phase; the prompt fixes the motion alone.
    """

    PLACES, SIZE, F = 4, 8, 6

    def __init__(self, levels):
        self.at = {level.t: level for level in levels}
        self.places = 0.5 * randn(self.PLACES, 1, self.SIZE, self.SIZE, seed=7)
        self.identity = torch.arange(self.PLACES).repeat_interleave(self.SIZE)
        self.clips = {motion: self.render(sign) for motion, sign in (("right", 1), ("left", -1))}

    def render(self, sign):
        clips = self.places[self.identity][:, None].repeat(1, self.F, 1, 1, 1)
        for n in range(len(clips)):
            for f in range(self.F):
                clips[n, f, 0, 5:7, (n + sign * f) % self.SIZE] = 3.0
        return clips

    def __call__(self, latents, t, prompts):
        _, a, s = self.at[t]
        out = []
        for x, prompt in zip(latents, prompts):
            clips = self.clips[prompt].flatten(1)
            logits = -(x.flatten() - a * clips).square().sum(1) / (2 * s**2)
            out.append((logits.softmax(0) @ clips).view_as(x))
        return torch.stack(out)

    def identities(self, x, windows, prompts):
        """Distinct backgrounds among the windows' nearest clips."""
        nearest = [(self.clips[p] - x[w]).square().flatten(1).sum(1).argmin() for w, p in zip(windows, prompts)]
        return len({self.identity[n].item() for n in nearest})


def test_purpose_fewer_identities_than_gen_l_video():
    """Distant windows choose one identity under SynCoS, several under Gen-L-Video; six seeds."""
    model = Clips(LEVELS)
    windows = S.make_windows(30, Clips.F, 3)
    prompts = ["right"] * 5 + ["left"] * 4
    distinct = {}
    for method in ("gen-l-video", "syncos"):
        settings = S.Settings(t_min=100, csd_iters=10)
        settings = replace(settings, **VARIANTS[method])
        samples = [
            S.syncos(model, randn(30, 1, 8, 8, seed=i), LEVELS, windows, prompts, settings, rng(i)) for i in range(6)
        ]
        distinct[method] = sum(model.identities(x, windows, prompts) for x in samples) / len(samples)
    assert distinct["syncos"] <= 0.6 * distinct["gen-l-video"], distinct
