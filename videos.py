"""What the command line and the measurements share: videos, contact sheets, tensors on disk; checks of what is asked.

Frames are H x W x 3 uint8 arrays, one at a time. Everything is written whole or not at all: `replacing`.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np


def say(text: str) -> None:
    """Print; if nobody reads on (`demo.py | head -1`), be silent from then on instead of failing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# Checks, before anything heavy is loaded


def device_kind(device: str) -> str:
    """cuda, mps or cpu. Raises ValueError if there is no such kind of device."""
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"There is no device {device}; use cuda, mps or cpu.")
    return kind


def check_device(device: str) -> None:
    """Raises ValueError if this machine does not have the device."""
    import torch

    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (torch.device(device).index or 0) >= count[device_kind(device)]:
        raise ValueError(f"--device {device} is not available here; use --device cpu.")


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raises ValueError if no file of that kind can be written there."""
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {' or '.join(suffixes)}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"The folder of {path} does not exist; make it first.")
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{path} cannot be written; name another file.")


def check_distinct(files: dict[str, Path]) -> None:
    """Raises ValueError if two of the files, by what they are for, are one."""
    seen: dict[Path, str] = {}
    for what, path in files.items():
        if (other := seen.setdefault(path.resolve(), what)) != what:
            raise ValueError(f"{path} would be both {other} and {what}; give one of them another name.")


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end. Raises OSError, one sentence that names `path`.

    Its name holds the process's number: two runs that write one file do not write into each other's.
    """
    partial = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        reason = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"Cannot write {path}: {reason}.") from error
    finally:
        partial.unlink(missing_ok=True)


def write_tensors(path: Path, what: str, tensors: dict[str, Any], about: dict[str, Any]) -> None:
    """Safetensors with `about` in its metadata. Raises OSError."""
    from safetensors import SafetensorError, torch

    with replacing(path) as partial:
        try:
            metadata = {"syncos": json.dumps(about | dict(what=what, names=list(tensors)))}
            torch.save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_tensors` wrote. Raises ValueError if the file is missing, damaged or something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["syncos"])
            if about["what"] != what:
                raise KeyError(what)
            return {name: file.get_tensor(name) for name in about["names"]}, about
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no {what} that this program saved ({type(error).__name__}).") from None


def read_frames(path: Path) -> tuple[Iterator[np.ndarray], float]:
    """The frames of a video file and its frame rate. Raises ValueError if it has none."""
    import imageio.v2 as imageio

    try:
        reader = imageio.get_reader(path)
        fps = reader.get_meta_data().get("fps", 8)
        first = reader.get_data(0)
    except Exception as error:  # whatever the decoder says
        raise ValueError(f"{path} is no video that can be read ({type(error).__name__}).") from error
    return (np.asarray(frame)[:, :, :3] for frame in chain([first], islice(reader.iter_data(), 1, None))), fps


def write_video(path: Path, frames: Iterable[np.ndarray], fps: int) -> None:
    """Frames as mp4 or gif; small ones enlarged to about 256 rows. Raises OSError."""
    import imageio.v2 as imageio
    from imageio_ffmpeg import count_frames_and_secs

    mp4, written = path.suffix.lower() == ".mp4", 0
    if mp4:
        options = dict(fps=fps, codec="libx264", quality=8, macro_block_size=2, output_params=["-loglevel", "error"])
    else:
        options = dict(duration=1000 / fps, loop=0)
    with replacing(path) as partial:
        with imageio.get_writer(partial, **options) as writer:
            for frame in frames:
                zoom = max(1, 256 // len(frame))
                writer.append_data(frame.repeat(zoom, 0).repeat(zoom, 1))
                written += 1
        if mp4 and count_frames_and_secs(str(partial))[0] != written:  # ffmpeg does not say that the disk is full
            raise OSError("not all frames arrived; is the disk full?")


# ----------------------------------------------------------------------------------------------------------------------
# Contact sheets


def contact_sheet(
    path: Path, picked: dict[str, dict[int, np.ndarray]], rows: list[tuple[list[int], str]], title: str
) -> None:
    """A PNG: for each event a row of frames for each method, the prompt below. Raises OSError.

    picked: method -> video frame number -> picture; rows: the frame numbers and the prompt of each event.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(next(iter(picked.values())).values()))
    height, width = first.shape[:2]
    w, gap, font = 144, 6, ImageFont.load_default(15)
    h, across = round(w * height / width), max(len(numbers) for numbers, _ in rows)
    label = 0 if len(picked) == 1 else 110
    chars = max(20, int((across * (w + gap)) / 7.6))
    texts = [wrap(text, chars) for _, text in rows]
    head = wrap(title, chars)
    total = (len(head) + 1) * 19 + sum(len(picked) * (h + 18 + gap) + len(t) * 19 + 16 for t in texts)
    sheet = Image.new("RGB", (label + across * (w + gap) + gap, total), "white")
    draw, y = ImageDraw.Draw(sheet), gap
    for line in head:
        draw.text((label + gap, y), line, "black", font)
        y += 19
    y += 8
    for (numbers, _), text in zip(rows, texts):
        for name, frames in picked.items():
            if label:
                draw.text((gap, y + h // 2 - 8), name, "black", font)
            for column, number in enumerate(numbers):
                x = label + gap + column * (w + gap)
                picture = Image.fromarray(frames[number])
                sheet.paste(picture.resize((w, h), Image.NEAREST if w > width else Image.LANCZOS), (x, y))
                draw.text((x, y + h), str(number), "gray", ImageFont.load_default(12))
            y += h + 18 + gap
        for line in text:
            draw.text((label + gap, y), line, "black", font)
            y += 19
        y += 16
    with replacing(path) as partial:
        sheet.save(partial)
