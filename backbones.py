"""From a pretrained text-to-video model to SynCoS's `predict_x0`, and from latents to frames.

CogVideoX (2B, 5B, and the embedded tiny model) and Open-Sora Plan v1.3.
`extras/models/` holds further ones.

`Backbone` is what all models share: each prompt is encoded once, guidance is applied in one
place, the model runs in its own precision while the sampler's state stays float32. Parts are in
memory only while they are needed:

    encode(prompts)         loads the text encoder and drops it again
    load()                  loads transformer and decoder, for predict_x0(latents, t, prompts) and
                            decode(latents)
    release_transformer()   leaves only the decoder

A new model is a subclass of about 60 lines with

    inspect(model)          window, latent shape and scheduler of a model, from its small
                            configuration files
    make_levels(scheduler, steps)
                            the noise levels of a run
    load_pipe(*parts)       a diffusers pipeline with only these parts of tokenizer, text_encoder,
                            transformer, vae
    encode_text(pipe, text) a prompt as a tuple of tensors, without a batch axis; `text_length`
                            tokens at most
    denoise(x, t, *text)    the network's raw output for a batch; `prediction` says whether it is v,
                            eps or a flow. t is float32: B, or B x f (one timestep per frame) if the
                            model has `frame_timesteps`
    decode(latents)         video frames, one at a time

and a `Recipe` with its settings. Latents are B x f x C x H x W everywhere, as in syncos.py.
"""

import gc
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.mkldnn import to_mkldnn

from syncos import Level, Settings, diffusion_levels, make_windows, to_x0

# --------------------------------------------------------------------------------------------------
# What all models share


@dataclass(frozen=True)
class Recipe:
    """What a backbone is run with unless the user says otherwise."""

    backbone: type["Backbone"]
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
    fps: float = 8
    needs_gpu: bool = True
    window_batch: int = 1  # windows per call of the model
    captions: bool = False  # under the video
    seconds: Mapping = field(default_factory=dict)  # of a guided window by GPU, from public figures for a base clip

    @property
    def latent_frames(self) -> int:
        """Latent frames of the whole video."""
        return (self.num_frames - 1) // self.frames_per_latent + 1

    def windows(self) -> list[slice]:
        """Windows over the whole video, in latent frames. Raises ValueError if they do not fit."""
        return make_windows(self.latent_frames, self.window, self.settings.stride)


class Backbone:
    """What every model shares: loading, prompt cache, guidance, precision, conversion to x0.

    model: hub id or folder. offload: "none", or "model" or "sequential" to move whole models or
    single layers to the device only when they are called, by diffusers' own hooks. tiling:
    decode in spatial tiles. Nothing is loaded before `encode` or `load`, which raise ValueError
    if a part is missing or does not fit.
    """

    pipe: Any  # the diffusers pipeline: the models, their placement and offload
    prediction: str  # "v_prediction", "epsilon" or "flow"
    negative_prompt = ""
    frame_timesteps = False  # does `denoise` take a timestep per frame, B x f, as well as one per window?
    untiled = ""  # which model cannot decode in tiles, and why
    text_length: int  # tokens that the text encoder reads
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
        """Raises ValueError for tiling where the model has none."""
        if tiling and self.untiled:
            raise ValueError(f"{self.untiled} does not need --vae_tiling; leave it out.")
        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.guidance_scale, self.offload, self.tiling = guidance_scale, offload, tiling
        self.texts: dict[str, tuple[Tensor, ...]] = {}
        self.at: dict[float, Level] = {}

    @staticmethod
    def resize(recipe: Recipe, height: int, width: int, frames: int) -> Recipe:
        """The recipe for base clips of another size (pixels, video frames). Raises ValueError."""
        raise ValueError("This backbone's models have one size; leave out --height, --width and --window_frames.")

    def set_levels(self, levels: Sequence[Level]) -> None:
        """The noise levels of a run: from then on `predict_x0` knows their timesteps."""
        self.at = {level.t: level for level in levels[:-1]}

    def levels(self, steps: int) -> list[Level]:
        """The noise levels of `steps` denoising steps by the model's own scheduler, set."""
        levels = self.make_levels(self.scheduler, steps)
        self.set_levels(levels)
        return levels

    def load_parts(self, *parts: str) -> Any:
        """A pipeline with these parts, on their device. Raises ValueError."""
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
        """Encode each distinct prompt once. The text encoder, about 10 GB for the
        big models, is dropped afterwards.

        Raises ValueError if two prompts are the same to the model,
        FloatingPointError if an embedding is not finite.
        """
        new = [text for text in dict.fromkeys([self.negative_prompt, *prompts]) if text not in self.texts]
        if not new:
            return
        self.check_lengths(self.load_pipe("tokenizer").tokenizer, prompts)
        pipe = self.load_parts("tokenizer", "text_encoder")
        for text in new:
            self.texts[text] = tuple(x.to(self.device) for x in self.encode_text(pipe, self.template(text)))
            check_finite(f'The embedding of "{text[:60]}"', *self.texts[text])
        del pipe
        free_memory()

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

    def load(self, decoder_only: bool = False) -> None:
        """Load what `predict_x0` and `decode` need, or `decode` alone."""
        self.pipe = self.load_parts("vae") if decoder_only else self.load_parts("transformer", "vae")

    def preview(self, latents: Tensor) -> Iterator[np.ndarray]:
        """`decode`, of few frames, in little memory beside the transformer's."""
        return self.decode(latents)

    def release_transformer(self) -> None:
        """Leave the memory to `decode`; `predict_x0` cannot be called any more."""
        self.pipe.transformer = None
        self.place(self.pipe)  # again, because the decoder's offload hook refers to the transformer
        free_memory()

    @torch.no_grad()
    def predict_x0(self, latents: Tensor, t: float, prompts: list[str]) -> Tensor:
        """SynCoS's contract: noisy windows B x f x C x H x W in, guided x0 out, both float32."""
        return to_x0(self.guided(latents, torch.tensor([t]), prompts), latents, self.at[t], self.prediction)

    @torch.no_grad()
    def guided(self, latents: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """The network's output with classifier-free guidance, float32, in the
        shape of the latents B x f x C x H x W.

        times: 1 or B timesteps, or B x f if the model has `frame_timesteps`. Below `predict_x0`,
        for methods that need more than one timestep per call (extras/baselines).
        """
        x = latents.to(self.device, self.dtype)
        times = times.to(self.device, torch.float32)
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
        return output


def in_batches(predict: Callable, size: int, done: Callable[[int], Any] = lambda n: None) -> Callable:
    """`predict_x0` with at most `size` windows at a time, calling `done(windows)` after each batch.

    t may also be a tensor with one row per window.
    Under torch.distributed the processes share the batches, and all get all results. Batches stay
    whole, so that every matrix product has the size that it has in one process: the result is the
    same bit for bit.
    """

    def predict_in_batches(latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        rank, world = processes()
        out = torch.zeros_like(latents)
        for n, i in enumerate(range(0, len(prompts), size)):
            batch = slice(i, i + size)
            if n % world == rank:
                out[batch] = predict(latents[batch], t[batch] if isinstance(t, Tensor) else t, prompts[batch])
            done(len(prompts[batch]))
        if world > 1:
            try:
                dist.all_reduce(out)  # each window comes from one process, and is zero in all others
            except RuntimeError as error:
                raise ConnectionError("Another process has stopped.") from error
        return out

    return predict_in_batches


def processes() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def free_memory() -> None:
    """Free what was dropped: offload hooks make reference cycles, and torch caches blocks."""
    gc.collect()
    torch.cuda.empty_cache()


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises FloatingPointError, with what to do, if a value is not finite."""
    if any((~x.isfinite()).any() for x in tensors):
        raise FloatingPointError(
            f"{what} is not finite. float16 is too small for some models: use --dtype bfloat16 or float32. If that "
            "does not help, the weights are damaged."
        )


def to_uint8(video: Tensor) -> np.ndarray:
    """3 n H W in about [-1, 1] -> n H W 3. Raises FloatingPointError if a value is not finite."""
    check_finite("A decoded frame", video)
    return (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


def check_channels(model: str, config: Mapping) -> None:
    """Raises ValueError for networks that take more than the noisy latent (image-to-video)."""
    given, made = config.get("in_channels"), config.get("out_channels")
    if given != made:
        raise ValueError(
            f"{model} is not a text-to-video model: its network takes {given} channels and gives {made}, as "
            "image-to-video models do; use the text-to-video model of the same family."
        )


# --------------------------------------------------------------------------------------------------
# CogVideoX


class CogVideoX(Backbone):
    """Any CogVideoX text-to-video pipeline in diffusers format, but not 1.5 (ValueError).

    2B (sincos positions), 5B (rotary). Every window is a clip of its own to
    the model: positions restart at 0.
    """

    prediction = "v_prediction"
    frame_timesteps = True  # see extras/baselines/fifo.py
    rotary = None

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.config, self.scheduler = self.read_configs(model)
        self.text_length = self.config.get("max_text_seq_length", 226)

    @staticmethod
    def read_configs(model: str) -> tuple[Mapping, Mapping]:
        """The transformer's configuration and the scheduler's."""
        from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

        try:
            transformer = CogVideoXTransformer3DModel.load_config(model, subfolder="transformer")
            scheduler = CogVideoXDDIMScheduler.load_config(model, subfolder="scheduler")
        except OSError as error:
            raise ValueError(
                f"{model} is not a CogVideoX pipeline: neither a folder with one nor a model of the hub within reach."
            ) from error
        if transformer.get("patch_size_t"):
            raise ValueError(
                f"{model} is a CogVideoX-1.5 (patch_size_t = {transformer['patch_size_t']}), which packs latent frames "
                "in pairs; that is not supported, use CogVideoX 2B or 5B."
            )
        check_channels(model, transformer)
        if (prediction := scheduler.get("prediction_type")) != "v_prediction":
            raise ValueError(
                f"{model}/scheduler has prediction_type {prediction}, but CogVideoX predicts v: use its own scheduler, "
                'with "prediction_type": "v_prediction".'
            )
        return transformer, scheduler

    @staticmethod
    def inspect(model: str) -> dict[str, Any]:
        """Window (latent frames), latent shape (C, H, W) and scheduler, from two small files."""
        c, scheduler = CogVideoX.read_configs(model)
        window = (c["sample_frames"] - 1) // c["temporal_compression_ratio"] + 1
        latent = (c["in_channels"], c["sample_height"], c["sample_width"])
        return dict(window=window, latent=latent, scheduler=scheduler)

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing: it starts at pure noise, t = 999, where alpha is 0."""
        from diffusers import CogVideoXDDIMScheduler

        ddim = CogVideoXDDIMScheduler.from_config(scheduler, timestep_spacing="trailing")
        ddim.set_timesteps(steps)
        return diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))

    def load_pipe(self, *parts: str) -> Any:
        from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline
        from diffusers import CogVideoXTransformer3DModel as Transformer
        from transformers import T5EncoderModel

        from extras.ports.loading import load_network, load_tokenizer

        kinds = dict(text_encoder=T5EncoderModel, transformer=Transformer, vae=AutoencoderKLCogVideoX)
        made = dict.fromkeys(kinds)
        for name in filter(parts.__contains__, kinds):
            made[name] = load_network(kinds[name], self.model, name, self.dtype)
        tokenizer = load_tokenizer(self.model, "tokenizer") if "tokenizer" in parts else None
        return CogVideoXPipeline(tokenizer, scheduler=CogVideoXDDIMScheduler.from_config(self.scheduler), **made)

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
        options = dict(do_classifier_free_guidance=False, max_sequence_length=self.text_length)
        embedding, _ = pipe.encode_prompt(text, **options)
        return (embedding[0],)  # L D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.pipe.transformer(x, text, t.flatten(), image_rotary_emb=self.rotary, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames (F odd),
        each 8H x 8W x 3 uint8, one at a time.

        Memory does not grow with F: the VAE gets the pieces that its own `decode` would make (2
        latent frames, the first time 3), and the caches of its causal convolutions carry over.
        Equal to decoding in one go, tiled or not.
        """
        vae, caches = self.pipe.vae, deque()  # one cache per tile, in their order
        z = latents.transpose(0, 1)[None].to(self.device, self.dtype) / vae.config.scaling_factor  # 1 C F H W
        F, n, forward = len(latents), vae.num_latent_frames_batch_size, vae.decoder.forward
        first = min(n + F % n, F)

        for piece in z.split([first] + [n] * ((F - first) // n), dim=2):
            fresh = not caches

            def resume(sample, conv_cache=None, fresh=fresh):
                frames, cache = forward(sample, conv_cache=None if fresh else caches.popleft())
                caches.append(cache)
                return frames, cache

            vae.decoder.forward = resume
            try:
                video = vae.decode(piece, return_dict=False)[0]  # 1 3 n H W
            finally:
                vae.decoder.forward = forward
            yield from to_uint8(video[0])

    def preview(self, latents: Tensor) -> Iterator[np.ndarray]:
        vae = self.pipe.vae
        vae.enable_tiling()
        yield from self.decode(latents)
        vae.use_tiling = self.tiling


def warn_of_unknown_words(tokenizer: Any, prompts: Sequence[str]) -> None:
    """One warning that names the words which a model of the tiny world does not know."""
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    words, known = dict.fromkeys(word for prompt in prompts for word, _ in split(prompt)), tokenizer.get_vocab()
    if unknown := [w for w in words if w.lower() not in known]:
        knows = ", ".join(sorted(w for w in known if w.isalpha()))
        warnings.warn(f"The tiny model does not know {', '.join(unknown)}; it knows {knows}.", stacklevel=3)


class Tiny(CogVideoX):
    """The embedded model: a small but complete CogVideoX that knows only the tiny world."""

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if self.device.type == "cpu" and self.dtype == torch.float32 and torch.backends.mkldnn.is_available():
            self.pipe.vae.decoder = to_mkldnn(self.pipe.vae.decoder)  # torch alone takes a slow path for small Conv3ds

    def encode(self, prompts: Sequence[str]) -> None:
        warn_of_unknown_words(self.load_pipe("tokenizer").tokenizer, prompts)
        super().encode(prompts)


COGVIDEOX_SCHEDULER = dict(
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
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=3.0),
    settings=Settings(stride=4),
    dtype="float16",
    scenario="corgi",
    seconds={"A100": 1.8, "H100": 0.9},  # 90 and 45 s for 50 steps: github.com/THUDM/CogVideo, README
)
COGVIDEOX_5B = replace(
    COGVIDEOX_2B,
    model="zai-org/CogVideoX-5b",
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=1.0),
    dtype="bfloat16",
    seconds={"A100": 3.6, "H100": 1.8},  # 180 and 90 s, same source
)
TINY = Recipe(
    backbone=Tiny,
    model=str(Path(__file__).parent / "extras" / "tiny" / "checkpoint"),
    window=13,
    latent=(8, 8, 8),
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=3.0),
    settings=Settings(stride=4, t_min=300, csd_iters=5, csd_lr=1.0),  # ours: small latents fix identity at lower noise
    dtype="float32",
    scenario="tiny-star",
    num_inference_steps=25,  # ours: no measurable difference from 50 (extras/measure/README.md)
    guidance_scale=4.0,  # ours: cleaner pictures than 6
    fps=16,
    needs_gpu=False,
    window_batch=5,
    captions=True,
    seconds={},
)


# --------------------------------------------------------------------------------------------------
# Open-Sora Plan v1.3


class OpenSoraPlan(Backbone):
    """Open-Sora Plan v1.3: hub id, or a folder laid out like LanguageBind/Open-Sora-Plan-v1.3.0.

    The text encoder is the folder's own mt5-xxl/ if it has one, else google/mt5-xxl.
    """

    prediction = "v_prediction"
    scheduler = dict(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    untiled = "Open-Sora Plan's decoder streams, so it"
    frame_timesteps = True
    positive = "high quality, high aesthetic, {}"  # the authors' templates; tokens are the same without line breaks
    negative_prompt = (
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )
    text_length = 512

    @staticmethod
    def inspect(model: str) -> dict[str, Any]:
        """Window (latent frames) and latent shape (C, H, W) of a model, from its configuration."""
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

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing, from pure noise; the authors sample with
        EulerAncestral, the paper with DDIM."""
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler(**scheduler)
        ddim.set_timesteps(steps)
        return diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))

    def load_pipe(self, *parts: str) -> Any:
        from extras.ports.opensora_plan import load_pipe

        return load_pipe(self.model, self.dtype, parts)

    def template(self, text: str) -> str:
        return text if text == self.negative_prompt else self.positive.format(text)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor, Tensor]:
        tokens = pipe.tokenizer(
            text, padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt"
        ).to(self.device)
        output = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.last_hidden_state[0].to(self.dtype), tokens.attention_mask[0].bool()  # L D, L

    def denoise(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.pipe.transformer(x, t, text, mask)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames, each
        8H x 8W x 3 uint8, one at a time."""
        for video in self.pipe.vae.decode(latents.transpose(0, 1)[None].to(self.device, self.dtype)):
            yield from to_uint8(video[0])


OPENSORA_PLAN = Recipe(
    backbone=OpenSoraPlan,
    model="LanguageBind/Open-Sora-Plan-v1.3.0",
    window=24,
    latent=(8, 44, 80),
    scheduler=OpenSoraPlan.scheduler,
    settings=Settings(stride=6),
    dtype="float16",
    scenario="corgi",
    num_frames=357,  # 90 latent frames, the paper's 20 s
    frames_step=4,
    guidance_scale=7.5,
    fps=18,
)
