"""CogVideoX with a timestep for every latent frame; diffusers' transformer has one a clip.

Its embedded timesteps go to three kinds of norms and nowhere else. They get those of all frames, B f x D instead of
B x D, and each frame's tokens are a sample of their own to the norm.
"""

from diffusers import CogVideoXTransformer3DModel
from diffusers.models.normalization import AdaLayerNorm, CogVideoXLayerNormZero
from torch import Tensor


class FrameLayerNormZero(CogVideoXLayerNormZero):
    def forward(self, video: Tensor, text: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of the video (B, S, D) and of the text (B, L, D), temb (B n, D), n 1 or the frames -> both, and gates.

        The text's tokens, which have no frame, are told the middle frame's timestep. [ours]
        """
        B, n = len(video), len(temb) // len(video)
        if n == 1:
            return super().forward(video, text, temb)
        frames = video.unflatten(1, (n, -1)).flatten(0, 1)  # B n, S / n, D
        frames, _, gate, _ = super().forward(frames, frames[:, :0], temb)
        _, text, _, text_gate = super().forward(video[:, :0], text, temb.unflatten(0, (B, n))[:, n // 2])
        video, gate = (x.unflatten(0, (B, n)).flatten(1, 2) for x in (frames, gate.expand_as(frames)))  # B S D
        return video, text, gate, text_gate


class FrameAdaLayerNorm(AdaLayerNorm):
    def forward(self, video: Tensor, timestep: None = None, temb: Tensor | None = None) -> Tensor:
        """Tokens (B, S, D), temb (B n, D) -> (B, S, D)."""
        return super().forward(video.reshape(len(temb), -1, video.shape[-1]), temb=temb).view_as(video)


def take_frame_timesteps(transformer: CogVideoXTransformer3DModel) -> None:
    """From now on `timestep` may be B f numbers, frame after frame; with B it is the model that it was."""
    for block in transformer.transformer_blocks:
        block.norm1.__class__ = block.norm2.__class__ = FrameLayerNormZero
    transformer.norm_out.__class__ = FrameAdaLayerNorm
