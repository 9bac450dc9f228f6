"""Videos, contact sheets, tensors on disk, and checks of arguments.

Frames are H x W x 3 uint8 arrays, one at a time. Files are written completely or not at all:
`replacing`.
"""

import functools
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, islice
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from extras.errors import first_line


def say(text: str) -> None:
    """Print; once the reader has left (`demo.py | head -1`), stay silent instead of failing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def open_streams(quiet: bool = False) -> None:
    """Make printing safe: without a terminal, or with letters that it lacks. quiet: print errors
    only."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None or (quiet and name == "stdout"):  # None: closed, or a program without a console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        if reconfigure := getattr(getattr(sys, name), "reconfigure", None):  # a notebook's stream has none
            reconfigure(errors="replace")


# --------------------------------------------------------------------------------------------------
# Checks, before anything heavy is loaded


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError if a file of this kind cannot be written there."""
    folder = path.absolute().parent
    try:
        size, longest, unit = len(os.fsencode(path.name)), 255, "bytes"
        if hasattr(os, "pathconf"):
            longest = os.pathconf(folder, "PC_NAME_MAX") if folder.is_dir() else 255
        else:
            size, unit = len(path.name.encode("utf-16-le")) // 2, "letters"
        if size > longest:
            raise ValueError(f"A file name of {size} {unit} is too long; at most {longest} are allowed: {path.name}.")
        if sys.platform == "win32" and (wrong := refused_by_windows(path.name)):
            raise ValueError(f"Windows does not allow {wrong} as or in a file's name: {path.name}.")
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"The name of {path} must end in {' or '.join(suffixes)}.")
        if not folder.is_dir():
            raise ValueError(f"The folder of {path} does not exist; create it first.")
        if path.resolve().is_dir() or (path.exists() and not os.access(path, os.W_OK)):
            raise ValueError(f"{path} cannot be written; choose another file.")
        with NamedTemporaryFile(dir=folder, suffix=path.suffix):  # tests the file system itself
            pass
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.") from None


def check_ffmpeg() -> None:
    """Raise ValueError if ffmpeg, which writes the videos, is missing."""
    from imageio_ffmpeg import get_ffmpeg_exe

    try:
        get_ffmpeg_exe()
    except RuntimeError as error:
        raise ValueError(f"Videos cannot be written: {first_line(error)}") from None


def refused_by_windows(name: str) -> str:
    """What Windows does not allow in a file's name, or keeps for a device (NUL.mp4 is lost)."""
    device = re.match(
        r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\.|$)", name, re.IGNORECASE
    )
    sign = re.search(r'[<>:"/\\|?*\x00-\x1f]|[. ]$', name)
    return (device[1] if device else "") or (repr(sign[0]) if sign else "")


def check_distinct(files: dict[str, Path]) -> None:
    """Raise ValueError if two files (purpose -> path) are the same."""
    seen: dict[Path, str] = {}
    for what, path in files.items():
        if (other := seen.setdefault(path.resolve(), what)) != what:
            raise ValueError(f"{path} would be both {other} and {what}; give one of them another name.")


def check_rate(path: Path, fps: float) -> None:
    """Raise ValueError if a GIF, which counts hundredths of a second, cannot be that fast."""
    if path.suffix.lower() == ".gif" and fps > 50:
        raise ValueError(f"A GIF shows at most 50 frames per second, not {fps:g}: lower --fps or write an .mp4.")


# --------------------------------------------------------------------------------------------------
# Files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path, absolute, that replaces `path` at the end.
    Raises OSError, one sentence that names `path`.

    Its name is short and nobody else's, so two runs that write the same file do not collide.
    """
    partial = path.absolute().with_name(f".partial-{uuid4().hex[:12]}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error.strerror or first_line(error)}".rstrip(".") + ".") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def write_tensors(path: Path, what: str, tensors: dict[str, Any], about: dict[str, Any], new: bool = False) -> None:
    """Write safetensors with `about` in the metadata; new: never over a file. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as partial:
        if new and path.exists():
            raise FileExistsError("another run has written it")
        try:
            metadata = {"syncos": json.dumps(about | dict(what=what, names=list(tensors)))}
            own = {name: x.clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
            save_file(own, partial, metadata=metadata)  # which refuses tensors that share memory
        except SafetensorError as error:
            raise OSError(str(error)) from error


def read_tensors(path: Path, what: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what `write_tensors` wrote, whole: Windows cannot replace a file that tensors are mapped
    to. Raises ValueError if the file is missing, damaged or of another kind."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["syncos"])
            if about["what"] != what:
                raise KeyError(what)
            return {name: file.get_tensor(name).clone() for name in about["names"]}, about
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no {what} that this program saved ({type(error).__name__}).") from None


def read_frames(path: Path) -> tuple[Iterator[np.ndarray], float]:
    """Frames of a video file, without repeats where the rate varies, and its frame rate. A GIF that
    states no rate has 10, as in browsers.

    Raises ValueError if it has no frames, or is a WebP, which stores equal frames once.
    """
    import imageio.v2 as imageio

    if path.suffix.lower() == ".webp":
        raise ValueError(f"{path} is a WebP, which stores equal frames once; measure an .mp4 of the same run.")
    options = {} if path.suffix.lower() == ".gif" else dict(format="FFMPEG", output_params=["-fps_mode", "passthrough"])
    try:
        reader = imageio.get_reader(path, **options)
        meta = reader.get_meta_data()
        fps = meta.get("fps") or 1000 / (meta.get("duration") or 100)  # gif: milliseconds per frame
        first = reader.get_data(0)
    except Exception as error:  # any error of the decoder
        raise ValueError(f"{path} cannot be read as a video ({type(error).__name__}).") from error
    return (np.asarray(frame)[:, :, :3] for frame in chain([first], islice(reader.iter_data(), 1, None))), fps


def count_frames(path: Path) -> int:
    """Number of frames that `read_frames` gives. Raises ValueError if the file is damaged or gives
    less than its header promises."""
    from imageio_ffmpeg import get_ffmpeg_exe

    frames, _ = read_frames(path)  # raises ValueError if there are none
    frames.close()
    decode = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "null", "-progress", "-", "-nostats", "-"]
    options = dict(capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    run = subprocess.run([get_ffmpeg_exe(), "-v", "error", "-i", str(path), *decode], **options)
    count = int(re.findall(r"^frame=(\d+)", run.stdout, re.MULTILINE)[-1]) if "frame=" in run.stdout else 0
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        cut = path.suffix.lower() == ".gif" and file.read() != b";"  # how every GIF ends
    if cut or run.returncode or run.stderr.strip():
        reason = (run.stderr.strip().splitlines() or ["its end is missing"])[0].split("] ")[-1].rstrip(".")
        raise ValueError(
            f"{path} is damaged or cut short after {count} frames ({reason}); make it again, or save what is left "
            "as a new file."
        )
    return count


def write_video(path: Path, frames: Iterator[np.ndarray], fps: float, comment: str = "") -> None:
    """Write frames as mp4 that plays everywhere, with a comment in its metadata, or as gif or webp.
    Raises OSError with ffmpeg's own reason."""
    from imageio_ffmpeg import get_ffmpeg_exe

    first = next(frames)
    height, width = first.shape[:2]
    even = ["-vf", f"scale={width + width % 2}:{height + height % 2}", "-pix_fmt", "yuv420p"]
    if path.suffix.lower() == ".mp4":
        options = ["-c:v", "libx264", "-crf", "10", *even, "-movflags", "+faststart", "-metadata", f"comment={comment}"]
    elif path.suffix.lower() == ".webp":
        options = ["-c:v", "libwebp_anim", *even, "-quality", "75", "-loop", "0"]
    else:  # one palette per frame, so that ffmpeg need not keep all frames
        palette = "split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1"
        options = ["-c:v", "gif", "-pix_fmt", "pal8", "-filter_complex", palette]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-"]
    written = 0
    with replacing(path) as partial, TemporaryFile() as said:
        command = [get_ffmpeg_exe(), "-y", "-loglevel", "error", *source, *options, str(partial)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said)
        with subprocess.Popen(command, **pipes) as ffmpeg:
            try:
                for frame in chain([first], frames):
                    written += 1
                    try:
                        ffmpeg.stdin.write(np.ascontiguousarray(frame))
                    except OSError:  # it has ended, and said why
                        break
            except BaseException:
                ffmpeg.kill()
                raise
            finally:
                with suppress(OSError):
                    ffmpeg.stdin.close()
        if ffmpeg.returncode or not is_whole(partial, written):
            said.seek(0)
            lines = re.sub(r"^\[.*?\] ", "", said.read().decode(errors="replace"), flags=re.M).splitlines()
            raise OSError(f"ffmpeg says: {lines[0] if lines else 'nothing, but the file is not complete'}")


def is_whole(path: Path, frames: int) -> bool:
    """Whether a video has this many frames: ffmpeg fails silently on a full disk."""
    from imageio_ffmpeg import count_frames_and_secs

    if path.suffix.lower() == ".webp":  # stores equal frames once, so compare the file's length with its header
        data = path.read_bytes() if path.exists() else b""
        return len(data) == 8 + int.from_bytes(data[4:8], "little")
    try:
        return count_frames_and_secs(str(path))[0] == frames
    except RuntimeError:
        return False


# --------------------------------------------------------------------------------------------------
# Outputs to look at: a story's video and its contact sheet


FONTS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts", "/System/Library/Fonts",
         "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts")  # fmt: skip


def lacks(font: Any, text: str) -> str:
    """Letters of a text that a font lacks and draws as a box."""
    missing = bytes(font.getmask("\U0010ffff"))
    return "".join(letter for letter in dict.fromkeys(text) if letter > "~" and bytes(font.getmask(letter)) == missing)


@functools.cache
def find_font(letters: str) -> tuple[Any, str]:
    """The file of a font that has these letters (None: Pillow's own), and letters no font has."""
    from PIL import ImageFont

    best = None, lacks(ImageFont.load_default(12), letters)
    for folder in map(Path, map(os.path.expanduser, FONTS)) if best[1] else ():
        for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".ttf", ".ttc", ".otf")):
            try:
                rest = lacks(ImageFont.truetype(str(file), 12), letters)
            except Exception:  # noqa: BLE001, any error of a damaged font
                continue
            best = (str(file), rest) if len(rest) < len(best[1]) else best
            if not rest:
                return best
    if best[1]:
        warnings.warn(f"No font on this machine has {best[1][:20]}; they are drawn as boxes.", stacklevel=3)
    return best


def get_font(size: int, text: str) -> Any:
    """Font for a text."""
    from PIL import ImageFont

    file, _ = find_font("".join(sorted(set(text))))
    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


def contact_sheet(
    path: Path, picked: dict[str, dict[int, np.ndarray]], rows: list[tuple[list[int], str]], title: str
) -> None:
    """Write a PNG: for each event its heading, then one row of frames per method. Raises OSError.

    picked: method -> video frame number -> picture; rows: frame numbers and heading of each event.
    """
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(next(iter(picked.values())).values()))
    height, width = first.shape[:2]
    w, gap, small = 144, 6, ImageFont.load_default(12)
    font = get_font(15, "".join([title, *(text for _, text in rows)]))
    h, across = round(w * height / width), max(len(numbers) for numbers, _ in rows)
    label = 0 if len(picked) == 1 else 110
    wide = label + across * (w + gap) + gap
    head, *texts = (wrap(text, max(20, int(wide / 7.6))) for text in (title, *(text for _, text in rows)))
    tall = gap + 20 * len(head) + sum(12 + 20 * len(text) + len(picked) * (h + 20) for text in texts)
    sheet = Image.new("RGB", (wide, tall + gap), "white")
    draw, y = ImageDraw.Draw(sheet), gap

    def write(lines: list[str]) -> None:
        nonlocal y
        for line in lines:
            draw.text((gap, y), line, "black", font)
            y += 20

    write(head)
    for (numbers, _), text in zip(rows, texts):
        y += 12
        write(text)
        for name, frames in picked.items():
            if label:
                draw.text((gap, y + h // 2 - 8), name, "black", font)
            for column, number in enumerate(numbers):
                x = label + gap + column * (w + gap)
                picture = Image.fromarray(frames[number])
                sheet.paste(picture.resize((w, h), Image.NEAREST if w > width else Image.LANCZOS), (x, y))
                draw.text((x, y + h), str(number), "gray", small)
            y += h + 20
    with replacing(path) as partial:
        sheet.save(partial)


def shortened(about: dict[str, Any], most: int = 8000) -> str:
    """As JSON, without its longest entries if it is too long for a command line (Windows: 32,767
    characters in all, with a backslash before each quotation mark)."""
    about = dict(about)
    while len(text := json.dumps(about)) > most:
        about[max(about, key=lambda name: len(json.dumps(about[name])))] = "too long to be kept here"
    return text


def caption_strip(width: int, names: list[str], text: str, lines: int) -> np.ndarray:
    """Strip to put under a frame, rows (an even number) x width x 3: the methods' names below their
    pictures, if there are several, and `lines` lines of text."""
    from PIL import Image, ImageDraw

    size = caption_size(width // len(names))
    font, rows = get_font(size, text), (len(names) > 1) + lines
    strip = Image.new("RGB", (width, (rows * size * 4 // 3 + size) // 2 * 2), "white")
    draw, y = ImageDraw.Draw(strip), size // 3
    if len(names) > 1:
        for i, name in enumerate(names):
            draw.text((int((i + 0.5) * width / len(names)), y), name, "gray", font, anchor="ma")
        y += size * 4 // 3
    for line in caption_lines(width, len(names), text)[:lines]:
        draw.text((width // 2, y), line, "black", font, anchor="ma")
        y += size * 4 // 3
    return np.asarray(strip)


WIDE = (
    "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6\U00020000-\U0003fffd"
)
CLOSING = "\u3001\u3002\u300d\u300f\uff01\uff09\uff0c\uff1a\uff1b\uff1f"  # does not begin a line


def wrap(text: str, columns: int, most: int | None = None) -> list[str]:
    """Lines of a text, `most` at most. They break at spaces and between letters of scripts without
    spaces, such as Chinese, which take two columns each."""
    size = lambda part: sum(1 + bool(re.match(f"[{WIDE}]", letter)) for letter in part)  # noqa: E731
    lines = [""]
    for part in re.findall(f" ?(?:[{WIDE}][{CLOSING}]*|[^ {WIDE}]+)", " ".join(text.split())):
        if size(lines[-1] + part) > columns:
            part = part.lstrip()
            lines += [""] if lines[-1] else []
        for letter in [part] if size(part) <= columns else part:  # a word longer than a line
            lines += [""] if size(lines[-1] + letter) > columns and lines[-1] else []
            lines[-1] += letter
    if most and len(lines) > most:
        while size(lines[most - 1]) > columns - 4:
            lines[most - 1] = lines[most - 1][:-1]
        lines = [*lines[: most - 1], lines[most - 1].rstrip() + " ..."]
    return lines


def caption_size(width: int) -> int:
    """Font size for pictures of this width."""
    return min(max(width // 18, 12), 22)


def caption_lines(width: int, pictures: int, text: str) -> list[str]:
    return wrap(text, int(1.8 * width / caption_size(width // pictures)), 3)


def write_story(
    path: Path,
    streams: dict[str, Iterator[np.ndarray]],
    count: int,
    fps: float,
    events: list[tuple[tuple[float, float], str]],
    title: str,
    captions: bool = False,
    about: dict[str, Any] | None = None,
) -> None:
    """Write the video, methods side by side, and its contact sheet, frame by frame.

    streams: method -> its `count` frames; events: start and end as fractions of the video, and the
    prompt. Small frames are enlarged to about 256 rows; captions: add the prompt of the current
    event; about: how it was made, for whoever finds the video later. Raises OSError.
    """
    from tqdm import tqdm

    spans = [(int(count * start), int(count * stop)) for (start, stop), _ in events]
    rows = []  # eight frames spread over each event
    for i, ((first, end), ((start, stop), text)) in enumerate(zip(spans, events), 1):
        numbers = [int(first + (end - first) * (k + 0.5) / 8) for k in range(8)]
        rows.append((numbers, f"{i} \u00b7 {start * count / fps:.1f} to {stop * count / fps:.1f} s \u00b7 {text}"))
    wanted = set(chain(*(numbers for numbers, _ in rows)))
    picked: dict[str, dict[int, np.ndarray]] = {name: {} for name in streams}

    def frames() -> Iterator[np.ndarray]:
        strips: dict[str, np.ndarray] = {}
        for number, row in enumerate(zip(*streams.values())):
            if number in wanted:
                for name, frame in zip(picked, row):
                    picked[name][number] = frame
            zoom = max(1, 256 // len(row[0]))
            frame = np.concatenate(row, axis=1).repeat(zoom, 0).repeat(zoom, 1)
            if captions:
                text = next(text for (_, stop), (_, text) in zip(spans, events) if number < stop)
                if text not in strips:
                    lines = max(len(caption_lines(frame.shape[1], len(row), text)) for _, text in events)
                    strips[text] = caption_strip(frame.shape[1], list(streams), text, lines)
                frame = np.concatenate([frame, strips[text]])
            bar.update()
            yield frame

    with tqdm(total=count, desc="decoding", unit="frame") as bar:
        write_video(path, frames(), fps, shortened(about or {}))
    contact_sheet(path.with_suffix(".png"), picked, rows, title)
    say(f"Wrote {path} and {path.with_suffix('.png')}")
