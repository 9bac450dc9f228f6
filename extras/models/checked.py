"""What the program asks of a backbone beyond `backbones.Backbone`: refusals, sizes, previews."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count
from typing import Any

import diffusers as D
import numpy as np
import torch
import transformers as T
from torch import Tensor
from torch.utils._pytree import tree_map_only

from backbones import Backbone, CogVideoX, OpenSoraPlan, Recipe, to_uint8

CHUNK = 48  # latent frames that CogVideoX's VAE decodes in one call, 192 video frames


@contextmanager
def from_hub(model: str) -> Iterator[None]:
    """Turn a failure of the hub, or of the way to it, into a ValueError with its reason."""
    try:
        yield
    except Exception as error:  # of many kinds, by library and version
        from extras.loading import hub_failure

        if reason := hub_failure(error):
            raise ValueError(f"Cannot load {model} from the Hugging Face hub: {reason}") from error
        raise


class Checked(Backbone):
    """Tells what a model cannot do or does not see, and which of its files are missing or do not
    fit, by ValueError. A base class, before another backbone or alone.

    Beyond what `Backbone` asks, a model needs `text_length`, a tokenizer from transformers as
    `load_pipe("tokenizer").tokenizer`, and `inspect`.
    """

    text_length: int  # tokens that the text encoder reads
    untiled = ""  # what to say if --vae_tiling has no use

    def __init__(self, model: str, *args, **options):
        with from_hub(model):
            super().__init__(model, *args, **options)
        if self.tiling and self.untiled:
            raise ValueError(self.untiled)

    @classmethod
    def inspect(cls, model: str) -> dict[str, Any]:
        """Fields of a `Recipe` that a model's configuration files state: window, scheduler ...
        Raises ValueError if it is another kind of model."""
        return {}

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        """The recipe for base clips of another size (pixels, video frames). Raises ValueError."""
        _, H, W = recipe.latent
        size = f"{8 * W} x {8 * H} pixels and {recipe.frames_per_latent * (recipe.window - 1) + 1} frames"
        raise ValueError(f"This model makes clips of {size} only; leave out --height, --width and --window_frames.")

    def load_parts(self, *parts: str) -> Any:
        try:
            with from_hub(self.model):
                return super().load_parts(*parts)
        except OSError as error:
            raise ValueError(f"Cannot load {self.model}: {str(error).splitlines()[0]}") from error

    def encode(self, prompts: Sequence[str]) -> None:
        """Raises ValueError if two prompts are the same to the model, too."""
        if any(text not in self.texts for text in (self.negative_prompt, *prompts)):
            self.check_lengths(self.load_pipe("tokenizer").tokenizer, prompts)
        super().encode(prompts)

    def template(self, text: str) -> str:
        """A prompt in the words that the model was trained with."""
        return text

    def check_lengths(self, tokenizer: Any, prompts: Sequence[str]) -> None:
        """Warn of words that the model does not see; raise ValueError if prompts become equal."""
        room, seen = self.text_length - tokenizer.num_special_tokens_to_add(), {}
        for text in dict.fromkeys(prompts):
            ids = tokenizer(self.template(text), add_special_tokens=False, verbose=False).input_ids
            other = seen.setdefault(tuple(ids[:room]), text)
            if lost := ids[room:]:
                unseen = f'The model reads {self.text_length} tokens, so it does not see "{tokenizer.decode(lost)}"'
                if other != text:
                    raise ValueError(f"{unseen}, and two events become the same; shorten the global prompt.")
                warnings.warn(f"{unseen}.", stacklevel=2)

    def preview(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Decode a few frames while the transformer is still loaded."""
        return self.decode(latents)


def check_channels(model: str, config: Mapping) -> None:
    """Raises ValueError for networks that take more than the noisy latent (image-to-video)."""
    given, made = config.get("in_channels"), config.get("out_channels")
    if given != made:
        raise ValueError(
            f"{model} is not a text-to-video model: its network takes {given} channels and gives {made}, as "
            "image-to-video models do; use the text-to-video model of the same family."
        )


class CheckedCogVideoX(Checked, CogVideoX):
    """Refuses 1.5 (see cogvideox15.py), image-to-video models, another scheduler, and what
    `load_network` refuses. Decodes long videos in flat memory."""

    pairs = False  # does a token hold two latent frames?

    @classmethod
    def read_configs(cls, model: str) -> tuple[Mapping, Mapping]:
        try:
            transformer, scheduler = super().read_configs(model)
        except OSError as error:
            raise ValueError(
                f"{model} is not a CogVideoX pipeline: neither a folder with one nor a model of the hub within reach."
            ) from error
        if (pairs := bool(transformer.get("patch_size_t"))) != cls.pairs:
            kind, name = ("CogVideoX-1.5", "cogvideox-1.5") if pairs else ("CogVideoX 2B or 5B", "cogvideox")
            raise ValueError(f"{model} is a {kind}; use --backbone {name} for it.")
        check_channels(model, transformer)
        return transformer, scheduler

    @classmethod
    def inspect(cls, model: str) -> dict[str, Any]:
        c, scheduler = cls.read_configs(model)
        window = (c["sample_frames"] - 1) // c["temporal_compression_ratio"] + 1
        latent = (c["in_channels"], c["sample_height"], c["sample_width"])
        return dict(window=window, latent=latent, scheduler=scheduler)

    def load_pipe(self, *parts: str) -> Any:
        from extras.loading import load_network, load_tokenizer

        kinds = dict(text_encoder=T.T5EncoderModel, transformer=D.CogVideoXTransformer3DModel)
        kinds |= dict(vae=D.AutoencoderKLCogVideoX)
        made = dict.fromkeys(kinds)
        for name in filter(parts.__contains__, kinds):
            made[name] = load_network(kinds[name], self.model, name, self.dtype)
        tokenizer = load_tokenizer(self.model, "tokenizer") if "tokenizer" in parts else None
        return D.CogVideoXPipeline(tokenizer, scheduler=D.CogVideoXDDIMScheduler.from_config(self.scheduler), **made)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames (F odd). A video longer than CHUNK is
        decoded in several calls of the VAE, so memory does not grow with F. The caches of its
        causal convolutions carry over (those of all tiles would fill a GPU, so they wait on the
        CPU): frames equal those of one call."""
        vae, caches = self.pipe.vae, {}  # one cache per tile
        park = Tensor.cpu if vae.use_tiling else lambda x: x
        n, F, forward = vae.num_latent_frames_batch_size, len(latents), vae.decoder.forward
        first = CHUNK + F % n
        if F <= first:
            yield from super().decode(latents)
            return
        z = latents.transpose(0, 1)[None]  # 1 C F H W
        for part in (z[:, :, :first], *z[:, :, first:].split(CHUNK, dim=2)):
            calls, pieces = count(), part.shape[2] // n  # the VAE decodes a tile's pieces, then the next tile's

            def resume(sample, conv_cache=None, calls=calls, pieces=pieces):
                tile, piece = divmod(next(calls), pieces)
                if piece == 0 and tile in caches:
                    conv_cache = tree_map_only(Tensor, lambda x: x.to(self.device), caches[tile])
                frames, conv_cache = forward(sample, conv_cache=conv_cache)
                if piece == pieces - 1:
                    caches[tile] = tree_map_only(Tensor, park, conv_cache)
                return frames, conv_cache

            vae.decoder.forward = resume
            try:
                part = part.to(self.device, self.dtype) / vae.config.scaling_factor
                video = vae.decode(part, return_dict=False)[0][0].split(8, dim=1)  # 3 8 H W
                video = [to_uint8(frames) for frames in video]  # on the CPU before the next part needs the memory
            finally:
                vae.decoder.forward = forward
            yield from chain(*video)

    def preview(self, latents: Tensor) -> Iterator[np.ndarray]:
        vae = self.pipe.vae
        vae.enable_tiling()
        try:
            yield from self.decode(latents)
        finally:
            vae.use_tiling = self.tiling


class CheckedOpenSoraPlan(Checked, OpenSoraPlan):
    """Refuses what is not Open-Sora Plan v1.3; other sizes."""

    untiled = "Open-Sora Plan's decoder streams and needs no --vae_tiling; leave it out."
    template = OpenSoraPlan.template

    @classmethod
    def inspect(cls, model: str) -> dict[str, Any]:
        from extras.ports.opensora_plan import TRANSFORMER, OpenSoraT2V_v1_3

        try:
            c = OpenSoraT2V_v1_3.load_config(model, subfolder=TRANSFORMER)
        except OSError as error:
            raise ValueError(f"{model} is not an Open-Sora Plan v1.3: {TRANSFORMER}/config.json is missing.") from error
        check_channels(model, c)
        height, width = np.min(c["sample_size_h"]), np.max(c["sample_size_w"])  # a number, or the training's range
        return dict(window=c["sample_size_t"], latent=(c["in_channels"], int(height), int(width)))

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        if height % 32 or width % 32:
            raise ValueError(f"--height and --width must be multiples of 32, got {height} and {width}.")
        if frames not in (29, 45, 61, 77, 93):
            raise ValueError(f"--window_frames must be 29, 45, 61, 77 or 93, got {frames}.")
        return replace(recipe, window=(frames - 1) // 4 + 1, latent=(recipe.latent[0], height // 8, width // 8))
