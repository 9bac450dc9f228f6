"""The Wan 2.1 adapter against diffusers' own pipeline, on random weights."""

import json
import shutil

import accelerate
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from helpers import PROMPT, call, frames_of, maxdiff, randn, refusal, rng, stop_at_preview

import demo
from backbones import COGVIDEOX_2B
from extras.models import get_recipe, wan
from extras.models.wan import WAN, Wan
from extras.videos import read_tensors
from syncos import GEN_L_VIDEO, Settings, csd_refine, make_windows, syncos

C, F, H, W = 4, 5, 4, 6  # of a window: 17 frames of 32 x 48


@pytest.fixture
def pipe(wan_folder):
    pipe = WanPipeline.from_pretrained(wan_folder, dtype=torch.float32)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prepared(folder, **options):
    backbone = Wan(folder, guidance_scale=5.0, **options)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    return backbone


# --------------------------------------------------------------------------------------------------
# The model and its schedule


@pytest.mark.parametrize("steps, guidance", [(1, 5.0), (10, 5.0), (10, 1.0)])
@torch.no_grad()
def test_one_window_is_the_pipeline(wan_folder, pipe, steps, guidance):
    """With one window and stage 2 off, adapter and loop equal WanPipeline with Euler's steps."""
    noise, backbone = randn(F, C, H, W), prepared(wan_folder)
    backbone.guidance_scale = guidance
    levels, settings = backbone.levels(steps), Settings(**GEN_L_VIDEO)
    got = syncos(backbone.predict_x0, noise, levels, [slice(0, F)], [PROMPT], settings, rng())

    args = dict(num_inference_steps=steps, guidance_scale=guidance, height=8 * H, width=8 * W, num_frames=4 * F - 3)
    args |= dict(negative_prompt=Wan.negative_prompt, latents=noise.transpose(0, 1)[None])
    expected = pipe(PROMPT, output_type="latent", **args).frames[0].transpose(0, 1)
    assert maxdiff(got, expected) < 1e-5

    frames = pipe(PROMPT, output_type="np", **args).frames[0]
    ours = np.stack(list(backbone.decode(got)))
    assert ours.shape == (17, 32, 48, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255 - frames).max() < 0.5 / 255 + 1e-5


def test_sampling_starts_at_pure_noise_where_stage_2_does_nothing(wan_folder):
    backbone = prepared(wan_folder)
    levels = backbone.levels(50)
    assert levels == Wan.make_levels(WAN.scheduler, 50) and len(levels) == 51
    assert levels[0] == (1000, 0, 1) and levels[-1] == (-1, 1, 0)
    assert all(a.t > b.t and a.alpha < b.alpha and a.alpha + a.sigma == 1 for a, b in zip(levels, levels[1:]))

    x, noise, windows = randn(9, C, H, W), randn(9, C, H, W, seed=1), make_windows(9, F, 2)
    prompts = [PROMPT] * len(windows)
    refine = lambda i: csd_refine(backbone.predict_x0, x, levels[i : i + 1], noise, windows, prompts, rng(), iters=1)  # noqa: E731
    assert torch.equal(refine(0), x) and maxdiff(refine(1), x) > 0.1
    assert maxdiff(backbone.predict_x0(x[None, :F], 1000, [PROMPT]), x[None, :F]) > 0.1  # stage 1 does run there


def test_t_min_is_the_noise_level_of_the_paper():
    """t_min is where alpha / sigma is that of the paper's 800 on CogVideoX-2B, and as many of 50
    steps are above it."""
    ours, paper = (r.backbone.make_levels(r.scheduler, 50) for r in (WAN, COGVIDEOX_2B))
    assert [sum(level.t > t_min for level in x) for x, t_min in ((ours, WAN.settings.t_min), (paper, 800))] == [10, 10]
    sigma = WAN.settings.t_min / 1000
    assert paper[10].t == 799 and (1 - sigma) / sigma == pytest.approx(paper[10].alpha / paper[10].sigma, rel=0.03)


def test_plan_shows_the_noise_level(capsys):
    """A wrong t_min for a model shows before the run, which needs neither hub nor GPU."""
    call("--backbone", "wan", "--plan")
    out = capsys.readouterr().out
    assert "81 latent frames: 11 windows of 21" in out and "alpha/sigma = 0.075" in out
    assert "syncos: 1270 model evaluations" in out  # 50 x 11 + 9 x 20 x 4
    call("--backbone", "wan", "--plan", "--t_min", "800")
    assert "alpha/sigma = 0.25" in capsys.readouterr().out


def test_sizes():
    recipe = Wan.resize(WAN, 720, 1280, 49)
    assert recipe.window == 13 and recipe.latent == (16, 90, 160)
    with pytest.raises(ValueError, match="16"):
        Wan.resize(recipe, 480, 840, 81)
    with pytest.raises(ValueError, match="80"):
        Wan.resize(recipe, 480, 832, 80)


def test_other_models_are_refused_before_weights(wan_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("weights were loaded"))
    shutil.copytree(wan_folder, tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    index = json.loads(path.read_text())
    assert get_recipe("wan", str(tmp_path / "model")).latent == (C, 60, 104)
    for change, kind in [
        (dict(expand_timesteps=True), "TI2V"),
        (dict(transformer_2=["diffusers", "WanTransformer3DModel"], boundary_ratio=0.875), "A14B"),
    ]:
        path.write_text(json.dumps(index | change))
        assert kind in refusal(capsys, "--backbone", "wan", "--model", tmp_path / "model", "--device", "cpu")
    path.unlink()
    with pytest.raises(ValueError, match="Wan"):
        get_recipe("wan", str(tmp_path / "model"))


def test_a_pipeline_saved_with_eulers_scheduler(wan_folder, tmp_path):
    shutil.copytree(wan_folder, tmp_path / "model")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(tmp_path / "model" / "scheduler")
    assert Wan(str(tmp_path / "model")).levels(9) == Wan(wan_folder).levels(9)


def test_half_precision_model_float32_vae(wan_folder):
    full, half = prepared(wan_folder), prepared(wan_folder, dtype=torch.bfloat16)
    assert half.texts[PROMPT][0].dtype == half.pipe.transformer.proj_out.weight.dtype == torch.bfloat16
    assert half.pipe.transformer.scale_shift_table.dtype == half.pipe.vae.dtype == torch.float32
    x, t = randn(1, F, C, H, W), full.levels(4)[1].t
    half.levels(4)
    assert 0 < maxdiff(full.predict_x0(x, t, [PROMPT]), half.predict_x0(x, t, [PROMPT])) < 0.5


# --------------------------------------------------------------------------------------------------
# Offload and decoding


def test_offload_changes_nothing_and_streamed_decoding_equals_one_go(wan_folder, pipe, monkeypatch, offload):
    """Bit for bit, before frames are rounded to bytes. Offload by model moves the VAE per video."""
    moved, pre_forward = [], accelerate.hooks.CpuOffload.pre_forward
    backbone, plain = prepared(wan_folder, offload=offload), prepared(wan_folder)
    x, prompts = randn(2, F, C, H, W), [PROMPT, "it runs"]
    t = backbone.levels(4)[1].t
    plain.levels(4)
    assert torch.equal(backbone.predict_x0(x, t, prompts), plain.predict_x0(x, t, prompts))

    spy = lambda hook, model, *args, **options: moved.append(model) or pre_forward(hook, model, *args, **options)  # noqa: E731
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", spy)
    monkeypatch.setattr(wan, "to_uint8", lambda video: video.clamp(-1, 1).permute(1, 2, 3, 0))
    config = pipe.vae.config
    mean, std = (torch.tensor(x).view(-1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    for frames in (1, 2, 3, 5, 8):
        latents = randn(frames, C, 2, 3, seed=frames)
        with torch.no_grad():
            whole = pipe.vae.decode((latents.transpose(0, 1) * std + mean)[None]).sample[0]
        streamed = torch.stack(list(backbone.decode(latents)))
        assert streamed.shape == (4 * (frames - 1) + 1, 16, 24, 3)
        assert torch.equal(streamed, whole.permute(1, 2, 3, 0))
    assert moved == [backbone.pipe.vae] * 5 * (offload == "model")


def test_two_videos_can_be_decoded_in_turn_and_nothing_ahead(wan_folder):
    backbone, seen = Wan(wan_folder), []
    backbone.load(decoder_only=True)
    backbone.pipe.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[2]))
    a, b = randn(5, C, H, W), randn(5, C, H, W, seed=1)
    alone = [list(backbone.decode(x)) for x in (a, b)]
    assert seen == [1] * 10
    together = zip(backbone.decode(a), backbone.decode(b))
    first = next(together)
    assert seen == [1] * 12  # one latent frame of each
    for x, column in zip(alone, zip(first, *together)):
        assert all(np.array_equal(p, q) for p, q in zip(x, column))


# --------------------------------------------------------------------------------------------------
# The command line


def test_demo_end_to_end(wan_folder, tmp_path, capsys, monkeypatch):
    """17 frames of 16 x 32, 5 latent frames, 2 windows of 3: compared, stopped and resumed."""
    words = f"--backbone wan --model {wan_folder} --device cpu --height 16 --width 32 --window_frames 9 --num_frames 17"
    words += f" --num_inference_steps 3 --stride 2 --csd_iters 2 --t_min 700 --output_path {tmp_path / 'video.mp4'}"
    words = [*words.split(), "--compare", "--save_latents", "--prompt", "it runs | it jumps"]
    call(*words)
    captured = capsys.readouterr()
    assert "gen-l-video: 6 model evaluations" in captured.out and "syncos: 10 model evaluations" in captured.out
    assert "10/10" in captured.err
    whole = read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert whole["syncos"].shape == (5, C, 2, 4) and maxdiff(whole["syncos"], whole["gen-l-video"]) > 1e-2
    frames = frames_of(tmp_path / "video.mp4")
    assert len(frames) == 17

    (tmp_path / "video.safetensors").unlink()
    stop_at_preview(monkeypatch, *words, "--preview", 2)
    call(*words, "--resume", tmp_path / "video.state.safetensors")
    resumed = read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert np.array_equal(frames_of(tmp_path / "video.mp4"), frames)
