"""The Wan 2.1 adapter against diffusers' own pipeline, on random weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from conftest import make_tokenizer
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from test_demo import call, frames_of
from test_long_runs import run_processes
from transformers import UMT5Config, UMT5EncoderModel

import backbones.wan
import demo
import videos
from backbones import RECIPES, Wan, get_recipe
from syncos import METHODS, Settings, csd_refine, make_windows, syncos

PROMPT = "a red fox . it jumps"
C, F, H, W = 4, 5, 4, 6  # of a window: 17 frames of 32 x 48


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maxdiff(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder laid out like the release, as WanPipeline.save_pretrained writes it."""
    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(
            base_dim=8,
            z_dim=C,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.7, 1.0],
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=C,
            out_channels=C,
            text_dim=16,
            freq_dim=8,
            ffn_dim=16,
            num_layers=2,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    for model in (pipe.transformer, pipe.text_encoder):
        for p in model.parameters():  # no parameter at its default: biases and gates count too
            torch.nn.init.normal_(p, std=0.15)
    path = tmp_path_factory.mktemp("wan")
    pipe.save_pretrained(path)
    return str(path)


@pytest.fixture
def pipe(folder):
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def backbone(folder):
    backbone = Wan(folder, guidance_scale=5.0)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    return backbone


# ----------------------------------------------------------------------------------------------------------------------
# The model and its walk


@pytest.mark.parametrize("steps, guidance", [(1, 5.0), (10, 5.0), (10, 1.0)])
def test_one_window_is_the_pipeline(backbone, pipe, steps, guidance):
    """With one window and stage 2 off, adapter and loop are WanPipeline by Euler's steps, latents and frames."""
    noise = randn(F, C, H, W)
    backbone.guidance_scale = guidance
    levels = backbone.levels(steps)
    settings = Settings(stride=F, **METHODS["gen-l-video"])
    got = syncos(backbone.predict_x0, noise, levels, [slice(0, F)], [PROMPT], settings, torch.Generator())

    args = dict(num_inference_steps=steps, guidance_scale=guidance, height=8 * H, width=8 * W, num_frames=4 * F - 3)
    args |= dict(negative_prompt=Wan.negative_prompt, latents=noise.transpose(0, 1)[None])
    expected = pipe(PROMPT, output_type="latent", **args).frames[0].transpose(0, 1)
    assert maxdiff(got, expected) < 1e-5

    frames = pipe(PROMPT, output_type="np", **args).frames[0]
    ours = np.stack(list(backbone.decode(got)))
    assert ours.shape == (17, 32, 48, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255 - frames).max() < 0.5 / 255 + 1e-5


def test_the_walk_starts_at_pure_noise_where_stage_2_does_nothing(backbone):
    recipe = RECIPES["wan"]
    levels = backbone.levels(50)
    assert levels == Wan.make_levels(recipe.scheduler, 50) and len(levels) == 51
    assert levels[0] == (1000, 0, 1) and levels[-1] == (-1, 1, 0)
    assert all(a.t > b.t and a.alpha < b.alpha and a.alpha + a.sigma == 1 for a, b in zip(levels, levels[1:]))

    x, windows = randn(9, C, H, W), make_windows(9, F, 2)
    refine = lambda step: csd_refine(  # noqa: E731
        backbone.predict_x0, x, levels[step : step + 1], randn(9, C, H, W, seed=1), windows,
        [PROMPT] * len(windows), torch.Generator().manual_seed(0), iters=1,
    )  # fmt: skip
    assert torch.equal(refine(0), x) and maxdiff(refine(1), x) > 0.1
    assert maxdiff(backbone.predict_x0(x[None, :F], 1000, [PROMPT]), x[None, :F]) > 0.1  # stage 1 does run there


def test_t_min_is_the_noise_level_of_the_paper():
    """t_min is where alpha / sigma is that of the paper's 800 on CogVideoX-2B, and as many steps of 50 lie above it."""
    wan, cogvideox = RECIPES["wan"], RECIPES["cogvideox"]
    walks = [r.backbone.make_levels(r.scheduler, 50) for r in (wan, cogvideox)]
    above = [[x for x in walk[:-1] if x.t > r.settings.t_min] for walk, r in zip(walks, (wan, cogvideox))]
    assert [len(levels) for levels in above] == [10, 10] and walks[1][10].t == 799
    sigma = wan.settings.t_min / 1000
    assert (1 - sigma) / sigma == pytest.approx(walks[1][10].alpha / walks[1][10].sigma, rel=0.03)


def test_plan_shows_the_noise_level(capsys):
    """A wrong t_min for a model is seen before the run; neither hub nor GPU are needed."""
    call("--backbone", "wan", "--plan")
    out = capsys.readouterr().out
    assert "321 frames at 16 fps = 81 latent frames: 11 windows of 21, stride 6" in out
    assert "stage 2 above t = 930, in 9 of them, down to alpha/sigma = 0.075" in out
    assert "syncos: 1270 model evaluations" in out  # 50 x 11 + 9 x 20 x 4
    call("--backbone", "wan", "--plan", "--t_min", "800")
    assert "in 21 of them, down to alpha/sigma = 0.25" in capsys.readouterr().out


def test_sizes():
    recipe = Wan.resize(RECIPES["wan"], 720, 1280, 49)
    assert recipe.window == 13 and recipe.latent == (16, 90, 160)
    with pytest.raises(ValueError, match="multiples of 16, got 480 and 840"):
        Wan.resize(recipe, 480, 840, 81)
    with pytest.raises(ValueError, match=r"4 n \+ 1, got 80"):
        Wan.resize(recipe, 480, 832, 80)


def test_wan_2_2_is_refused_before_weights(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded"))
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    index = json.loads(path.read_text())
    assert get_recipe("wan", str(tmp_path / "model")).latent == (C, 60, 104)
    for change, message in [
        (dict(expand_timesteps=True), "is a Wan 2.2 TI2V"),
        (dict(transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875), "is a Wan 2.2 A14B"),
        (dict(_class_name="WanImageToVideoPipeline"), "is a WanImageToVideoPipeline"),
    ]:
        path.write_text(json.dumps(index | change))
        with pytest.raises(SystemExit) as exit:
            call("--backbone", "wan", "--model", tmp_path / "model", "--device", "cpu")
        error = capsys.readouterr().err
        assert exit.value.code == 2 and error.count("\n") == 1 and message in error and "Wan 2.1" in error
    path.unlink()
    with pytest.raises(ValueError, match="is no Wan pipeline"):
        get_recipe("wan", str(tmp_path / "model"))


def test_a_pipeline_saved_with_eulers_scheduler(folder, pipe, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "model" / "scheduler")
    assert Wan(str(tmp_path / "model")).levels(9) == Wan(folder).levels(9)


def test_half_precision_model_float32_vae(folder, backbone):
    half = Wan(folder, dtype=torch.bfloat16, guidance_scale=5.0)
    half.encode([PROMPT])
    half.load()
    assert half.texts[PROMPT][0].dtype == half.pipe.transformer.proj_out.weight.dtype == torch.bfloat16
    assert half.pipe.transformer.scale_shift_table.dtype == half.pipe.vae.dtype == torch.float32
    x, t = randn(1, F, C, H, W), backbone.levels(4)[1].t
    half.levels(4)
    assert 0 < maxdiff(backbone.predict_x0(x, t, [PROMPT]), half.predict_x0(x, t, [PROMPT])) < 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Decoding

HOOKS = {  # what diffusers' offload puts on a model
    "none": lambda model: None,
    "model": lambda model: cpu_offload_with_hook(model, "cpu"),
    "sequential": lambda model: cpu_offload(model, torch.device("cpu"), offload_buffers=True),
}


@pytest.mark.parametrize("offload", HOOKS)
def test_streamed_decoding_equals_one_go(folder, pipe, monkeypatch, offload):
    """Bit for bit, before frames are rounded to bytes."""
    backbone = Wan(folder)
    backbone.load(decoder_only=True)
    HOOKS[offload](vae := backbone.pipe.vae)
    moved = []
    if offload == "model":
        move = vae._hf_hook.pre_forward
        monkeypatch.setattr(vae._hf_hook, "pre_forward", lambda model: moved.append(model) or move(model))
    monkeypatch.setattr(backbones.wan, "to_uint8", lambda video: video.clamp(-1, 1).permute(1, 2, 3, 0))
    config = pipe.vae.config
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    for frames in range(1, 10):
        latents = randn(frames, C, 2, 3, seed=frames)
        with torch.no_grad():
            whole = pipe.vae.decode((latents.transpose(0, 1) * std + mean)[None]).sample[0]
        streamed = torch.stack(list(backbone.decode(latents)))
        assert streamed.shape == (4 * (frames - 1) + 1, 16, 24, 3)
        assert torch.equal(streamed, whole.permute(1, 2, 3, 0))
    assert moved == [vae] * 9 * (offload == "model")


@pytest.mark.parametrize("offload", HOOKS)
def test_offload_changes_nothing(backbone, folder, offload):
    x, t = randn(2, F, C, H, W), backbone.levels(4)[1].t
    whole = backbone.predict_x0(x, t, [PROMPT, "it runs"])
    HOOKS[offload](backbone.pipe.transformer)
    assert torch.equal(whole, backbone.predict_x0(x, t, [PROMPT, "it runs"]))


def test_two_videos_can_be_decoded_in_turn_and_nothing_ahead(backbone):
    seen = []
    backbone.pipe.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2]))
    a, b = randn(7, C, H, W), randn(7, C, H, W, seed=1)
    alone = [list(backbone.decode(x)) for x in (a, b)]
    assert seen == [1] * 14
    together = zip(backbone.decode(a), backbone.decode(b))
    first = next(together)
    assert seen == [1] * 16  # one latent frame of each
    for x, column in zip(alone, zip(first, *together)):
        assert all(np.array_equal(p, q) for p, q in zip(x, column))


# ----------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.fixture
def base(folder, tmp_path):
    """Words that make a small run: 17 frames of 16 x 32, 5 latent frames, 2 windows of 3."""
    words = f"--backbone wan --model {folder} --device cpu --height 16 --width 32 --window_frames 9 --num_frames 17"
    words += f" --num_inference_steps 4 --stride 2 --csd_iters 2 --t_min 700 --output_path {tmp_path / 'video.mp4'}"
    return [*words.split(), "--prompt", "it runs | it jumps", "--global_prompt", "a red fox ."]


def test_demo_end_to_end(base, tmp_path, capsys, monkeypatch):
    """--compare, stopped and resumed, decoded again, and by two processes."""
    words = [*base, "--compare", "--save_latents"]
    call(*words)
    captured = capsys.readouterr()
    assert "gen-l-video: 8 model evaluations" in captured.out and "syncos: 12 model evaluations" in captured.out
    assert "12/12" in captured.err
    whole = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert whole["syncos"].shape == (5, C, 2, 4) and maxdiff(whole["syncos"], whole["gen-l-video"]) > 1e-2
    frames = frames_of(tmp_path / "video.mp4")
    assert len(frames) == 17

    predict, calls = Wan.predict_x0, iter(range(12))
    monkeypatch.setattr(Wan, "predict_x0", lambda *args: predict(*args) if next(calls, None) is not None else stop())
    with pytest.raises(SystemExit, match="--resume"):
        call(*words)
    monkeypatch.undo()
    call(*words, "--resume", tmp_path / "video.state.safetensors")
    resumed = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    call("--decode", tmp_path / "video.safetensors", "--device", "cpu", "--output_path", tmp_path / "again.mp4")
    assert np.array_equal(frames_of(tmp_path / "again.mp4"), frames)

    def work(rank):
        args = demo.make_parser().parse_args(words)
        plan = demo.make_plan(args)
        backbone = demo.load(args, plan.recipe, plan.device, plan.dtype)
        backbone.encode(plan.prompts)
        backbone.load()
        torch.save(demo.sample(plan, backbone, demo.State(plan.about())), tmp_path / f"{rank}.pt")

    assert run_processes(work, 2, tmp_path) == [0, 0]
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(shared[name], whole[name]) for name in whole)


def stop():
    raise KeyboardInterrupt
