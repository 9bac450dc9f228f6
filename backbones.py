"""From a pretrained text-to-video model to SynCoS's `predict_x0`, and from latents to frames.

    backbone = COGVIDEOX_2B.make("cuda", torch.float16)
    backbone.encode(prompts)          each once; the text encoder is dropped afterwards
    levels = backbone.levels(50)      the noise levels of 50 steps; `predict_x0` takes their t
    backbone.load()                   transformer and decoder
    latents = syncos(backbone.predict_x0, noise, levels, windows, ...)
    backbone.release_transformer()    leaves the memory to the decoder
    for frame in backbone.decode(latents): ...

CogVideoX (2B, 5B) needs only this file, syncos.py, diffusers and transformers; Open-Sora Plan v1.3
also its port in `extras/ports/`. Both trust the files that they load; `extras/models/` has versions
that refuse damaged and foreign ones, and further models.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers as D
import numpy as np
import torch
from torch import Tensor

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
    stride: int  # latent frames between windows [paper: 4 for CogVideoX, 6 for Open-Sora Plan]
    scheduler: Mapping  # its configuration, which gives the noise schedule of the run
    dtype: str  # on a GPU; float32 on the CPU
    settings: Settings = Settings()
    scenario: str = "corgi"  # of prompts.SCENARIOS
    num_frames: int = 193  # video frames: 49 latent frames, 4x the base clip
    frames_per_latent: int = 4  # temporal compression
    frames_step: int = 8  # num_frames must be frames_step * n + 1 (CogVideoX's VAE needs an odd number of latents)
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    fps: float = 8
    needs_gpu: bool = True
    window_batch: int = 1  # windows per call of the network
    captions: bool = False  # under the video
    seconds: Mapping = field(default_factory=dict)  # per evaluation on a GPU, from public figures for a base clip

    @property
    def latent_frames(self) -> int:
        return (self.num_frames - 1) // self.frames_per_latent + 1

    def windows(self) -> list[slice]:
        """Windows over the whole video, in latent frames. Raises ValueError if they do not fit."""
        return make_windows(self.latent_frames, self.window, self.stride)

    def make(self, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> "Backbone":
        """The backbone with this recipe's model, guidance and schedule; options: `Backbone`'s."""
        backbone = self.backbone(self.model, device, dtype, self.guidance_scale, **options)
        backbone.scheduler = self.scheduler
        return backbone


class Backbone:
    """Prompt cache, placement, guidance, precision and conversion to x0, the same for every model.

    model: hub id or folder. offload: "none", or "model" or "sequential" to move whole models or
    single layers to the device when they are called. tiling: decode in spatial tiles, if it can.

    A new model is a subclass with the attributes below and

        make_levels(scheduler, steps)   static: the noise levels, by syncos.diffusion_levels or
                                        flow_levels
        load_pipe(*parts)               an object with those of tokenizer, text_encoder, transformer
                                        and vae as attributes, and None for the others. It can
                                        `to(device=...)` and, for offload, what diffusers' pipelines
                                        can: any DiffusionPipeline will do
        encode_text(pipe, text)         a prompt as a tuple of tensors without a batch axis, each of
                                        one shape for all prompts
        denoise(x, t, *texts)           the network's raw output. x: B x f x C x H x W in `dtype`;
                                        t: float32, B, or B x f if it has frame_timesteps; texts:
                                        encode_text's tensors, stacked to B x ...
        decode(latents)                 F x C x H x W -> frames, H x W x 3 uint8, one at a time
    """

    pipe: Any  # what load_pipe gave
    prediction: str  # what `denoise` returns: "v_prediction", "epsilon" or "flow"
    scheduler: Mapping  # its configuration, for make_levels
    negative_prompt = ""
    frame_timesteps = False  # does `denoise` take a timestep per frame as well as one per window?

    def __init__(self, model: str, device: str = "cpu", dtype: torch.dtype = torch.float32, guidance_scale: float = 6.0,
                 offload: str = "none", tiling: bool = False):  # fmt: skip
        self.model, self.device, self.dtype = model, torch.device(device), dtype
        self.guidance_scale, self.offload, self.tiling = guidance_scale, offload, tiling
        self.texts: dict[str, tuple[Tensor, ...]] = {}
        self.at: dict[float, Level] = {}

    def set_levels(self, levels: Sequence[Level]) -> None:
        """The noise levels of a run: from then on `predict_x0` knows their timesteps."""
        self.at = {level.t: level for level in levels[:-1]}

    def levels(self, steps: int) -> list[Level]:
        """The noise levels of `steps` denoising steps by the model's own scheduler, set."""
        self.set_levels(levels := self.make_levels(self.scheduler, steps))
        return levels

    def load_parts(self, *parts: str) -> Any:
        """A pipeline with some of tokenizer, text_encoder, transformer and vae, on their device."""
        self.place(pipe := self.load_pipe(*parts))
        return pipe

    def place(self, pipe: Any) -> None:
        move = pipe.to if self.offload == "none" else getattr(pipe, f"enable_{self.offload}_cpu_offload")
        move(device=self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> None:
        """Encode each new prompt once. The text encoder, about 10 GB for the big models, is dropped
        afterwards. Raises FloatingPointError if an embedding is not finite."""
        new = [text for text in dict.fromkeys([self.negative_prompt, *prompts]) if text not in self.texts]
        if not new:
            return
        pipe = self.load_parts("tokenizer", "text_encoder")
        for text in new:
            self.texts[text] = tuple(x.to(self.device) for x in self.encode_text(pipe, text))
            check_finite(f'The embedding of "{text[:60]}"', *self.texts[text])
        del pipe
        free_memory()

    def load(self, decoder_only: bool = False) -> None:
        """Load what `predict_x0` and `decode` need, or `decode` alone."""
        self.pipe = self.load_parts("vae") if decoder_only else self.load_parts("transformer", "vae")

    def release_transformer(self) -> None:
        """Leave the memory to `decode`; `predict_x0` cannot be called any more."""
        self.pipe.transformer = None
        self.place(self.pipe)  # again, because the decoder's offload hook refers to the transformer
        free_memory()

    @torch.no_grad()
    def predict_x0(self, latents: Tensor, t: float, prompts: list[str]) -> Tensor:
        """SynCoS's contract: noisy windows B x f x C x H x W in, guided x0 out, both float32.
        Raises ValueError if t is not a timestep of the levels, or a prompt was not encoded."""
        if t not in self.at:
            raise ValueError(f"{t} is not a timestep of this run; call levels(steps) first and pass the t of a level.")
        if unknown := [text for text in prompts if text not in self.texts]:
            raise ValueError(f'"{unknown[0]}" has not been encoded; call encode(prompts) before load().')
        return to_x0(self.guided(latents, torch.tensor([t]), prompts), latents, self.at[t], self.prediction)

    @torch.no_grad()
    def guided(self, latents: Tensor, times: Tensor, prompts: list[str]) -> Tensor:
        """The network's output with classifier-free guidance, float32, in the shape of the latents.
        times: 1 or B timesteps, or B x f if the model has `frame_timesteps` (extras/baselines)."""
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


def ddim_levels(ddim: Any, steps: int) -> list[Level]:
    """The noise levels of a diffusers scheduler with DDIM's table, in `steps` steps."""
    ddim.set_timesteps(steps)
    return diffusion_levels(ddim.alphas_cumprod, ddim.timesteps.tolist(), float(ddim.final_alpha_cumprod))


def free_memory() -> None:
    """Free what was dropped: offload hooks make reference cycles, and torch caches blocks."""
    gc.collect()
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises FloatingPointError, with what to do, if a value is not finite."""
    if any((~x.isfinite()).any() for x in tensors):
        way_out = "float16 is too small for some models: use bfloat16 or float32. If that does not help, the"
        raise FloatingPointError(f"{what} is not finite. {way_out} weights are damaged.")


def to_uint8(video: Tensor) -> np.ndarray:
    """3 n H W in about [-1, 1] -> n H W 3. Raises FloatingPointError if a value is not finite."""
    check_finite("A decoded frame", video)
    return (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


# --------------------------------------------------------------------------------------------------
# CogVideoX


class CogVideoX(Backbone):
    """CogVideoX 2B (sincos positions) or 5B (rotary), not 1.5, in diffusers format. Every window is
    a clip of its own to the model: positions restart at 0. Raises ValueError for a scheduler that
    is not for v-prediction."""

    prediction = "v_prediction"
    frame_timesteps = True  # see extras/baselines/fifo.py

    def __init__(self, model: str, *args, **options):
        super().__init__(model, *args, **options)
        self.config, self.scheduler = self.read_configs(model)
        self.text_length = self.config.get("max_text_seq_length", 226)  # tokens

    @classmethod
    def read_configs(cls, model: str) -> tuple[Mapping, Mapping]:
        """The transformer's configuration and the scheduler's."""
        transformer = D.CogVideoXTransformer3DModel.load_config(model, subfolder="transformer")
        scheduler = D.CogVideoXDDIMScheduler.load_config(model, subfolder="scheduler")
        if (kind := scheduler.get("prediction_type")) != cls.prediction:
            hint = f'use its own scheduler, with "prediction_type": "{cls.prediction}"'
            raise ValueError(f"{model}/scheduler has prediction_type {kind}, but CogVideoX predicts v: {hint}.")
        return transformer, scheduler

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing: it starts at pure noise, t = 999, where alpha is 0."""
        return ddim_levels(D.CogVideoXDDIMScheduler.from_config(scheduler, timestep_spacing="trailing"), steps)

    def load_pipe(self, *parts: str) -> Any:
        left_out = {name: None for name in ("tokenizer", "text_encoder", "transformer", "vae") if name not in parts}
        return D.CogVideoXPipeline.from_pretrained(self.model, dtype=self.dtype, **left_out)

    def load(self, decoder_only: bool = False) -> None:
        super().load(decoder_only)
        if self.tiling:
            self.pipe.vae.enable_tiling()

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor]:
        options = dict(do_classifier_free_guidance=False, max_sequence_length=self.text_length)
        return (pipe.encode_prompt(text, **options)[0][0],)  # L D

    def denoise(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        (_, f, _, H, W), scale, rotary = x.shape, self.pipe.vae_scale_factor_spatial, None
        if self.pipe.transformer.config.use_rotary_positional_embeddings:
            rotary = self.pipe._prepare_rotary_positional_embeddings(H * scale, W * scale, f, self.device)
        return self.pipe.transformer(x, text, t.flatten(), image_rotary_emb=rotary, return_dict=False)[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        """Latents F x C x H x W as 4(F - 1) + 1 video frames (F odd)."""
        z = latents.transpose(0, 1)[None].to(self.device, self.dtype) / self.pipe.vae.config.scaling_factor
        for frames in self.pipe.vae.decode(z, return_dict=False)[0][0].split(8, dim=1):  # 3 n H W
            yield from to_uint8(frames)


COGVIDEOX_SCHEDULER = dict(
    beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
    rescale_betas_zero_snr=True, set_alpha_to_one=True,
)  # fmt: skip
COGVIDEOX_2B = Recipe(
    CogVideoX, "zai-org/CogVideoX-2b", window=13, latent=(16, 60, 90), stride=4, dtype="float16",
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=3.0),
    seconds={"A100": 1.8, "H100": 0.9},  # 90 and 45 s for 50 steps: github.com/THUDM/CogVideo, README
)  # fmt: skip
COGVIDEOX_5B = replace(
    COGVIDEOX_2B, model="zai-org/CogVideoX-5b", dtype="bfloat16",
    scheduler=dict(COGVIDEOX_SCHEDULER, snr_shift_scale=1.0),
    seconds={"A100": 3.6, "H100": 1.8},  # 180 and 90 s, same source
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Open-Sora Plan v1.3


class OpenSoraPlan(Backbone):
    """Open-Sora Plan v1.3: hub id, or a folder laid out like LanguageBind/Open-Sora-Plan-v1.3.0.
    The text encoder is the folder's own mt5-xxl/ if it has one, else google/mt5-xxl."""

    prediction = "v_prediction"
    scheduler = dict(prediction_type=prediction, rescale_betas_zero_snr=True, timestep_spacing="trailing",
                     clip_sample=False)  # fmt: skip
    frame_timesteps = True
    text_length = 512
    positive = "high quality, high aesthetic, {}"  # the authors' templates; tokens are the same without line breaks
    negative_prompt = (
        "nsfw, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
        "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
    )

    @staticmethod
    def make_levels(scheduler: Mapping, steps: int) -> list[Level]:
        """DDIM with trailing spacing, as in the paper; the authors sample with EulerAncestral."""
        return ddim_levels(D.DDIMScheduler(**scheduler), steps)

    def load_pipe(self, *parts: str) -> Any:
        from extras.ports.opensora_plan import load_pipe

        return load_pipe(self.model, self.dtype, parts)

    def template(self, text: str) -> str:
        return text if text == self.negative_prompt else self.positive.format(text)

    def encode_text(self, pipe: Any, text: str) -> tuple[Tensor, Tensor]:
        options = dict(padding="max_length", max_length=self.text_length, truncation=True, return_tensors="pt")
        tokens = pipe.tokenizer(self.template(text), **options).to(self.device)
        output = pipe.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
        return output.last_hidden_state[0].to(self.dtype), tokens.attention_mask[0].bool()  # L D, L

    def denoise(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return self.pipe.transformer(x, t, text, mask)

    def decode(self, latents: Tensor) -> Iterator[np.ndarray]:
        for video in self.pipe.vae.decode(latents.transpose(0, 1)[None].to(self.device, self.dtype)):
            yield from to_uint8(video[0])


OPENSORA_PLAN = Recipe(
    OpenSoraPlan, "LanguageBind/Open-Sora-Plan-v1.3.0", window=24, latent=(8, 44, 80), stride=6, dtype="float16",
    scheduler=OpenSoraPlan.scheduler, num_frames=357,  # 90 latent frames, the paper's 20 s
    frames_step=4, guidance_scale=7.5, fps=18,
)  # fmt: skip
