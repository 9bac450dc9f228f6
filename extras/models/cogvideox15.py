"""CogVideoX-1.5 text-to-video: CogVideoX whose tokens hold two latent frames each.

A clip of 81 video frames is 21 latent frames, an odd number. To make pairs, training put a copy of
the first before it, with noise of its own. Any frame of a long video may begin a window. So each
latent frame has such a noisy copy here, in C more channels, and only that of a window's first frame
enters the network. Two plainer ways go wrong where a window begins (tests/test_cogvideox15.py):

    windows of 22 frames of the video   one window equals diffusers' pipeline, but the network makes
                                        the first two frames of every window equal: a long video
                                        freezes wherever a window begins
    windows of 21, the noisy first      one noise counts twice, so the estimates of first frames are
    frame entered twice                 too sure, and stay noisy
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import diffusers as D
import numpy as np
import torch
from torch import Tensor

from backbones import COGVIDEOX_5B
from extras.models.checked import CheckedCogVideoX


class CogVideoX15(CheckedCogVideoX):
    """CogVideoX-1.5 text-to-video in diffusers format. Latents have 2 C channels: the frames, then
    their copies. Raises ValueError for other models, also image-to-video 1.5."""

    frame_timesteps = False  # two frames share a token and its timestep
    pairs = True

    @classmethod
    def read_configs(cls, model: str) -> tuple[Mapping, Mapping]:
        """With the size of clips, 1360 x 768 in the release, where the configuration has the reach
        of the positions: 300 x 300 or 96 x 170 latents."""
        c, scheduler = super().read_configs(model)
        H, W = c["sample_height"], c["sample_width"]
        if H >= 96 and W >= 170:
            H, W = 96, 170
        wrong = {
            "ofs_embed_dim, as image-to-video models have it": c.get("ofs_embed_dim"),
            f"patch_size_t = {c['patch_size_t']}, not pairs of latent frames": c["patch_size_t"] != 2,
            f"clips of {c['sample_frames']} video frames, not 8 n + 1": c["sample_frames"] % 8 != 1,
            f"{8 * W} x {8 * H} pixels, but was trained for 1360 x 768": H > 96 or W > 170,
        }
        for what, found in wrong.items():
            if found:
                raise ValueError(f"{model} has {what}; use the released CogVideoX-1.5 text-to-video model.")
        return dict(c, sample_height=H, sample_width=W), scheduler

    @classmethod
    def inspect(cls, model: str) -> dict[str, Any]:
        found = super().inspect(model)
        C, H, W = found["latent"]
        return found | dict(latent=(2 * C, H, W))

    def predict_x0(self, latents: Tensor, t: float, prompts: list[str]) -> Tensor:
        """The contract, for latents B x f x 2C x H x W, f odd. A copy that did not enter gets the
        estimate of its frame, since both show the same."""
        frames, copies = latents.chunk(2, dim=2)  # B f C H W each
        x0 = super().predict_x0(torch.cat([copies[:, :1], frames], 1), t, prompts)  # B 1+f C H W
        return torch.cat([x0[:, 1:], torch.cat([x0[:, :1], x0[:, 2:]], 1)], 2)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """As for CogVideoX, without the copies."""
        return super().decode(latents.chunk(2, dim=1)[0])


def is_cogvideox15(model: str) -> bool:
    """Does its configuration say that latent frames are packed? False if there is none."""
    try:
        config = D.CogVideoXTransformer3DModel.load_config(model, subfolder="transformer")
    except OSError:
        return False
    return bool(config.get("patch_size_t"))


COGVIDEOX_15 = replace(
    COGVIDEOX_5B,
    backbone=CogVideoX15,
    model="zai-org/CogVideoX1.5-5B",
    window=21,
    latent=(32, 96, 170),  # 16 channels and the copies'
    stride=6,
    num_frames=321,  # 81 latent frames, 20 s
    fps=16,
    seconds={"A100": 20, "H100": 11},  # 1000 and 550 s for 50 steps of 81 frames: github.com/zai-org/CogVideo, README
)
