"""The port of Open-Sora Plan v1.3 against the official code's outputs (tests/data, random weights), and its loading."""

import json
from collections import OrderedDict
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from conftest import make_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import MT5Config, MT5EncoderModel

import demo
from backbones import RECIPES, OpenSoraPlan, get_recipe
from models.opensora_plan import (
    OpenSoraT2V_v1_3,
    WFVAEDecoder,
    from_sets,
    inverse_haar_2d,
    inverse_haar_3d,
    load_decoder,
    load_transformer,
    to_sets,
)

DATA = Path(__file__).parent / "data"
EXTRA = dict(decay=0.9999, update_after_step=0, use_ema_warmup=False)  # keys of the release that no class takes


def golden(name):
    """Tensors and metadata (JSON where it is) of a golden file."""
    with safe_open(DATA / name, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, {k: json.loads(v) for k, v in file.metadata().items() if v[0] == "{"}


def weights(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


DIT, DIT_META = golden("dit_tiny.safetensors")
VAE, VAE_META = golden("vae_tiny.safetensors")
VAE |= golden("vae_tiny_outputs.safetensors")[0]


def maxdiff(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def transformer():
    model = OpenSoraT2V_v1_3.from_config(DIT_META["config"])
    model.load_state_dict(weights(DIT, "sd."))
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def decoder():
    model = WFVAEDecoder.from_config(VAE_META["config"])
    model.load_state_dict(weights(VAE, "sd.decoder."))
    return model.requires_grad_(False)


def call(model, case, dtype=torch.float32):
    get = lambda name: DIT[f"{case}.{name}"]  # noqa: E731
    return model(
        get("hidden_states").transpose(1, 2).to(dtype),
        get("timestep"),
        get("encoder_hidden_states")[:, 0].to(dtype),
        get("encoder_attention_mask")[:, 0],
    ).transpose(1, 2)


def keep_outputs(modules):
    """Forward hooks that keep each module's output in a dictionary."""
    kept = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: kept.update({name: out}))
    return kept


# ----------------------------------------------------------------------------------------------------------------------
# The transformer


@pytest.mark.parametrize("case", ["a", "b", "c", "interp"])
def test_transformer_is_the_official_one(transformer, case):
    if case == "interp":
        config = DIT_META["config_interp"]
        transformer = OpenSoraT2V_v1_3.from_config(config)
        transformer.load_state_dict(weights(DIT, "sd."))
    assert maxdiff(call(transformer, case), DIT[f"{case}.output"]) < 5e-6


def test_transformer_inside():
    model = OpenSoraT2V_v1_3.from_config(DIT_META["config"]).requires_grad_(False)
    model.load_state_dict(weights(DIT, "sd."))
    modules = {"pos_embed": model.pos_embed, "caption_projection": model.caption_projection}
    for i, block in enumerate(model.transformer_blocks):
        modules |= {f"block{i}": block, f"block{i}_attn1": block.attn1, f"block{i}_attn2": block.attn2}
    kept = keep_outputs(modules | {"adaln": model.adaln_single})
    call(model, "a")
    timestep, embedded = kept.pop("adaln")
    assert maxdiff(timestep, DIT["a.mid.adaln_timestep"]) < 5e-6
    assert maxdiff(embedded, DIT["a.mid.adaln_embedded_timestep"]) < 5e-6
    for name, value in kept.items():
        official = DIT[f"a.mid.{name if '_attn' in name else 'after_' + name}"]
        assert maxdiff(value, official.view(value.shape)) < 5e-6, name


def test_skiparse_sets():
    """The sets of 32 tokens that the official code makes."""
    tokens = torch.arange(32.0).view(1, 1, 32, 1)
    single, grouped = (to_sets(tokens, 4, g)[:, 0, :, 0].int().tolist() for g in (False, True))
    assert single[0] == [0, 4, 8, 12, 16, 20, 24, 28] and single[1][:3] == [1, 5, 9]
    assert grouped == [[4 * i + j + 16 * k for k in (0, 1) for j in range(4)] for i in range(4)]
    x = randn(3, 2, 48, 5)
    for g in (False, True):
        assert torch.equal(from_sets(to_sets(x, 4, g), 4, g), x)


def test_timesteps_and_angles_stay_float32(transformer):
    """In bfloat16 999 would be 1000: the timestep's embedding must not go through it."""
    half = OpenSoraT2V_v1_3.from_config(DIT_META["config"]).requires_grad_(False)
    half.load_state_dict(weights(DIT, "sd."))
    half.to(torch.bfloat16)
    kept = keep_outputs({"sinusoid": half.adaln_single.emb.time_proj})
    out = call(half, "a", torch.bfloat16)
    assert out.dtype == torch.bfloat16 and kept["sinusoid"].dtype == torch.float32
    assert maxdiff(kept["sinusoid"], transformer.adaln_single.emb.time_proj(DIT["a.timestep"])) == 0
    assert maxdiff(out.float(), DIT["a.output"]) < 0.1 * DIT["a.output"].abs().max()


# ----------------------------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("case", ["t1", "t2", "t7"])
def test_decoder_is_the_official_one(decoder, case):
    for piece in (1, 2, 3, 4, 8):
        video = torch.cat(list(decoder.decode(VAE[f"{case}.latents"], piece)), 2)
        assert maxdiff(video, VAE[f"{case}.video"]) < 2e-5


def test_decoder_inside():
    model = WFVAEDecoder.from_config(VAE_META["config"]).requires_grad_(False)
    model.load_state_dict(weights(VAE, "sd.decoder."))
    kept = keep_outputs(dict(model.named_children()))
    [_] = model.decode(VAE["t2.latents"], 2)
    for name in ("conv_in", "mid", "connect_l2", "up2", "connect_l1", "up1", "layer"):
        assert maxdiff(kept[name], VAE[f"t2.mid.{name}"]) < 2e-5, name

    low, detail = VAE["t2.mid.idwt_l2"], VAE["t2.mid.connect_l1"]
    assert maxdiff(inverse_haar_3d(VAE["t2.mid.connect_l2"], True), low) < 2e-5
    coefficients = torch.cat([detail[:, :3] + low, detail[:, 3:]], 1)
    assert maxdiff(inverse_haar_2d(coefficients), VAE["t2.mid.idwt_l1"]) < 2e-5
    assert maxdiff(inverse_haar_3d(VAE["t2.mid.decoder"], True), VAE["t2.video"]) < 2e-5


@pytest.mark.parametrize("frames", range(1, 15))
def test_pieces_equal_one_go(decoder, frames):
    z = randn(1, 8, frames, 2, 3)
    [whole] = decoder.decode(z, frames)
    assert whole.shape == (1, 3, 4 * (frames - 1) + 1, 16, 24)
    for piece in (1, 2, 3, 4, 5):
        streamed = list(decoder.decode(z, piece))
        assert maxdiff(torch.cat(streamed, 2), whole) < 2e-5
        assert all(part.shape[2] <= 4 * (piece + 1) for part in streamed)


def test_pieces_under_offload_hooks(decoder):
    """accelerate's hooks copy what goes into a module; what is kept between pieces must survive that."""
    hooked = WFVAEDecoder.from_config(VAE_META["config"]).requires_grad_(False)
    hooked.load_state_dict(decoder.state_dict())
    cpu_offload(hooked, execution_device="cpu")
    z = randn(1, 8, 5, 2, 3)
    assert maxdiff(torch.cat(list(hooked.decode(z, 1)), 2), torch.cat(list(decoder.decode(z, 5)), 2)) < 2e-5


# ----------------------------------------------------------------------------------------------------------------------
# Loading: a folder like the released repository, with tiny random models


def save_release(folder, transformer, state):
    transformer.save_pretrained(folder / "any93x640x640", max_shard_size="200KB")
    path = folder / "any93x640x640" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | DIT_META["config"] | EXTRA))
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(VAE_META["config"]))
    torch.save({"ema_state_dict": state}, folder / "vae" / "merged.ckpt")


def merged(decoder, official=""):
    """A checkpoint's state: encoder, an early decoder, then the one that counts."""
    state = OrderedDict({"encoder.conv_in.conv.weight": torch.zeros(2, 2)})
    state |= {f"decoder.{k}": torch.full_like(v, 9.0) for k, v in decoder.state_dict().items()}
    state |= {k: v for k, v in VAE.items() if k.startswith("buf.")}
    state["decoder.inverse_wavelet_tranform_l1.aa"] = torch.ones(2, 2)
    return state | {f"module.decoder.{k}": v for k, v in decoder.state_dict().items()}


@pytest.fixture
def release(tmp_path, transformer, decoder):
    save_release(tmp_path, transformer, merged(decoder))
    text = MT5EncoderModel(MT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    text.save_pretrained(tmp_path / "mt5-xxl")
    make_tokenizer().save_pretrained(tmp_path / "mt5-xxl")
    return tmp_path


def test_the_release_loads(release, transformer, decoder):
    assert len(list((release / "any93x640x640").glob("*.safetensors"))) > 1
    loaded = load_transformer(str(release), torch.float32)
    assert maxdiff(call(loaded, "b"), DIT["b.output"]) < 5e-6
    own, theirs = load_decoder(str(release)).state_dict(), decoder.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)


def test_loading_says_what_is_wrong(release, tmp_path, decoder):
    vae = release / "vae"
    state = merged(decoder)
    del state["module.decoder.conv_in.conv.bias"], state["decoder.conv_in.conv.bias"]
    torch.save({"ema_state_dict": {}, "state_dict": {"gen_model": state}}, vae / "merged.ckpt")
    with pytest.raises(ValueError, match="1 missing keys, first conv_in.conv.bias"):
        load_decoder(str(release))
    state["decoder.conv_in.conv.bias"] = torch.zeros(3)
    torch.save({"state_dict": state}, vae / "merged.ckpt")
    with pytest.raises(ValueError, match="1 mismatched keys, first conv_in.conv.bias"):
        load_decoder(str(release))
    (vae / "config.json").write_text(json.dumps(VAE_META["config"] | {"norm_type": "groupnorm"}))
    with pytest.raises(ValueError, match="norm_type must be 'layernorm' for this port, config.json says 'groupnorm'"):
        load_decoder(str(release))
    (vae / "config.json").write_text(json.dumps(VAE_META["config"]))
    (vae / "merged.ckpt").write_bytes(b"not a torch file")
    with pytest.raises(ValueError, match="tensors and nothing else"):
        load_decoder(str(release))
    (vae / "merged.ckpt").unlink()
    with pytest.raises(ValueError, match="needs config.json and merged.ckpt"):
        load_decoder(str(release))
    (vae / "config.json").unlink()
    with pytest.raises(ValueError, match="needs config.json and merged.ckpt"):
        load_decoder(str(release))
    config = release / "any93x640x640" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 5}))
    with pytest.raises(ValueError, match=r"missing keys, first transformer_blocks\.4"):
        load_transformer(str(release), torch.float32)
    with pytest.raises(ValueError, match="no any93x640x640/config.json"):
        get_recipe("opensora-plan", str(tmp_path / "nothing"))


def test_a_malicious_pickle_is_refused(release):
    class Attack:
        def __reduce__(self):
            return Path.touch, (release / "owned",)

    torch.save({"ema_state_dict": Attack()}, release / "vae" / "merged.ckpt")
    with pytest.raises(ValueError, match="tensors and nothing else"):
        load_decoder(str(release))
    assert not (release / "owned").exists()


# ----------------------------------------------------------------------------------------------------------------------
# The adapter


def test_prompts_carry_the_template_and_a_mask(release, monkeypatch):
    backbone, seen = OpenSoraPlan(str(release)), []
    encode, tokenizer = OpenSoraPlan.encode_text, make_tokenizer()

    def encode_text(self, pipe, text):
        pipe.tokenizer = lambda text, **options: seen.append(text) or tokenizer(text, **options)
        return encode(self, pipe, text)

    monkeypatch.setattr(OpenSoraPlan, "encode_text", encode_text)
    backbone.encode(["a fox"])
    assert seen == [backbone.negative_prompt, "high quality, high aesthetic, a fox"]
    text, mask = backbone.texts["a fox"]
    assert text.shape == (512, 16) and mask.shape == (512,) and mask.sum() == len(tokenizer(seen[1]).input_ids)


def test_a_text_encoder_in_a_bin_file_is_mapped_and_not_read(release, monkeypatch):
    """mt5-xxl is one of 51.7 GB, decoder and all: in memory it takes the encoder, in its own precision."""
    folder = release / "mt5-xxl"
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: seen.append(options) or load(path, **options))
    backbone = OpenSoraPlan(str(release), dtype=torch.float16)
    backbone.encode(["a fox"])
    assert [(o["mmap"], o["weights_only"]) for o in seen] == [(True, True)]
    assert backbone.texts["a fox"][0].isfinite().all()


def test_schedule_and_recipe():
    recipe = RECIPES["opensora-plan"]
    levels = recipe.backbone.make_levels(recipe.scheduler, 50)
    assert [level.t for level in levels[:3]] == [999, 979, 959] and levels[0].alpha == 0
    assert levels[1].alpha ** 2 == pytest.approx(2.0058e-6, rel=1e-3)
    small = OpenSoraPlan.resize(recipe, 256, 320, 29)
    assert small.window == 8 and small.latent == (8, 32, 40)
    with pytest.raises(ValueError, match="multiples of 32"):
        OpenSoraPlan.resize(recipe, 250, 320, 29)
    with pytest.raises(ValueError, match="29, 45, 61, 77 or 93"):
        OpenSoraPlan.resize(recipe, 256, 320, 49)


def test_demo_end_to_end(release, tmp_path):
    out = tmp_path / "out.mp4"
    common = ["--backbone", "opensora-plan", "--device", "cpu", "--output_path", str(out)]
    demo.main(
        [*common, "--model", str(release), "--prompt", "it runs | it jumps", "--height", "32", "--width", "64"]
        + ["--window_frames", "29", "--num_frames", "61", "--num_inference_steps", "2", "--csd_iters", "1"]
    )
    frames = np.stack(list(iio.imiter(out)))
    assert frames.shape[0] == 61 and frames.shape[2] == 2 * frames.shape[1]
    assert out.with_suffix(".png").exists()
    for bad, message in [
        (["--num_frames", "60"], "4 n \\+ 1"),
        (["--height", "100"], "multiples of 32"),
        (["--window_frames", "49"], "29, 45, 61, 77 or 93"),
    ]:
        with pytest.raises(ValueError, match=message):
            demo.make_plan(demo.make_parser().parse_args([*common, *bad]))
    with pytest.raises(ValueError, match="whose models have one size"):
        demo.make_plan(demo.make_parser().parse_args(["--height", "64"]))
