"""The two embedded models: a small but complete CogVideoX and a small but complete VideoCrafter2,
which know only the tiny world (extras/tiny/)."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.mkldnn import to_mkldnn

from backbones import COGVIDEOX_2B
from extras.models.checked import Checked, CheckedCogVideoX
from extras.models.videocrafter2 import VIDEOCRAFTER2, VideoCrafter2
from syncos import Settings

FOLDER = Path(__file__).parents[1] / "tiny"


def warn_of_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """One warning that names the words which a model of the tiny world does not know."""
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words, known = dict.fromkeys(word for prompt in prompts for word, _ in split(prompt)), tokenizer.get_vocab()
    if unknown := [w for w in words if w.lower() not in known]:
        knows = ", ".join(sorted(w for w in known if w.isalpha()))
        warnings.warn(f"The tiny model does not know {', '.join(unknown)}; it knows {knows}.", stacklevel=3)


class Tiny(CheckedCogVideoX):
    """CogVideoX in every respect but its size. extras/tiny/train.py trains it."""

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if self.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            self.pipe.vae.decoder = to_mkldnn(self.pipe.vae.decoder)  # torch alone takes a slow path for small Conv3ds

    def encode(self, prompts: Sequence[str]) -> None:
        warn_of_unknown_words(self.load_pipe("tokenizer").tokenizer, prompts)
        super().encode(prompts)


def time_as_rows(conv: torch.nn.Conv3d, x: Tensor) -> Tensor:
    """The temporal convolution (3, 1, 1) of x (n, C, F, H, W), as one over F x HW."""
    y = conv2d(x.flatten(3), conv.weight[..., 0], conv.bias, padding=(1, 0))
    return y.view(*y.shape[:3], *x.shape[3:])


def use_rows(unet: torch.nn.Module) -> None:
    """Temporal convolutions by `time_as_rows`, which is faster on a CPU."""
    for conv in (m for m in unet.modules() if isinstance(m, torch.nn.Conv3d)):
        conv.forward = partial(time_as_rows, conv)


class TinyUNet(VideoCrafter2):
    """VideoCrafter2 in every respect but its size, which is one. extras/tiny/unet.py trains it."""

    resize = staticmethod(Checked.resize)  # raises ValueError

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if not decoder_only and self.device.type == "cpu":
            use_rows(self.pipe.transformer)

    def encode(self, prompts: Sequence[str]) -> None:
        warn_of_unknown_words(self.load_pipe("tokenizer").tokenizer, prompts)
        super().encode(prompts)


OURS = dict(dtype="float32", scenario="tiny-star", guidance_scale=4.0, needs_gpu=False, window_batch=5, captions=True)
TINY = replace(
    COGVIDEOX_2B,
    **OURS,  # guidance: cleaner pictures than 6
    backbone=Tiny,
    model=str(FOLDER / "checkpoint"),
    latent=(8, 8, 8),
    settings=Settings(t_min=300, csd_iters=5, csd_lr=1.0),  # ours: small latents fix identity at lower noise
    num_inference_steps=25,  # ours: half the time; 50 are more coherent (extras/measure/README.md)
    fps=16,
    seconds={},
)
TINY_UNET = replace(
    VIDEOCRAFTER2,
    **OURS,
    backbone=TinyUNet,
    model=str(FOLDER / "checkpoint-unet"),
    latent=(4, 8, 8),
    stride=8,
    settings=Settings(t_min=500, csd_iters=3, csd_lr=1.0, shared_noise=True),  # ours, see extras/measure/README.md
    num_inference_steps=20,
    fps=8,
)
