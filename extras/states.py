"""The state of a run on disk: how far it has come, and with which model."""

import json
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extras import videos as V
from extras.endings import undisturbed
from extras.meeting import main_process


@dataclass
class State:
    """How far a run has come; sampling resumes from it bit for bit."""

    about: dict[str, Any]  # Run.about
    done: dict[str, Tensor] = field(default_factory=dict)  # latents of the methods that are finished
    step: int = 0  # steps done by the next method, and what it then had: latents, x0, generator
    now: dict[str, Tensor] = field(default_factory=dict)
    trace: dict[str, list[Tensor]] = field(default_factory=dict)  # of each method, the small x0 of each step
    files: dict[str, str] = field(default_factory=dict)  # `fingerprints` of the model, once it is on disk
    saved: bool = False  # does a file hold at least one step?

    def claim(self, path: Path, resumed: Path | None = None) -> None:
        """Create the file, before the first step, unless the run resumes from it. Raises ValueError
        if another run did so meanwhile."""
        if not main_process() or (resumed and path.resolve() == resumed.resolve()):
            return
        self.files = fingerprints(self.about["model"])  # first, since the file may lie in the model's folder
        try:
            path.open("x").close()
        except FileExistsError:
            raise ValueError(unfinished(path)) from None
        try:
            self.save(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def save(self, path: Path) -> None:
        """Raises OSError."""
        tensors = {f"done {k}": v for k, v in self.done.items()} | {f"now {k}": v for k, v in self.now.items()}
        tensors |= {f"trace {k}": v for k, v in self.traces().items()}
        self.files = self.files or fingerprints(self.about["model"])
        V.write_tensors(path, "state", tensors, dict(step=self.step, about=self.about, files=self.files))
        self.saved = bool(self.step or self.done)

    def keep(self, path: Path) -> str:
        """Save the state of a run that stops, if there is any, and say how to resume it."""
        with undisturbed(drop=True):
            if main_process():
                with suppress(Exception):  # an earlier step may be safe
                    if self.step or self.done:
                        self.save(path)
                if not self.saved:
                    path.unlink(missing_ok=True)
        return f"The state is safe; the same command with --resume {path} continues." if self.saved else ""

    def traces(self) -> dict[str, Tensor]:
        """The trace of each method: steps x F x D."""
        return {name: torch.stack(steps) for name, steps in self.trace.items()}

    @classmethod
    def read(cls, path: Path, about: dict[str, Any]) -> "State":
        """Raises ValueError if the file is not the state of a run like `about`. The model may lie
        elsewhere: what both places have of its files must be equal."""
        tensors, saved = V.read_tensors(path, "state")
        then, files, here = saved["about"], saved.get("files", {}), fingerprints(about["model"])
        for key, value in about.items():
            if key != "model" and then.get(key) != value:
                raise ValueError(f"{path} belongs to another run: its {key} is {then.get(key)}, not {value}.")
        common = files.keys() & here.keys()
        if changed := sorted(name for name in common if files[name] != here[name]):
            raise ValueError(f"{path} belongs to another model: {changed[0]} in {about['model']} differs from its.")
        if not common and then.get("model") != about["model"]:
            raise ValueError(f"{path} belongs to another model: {then.get('model')}, not {about['model']}.")
        part = lambda kind: {k.split(" ", 1)[1]: v for k, v in tensors.items() if k.startswith(kind)}  # noqa: E731
        traces = {name: list(trace) for name, trace in part("trace ").items()}
        return cls(about, part("done "), saved["step"], part("now "), traces, here, saved=True)


def unfinished(path: Path) -> str:
    """Why a run may not use the file of a state."""
    return (
        f"{path} holds a run that is not finished: continue it with --resume {path}, unless it is still running, or "
        "choose another --output_path (or --state) for this one."
    )


def fingerprints(model: str) -> dict[str, str]:
    """Identify a model by its contents, not its place: a hash for each file that shapes latents.
    model: a folder or hub id; empty for a hub id that was not downloaded."""
    folder = Path(model)
    try:
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model, local_files_only=True))
        files = {path.relative_to(folder): path for path in sorted(folder.rglob("*.*")) if path.is_file()}
        kinds = (".json", ".safetensors", ".bin", ".ckpt", ".pt", ".model")
        return {
            name.as_posix(): fingerprint(path)
            for name, path in files.items()
            if name.suffix in kinds and not any(part == "vae" or part.startswith(".") for part in name.parts)
        }
    except (OSError, ValueError):  # not downloaded, not readable, not a hub id
        return {}


def fingerprint(path: Path) -> str:
    """A hash of a JSON file's values, without those that only say who wrote it, or of a weight
    file's length and 64 pieces of it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if path.suffix == ".json":
            values = json.load(file)
            if isinstance(values, dict):
                values = {k: v for k, v in values.items() if not k.startswith("_") and k != "transformers_version"}
            return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
        digest = sha256(str(size).encode())
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(4096))
    return digest.hexdigest()[:16]
