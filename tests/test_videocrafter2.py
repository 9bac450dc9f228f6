"""VideoCrafter2 against the official code's outputs (tests/data, random weights), and its loading."""

import json
import re
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from diffusers import AutoencoderKL, UNet3DConditionModel
from safetensors import safe_open
from torch import nn

import demo
from backbones import RECIPES, VideoCrafter2, get_recipe
from backbones.base import to_uint8
from models import videocrafter2
from models.videocrafter2 import load_part, unet_key
from syncos import METHODS, Level, Settings, syncos, to_x0

with safe_open(Path(__file__).parent / "data" / "vc2_tiny.safetensors", "pt") as file:
    GOLDEN = {key: file.get_tensor(key) for key in file.keys()}
    UNET = json.loads(file.metadata()["config"])
LAYERS, WIDTH, VOCABULARY = 24, 24, 16  # of the official text encoder: all its layers, narrow
VAE = dict(videocrafter2.RELEASE["vae"], block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4)
TEXT = dict(videocrafter2.RELEASE["text_encoder"], vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48,
            num_attention_heads=2, bos_token_id=2, eos_token_id=1)  # fmt: skip


def maxdiff(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomize(model, std):
    """No parameter at its default: norms and biases count too."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=std, generator=generator)
    return model.requires_grad_(False).eval()


# ----------------------------------------------------------------------------------------------------------------------
# A release of the official layout, with tiny random networks


class OpenClip(nn.Module):
    """OpenCLIP's text tower of torch's own layers; `penultimate` is what VideoCrafter2 reads."""

    def __init__(self):
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(77, WIDTH))
        layer = lambda: nn.TransformerEncoderLayer(WIDTH, 2, 48, 0.0, "gelu", batch_first=True, norm_first=True)  # noqa: E731
        self.layers, self.norm = nn.ModuleList(layer() for _ in range(LAYERS)), nn.LayerNorm(WIDTH)

    def penultimate(self, ids):
        x, mask = self.embed(ids) + self.positions, torch.full((77, 77), -torch.inf).triu(1)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.norm(x)

    def official_state(self):
        names = {"embed": "token_embedding", "positions": "positional_embedding", "norm": "ln_final",
                 "layers": "transformer.resblocks", "self_attn": "attn", "linear1": "mlp.c_fc", "linear2": "mlp.c_proj",
                 "norm1": "ln_1", "norm2": "ln_2"}  # fmt: skip
        state = {".".join(names.get(w, w) for w in k.split(".")): v for k, v in self.state_dict().items()}
        state |= {"text_projection": torch.zeros(WIDTH, WIDTH), "logit_scale": torch.ones(())}
        return {f"cond_stage_model.model.{k}": v for k, v in state.items()}


def official_vae_state(vae):
    """AutoencoderKL's parameters by their names in latent diffusion's code."""
    rules = [
        (r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}"),
        (r"down_blocks", "down"),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        (r"resnets", "block"),
        (r"(up|down)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"to_out\.0", "proj_out"),
        (r"to_(q|k|v)\b", r"\1"),
    ]
    state = {}
    for key, value in vae.state_dict().items():
        for rule, name in rules:
            key = re.sub(rule, name, key)
        state[f"first_stage_model.{key}"] = value[:, :, None, None] if "attn_1" in key and value.ndim == 2 else value
    return state


@pytest.fixture(scope="module")
def vae():
    return randomize(AutoencoderKL(**VAE), 0.2)


@pytest.fixture(scope="module")
def clip():
    return randomize(OpenClip(), 0.3)


@pytest.fixture(autouse=True)
def tiny_networks(monkeypatch):
    """The release's sizes are the program's; here they are the golden data's."""
    for part, config in dict(unet=UNET, vae=VAE, text_encoder=TEXT).items():
        monkeypatch.setitem(videocrafter2.RELEASE, part, config)


@pytest.fixture(scope="module")
def state(vae, clip):
    """All that the official model.ckpt holds: three networks and the schedule's buffers."""
    state = {k.removeprefix("sd."): v.float() for k, v in GOLDEN.items() if k.startswith("sd.")}
    buffers = dict(betas=torch.zeros(1000), scale_arr=torch.ones(1400))
    return state | official_vae_state(vae) | clip.official_state() | buffers


@pytest.fixture
def release(tmp_path, state):
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"  # like CLIP's, and unlike OpenCLIP's 0
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------------------
# The three networks


@pytest.mark.parametrize("fps", [28, 8])
def test_unet_is_the_official_one(release, monkeypatch, fps):
    if fps != 28:  # the release's
        monkeypatch.setattr(videocrafter2, "FPS", fps)
    unet = load_part("unet", release / "model.ckpt", torch.float32)
    for case in ("a", "b"):
        with torch.no_grad():
            out = unet(*(GOLDEN[f"{case}.{name}"] for name in ("x", "t", "context"))).sample
        assert maxdiff(out, GOLDEN[f"{case}.fps{fps}.output"]) < 2e-5


def test_released_unet_has_the_official_names():
    """At full size, without memory: four levels and all kinds of places."""
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


def test_text_is_openclips_penultimate_layer(release, clip):
    backbone = VideoCrafter2(str(release))
    with pytest.warns(UserWarning, match='reads 77 tokens, so it does not see "jumps sleeps"'):
        backbone.encode(["a red fox", "it " * 75 + "runs jumps sleeps"])
    word = lambda w: make_tokenizer().get_vocab()[w]  # noqa: E731
    for text, ids in {
        "": [1] + [0] * 76,
        "a red fox": [*map(word, "a red fox".split()), 1] + [0] * 73,
        "it " * 75 + "runs jumps sleeps": [word("it")] * 75 + [word("runs"), 1],
    }.items():
        assert maxdiff(backbone.texts[text][0], clip.penultimate(torch.tensor([ids]))[0]) < 2e-5


def test_frames_are_the_autoencoders(release, vae):
    backbone = VideoCrafter2(str(release))
    backbone.load(decoder_only=True)
    loaded, seen = backbone.pipe.vae, []
    assert all(torch.equal(v, vae.state_dict()[k]) for k, v in loaded.state_dict().items())
    latents = randn(5, 4, 4, 6)
    loaded.decoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    frames = np.stack(list(backbone.decode(latents)))
    expected = to_uint8(vae.decode(latents / 0.18215).sample.transpose(0, 1))
    assert frames.shape == (5, 32, 48, 3) and seen == [1] * 5
    assert np.abs(frames.astype(int) - expected).max() <= 1  # rounding at a uint8 border


def test_predict_x0_is_the_official_networks(release):
    x, t, context, eps = (GOLDEN[f"b.{name}"] for name in ("x", "t", "context", "fps28.output"))  # B C T H W
    backbone = VideoCrafter2(str(release), guidance_scale=1.0)
    backbone.load()
    backbone.texts, backbone.at = {"a fox": (context[0],)}, {t.item(): Level(t.item(), 0.6, 0.7)}
    x0 = backbone.predict_x0(x.transpose(1, 2), t.item(), ["a fox"])
    assert maxdiff(x0, ((x - 0.7 * eps) / 0.6).transpose(1, 2)) < 2e-5


# ----------------------------------------------------------------------------------------------------------------------
# The walk


def test_the_walk_is_the_official_ddim():
    """The official sampler's timesteps, levels and, with eps = tanh(0.8 x + t / 1000), its sample."""
    recipe = RECIPES["videocrafter2"]
    levels = recipe.backbone.make_levels(recipe.scheduler, 50)
    assert [level.t for level in levels] == [*GOLDEN["ddim.timesteps"].tolist(), -1]
    assert maxdiff(torch.tensor([level.alpha for level in levels]), GOLDEN["ddim.alpha"]) < 1e-6
    assert maxdiff(torch.tensor([level.sigma for level in levels]), GOLDEN["ddim.sigma"]) < 1e-6

    at = {level.t: level for level in levels}
    predict_x0 = lambda x, t, prompts: to_x0(torch.tanh(0.8 * x + t / 1000), x, at[t], "epsilon")  # noqa: E731
    noise = GOLDEN["ddim.x_T"][0].transpose(0, 1)
    settings = Settings(stride=3, **METHODS["gen-l-video"])
    sample = syncos(predict_x0, noise, levels, [slice(0, 3)], [""], settings, torch.Generator())
    assert maxdiff(sample, GOLDEN["ddim.sample"][0].transpose(0, 1)) < 1e-4  # of 35


def test_recipe():
    recipe = RECIPES["videocrafter2"]
    above = [x for x in recipe.backbone.make_levels(recipe.scheduler, 999) if x.t > recipe.settings.t_min]
    cog = RECIPES["cogvideox"]
    paper = [x for x in cog.backbone.make_levels(cog.scheduler, 1000) if x.t > 800]
    assert above[-1].alpha / above[-1].sigma == pytest.approx(paper[-1].alpha / paper[-1].sigma, rel=0.01)
    assert VideoCrafter2.resize(recipe, 256, 320, 8).latent == (4, 32, 40)
    with pytest.raises(ValueError, match="multiples of 64"):
        VideoCrafter2.resize(recipe, 320, 500, 16)
    with pytest.raises(ValueError, match="at most 999 steps"):
        recipe.backbone.make_levels(recipe.scheduler, 1000)
    with pytest.raises(ValueError, match="decodes frame by frame"):
        VideoCrafter2("model", tiling=True)


# ----------------------------------------------------------------------------------------------------------------------
# Loading


@pytest.mark.parametrize(
    "part, key", [("unet", "model.diffusion_model.middle_block.0.in_layers.0.bias"),
                  ("unet", "model.diffusion_model.fps_embedding.0.weight"),
                  ("vae", "first_stage_model.decoder.conv_out.bias"),
                  ("text_encoder", "cond_stage_model.model.transformer.resblocks.3.ln_1.bias")],
)  # fmt: skip
def test_every_key_counts(release, state, part, key):
    path = release / "model.ckpt"
    state = {k: v for k, v in state.items() if k.startswith(videocrafter2.PREFIXES[part])}
    for change, message in (
        ({key: None}, "1 missing keys"),
        ({key: torch.zeros(7)}, r"1 mismatched keys, first .* \(7,\)"),
        (
            {f"{videocrafter2.PREFIXES[part]}model.more.weight": torch.zeros(7)},
            "1 unexpected keys, first .*more.weight",
        ),
        ({"another.weight": torch.zeros(7)}, "1 unexpected keys, first another.weight"),
    ):
        torch.save({"state_dict": {k: v for k, v in (state | change).items() if v is not None}}, path)
        with pytest.raises(ValueError, match=f"{path} does not fit the model: {message}"):
            load_part(part, path, torch.float32)


def test_what_is_no_release_is_refused(release, tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (release / "owned",)

    torch.save({"state_dict": Attack()}, release / "model.ckpt")
    for content in (None, b"not a torch file"):
        if content:
            (release / "model.ckpt").write_bytes(content)
        with pytest.raises(ValueError, match="tensors and nothing else"):
            VideoCrafter2(str(release)).load()
    assert not (release / "owned").exists()
    torch.save([torch.zeros(1)], release / "model.ckpt")
    with pytest.raises(ValueError, match="holds a list, not tensors by name"):
        VideoCrafter2(str(release)).load()
    (release / "model.ckpt").unlink()
    for model in (release, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="is no VideoCrafter2: neither a model.ckpt"):
            get_recipe("videocrafter2", str(model))
    with pytest.raises(ValueError, match=f"Cannot load {release}: .* has neither"):
        VideoCrafter2(str(release)).load()


def test_a_folder_in_diffusers_format(release, tmp_path):
    names = dict(transformer="unet", vae="vae", text_encoder="text_encoder", tokenizer="tokenizer")
    ours = VideoCrafter2(str(release)).load_pipe(*names)
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

    from_file = VideoCrafter2(str(release / "model.ckpt")).load_pipe("vae")  # the file alone
    assert all(torch.equal(v, from_file.vae.state_dict()[k]) for k, v in ours.vae.state_dict().items())
    ours.transformer.fps_embedding = torch.nn.Linear(1, 1)
    ours.transformer.save_pretrained(tmp_path / "diffusers" / "unet")
    with pytest.raises(ValueError, match="unet does not fit the model: 2 unexpected keys, first fps_embedding.bias"):
        backbone.load()


def test_half_precision_and_dropout(release):
    """The temporal convolutions have dropout, which a model made by its constructor would use."""
    backbone = VideoCrafter2(str(release), dtype=torch.bfloat16)
    backbone.encode(["a red fox"])
    backbone.load()
    backbone.levels(50)
    x = randn(1, 2, 4, 4, 4)
    first, second = (backbone.predict_x0(x, 501, ["a red fox"]) for _ in range(2))
    assert {p.dtype for p in backbone.pipe.transformer.parameters()} == {torch.bfloat16}
    assert first.dtype == torch.float32 and torch.equal(first, second)


def test_demo_end_to_end(release, tmp_path):
    out = tmp_path / "out.mp4"
    words = "--backbone videocrafter2 --device cpu --height 64 --width 64 --window_frames 4 --num_frames 7 --stride 3 "
    words += f"--num_inference_steps 2 --csd_iters 1 --t_min 400 --output_path {out}"
    demo.main([*words.split(), "--prompt", "it runs | it jumps", "--model", str(release), "--preview", "1"])
    assert out.with_suffix(".preview.png").exists()
    frames = np.stack(list(iio.imiter(out)))
    assert frames.shape == (7, 256, 256, 3)  # small ones are enlarged
    assert iio.immeta(out)["fps"] == 10 and out.with_suffix(".png").exists()

    for bad, message in [
        (["--num_frames", "15"], "it must be at least 16; the nearest is 16"),
        (["--height", "100"], "multiples of 64"),
    ]:
        with pytest.raises(ValueError, match=message):
            demo.make_plan(demo.make_parser().parse_args(["--backbone", "videocrafter2", *bad]))
