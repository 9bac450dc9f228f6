"""Folders of tiny models with random weights, laid out like the released ones."""

import json
import os

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import (
    TINY_RELEASE,
    OpenClip,
    golden,
    make_golden,
    make_pipeline,
    make_tokenizer,
    make_wan,
    official_vae_state,
    randomize,
)
from transformers import MT5Config, MT5EncoderModel

from extras.models import videocrafter2
from extras.ports.opensora_plan import OpenSoraT2V_v1_3, WFVAEDecoder

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # a GPU is used only where somebody says so
torch.set_num_threads(1)  # the tensors are tiny: more threads only get in each other's way,
os.environ["OMP_NUM_THREADS"] = "1"  # also in programs that tests start


def pytest_collection_modifyitems(items):
    """The longest first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.name not in ("test_runs_from_a_clean_kernel", "test_torchrun"))


@pytest.fixture(params=["none", "model", "sequential"])
def offload(request, monkeypatch):
    """With the CPU as the device, which diffusers calls cpu:0; for sequential offload that is not
    the CPU."""
    hook = accelerate.cpu_offload
    monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: hook(model, "cpu", **options))
    return request.param


# --------------------------------------------------------------------------------------------------
# CogVideoX and Wan: folders as diffusers' save_pretrained writes them


@pytest.fixture(scope="session")
def sincos_folder(tmp_path_factory):
    """For tests of the program, which treats both kinds alike."""
    folder = tmp_path_factory.mktemp("sincos")
    make_pipeline(rotary=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rotary_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rotary")
    make_pipeline(rotary=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def cogvideox15_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cogvideox15")
    make_pipeline(rotary=True, patch_size_t=2, patch_bias=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["sincos", "rotary"])
def pipeline_folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def any_method(sincos_folder, tmp_path):
    """Options of a small run of the random pipeline: 33 frames, 9 latent frames, 3 windows, 2
    events."""
    words = "--backbone cogvideox --device cpu --num_frames 33 --num_inference_steps 4 --stride 2".split()
    words += ["--model", sincos_folder, "--output_path", str(tmp_path / "video.mp4")]
    return [*words, "--prompt", "it runs | it jumps", "--global_prompt", "a red fox ."]


@pytest.fixture
def base(any_method):
    """The same, with options that only SynCoS takes."""
    return ["--csd_iters", "2", "--t_min", "300", *any_method]


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    make_wan().save_pretrained(folder)
    return str(folder)


# --------------------------------------------------------------------------------------------------
# Open-Sora Plan: the networks of the golden data


@pytest.fixture(scope="session")
def transformer():
    return make_golden(OpenSoraT2V_v1_3, "dit_tiny")


@pytest.fixture(scope="session")
def decoder():
    return make_golden(WFVAEDecoder, "vae_tiny", "sd.decoder.")


@pytest.fixture(scope="session")
def decoder_state(decoder):
    """A state like the release's: an encoder, an earlier decoder, then the decoder to use."""
    state = {"encoder.conv_in.conv.weight": torch.zeros(2, 2)}
    state |= {f"decoder.{k}": torch.full_like(v, 9.0) for k, v in decoder.state_dict().items()}
    state |= {k: v for k, v in golden("vae_tiny")[0].items() if k.startswith("buf.")}
    state["decoder.inverse_wavelet_tranform_l1.aa"] = torch.ones(2, 2)
    return state | {f"module.decoder.{k}": v for k, v in decoder.state_dict().items()}


@pytest.fixture
def opensora_release(tmp_path, transformer, decoder_state):
    folder = tmp_path / "any93x640x640"
    transformer.save_pretrained(folder, max_shard_size="200KB")
    extra = dict(decay=0.9999, update_after_step=0, use_ema_warmup=False)  # keys of the release that no class takes
    config = json.loads((folder / "config.json").read_text()) | golden("dit_tiny")[1]["config"] | extra
    (folder / "config.json").write_text(json.dumps(config))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps(golden("vae_tiny")[1]["config"]))
    torch.save({"ema_state_dict": decoder_state}, tmp_path / "vae" / "merged.ckpt")
    text = MT5EncoderModel(MT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    text.save_pretrained(tmp_path / "mt5-xxl")
    make_tokenizer().save_pretrained(tmp_path / "mt5-xxl")
    return tmp_path


# --------------------------------------------------------------------------------------------------
# VideoCrafter2: one checkpoint of three networks


@pytest.fixture(scope="session")
def vae():
    return randomize(AutoencoderKL(**TINY_RELEASE["vae"]), 0.2)


@pytest.fixture(scope="session")
def clip():
    return randomize(OpenClip(), 0.3)


@pytest.fixture(scope="session")
def videocrafter2_state(vae, clip):
    """All that the official model.ckpt holds: three networks and the schedule's buffers."""
    unet = {k.removeprefix("sd."): v.float() for k, v in golden("vc2_tiny")[0].items() if k.startswith("sd.")}
    buffers = dict(betas=torch.zeros(1000), scale_arr=torch.ones(1400))
    return unet | official_vae_state(vae) | clip.official_state() | buffers


@pytest.fixture
def videocrafter2_release(tmp_path, videocrafter2_state, monkeypatch):
    """The release's sizes are the program's; here they are those of the tiny networks."""
    for part, config in TINY_RELEASE.items():
        monkeypatch.setitem(videocrafter2.RELEASE, part, config)
    torch.save({"state_dict": videocrafter2_state}, tmp_path / "model.ckpt")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "</s>"  # like CLIP's, and unlike OpenCLIP's 0
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path
