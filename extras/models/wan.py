"""Wan 2.1: the adapter of diffusers' pipeline."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones import Recipe, to_uint8
from extras.models.checked import Checked, check_channels, from_hub
from syncos import Level, Settings, flow_levels


class Wan(Checked):
    """Wan 2.1 text-to-video, 1.3B or 14B, in diffusers format. Raises ValueError for others.

    A rectified flow. The model treats every window as a separate clip: positions restart at 0. The
    VAE runs in float32.
    """

    prediction = "flow"
    untiled = "Wan's decoder streams and needs no --vae_tiling; leave it out."
    frame_timesteps = True
    negative_prompt = (  # ours, in English; the authors' own, in Chinese, is longer
        "gaudy colours, overexposed, blurred details, subtitles, drawing, grey all over, worst quality, low quality, "
        "jpeg artifacts, ugly, disfigured, deformed limbs, extra fingers, bad hands, bad faces, cluttered background, "
        "crowd, still picture, nothing moves, walking backwards"
    )
    text_length = 512

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        with from_hub(model):
            self.scheduler = self.inspect(model)["scheduler"]

    @staticmethod
    def inspect(model: str) -> dict[str, Any]:
        """Latent shape (C, H, W) at 480 x 832 pixels and scheduler, from three small files."""
        from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

        try:
            index = WanPipeline.load_config(model)
            transformer = WanTransformer3DModel.load_config(model, subfolder="transformer")
            scheduler = UniPCMultistepScheduler.load_config(model, subfolder="scheduler")
        except OSError as error:
            raise ValueError(
                f"{model} is not a Wan pipeline: it is neither a folder with one nor a reachable hub model."
            ) from error
        kinds = {
            "a Wan 2.2 TI2V (expand_timesteps), with a timestep for every token": index.get("expand_timesteps"),
            "a Wan 2.2 A14B (transformer_2), with a second model for low noise": any(index.get("transformer_2") or []),
        }
        for kind, found in kinds.items():
            if found:
                raise ValueError(f"{model} is {kind}; it is not supported. Use a Wan 2.1 text-to-video model.")
        check_channels(model, transformer)
        if "Flow" not in scheduler.get("_class_name", "Flow") and not scheduler.get("use_flow_sigmas"):
            raise ValueError(f"{model}/scheduler is not a flow scheduler (use_flow_sigmas); use Wan's own scheduler.")
        return dict(latent=(transformer["in_channels"], 60, 104), scheduler=scheduler)

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        if height % 16 or width % 16:
            raise ValueError(f"--height and --width must be multiples of 16, got {height} and {width}.")
        if frames % 4 != 1:
            raise ValueError(f"--window_frames must be 4 n + 1, got {frames}.")
        shift = 5.0 if height * width >= 720 * 1280 else 3.0  # diffusers' WanPipeline: 5 for 720p, 3 for 480p
        size = dict(window=(frames - 1) // 4 + 1, latent=(recipe.latent[0], height // 8, width // 8))
        return replace(recipe, **size, scheduler=dict(recipe.scheduler, flow_shift=shift))

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """Euler steps along the flow from pure noise, with the release's shift.

        The release's own solver, UniPC, is second-order.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler

        euler = FlowMatchEulerDiscreteScheduler(shift=scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
        euler.set_timesteps(steps)
        return flow_levels(euler.sigmas.tolist(), euler.timesteps.tolist())

    def load_pipe(self, *parts: str) -> Any:
        from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
        from transformers import UMT5EncoderModel

        from extras.loading import load_network, load_tokenizer

        kinds = dict(text_encoder=UMT5EncoderModel, transformer=WanTransformer3DModel, vae=AutoencoderKLWan)
        made = dict.fromkeys(kinds)
        for name in filter(parts.__contains__, kinds):
            made[name] = load_network(kinds[name], self.model, name, torch.float32 if name == "vae" else self.dtype)
        tokenizer = load_tokenizer(self.model, "tokenizer") if "tokenizer" in parts else None
        return WanPipeline(tokenizer, scheduler=FlowMatchEulerDiscreteScheduler(), **made)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        embedding, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=self.text_length)
        return (embedding[0],)  # L D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if t.ndim == 2:  # the model takes a timestep per token, a 1 x 2 x 2 patch
            t = t.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)  # B S
        flow = self.pipe.transformer(x.transpose(1, 2), t, text, return_dict=False)[0]  # B C f H W
        return flow.transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode latents F x C x H x W to 4(F - 1) + 1 video frames, 8H x 8W x 3 uint8, one by one.

        Decodes latent frames one by one, like the VAE's own `decode`, but keeps only the caches of
        the causal convolutions: memory does not grow with F, and the frames are bit-identical.
        """
        vae, c = self.pipe.vae, self.pipe.vae.config
        if hasattr(vae, "_hf_hook"):  # offload: move to the device first, like `vae.decode`
            vae._hf_hook.pre_forward(vae)
        mean, std = (torch.tensor(x, device=self.device).view(-1, 1, 1, 1) for x in (c.latents_mean, c.latents_std))
        z = vae.post_quant_conv((latents.to(self.device).transpose(0, 1) * std + mean)[None])  # 1 C F H W
        vae.clear_cache()
        cache = vae._feat_map  # this video's own; decoding another video makes a new one
        for piece in z.split(1, dim=2):
            video = vae.decoder(piece, feat_cache=cache, feat_idx=[0])  # 1 3 n H W
            yield from to_uint8(video[0])


WAN = Recipe(
    backbone=Wan,
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    window=21,
    latent=(16, 60, 104),
    scheduler=dict(flow_shift=3.0),
    stride=6,
    settings=Settings(t_min=930),  # alpha/sigma there equals CogVideoX-2B's at 800
    dtype="bfloat16",
    scenario="corgi",
    num_frames=321,  # 81 latent frames, 20 s
    frames_step=4,
    guidance_scale=5.0,
    fps=16,
    seconds={"RTX 4090": 4.8},  # 240 s for 50 steps: github.com/Wan-Video/Wan2.1, README
)
