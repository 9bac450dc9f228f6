"""Open-Sora Plan v1.3."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from backbones.base import Backbone, Recipe, to_uint8
from syncos import Level, Settings, diffusion_levels

SCHEDULER = dict(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
)


class OpenSoraPlan(Backbone):
    """Open-Sora Plan v1.3, by hub id or from a folder laid out like LanguageBind/Open-Sora-Plan-v1.3.0.

    The text encoder is google/mt5-xxl's, or the folder's own if it has an mt5-xxl/.
    """

    prediction = "v_prediction"
    scheduler = SCHEDULER
    untiled = "Open-Sora Plan, whose decoder streams"
    frame_timesteps = True
    positive = "high quality, high aesthetic, {}"  # the authors' templates; tokens are the same without line breaks
    negative_prompt = (
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    text_length = 512

    @staticmethod
    def measure(model: str) -> dict[str, Any]:
        """Window (latent frames) and latent shape (C, H, W) of a model, from its configuration."""
        from models.opensora_plan import TRANSFORMER, OpenSoraT2V_v1_3

        try:
            c = OpenSoraT2V_v1_3.load_config(model, subfolder=TRANSFORMER)
        except OSError as error:
            raise ValueError(f"{model} is no Open-Sora Plan v1.3: it has no {TRANSFORMER}/config.json.") from error
        height, width = np.min(c["sample_size_h"]), np.max(c["sample_size_w"])  # a number, or the training's range
        return dict(window=c["sample_size_t"], latent=(c["in_channels"], int(height), int(width)))

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        if height % 32 or width % 32:
            raise ValueError(f"--height and --width must be multiples of 32, got {height} and {width}.")
        if frames not in (29, 45, 61, 77, 93):
            raise ValueError(f"--window_frames must be 29, 45, 61, 77 or 93, got {frames}.")
        return replace(recipe, window=(frames - 1) // 4 + 1, latent=(recipe.latent[0], height // 8, width // 8))

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing, from pure noise; the authors sample with EulerAncestral, the paper with DDIM."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler(**scheduler)
        ddim.set_timesteps(steps)
        return diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))

    def load_pipe(self, *parts: str) -> Any:
        from models.opensora_plan import load_pipe

        return load_pipe(self.model, self.dtype, parts)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor, Tensor]:
        text = text if text == self.negative_prompt else self.positive.format(text)
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).to(self.device)
        output = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.last_hidden_state[0].to(self.dtype), tokens.attention_mask[0].bool()  # L D, L

    def denoise(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.pipe.transformer(x, t, text, mask)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames, each 8H x 8W x 3 uint8, one at a time."""
        for video in self.pipe.vae.decode(latents.transpose(0, 1)[None].to(self.device, self.dtype)):
            yield from to_uint8(video[0])


OPENSORA_PLAN = Recipe(
    backbone=OpenSoraPlan,
    model="LanguageBind/Open-Sora-Plan-v1.3.0",
    window=24,
    latent=(8, 44, 80),
    scheduler=SCHEDULER,
    settings=Settings(stride=6),
    dtype="float16",
    scenario="corgi",
    num_frames=357,  # 90 latent frames, the paper's 20 s
    frames_step=4,
    guidance_scale=7.5,
    fps=18,
)
