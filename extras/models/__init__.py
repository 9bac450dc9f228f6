"""All backbones by name: those of backbones.py, checked, and the further ones of this folder.

A new one is a subclass of `Checked`, with what the docstrings of `backbones.Backbone` and `Checked`
ask for, and a `Recipe` in RECIPES.
"""

from dataclasses import replace
from pathlib import Path

from backbones import COGVIDEOX_2B, COGVIDEOX_5B, OPENSORA_PLAN, Recipe
from extras.models.checked import CheckedCogVideoX, CheckedOpenSoraPlan, from_hub
from extras.models.cogvideox15 import COGVIDEOX_15, is_cogvideox15
from extras.models.tiny import TINY, TINY_UNET
from extras.models.videocrafter2 import VIDEOCRAFTER2
from extras.models.wan import WAN

RECIPES = {
    "tiny": TINY,
    "cogvideox": replace(COGVIDEOX_2B, backbone=CheckedCogVideoX),
    "cogvideox-5b": replace(COGVIDEOX_5B, backbone=CheckedCogVideoX),
    "cogvideox-1.5": COGVIDEOX_15,
    "opensora-plan": replace(OPENSORA_PLAN, backbone=CheckedOpenSoraPlan),
    "wan": WAN,
    "videocrafter2": VIDEOCRAFTER2,
    "tiny-unet": TINY_UNET,
}


def get_recipe(name: str, model: str | None = None) -> Recipe:
    """The recipe of a backbone; with another `model`, that model's window and schedule.
    CogVideoX-1.5 is recognised by its configuration.

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
            if recipe.backbone is CheckedCogVideoX and is_cogvideox15(model):
                return get_recipe("cogvideox-1.5", model)
            return replace(recipe, model=model, seconds=seconds, **recipe.backbone.inspect(model))
    except (KeyError, TypeError, AttributeError) as error:  # whatever a configuration file can hold
        raise ValueError(f"{model}: a configuration file is damaged or of another model ({error}).") from error
