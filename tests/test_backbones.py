"""What all backbones share, and the CogVideoX adapter against diffusers' pipeline."""

import json
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from helpers import PROMPT, ROOT, call, frames_of, make_tokenizer, maxdiff, randn, rng

from backbones import COGVIDEOX_2B, Backbone, CogVideoX, Recipe
from extras.models import RECIPES, checked, get_recipe
from extras.models.checked import Checked, CheckedCogVideoX
from extras.models.tiny import TINY
from extras.models.videocrafter2 import VideoCrafter2
from extras.processes import in_batches
from syncos import GEN_L_VIDEO, Settings, count_evaluations, flow_levels, syncos


def prepared(folder, *prompts, **options):
    backbone = CogVideoX(folder, **options)
    backbone.encode(prompts or [PROMPT, "it runs"])
    backbone.load()
    backbone.levels(5)
    return backbone


# --------------------------------------------------------------------------------------------------
# The contract


class Constant(Backbone):
    """A flow model with a text mask and a timestep per frame, from nothing but what the docstring
    of `Backbone` asks for. Its output is the text's length plus timestep / 1000."""

    prediction = "flow"
    scheduler = dict(shift=1.0)
    negative_prompt = "bad"
    frame_timesteps = True

    @staticmethod
    def make_levels(scheduler, steps):
        sigmas = [1 - i / steps for i in range(steps)]
        return flow_levels([*sigmas, 0.0], [1000 * s for s in sigmas])

    def load_pipe(self, *parts):
        names = ("tokenizer", "text_encoder", "transformer", "vae")
        pipe = SimpleNamespace(**{name: name if name in parts else None for name in names})
        pipe.to = lambda device: None
        return pipe

    def encode_text(self, pipe, text):
        assert pipe.text_encoder and not pipe.transformer
        return torch.tensor([float(len(text))]), torch.ones(1, dtype=torch.bool)

    def denoise(self, x, t, text, mask):
        assert mask.shape == (len(x), 1) and t.shape in ((len(x),), x.shape[:2]) and t.dtype == torch.float32
        return x * 0 + text.view(-1, 1, 1, 1, 1) + t.view(len(x), -1, 1, 1, 1) / 1000

    def decode(self, latents):
        for frame in latents.repeat_interleave(4, dim=0)[3:]:
            yield frame[:1].clamp(0, 1).mul(255).byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()


class CheckedConstant(Checked, Constant):
    """The same for the program, with what the docstring of `Checked` asks for in addition."""

    text_length = 99

    def load_pipe(self, *parts):
        pipe = super().load_pipe(*parts)
        pipe.tokenizer = make_tokenizer()
        return pipe


CONSTANT = Recipe(Constant, "constant", window=3, latent=(2, 32, 32), stride=2, scheduler=dict(shift=1.0),
                  dtype="float16", num_frames=17, needs_gpu=False)  # fmt: skip


def test_a_new_model_is_thirty_lines_and_samples(monkeypatch, tmp_path):
    backbone, prompts = CONSTANT.make(), ["good!", "it is so"]
    with pytest.raises(ValueError, match="999 is not a timestep .* levels"):
        backbone.predict_x0(randn(1, 3, 2, 32, 32), 999, prompts[:1])
    backbone.encode(prompts)
    levels, x = backbone.levels(4), randn(1, 3, 2, 32, 32)
    with pytest.raises(ValueError, match="unheard.* not been encoded"):
        backbone.predict_x0(x, 750, ["unheard"])
    backbone.load()
    expected = x - 0.75 * (3.75 + 6 * (5.75 - 3.75))
    assert levels[1].t == 750 and maxdiff(backbone.predict_x0(x, 750, ["good!"]), expected) < 1e-5
    settings = Settings(t_min=300, csd_iters=2)
    latents = syncos(backbone.predict_x0, randn(5, 2, 32, 32), levels, CONSTANT.windows(), prompts, settings, rng())
    backbone.release_transformer()
    assert backbone.pipe.vae and not backbone.pipe.transformer
    assert np.stack(list(backbone.decode(latents))).shape == (17, 32, 32, 3)

    monkeypatch.setitem(RECIPES, "constant", replace(CONSTANT, backbone=CheckedConstant))
    words = "--backbone constant --num_inference_steps 4 --t_min 300 --scenario lighthouse --num_frames 41 --preview 2"
    call(*words.split(), "--csd_iters", 2, "--output_path", tmp_path / "video.mp4")
    assert len(frames_of(tmp_path / "video.mp4")) == 41 and (tmp_path / "video.preview.png").exists()


ALONE = """
import sys, torch
from dataclasses import replace
from backbones import COGVIDEOX_2B
from syncos import GEN_L_VIDEO, Settings, make_windows, syncos

folder, noise = sys.argv[1], torch.load(sys.argv[2])
recipe = replace(COGVIDEOX_2B, model=folder, window=5, latent=(4, 2, 4), stride=2, guidance_scale=3.0, num_frames=33)
backbone = recipe.make()
backbone.encode(["it runs", "it jumps"])
levels = backbone.levels(4)
backbone.load()
run = lambda noise, windows, prompts, settings: syncos(
    backbone.predict_x0, noise, levels, windows, prompts, settings, torch.Generator().manual_seed(0))
clip = run(noise[:5], [slice(0, 5)], ["it runs"], Settings(**GEN_L_VIDEO))
video = run(noise, recipe.windows(), ["it runs", "it runs", "it jumps"], Settings(csd_iters=2, t_min=300))
backbone.release_transformer()
assert len(list(backbone.decode(video))) == 33
assert not any(name.split(".")[0] == "extras" for name in sys.modules)
torch.save(dict(clip=clip, video=video), "out.pt")
"""


def test_two_files_work_alone(pipeline_folder, tmp_path):
    """syncos.py and backbones.py in an empty folder with a space in its name: one window is
    diffusers' pipeline, the video that of the checked backbone."""
    (tmp_path := tmp_path / "my project").mkdir()
    for name in ("syncos.py", "backbones.py"):
        shutil.copy(ROOT / name, tmp_path)
    torch.save(noise := randn(9, 4, 2, 4), tmp_path / "noise.pt")
    command = [sys.executable, "-c", ALONE, pipeline_folder, tmp_path / "noise.pt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    out = torch.load(tmp_path / "out.pt")

    pipe = CogVideoXPipeline.from_pretrained(pipeline_folder, dtype=torch.float32)
    pipe.scheduler = CogVideoXDDIMScheduler.from_config(COGVIDEOX_2B.scheduler, timestep_spacing="trailing")
    options = dict(num_inference_steps=4, guidance_scale=3.0, max_sequence_length=12, num_frames=17, eta=0.0)
    expected = pipe("it runs", latents=noise[None, :5].clone(), output_type="latent", **options).frames[0]
    assert maxdiff(out["clip"], expected) < 1e-4

    recipe = replace(get_recipe("cogvideox", pipeline_folder), stride=2, guidance_scale=3.0, num_frames=33)
    backbone = recipe.make()
    backbone.encode(["it runs", "it jumps"])
    backbone.load()
    prompts, settings = ["it runs", "it runs", "it jumps"], Settings(csd_iters=2, t_min=300)
    video = syncos(backbone.predict_x0, noise, backbone.levels(4), recipe.windows(), prompts, settings, rng())
    assert torch.equal(out["video"], video)


@pytest.mark.parametrize("kind", [CogVideoX, CheckedCogVideoX])
def test_a_scheduler_for_eps_is_refused(kind, sincos_folder, tmp_path):
    shutil.copytree(sincos_folder, tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(prediction_type="epsilon")))
    with pytest.raises(ValueError, match="prediction_type epsilon"):
        kind(str(tmp_path / "model"))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_guided_takes_one_time_or_one_per_window_or_one_per_frame(guidance):
    backbone, x, prompts = Constant("", guidance_scale=guidance), randn(2, 3, 1, 1, 1), ["good!", "it is so"]
    backbone.encode(prompts)
    lengths = torch.tensor([5.0, 8.0]).view(2, 1, 1, 1, 1)
    for times in (torch.tensor([750]), torch.tensor([750.0, 250]), 100 * torch.arange(1.0, 7).view(2, 3)):
        expected = 3 + guidance * (lengths - 3) + times.view(len(times), -1, 1, 1, 1) / 1000
        assert maxdiff(backbone.guided(x, times, prompts), expected.expand_as(x)) < 1e-5


@pytest.mark.parametrize("size", [1, 2, 8])
def test_window_batch_changes_nothing(sincos_folder, size):
    backbone = prepared(sincos_folder)
    x, prompts, seen = randn(3, 5, 4, 2, 4), [PROMPT, "it runs", PROMPT], []
    whole = backbone.predict_x0(x, 599, prompts)
    assert maxdiff(in_batches(backbone.predict_x0, size, seen.append)(x, 599, prompts), whole) < 1e-5
    assert sum(seen) == 3 and max(seen) == min(size, 3) and maxdiff(whole[0], whole[1]) > 1e-3

    times = torch.tensor([599, 999, 599])
    whole = backbone.guided(x, times, prompts)
    assert maxdiff(in_batches(backbone.guided, size)(x, times, prompts), whole) < 1e-5


def test_prompts_are_encoded_once(sincos_folder, monkeypatch):
    backbone, encoded, encode = prepared(sincos_folder), [], CogVideoX.encode_text
    monkeypatch.setattr(
        CogVideoX, "encode_text", lambda self, pipe, text: encoded.append(text) or encode(self, pipe, text)
    )
    backbone.encode([PROMPT, "it runs", "it sleeps", "it sleeps"])
    assert encoded == ["it sleeps"]
    monkeypatch.setattr(CogVideoX, "load_pipe", lambda *_: pytest.fail("loaded for nothing"))
    backbone.encode(["it sleeps", PROMPT])
    assert backbone.predict_x0(randn(2, 5, 4, 2, 4), 999, ["it sleeps", PROMPT]).shape == (2, 5, 4, 2, 4)


def test_parts_are_in_memory_only_while_they_are_needed(rotary_folder, monkeypatch, offload):
    """Nothing refers to a part afterwards, whether it was placed, hooked or compiled."""
    parts, load_pipe = {}, CogVideoX.load_pipe

    def watch(self, *names):
        pipe = load_pipe(self, *names)
        parts.update({name: weakref.ref(part) for name, part in pipe.components.items() if part is not None})
        return pipe

    monkeypatch.setattr(CogVideoX, "load_pipe", watch)
    alive = lambda: {name for name, part in parts.items() if part() is not None} - {"scheduler"}  # noqa: E731
    backbone = CogVideoX(rotary_folder, offload=offload)
    backbone.encode([PROMPT])
    assert set(parts) == {"tokenizer", "text_encoder", "scheduler"} and not alive()

    backbone.load()
    if offload == "none":
        backbone.pipe.transformer.compile(backend="eager")
    backbone.levels(5)
    latents = randn(5, 4, 2, 4)
    x0 = backbone.predict_x0(latents[None], 999, [PROMPT])
    preview = list(backbone.decode(latents))
    assert torch.equal(x0, backbone.predict_x0(latents[None], 999, [PROMPT]))
    assert alive() == {"transformer", "vae"}

    backbone.release_transformer()
    assert alive() == {"vae"}
    assert np.array_equal(preview, list(backbone.decode(latents)))


def test_half_precision_model_float32_state(sincos_folder):
    full, half = prepared(sincos_folder), prepared(sincos_folder, dtype=torch.bfloat16)
    x = randn(1, 5, 4, 2, 4)
    results = [backbone.predict_x0(x, 599, [PROMPT]) for backbone in (full, half)]
    assert results[1].dtype == torch.float32 and half.pipe.transformer.dtype == torch.bfloat16
    assert 0 < maxdiff(*results) < 0.5


def test_what_must_stay_float32_does(sincos_folder):
    """T5's `wo` overflows in float16, so transformers keeps it in float32, also through a
    pipeline's placement."""
    pipe = CogVideoX(sincos_folder, dtype=torch.float16).load_parts("tokenizer", "text_encoder")
    kept = {name.split(".")[-2] for name, p in pipe.text_encoder.named_parameters() if p.dtype == torch.float32}
    assert kept == {"wo"} and pipe.text_encoder.dtype == torch.float16


def test_a_missing_part_is_refused_by_name(sincos_folder, tmp_path):
    shutil.copytree(sincos_folder, tmp_path / "model")
    for part, load in dict(text_encoder=lambda b: b.encode([PROMPT]), vae=CogVideoX.load).items():
        (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
        weights.rename(tmp_path / "kept")
        with pytest.raises(ValueError, match=f"{tmp_path / 'model'}") as error:
            load(CheckedCogVideoX(str(tmp_path / "model")))
        assert "\n" not in str(error.value)
        (tmp_path / "kept").rename(weights)


# --------------------------------------------------------------------------------------------------
# CogVideoX


@pytest.mark.parametrize("steps, guidance", [(10, 6.0), (50, 6.0), (10, 1.0)])
@torch.no_grad()
def test_one_window_is_the_pipeline(pipeline_folder, steps, guidance):
    """With one window and stage 2 off, adapter and loop equal CogVideoXPipeline."""
    noise, backbone = randn(5, 4, 2, 4), prepared(pipeline_folder, guidance_scale=guidance)
    levels = backbone.levels(steps)
    assert levels[0].alpha == 0
    settings = Settings(**GEN_L_VIDEO)
    got = syncos(backbone.predict_x0, noise, levels, [slice(0, 5)], [PROMPT], settings, rng())

    pipe = CogVideoXPipeline.from_pretrained(pipeline_folder, dtype=torch.float32)
    args = dict(num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=12, num_frames=17, eta=0.0)
    expected = pipe(PROMPT, latents=noise[None].clone(), output_type="latent", **args).frames[0]
    assert maxdiff(got, expected) < 1e-5
    frames = pipe.video_processor.postprocess_video(pipe.decode_latents(expected[None]), output_type="np")[0]
    ours = np.stack(list(backbone.decode(got)))
    assert ours.shape == (17, 16, 32, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255 - frames).max() < 0.5 / 255 + 1e-4


def test_positions_matter(rotary_folder):
    """Otherwise the equality above would say nothing about them."""
    backbone, x = prepared(rotary_folder), randn(1, 5, 4, 2, 4)
    right, make = backbone.predict_x0(x, 599, [PROMPT]), backbone.pipe._prepare_rotary_positional_embeddings
    for wrong in (lambda *_: None, lambda *size: [x.flip(0) for x in make(*size)]):
        backbone.pipe._prepare_rotary_positional_embeddings = wrong
        assert maxdiff(backbone.predict_x0(x, 599, [PROMPT]), right) > 1e-3


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("tiling", [False, True])
def test_decoding_in_chunks_equals_one_go(sincos_folder, frames, tiling, monkeypatch):
    """Also under offload, where the decoder comes to the device for every chunk."""
    moved, pre_forward = [], accelerate.hooks.CpuOffload.pre_forward
    spy = lambda hook, model, *args, **options: moved.append(model) or pre_forward(hook, model, *args, **options)  # noqa: E731
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", spy)
    monkeypatch.setattr(checked, "CHUNK", 2)
    backbone = CheckedCogVideoX(sincos_folder, tiling=tiling, offload="model")
    backbone.load(decoder_only=True)
    pipe = CogVideoXPipeline.from_pretrained(sincos_folder, dtype=torch.float32)
    assert backbone.pipe.transformer is None and backbone.pipe.text_encoder is None
    latents = randn(frames, 4, 5, 7)  # 40x56 pixels: several tiles
    if tiling:
        pipe.vae.enable_tiling()
    with torch.no_grad():
        whole = pipe.decode_latents(latents[None])[0]
    whole = (whole / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).numpy()
    ours = np.stack(list(backbone.decode(latents)))
    assert ours.shape == whole.shape and moved == [backbone.pipe.vae] * max(frames // 2, 1)
    assert np.abs(ours.astype(int) - whole).max() <= 1  # float32 rounding at a uint8 border
    if frames % 2:
        assert len(ours) == 4 * (frames - 1) + 1


def test_decoding_is_in_chunks_and_two_videos_can_take_turns(sincos_folder, monkeypatch):
    """Nothing is decoded ahead of its chunk, and each video has its own caches."""
    monkeypatch.setattr(checked, "CHUNK", 2)
    backbone, seen = CheckedCogVideoX(sincos_folder), []
    backbone.load(decoder_only=True)
    decoder, forward = backbone.pipe.vae.decoder, backbone.pipe.vae.decoder.forward
    decoder.forward = lambda z, conv_cache=None: seen.append(z.shape[2]) or forward(z, conv_cache=conv_cache)
    a, b = randn(7, 4, 2, 4), randn(7, 4, 2, 4, seed=1)
    alone = [list(backbone.decode(x)) for x in (a, b)]
    assert seen == [3, 2, 2] * 2
    together = zip(backbone.decode(a), backbone.decode(b))
    first = next(together)
    assert seen[6:] == [3, 3]
    for x, column in zip(alone, zip(first, *together)):
        assert len(x) == 25 and all(np.array_equal(p, q) for p, q in zip(x, column))


def test_inspect(sincos_folder, tmp_path):
    recipe = get_recipe("cogvideox", sincos_folder)
    assert recipe.window == 5 and recipe.latent == (4, 2, 4)
    assert recipe.scheduler["snr_shift_scale"] == 3.0
    with pytest.raises(ValueError, match="CogVideoX"):
        get_recipe("cogvideox", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="sora"):
        get_recipe("sora")
    shutil.copytree(sincos_folder, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size_t": 2}))
    with pytest.raises(ValueError, match="--backbone cogvideox-1.5"):
        CheckedCogVideoX(str(tmp_path / "model"))


# --------------------------------------------------------------------------------------------------
# The recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_of_the_method(name):
    """Schedule, windows and counts with a perfect denoiser; t_min at the paper's noise levels."""
    r, calls = RECIPES[name], []
    s, levels = r.settings, r.backbone.make_levels(r.scheduler, r.num_inference_steps)
    windows = r.windows()
    assert (r.num_frames - 1) % r.frames_step == 0 or r.frames_step == 1
    assert (r.frames_per_latent > 1) == (not issubclass(r.backbone, VideoCrafter2))
    assert all(a.t > b.t and a.alpha < b.alpha and a.sigma > b.sigma for a, b in zip(levels, levels[1:]))
    assert levels[-1].t == -1 and levels[-1].sigma < 0.05 and all(b.alpha > 0 for b in levels[1:])
    covered = [sum(w.start <= k < w.stop for w in windows) for k in range(windows[-1].stop)]
    assert min(covered) > 0 and {w.stop - w.start for w in windows} == {r.window}

    if not name.startswith("tiny"):  # whose small latents fix their content at lower noise
        above = [level for level in levels[:-1] if level.t > s.t_min]
        lowest = min(levels[1:], key=lambda level: abs(level.t - s.t_min))
        assert 0 < len(above) < len(levels) - 1 and 0.03 < lowest.alpha / lowest.sigma < 0.2

    video = randn(windows[-1].stop, *(2, 2, 2))

    def predict_x0(latents, t, prompts):
        calls.extend(prompts)
        return torch.stack([video[windows[int(p)]] for p in prompts])

    prompts = [str(i) for i in range(len(windows))]
    x = syncos(predict_x0, randn(*video.shape, seed=1), levels, windows, prompts, s, rng())
    assert len(calls) == count_evaluations(levels, windows, s)
    assert maxdiff(x, levels[-1].alpha * video) < (1e-5 if levels[-1].sigma == 0 else 5 * levels[-1].sigma)


WINDOWS = {"cogvideox-1.5": 11, "opensora-plan": 12, "wan": 11, "videocrafter2": 13, "tiny-unet": 7}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_released_models(name):
    """Windows and schedule of the paper's 4x run."""
    recipe = RECIPES[name]
    levels = recipe.backbone.make_levels(recipe.scheduler, 50)
    windows = recipe.windows()
    assert len(levels) == 51 and len(windows) == WINDOWS.get(name, 10)
    if not issubclass(recipe.backbone, VideoCrafter2):  # whose schedule neither starts at noise nor ends clean
        assert levels[0] == (1000 if name == "wan" else 999, 0.0, 1.0) and levels[-1] == (-1, 1.0, 0.0)
    if issubclass(recipe.backbone, CogVideoX):  # the others have tests of their own
        ddim = CogVideoXDDIMScheduler.from_config(dict(recipe.scheduler))
        assert ddim.alphas_cumprod.dtype == torch.float64
        assert levels[1].alpha ** 2 == pytest.approx(float(ddim.alphas_cumprod[979]), rel=1e-9)


def test_the_tiny_model_is_in_the_repository():
    assert Path(__file__).parents[1] / "extras" / "tiny" / "checkpoint" == Path(TINY.model)
