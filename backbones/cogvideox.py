"""CogVideoX 2B (sincos positions) and 5B (rotary), and the embedded tiny model."""

import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.mkldnn import to_mkldnn

from backbones.base import Backbone, Recipe, to_uint8
from syncos import Level, Settings, diffusion_levels


class CogVideoX(Backbone):
    """Any CogVideoX text-to-video pipeline in diffusers format. Raises ValueError if the model is none, or is a 1.5.

    Every window is a clip of its own to the model: positions restart at 0.
    """

    frame_timesteps = True
    rotary = None

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.config, self.scheduler = self.read_configs(model)
        self.prediction = self.scheduler["prediction_type"]

    @staticmethod
    def read_configs(model: str) -> tuple[Mapping, Mapping]:
        """The transformer's configuration and the scheduler's."""
        from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

        try:
            transformer = CogVideoXTransformer3DModel.load_config(model, subfolder="transformer")
            scheduler = CogVideoXDDIMScheduler.load_config(model, subfolder="scheduler")
        except OSError as error:
            raise ValueError(
                f"{model} is no CogVideoX pipeline: neither a folder with one nor a model of the hub within reach."
            ) from error
        if transformer.get("patch_size_t"):
            raise ValueError(
                f"{model} is a CogVideoX-1.5 (patch_size_t = {transformer['patch_size_t']}), which packs latent frames "
                "in pairs; that is not supported, use CogVideoX 2B or 5B."
            )
        return transformer, scheduler

    @staticmethod
    def measure(model: str) -> dict[str, Any]:
        """Window (latent frames), latent shape (C, H, W) and scheduler of a model, from two small files."""
        c, scheduler = CogVideoX.read_configs(model)
        window = (c["sample_frames"] - 1) // c["temporal_compression_ratio"] + 1
        latent = (c["in_channels"], c["sample_height"], c["sample_width"])
        return dict(window=window, latent=latent, scheduler=scheduler)

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing: the walk starts at pure noise, t = 999, where alpha is exactly 0."""
        from diffusers import CogVideoXDDIMScheduler

        ddim = CogVideoXDDIMScheduler.from_config(scheduler, timestep_spacing="trailing")
        ddim.set_timesteps(steps)
        return diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))

    def load_pipe(self, *parts: str) -> Any:
        from diffusers import CogVideoXPipeline

        from models.cogvideox import take_frame_timesteps

        absent = {"tokenizer", "text_encoder", "transformer", "vae"} - set(parts)
        pipe = CogVideoXPipeline.from_pretrained(self.model, dtype=self.dtype, **dict.fromkeys(absent))
        if "transformer" in parts:
            take_frame_timesteps(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if self.tiling:
            self.pipe.vae.enable_tiling()
        if not decoder_only and self.pipe.transformer.config.use_rotary_positional_embeddings:
            c, scale = self.pipe.transformer.config, self.pipe.vae_scale_factor_spatial
            frames = (c.sample_frames - 1) // c.temporal_compression_ratio + 1  # of one window
            self.rotary = self.pipe._prepare_rotary_positional_embeddings(
                c.sample_height * scale, c.sample_width * scale, frames, self.device
            )

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        length = self.config["max_text_seq_length"]
        embedding, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=length)
        return (embedding[0],)  # L D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipe.transformer(x, text, t.flatten(), image_rotary_emb=self.rotary, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames (F odd), each 8H x 8W x 3 uint8, one at a time.

        Memory does not grow with F: the VAE gets the pieces that its own `decode` would make (2 latent frames, at first
        3), and the caches of its causal convolutions carry over. Equal to decoding in one go, tiled or not.
        """
        vae, caches = self.pipe.vae, deque()  # a cache for each tile, in their order
        z = latents.transpose(0, 1)[None].to(self.device, self.dtype) / vae.config.scaling_factor  # 1 C F H W
        F, n, forward = len(latents), vae.num_latent_frames_batch_size, vae.decoder.forward
        first = min(n + F % n, F)

        for piece in z.split([first] + [n] * ((F - first) // n), dim=2):
            fresh = not caches

            def go_on(sample, conv_cache=None, fresh=fresh):
                frames, cache = forward(sample, conv_cache=None if fresh else caches.popleft())
                caches.append(cache)
                return frames, cache

            vae.decoder.forward = go_on
            try:
                video = vae.decode(piece, return_dict=False)[0]  # 1 3 n H W
            finally:
                vae.decoder.forward = forward
            yield from to_uint8(video[0])


class Tiny(CogVideoX):
    """The embedded model (tiny/): a real CogVideoX, small, that knows the words of its little world and no others."""

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if self.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            self.pipe.vae.decoder = to_mkldnn(self.pipe.vae.decoder)  # by itself torch takes small Conv3ds the slow way

    def encode(self, prompts: Sequence[str]) -> None:
        tokenizer = self.load_pipe("tokenizer").tokenizer
        words = dict.fromkeys(
            w for p in prompts for w, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(p)
        )
        if unknown := [w for w in words if w.lower() not in tokenizer.get_vocab()]:
            known = sorted(w for w in tokenizer.get_vocab() if w.isalpha())
            warnings.warn(
                f"The tiny model does not know {', '.join(unknown)}; it knows {', '.join(known)}.", stacklevel=2
            )
        super().encode(prompts)


SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
)
COGVIDEOX_2B = Recipe(
    backbone=CogVideoX,
    model="zai-org/CogVideoX-2b",
    window=13,
    latent=(16, 60, 90),
    scheduler=dict(SCHEDULER, snr_shift_scale=3.0),
    settings=Settings(stride=4),
    dtype="float16",
    scenario="corgi",
)
COGVIDEOX_5B = replace(
    COGVIDEOX_2B,
    model="zai-org/CogVideoX-5b",
    scheduler=dict(SCHEDULER, snr_shift_scale=1.0),
    dtype="bfloat16",
)
TINY = Recipe(
    backbone=Tiny,
    model=str(Path(__file__).parents[1] / "tiny" / "checkpoint"),
    window=13,
    latent=(8, 8, 8),
    scheduler=dict(SCHEDULER, snr_shift_scale=3.0),
    settings=Settings(stride=4, t_min=300, csd_iters=5, csd_lr=1.0),  # ours: small latents decide identity at lower t
    dtype="float32",
    scenario="tiny-star",
    num_inference_steps=25,  # ours: 50 are not told from it (measure/README.md)
    guidance_scale=4.0,  # ours: cleaner pictures than 6
    fps=16,
    needs_gpu=False,
    window_batch=5,
    captions=True,
)
