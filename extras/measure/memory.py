"""Dry run of the GPU path: full-size models on torch's `meta` device, which stores no data.

Shapes, precisions and devices are the real ones (meta refuses to mix with the CPU), so code that
runs here would run on a GPU, and the live storages are the memory it would use. Not counted: the
CUDA context (about 0.5 GiB), workspaces of kernels, and fragmentation in torch's allocator.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import syncos as S
from backbones import Backbone, Recipe
from extras.models import RECIPES
from extras.models.checked import CheckedCogVideoX
from extras.models.cogvideox15 import CogVideoX15
from extras.models.wan import Wan

T5_XXL = dict(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")


class Memory(TorchDispatchMode):
    """Counts the bytes of live storages on `device`."""

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.sizes, self.live, self.peak = device, {}, 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten._local_scalar_dense.default and args[0].device.type == self.device:
            return 0  # meta tensors have no values
        result = op(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.count, result)
        return result

    def count(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if x.device.type == self.device and id(storage) not in self.sizes:
            self.sizes[id(storage)] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, id(storage))

    def forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def take(self) -> float:
        """Peak in GiB since the last call."""
        peak, self.peak = self.peak / 2**30, self.live
        return peak


@contextmanager
def meta_as_gpu() -> Iterator[Memory]:
    """Inside, code that needs a tensor's values gets zeros, and attention never builds its matrix,
    as on a GPU."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *_, **__) -> Tensor:
        if not (query.device == key.device == value.device and query.dtype == key.dtype == value.dtype):
            raise RuntimeError("Attention needs its three tensors on one device and in one precision.")
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    with (
        patch.object(torch.Tensor, "cpu", lambda x: torch.zeros(x.shape, dtype=x.dtype)),
        patch.object(torch.nn.functional, "scaled_dot_product_attention", attention),
        patch.object(S, "rbf_kernel", lambda x: (x.new_zeros(len(x), len(x)), x.new_zeros(len(x), len(x)))),
        Memory() as memory,
    ):
        yield memory


@contextmanager
def made_of(dtype: torch.dtype) -> Iterator[None]:
    """Inside, models are created on meta, with parameters of this precision."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(default)


def make_encoder(kind: str, vocabulary: int, dtype: torch.dtype) -> torch.nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=vocabulary, **T5_XXL)
    model = getattr(transformers, f"{kind}EncoderModel")(config)
    if dtype == torch.float16:  # as from_pretrained does
        for block in model.encoder.block:
            block.layer[-1].DenseReluDense.wo.float()
    return model.eval()


def make_tokenizer() -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(RECIPES["tiny"].model, subfolder="tokenizer")  # any will do


def make_cogvideox(recipe: Recipe, parts: Sequence[str], **transformer: object) -> object:
    import diffusers as D

    dtype = getattr(torch, recipe.dtype)
    make = dict(
        tokenizer=make_tokenizer,
        text_encoder=lambda: make_encoder("T5", 32128, dtype),
        transformer=lambda: D.CogVideoXTransformer3DModel(**transformer),  # all other defaults are the 2B's
        vae=D.AutoencoderKLCogVideoX,
    )
    with made_of(dtype):
        made = {name: make[name]() if name in parts else None for name in make}
    return D.CogVideoXPipeline(**made, scheduler=D.CogVideoXDDIMScheduler.from_config(recipe.scheduler))


def make_opensora_plan(recipe: Recipe, parts: Sequence[str]) -> object:
    from extras import loading
    from extras.ports import opensora_plan as O

    dtype = getattr(torch, recipe.dtype)
    make = dict(
        tokenizer=make_tokenizer,
        text_encoder=lambda: make_encoder("MT5", 250112, dtype),
        transformer=O.OpenSoraT2V_v1_3,
        vae=O.WFVAEDecoder,
    )
    with made_of(dtype):
        return loading.Parts.make(lambda name: make[name](), parts)


def make_wan(recipe: Recipe, parts: Sequence[str]) -> object:
    import diffusers as D

    dtype = getattr(torch, recipe.dtype)
    make = dict(
        tokenizer=make_tokenizer,
        text_encoder=lambda: make_encoder("UMT5", 256384, dtype),
        transformer=lambda: D.WanTransformer3DModel(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        vae=D.AutoencoderKLWan,
    )
    made = dict.fromkeys(make)
    for name in parts:
        with made_of(torch.float32 if name == "vae" else dtype):
            made[name] = make[name]()
    return D.WanPipeline(**made, scheduler=D.FlowMatchEulerDiscreteScheduler())


def make_videocrafter2(recipe: Recipe, parts: Sequence[str]) -> object:
    import diffusers as D
    from transformers import CLIPTextConfig, CLIPTextModel

    from extras.loading import Parts
    from extras.models import videocrafter2 as V

    make = dict(
        tokenizer=make_tokenizer,
        text_encoder=lambda: CLIPTextModel(CLIPTextConfig(**V.RELEASE["text_encoder"])),
        transformer=lambda: D.UNet3DConditionModel(**V.RELEASE["unet"]),
        vae=lambda: D.AutoencoderKL(**V.RELEASE["vae"]),
    )
    with made_of(getattr(torch, recipe.dtype)):
        return Parts.make(lambda name: make[name](), parts)


FIVE_B = dict(num_layers=42, num_attention_heads=48, use_rotary_positional_embeddings=True)
MAKE = {
    "cogvideox": make_cogvideox,
    "cogvideox-5b": partial(make_cogvideox, **FIVE_B),
    "cogvideox-1.5": partial(
        make_cogvideox, **FIVE_B, sample_height=96, sample_width=170, patch_size_t=2, patch_bias=False
    ),
    "opensora-plan": make_opensora_plan,
    "wan": make_wan,
    "videocrafter2": make_videocrafter2,
}


def full_size(name: str, tiling: bool = False) -> Backbone:
    """A backbone whose parts are created on meta instead of loaded."""
    recipe = RECIPES[name]
    configs = dict(max_text_seq_length=226), recipe.scheduler
    with (
        patch.object(CheckedCogVideoX, "read_configs", return_value=configs),
        patch.object(CogVideoX15, "read_configs", return_value=configs),
        patch.object(Wan, "inspect", return_value=dict(scheduler=recipe.scheduler)),
    ):
        backbone = recipe.make("meta", getattr(torch, recipe.dtype), tiling=tiling)
    backbone.load_pipe = lambda *parts: MAKE[name](recipe, parts)
    return backbone


def dry_run(
    backbone: Backbone, recipe: Recipe, batches: Sequence[int], decoded: int = 5
) -> Iterator[tuple[str, float]]:
    """Encode, sample a step with each window batch, decode; yield each peak in GiB."""
    size, stride = recipe.window, min(recipe.stride, recipe.window)
    windows = S.make_windows(size + 3 * stride, size, stride)
    settings = replace(recipe.settings, csd_iters=1)
    prompts, load_pipe = ["a story"] * len(windows), backbone.load_pipe
    with meta_as_gpu() as memory:

        def loaded(*parts: str) -> object:  # a real run loads on the CPU, so this does not count
            pipe = load_pipe(*parts)
            memory.take()
            return pipe

        backbone.load_pipe = loaded
        backbone.encode(prompts)
        yield "encode", memory.take()
        backbone.load()
        levels = backbone.levels(recipe.num_inference_steps)[1:3]
        latents = torch.randn(windows[-1].stop, *recipe.latent).to("meta")
        memory.take()
        for n in batches:
            args = (latents, levels, windows, prompts, settings, torch.Generator())
            latents = S.syncos(backbone.predict_x0, *args, at_once=n)
            yield f"sampling, window batch {n}", memory.take()
        backbone.release_transformer()
        memory.take()
        frames = sum(1 for _ in backbone.decode(torch.zeros(decoded, *recipe.latent, device="meta")))
        assert frames == recipe.frames_per_latent * (decoded - 1) + 1, frames
        yield "decode", memory.take()


def minimal() -> dict[str, float]:
    """Peaks in GiB of extras/minimal.py, unchanged but for running one step."""
    import diffusers as D
    import imageio.v2 as imageio

    code = (Path(__file__).parents[1] / "minimal.py").read_text()
    figures, recipe, set_timesteps = {}, RECIPES["cogvideox"], D.CogVideoXDDIMScheduler.set_timesteps
    decode = D.CogVideoXPipeline.decode_latents

    def from_pretrained(name: str, dtype: torch.dtype, **left_out: None) -> object:
        if "text_encoder" in left_out:
            figures["encode"] = memory.take()
        pipe = make_cogvideox(recipe, {"tokenizer", "text_encoder", "transformer", "vae"} - set(left_out))
        memory.take()
        return pipe

    def decode_latents(pipe: object, latents: Tensor) -> Tensor:
        figures["sample"] = memory.take()
        video = decode(pipe, latents)
        figures["decode"] = memory.take()
        return video

    with (
        meta_as_gpu() as memory,
        patch.object(D.CogVideoXPipeline, "from_pretrained", from_pretrained),
        patch.object(D.CogVideoXPipeline, "to", lambda pipe, device: pipe),  # it is there already
        patch.object(D.CogVideoXPipeline, "decode_latents", decode_latents),
        patch.object(D.CogVideoXDDIMScheduler, "set_timesteps", lambda self, steps: set_timesteps(self, 1)),
        patch.object(imageio, "mimwrite", lambda *_, **__: None),
    ):
        exec(code, {})
    return figures


def rows() -> Iterator[tuple[str, str]]:
    """Peak memory of each phase, for extras/minimal.py and every big backbone."""
    for what, gib in minimal().items():
        yield f"GPU memory, predicted, extras/minimal.py, {what}", f"{gib:.1f} GiB"
    for name in MAKE:
        recipe = RECIPES[name]
        pipe = MAKE[name](recipe, ("text_encoder", "transformer", "vae"))
        parts = [x for part in pipe.components.values() if isinstance(part, torch.nn.Module) for x in part.parameters()]
        figures = {
            "all loaded": sum(x.nbytes for x in parts) / 2**30,
            **dict(dry_run(full_size(name), recipe, (1, 2, 4))),
        }
        if name.startswith("cogvideox"):
            for what, tiling in {"decode": False, "decode, tiled": True}.items():  # grows up to a CHUNK
                run = dry_run(full_size(name, tiling=tiling), recipe, (), recipe.latent_frames)
                figures[what] = dict(run)["decode"]
        for what, gib in figures.items():
            yield f"GPU memory, predicted, {name}, {what}", f"{gib:.1f} GiB"
