"""The CogVideoX adapter against diffusers' own pipeline, on random weights."""

import json
import shutil
import weakref
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline

from backbones import RECIPES, Backbone, CogVideoX, get_recipe, in_batches
from syncos import METHODS, Settings, count_evaluations, flow_levels, syncos

PROMPT = "a red fox . it jumps"


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maxdiff(a, b):
    return (a - b).abs().max().item()


@pytest.fixture
def backbone(pipeline_folder):
    backbone = CogVideoX(pipeline_folder, guidance_scale=6.0)
    backbone.encode([PROMPT, "it runs"])
    backbone.load()
    return backbone


@pytest.fixture
def pipe(pipeline_folder):
    return CogVideoXPipeline.from_pretrained(pipeline_folder, dtype=torch.float32)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("guidance", [6.0, 1.0])
def test_one_window_is_the_pipeline(backbone, pipe, steps, guidance):
    """With one window and stage 2 off, adapter and loop are CogVideoXPipeline, latents and frames."""
    noise = randn(5, 4, 2, 4)
    backbone.guidance_scale = guidance
    levels = backbone.levels(steps)
    assert levels[0].alpha == 0
    settings = Settings(stride=5, **METHODS["gen-l-video"])
    got = syncos(backbone.predict_x0, noise, levels, [slice(0, 5)], [PROMPT], settings, torch.Generator())

    args = dict(num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=12, num_frames=17, eta=0.0)
    expected = pipe(PROMPT, latents=noise[None].clone(), output_type="latent", **args).frames[0]
    assert maxdiff(got, expected) < 1e-4
    frames = pipe(PROMPT, latents=noise[None].clone(), output_type="np", **args).frames[0]
    ours = np.stack(list(backbone.decode(got)))
    assert ours.shape == (17, 16, 32, 3) and ours.dtype == np.uint8
    assert np.abs(ours / 255 - frames).max() < 0.5 / 255 + 1e-4


def test_prompts_are_encoded_once(backbone, monkeypatch):
    encoded, encode = [], CogVideoX.encode_text
    monkeypatch.setattr(
        CogVideoX, "encode_text", lambda self, pipe, text: encoded.append(text) or encode(self, pipe, text)
    )
    backbone.encode([PROMPT, "it runs", "it sleeps", "it sleeps"])
    assert encoded == ["it sleeps"]
    monkeypatch.setattr(CogVideoX, "load_pipe", lambda *_: pytest.fail("loaded for nothing"))
    backbone.encode(["it sleeps", PROMPT])
    backbone.levels(5)
    assert backbone.predict_x0(randn(2, 5, 4, 2, 4), 999, ["it sleeps", PROMPT]).shape == (2, 5, 4, 2, 4)


@pytest.fixture(params=["none", "model", "sequential"])
def offload(request, monkeypatch):
    """With the CPU as the device, which diffusers calls cpu:0; for sequential offload that is not the CPU."""
    hook = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: hook(model, "cpu", **options))
    return request.param


def test_parts_are_in_memory_in_their_turn(pipeline_folder, monkeypatch, offload):
    """Nothing refers to a part when its turn is over, be it placed, hooked or compiled."""
    parts, load_pipe = {}, CogVideoX.load_pipe

    def watch(self, *names):
        pipe = load_pipe(self, *names)
        parts.update({name: weakref.ref(part) for name, part in pipe.components.items() if part is not None})
        return pipe

    monkeypatch.setattr(CogVideoX, "load_pipe", watch)
    alive = lambda: {name for name, part in parts.items() if part() is not None} - {"scheduler"}  # noqa: E731
    backbone = CogVideoX(pipeline_folder, offload=offload)
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


def test_the_decoder_comes_to_the_device_for_every_piece(pipeline_folder, monkeypatch):
    """Under offload by model; though its decoder's forward is replaced while it streams."""
    moved, pre_forward = [], accelerate.hooks.CpuOffload.pre_forward
    monkeypatch.setattr(
        accelerate.hooks.CpuOffload,
        "pre_forward",
        lambda self, module, *args, **kwargs: moved.append(module) or pre_forward(self, module, *args, **kwargs),
    )
    backbone = CogVideoX(pipeline_folder, offload="model")
    backbone.load(decoder_only=True)
    assert len(list(backbone.decode(randn(5, 4, 2, 4)))) == 17
    assert moved == [backbone.pipe.vae] * 2


def test_what_must_stay_float32_does(pipeline_folder):
    """T5's `wo` overflows in float16, so transformers keeps it; it does through a pipeline and its placement, too."""
    pipe = CogVideoX(pipeline_folder, dtype=torch.float16).bring("tokenizer", "text_encoder")
    kept = {name.split(".")[-2] for name, p in pipe.text_encoder.named_parameters() if p.dtype == torch.float32}
    assert kept == {"wo"} and pipe.text_encoder.dtype == torch.float16


def test_a_missing_part_is_a_sentence(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "model")
    for part, call in dict(
        text_encoder=lambda b: b.encode([PROMPT]), transformer=CogVideoX.load, vae=CogVideoX.load
    ).items():
        (weights,) = (tmp_path / "model" / part).glob("*.safetensors")
        kept = weights.read_bytes()
        weights.unlink()
        with pytest.raises(ValueError, match=f"Cannot load {tmp_path / 'model'}: .*") as error:
            call(CogVideoX(str(tmp_path / "model")))
        assert "\n" not in str(error.value)
        weights.write_bytes(kept)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_window_batch_changes_nothing(backbone, size):
    backbone.levels(5)
    seen = []
    x, prompts = randn(3, 5, 4, 2, 4), [PROMPT, "it runs", PROMPT]
    whole = backbone.predict_x0(x, 599, prompts)
    split = in_batches(backbone.predict_x0, size, seen.append)(x, 599, prompts)
    assert maxdiff(whole, split) < 1e-5 and sum(seen) == 3 and max(seen) == min(size, 3)
    assert maxdiff(whole[0], whole[1]) > 1e-3


def test_half_precision_model_float32_state(pipeline_folder):
    full, half = CogVideoX(pipeline_folder), CogVideoX(pipeline_folder, dtype=torch.bfloat16)
    x = randn(1, 5, 4, 2, 4)
    results = []
    for backbone in (full, half):
        backbone.encode([PROMPT])
        backbone.load()
        backbone.levels(5)
        results.append(backbone.predict_x0(x, 599, [PROMPT]))
    assert results[1].dtype == torch.float32 and half.pipe.transformer.dtype == torch.bfloat16
    assert 0 < maxdiff(*results) < 0.5


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 13, 21])
@pytest.mark.parametrize("tiling", [False, True])
def test_streamed_decoding_equals_one_go(pipeline_folder, pipe, frames, tiling):
    backbone = CogVideoX(pipeline_folder, tiling=tiling)
    backbone.load(decoder_only=True)
    assert backbone.pipe.transformer is None and backbone.pipe.text_encoder is None
    latents = randn(frames, 4, 5, 7)  # 40x56 pixels: several tiles
    if tiling:
        pipe.vae.enable_tiling()
    with torch.no_grad():
        whole = pipe.decode_latents(latents[None])[0]
    whole = (whole / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).numpy()
    streamed = np.stack(list(backbone.decode(latents)))
    assert streamed.shape == whole.shape
    assert np.abs(streamed.astype(int) - whole).max() <= 1  # float32 rounding at a uint8 border
    if frames % 2:
        assert len(streamed) == 4 * (frames - 1) + 1


def test_two_videos_can_be_decoded_in_turn(pipeline_folder):
    backbone = CogVideoX(pipeline_folder)
    backbone.load(decoder_only=True)
    a, b = randn(7, 4, 2, 4), randn(7, 4, 2, 4, seed=1)
    alone = [list(backbone.decode(x)) for x in (a, b)]
    together = list(zip(backbone.decode(a), backbone.decode(b)))
    for x, column in zip(alone, zip(*together)):
        assert all(np.array_equal(p, q) for p, q in zip(x, column))


def test_decoding_memory_does_not_grow(pipeline_folder):
    """No call of the decoder sees more than three latent frames, whatever the length."""
    backbone = CogVideoX(pipeline_folder)
    backbone.load(decoder_only=True)
    seen = []
    forward = backbone.pipe.vae.decoder.forward
    backbone.pipe.vae.decoder.forward = lambda z, conv_cache=None: (
        seen.append(z.shape[2]) or forward(z, conv_cache=conv_cache)
    )
    stream = backbone.decode(randn(101, 4, 2, 4))
    next(stream)
    assert seen == [3]  # nothing is decoded ahead
    for _ in stream:
        pass
    assert seen == [3] + [2] * 49


def test_measure(pipeline_folder, tmp_path):
    recipe = get_recipe("cogvideox", pipeline_folder)
    assert recipe.window == 5 and recipe.latent == (4, 2, 4)
    assert recipe.scheduler["snr_shift_scale"] == 3.0
    with pytest.raises(ValueError, match="neither a folder"):
        get_recipe("cogvideox", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no backbone sora"):
        get_recipe("sora")


def test_cogvideox_1_5_is_refused(pipeline_folder, tmp_path):
    shutil.copytree(pipeline_folder, tmp_path / "model")
    config = tmp_path / "model" / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"patch_size_t": 2}))
    with pytest.raises(ValueError, match="CogVideoX-1.5"):
        get_recipe("cogvideox", str(tmp_path / "model"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_run_of_the_method(name):
    """Its walk, plan and counts, with a perfect denoiser in the model's place; t_min at the paper's noise levels."""
    r, calls = RECIPES[name], []
    s, levels = r.settings, r.backbone.make_levels(r.scheduler, r.num_inference_steps)
    windows = r.windows()
    assert (r.num_frames - 1) % r.frames_step == 0 or r.frames_step == 1
    assert (r.frames_per_latent > 1) == (name != "videocrafter2")
    assert all(a.t > b.t and a.alpha < b.alpha and a.sigma > b.sigma for a, b in zip(levels, levels[1:]))
    assert levels[-1].t == -1 and levels[-1].sigma < 0.05 and all(b.alpha > 0 for b in levels[1:])
    covered = [sum(w.start <= k < w.stop for w in windows) for k in range(windows[-1].stop)]
    assert min(covered) > 0 and {w.stop - w.start for w in windows} == {r.window}

    above = [level for level in levels[:-1] if level.t > r.paper_t_min]
    at_paper = min(levels[1:], key=lambda level: abs(level.t - r.paper_t_min))
    assert 0 < len(above) < len(levels) - 1 and 0.03 < at_paper.alpha / at_paper.sigma < 0.2
    assert s.t_min == r.paper_t_min or name == "tiny"

    video = randn(windows[-1].stop, *(2, 2, 2))

    def predict_x0(latents, t, prompts):
        calls.extend(prompts)
        return torch.stack([video[windows[int(p)]] for p in prompts])

    prompts = [str(i) for i in range(len(windows))]
    x = syncos(predict_x0, randn(*video.shape, seed=1), levels, windows, prompts, s, torch.Generator())
    assert len(calls) == count_evaluations(levels, windows, s)
    assert maxdiff(x, levels[-1].alpha * video) < (1e-5 if levels[-1].sigma == 0 else 5 * levels[-1].sigma)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_released_models(name):
    """Window, plan and schedule of the paper's 4x run."""
    recipe = RECIPES[name]
    levels = recipe.backbone.make_levels(recipe.scheduler, 50)
    windows = recipe.windows()
    assert len(levels) == 51 and len(windows) == {"opensora-plan": 12, "wan": 11, "videocrafter2": 13}.get(name, 10)
    if name != "videocrafter2":  # whose walk neither starts at noise nor ends clean
        assert levels[0] == (1000 if name == "wan" else 999, 0.0, 1.0) and levels[-1] == (-1, 1.0, 0.0)
    if issubclass(recipe.backbone, CogVideoX):  # for the others see their own tests
        ddim = CogVideoXDDIMScheduler.from_config(dict(recipe.scheduler))
        assert ddim.alphas_cumprod.dtype == torch.float64
        assert levels[1].alpha ** 2 == pytest.approx(float(ddim.alphas_cumprod[979]), rel=1e-9)


def test_the_base_class_serves_other_kinds_of_models():
    """A flow model and an eps model with a text mask, in a few lines, agree with their closed forms."""

    class Flow(Backbone):
        prediction, negative_prompt, scheduler = "flow", "bad", None

        @staticmethod
        def make_levels(scheduler, steps):
            sigmas = [1 - i / steps for i in range(steps)]
            return flow_levels([*sigmas, 0.0], [1000 * s for s in sigmas])

        def load_pipe(self, *parts):
            return torch.nn.Module()

        def encode_text(self, pipe, text):
            return torch.tensor([float(len(text))]), torch.ones(1, dtype=torch.bool)

        def denoise(self, x, t, text, mask):
            assert mask.shape == (len(x), 1)
            return x * 0 + text.view(-1, 1, 1, 1, 1)

    backbone = Flow("", guidance_scale=2.0)
    backbone.encode(["good!"])
    levels = backbone.levels(4)
    x = randn(1, 2, 1, 1, 1)
    assert maxdiff(backbone.predict_x0(x, levels[1].t, ["good!"]), x - 0.75 * (3 + 2 * (5 - 3))) < 1e-6


def test_registry_needs_no_weights():
    assert Path(__file__).parents[1].joinpath("tiny", "checkpoint").as_posix() == RECIPES["tiny"].model
