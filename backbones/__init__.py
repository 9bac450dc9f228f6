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

`base.py` is what all share. Each model has a file of its own, since whoever reads or copies one needs no other; the
networks and loaders that diffusers lacks are in models/.
"""

from dataclasses import replace
from pathlib import Path

from backbones.base import Backbone, Recipe, in_batches
from backbones.cogvideox import COGVIDEOX_2B, COGVIDEOX_5B, TINY, CogVideoX
from backbones.opensora_plan import OPENSORA_PLAN, OpenSoraPlan
from backbones.videocrafter2 import VIDEOCRAFTER2, VideoCrafter2
from backbones.wan import WAN, Wan

__all__ = ["Backbone", "CogVideoX", "OpenSoraPlan", "RECIPES", "VideoCrafter2", "Wan", "get_recipe", "in_batches"]

RECIPES = {
    "tiny": TINY,
    "cogvideox": COGVIDEOX_2B,
    "cogvideox-5b": COGVIDEOX_5B,
    "opensora-plan": OPENSORA_PLAN,
    "wan": WAN,
    "videocrafter2": VIDEOCRAFTER2,
}


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
