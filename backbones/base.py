"""What all models share: the contract with `syncos.py`, prompts encoded once, guidance, precision, placement."""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fifo import stack_levels
from syncos import Level, PredictX0, Settings, make_windows, to_x0


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
    `encode` or `load`, which raise ValueError if a part is missing; so does tiling, where there is none.
    """

    pipe: Any  # of diffusers: the models, their placement and offload
    prediction: str  # "v_prediction", "epsilon" or "flow"
    negative_prompt = ""
    frame_timesteps = False  # can frames of one window have different timesteps?
    untiled = ""  # which model cannot decode in tiles, and why
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
        if tiling and self.untiled:
            raise ValueError(f"--vae_tiling is not there for {self.untiled}; leave it out.")
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


def to_uint8(video: Tensor) -> np.ndarray:
    """3 n H W about [-1, 1] -> n H W 3."""
    return (video.float() / 2 + 0.5).clamp(0, 1).mul(255).round().byte().permute(1, 2, 3, 0).cpu().numpy()


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

    def windows(self) -> list[slice]:
        """Over the latent frames of `num_frames`."""
        return make_windows((self.num_frames - 1) // self.frames_per_latent + 1, self.window, self.settings.stride)
