"""FIFO-Diffusion against a naive version and closed forms; models with a timestep per frame."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.normalization import CogVideoXLayerNormZero
from helpers import ABAR, PROMPT, Gaussian, call, make_flow, maxdiff, randn, refusal, rng, stop_at_preview

import syncos as S
from backbones import CogVideoX, OpenSoraPlan
from extras.baselines.fifo import (
    Fifo,
    count_evaluations,
    count_turns,
    fifo,
    frame_norms,
    frame_predictor,
    queue_windows,
)
from extras.measure.memory import meta_as_gpu
from extras.models.wan import Wan
from extras.processes import in_batches
from extras.videos import read_tensors

LEVELS = S.diffusion_levels(ABAR, list(range(999, 0, -83)))  # 13 steps
SCHEDULES = {"v": LEVELS, "eps": LEVELS[1:], "flow": make_flow(12)}
LOOKAHEAD = pytest.mark.parametrize("lookahead", [True, False])


class Frames(Gaussian):
    """`Gaussian` with a timestep per frame; `mix`: how much frames see of their window's mean."""

    def __init__(self, levels, mix=0.0):
        super().__init__(levels)
        self.mix, self.seen = mix, []

    def __call__(self, latents, t, prompts):
        if not isinstance(t, torch.Tensor):  # the base clip
            t = torch.full(latents.shape[:2], t, dtype=torch.float64)
        self.seen.append((latents, t, prompts))
        self.calls += len(latents)
        out = torch.empty_like(latents)
        for b, (window, times, prompt) in enumerate(zip(latents, t.tolist(), prompts)):
            for f, (frame, time) in enumerate(zip(window, times)):
                out[b, f] = self.denoise(frame, time, float(prompt)) + self.mix * window.mean(0).tanh()
        return out


def run(denoiser, levels, frames=9, size=4, prompts=None, callback=None, **settings):
    prompts = prompts or ["0.3"] * frames
    noise = randn(frames, 2, 3, 3)
    return fifo(denoiser, noise, levels, size, prompts, Fifo(**settings), rng(1), callback)


def naive(denoiser, levels, frames, size, prompts, lookahead, eta, one_prompt):
    """The algorithm with lists of (frame, step): windows take and put back frame by frame."""
    steps, generator = len(levels) - 1, rng(1)
    x = randn(frames, 2, 3, 3)[:size]
    for step in range(steps):
        (t, a, s), (_, a2, s2) = levels[step], levels[step + 1]
        x0 = denoiser(x[None], t, prompts[:1])[0]
        x = a2 * x0 + s2 * (x - a * x0) / s
    ahead = size // 2 if lookahead else 0
    fresh = torch.randn(ahead + steps, 2, 3, 3, generator=generator)
    queue = []
    for position in range(ahead + steps):
        step = steps - 1 if position < ahead else steps - 1 - (position - ahead)
        _, a, s = levels[step]
        source = max(0, position - (ahead + steps - size))  # the clip's frames are the last ones
        queue.append((a * x[source] + s * fresh[position], step))

    left = []
    while len(left) < steps - size + frames:
        number = len(left) - (steps - size)  # in the video, of the frame that leaves now
        estimates = [[] for _ in queue]
        start = 0
        while True:
            start = min(start, len(queue) - size)
            part = queue[start : start + size]
            middle = 0 if one_prompt else start + size // 2 - ahead
            prompt = prompts[max(0, min(number + middle, frames - 1))]
            t = torch.tensor([[levels[step].t for _, step in part]], dtype=torch.float64)
            x0 = denoiser(torch.stack([frame for frame, _ in part])[None], t, [prompt])[0]
            for k in range(ahead, size):
                estimates[start + k].append(x0[k])
            if start + size == len(queue):
                break
            start += size - ahead
        fresh = torch.randn(len(queue), 2, 3, 3, generator=generator) if eta else None
        following = queue[:ahead]
        for position in range(ahead, len(queue)):
            frame, step = queue[position]
            (_, a, s), (_, a2, s2) = levels[step], levels[step + 1]
            x0 = sum(estimates[position]) / len(estimates[position])
            eps = (frame - a * x0) / s
            added = eta * math.sqrt(s2**2 / s**2 * (s**2 - a**2 * s2**2 / a2**2))  # the std of q(x_s | x_t, x_0)
            frame = a2 * x0 + math.sqrt(max(0, s2**2 - added**2)) * eps
            following.append((frame + added * fresh[position] if eta else frame, step + 1))
        left.append(following[ahead][0])
        entering = (torch.randn(1, 2, 3, 3, generator=generator)[0], 0)
        context = [(frame, steps - 1) for frame, _ in following[1 : ahead + 1]]  # at the lowest timestep
        queue = context + following[ahead + 1 :] + [entering]
    return torch.stack(left[steps - size :])


# --------------------------------------------------------------------------------------------------
# The queue


@LOOKAHEAD
@pytest.mark.parametrize("schedule, size, eta, one_prompt", [
    ("v", 4, 0.0, False), ("v", 5, 1.0, True), ("eps", 4, 0.5, False), ("flow", 12, 0.0, True), ("v", 1, 1.0, False),
])  # fmt: skip
def test_the_queue_is_the_naive_one(lookahead, schedule, size, eta, one_prompt):
    levels, prompts = SCHEDULES[schedule], [str(0.1 * k) for k in range(size + 4)]
    args = dict(frames=len(prompts), size=size, prompts=prompts, lookahead=lookahead, eta=eta, one_prompt=one_prompt)
    ours, theirs = Frames(levels, mix=0.2), Frames(levels, mix=0.2)
    got, expected = run(ours, levels, **args), naive(theirs, levels, **args)
    assert maxdiff(got, expected) < 2e-5 and expected.std() > 0.1
    steps = len(levels) - 1
    turns = count_turns(steps, size, len(prompts))
    assert ours.calls == theirs.calls == count_evaluations(steps, size, turns, Fifo(lookahead))
    texts = lambda model: sorted(p for _, _, prompts in model.seen for p in prompts)  # noqa: E731
    assert texts(ours) == texts(theirs)


@LOOKAHEAD
def test_a_frame_by_itself_is_ddim(lookahead):
    """With a denoiser of single frames, later ones are DDIM from the noise that entered."""
    queues = []
    look = lambda *args: queues.append(args[3])  # noqa: E731
    x = run(Frames(LEVELS), LEVELS, frames=20, callback=look, lookahead=lookahead, eta=0.0)
    for k in range(4, 20):
        expected = queues[k - 4][-1].double()  # in closed form: each step changes only the scale of x_t - alpha_t mean
        for (_, a, s), (_, a2, s2) in zip(LEVELS, LEVELS[1:]):
            expected = 0.3 * a2 + (a2 * a * 0.25 + s2 * s) / (a**2 * 0.25 + s**2) * (expected - a * 0.3)
        assert maxdiff(x[k].double(), expected) < 2e-6


@pytest.mark.parametrize("settings", [Fifo(), Fifo(lookahead=False, eta=0.0)])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gaussian_prior_is_sampled(settings, schedule):
    levels = SCHEDULES[schedule]
    x = fifo(Frames(levels), randn(30, 4, 6, 6), levels, 4, ["0.7"] * 30, settings, rng())
    assert abs(x.mean().item() - 0.7) < 0.03 and 0.3 < x.std().item() < 0.6


def test_eta_is_ddims():
    """Windows of one frame, one turn: diffusers' DDIM steps with their noise given.

    Not at the tail, where diffusers takes the square root of a rounded zero.
    """
    ddim = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample",
                         clip_sample=False)  # fmt: skip
    ddim.set_timesteps(10)
    levels = S.diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist())
    queues = []
    settings = Fifo(lookahead=False, eta=1.0)
    denoiser = Frames(levels)
    fifo(denoiser, randn(3, 2, 3, 3), levels, 1, ["0.3"] * 3, settings, rng(1), lambda *args: queues.append(args[3]))
    generator = rng(1)
    torch.randn(10, 2, 3, 3, generator=generator)  # the queue's first noise
    fresh = [torch.randn(n, 2, 3, 3, generator=generator) for n in (10, 1, 10, 1)][2]  # of the second turn
    for position in range(1, 9):
        t, frame = ddim.timesteps[9 - position], queues[0][position]
        x0 = denoiser(frame[None, None], t.item(), ["0.3"])[0, 0]
        moved = ddim.step(x0, t, frame, eta=1.0, variance_noise=fresh[position], return_dict=False)[0]
        assert maxdiff(queues[1][position - 1], moved) < 1e-5


@LOOKAHEAD
def test_windows_cover_the_queue_behind_their_context(lookahead):
    for steps, size in [(13, 13), (50, 13), (52, 13), (49, 13), (50, 24), (50, 21), (7, 3), (5, 1)]:
        context, windows = queue_windows(steps, size, Fifo(lookahead))
        kept = set().union(*(range(w.start + context, w.stop) for w in windows))
        assert kept == set(range(context, context + steps)) and windows[0].start == 0
        assert len(windows) == -(-steps // (size - context))


def test_costs():
    """CogVideoX's 49 latent frames: the base clip, and steps - 13 + 49 turns of 3 to 5 windows."""
    for steps, with_, without in [(50, 738, 394), (52, 756, 404), (39, 489, 264), (65, 1075, 570)]:
        turns = count_turns(steps, 13, 49)
        assert count_evaluations(steps, 13, turns, Fifo()) == with_
        assert count_evaluations(steps, 13, turns, Fifo(lookahead=False)) == without


@LOOKAHEAD
def test_a_stopped_run_resumes(lookahead):
    """From any turn's callback, bit for bit. Its tensors and the arguments stay as they are."""
    settings, prompts, noise = Fifo(lookahead, eta=1.0), [str(0.1 * k) for k in range(9)], randn(9, 2, 3, 3)
    args, kept = (LEVELS, 4, prompts, settings), []
    generator = rng(1)

    def callback(turn, t, x0, latents):
        assert t == LEVELS[-2].t  # that of the frame that leaves
        kept.append((turn, x0, x0.clone(), latents, latents.clone(), generator.get_state()))

    whole = fifo(Frames(LEVELS, 0.2), noise, *args, generator, callback)
    assert torch.equal(noise, randn(9, 2, 3, 3)) and [turn for turn, *_ in kept] == list(range(18))
    assert torch.equal(kept[-1][1], whole)
    for turn, x0, x0_then, latents, latents_then, state in kept:
        assert torch.equal(x0, x0_then) and torch.equal(latents, latents_then)
        left = max(0, turn - 8)
        assert torch.equal(x0[:left], whole[:left])  # what has left stays
        again = torch.Generator()
        again.set_state(state)
        assert torch.equal(fifo(Frames(LEVELS, 0.2), latents, *args, again, None, turn + 1, x0), whole)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="14 steps"):
        run(Frames(LEVELS), LEVELS, frames=20, size=14)
    with pytest.raises(ValueError, match="prompts"):
        run(Frames(LEVELS), LEVELS, prompts=["0", "0", "0"])
    with pytest.raises(ValueError, match="eta"):
        Fifo(eta=1.5)


# --------------------------------------------------------------------------------------------------
# A timestep per frame: the models, with random weights


def test_every_frame_is_converted_at_its_own_level():
    """For each kind of prediction, bit for bit; t alone is the plain predict_x0."""
    t = torch.tensor([[999, 916, 833], [3, 86, 916]], dtype=torch.float64)
    output, x, at = randn(2, 3, 4, 2, 2, seed=1), randn(2, 3, 4, 2, 2, seed=2), {level.t: level for level in LEVELS}
    calls, plain = [], lambda *args: "plain"
    guided = lambda *args: calls.append(args) or output  # noqa: E731
    for prediction in ("v_prediction", "flow", "epsilon"):
        predict = frame_predictor(SimpleNamespace(guided=guided, at=at, prediction=prediction, predict_x0=plain))
        if prediction == "epsilon":
            with pytest.raises(ValueError, match="zero SNR"):
                predict(x, t, ["a", "b"])
            t, x, output = t[:, 1:], x[:, 1:], output[:, 1:]
        got = predict(x, t, ["a", "b"])
        assert calls[-1] == (x, t, ["a", "b"])
        for b, f in torch.cartesian_prod(torch.arange(2), torch.arange(t.shape[1])).tolist():
            assert torch.equal(got[b, f], S.to_x0(output[b, f], x[b, f], at[t[b, f].item()], prediction))
    assert predict(x, 999, ["a", "b"]) == "plain"


MODELS = {  # adapter, folder's fixture, channels
    "sincos": (CogVideoX, "sincos_folder", 4),
    "rotary": (CogVideoX, "rotary_folder", 4),
    "opensora-plan": (OpenSoraPlan, "opensora_release", 8),
    "wan": (Wan, "wan_folder", 4),
}
T = torch.tensor([[19.0, 259, 499, 739, 999], [119, 359, 599, 839, 979]])


def load(kind, folder):
    backbone = kind(str(folder), guidance_scale=3.0)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    return backbone


@pytest.fixture(params=MODELS)
def model(request):
    """call(t): the guided output at 1, B or B x f timesteps, in the context of `frame_norms`."""
    kind, fixture, channels = MODELS[request.param]
    backbone = load(kind, request.getfixturevalue(fixture))
    call = lambda t: backbone.guided(randn(2, 5, channels, 2, 4), t, [PROMPT, "it runs"])  # noqa: E731
    call.transformer = backbone.pipe.transformer
    plain = call(T[:, 2])
    with frame_norms(backbone):
        assert torch.equal(plain, call(T[:, 2]))  # with one timestep per window it is the model that it was
        yield call


def near(a, b):
    return maxdiff(a, b) < 2e-6 * max(1, b.abs().max().item())


def test_a_frame_alone_is_the_model_at_its_timestep(model):
    """Exactly so where self-attention sees nothing."""
    for block in getattr(model.transformer, "transformer_blocks", None) or model.transformer.blocks:
        block.attn1.to_out[0].weight.data.zero_()  # the bias stays, for the gates
    out = model(T)
    for frame in range(5):
        expected = model(T[:, frame])[:, frame]
        assert near(out[:, frame], expected)


def test_one_timestep_or_one_per_window_or_one_per_frame(model):
    """Equal ones change nothing; a frame's own changes its own output most, and no other window."""
    plain = model(T[1:, 2])
    assert torch.equal(model(T[1:, 2].repeat(2)), plain) and near(model(T[1:, 2].expand(2, 5)), plain)
    out = model(T)
    for frame in range(5):
        changed = T.clone()
        changed[0, frame] -= 15
        moved = (model(changed) - out).abs().amax((2, 3, 4))
        assert moved[0].argmax() == frame and moved[1].max() < 1e-5 < moved[0, frame]


def test_a_cogvideox_norm_by_hand(sincos_folder):
    """Each frame's tokens by its own timestep's shift, scale and gate, text by the middle's."""
    backbone = load(CogVideoX, sincos_folder)
    block = backbone.pipe.transformer.transformer_blocks[1]
    video, text, temb = randn(2, 15, 32), randn(2, 3, 32, seed=1), randn(2, 5, 8, seed=2)
    for norm in (block.norm1, block.norm2):
        modulation = norm.linear(temb / (1 + (-temb).exp()))  # 2 x 5 x 192
        shift, scale, gate = (part.repeat_interleave(3, 1) for part in modulation[..., :96].chunk(3, -1))
        text_shift, text_scale, text_gate = modulation[:, 2:3, 96:].chunk(3, -1)
        expected = norm.norm(video) * (1 + scale) + shift, norm.norm(text) * (1 + text_scale) + text_shift
        with frame_norms(backbone):
            results = norm(video, text, temb.flatten(0, 1))
        for got, wanted in zip(results, (*expected, gate, text_gate), strict=True):
            assert maxdiff(got, wanted) < 1e-6


def test_the_norms_are_as_before_afterwards(sincos_folder):
    backbone = load(CogVideoX, sincos_folder)
    kinds = lambda: [type(module) for module in backbone.pipe.transformer.modules()]  # noqa: E731
    plain = kinds()
    with frame_norms(backbone):
        assert len([kind for kind in kinds() if kind.__name__ == "FrameLayerNormZero"]) == 4  # 2 blocks of 2
        assert CogVideoXLayerNormZero not in kinds()
    assert kinds() == plain
    with pytest.raises(KeyboardInterrupt), frame_norms(backbone):
        raise KeyboardInterrupt
    assert kinds() == plain


def test_predictions_with_guidance_in_batches_and_under_offload(rotary_folder, offload):
    """With equal timesteps they are the plain predictions."""
    x, prompts, results = randn(2, 5, 4, 2, 4), [PROMPT, "it runs"], []
    for backbone in (CogVideoX(rotary_folder, offload=offload), CogVideoX(rotary_folder)):
        backbone.encode(prompts)
        backbone.load()
        levels, predict_x0 = backbone.levels(5), frame_predictor(backbone)
        t = torch.tensor([[x.t for x in levels[:5]], [x.t for x in levels[4::-1]]], dtype=torch.float64)
        with frame_norms(backbone):
            results.append(predict_x0(x, t, prompts))
            same = predict_x0(x, torch.full((2, 5), 599), prompts)
            assert maxdiff(in_batches(predict_x0, 1)(x, t, prompts), results[-1]) < 1e-5
        plain = backbone.predict_x0(x, 599, prompts)
        assert maxdiff(same, plain) < 1e-5 and maxdiff(same, results[-1]) > 1e-2
    assert torch.equal(*results)


def test_a_run_stays_on_the_device(rotary_folder):
    backbone, devices = CogVideoX(rotary_folder, "meta", torch.float16), set()
    with meta_as_gpu():
        backbone.encode([PROMPT])
        backbone.load()
        look = lambda turn, t, x0, queue: devices.update((x0.device.type, queue.device.type))  # noqa: E731
        args = (backbone.levels(6), 5, [PROMPT] * 6, Fifo(), rng(), look)
        with frame_norms(backbone):
            x = fifo(in_batches(frame_predictor(backbone), 2), torch.zeros(6, 4, 2, 4, device="meta"), *args)
    assert devices == {"meta"} and x.shape == (6, 4, 2, 4) and x.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# The command line


def test_demo_end_to_end(any_method, tmp_path, capsys, monkeypatch):
    """Beside another method, with previews and a trace; a stopped run resumes bit for bit."""
    words = [*any_method, "--num_frames", 25, "--num_inference_steps", 6, "--save_latents", "--preview", 7]
    words += ["--compare", "fifo", "gen-l-video"]
    call(*words, "--trace", tmp_path / "trace.safetensors")
    captured = capsys.readouterr()
    assert "fifo: 22 model evaluations" in captured.out and "22/22" in captured.err
    whole = read_tensors(tmp_path / "video.safetensors", "latents")[0]
    traces = read_tensors(tmp_path / "trace.safetensors", "trace")[0]
    assert traces["fifo"].shape == (8, 7, 64) and traces["gen-l-video"].shape == (6, 7, 64)

    (tmp_path / "video.safetensors").unlink()
    stop_at_preview(monkeypatch, *words)
    call(*words, "--resume", tmp_path / "video.state.safetensors")
    resumed = read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole) and "| 20/22" in capsys.readouterr().err


def test_what_fifo_cannot_sample_is_refused(any_method, capsys):
    assert "steps" in refusal(capsys, *any_method, "--method", "fifo", "--plan")
    assert "timestep" in refusal(capsys, "--backbone", "videocrafter2", "--method", "fifo", "--plan")
    call("--method", "fifo", "--num_frames", 193, "--plan")
    out = capsys.readouterr().out
    assert "269 model evaluations" in out and "61 turns" in out and "stage 2" not in out
