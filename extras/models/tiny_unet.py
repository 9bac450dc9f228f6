"""The second embedded model: a small but complete VideoCrafter2 that knows the tiny world only."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from backbones import TINY, Backbone, warn_of_unknown_words
from extras.models.videocrafter2 import VIDEOCRAFTER2, VideoCrafter2
from syncos import Settings


class TinyUNet(VideoCrafter2):
    """VideoCrafter2 in every respect but its size, which is one. extras/tiny/unet.py trains it."""

    resize = staticmethod(Backbone.resize)  # raises ValueError

    def encode(self, prompts: Sequence[str]) -> None:
        warn_of_unknown_words(self.load_pipe("tokenizer").tokenizer, prompts)
        super().encode(prompts)


TINY_UNET = replace(
    VIDEOCRAFTER2,
    backbone=TinyUNet,
    model=str(Path(TINY.model).parent / "checkpoint-unet"),
    latent=(4, 8, 8),
    settings=Settings(stride=8, t_min=500, csd_iters=3, csd_lr=1.0),  # ours, see extras/measure/README.md
    dtype="float32",
    scenario=TINY.scenario,
    num_inference_steps=15,  # as fast as the default demo; extras/measure/README.md takes 20
    guidance_scale=4.0,
    fps=8,
    needs_gpu=False,
    window_batch=5,
    captions=True,
)
