"""What the command line and the measurements share: videos, contact sheets, tensors on disk; checks of what is asked.

Frames are H x W x 3 uint8 arrays, one at a time. Everything is written whole or not at all: `replacing`.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
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
        raise ValueError(f"There is no {device} here; --device cpu takes the CPU, very slowly with a big model.")


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
        meta = reader.get_meta_data()
        fps = meta.get("fps") or 1000 / meta["duration"]  # of a gif: milliseconds a frame
        first = reader.get_data(0)
    except Exception as error:  # whatever the decoder says
        raise ValueError(f"{path} is no video that can be read ({type(error).__name__}).") from error
    return (np.asarray(frame)[:, :, :3] for frame in chain([first], islice(reader.iter_data(), 1, None))), fps


def write_video(path: Path, frames: Iterator[np.ndarray], fps: int) -> None:
    """Frames as mp4 or gif; small ones enlarged to about 256 rows. Raises OSError."""
    from imageio_ffmpeg import count_frames_and_secs, write_frames

    first = next(frames)
    zoom = max(1, 256 // len(first))
    size = (zoom * first.shape[1], zoom * first.shape[0])
    if path.suffix.lower() == ".mp4":
        options = dict(quality=8, macro_block_size=2, output_params=["-movflags", "+faststart"])  # plays everywhere
    else:  # a palette of its own for each frame, so that ffmpeg need not keep them all
        palette = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
        options = dict(codec="gif", pix_fmt_out="pal8", macro_block_size=1, output_params=["-filter_complex", palette])
    written = 0
    with replacing(path) as partial:
        with closing(write_frames(str(partial), size, fps=fps, ffmpeg_log_level="quiet", **options)) as ffmpeg:
            ffmpeg.send(None)
            for frame in chain([first], frames):
                written += 1
                try:
                    ffmpeg.send(np.ascontiguousarray(frame.repeat(zoom, 0).repeat(zoom, 1)))
                except OSError:
                    break
        try:  # when the disk is full ffmpeg ends in silence
            complete = count_frames_and_secs(str(partial))[0] == written
        except RuntimeError:
            complete = False
        if not complete:
            raise OSError("ffmpeg could not finish it (is the disk full?)")


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


def write_story(
    path: Path,
    streams: dict[str, Iterator[np.ndarray]],
    count: int,
    fps: int,
    events: list[tuple[tuple[float, float], str]],
    title: str,
) -> None:
    """The video, methods side by side, and the contact sheet beside it, of frames that are taken one by one.

    streams: method -> its `count` frames; events: from where to where, as shares of the video, and the prompt. Raises
    OSError.
    """
    from tqdm import tqdm

    rows = []  # eight frames spread over each event
    for (start, stop), text in events:
        rows.append(([int(count * (start + (stop - start) * (k + 0.5) / 8)) for k in range(8)], text))
    wanted = set(chain(*(numbers for numbers, _ in rows)))
    picked: dict[str, dict[int, np.ndarray]] = {name: {} for name in streams}

    def frames() -> Iterator[np.ndarray]:
        for number, row in enumerate(zip(*streams.values())):
            if number in wanted:
                for name, frame in zip(picked, row):
                    picked[name][number] = frame
            bar.update()
            yield np.concatenate(row, axis=1)

    with tqdm(total=count, desc="decoding", unit="frame") as bar:
        write_video(path, frames(), fps)
    contact_sheet(path.with_suffix(".png"), picked, rows, title)
    say(f"Wrote {path} and {path.with_suffix('.png')}")
