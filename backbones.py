"""Adapters: from a pretrained text-to-video pipeline to SynCoS's `predict_x0`, and from latents back to frames.

`Backbone` holds what all models share: each prompt is encoded once, guidance is applied in one place, the model runs in
its own precision while the sampler's state stays float32. Its parts are in memory only in their turn:

    encode(prompts)         the text encoder
    load()                  transformer and decoder, for predict_x0(latents, t, prompts) and decode(latents)
    release_transformer()   the decoder

A model adds a subclass of about 60 lines with

    measure(model)          the window and the schedule of a model, from its small configuration files
    make_levels(scheduler, steps)
                            the noise levels of a walk
    load_pipe(*parts)       a pipeline of diffusers with these parts only, of tokenizer, text_encoder, transformer, vae
    encode_text(pipe, text) a prompt as a tuple of tensors, without a batch axis
    denoise(x, t, *text)    the network's raw output for a batch; `prediction` says whether it is v, eps or a flow. t is
                            float32: B, or B x f (a timestep a frame) if the model has `frame_timesteps`
    decode(latents)         frames, one at a time

and a `Recipe` in RECIPES with the paper's settings. Latents are B x f x C x H x W everywhere, as in syncos.py.
"""

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from syncos import Level, PredictX0, Settings, diffusion_levels, flow_levels, stack_levels, to_x0


def in_batches(predict_x0: PredictX0, size: int, done: Callable[[int], Any] = lambda n: None) -> PredictX0:
    """`predict_x0` with at most `size` windows at a time, calling `done(windows)` after each batch.

    Under torch.distributed the batches are shared out among the processes, and all get all results. Whole batches, so
    that every matrix product has the size that it has in one process: the result is the same bit for bit.
    """

    def predict(latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        several = dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        out = torch.zeros_like(latents)
        for n, i in enumerate(range(0, len(prompts), size)):
            batch = slice(i, i + size)
            if n % world == rank:
                out[batch] = predict_x0(latents[batch], t[batch] if isinstance(t, Tensor) else t, prompts[batch])
            done(len(prompts[batch]))
        if world > 1:
            try:
                dist.all_reduce(out)  # each window is one process's, and zero in all others
            except RuntimeError as error:
                raise ConnectionError("Another process has stopped.") from error
        return out

    return predict


class Backbone:
    """What every model shares: parts that are loaded in turn, the prompt cache, guidance, precision, the way to x0.

    model: hub id or folder. offload: "none", or "model" or "sequential" if parts go to the device only when they are
    called, whole or layer by layer, by diffusers' own hooks. tiling: decode in spatial tiles. Nothing is loaded before
    `encode` or `load`, which raise ValueError if a part is missing.
    """

    pipe: Any  # of diffusers: the models, their placement and offload
    prediction: str  # "v_prediction", "epsilon" or "flow"
    negative_prompt = ""
    frame_timesteps = False  # can frames of one window have different timesteps?
    scheduler: Mapping

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        guidance_scale: float = 6.0,
        offload: str = "none",
        tiling: bool = False,
    ):
        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.guidance_scale, self.offload, self.tiling = guidance_scale, offload, tiling
        self.texts: dict[str, tuple[Tensor, ...]] = {}
        self.at: dict[float, Level] = {}

    def levels(self, steps: int) -> list[Level]:
        """The walk of `steps` denoising steps; `predict_x0` knows these levels from then on."""
        levels = self.make_levels(self.scheduler, steps)
        self.at = {level.t: level for level in levels[:-1]}
        return levels

    @staticmethod
    def resize(recipe: "Recipe", height: int, width: int, frames: int) -> "Recipe":
        """The recipe for base clips of another size: pixels, video frames. Raises ValueError if the model has none."""
        raise ValueError(
            "--height, --width and --window_frames do not go with this backbone, whose models have one size."
        )

    def bring(self, *parts: str) -> Any:
        """A pipeline with these parts, in their place. Raises ValueError."""
        try:
            pipe = self.load_pipe(*parts)
        except OSError as error:
            raise ValueError(f"Cannot load {self.model}: {str(error).splitlines()[0]}") from error
        self.place(pipe)
        return pipe

    def place(self, pipe: Any) -> None:
        if self.offload == "none":
            pipe.to(self.device)
        elif self.offload == "model":
            pipe.enable_model_cpu_offload(device=self.device)
        else:
            pipe.enable_sequential_cpu_offload(device=self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """Encode each distinct prompt once; the text encoder, about 10 GB with the big models, comes and goes."""
        new = [text for text in dict.fromkeys([self.negative_prompt, *prompts]) if text not in self.texts]
        if not new:
            return
        pipe = self.bring("tokenizer", "text_encoder")
        for text in new:
            self.texts[text] = tuple(x.to(self.device) for x in self.encode_text(pipe, text))
        del pipe
        free_memory()

    def load(self, decoder_only: bool = False) -> None:
        """What `predict_x0` and `decode` need, or `decode` alone."""
        self.pipe = self.bring("vae") if decoder_only else self.bring("transformer", "vae")

    def release_transformer(self) -> None:
        """Leave the memory to `decode`; `predict_x0` cannot be called any more."""
        self.pipe.transformer = None
        self.place(self.pipe)  # again, for the decoder's hook knows the transformer
        free_memory()

    @torch.no_grad()
    def predict_x0(self, latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        """SynCoS's model contract: noisy windows B x f x C x H x W in, guided clean estimates out, both float32.

        Raises ValueError for timesteps B x f if the model takes one a window only.
        """
        if isinstance(t, Tensor):
            if not self.frame_timesteps:
                raise ValueError(f"{type(self).__name__} takes one timestep a window, not one for each of its frames.")
            level = stack_levels([[self.at[x] for x in row] for row in t.tolist()], latents.device)
        else:
            level = self.at[t]
        x = latents.to(self.device, self.dtype)
        times = torch.as_tensor(t, dtype=torch.float32, device=self.device)  # one number or B f
        times = times.expand(len(x), *times.shape[1:])  # B or B f
        guided = self.guidance_scale > 1
        if guided:
            x, times = torch.cat([x, x]), torch.cat([times, times])
        texts = [self.texts[p] for p in [self.negative_prompt] * len(prompts) * guided + prompts]
        stacked = [torch.stack(parts) for parts in zip(*texts)]  # (2)B ... each
        output = self.denoise(x, times, *stacked).float().to(latents.device)
        if guided:
            negative, positive = output.chunk(2)
            output = negative + self.guidance_scale * (positive - negative)
        return to_x0(output, latents, level, self.prediction)


def free_memory() -> None:
    """Give back what was dropped: offload hooks make cycles, and torch keeps a GPU's freed blocks to itself."""
    gc.collect()
    torch.cuda.empty_cache()


# ----------------------------------------------------------------------------------------------------------------------
# CogVideoX (2B: sincos positions; 5B: rotary)


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


def to_uint8(video: Tensor) -> np.ndarray:
    """3 n H W about [-1, 1] -> n H W 3."""
    return (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


class Tiny(CogVideoX):
    """The embedded model (tiny/): a real CogVideoX, small, that knows the words of its little world and no others."""

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


# ----------------------------------------------------------------------------------------------------------------------
# Open-Sora Plan v1.3


class OpenSoraPlan(Backbone):
    """Open-Sora Plan v1.3, by hub id or from a folder laid out like LanguageBind/Open-Sora-Plan-v1.3.0.

    The text encoder is google/mt5-xxl's, or the folder's own if it has an mt5-xxl/. Raises ValueError for tiling, which
    there is not.
    """

    prediction = "v_prediction"
    frame_timesteps = True
    positive = "high quality, high aesthetic, {}"  # the authors' templates; tokens are the same without line breaks
    negative_prompt = (
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    text_length = 512

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.scheduler = OPENSORA_PLAN_SCHEDULER
        if self.tiling:
            raise ValueError("--vae_tiling is not there for Open-Sora Plan, whose decoder streams; leave it out.")

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
    def resize(recipe: "Recipe", height: int, width: int, frames: int) -> "Recipe":
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


# ----------------------------------------------------------------------------------------------------------------------
# Wan 2.1


class Wan(Backbone):
    """Wan 2.1 text-to-video, 1.3B or 14B, in diffusers format. Raises ValueError if the model is none, or is a Wan 2.2.

    A rectified flow. Every window is a clip of its own to the model: positions restart at 0. The VAE runs in float32.
    """

    prediction = "flow"
    frame_timesteps = True
    negative_prompt = (  # ours, in English; the authors' own, in Chinese, is longer
        "gaudy colours, overexposed, blurred details, subtitles, drawing, grey all over, worst quality, low quality, "
        "jpeg artifacts, ugly, disfigured, deformed limbs, extra fingers, bad hands, bad faces, cluttered background, "
        "crowd, still picture, nothing moves, walking backwards"
    )
    text_length = 512

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.scheduler = self.measure(model)["scheduler"]
        if self.tiling:
            raise ValueError("--vae_tiling is not there for Wan, whose decoder streams; leave it out.")

    @staticmethod
    def measure(model: str) -> dict[str, Any]:
        """Latent shape (C, H, W), of 480 x 832 pixels, and scheduler of a model, from three small files."""
        from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

        try:
            index = WanPipeline.load_config(model)
            transformer = WanTransformer3DModel.load_config(model, subfolder="transformer")
            scheduler = UniPCMultistepScheduler.load_config(model, subfolder="scheduler")
        except OSError as error:
            raise ValueError(
                f"{model} is no Wan pipeline: neither a folder with one nor a model of the hub within reach."
            ) from error
        kinds = {
            "a Wan 2.2 TI2V (expand_timesteps), with a timestep for every token": index.get("expand_timesteps"),
            "a Wan 2.2 A14B (transformer_2), with a second model for low noise": any(index.get("transformer_2") or []),
            f"a {index.get('_class_name')}": index.get("_class_name") != "WanPipeline",
        }
        for kind, found in kinds.items():
            if found:
                raise ValueError(f"{model} is {kind}; that is not supported, use a text-to-video model of Wan 2.1.")
        return dict(latent=(transformer["in_channels"], 60, 104), scheduler=scheduler)

    @staticmethod
    def resize(recipe: "Recipe", height: int, width: int, frames: int) -> "Recipe":
        if height % 16 or width % 16:
            raise ValueError(f"--height and --width must be multiples of 16, got {height} and {width}.")
        if frames % 4 != 1:
            raise ValueError(f"--window_frames must be 4 n + 1, got {frames}.")
        return replace(recipe, window=(frames - 1) // 4 + 1, latent=(recipe.latent[0], height // 8, width // 8))

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """Euler's walk of the flow, with the release's shift, from pure noise; the release's own, UniPC, is of second
        order."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        euler = FlowMatchEulerDiscreteScheduler(shift=scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
        euler.set_timesteps(steps)
        return flow_levels(euler.sigmas.tolist(), euler.timesteps.tolist())

    def load_pipe(self, *parts: str) -> Any:
        from diffusers import WanPipeline

        absent = {"tokenizer", "text_encoder", "transformer", "vae"} - set(parts)
        dtypes = {"vae": torch.float32, "default": self.dtype}
        return WanPipeline.from_pretrained(self.model, dtype=dtypes, **dict.fromkeys(absent))

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        embedding, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=self.text_length)
        return (embedding[0],)  # L D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if t.ndim == 2:  # the model knows timesteps of tokens, of patches of 1 x 2 x 2
            t = t.repeat_interleave(x.shape[3] * x.shape[4] // 4, dim=1)  # B S
        flow = self.pipe.transformer(x.transpose(1, 2), t, text, return_dict=False)[0]  # B C f H W
        return flow.transpose(1, 2)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames, each 8H x 8W x 3 uint8, one at a time.

        One latent frame after another, as the VAE's own `decode` does it, but keeping nothing except the caches of the
        causal convolutions: memory does not grow with F, and the frames are the same bit for bit.
        """
        vae, c = self.pipe.vae, self.pipe.vae.config
        if hasattr(vae, "_hf_hook"):  # offload: to the device, as `vae.decode` would begin
            vae._hf_hook.pre_forward(vae)
        mean, std = (torch.tensor(x, device=self.device).view(-1, 1, 1, 1) for x in (c.latents_mean, c.latents_std))
        z = vae.post_quant_conv((latents.to(self.device).transpose(0, 1) * std + mean)[None])  # 1 C F H W
        vae.clear_cache()
        cache = vae._feat_map  # this video's own; another one's decoding starts with a new one
        for piece in z.split(1, dim=2):
            video = vae.decoder(piece, feat_cache=cache, feat_idx=[0])  # 1 3 n H W
            yield from to_uint8(video[0])


# ----------------------------------------------------------------------------------------------------------------------
# VideoCrafter2


class VideoCrafter2(Backbone):
    """VideoCrafter2: the release's model.ckpt (hub id, folder or file), or a folder in diffusers' format.

    A U-Net that predicts eps. One latent frame is one video frame, so there is nothing causal. Raises ValueError for
    tiling, which there is not.
    """

    prediction = "epsilon"
    text_length = 77

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.scheduler = VIDEOCRAFTER2_SCHEDULER
        if self.tiling:
            raise ValueError("--vae_tiling is not there for VideoCrafter2, which decodes frame by frame; leave it out.")

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
    def resize(recipe: "Recipe", height: int, width: int, frames: int) -> "Recipe":
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


# ----------------------------------------------------------------------------------------------------------------------
# The registry


@dataclass(frozen=True)
class Recipe:
    """What a backbone is run with unless the user says otherwise."""

    backbone: type[Backbone]
    model: str  # hub id or folder
    window: int  # latent frames of the base clip
    latent: tuple[int, int, int]  # C, H, W
    scheduler: Mapping  # the released scheduler's configuration
    settings: Settings
    dtype: str  # on a GPU; float32 on the CPU
    scenario: str  # of prompts.SCENARIOS
    num_frames: int = 193  # video frames: 49 latent frames, 4x the base clip
    frames_per_latent: int = 4  # temporal compression
    frames_step: int = 8  # num_frames - 1 is a multiple: CogVideoX's VAE wants an odd number of latent frames
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    fps: int = 8
    needs_gpu: bool = True
    paper_t_min: float = 800  # the paper's, or for models that are not in it the same noise level
    window_batch: int = 1  # windows through the model at once
    captions: bool = False  # under the video


COGVIDEOX_SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    set_alpha_to_one=True,
)

OPENSORA_PLAN_SCHEDULER = dict(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
)

VIDEOCRAFTER2_SCHEDULER = dict(
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    beta_end=0.012,
    timestep_spacing="leading",
    steps_offset=1,
    set_alpha_to_one=False,
)

RECIPES = {
    "tiny": Recipe(
        backbone=Tiny,
        model=str(Path(__file__).parent / "tiny" / "checkpoint"),
        window=13,
        latent=(8, 8, 8),
        scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=3.0),
        settings=Settings(stride=4, t_min=300, csd_iters=5),  # ours: small latents decide identity at lower t
        dtype="float32",
        scenario="tiny-star",
        guidance_scale=4.0,  # ours: cleaner pictures than 6
        fps=16,
        needs_gpu=False,
        window_batch=2,
        captions=True,
    ),
    "cogvideox": Recipe(
        backbone=CogVideoX,
        model="zai-org/CogVideoX-2b",
        window=13,
        latent=(16, 60, 90),
        scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=3.0),
        settings=Settings(stride=4),
        dtype="float16",
        scenario="corgi",
    ),
}
RECIPES["opensora-plan"] = Recipe(
    backbone=OpenSoraPlan,
    model="LanguageBind/Open-Sora-Plan-v1.3.0",
    window=24,
    latent=(8, 44, 80),
    scheduler=OPENSORA_PLAN_SCHEDULER,
    settings=Settings(stride=6),
    dtype="float16",
    scenario="corgi",
    num_frames=357,  # 90 latent frames, the paper's 20 s
    frames_step=4,
    guidance_scale=7.5,
    fps=18,
)
RECIPES["wan"] = Recipe(
    backbone=Wan,
    model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    window=21,
    latent=(16, 60, 104),
    scheduler=dict(flow_shift=3.0),
    settings=Settings(stride=6, t_min=930),
    paper_t_min=930,  # alpha/sigma there is CogVideoX-2B's at 800
    dtype="bfloat16",
    scenario="corgi",
    num_frames=321,  # 81 latent frames, 20 s
    frames_step=4,
    guidance_scale=5.0,
    fps=16,
)
RECIPES["videocrafter2"] = Recipe(
    backbone=VideoCrafter2,
    model="VideoCrafter/VideoCrafter2",
    window=16,
    latent=(4, 40, 64),
    scheduler=VIDEOCRAFTER2_SCHEDULER,
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
RECIPES["cogvideox-5b"] = replace(
    RECIPES["cogvideox"],
    model="zai-org/CogVideoX-5b",
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=1.0),
    dtype="bfloat16",
)


def get_recipe(name: str, model: str | None = None) -> Recipe:
    """The recipe of a backbone; for a `model` other than its own, with that model's window and schedule.

    Raises ValueError if there is no such backbone or model. Loads no weights.
    """
    if name not in RECIPES:
        raise ValueError(f"There is no backbone {name}; choose one of {', '.join(RECIPES)}.")
    recipe = RECIPES[name]
    if model is None and not Path(recipe.model).is_dir():  # the released model: known without asking the hub
        return recipe
    model = model or recipe.model
    return replace(recipe, model=model, **recipe.backbone.measure(model))
