"""VideoCrafter2."""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backbones.base import Backbone, Recipe, to_uint8
from syncos import Level, Settings, diffusion_levels

SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
)


class VideoCrafter2(Backbone):
    """VideoCrafter2: the release's model.ckpt (hub id, folder or file), or a folder in diffusers' format.

    A U-Net that predicts eps. One latent frame is one video frame, so there is nothing causal.
    """

    prediction = "epsilon"
    scheduler = SCHEDULER
    untiled = "VideoCrafter2, which decodes frame by frame"
    text_length = 77

    @staticmethod
    def measure(model: str) -> dict[str, Any]:
        """Nothing, for neither a checkpoint nor its network says a window or a size; but it must be there."""
        from models.videocrafter2 import find_checkpoint

        try:
            find_checkpoint(model, dry_run=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{model} is no VideoCrafter2: neither a model.ckpt, nor a folder with one or with unet/, nor a model "
                "of the hub within reach."
            ) from error
        return {}

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        if height % 64 or width % 64:
            raise ValueError(f"--height and --width must be multiples of 64, got {height} and {width}.")
        return replace(recipe, window=frames, latent=(recipe.latent[0], height // 8, width // 8))

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """The authors' uniform walk, t = 981, 961, ..., 1, that neither starts at pure noise nor ends quite clean.

        They scale the signal besides (`use_scale`): x_t = s(t) sqrt(abar) x0 + sqrt(1 - abar) eps, s falling from 1 at
        t = 0 to 0.7 at t = 399, and 0.7 from there. So alpha^2 + sigma^2 < 1; nothing in syncos.py minds.
        """
        from diffusers import DDIMScheduler

        if steps > 999:
            raise ValueError(f"VideoCrafter2's walk has at most 999 steps, got {steps}.")
        ddim = DDIMScheduler(**scheduler)
        ddim.set_timesteps(steps)
        levels = diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))
        scale = lambda t: 1 - 0.3 * min(max(t, 0), 399) / 399  # noqa: E731
        return [Level(t, scale(t) * alpha, sigma) for t, alpha, sigma in levels]

    def load_pipe(self, *parts: str) -> Any:
        from models.videocrafter2 import load_pipe

        return load_pipe(self.model, self.dtype, parts)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        """The penultimate layer's states of 77 tokens, no mask; OpenCLIP pads with 0, a word to other tokenizers."""
        ids = pipe.tokenizer(text, verbose=False).input_ids
        if lost := ids[self.text_length - 1 : -1]:
            unseen = pipe.tokenizer.decode(lost)
            warnings.warn(f'The model reads {self.text_length} tokens, so it does not see "{unseen}".', stacklevel=2)
            ids = ids[: self.text_length - 1] + ids[-1:]
        ids = torch.tensor([ids + [0] * (self.text_length - len(ids))], device=self.device)
        return (pipe.text_encoder(ids).last_hidden_state[0],)  # 77 D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipe.transformer(x.transpose(1, 2), t, text, return_dict=False)[0].transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as F video frames, each 8H x 8W x 3 uint8, one at a time."""
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
    settings=Settings(t_min=918),
    paper_t_min=918,  # alpha/sigma there, 0.076, is CogVideoX-2B's at 800; 4 of 50 steps above
    dtype="float16",
    scenario="corgi",
    num_frames=64,  # 4x the base clip
    frames_per_latent=1,
    frames_step=1,
    guidance_scale=12.0,
    fps=10,
)
