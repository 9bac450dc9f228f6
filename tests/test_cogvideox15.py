"""CogVideoX-1.5: one window against diffusers' pipeline, on random weights, and long videos with an
exact denoiser of clips whose first frame comes twice."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline
from helpers import PROMPT, call, frames_of, maxdiff, randn, refusal, rng, run_processes, stop_at_preview

import demo
from backbones import CogVideoX
from extras.baselines import Plan
from extras.measure.memory import full_size
from extras.methods import METHODS
from extras.models import get_recipe
from extras.models.cogvideox15 import COGVIDEOX_15, CogVideoX15
from extras.videos import read_tensors
from syncos import GEN_L_VIDEO, Settings, implied_noise, make_windows, syncos

C, H, W = 4, 2, 4


@pytest.fixture
def base(any_method, sincos_folder, cogvideox15_folder):
    """The small run of conftest.py, 5 latent frames per window at stride 2, with this model."""
    return [cogvideox15_folder if word == sincos_folder else word for word in any_method]


@pytest.fixture
def change(cogvideox15_folder, tmp_path):
    """change(name=value) returns a folder with that change in the transformer's configuration."""

    def changed(**values):
        folder = shutil.copytree(cogvideox15_folder, tmp_path / "changed", dirs_exist_ok=True)
        path = folder / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return str(folder)

    return changed


def prepared(folder, **options):
    backbone = CogVideoX15(folder, **options)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    backbone.levels(5)
    return backbone


# --------------------------------------------------------------------------------------------------
# One window is diffusers' pipeline


def as_ours(noise, seed=9):
    """The pipeline's noise, 1+f C H W with its extra frame in front, as f 2C H W. It is the first
    copy; the others are arbitrary."""
    copies = randn(*noise[1:].shape, seed=seed)
    copies[0] = noise[0]
    return torch.cat([noise[1:], copies], 1)


@pytest.mark.parametrize("steps, guidance, f", [(10, 6.0, 5), (50, 6.0, 5), (10, 1.0, 5), (10, 6.0, 3), (4, 6.0, 9)])
@torch.no_grad()
def test_one_window_is_the_pipeline(cogvideox15_folder, steps, guidance, f):
    """Latents, the extra frame and video frames, whatever noise the other copies have."""
    noise, backbone = randn(1 + f, C, H, W), prepared(cogvideox15_folder, guidance_scale=guidance)
    levels, settings = backbone.levels(steps), Settings(**GEN_L_VIDEO)
    run = lambda x: syncos(backbone.predict_x0, x, levels, [slice(0, f)], [PROMPT], settings, rng())  # noqa: E731
    ours = run(as_ours(noise))
    assert torch.equal(run(as_ours(noise, seed=10))[:, :C], ours[:, :C])
    assert torch.equal(ours[1:, C:], ours[1:, :C]) and not torch.equal(ours[0, C:], ours[0, :C])

    pipe = CogVideoXPipeline.from_pretrained(cogvideox15_folder, dtype=torch.float32)
    args = dict(num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=12, num_frames=4 * f - 3)
    pipe.prepare_latents = lambda *_: noise[None].clone()  # it takes latents of 1+f frames from nobody else
    theirs = pipe(PROMPT, output_type="latent", **args).frames[0]
    assert theirs.shape == (1 + f, C, H, W)
    assert max(maxdiff(ours[:, :C], theirs[1:]), maxdiff(ours[0, C:], theirs[0])) < 1e-5

    video = pipe(PROMPT, output_type="np", **args).frames[0]
    frames = np.stack(list(backbone.decode(ours)))
    assert frames.shape == (4 * f - 3, 8 * H, 8 * W, 3) == video.shape
    assert np.abs(frames / 255 - video).max() < 0.5 / 255 + 1e-5


@pytest.mark.parametrize("tiling", [False, True])
@torch.no_grad()
def test_decoding_is_the_pipelines(cogvideox15_folder, tiling):
    backbone, latents = CogVideoX15(cogvideox15_folder, tiling=tiling), randn(5, 2 * C, 5, 7)  # several tiles
    backbone.load(decoder_only=True)
    pipe = CogVideoXPipeline.from_pretrained(cogvideox15_folder, dtype=torch.float32)
    if tiling:
        pipe.vae.enable_tiling()
    video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents[None, :, :C]), output_type="np")[0]
    assert np.abs(np.stack(list(backbone.decode(latents))) / 255 - video).max() < 0.5 / 255 + 1e-5


def test_positions_matter_and_the_configured_size_only_bounds_them(cogvideox15_folder, change):
    backbone, x = prepared(cogvideox15_folder), randn(1, 5, 2 * C, H, W)
    right, make = backbone.predict_x0(x, 599, [PROMPT]), backbone.pipe._prepare_rotary_positional_embeddings
    for wrong in (lambda *_: None, lambda *size: [x.flip(0) for x in make(*size)]):
        backbone.pipe._prepare_rotary_positional_embeddings = wrong
        assert maxdiff(backbone.predict_x0(x, 599, [PROMPT]), right) > 1e-3
    wide = prepared(change(sample_height=6, sample_width=8))
    assert torch.equal(wide.predict_x0(x, 599, [PROMPT]), right)


# --------------------------------------------------------------------------------------------------
# Long videos, with the exact denoiser of Gaussian clips


class Clips:
    """E[x0 | x_t] of clips, B x n x C x H x W. Frames have variance 1 and covariance 0.5 + 0.5 *
    0.9^distance; the first comes once or `twice`."""

    def __init__(self, levels, twice):
        i = torch.arange(COGVIDEOX_15.window, dtype=torch.float64)
        shown = [0] * twice + i.int().tolist()
        self.prior, self.levels, self.made = (0.5 + 0.5 * 0.9 ** (i[:, None] - i).abs())[shown][:, shown], levels, {}

    def __call__(self, x, t, prompts):
        if t not in self.made:
            _, a, s = self.levels[t]
            noisy = a**2 * self.prior + s**2 * torch.eye(len(self.prior)).double()
            self.made[t] = (a * self.prior @ torch.linalg.inv(noisy)).float()
        return torch.einsum("ij,bjchw->bichw", self.made[t], x)


@pytest.mark.parametrize("settings", [Settings(), Settings(**GEN_L_VIDEO)])
def test_nothing_freezes_where_a_window_begins(cogvideox15_folder, settings):
    """Change from frame to frame, as a share of the truth. The adapter is like a model without
    doubling; of the plainer designs, windows of 22 freeze, and a noisy frame entered twice leaves
    noise."""
    levels, f = CogVideoX15.make_levels(COGVIDEOX_15.scheduler, 50), COGVIDEOX_15.window
    at = {level.t: level for level in levels[:-1]}
    once, twice = Clips(at, False), Clips(at, True)

    def guided(x, times, prompts):  # the network's v
        level = at[times.item()]
        x0 = twice(x, level.t, prompts)
        return level.alpha * implied_noise(x, x0, level) - level.sigma * x0

    adapter = CogVideoX15(cogvideox15_folder)
    adapter.set_levels(levels)
    adapter.guided, adapter.texts = guided, {"": ()}

    def change(predict_x0, frames, size, channels):
        """The change where later windows begin, and where the video begins."""
        windows, video = make_windows(frames, size, COGVIDEOX_15.stride), randn(frames, channels, 8, 8)
        video = syncos(predict_x0, video, levels, windows, [""] * len(windows), settings, rng())[-81:, :4]
        rate = (video[1:] - video[:-1]).square().mean((1, 2, 3)) / (1 - 0.9)  # 1 - 0.9: of neighbours in truth
        return rate[[w.start - (frames - 81) for w in windows[1:]]].mean().item(), rate[0].item()

    right = change(once, 81, f, 4)  # 0.68 and 0.62; by Gen-L-Video 0.66 and 0.72
    assert change(adapter.predict_x0, 81, f, 8) == pytest.approx(right, abs=0.15)
    assert change(twice, 82, f + 1, 4)[0] < 0.3  # the video's first frame in front of it
    assert change(lambda x, t, p: twice(torch.cat([x[:, :1], x], 1), t, p)[:, 1:], 81, f, 4)[1] > 1.0


# --------------------------------------------------------------------------------------------------
# Which models, sizes and methods


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-5b", "cogvideox-1.5"])
def test_recognised_by_its_configuration(cogvideox15_folder, change, name):
    recipe = get_recipe(name, cogvideox15_folder)
    assert recipe.backbone is CogVideoX15 and (recipe.window, recipe.latent) == (5, (2 * C, H, W))
    assert (recipe.dtype, recipe.fps, recipe.stride, recipe.num_frames) == ("bfloat16", 16, 6, 321)
    for size in ((300, 300), (96, 170)):  # both have been released; neither is 2400 x 2400 pixels
        folder = change(sample_height=size[0], sample_width=size[1], sample_frames=81)
        recipe = get_recipe(name, folder)
        assert (recipe.window, recipe.latent) == (21, (2 * C, 96, 170))


REFUSALS = {  # changes of the configuration; the rest of the command
    "image-to-video": (dict(in_channels=8), ""),
    "ofs_embed_dim": (dict(ofs_embed_dim=512), ""),
    "patch_size_t = 4": (dict(patch_size_t=4), ""),
    "1.5 text-to-video": (dict(sample_frames=21), ""),  # 6 latent frames: pairs without a copy
    "768 x 1360": (dict(sample_height=170, sample_width=96), ""),
    "damaged": (dict(sample_height=None), ""),
    "32 x 16 pixels and 17 frames": ({}, "--height 24"),
    "leave out": ({}, "--window_frames 33"),
    "nearest is 33": ({}, "--num_frames 37"),  # 10 latent frames, which would decode to 40
    "per latent frame": ({}, "--method fifo"),
}


@pytest.mark.parametrize("name", ["cogvideox", "cogvideox-1.5"])
@pytest.mark.parametrize("said", REFUSALS)
def test_what_does_not_fit_is_refused_in_a_sentence(base, change, capsys, monkeypatch, said, name):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("weights were loaded"))
    config, words = REFUSALS[said]
    base[base.index("--backbone") + 1], base[base.index("--model") + 1] = name, change(**config)
    assert said in refusal(capsys, *base, *words.split())


def test_other_cogvideoxs_are_refused(pipeline_folder, capsys):
    words = f"--backbone cogvideox-1.5 --model {pipeline_folder} --device cpu --plan"
    assert "is a CogVideoX 2B or 5B; use --backbone cogvideox " in refusal(capsys, *words.split())


def test_frames_share_tokens_so_they_have_no_timesteps_of_their_own(cogvideox15_folder):
    """Why fifo, which needs them, is refused."""
    patch = prepared(cogvideox15_folder).pipe.transformer.patch_embed.proj
    assert patch.in_features == 2 * 2 * 2 * C and not CogVideoX15.frame_timesteps and CogVideoX.frame_timesteps


def test_the_plan_says_how_long_it_takes(capsys):
    """Needs neither hub nor GPU."""
    for words, evaluations, minutes in (("", 1270, (423, 233)), ("--csd_iters 2", 622, (207, 114))):
        call("--backbone", "cogvideox-1.5", "--plan", *words.split())
        out = capsys.readouterr().out
        assert "321 frames at 16 fps = 81 latent frames: 11 windows of 21, stride 6" in out and "bfloat16" in out
        assert f"syncos: {evaluations} model evaluations" in out
        assert "{} min on one A100 or {} min on one H100".format(*minutes) in out


def test_the_full_size_model_gets_pairs_of_frames():
    """22 latent frames of 96 x 170 are 11 x 48 x 85 tokens."""
    backbone = full_size("cogvideox-1.5")
    backbone.load()
    rotary = backbone.pipe._prepare_rotary_positional_embeddings(768, 1360, 22, "meta")
    assert backbone.tiling is False and rotary[0].shape == (11 * 48 * 85, 64)


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_runs_stop_resume_and_decode(base, tmp_path, monkeypatch):
    """The same latents bit for bit, and the same video file."""
    words = [*base, "--num_frames", 41, "--save_latents", "--compare", "syncos", "ditctrl", "csd"]
    words += ["--csd_iters", 2, "--t_min", 300]
    call(*words)
    whole, _ = read_tensors(tmp_path / "video.safetensors", "latents")
    assert {x.shape for x in whole.values()} == {(11, 2 * C, H, W)} and len(frames_of(tmp_path / "video.mp4")) == 41
    video = (tmp_path / "video.mp4").read_bytes()

    (tmp_path / "video.safetensors").unlink()
    stop_at_preview(monkeypatch, *words, "--preview", 3)
    call(*words, "--preview", 3, "--resume", tmp_path / "video.state.safetensors")
    again, about = read_tensors(tmp_path / "video.safetensors", "latents")
    assert all(torch.equal(again[name], x) for name, x in whole.items())
    assert (tmp_path / "video.preview.png").exists() and about["fps"] == 16
    call("--decode", tmp_path / "video.safetensors", "--device", "cpu", "--output_path", tmp_path / "again.mp4")
    assert (tmp_path / "video.mp4").read_bytes() == video == (tmp_path / "again.mp4").read_bytes()


def test_saved_latents_need_their_own_model(base, tmp_path, sincos_folder, capsys):
    call(*base, "--save_latents", "--method", "gen-l-video")
    capsys.readouterr()
    words = "--decode", tmp_path / "video.safetensors", "--model", sincos_folder, "--device", "cpu"
    error = refusal(capsys, *words, "--output_path", tmp_path / "again.mp4")
    assert "latents of 8 channels" in error and not (tmp_path / "again.mp4").exists()


def test_batches_and_processes_change_nothing(cogvideox15_folder, tmp_path):
    backbone, results = prepared(cogvideox15_folder), {}
    recipe = get_recipe("cogvideox-1.5", cogvideox15_folder)

    def sample(size, name="syncos"):
        settings = dict(stride=2, num_frames=41, num_inference_steps=4, window_batch=size)
        plan = Plan(replace(recipe, **settings), (PROMPT, "it runs"))
        backbone.set_levels(plan.levels)
        return METHODS[name](Settings(csd_iters=2, t_min=300)).sample(backbone, plan, randn(11, 2 * C, H, W), rng())

    for name in ("syncos", "ditctrl"):
        results[name] = sample(1, name)
        assert maxdiff(sample(3, name), results[name]) < 1e-3

    def work(rank):
        assert all(torch.equal(sample(1, name), x) for name, x in results.items())

    assert run_processes(work, 2, tmp_path) == [0, 0]


def test_offload_compilation_and_half_precision(cogvideox15_folder, offload):
    x, prompts = randn(2, 5, 2 * C, H, W), [PROMPT, "it runs"]
    plain, moved = prepared(cogvideox15_folder), prepared(cogvideox15_folder, offload=offload)
    if offload == "none":
        moved.pipe.transformer.compile(backend="eager")
    x0 = moved.predict_x0(x, 599, prompts)
    assert torch.equal(x0, plain.predict_x0(x, 599, prompts))
    assert np.array_equal(list(moved.preview(x0[0])), list(plain.decode(x0[0])))
    moved.release_transformer()
    assert np.array_equal(list(moved.decode(x0[0])), list(plain.decode(x0[0])))

    half = prepared(cogvideox15_folder, dtype=torch.bfloat16).predict_x0(x, 599, prompts)
    assert half.dtype == torch.float32 and 0 < maxdiff(half, x0) < 0.5
