"""What all loaders share: a part of a model loads completely, or is refused in a sentence."""

import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers.utils.logging as diffusers_logging
import huggingface_hub.errors as H
import torch
import transformers.utils.logging as transformers_logging
from diffusers import DiffusionPipeline
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from torch import Tensor, nn

from extras.errors import causes, first_line

os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")  # transformers would download a converted copy of a .bin
SHOW_DOWNLOADS = not are_progress_bars_disabled()
for logging in (diffusers_logging, transformers_logging):  # silence the libraries: we raise one-line errors
    logging.set_verbosity_error()
    logging.disable_progress_bar()
if SHOW_DOWNLOADS:  # disabled with the bars of loading; a download of gigabytes needs them
    enable_progress_bars()
LFS = b"version https://git-lfs"  # how a Git-LFS pointer begins, which a clone without LFS has in place of a file


class Parts(DiffusionPipeline):
    """The models together, for diffusers' placement and offload; nothing here samples."""

    model_cpu_offload_seq = "text_encoder->transformer->vae"

    def __init__(self, tokenizer, text_encoder, transformer, vae):  # DiffusionPipeline.to() skips what has a default
        super().__init__()
        self.register_modules(tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer, vae=vae)

    @classmethod
    def make(cls, load: Callable[[str], Any], parts: Sequence[str]) -> "Parts":
        """With load(name) for each of `parts`, and None for the others."""
        names = ("tokenizer", "text_encoder", "transformer", "vae")
        return cls(**{name: load(name) if name in parts else None for name in names})


def load_network(kind: Any, model: str, folder: str, dtype: torch.dtype, strict: bool = False) -> nn.Module:
    """A network of diffusers or transformers, by its class, from a folder of a model (hub id or
    path; "": its root).

    A local folder that has only one variant (*.fp16.safetensors) loads that. strict: keys that the
    network does not have are an error, too. Raises ValueError if a file is missing or damaged, or a
    key is missing or unfit.
    """
    name, path = f"{model}/{folder}".rstrip("/"), Path(model) / folder
    if Path(model).is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"Cannot load {name}: {path / 'config.json'} is missing.")
    check_pointers(path)
    options = dict(variant=variant) if (variant := only_variant(path)) else {}
    options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # we refuse them below
    try:
        network, info = kind.from_pretrained(model, subfolder=folder, dtype=dtype, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many kinds: no such file, a damaged one, a wrong shape, a missing key
        raise ValueError(f"Cannot load {name}: {hub_failure(error) or first_line(error)}") from error
    wrong = [f"{key} {tuple(shape)}, expected {tuple(own)}" for key, shape, own in info["mismatched_keys"]]
    check_fit(name, info["missing_keys"], info["unexpected_keys"] if strict else [], wrong)
    if unset := [key for key, x in network.state_dict().items() if x.is_meta]:
        check_fit(name, unset, [], [])
    return network.eval()


def load_tokenizer(model: str, folder: str) -> Any:
    """Raises ValueError if it is missing or damaged."""
    from transformers import AutoTokenizer

    name, path = f"{model}/{folder}".rstrip("/"), Path(model) / folder
    if Path(model).is_dir() and not path.is_dir():
        raise ValueError(f"Cannot load the tokenizer of {model}: the folder {path} is missing.")
    check_pointers(path)
    try:
        return AutoTokenizer.from_pretrained(model, subfolder=folder)
    except OSError as error:
        raise ValueError(f"Cannot load the tokenizer {name}: {hub_failure(error) or first_line(error)}") from error
    except Exception as error:  # whatever a damaged file leads to
        why = hub_failure(error) or "its files are missing or damaged."
        raise ValueError(f"Cannot load the tokenizer {name}: {why}") from error


def hub_failure(error: BaseException) -> str:
    """Why the Hugging Face hub did not give a file, in its own words, and what to do: one or two
    sentences. Empty if `error` and its causes are of another kind."""
    chain = causes(error)
    reached = [e for e in chain if isinstance(e, H.HfHubHTTPError)]
    if any(isinstance(e, H.EntryNotFoundError) for e in reached):
        return ""  # the model exists: the library's own message names the file that it lacks
    if reached:
        status = getattr(reached[0].response, "status_code", "")
        said = (reached[0].server_message or first_line(reached[0])).splitlines()[0].rstrip(".")
        if isinstance(reached[0], H.GatedRepoError):
            return f"{said}. Accept the model's terms on its page, then log in with `hf auth login`."
        if isinstance(reached[0], H.RepositoryNotFoundError):
            return f"{said}. Check the name; if the model is private, log in with `hf auth login`."
        advice = " Log in again with `hf auth login`, or correct HF_TOKEN." if status == 401 else ""
        return f"{said} (status {status}).{advice}"
    if any(isinstance(e, H.OfflineModeIsEnabled) for e in chain) or constants.HF_HUB_OFFLINE and is_missing(chain):
        return "it is not on this machine and HF_HUB_OFFLINE forbids a download; unset it, or download elsewhere first."
    if is_missing(chain) or any(type(e).__module__.startswith(("httpx", "httpcore")) for e in chain):
        root = getattr(chain[-1], "strerror", None) or first_line(chain[-1])
        hub = constants.ENDPOINT.rpartition("@")[2]  # without a password
        return f"{hub} cannot be reached: {root.rstrip('.')}. Check the connection, the proxy and HF_ENDPOINT."
    return ""


def is_missing(chain: Sequence[BaseException]) -> bool:
    return any(isinstance(e, H.LocalEntryNotFoundError) for e in chain)


def check_pointers(path: Path) -> None:
    """Raises ValueError if a file of a local folder is a Git-LFS pointer."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []:
        if file.is_file() and file.stat().st_size < 1024 and file.read_bytes().startswith(LFS):
            raise ValueError(f"{file} is a Git-LFS pointer, not the file itself: run `git lfs pull` in its repository.")


def only_variant(path: Path) -> str | None:
    """The variant of a local folder that has no weights but those, e.g. "fp16"."""
    weights = [file.name for file in (*path.glob("*.safetensors"), *path.glob("*.bin"))]
    stems = ("model", "diffusion_pytorch_model", "pytorch_model")
    variants = {n.split(".")[1].split("-")[0] for n in weights if n.count(".") == 2 and n.split(".")[0] in stems}
    return variants.pop() if len(variants) == 1 and all(name.count(".") == 2 for name in weights) else None


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What torch.save wrote, by weights_only, which runs nothing that is in it.
    Tensors are read when they are used.

    Raises OSError if the file is missing, ValueError if it holds anything but tensors.
    """
    check_pointers(Path(path))
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
            plural = "s" * (len(keys) > 1)
            raise ValueError(f"{what} does not fit the model: {len(keys)} {problem} key{plural}, first {keys[0]}.")


def fill(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Make these tensors the model's parameters. Raises ValueError unless all fit."""
    own = {k: v.shape for k, v in model.state_dict().items()}
    both = own.keys() & state.keys()
    wrong = [f"{k} {tuple(state[k].shape)}, expected {tuple(own[k])}" for k in both if own[k] != state[k].shape]
    check_fit(what, own.keys() - state.keys(), state.keys() - own.keys(), wrong)
    model.load_state_dict(state, assign=True)
