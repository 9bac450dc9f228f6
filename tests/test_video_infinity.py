"""Video-Infinity against the official wrappers (tests/data), a naive version and the U-Net."""

import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import imageio.v3 as iio
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import TemporalConvLayer
from helpers import call, make_tokenizer, maxdiff, needs_fork, randn, randomize, rng, run_processes
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

import syncos as S
from extras.baselines import Plan
from extras.baselines import video_infinity as vi
from extras.baselines.video_infinity import VideoInfinity, linked_clips, shared_frames
from extras.methods import METHODS
from extras.models import RECIPES, videocrafter2
from extras.models.videocrafter2 import VideoCrafter2


def read(name):
    with safe_open(Path(__file__).parent / "data" / name, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


NETWORK, OFFICIAL = read("vc2_tiny.safetensors"), read("video_infinity_tiny.safetensors")
CASES = json.loads(OFFICIAL[1]["cases"])
T = {"layout": 900.0, "detail": 500.0}
BY_T = pytest.mark.parametrize("t", T.values(), ids=T)


@pytest.fixture(scope="module")
def unet():
    """The network of both files. Video-Infinity's outputs lack the frame rate's embedding."""
    state = {key.removeprefix("sd."): value.float() for key, value in NETWORK[0].items() if key.startswith("sd.")}
    with mock.patch.dict(videocrafter2.RELEASE, unet=json.loads(NETWORK[1]["config"])):
        unet, state = videocrafter2.build_unet(state)
    unet.load_state_dict(state)
    del unet.fps_embedding
    return unet.requires_grad_(False).eval()


@pytest.fixture
def no_zero_keys(monkeypatch):
    """Unlike in the official code, keys beyond the video's ends do not count in the softmax."""
    attention = vi.scaled_dot_product_attention

    def masked(q, k, v, bias):
        return attention(q, k, v, bias.where((k != 0).any(-1)[:, :, None], -torch.inf))

    monkeypatch.setattr(vi, "scaled_dot_product_attention", masked)


def inputs(clips, frames, halves=2, seed=0):
    """Rows (half, clip): B n C f H W, B n L D."""
    return randn(halves * clips, 4, frames, 8, 8, seed=seed), randn(halves * clips, 7, 24, seed=seed + 1)


def run(unet, x, t, text, clips=None, events=1, **settings):
    if clips is None:
        return unet(x, t, text).sample
    with linked_clips(unet, clips, VideoInfinity(**settings), events):
        return unet(x, t, text).sample


def as_one(x, clips):
    """(B n) C f H W -> B C (n f) H W."""
    return x.unflatten(0, (-1, clips)).transpose(1, 2).flatten(2, 3)


# --------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_the_official_wrappers(unet, case):
    c, clips = CASES[case], int(OFFICIAL[1]["clips"])
    x, text, expected = (OFFICIAL[0][f"{case}.{name}"].flatten(0, 1) for name in ("x", "context", "output"))
    settings = dict(near=c["local"], shared=c["shared"], whole=c["sync"])
    assert maxdiff(run(unet, x, c["t"], text, clips, **settings), expected) < 2e-5
    assert maxdiff(run(unet, x, torch.full((len(x),), c["t"]), text, clips, **settings), expected) < 2e-5
    assert maxdiff(run(unet, x, c["t"], text), expected) > 1


def naive(unet, x, t, text, clips, near, shared, bias, t_layout):
    """Frame by frame and key by key, on top of diffusers' own layers. Returns what `run` does."""
    f = x.shape[2]
    each = shared // clips
    G = [n * f + k * max(f // each, 1) for n in range(clips) for k in range(f) if each and k * max(f // each, 1) < f]
    G = (G or [n * f for n in range(clips)])[:shared]

    def attend(attn, x, **_):  # (B n HW) f D
        x = x.unflatten(0, (2, clips, -1)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # B HW F D
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in (attn.to_q(x), attn.to_k(x), attn.to_v(x)))
        out = torch.zeros_like(q)  # B HW F h d
        for a in range(clips * f):
            keys, values, extra = [], [], []
            for j, local in [(j, True) for j in range(a - near, a + near + 1)] + [(j, False) for j in G]:
                inside = 0 <= j < clips * f
                keys.append(k[:, :, j] if inside else torch.zeros_like(k[:, :, 0]))
                values.append(v[:, :, j] if inside else torch.zeros_like(v[:, :, 0]))
                extra.append(bias * (local == (t < t_layout)))
            logits = torch.stack([(q[:, :, a] * key).sum(-1) for key in keys], -1) / q.shape[-1] ** 0.5  # B HW h K
            weights = (logits + torch.tensor(extra)).softmax(-1)
            out[:, :, a] = sum(w[..., None] * value for w, value in zip(weights.unbind(-1), values))
        out = out.flatten(-2).unflatten(2, (clips, f)).permute(0, 2, 1, 3, 4).flatten(0, 2)
        return attn.to_out[0](out)

    def convolve(forward):
        def wrapped(x, num_frames):
            video = torch.nn.functional.pad(x.unflatten(0, (2, clips * f)), (0, 0) * 3 + (4, 4))  # B 4+F+4 C H W
            clip = lambda b, n: forward(video[b, n * f : n * f + f + 8], num_frames=f + 8)[4:-4]  # noqa: E731
            return torch.cat([clip(b, n) for b in range(2) for n in range(clips)])

        return wrapped

    with ExitStack() as changes:
        for name, layer in unet.named_modules():
            if name.endswith((".attn1", ".attn2")) and ("transformer_in" in name or "temp_attentions" in name):
                changes.enter_context(mock.patch.object(layer, "processor", attend))
            if isinstance(layer, TemporalConvLayer):
                changes.enter_context(mock.patch.object(layer, "forward", convolve(layer.forward)))
        return unet(x, t, text).sample


@BY_T
@pytest.mark.parametrize("clips, frames, near, shared, bias, t_layout", [
    (2, 6, 2, 4, 10.0, 800), (3, 4, 7, 5, 1.0, 800), (1, 6, 2, 4, 10.0, 800), (1, 3, 8, 2, 0.5, 500),
    (4, 3, 1, 3, 2.0, 501), (2, 5, 0, 2, 3.0, 900), (5, 2, 3, 16, 1.0, 950), (2, 4, 2, 0, 1.0, 850),
    (6, 1, 4, 12, 1.0, 800),
])  # fmt: skip
def test_it_is_the_naive_one(unet, clips, frames, near, shared, bias, t_layout, t):
    """Also with no context or a long one, few shared frames or none, and t at the switch."""
    settings = dict(near=near, shared=shared, bias=bias, t_layout=t_layout)
    x, text = inputs(clips, frames)
    expected = naive(unet, x, t, text, clips, **settings)
    assert maxdiff(run(unet, x, t, text, clips, **settings), expected) < 2e-5
    other = settings | dict(t_layout=1000 if t >= t_layout else 0)
    if shared:
        assert maxdiff(run(unet, x, t, text, clips, **other), expected) > 1e-3


def test_shared_frames_by_hand():
    """24 frames per clip, 16 shared: the frames of each clip."""
    for clips, expected in {
        1: [range(16)],
        2: [range(0, 24, 3)] * 2,
        3: [range(0, 24, 4)] * 2 + [range(0, 16, 4)],
        4: [[0, 6, 12, 18]] * 4,
        6: [[0, 12]] * 6,
        8: [[0, 12]] * 8,
        16: [[0]] * 16,
        20: [[0]] * 16 + [[]] * 4,
    }.items():
        frames = [24 * n + k for n, of_clip in enumerate(expected) for k in of_clip]
        assert shared_frames(clips, 24, 16)[:16] == frames
    assert shared_frames(4, 16, 16) == [16 * n + k for n in range(4) for k in (0, 4, 8, 12)]


@pytest.mark.parametrize("events, T", [(1, 800), (2, 850)])
def test_the_switch_is_higher_with_several_prompts(unet, events, T):
    x, text = inputs(2, 4)
    for t in (T - 1.0, T + 0.0):
        outputs = {other: run(unet, x, t, text, 2, events, t_layout=other) for other in (None, 0, 1000)}
        assert torch.equal(outputs[None], outputs[0 if t >= T else 1000])
        assert maxdiff(outputs[0], outputs[1000]) > 0.1


# --------------------------------------------------------------------------------------------------
# Against the plain U-Net


def test_the_whole_video_in_sight_is_the_plain_unet(unet, no_zero_keys):
    """The paper's model, when every frame sees all others, each once."""
    x, _ = inputs(3, 4)
    one = randn(2, 7, 24)
    text = one.repeat_interleave(3, 0)  # the plain U-Net has one prompt
    long = unet(as_one(x, 3), 500.0, one).sample
    settings = dict(near=11, shared=0, whole=True)
    assert maxdiff(as_one(run(unet, x, 500.0, text, 3, **settings), 3), long) < 2e-5
    shorter, released = (settings | change for change in (dict(near=2), dict(whole=False)))
    assert all(maxdiff(as_one(run(unet, x, 500.0, text, 3, **s), 3), long) > 0.1 for s in (shorter, released))


def test_all_frames_shared_are_the_plain_unet(unet, monkeypatch):
    monkeypatch.setattr(vi, "logit_bias", lambda f, p, g, *_: torch.tensor([-torch.inf, 0]).repeat_interleave(
        torch.tensor([f + 2 * p, g])).expand(f, -1))  # fmt: skip
    x, _ = inputs(3, 4)
    one = randn(2, 7, 24)
    got = run(unet, x, 900.0, one.repeat_interleave(3, 0), 3, shared=12, whole=True)
    assert maxdiff(as_one(got, 3), unet(as_one(x, 3), 900.0, one).sample) < 2e-5


def test_one_clip_without_context_is_the_plain_unet(unet, no_zero_keys, monkeypatch):
    x, text = inputs(1, 6)
    plain, settings = unet(x, 500.0, text).sample, dict(near=5, shared=0)
    assert maxdiff(run(unet, x, 500.0, text, 1, **settings), plain) > 0.1  # zeros around the convolutions
    monkeypatch.setattr(vi, "REACH", 0)
    assert maxdiff(run(unet, x, 500.0, text, 1, **settings), plain) < 2e-5


def test_clips_that_do_not_see_each_other_are_the_plain_batch(unet, monkeypatch):
    own = lambda f, p, *_: torch.full((f, p + f + p), -torch.inf).index_fill(1, torch.arange(p, p + f), 0)  # noqa: E731
    monkeypatch.setattr(vi, "logit_bias", own)
    monkeypatch.setattr(vi, "REACH", 0)
    x, text = inputs(3, 6)
    assert maxdiff(run(unet, x, 500.0, text, 3, near=4, shared=0), unet(x, 500.0, text).sample) < 2e-5


@pytest.mark.parametrize("whole", [False, True])
def test_everything_is_given_back(unet, whole):
    x, text = inputs(2, 4)
    hooks = lambda: [len(h) for m in unet.modules() for h in (m._forward_pre_hooks, m._forward_hooks)]  # noqa: E731
    plain, processors, before = unet(x, 500.0, text).sample, dict(unet.attn_processors), hooks()
    assert maxdiff(run(unet, x, 500.0, text, 2, whole=whole), plain) > 0.1
    with pytest.raises(ValueError, match="multiple"):  # in the middle of a call
        run(unet, x[:3], 500.0, text[:3], 2, whole=whole)
    with pytest.raises(KeyError), linked_clips(unet, 2, VideoInfinity(whole=whole)):
        assert hooks() != before
        raise KeyError
    assert dict(unet.attn_processors) == processors and hooks() == before
    assert torch.equal(unet(x, 500.0, text).sample, plain)


def test_halves_of_guidance_never_meet(unet):
    x, text = inputs(3, 4)
    both = run(unet, x, 500.0, text, 3)
    apart = [run(unet, *half, 3) for half in zip(x.chunk(2), [500.0] * 2, text.chunk(2))]
    assert maxdiff(both, torch.cat(apart)) < 2e-5


def test_how_far_a_clip_is_seen(unet):
    """At t < T a change of the last clip reaches its neighbour most, at t >= T all clips."""
    x, text = inputs(4, 4, halves=1)
    changed = torch.cat([x[:3], randn(1, 4, 4, 8, 8, seed=9)])
    runs = lambda t: (run(unet, y, t, text, 4, near=1, shared=4) for y in (x, changed))  # noqa: E731
    near, far = ([maxdiff(*pair) for pair in zip(*runs(t))] for t in (500.0, 900.0))
    assert near[0] < near[1] < near[2] < near[3] and near[0] < 0.2 < 0.5 < far[0]


def test_compiled_code_is_not_used(unet):
    """Code compiled with other hooks than the current ones was seen to give wrong results."""
    x, text = inputs(2, 4)
    expected = run(unet, x, 500.0, text, 2)
    unet.compile(backend=lambda *_: pytest.fail("compiled"))
    try:
        assert torch.equal(run(unet, x, 500.0, text, 2), expected)
    finally:
        unet._compiled_call_impl = None


# --------------------------------------------------------------------------------------------------
# The method

TEXTS = ("it runs", "it jumps", "it sleeps")


def plan_of(clips=4, texts=TEXTS[:2], steps=3, frames=None, **changes):
    recipe = replace(RECIPES["videocrafter2"], window=4, latent=(4, 8, 8), num_frames=frames or 4 * clips,
                     num_inference_steps=steps, **changes)  # fmt: skip
    return Plan(recipe, tuple(texts))


@pytest.fixture
def backbone(unet):
    """The adapter with this network, and random embeddings."""
    backbone = VideoCrafter2("nowhere", guidance_scale=3.0)
    backbone.pipe = SimpleNamespace(transformer=unet)
    backbone.texts = {text: (randn(7, 24, seed=i),) for i, text in enumerate(["", *TEXTS])}
    backbone.levels(3)
    return backbone


def test_clips_events_and_counts(unet, backbone, monkeypatch):
    """One call per step, DDIM as Gen-L-Video's, clip n of N told event floor(n E / N) of E."""
    plan, noise, calls, counted = plan_of(4, TEXTS), randn(16, 4, 8, 8), [], []
    predict = backbone.predict_x0
    backbone.predict_x0 = lambda x, t, prompts: calls.append((len(x), t, prompts)) or predict(x, t, prompts)
    method = VideoInfinity(near=3, shared=8)
    latents = method.sample(backbone, plan, noise, rng(), done=counted.append)
    assert calls == [(4, level.t, [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[2]]) for level in plan.levels[:-1]]
    assert counted == [4] * 3 and method.evaluations(plan, method.steps(plan)) == 12

    windows, ddim = [slice(i, i + 4) for i in range(0, 16, 4)], S.Settings(**S.GEN_L_VIDEO)
    with linked_clips(unet, 4, method, 3):
        expected = S.syncos(predict, noise, plan.levels, windows, calls[0][2], ddim, rng(), at_once=4)
    assert torch.equal(latents, expected)


def test_a_stopped_run_resumes(backbone):
    plan, noise, kept = plan_of(), randn(16, 4, 8, 8), []
    method = VideoInfinity(near=3, shared=8)
    callback = lambda step, t, x0, x: kept.append((step, t, x0.clone(), x.clone()))  # noqa: E731
    whole = method.sample(backbone, plan, noise, rng(), callback)
    assert [(step, t) for step, t, *_ in kept] == [(i, level.t) for i, level in enumerate(plan.levels[:-1])]
    for step, _, x0, x in kept:
        assert torch.equal(method.sample(backbone, plan, x, rng(), start=step + 1, x0=x0), whole)


@needs_fork
@pytest.mark.parametrize("clips, world, shared", [(4, 2, 8), (4, 4, 8), (3, 3, 2), (6, 2, 16)])
def test_processes_share_the_clips(unet, backbone, tmp_path, clips, world, shared):
    plan, noise, method = plan_of(clips), randn(4 * clips, 4, 8, 8), VideoInfinity(near=3, shared=shared)
    whole = method.sample(backbone, plan, noise, rng())
    x, text = inputs(clips, 4)
    outputs = {t: run(unet, x, t, text, clips, near=3, shared=shared) for t in T.values()}

    def work(rank):
        seen, counted, predict, n = [], [], backbone.predict_x0, clips // world
        own = lambda y: y.unflatten(0, (2, world, n))[:, rank].flatten(0, 1)  # noqa: E731
        for t, output in outputs.items():
            assert maxdiff(run(unet, own(x), t, own(text), n, near=3, shared=shared), own(output)) < 1e-5
        backbone.predict_x0 = lambda x, *args: seen.append(len(x)) or predict(x, *args)
        method.check(plan)
        with pytest.raises(ValueError, match="one process only"):
            replace(method, whole=True).check(plan)
        with pytest.raises(ValueError, match="do not fit"):
            method.check(plan_of(world + 1))
        with pytest.raises(ValueError, match="at least 17 frames"):
            replace(method, near=17).check(plan_of(world))
        latents = method.sample(backbone, plan, noise, rng(), done=counted.append)
        assert seen == [n] * 3 and counted == [clips] * 3
        torch.save(latents, tmp_path / f"{rank}.pt")

    assert run_processes(work, world, tmp_path) == [0] * world
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert all(torch.equal(results[0], result) for result in results)
    assert maxdiff(results[0], whole) < 1e-5 * whole.abs().max()


@needs_fork
def test_a_process_that_dies_ends_the_others(tmp_path):
    def work(rank):
        if rank == 1:
            os._exit(7)
        with pytest.raises(ConnectionError, match="Another process has stopped"):
            vi.exchange(torch.zeros(1, 4, 1), 2)

    assert run_processes(work, 2, tmp_path) == [0, 7]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="--num_frames 12 or 16, not 14"):
        VideoInfinity().check(plan_of(frames=14))
    with pytest.raises(ValueError, match="3 events do not fit into 2 clips"):
        VideoInfinity().check(plan_of(2, TEXTS, stride=1))
    for name in RECIPES.keys() - {"videocrafter2", "tiny-unet"}:
        with pytest.raises(ValueError, match="only videocrafter2 and tiny-unet"):
            VideoInfinity().check(Plan(RECIPES[name], TEXTS[:1]))
    for name in ("videocrafter2", "tiny-unet"):
        VideoInfinity().check(Plan(RECIPES[name], TEXTS))


def test_demo_end_to_end(unet, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out.mp4"
    text = CLIPTextConfig(vocab_size=16, hidden_size=24, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=2, eos_token_id=1)  # fmt: skip
    vae = dict(videocrafter2.RELEASE["vae"], block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4)
    parts = dict(unet=unet, vae=randomize(AutoencoderKL(**vae)), text_encoder=randomize(CLIPTextModel(text)))
    for folder, part in (parts | dict(tokenizer=make_tokenizer())).items():
        part.save_pretrained(model / folder)
    words = f"--backbone videocrafter2 --model {model} --device cpu --height 64 --width 64 --window_frames 4"
    words += f" --num_frames 16 --num_inference_steps 2 --csd_iters 1 --output_path {out}"
    methods = ("gen-l-video", "video-infinity", "syncos")
    call(*words.split(), "--prompt", "it runs | it jumps", "--compare", *methods)
    assert len(list(iio.imiter(out))) == 16 and METHODS["video-infinity"](None) == VideoInfinity()
