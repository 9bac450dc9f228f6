"""The port of Open-Sora Plan v1.3 against the official code (tests/data), and its loading."""

import json

import pytest
import torch
from accelerate import cpu_offload
from helpers import Attack, call, frames_of, golden, make_golden, make_tokenizer, maxdiff, randn
from safetensors.torch import load_file

from backbones import OPENSORA_PLAN, OpenSoraPlan
from extras.loading import load_network
from extras.models import get_recipe
from extras.models.checked import CheckedOpenSoraPlan
from extras.ports.opensora_plan import (
    TRANSFORMER,
    OpenSoraT2V_v1_3,
    WFVAEDecoder,
    from_sets,
    inverse_haar_2d,
    inverse_haar_3d,
    load_decoder,
    to_sets,
)

DIT = golden("dit_tiny")[0]
VAE = golden("vae_tiny_outputs")[0]


def evaluate(model, case, dtype=torch.float32):
    """The transformer's output for the inputs of a golden case."""
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


# --------------------------------------------------------------------------------------------------
# The transformer


@pytest.mark.parametrize("case", ["a", "b", "c", "interp"])
def test_transformer_is_the_official_one(case):
    model = make_golden(OpenSoraT2V_v1_3, "dit_tiny", config="config_interp" if case == "interp" else "config")
    assert maxdiff(evaluate(model, case), DIT[f"{case}.output"]) < 5e-6


def test_transformer_inside():
    model = make_golden(OpenSoraT2V_v1_3, "dit_tiny")
    modules = {"pos_embed": model.pos_embed, "caption_projection": model.caption_projection}
    for i, block in enumerate(model.transformer_blocks):
        modules |= {f"block{i}": block, f"block{i}_attn1": block.attn1, f"block{i}_attn2": block.attn2}
    kept = keep_outputs(modules | {"adaln": model.adaln_single})
    evaluate(model, "a")
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
    """The timestep's embedding must not go through bfloat16, where 999 is 1000."""
    half = make_golden(OpenSoraT2V_v1_3, "dit_tiny").to(torch.bfloat16)
    kept = keep_outputs({"sinusoid": half.adaln_single.emb.time_proj})
    out = evaluate(half, "a", torch.bfloat16)
    assert out.dtype == torch.bfloat16 and kept["sinusoid"].dtype == torch.float32
    assert maxdiff(kept["sinusoid"], transformer.adaln_single.emb.time_proj(DIT["a.timestep"])) == 0
    assert maxdiff(out.float(), DIT["a.output"]) < 0.1 * DIT["a.output"].abs().max()


# --------------------------------------------------------------------------------------------------
# The decoder


@pytest.mark.parametrize("case", ["t1", "t2", "t7"])
def test_decoder_is_the_official_one(decoder, case):
    for piece in (1, 2, 3, 4, 8):
        video = torch.cat(list(decoder.decode(VAE[f"{case}.latents"], piece)), 2)
        assert maxdiff(video, VAE[f"{case}.video"]) < 2e-5


def test_decoder_inside():
    model = make_golden(WFVAEDecoder, "vae_tiny", "sd.decoder.")
    kept = keep_outputs(dict(model.named_children()))
    [_] = model.decode(VAE["t2.latents"], 2)
    for name in ("conv_in", "mid", "connect_l2", "up2", "connect_l1", "up1", "layer"):
        assert maxdiff(kept[name], VAE[f"t2.mid.{name}"]) < 2e-5, name

    low, detail = VAE["t2.mid.idwt_l2"], VAE["t2.mid.connect_l1"]
    assert maxdiff(inverse_haar_3d(VAE["t2.mid.connect_l2"], True), low) < 2e-5
    coefficients = torch.cat([detail[:, :3] + low, detail[:, 3:]], 1)
    assert maxdiff(inverse_haar_2d(coefficients), VAE["t2.mid.idwt_l1"]) < 2e-5
    assert maxdiff(inverse_haar_3d(VAE["t2.mid.decoder"], True), VAE["t2.video"]) < 2e-5


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 13])
def test_pieces_equal_one_go(decoder, frames):
    z = randn(1, 8, frames, 2, 3)
    [whole] = decoder.decode(z, frames)
    assert whole.shape == (1, 3, 4 * (frames - 1) + 1, 16, 24)
    for piece in (1, 2, 3, 4, 5):
        streamed = list(decoder.decode(z, piece))
        assert maxdiff(torch.cat(streamed, 2), whole) < 2e-5
        assert all(part.shape[2] <= 4 * (piece + 1) for part in streamed)


def test_pieces_under_offload_hooks(decoder):
    """accelerate's hooks copy what goes into a module; what is kept between pieces survives."""
    hooked = make_golden(WFVAEDecoder, "vae_tiny", "sd.decoder.")
    cpu_offload(hooked, execution_device="cpu")
    z = randn(1, 8, 5, 2, 3)
    assert maxdiff(torch.cat(list(hooked.decode(z, 1)), 2), torch.cat(list(decoder.decode(z, 5)), 2)) < 2e-5


# --------------------------------------------------------------------------------------------------
# Loading


def test_the_release_loads(opensora_release, decoder):
    assert len(list((opensora_release / "any93x640x640").glob("*.safetensors"))) > 1
    loaded = load_network(OpenSoraT2V_v1_3, str(opensora_release), TRANSFORMER, torch.float32, strict=True)
    assert maxdiff(evaluate(loaded, "b"), DIT["b.output"]) < 5e-6
    own, theirs = load_decoder(str(opensora_release)).state_dict(), decoder.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[k], theirs[k]) for k in own)


def test_what_does_not_fit_is_refused(opensora_release, tmp_path, decoder_state):
    vae, model = opensora_release / "vae", str(opensora_release)
    state, config = dict(decoder_state), (vae / "config.json").read_text()

    def refused(what):
        with pytest.raises(ValueError, match=what):
            load_decoder(model)

    del state["module.decoder.conv_in.conv.bias"], state["decoder.conv_in.conv.bias"]
    torch.save({"ema_state_dict": {}, "state_dict": {"gen_model": state}}, vae / "merged.ckpt")
    refused("missing .*conv_in.conv.bias")
    state["decoder.conv_in.conv.bias"] = torch.zeros(3)
    torch.save({"state_dict": state}, vae / "merged.ckpt")
    refused("mismatched .*conv_in.conv.bias")
    (vae / "config.json").write_text(json.dumps(json.loads(config) | {"norm_type": "groupnorm"}))
    refused("norm_type")
    (vae / "config.json").write_text(config)
    torch.save({"ema_state_dict": Attack(opensora_release / "owned")}, vae / "merged.ckpt")
    refused("tensors")
    assert not (opensora_release / "owned").exists()
    (vae / "merged.ckpt").write_bytes(b"not a torch file")
    refused("tensors")
    (vae / "merged.ckpt").unlink()
    refused("merged.ckpt")
    path = opensora_release / "any93x640x640" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 5}))
    with pytest.raises(ValueError, match=r"missing .*transformer_blocks\.4"):
        load_network(OpenSoraT2V_v1_3, model, TRANSFORMER, torch.float32, strict=True)
    with pytest.raises(ValueError, match="any93x640x640"):
        get_recipe("opensora-plan", str(tmp_path / "nothing"))


# --------------------------------------------------------------------------------------------------
# The adapter


def test_prompts_carry_the_template_and_a_mask(opensora_release, monkeypatch):
    backbone, seen = OpenSoraPlan(str(opensora_release)), []
    encode, tokenizer = OpenSoraPlan.encode_text, make_tokenizer()

    def encode_text(self, pipe, text):
        pipe.tokenizer = lambda text, **options: seen.append(text) or tokenizer(text, **options)
        return encode(self, pipe, text)

    monkeypatch.setattr(OpenSoraPlan, "encode_text", encode_text)
    backbone.encode(["a fox"])
    assert seen == [backbone.negative_prompt, "high quality, high aesthetic, a fox"]
    text, mask = backbone.texts["a fox"]
    assert text.shape == (512, 16) and mask.shape == (512,) and mask.sum() == len(tokenizer(seen[1]).input_ids)


def test_a_text_encoder_in_a_bin_file_is_mapped_and_not_read(opensora_release, monkeypatch):
    """The released file has 51.7 GB; only the encoder is read, in its own precision."""
    folder = opensora_release / "mt5-xxl"
    (weights,) = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    seen, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: seen.append(options) or load(path, **options))
    backbone = OpenSoraPlan(str(opensora_release), dtype=torch.float16)
    backbone.encode(["a fox"])
    assert [(o["mmap"], o["weights_only"]) for o in seen] == [(True, True)]
    assert backbone.texts["a fox"][0].isfinite().all()


def test_schedule_and_sizes():
    levels = OpenSoraPlan.make_levels(OPENSORA_PLAN.scheduler, 50)
    assert [level.t for level in levels[:3]] == [999, 979, 959] and levels[0].alpha == 0
    assert levels[1].alpha ** 2 == pytest.approx(2.0058e-6, rel=1e-3)
    small = CheckedOpenSoraPlan.resize(OPENSORA_PLAN, 256, 320, 29)
    assert small.window == 8 and small.latent == (8, 32, 40)
    with pytest.raises(ValueError, match="32"):
        CheckedOpenSoraPlan.resize(OPENSORA_PLAN, 250, 320, 29)
    with pytest.raises(ValueError, match="93"):
        CheckedOpenSoraPlan.resize(OPENSORA_PLAN, 256, 320, 49)


def test_demo_end_to_end(opensora_release, tmp_path):
    words = f"--backbone opensora-plan --device cpu --model {opensora_release} --output_path {tmp_path / 'out.mp4'}"
    words += " --height 32 --width 64 --window_frames 29 --num_frames 61 --num_inference_steps 2 --csd_iters 1"
    call(*words.split(), "--prompt", "it runs | it jumps")
    frames = frames_of(tmp_path / "out.mp4")
    assert frames.shape[0] == 61 and frames.shape[2] == 2 * frames.shape[1]
    assert (tmp_path / "out.png").exists()
