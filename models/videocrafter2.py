"""VideoCrafter2: its release, one checkpoint of three networks, onto the classes of diffusers and transformers.

Its video network *is* diffusers' UNet3DConditionModel: a table of names does (facts of the official code:
github.com/AILab-CVC/VideoCrafter, 11bcd76). Text encoder and VAE are Stable Diffusion 2's, which diffusers converts.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet3DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from diffusers.models.embeddings import TimestepEmbedding
from huggingface_hub import hf_hub_download
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from models.loading import Parts, check_fit, fill, read_checkpoint

CHECKPOINT = "model.ckpt"
TOKENIZER = "openai/clip-vit-large-patch14"
FPS = 28  # what the network is told, as in the authors' run_text2video.sh; they write the file at 10
RELEASE = dict(  # the configurations: the checkpoint has none
    unet=dict(),  # UNet3DConditionModel's defaults
    vae=dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
    ),
    text_encoder=dict(
        vocab_size=49408,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,  # of 24: "penultimate"
        num_attention_heads=16,
        hidden_act="gelu",
    ),
)
PREFIXES = dict(unet="model.diffusion_model.", vae="first_stage_model.", text_encoder="cond_stage_model.")
UNUSED = re.compile(  # the schedule's buffers, and what of OpenCLIP lies behind the penultimate layer
    r"[^.]+|cond_stage_model\.model\.(logit_scale|text_projection|attn_mask|transformer\.resblocks\.23\..+)"
)
OUTER = {  # official name -> diffusers'
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "fps_embedding.0": "fps_embedding.linear_1",
    "fps_embedding.2": "fps_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "init_attn.0": "transformer_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
INNER = {  # in a ResBlock; the names in transformers and temporal convolutions are the same
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_key(key: str, layers: int) -> str:
    """UNet3DConditionModel's name of a parameter of the official U-Net, which has `layers` ResBlocks a level."""
    for official, name in OUTER.items():
        if key.startswith(official + "."):
            return name + key.removeprefix(official)
    found = re.fullmatch(r"(input_blocks|middle_block|output_blocks)(?:\.(\d+))?\.(\d)\.(.+)", key)
    if not found:
        return key
    side, number, slot, rest = found[1], int(found[2] or 0), int(found[3]), found[4]
    if side == "middle_block":
        layer, slot = divmod(slot, 3)  # ResBlock, spatial and temporal transformer, ResBlock
        block = "mid_block"
    else:
        down = side == "input_blocks"
        block, layer = divmod(number - down, layers + 1)  # on the way down the last is the downsampler, or nothing
        block = f"{'down' if down else 'up'}_blocks.{block}"
    if rest.startswith(("op.", "conv.")):
        return f"{block}.{'down' if rest.startswith('op.') else 'up'}samplers.0.conv.{rest.split('.')[1]}"
    if rest.startswith("temopral_conv."):  # so spelt
        return f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    for official, name in INNER.items():
        rest = rest.replace(official, name)
    return f"{block}.{['resnets', 'attentions', 'temp_attentions'][slot]}.{layer}.{rest}"


# Each of the networks, without memory for its parameters, and the checkpoint's tensors by the names it has for them


def build_unet(state: dict[str, Tensor]) -> tuple[UNet3DConditionModel, dict[str, Tensor]]:
    unet = UNet3DConditionModel(**RELEASE["unet"])
    unet.fps_embedding = TimestepEmbedding(*unet.time_embedding.linear_1.weight.shape[::-1])
    layers = unet.config.layers_per_block
    state = {unet_key(k.removeprefix(PREFIXES["unet"]), layers): v for k, v in state.items()}
    flat = ("transformer_in.proj_in.weight", "transformer_in.proj_out.weight")  # convolutions there, here matrices
    return unet, state | {k: state[k].squeeze(-1) for k in flat if k in state}


def build_vae(state: dict[str, Tensor]) -> tuple[AutoencoderKL, dict[str, Tensor]]:
    vae = AutoencoderKL(**RELEASE["vae"])
    return vae, convert_ldm_vae_checkpoint(state, vae.config)


def build_text_encoder(state: dict[str, Tensor]) -> tuple[CLIPTextModel, dict[str, Tensor]]:
    clip = CLIPTextModel(CLIPTextConfig(**RELEASE["text_encoder"]))
    return clip, {k.removeprefix("text_model."): v for k, v in convert_open_clip_checkpoint(clip, state).items()}


@torch.no_grad()
def load_part(part: str, path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """One of the checkpoint's networks: unet, vae or text_encoder. Raises ValueError if a key is missing or unfit."""
    state = read_checkpoint(path)
    state = state.get("state_dict", state)
    others = tuple(prefix for name, prefix in PREFIXES.items() if name != part)
    state = {k: v for k, v in state.items() if not k.startswith(others) and not UNUSED.fullmatch(k)}
    with init_empty_weights():
        model, fitted = dict(unet=build_unet, vae=build_vae, text_encoder=build_text_encoder)[part](state)

    used = {v.data_ptr() for v in fitted.values()}  # diffusers' converters pass over what they do not know
    unused = [k for k, v in state.items() if v.data_ptr() not in used and ".in_proj_" not in k]  # q, k, v: cut up
    check_fit(str(path), [], unused, [])
    fill(model, fitted, str(path))
    if part == "unet":
        fold_fps(model)
    return torch.nn.Module.to(model, dtype).eval()  # diffusers' own warns of modules to keep in float32, which are none


def fold_fps(unet: UNet3DConditionModel) -> None:
    """The frame rate's embedding is added to the timestep's. It is the same for all inputs, so it goes into a bias.

    In float32, before the weights become halves.
    """
    time, fps = unet.time_embedding.float(), unet.fps_embedding.float()
    time.linear_2.bias += fps(unet.time_proj(torch.tensor([FPS])))[0]
    del unet.fps_embedding


def find_checkpoint(model: str, dry_run: bool = False) -> Path | None:
    """model.ckpt itself, in a folder, or on the hub (dry_run: only asked for); None for a folder in diffusers' format.

    Raises OSError or ValueError if it is none of these.
    """
    path = Path(model)
    if path.is_dir():
        if (path / CHECKPOINT).is_file():
            return path / CHECKPOINT
        if not (path / "unet" / "config.json").is_file():
            raise FileNotFoundError(f"{model} has neither {CHECKPOINT} nor unet/config.json.")
        return None
    return path if path.is_file() else Path(str(hf_hub_download(model, CHECKPOINT, dry_run=dry_run)))


def load_pipe(model: str, dtype: torch.dtype, parts: Sequence[str]) -> Parts:
    """Some parts of the release, or of a folder in diffusers' format: unet (the fps in its bias), vae, text_encoder (23
    layers), tokenizer. The tokenizer is the folder's tokenizer/, if it is a folder that has one, or TOKENIZER.

    Raises OSError or ValueError if something is missing or unfit.
    """
    checkpoint = find_checkpoint(model)
    classes = dict(unet=UNet3DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)

    def load(part: str):
        if part == "tokenizer":
            own = Path(model) / "tokenizer"
            return AutoTokenizer.from_pretrained(str(own) if own.is_dir() else TOKENIZER)
        folder = "unet" if part == "transformer" else part
        if checkpoint:
            return load_part(folder, checkpoint, dtype)
        network, info = classes[folder].from_pretrained(model, subfolder=folder, dtype=dtype, output_loading_info=True)
        check_fit(f"{model}/{folder}", info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"])
        return network

    return Parts.make(load, parts)
