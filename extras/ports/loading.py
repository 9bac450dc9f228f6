"""What loaders of foreign checkpoints share: read pickles safely, fit every key or name the one that does not."""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn


class Parts(DiffusionPipeline):
    """The models together, for diffusers' placement and offload; nothing here samples."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, tokenizer, text_encoder, transformer, vae):  # no defaults: those diffusers would not move
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae)

    @classmethod
    def make(cls, load: Callable[[str], Any], parts: Sequence[str]) -> "Parts":
        """With load(name) for each of `parts`, and None for the others."""
        names = ("tokenizer", "text_encoder", "transformer", "vae")
        return cls(**{name: load(name) if name in parts else None for name in names})


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote, by weights_only, which runs nothing that is in it. Tensors are read when they are used.

    Raises OSError if there is no such file, ValueError if it holds anything else than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is refused: it must be a torch file of tensors and nothing else.") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} is refused: it holds a {type(state).__name__}, not tensors by name.")
    return state


def check_fit(what: str, missing: Iterable, unexpected: Iterable, mismatched: Iterable) -> None:
    """Raises ValueError if there is any such key."""
    for problem, keys in dict(missing=missing, unexpected=unexpected, mismatched=mismatched).items():
        if keys := sorted(map(str, keys)):
            raise ValueError(f"{what} does not fit the model: {len(keys)} {problem} keys, first {keys[0]}.")


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Make these tensors the model's parameters. Raises ValueError unless all keys and shapes fit."""
    own = {k: v.shape for k, v in model.state_dict().items()}
    both = own.keys() & state.keys()
    wrong = [f"{k} {tuple(state[k].shape)}, expected {tuple(own[k])}" for k in both if own[k] != state[k].shape]
    check_fit(what, own.keys() - state.keys(), state.keys() - own.keys(), wrong)
    model.load_state_dict(state, assign=True)
