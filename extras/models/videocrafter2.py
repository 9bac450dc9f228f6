"""VideoCrafter2: adapter, and loader of its release into diffusers and transformers.

The release is one checkpoint with three networks. The video network *is* diffusers'
UNet3DConditionModel, so a table of names is enough (facts of the official code:
github.com/AILab-CVC/VideoCrafter, 11bcd76). Text encoder and VAE are those of Stable Diffusion 2,
which diffusers converts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from backbones import Recipe, to_uint8
from extras.models.checked import Checked
from syncos import Level, Settings, diffusion_levels

SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
)


def signal_scale(t: int) -> float:
    """s(t) of the authors' `use_scale`: x_t = s(t) sqrt(abar) x0 + sqrt(1 - abar) eps. It falls
    from 1 at t = 0 to 0.7 at t = 399 and stays there."""
    return 1 - 0.3 * min(max(t, 0), 399) / 399


class VideoCrafter2(Checked):
    """VideoCrafter2: the release's model.ckpt (hub id, folder or file), or a diffusers folder.

    A U-Net that predicts eps. One latent frame is one video frame, so nothing is causal.
    """

    prediction = "epsilon"
    scheduler = SCHEDULER
    untiled = "VideoCrafter2 decodes frame by frame and needs no --vae_tiling; leave it out."
    text_length = 77

    @staticmethod
    def inspect(model: str) -> dict[str, Any]:
        """Check that the model exists. Returns nothing: no file states a window or a size."""
        try:
            find_checkpoint(model, dry_run=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{model} is not a VideoCrafter2: it is neither a model.ckpt, nor a folder with one or with unet/, nor "
                "a reachable hub model."
            ) from error
        return {}

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        if height % 64 or width % 64:
            raise ValueError(f"--height and --width must be multiples of 64, got {height} and {width}.")
        return replace(recipe, window=frames, latent=(recipe.latent[0], height // 8, width // 8))

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """The authors' uniform timesteps, t = 981, 961, ..., 1, which start below pure noise and
        end above zero noise.

        With the signal's scale alpha^2 + sigma^2 < 1; nothing in syncos.py needs it to be 1.
        """
        from diffusers import DDIMScheduler

        if steps > 999:
            raise ValueError(f"VideoCrafter2 allows at most 999 steps, got {steps}.")
        ddim = DDIMScheduler(**scheduler)
        ddim.set_timesteps(steps)
        levels = diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))
        return [Level(t, signal_scale(t) * alpha, sigma) for t, alpha, sigma in levels]

    def load_pipe(self, *parts: str) -> Any:
        return load_pipe(self.model, self.dtype, parts)

    def check_lengths(self, tokenizer: Any, prompts: Sequence[str]) -> None:
        self.text_length = min(self.text_length, tokenizer.model_max_length)  # less in a small model
        super().check_lengths(tokenizer, prompts)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        """The penultimate layer's states of `text_length` tokens, unmasked. OpenCLIP pads with 0, a
        word in other tokenizers."""
        ids = pipe.tokenizer(text, truncation=True, max_length=self.text_length).input_ids
        ids = torch.tensor([ids + [0] * (self.text_length - len(ids))], device=self.device)
        return (pipe.text_encoder(ids).last_hidden_state[0],)  # 77 D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipe.transformer(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode latents F x C x H x W to F video frames, each 8H x 8W x 3 uint8, one at a time."""
        vae = self.pipe.vae
        for z in latents.to(self.device, self.dtype).split(1):  # 1 C H W
            frame = vae.decode(z / vae.config.scaling_factor, return_dict=False)[0]  # 1 3 8H 8W
            yield from to_uint8(frame.transpose(0, 1))


VIDEOCRAFTER2 = Recipe(
    backbone=VideoCrafter2,
    model="VideoCrafter/VideoCrafter2",
    window=16,
    latent=(4, 40, 64),
    scheduler=SCHEDULER,
    stride=4,
    settings=Settings(t_min=918),  # alpha/sigma there, 0.076, equals CogVideoX-2B's at 800; 4 of 50 steps above
    dtype="float16",
    scenario="corgi",
    num_frames=64,  # 4x the base clip
    frames_per_latent=1,
    frames_step=1,
    guidance_scale=12.0,
    fps=10,
)


# --------------------------------------------------------------------------------------------------
# Loading

CHECKPOINT = "model.ckpt"
TOKENIZER = "openai/clip-vit-large-patch14"
FPS = 28  # the network's input, as in the authors' run_text2video.sh; they write the file at 10
RELEASE = dict(  # the configurations, which the checkpoint lacks
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
UNUSED = re.compile(  # the schedule's buffers, and OpenCLIP's parts after the penultimate layer
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
    """UNet3DConditionModel's name for an official parameter; `layers` ResBlocks per level."""
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
    if rest.startswith("temopral_conv."):  # sic
        return f"{block}.temp_convs.{layer}.{rest.removeprefix('temopral_conv.')}"
    for official, name in INNER.items():
        rest = rest.replace(official, name)
    return f"{block}.{['resnets', 'attentions', 'temp_attentions'][slot]}.{layer}.{rest}"


# Each function creates a network without memory for its parameters, and renames the checkpoint's
# tensors to fit.


def build_unet(state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import UNet3DConditionModel
    from diffusers.models.embeddings import TimestepEmbedding

    unet = UNet3DConditionModel(**RELEASE["unet"])
    unet.fps_embedding = TimestepEmbedding(*unet.time_embedding.linear_1.weight.shape[::-1])
    layers = unet.config.layers_per_block
    state = {unet_key(k.removeprefix(PREFIXES["unet"]), layers): v for k, v in state.items()}
    flat = ("transformer_in.proj_in.weight", "transformer_in.proj_out.weight")  # convolutions there, matrices here
    return unet, state | {k: state[k].squeeze(-1) for k in flat if k in state}


def build_vae(state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = AutoencoderKL(**RELEASE["vae"])
    return vae, convert_ldm_vae_checkpoint(state, vae.config)


def build_text_encoder(state: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextModel(CLIPTextConfig(**RELEASE["text_encoder"]))
    own, prefix = clip.state_dict(), "text_model."  # which transformers 5.0 still has in its keys
    converted = convert_open_clip_checkpoint(clip, state)
    return clip, {k if k in own else k.removeprefix(prefix): v for k, v in converted.items()}


@torch.no_grad()
def load_part(part: str, path: Path, dtype: torch.dtype) -> nn.Module:
    """Load unet, vae or text_encoder. Raises ValueError for a missing or unfit key."""
    from accelerate import init_empty_weights

    from extras.loading import check_fit, fill, read_checkpoint

    state = read_checkpoint(path)
    state = state.get("state_dict", state)
    others = tuple(prefix for name, prefix in PREFIXES.items() if name != part)
    state = {k: v for k, v in state.items() if not k.startswith(others) and not UNUSED.fullmatch(k)}
    with init_empty_weights():
        model, fitted = dict(unet=build_unet, vae=build_vae, text_encoder=build_text_encoder)[part](state)

    used = {v.data_ptr() for v in fitted.values()}  # diffusers' converters skip unknown keys
    unused = [k for k, v in state.items() if v.data_ptr() not in used and ".in_proj_" not in k]  # q, k, v: split
    check_fit(str(path), [], unused, [])
    fill(model, fitted, str(path))
    if part == "unet":
        fold_fps(model)
    return nn.Module.to(model, dtype).eval()  # diffusers' own warns about float32 modules, but there are none


def fold_fps(unet: nn.Module) -> None:
    """Fold the frame rate's embedding, which is added to the timestep's, into a bias: it is the
    same for all inputs.

    Done in float32, before the weights become half precision.
    """
    time, fps = unet.time_embedding.float(), unet.fps_embedding.float()
    time.linear_2.bias += fps(unet.time_proj(torch.tensor([FPS])))[0]
    del unet.fps_embedding


def find_checkpoint(model: str, dry_run: bool = False) -> Path | None:
    """Find model.ckpt: a file, in a folder or on the hub (dry_run: only check). None for a folder
    in diffusers' format.

    Raises OSError or ValueError if it is none of these.
    """
    from huggingface_hub import hf_hub_download

    path = Path(model)
    if path.is_dir():
        if (path / CHECKPOINT).is_file():
            return path / CHECKPOINT
        if not (path / "unet" / "config.json").is_file():
            raise FileNotFoundError(f"{model} has neither {CHECKPOINT} nor unet/config.json.")
        return None
    return path if path.is_file() else Path(str(hf_hub_download(model, CHECKPOINT, dry_run=dry_run)))


def load_pipe(model: str, dtype: torch.dtype, parts: Sequence[str]) -> Any:
    """Load some parts of the release, or of a folder in diffusers' format: unet (the fps in its
    bias), vae, text_encoder (23 layers), tokenizer. The tokenizer is the folder's own tokenizer/ if
    it has one, else TOKENIZER.

    Raises OSError or ValueError if something is missing or does not fit.
    """
    from diffusers import AutoencoderKL, UNet3DConditionModel
    from transformers import CLIPTextModel

    from extras.loading import Parts, load_network, load_tokenizer

    checkpoint = find_checkpoint(model)
    kinds = dict(unet=UNet3DConditionModel, vae=AutoencoderKL, text_encoder=CLIPTextModel)

    def load(part: str) -> Any:
        if part == "tokenizer":
            own = (Path(model) / "tokenizer").is_dir()
            return load_tokenizer(model, "tokenizer") if own else load_tokenizer(TOKENIZER, "")
        folder = "unet" if part == "transformer" else part
        if checkpoint:
            return load_part(folder, checkpoint, dtype)
        return load_network(kinds[folder], model, folder, dtype, strict=True)

    return Parts.make(load, parts)
