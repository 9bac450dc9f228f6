"""FIFO-Diffusion against a naive transcription and closed forms; models that take a timestep for every frame."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, DDIMScheduler, WanTransformer3DModel
from diffusers.models.normalization import CogVideoXLayerNormZero
from test_backbones import PROMPT, offload  # noqa: F401
from test_demo import call
from test_syncos import ABAR, Gaussian, flow_walk, maxdiff, randn, rng

import demo
import syncos as S
from backbones import CogVideoX, OpenSoraPlan, VideoCrafter2, Wan, in_batches
from fifo import FifoSettings, count_evaluations, count_turns, fifo, queue_windows, stack_levels
from memory import meta_as_gpu
from models.cogvideox import FrameLayerNormZero, take_frame_timesteps
from models.opensora_plan import OpenSoraT2V_v1_3
from videos import read_tensors

LEVELS = S.diffusion_levels(ABAR, list(range(999, 0, -83)))  # 13 steps
WALKS = {"v": LEVELS, "eps": LEVELS[1:], "flow": flow_walk(12)}
LOOKAHEAD = pytest.mark.parametrize("lookahead", [True, False])


class Frames(Gaussian):
    """`Gaussian` with a timestep for every frame; `mix`: how much frames see of their window's mean."""

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
                _, a, s = self.at[time]
                gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
                out[b, f] = float(prompt) + gain * (frame - a * float(prompt)) + self.mix * window.mean(0).tanh()
        return out


def run(denoiser, levels, frames=9, size=4, prompts=None, callback=None, **settings):
    prompts = prompts or ["0.3"] * frames
    noise = randn(frames, 2, 3, 3)
    return fifo(denoiser, noise, levels, size, prompts, FifoSettings(**settings), rng(1), callback)


def naive(denoiser, levels, frames, size, prompts, lookahead, eta, one_prompt):
    """The algorithm with lists of (frame, step): of which a window's frames are taken, and put back, one by one."""
    steps, generator = len(levels) - 1, rng(1)
    x = randn(frames, 2, 3, 3)[:size]
    for step in range(steps):
        (t, a, s), (_, a2, s2) = levels[step], levels[step + 1]
        x0 = denoiser(x[None], t, prompts[:1])[0]
        x = a2 * x0 + s2 * (x - a * x0) / s
    ahead = size // 2 if lookahead else 0
    fresh = torch.randn(ahead + steps, 2, 3, 3, generator=generator)
    queue = []
    for place in range(ahead + steps):
        step = steps - 1 if place < ahead else steps - 1 - (place - ahead)
        _, a, s = levels[step]
        source = max(0, place - (ahead + steps - size))  # the clip's frames are the last ones
        queue.append((a * x[source] + s * fresh[place], step))

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
        for place in range(ahead, len(queue)):
            frame, step = queue[place]
            (_, a, s), (_, a2, s2) = levels[step], levels[step + 1]
            x0 = sum(estimates[place]) / len(estimates[place])
            eps = (frame - a * x0) / s
            added = eta * math.sqrt(s2**2 / s**2 * (s**2 - a**2 * s2**2 / a2**2))  # std of q(x_s | x_t, x_0), any walk
            frame = a2 * x0 + math.sqrt(max(0, s2**2 - added**2)) * eps
            following.append((frame + added * fresh[place] if eta else frame, step + 1))
        left.append(following[ahead][0])
        entering = (torch.randn(1, 2, 3, 3, generator=generator)[0], 0)
        context = [(frame, steps - 1) for frame, _ in following[1 : ahead + 1]]  # told the lowest timestep
        queue = context + following[ahead + 1 :] + [entering]
    return torch.stack(left[steps - size :])


# ----------------------------------------------------------------------------------------------------------------------
# The queue


@LOOKAHEAD
@pytest.mark.parametrize("walk, size, eta, one_prompt", [
    ("v", 4, 0.0, False), ("v", 5, 1.0, True), ("eps", 4, 0.5, False), ("flow", 3, 1.0, False), ("flow", 12, 0.0, True),
    ("v", 1, 1.0, False),
])  # fmt: skip
def test_the_queue_is_the_naive_one(lookahead, walk, size, eta, one_prompt):
    levels, prompts = WALKS[walk], [str(0.1 * k) for k in range(size + 4)]
    args = dict(frames=len(prompts), size=size, prompts=prompts, lookahead=lookahead, eta=eta, one_prompt=one_prompt)
    ours, theirs = Frames(levels, mix=0.2), Frames(levels, mix=0.2)
    got, expected = run(ours, levels, **args), naive(theirs, levels, **args)
    assert maxdiff(got, expected) < 2e-5 and expected.std() > 0.1
    steps = len(levels) - 1
    turns = count_turns(steps, size, len(prompts))
    assert ours.calls == theirs.calls == count_evaluations(steps, size, turns, FifoSettings(lookahead))
    told = lambda model: sorted(p for _, _, prompts in model.seen for p in prompts)  # noqa: E731
    assert told(ours) == told(theirs)


@LOOKAHEAD
def test_a_frame_by_itself_is_ddim(lookahead):
    """A denoiser that looks at frames one by one: each frame after the base clip is a plain DDIM walk of the noise that
    entered for it, in closed form."""
    queues = []
    look = lambda *args: queues.append(args[3])  # noqa: E731
    x = run(Frames(LEVELS), LEVELS, frames=20, callback=look, lookahead=lookahead, eta=0.0)
    for k in range(4, 20):
        expected = queues[k - 4][-1].double()  # of N(0.3, 0.5^2): of x_t - alpha_t mean only the scale changes
        for (_, a, s), (_, a2, s2) in zip(LEVELS, LEVELS[1:]):
            expected = 0.3 * a2 + (a2 * a * 0.25 + s2 * s) / (a**2 * 0.25 + s**2) * (expected - a * 0.3)
        assert maxdiff(x[k].double(), expected) < 2e-6


@LOOKAHEAD
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("walk", WALKS)
def test_a_gaussian_prior_is_sampled(lookahead, eta, walk):
    x = fifo(Frames(WALKS[walk]), randn(30, 4, 6, 6), WALKS[walk], 4, ["0.7"] * 30, FifoSettings(lookahead, eta), rng())
    assert abs(x.mean().item() - 0.7) < 0.03 and 0.3 < x.std().item() < 0.6


def test_eta_is_ddims():
    """One frame a window, one turn: diffusers' DDIM steps with their noise given. (Not at the tail, where it takes the
    square root of a rounded zero.)"""
    ddim = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample",
                         clip_sample=False)  # fmt: skip
    ddim.set_timesteps(10)
    levels = S.diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist())
    queues = []
    settings = FifoSettings(lookahead=False, eta=1.0)
    denoiser = Frames(levels)
    fifo(denoiser, randn(3, 2, 3, 3), levels, 1, ["0.3"] * 3, settings, rng(1), lambda *args: queues.append(args[3]))
    generator = rng(1)
    torch.randn(10, 2, 3, 3, generator=generator)  # the queue's first noise
    fresh = [torch.randn(n, 2, 3, 3, generator=generator) for n in (10, 1, 10, 1)][2]  # of the second turn
    for place in range(1, 9):
        t, frame = ddim.timesteps[9 - place], queues[0][place]
        x0 = denoiser(frame[None, None], t.item(), ["0.3"])[0, 0]
        moved = ddim.step(x0, t, frame, eta=1.0, variance_noise=fresh[place], return_dict=False)[0]
        assert maxdiff(queues[1][place - 1], moved) < 1e-5


@LOOKAHEAD
@pytest.mark.parametrize("steps, size", [(13, 13), (50, 13), (52, 13), (49, 13), (50, 24), (50, 21), (7, 3), (5, 1)])
def test_windows_cover_the_queue_behind_their_context(lookahead, steps, size):
    context, windows = queue_windows(steps, size, FifoSettings(lookahead))
    kept = set().union(*(range(w.start + context, w.stop) for w in windows))
    assert kept == set(range(context, context + steps)) and windows[0].start == 0
    assert len(windows) == -(-steps // (size - context))


def test_costs():
    """Of CogVideoX's 49 latent frames, by hand: (steps - 13 + 49) turns of 4 (or 3, 5; lookahead: twice) windows, and
    the base clip. Gen-L-Video's are 500."""
    for steps, with_, without in [(50, 738, 394), (52, 756, 404), (39, 489, 264), (65, 1075, 570)]:
        turns = count_turns(steps, 13, 49)
        assert count_evaluations(steps, 13, turns, FifoSettings()) == with_
        assert count_evaluations(steps, 13, turns, FifoSettings(lookahead=False)) == without


def test_what_windows_are_told():
    """Timesteps: the context's the lowest, the tail's the first; prompts: of a window's middle frame, clamped."""
    prompts = [str(k) for k in range(9)]
    model, shown = Frames(LEVELS), []
    run(model, LEVELS, prompts=prompts, callback=lambda *args: shown.append(args))
    turns = [call for call in model.seen if len(call[0]) > 1]
    assert len(turns) == len(shown) == 9 + 9  # 13 steps - 4, and 9 frames
    context, windows = queue_windows(13, 4, FifoSettings())
    steps = [12] * context + list(range(12, -1, -1))
    for turn, (noisy, t, texts) in enumerate(turns):
        assert t.tolist() == [[LEVELS[step].t for step in steps[w]] for w in windows]
        frames = [turn - 9 - context + w.start + 2 for w in windows]
        assert texts == [str(min(max(k, 0), 8)) for k in frames]
        if turn:
            queue = shown[turn - 1][3]
            assert torch.equal(noisy, torch.stack([queue[w] for w in windows]))
    assert {t for _, t, *_ in shown} == {LEVELS[-2].t}


@LOOKAHEAD
def test_a_stopped_run_goes_on(lookahead):
    """From any turn's callback, bit for bit; the callback's tensors are nobody else's; the arguments stay."""
    settings, prompts, noise = FifoSettings(lookahead, eta=1.0), [str(0.1 * k) for k in range(9)], randn(9, 2, 3, 3)
    args, kept = (LEVELS, 4, prompts, settings), []
    generator = rng(1)

    def callback(turn, t, x0, latents):
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
    with pytest.raises(ValueError, match="at least 14 steps"):
        run(Frames(LEVELS), LEVELS, frames=20, size=14)
    with pytest.raises(ValueError, match="9 latent frames but 3 prompts"):
        run(Frames(LEVELS), LEVELS, prompts=["0", "0", "0"])
    with pytest.raises(ValueError, match="eta"):
        FifoSettings(eta=1.5)


# ----------------------------------------------------------------------------------------------------------------------
# A timestep for every frame: the contract


def test_conversions_know_a_level_for_every_frame():
    at = {level.t: level for level in LEVELS}
    t = torch.tensor([[999, 916, 833], [3, 86, 916]], dtype=torch.float64)
    level = stack_levels([[at[x] for x in row] for row in t.tolist()], torch.device("cpu"))
    output, x = randn(2, 3, 4, 2, 2, seed=1), randn(2, 3, 4, 2, 2, seed=2)
    assert torch.equal(level.t, t) and level.alpha.shape == (2, 3, 1, 1, 1)
    for prediction in ("v_prediction", "flow", "epsilon"):
        if prediction == "epsilon":
            with pytest.raises(ValueError, match="zero SNR"):
                S.to_x0(output, x, level, prediction)
            level = S.Level(*(part[:, 1:] for part in level))
            t, output, x = t[:, 1:], output[:, 1:], x[:, 1:]
        got = S.to_x0(output, x, level, prediction)
        for b, f in torch.cartesian_prod(torch.arange(2), torch.arange(t.shape[1])).tolist():
            one = S.to_x0(output[b, f], x[b, f], at[t[b, f].item()], prediction)
            assert torch.equal(got[b, f], one)


def test_a_model_with_one_timestep_says_so():
    backbone = VideoCrafter2.__new__(VideoCrafter2)
    with pytest.raises(ValueError, match="VideoCrafter2 takes one timestep a window, not one for each of its frames"):
        backbone.predict_x0(randn(1, 2, 1, 1, 1), torch.zeros(1, 2), [""])


# ----------------------------------------------------------------------------------------------------------------------
# A timestep for every frame: the models, with random weights


def random_weights(model):
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)
    return model.requires_grad_(False)


def cogvideox(rotary=False):
    model = random_weights(CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=6,
        num_layers=2, sample_width=4, sample_height=2, sample_frames=17, max_text_seq_length=3,
        use_rotary_positional_embeddings=rotary,
    ))  # fmt: skip
    backbone = CogVideoX.__new__(CogVideoX)
    backbone.pipe = SimpleNamespace(transformer=model)
    if rotary:
        backbone.rotary = (randn(10, 16, seed=7), randn(10, 16, seed=8))
    return backbone, (randn(2, 3, 6, seed=5),)


def opensora_plan():
    model = random_weights(OpenSoraT2V_v1_3(
        num_layers=4, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, caption_channels=6,
        sparse_n=2,
    ))  # fmt: skip
    backbone = OpenSoraPlan.__new__(OpenSoraPlan)
    backbone.pipe = SimpleNamespace(transformer=model)
    return backbone, (randn(2, 3, 6, seed=5), torch.ones(2, 3, dtype=torch.bool))


def wan():
    model = random_weights(WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=6, freq_dim=8, ffn_dim=16,
        num_layers=2,
    ))  # fmt: skip
    backbone = Wan.__new__(Wan)
    backbone.pipe = SimpleNamespace(transformer=model)
    return backbone, (randn(2, 3, 6, seed=5),)


MODELS = {"sincos": cogvideox, "rotary": lambda: cogvideox(True), "opensora-plan": opensora_plan, "wan": wan}
T = torch.tensor([[19.0, 259, 499, 739, 999], [119, 359, 599, 839, 979]])


@pytest.fixture(params=MODELS)
def model(request):
    """call(t), with its transformer."""
    backbone, text = MODELS[request.param]()
    call = lambda t: backbone.denoise(randn(2, 5, 4, 2, 4), t, *text)  # noqa: E731
    call.transformer = backbone.pipe.transformer
    if isinstance(backbone, CogVideoX):
        plain = call(T[:, 2])
        take_frame_timesteps(call.transformer)
        assert torch.equal(plain, call(T[:, 2]))  # one timestep: the model that it was
    return call


def test_equal_timesteps_are_one(model):
    plain = model(T[:, 2])
    assert maxdiff(model(T[:, 2:3].repeat(1, 5)), plain) < 1e-6 * max(1, plain.abs().max().item())


def test_a_frame_alone_is_the_model_at_its_timestep(model):
    """With self-attention that looks at nothing, exactly so."""
    for block in getattr(model.transformer, "transformer_blocks", None) or model.transformer.blocks:
        block.attn1.to_out[0].weight.zero_()  # the bias stays, for the gates
    out = model(T)
    for frame in range(5):
        expected = model(T[:, frame])[:, frame]
        assert maxdiff(out[:, frame], expected) < 1e-6 * max(1, expected.abs().max().item())


def test_every_frame_has_its_own(model):
    """A frame's timestep moves its own output most, and other rows of the batch not at all."""
    out = model(T)
    for frame in range(5):
        changed = T.clone()
        changed[0, frame] -= 15
        moved = (model(changed) - out).abs().amax((2, 3, 4))
        assert moved[0].argmax() == frame and moved[1].max() < 1e-5 < moved[0, frame]


def test_a_cogvideox_norm_by_hand():
    """Each frame's tokens by the shift, scale and gate of its own timestep, the text's by the middle frame's."""
    norm = random_weights(CogVideoXLayerNormZero(8, 6))
    video, text, temb = randn(2, 15, 6), randn(2, 3, 6, seed=1), randn(2, 5, 8, seed=2)
    modulation = norm.linear(temb / (1 + (-temb).exp()))  # 2 x 5 x 36
    shift, scale, gate = (part.repeat_interleave(3, 1) for part in modulation[..., :18].chunk(3, -1))
    text_shift, text_scale, text_gate = modulation[:, 2:3, 18:].chunk(3, -1)
    expected = norm.norm(video) * (1 + scale) + shift, norm.norm(text) * (1 + text_scale) + text_shift, gate, text_gate
    norm.__class__ = FrameLayerNormZero
    for got, wanted in zip(norm(video, text, temb.flatten(0, 1)), expected, strict=True):
        assert got.shape == wanted.shape and maxdiff(got, wanted) < 1e-6


@pytest.mark.parametrize("pipeline_folder", ["rotary"], indirect=True)
def test_predictions_with_guidance_in_batches_and_under_offload(pipeline_folder, offload):  # noqa: F811
    backbone = CogVideoX(pipeline_folder, offload=offload)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    levels = backbone.levels(5)
    t = torch.tensor([[x.t for x in levels[:5]], [x.t for x in levels[4::-1]]], dtype=torch.float64)
    x, prompts = randn(2, 5, 4, 2, 4), [PROMPT, "it runs"]
    whole = backbone.predict_x0(x, t, prompts)
    assert maxdiff(whole, in_batches(backbone.predict_x0, 1)(x, t, prompts)) < 1e-5
    same = backbone.predict_x0(x, torch.full((2, 5), 599), prompts)
    assert maxdiff(same, backbone.predict_x0(x, 599, prompts)) < 1e-5 and maxdiff(same, whole) > 1e-2
    plain = CogVideoX(pipeline_folder)
    plain.encode(prompts)
    plain.load()
    plain.levels(5)
    assert torch.equal(whole, plain.predict_x0(x, t, prompts))


@pytest.mark.parametrize("pipeline_folder", ["rotary"], indirect=True)
def test_a_run_stays_on_the_device(pipeline_folder):
    backbone, devices = CogVideoX(pipeline_folder, "meta", torch.float16), set()
    with meta_as_gpu():
        backbone.encode([PROMPT])
        backbone.load()
        look = lambda turn, t, x0, queue: devices.update((x0.device.type, queue.device.type))  # noqa: E731
        args = (backbone.levels(6), 5, [PROMPT] * 9, FifoSettings(eta=1.0), rng(), look)
        x = fifo(in_batches(backbone.predict_x0, 2), torch.zeros(9, 4, 2, 4, device="meta"), *args)
    assert devices == {"meta"} and x.shape == (9, 4, 2, 4) and x.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# The command line


def test_demo_end_to_end(base, tmp_path, capsys):
    """Beside another method, with previews and a trace; stopped in a turn, it goes on bit for bit."""
    words = [*base, "--num_inference_steps", 6, "--compare", "fifo", "gen-l-video", "--save_latents"]
    call(*words, "--trace", tmp_path / "trace.safetensors", "--preview", 7)
    captured = capsys.readouterr()
    assert "fifo: 26 model evaluations (windows), in 10 turns of its queue" in captured.out and "26/26" in captured.err
    whole = read_tensors(tmp_path / "video.safetensors", "latents")[0]
    traces = read_tensors(tmp_path / "trace.safetensors", "trace")[0]
    assert traces["fifo"].shape == (10, 9, 64) and traces["gen-l-video"].shape == (6, 9, 64)
    small = torch.nn.functional.adaptive_avg_pool2d(whole["fifo"], 4).flatten(1)
    assert maxdiff(traces["fifo"][-1], small) < 1e-6

    def stop(method, step, x0):
        if step == 6:
            raise KeyboardInterrupt

    plan = demo.make_plan(demo.make_parser().parse_args([str(word) for word in words]))
    backbone = demo.load(demo.make_parser().parse_args(base), plan.recipe, plan.device, plan.dtype)
    backbone.encode(plan.prompts)
    backbone.load()
    with pytest.raises(KeyboardInterrupt):
        demo.sample(plan, backbone, demo.State(plan.about()), tmp_path / "state.safetensors", look=stop)
    state = demo.State.read(tmp_path / "state.safetensors", plan.about())
    resumed = demo.sample(plan, backbone, state)
    assert state.trace["fifo"][6].shape == (9, 64) and all(torch.equal(resumed[k], whole[k]) for k in whole)
    assert "| 20/26" in capsys.readouterr().err


def test_the_plan_knows_what_cannot_be(base, capsys):
    def refused(*words):
        with pytest.raises(SystemExit):
            call(*words, "--plan")
        return capsys.readouterr().err

    assert "must hold a window; take at least 5 steps" in refused(*base, "--method", "fifo")
    assert "fifo needs a model that takes" in refused("--backbone", "videocrafter2", "--method", "fifo")
    assert "neither another --method" in refused("--method", "fifo", "--ablate", "stage-1")
    call("--method", "fifo", "--num_frames", 193, "--plan")
    out = capsys.readouterr().out
    assert "269 model evaluations (windows), in 61 turns" in out and "event 2, latent frames 13 to 24" in out
    assert "stage 2" not in out and "stride" not in out
