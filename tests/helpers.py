"""What tests share: random tensors, exact denoisers, the command line, processes, tiny models."""

import json
import os
import re
from functools import cache
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

import demo
import syncos as S
from extras import options, runs
from extras.models import videocrafter2

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

ROOT = Path(__file__).parent.parent
PROMPT = "a red fox . it jumps"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed))


def maxdiff(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def randomize(model, std=0.15, seed=0):
    """No parameter at its default: norms, biases and gates count too."""
    generator = rng(seed)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std, generator=generator)
    return model.requires_grad_(False).eval()


# --------------------------------------------------------------------------------------------------
# Noise schedules, and a model whose answers are known in closed form

ABAR = DDIMScheduler(rescale_betas_zero_snr=True).alphas_cumprod  # zero terminal SNR: ABAR[999] = 0


def make_flow(steps=20, shift=3.0):
    """The noise levels of a rectified flow."""
    sigmas = torch.linspace(1, 1 / steps, steps).tolist()
    sigmas = [shift * s / (1 + (shift - 1) * s) for s in sigmas]
    return S.flow_levels([*sigmas, 0.0], [1000 * s for s in sigmas])


class Gaussian:
    """Exact denoiser, E[x0 | x_t], for latents ~ N(float(prompt), std^2). Counts its windows."""

    def __init__(self, levels, std=0.5):
        self.at = {level.t: level for level in levels}
        self.std, self.calls = std, 0

    def denoise(self, x, t, mean):
        _, a, s = self.at[t]
        return mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * mean)

    def __call__(self, latents, t, prompts):
        assert len(latents) == len(prompts) and latents.dtype == torch.float32
        self.calls += len(latents)
        return self.denoise(latents, t, torch.tensor([float(p) for p in prompts]).view(-1, 1, 1, 1, 1))


# --------------------------------------------------------------------------------------------------
# The command line


def settled(*words):
    """The options of `python demo.py words`."""
    return options.settle(demo.make_parser().parse_args([str(w) for w in words]))


def call(*words) -> None:
    """`python demo.py words`, in this process."""
    demo.main(demo.make_parser().parse_args([str(w) for w in words]))


def refusal(capsys, *words) -> str:
    """The one line that `python demo.py words` is refused with."""
    with pytest.raises(SystemExit) as exit:
        call(*words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1
    return error


def stop_at_preview(monkeypatch, *words) -> None:
    """`call`, interrupted at the run's first --preview."""

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--resume"):
        patch.setattr(runs, "preview", interrupt)
        call(*words)


def frames_of(path):
    return np.stack([frame for frame in imageio.get_reader(path)])  # list() would ask for an endless length


def run_processes(work, world: int, folder) -> list[int]:
    """work(rank) in each of `world` forked processes that know each other; their exit codes."""
    children = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
                work(rank)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


# --------------------------------------------------------------------------------------------------
# Tiny pipelines

WORDS = "a red fox it runs jumps sleeps and looks around .".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_pipeline(rotary: bool, **transformer) -> CogVideoXPipeline:
    torch.manual_seed(0)
    pipe = CogVideoXPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        vae=AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
            sample_height=64, sample_width=64, scaling_factor=0.7,  # tiles are half of this: 4 x 4 latents
        ),
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
            text_embed_dim=16, num_layers=2, sample_width=4, sample_height=2, sample_frames=17, max_text_seq_length=12,
            use_rotary_positional_embeddings=rotary, **transformer,
        ),
        scheduler=CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
            snr_shift_scale=3.0,
        ),
    )  # fmt: skip
    randomize(pipe.transformer)
    for block in pipe.transformer.transformer_blocks:  # sharp attention, or positions would hardly matter
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            norm.weight += 3
    randomize(pipe.text_encoder)
    return pipe.to("cpu")


def make_wan() -> WanPipeline:
    torch.manual_seed(0)
    text = UMT5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipe = WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=UMT5EncoderModel(text),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.7, 1.0],
        ),
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=8,
            ffn_dim=16, num_layers=2,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )  # fmt: skip
    randomize(pipe.transformer)
    randomize(pipe.text_encoder)
    return pipe


# --------------------------------------------------------------------------------------------------
# Golden data: inputs, weights and outputs of the official code (tests/data)


class Attack:
    """A pickle of this makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@cache
def golden(name):
    """Tensors of a golden file, and its metadata where that is JSON."""
    with safe_open(Path(__file__).parent / "data" / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, {k: json.loads(v) for k, v in file.metadata().items() if v[0] == "{"}


def make_golden(kind, name, prefix="sd.", config="config"):
    """A model of a class of extras/ports with configuration and weights of a golden file."""
    tensors, metadata = golden(name)
    model = kind.from_config(metadata[config])
    model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return model.requires_grad_(False)


# --------------------------------------------------------------------------------------------------
# VideoCrafter2's text encoder and VAE, tiny, by their official names

TINY_RELEASE = dict(
    unet=golden("vc2_tiny")[1]["config"],
    vae=dict(videocrafter2.RELEASE["vae"], block_out_channels=[8, 8, 16, 16], layers_per_block=1, norm_num_groups=4),
    text_encoder=dict(
        videocrafter2.RELEASE["text_encoder"], vocab_size=16, hidden_size=24, intermediate_size=48,
        num_attention_heads=2, bos_token_id=2, eos_token_id=1,
    ),
)  # fmt: skip


class OpenClip(nn.Module):
    """OpenCLIP's text encoder, built from torch's own layers: all 24 of them, narrow."""

    NAMES = dict(
        embed="token_embedding", positions="positional_embedding", norm="ln_final", layers="transformer.resblocks",
        self_attn="attn", linear1="mlp.c_fc", linear2="mlp.c_proj", norm1="ln_1", norm2="ln_2",
    )  # fmt: skip

    def __init__(self, vocabulary=16, width=24):
        super().__init__()
        layer = lambda: nn.TransformerEncoderLayer(width, 2, 48, 0.0, "gelu", batch_first=True, norm_first=True)  # noqa: E731
        self.embed, self.positions = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(77, width))
        self.layers, self.norm = nn.ModuleList(layer() for _ in range(24)), nn.LayerNorm(width)

    def penultimate(self, ids):
        """The output of the last layer but one, which VideoCrafter2 reads."""
        x, mask = self.embed(ids) + self.positions, torch.full((77, 77), -torch.inf).triu(1)
        for layer in self.layers[:-1]:
            x = layer(x, mask)
        return self.norm(x)

    def official_state(self):
        state = {".".join(self.NAMES.get(w, w) for w in k.split(".")): v for k, v in self.state_dict().items()}
        state |= {"text_projection": torch.zeros(24, 24), "logit_scale": torch.ones(())}
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
