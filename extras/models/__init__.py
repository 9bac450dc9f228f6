"""All backbones by name: those of backbones.py, checked, and the further ones of this folder.

A new one is a subclass of `Checked`, about 60 lines, with

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

and a `Recipe` with its settings.
"""

from dataclasses import replace
from pathlib import Path

from backbones import COGVIDEOX_2B, COGVIDEOX_5B, OPENSORA_PLAN, Recipe
from extras.models.checked import CheckedCogVideoX, CheckedOpenSoraPlan, from_hub
from extras.models.tiny import TINY, TINY_UNET
from extras.models.videocrafter2 import VIDEOCRAFTER2
from extras.models.wan import WAN

RECIPES = {
    "tiny": TINY,
    "cogvideox": replace(COGVIDEOX_2B, backbone=CheckedCogVideoX),
    "cogvideox-5b": replace(COGVIDEOX_5B, backbone=CheckedCogVideoX),
    "opensora-plan": replace(OPENSORA_PLAN, backbone=CheckedOpenSoraPlan),
    "wan": WAN,
    "videocrafter2": VIDEOCRAFTER2,
    "tiny-unet": TINY_UNET,
}


def get_recipe(name: str, model: str | None = None) -> Recipe:
    """The recipe of a backbone; with another `model`, that model's window and schedule.

    Raises ValueError if the backbone or the model does not exist. Loads no weights.
    """
    if name not in RECIPES:
        raise ValueError(f"The backbone {name} is unknown; choose one of {', '.join(RECIPES)}.")
    recipe = RECIPES[name]
    if model is None and not Path(recipe.model).is_dir():  # the released model: known without asking the hub
        return recipe
    seconds = recipe.seconds if model in (None, recipe.model) else {}
    model = model or recipe.model
    try:
        with from_hub(model):
            return replace(recipe, model=model, seconds=seconds, **recipe.backbone.inspect(model))
    except (KeyError, TypeError, AttributeError) as error:  # whatever a configuration file can hold
        raise ValueError(f"{model}: a configuration file is damaged or of another model ({error}).") from error
