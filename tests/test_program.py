"""The program as the world meets it: signals, pipes, full disks, on random weights."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
import videos
from backbones import CogVideoX

ROOT = Path(__file__).parent.parent


def fork(work, errors: Path) -> int:
    """`work()` in a process of its own that ends as a program does, its stderr in a file; the process's number."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
        sys.stderr = open(2, "w", closefd=False)
        work()
        os._exit(0)
    except SystemExit as end:
        print(end, file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"no {path} after a minute")


def command(words, program=("demo.py",)) -> subprocess.Popen:
    """The program from its start, which takes seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return subprocess.Popen([sys.executable, *program, *map(str, words)], **pipes)


def test_sigterm_saves_the_state_as_ctrl_c_does(base, tmp_path):
    """What cluster schedulers and `docker stop` send."""
    state, errors = tmp_path / "video.state.safetensors", tmp_path / "errors"
    pid = fork(lambda: demo.main([*base, "--num_inference_steps", "1000", "--preview", "1"]), errors)
    wait_for(tmp_path / "video.preview.png")  # a step is done
    os.kill(pid, signal.SIGTERM)
    assert wait(pid) == 1 and "Traceback" not in errors.read_text()
    last = errors.read_text().splitlines()[-1]
    assert last == f"Stopped. The state is safe; the same command with --resume {state} goes on."
    tensors, about = videos.read_tensors(state, "state")
    assert about["step"] >= 1 and tensors["now latents"].isfinite().all()


def test_sigterm_to_several_processes(base, tmp_path):
    """torchrun hands it on to each of them, in any order."""
    program = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "demo.py")
    run = command([*base, "--num_inference_steps", 1000, "--preview", 1], program)
    wait_for(tmp_path / "video.preview.png")
    run.terminate()
    assert "The state is safe; the same command with --resume" in run.communicate(timeout=60)[1]
    assert videos.read_tensors(tmp_path / "video.state.safetensors", "state")[1]["step"] >= 1


def test_nobody_reads_on(base, tmp_path):
    """demo.py | head -1"""
    run = command(base)
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(60) == 0 and "Error" not in run.stderr.read() and (tmp_path / "video.mp4").exists()


@pytest.mark.parametrize("limit, what, safe", [
    (3000, "s.safetensors", ""),
    (60_000, "video.mp4", " The latents are safe; --decode {}/video.undecoded.safetensors goes on."),
    (60_000, "video.webp", " The latents are safe; --decode {}/video.undecoded.safetensors goes on."),
])  # fmt: skip
def test_a_full_disk_is_one_sentence(base, tmp_path, limit, what, safe):
    """No file may grow beyond some bytes, which to a program is like a full disk."""

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        output = what if what.startswith("video") else "video.mp4"
        demo.main([*base, "--state", str(tmp_path / "s.safetensors"), "--output_path", str(tmp_path / output)])

    assert wait(fork(work, tmp_path / "errors")) == 1
    error = (tmp_path / "errors").read_text()
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    assert last.startswith(f"Cannot write {tmp_path / what}: ") and last.endswith(safe.format(tmp_path) or ".")
    assert ("safe;" in last) == bool(safe)
    assert not list(tmp_path.glob("*partial*"))


def test_webp_is_whole_even_if_nothing_moves(tmp_path):
    """Frames that are equal become one there."""
    for name, shades in dict(still=[7] * 20, moving=range(0, 200, 10)).items():
        frames = (np.full((32, 48, 3), shade, np.uint8) for shade in shades)
        videos.write_video(tmp_path / f"{name}.webp", frames, 10)
        picture = Image.open(tmp_path / f"{name}.webp")
        assert picture.size == (48, 32) and picture.n_frames == len(set(shades))
        picture.seek(picture.n_frames - 1)
        assert abs(np.asarray(picture.convert("RGB")).mean() - shades[-1]) < 3
    assert picture.info["loop"] == 0  # for ever


def test_the_folder_vanishes_during_the_run(base, tmp_path, monkeypatch):
    decode = CogVideoX.decode
    monkeypatch.setattr(CogVideoX, "decode", lambda *args: (shutil.rmtree(tmp_path / "folder", True), decode(*args))[1])
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match="Cannot write .*video.mp4: .*"):
        demo.main([*base, "--output_path", str(tmp_path / "folder" / "video.mp4")])


def test_two_runs_write_one_output(base, tmp_path):
    files = [tmp_path / "errors 1", tmp_path / "errors 2"]
    assert [wait(pid) for pid in [fork(lambda: demo.main(base), file) for file in files]] == [0, 0]
    assert len(list(videos.read_frames(tmp_path / "video.mp4")[0])) == 33
    assert sorted(p.name for p in tmp_path.iterdir() if p not in files) == ["video.mp4", "video.png"]


def test_an_old_python_is_one_sentence():
    code = "import runpy, sys; sys.version_info = (3, 10, 13); runpy.run_path('demo.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"demo.py needs Python 3.11 or newer, this is .*\n", done.stderr)
