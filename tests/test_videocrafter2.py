"""VideoCrafter2 against the official code (tests/data, random weights), and its loading."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import UNet3DConditionModel
from helpers import Attack, call, frames_of, golden, make_tokenizer, maxdiff, randn, rng

from backbones import COGVIDEOX_2B, to_uint8
from extras.models import get_recipe, videocrafter2
from extras.models.videocrafter2 import VIDEOCRAFTER2, VideoCrafter2, load_part, unet_key
from syncos import GEN_L_VIDEO, Level, Settings, syncos, to_x0

GOLDEN = golden("vc2_tiny")[0]


# --------------------------------------------------------------------------------------------------
# The three networks


@pytest.mark.parametrize("fps", [28, 8])
def test_unet_is_the_official_one(videocrafter2_release, monkeypatch, fps):
    if fps != 28:  # the release's
        monkeypatch.setattr(videocrafter2, "FPS", fps)
    unet = load_part("unet", videocrafter2_release / "model.ckpt", torch.float32)
    for case in ("a", "b"):
        with torch.no_grad():
            out = unet(*(GOLDEN[f"{case}.{name}"] for name in ("x", "t", "context"))).sample
        assert maxdiff(out, GOLDEN[f"{case}.fps{fps}.output"]) < 2e-5


def test_released_unet_has_the_official_names():
    """At full size, without memory: four levels and all kinds of layers."""
    with torch.device("meta"):
        own = UNet3DConditionModel().state_dict().keys()
    names = {
        "input_blocks.3.0.op.weight": "down_blocks.0.downsamplers.0.conv.weight",
        "input_blocks.11.0.in_layers.2.weight": "down_blocks.3.resnets.1.conv1.weight",
        "input_blocks.8.2.norm.bias": "down_blocks.2.temp_attentions.1.norm.bias",
        "middle_block.3.temopral_conv.conv4.3.bias": "mid_block.temp_convs.1.conv4.3.bias",
        "output_blocks.2.1.conv.bias": "up_blocks.0.upsamplers.0.conv.bias",
        "output_blocks.5.3.conv.bias": "up_blocks.1.upsamplers.0.conv.bias",
        "output_blocks.11.1.proj_in.weight": "up_blocks.3.attentions.2.proj_in.weight",
        "output_blocks.11.0.skip_connection.weight": "up_blocks.3.resnets.2.conv_shortcut.weight",
    }
    assert {k: unet_key(k, 2) for k in names} == names and set(names.values()) <= own


def test_text_is_openclips_penultimate_layer(videocrafter2_release, clip):
    backbone = VideoCrafter2(str(videocrafter2_release))
    with pytest.warns(UserWarning, match="jumps sleeps"):
        backbone.encode(["a red fox", "it " * 75 + "runs jumps sleeps"])
    word = lambda w: make_tokenizer().get_vocab()[w]  # noqa: E731
    for text, ids in {
        "": [1] + [0] * 76,
        "a red fox": [*map(word, "a red fox".split()), 1] + [0] * 73,
        "it " * 75 + "runs jumps sleeps": [word("it")] * 75 + [word("runs"), 1],
    }.items():
        assert maxdiff(backbone.texts[text][0], clip.penultimate(torch.tensor([ids]))[0]) < 2e-5


def test_frames_are_the_autoencoders(videocrafter2_release, vae):
    backbone = VideoCrafter2(str(videocrafter2_release))
    backbone.load(decoder_only=True)
    loaded, seen = backbone.pipe.vae, []
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in loaded.state_dict().items())
    latents = randn(5, 4, 4, 6)
    loaded.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    frames = np.stack(list(backbone.decode(latents)))
    expected = to_uint8(vae.decode(latents / 0.18215).sample.transpose(0, 1))
    assert frames.shape == (5, 32, 48, 3) and seen == [1] * 5
    assert np.abs(frames.astype(int) - expected).max() <= 1  # rounding at a uint8 border


def test_predict_x0_is_the_official_networks(videocrafter2_release):
    x, t, context, eps = (GOLDEN[f"b.{name}"] for name in ("x", "t", "context", "fps28.output"))  # B C T H W
    backbone = VideoCrafter2(str(videocrafter2_release), guidance_scale=1.0)
    backbone.load()
    backbone.texts, backbone.at = {"a fox": (context[0],)}, {t.item(): Level(t.item(), 0.6, 0.7)}
    x0 = backbone.predict_x0(x.transpose(1, 2), t.item(), ["a fox"])
    assert maxdiff(x0, ((x - 0.7 * eps) / 0.6).transpose(1, 2)) < 2e-5


# --------------------------------------------------------------------------------------------------
# The schedule


def test_the_schedule_is_the_official_ddim():
    """The official timesteps and levels, and the sample of eps = tanh(0.8 x + t / 1000)."""
    levels = VideoCrafter2.make_levels(VIDEOCRAFTER2.scheduler, 50)
    assert [level.t for level in levels] == [*GOLDEN["ddim.timesteps"].tolist(), -1]
    assert maxdiff(torch.tensor([level.alpha for level in levels]), GOLDEN["ddim.alpha"]) < 1e-6
    assert maxdiff(torch.tensor([level.sigma for level in levels]), GOLDEN["ddim.sigma"]) < 1e-6

    at = {level.t: level for level in levels}
    predict_x0 = lambda x, t, prompts: to_x0(torch.tanh(0.8 * x + t / 1000), x, at[t], "epsilon")  # noqa: E731
    noise, settings = GOLDEN["ddim.x_T"][0].transpose(0, 1), Settings(**GEN_L_VIDEO)
    sample = syncos(predict_x0, noise, levels, [slice(0, 3)], [""], settings, rng())
    assert maxdiff(sample, GOLDEN["ddim.sample"][0].transpose(0, 1)) < 1e-4  # of 35


def test_t_min_and_sizes():
    above = [x for x in VideoCrafter2.make_levels(VIDEOCRAFTER2.scheduler, 999) if x.t > VIDEOCRAFTER2.settings.t_min]
    paper = [x for x in COGVIDEOX_2B.backbone.make_levels(COGVIDEOX_2B.scheduler, 1000) if x.t > 800]
    assert above[-1].alpha / above[-1].sigma == pytest.approx(paper[-1].alpha / paper[-1].sigma, rel=0.01)
    assert VideoCrafter2.resize(VIDEOCRAFTER2, 256, 320, 8).latent == (4, 32, 40)
    with pytest.raises(ValueError, match="64"):
        VideoCrafter2.resize(VIDEOCRAFTER2, 320, 500, 16)
    with pytest.raises(ValueError, match="999"):
        VideoCrafter2.make_levels(VIDEOCRAFTER2.scheduler, 1000)
    with pytest.raises(ValueError, match="--vae_tiling"):
        VideoCrafter2("model", tiling=True)


# --------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize("part, key, value, what", [
    ("unet", "fps_embedding.0.weight", None, "missing"),
    ("unet", "middle_block.0.in_layers.0.bias", torch.zeros(7), "mismatched"),
    ("unet", "more.weight", torch.zeros(7), "unexpected"),
    ("vae", "decoder.conv_out.bias", None, "missing"),
    ("vae", "model.more.weight", torch.zeros(7), "unexpected"),
    ("text_encoder", "model.transformer.resblocks.3.ln_1.bias", None, "missing"),
    ("text_encoder", "model.more.weight", torch.zeros(7), "unexpected"),
])  # fmt: skip
def test_every_key_counts(videocrafter2_release, videocrafter2_state, part, key, value, what):
    path, prefix = videocrafter2_release / "model.ckpt", videocrafter2.PREFIXES[part]
    state = {k: v for k, v in videocrafter2_state.items() if k.startswith(prefix)} | {prefix + key: value}
    torch.save({"state_dict": {k: v for k, v in state.items() if v is not None}}, path)
    with pytest.raises(ValueError, match=f"{path} .*1 {what}"):
        load_part(part, path, torch.float32)


def test_other_files_are_refused(videocrafter2_release, videocrafter2_state, tmp_path):
    path, model = videocrafter2_release / "model.ckpt", str(videocrafter2_release)
    torch.save({"state_dict": videocrafter2_state | {"another.weight": torch.zeros(7)}}, path)
    with pytest.raises(ValueError, match="another.weight"):
        load_part("vae", path, torch.float32)
    torch.save({"state_dict": Attack(videocrafter2_release / "owned")}, path)
    with pytest.raises(ValueError, match="tensors"):
        VideoCrafter2(model).load()
    assert not (videocrafter2_release / "owned").exists()
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match="list"):
        VideoCrafter2(model).load()
    path.unlink()
    for missing in (model, str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match="VideoCrafter2"):
            get_recipe("videocrafter2", missing)
    with pytest.raises(ValueError, match=model):
        VideoCrafter2(model).load()


def test_a_folder_in_diffusers_format(videocrafter2_release, tmp_path):
    names = dict(transformer="unet", vae="vae", text_encoder="text_encoder", tokenizer="tokenizer")
    ours = VideoCrafter2(str(videocrafter2_release)).load_pipe(*names)
    for name, folder in names.items():
        getattr(ours, name).save_pretrained(tmp_path / "diffusers" / folder)
    assert get_recipe("videocrafter2", str(tmp_path / "diffusers")).window == 16
    backbone = VideoCrafter2(str(tmp_path / "diffusers"))
    theirs = backbone.load_pipe(*names)
    for name in ("transformer", "vae", "text_encoder"):
        a, b = (getattr(pipe, name).state_dict() for pipe in (ours, theirs))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        assert not getattr(theirs, name).training
    backbone.encode(["a red fox"])

    from_file = VideoCrafter2(str(videocrafter2_release / "model.ckpt")).load_pipe("vae")  # the file alone
    assert all(torch.equal(v, from_file.vae.state_dict()[k]) for k, v in ours.vae.state_dict().items())
    ours.transformer.fps_embedding = torch.nn.Linear(1, 1)
    ours.transformer.save_pretrained(tmp_path / "diffusers" / "unet")
    with pytest.raises(ValueError, match="2 unexpected .*fps_embedding.bias"):
        backbone.load()


def test_half_precision_and_dropout(videocrafter2_release):
    """The temporal convolutions have dropout, which a model made by its constructor would use."""
    backbone = VideoCrafter2(str(videocrafter2_release), dtype=torch.bfloat16)
    backbone.encode(["a red fox"])
    backbone.load()
    backbone.levels(50)
    x = randn(1, 2, 4, 4, 4)
    first, second = (backbone.predict_x0(x, 501, ["a red fox"]) for _ in range(2))
    assert {p.dtype for p in backbone.pipe.transformer.parameters()} == {torch.bfloat16}
    assert first.dtype == torch.float32 and torch.equal(first, second)


def test_demo_end_to_end(videocrafter2_release, tmp_path):
    words = f"--backbone videocrafter2 --model {videocrafter2_release} --device cpu --height 64 --width 64 --stride 3"
    words += " --window_frames 4 --num_frames 7 --num_inference_steps 2 --csd_iters 1 --t_min 400 --preview 1"
    call(*words.split(), "--prompt", "it runs | it jumps", "--output_path", tmp_path / "out.mp4")
    assert frames_of(tmp_path / "out.mp4").shape == (7, 256, 256, 3)  # small ones are enlarged
    assert iio.immeta(tmp_path / "out.mp4")["fps"] == 10
    assert (tmp_path / "out.png").exists() and (tmp_path / "out.preview.png").exists()
