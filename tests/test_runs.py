"""Long runs, on random weights: kills, resume, signals, several processes, previews."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, frames_of, needs_fork, refusal, run_processes, settled, stop_at_preview
from safetensors import torch as safetensors

import demo
from backbones import Backbone, CogVideoX
from extras import options, runs
from extras import videos as V
from extras.endings import Ending, catch_signals
from extras.methods import METHODS, SynCoS
from extras.models.checked import CheckedCogVideoX
from extras.processes import in_batches
from extras.states import State, fingerprints
from syncos import ABLATIONS, Settings, ablate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prepared(base):
    """A small run and its backbone: 4 steps, 2 of them refined; 24 model evaluations."""
    args = settled(*base)
    run = options.plan_run(args)
    backbone = run.plan.recipe.make(run.device, run.dtype)
    backbone.encode(run.plan.texts)
    backbone.load()
    return run, backbone


def fork(work, errors: Path) -> int:
    """`work()` in a process of its own, stderr to a file. Returns the process's number."""
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
    """The exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"no {path} after a minute")


# --------------------------------------------------------------------------------------------------
# Kills and signals


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(n: int, function, instead):
    """`function`, but its n-th call is `instead`."""
    calls = iter(range(n - 1))

    def wrapped(*args, **kwargs):
        return (function if next(calls, None) is not None else instead)(*args, **kwargs)

    return wrapped


def half_a_file(tensors, path, **_):
    Path(path).write_bytes(b"\x40\x00\x00\x00half a file")
    die()


@needs_fork
@pytest.mark.parametrize("moment, done", {"sampling": 1, "writing": 2, "before replacing": 1, "replaced": 3}.items())
def test_a_kill_at_any_moment_costs_at_most_one_step(prepared, tmp_path, moment, done):
    run, backbone = prepared
    path = tmp_path / "state.safetensors"
    whole = runs.sample(run, backbone, State(run.about()))["syncos"]
    steps = []

    def work():
        move = os.replace
        if moment == "sampling":  # in stage 2 of the second step: the steps call the model 3, 9, 9 and 3 times
            backbone.predict_x0 = nth_call(8, backbone.predict_x0, lambda *_: die())
        elif moment == "writing":
            safetensors.save_file = nth_call(3, safetensors.save_file, half_a_file)
        elif moment == "before replacing":  # the new file is complete, the old one in place
            os.replace = nth_call(2, move, lambda *_: die())
        else:
            os.replace = nth_call(3, move, lambda *names: (move(*names), die()))
        runs.sample(run, backbone, State(run.about()), path)

    assert wait(fork(work, tmp_path / "errors")) == -signal.SIGKILL
    state = State.read(path, run.about())
    assert state.step == done
    resumed = runs.sample(run, backbone, state, look=lambda method, step, x0: steps.append(step))["syncos"]
    assert torch.equal(resumed, whole) and steps == list(range(done, 4)) and len(state.trace["syncos"]) == 4


def test_ctrl_c_saves_the_state_and_says_how_to_resume(base, tmp_path, monkeypatch, capsys):
    words = [*base, "--compare", "--save_latents"]
    latents, state = tmp_path / "video.safetensors", tmp_path / "video.state.safetensors"
    call(*words)
    whole = V.read_tensors(latents, "latents")[0]
    latents.unlink()
    predict, calls = CogVideoX.predict_x0, []

    def interrupt(*_):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(CogVideoX, "predict_x0", nth_call(23, predict, interrupt))  # Gen-L-Video needs 12 calls
    with pytest.raises(SystemExit, match=f"--resume {state}"):
        call(*words)
    with pytest.raises(SystemExit) as end:
        call(*words, "--resume", state, "--seed", 3)
    assert end.value.code == 2 and "seed" in capsys.readouterr().err

    monkeypatch.setattr(CogVideoX, "predict_x0", lambda self, *args: calls.append(1) or predict(self, *args))
    call(*words, "--resume", state)
    resumed = V.read_tensors(latents, "latents")[0]
    assert len(calls) == 21 and all(torch.equal(resumed[k], whole[k]) for k in whole) and not state.exists()

    latents.unlink()
    capsys.readouterr()
    state.write_bytes(b"damaged")
    assert "state" in refusal(capsys, *words, "--resume", state)


@needs_fork
@pytest.mark.parametrize("world", [1, 2])
def test_sigterm_saves_the_state_as_ctrl_c_does(base, tmp_path, world):
    """Cluster schedulers and `docker stop` send it; torchrun passes it on to each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))

    def work(rank):
        os.environ |= meeting | dict(RANK=str(rank), LOCAL_RANK=str(rank))
        call(*base, "--num_inference_steps", 1000, "--preview", 1)

    errors = [tmp_path / f"errors {rank}" for rank in range(world)]
    children = [fork(lambda rank=rank: work(rank), errors[rank]) for rank in range(world)]
    wait_for(tmp_path / "video.preview.png")  # a step is done
    for pid in reversed(children):
        os.kill(pid, signal.SIGTERM)
    assert [wait(pid) for pid in children] == [1] * world
    assert not any("Traceback" in path.read_text() for path in errors)
    state = tmp_path / "video.state.safetensors"
    assert f"--resume {state}" in errors[0].read_text().splitlines()[-1]
    tensors, about = V.read_tensors(state, "state")
    assert about["step"] >= 1 and tensors["now latents"].isfinite().all()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_sighup_stops_a_run_unless_it_is_ignored():
    """A dropped ssh sends it; nohup ignores it."""
    for handler, outcome in ((signal.SIG_DFL, KeyboardInterrupt), (signal.SIG_IGN, None)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            catch_signals()
            with pytest.raises(outcome) if outcome else nullcontext():
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.1)
        finally:
            signal.signal(signal.SIGHUP, before)


def test_a_signal_waits_until_a_step_is_whole(prepared, tmp_path, monkeypatch):
    """On disk and in memory; a second signal does not stop the saving."""
    run, backbone = prepared
    state, path, write = State(run.about()), tmp_path / "s.safetensors", V.write_tensors

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*args, **options)

    monkeypatch.setattr(V, "write_tensors", interrupted)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            runs.sample(run, backbone, state, path)
        assert State.read(path, run.about()).step == state.step == len(state.trace["syncos"]) == 1
        assert "--resume" in state.keep(path)
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------
# Every method, every error

WORDS = {name: ["--method", name] for name in METHODS} | {part: ["--ablate", part] for part in ABLATIONS}
for name, words in WORDS.items():
    method = METHODS[name](Settings()) if name in METHODS else SynCoS(ablate(Settings(), [name]))
    for option, value in dict(csd_iters=2, t_min=300).items():
        words += [f"--{option}", value] * (option in method.options)
WORDS["fifo"] += ["--num_frames", "25", "--num_inference_steps", "6"]
for name in ("ditctrl", "ditctrl-sde"):
    WORDS[name] += ["--num_frames", "41"]


@pytest.mark.parametrize("name", WORDS)
def test_every_method_and_ablation_resumes_bit_for_bit(any_method, tmp_path, monkeypatch, request, name):
    """From an error in the middle of a step."""
    words = [*any_method, *WORDS[name]]
    if name == "video-infinity":
        del words[(stride := words.index("--stride")) : stride + 2]
        folder = request.getfixturevalue("videocrafter2_release")
        words += ["--backbone", "videocrafter2", "--model", folder, "--height", 64, "--width", 64]
        words += ["--window_frames", 4, "--num_frames", 16, "--num_inference_steps", 3]
    monkeypatch.setattr(V, "write_story", lambda *_: None)
    guided, calls = Backbone.guided, []
    monkeypatch.setattr(Backbone, "guided", lambda *args: calls.append(1) or guided(*args))
    files = dict(zip(("latents", "trace"), (tmp_path / "video.safetensors", tmp_path / "trace.safetensors")))
    words += ["--save_latents", "--trace", files["trace"]]

    def results():
        return [V.read_tensors(path, what)[0] for what, path in files.items()]

    call(*words)
    whole = results()
    for path in files.values():
        path.unlink()
    monkeypatch.setattr(Backbone, "guided", nth_call(len(calls) * 2 // 3, guided, fails(MemoryError())))
    with pytest.raises(SystemExit, match="--resume"):
        call(*words)
    monkeypatch.setattr(Backbone, "guided", guided)
    call(*words, "--resume", tmp_path / "video.state.safetensors")
    for ours, theirs in zip(results(), whole):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def fails(error):
    def work(*_, **__):
        raise error

    return work


ERRORS = [
    (MemoryError(), "machine's memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."), "machine's memory"),
    (torch.OutOfMemoryError("CUDA out of memory."), "GPU's memory"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), "GPU's memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU's memory"),
    (torch.AcceleratorError("CUDA error: an illegal memory access\nmore"), "GPU failed: .*access\\."),
    (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "GPU failed"),
    (ZeroDivisionError("division by zero"), "unexpected ZeroDivisionError"),
    (RuntimeError("The size of tensor a (3) must match"), "unexpected RuntimeError"),
]


@pytest.mark.parametrize("error, said", ERRORS, ids=[str(error)[:30] or "no memory" for error, _ in ERRORS])
def test_whatever_stops_a_run_is_told_after_what_is_safe(capsys, error, said):
    """In one sentence; only an unforeseen error prints a traceback."""
    with pytest.raises(SystemExit, match=f"{said}.*Safe in x.") as end, Ending() as ending:
        ending.keep = lambda error: print("kept", file=sys.stderr) or "Safe in x."
        raise error
    told = capsys.readouterr().err
    assert "\n" not in end.value.code and told.startswith("kept") and ("Traceback" in told) == ("unexpected" in said)


@pytest.mark.parametrize("place", ["release_transformer", "decode"])
def test_any_error_keeps_state_or_latents(base, tmp_path, monkeypatch, place):
    state, latents = tmp_path / "video.state.safetensors", tmp_path / "video.undecoded.safetensors"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"unexpected.*--resume {state}"):
        patch.setattr(CogVideoX, "predict_x0", nth_call(8, CogVideoX.predict_x0, fails(ZeroDivisionError())))
        call(*base)
    assert V.read_tensors(state, "state")[1]["step"] == 1
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"--decode {latents}"):
        patch.setattr(CheckedCogVideoX, place, fails(ZeroDivisionError()))
        call(*base, "--resume", state)
    assert not state.exists() and V.read_tensors(latents, "latents")


@pytest.mark.parametrize("place", ["contact_sheet", "decode"])
def test_a_preview_that_fails_stops_nothing(base, tmp_path, monkeypatch, capsys, place):
    tiled, sheet, decode = [], V.contact_sheet, CheckedCogVideoX.decode

    def no_sheet(path, *rest):
        return (fails(KeyError("no font")) if "preview" in path.name else sheet)(path, *rest)

    def no_frames(self, latents):
        tiled.append(self.pipe.vae.use_tiling)
        return (fails(RuntimeError("no font")) if len(latents) == 3 else decode)(self, latents)

    monkeypatch.setattr(*((V, place, no_sheet) if place == "contact_sheet" else (CheckedCogVideoX, place, no_frames)))
    call(*base, "--preview", 2)
    assert re.findall("No preview: .*no font", capsys.readouterr().out) and (tmp_path / "video.mp4").exists()
    assert tiled in ([], [True, True, False])  # two previews, the video


# --------------------------------------------------------------------------------------------------
# Files of other runs, other places


def test_a_rerun_destroys_nothing(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", lambda *_: pytest.fail("a model was loaded"))
    files = {"video.undecoded": [], "video.state": [], "video": ["--save_latents"]}
    files |= {name: [f"--{name}", tmp_path / f"{name}.safetensors"] for name in ("state", "trace")}
    for name, words in files.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_text("precious")
        said = refusal(capsys, *base, *words)
        assert str(path) in said and "choose another" in said
        assert ("--resume" if "state" in name else "--decode") in said or name == "trace"
        call(*base, *words, "--plan")
        capsys.readouterr()
        assert path.read_text() == "precious"
        path.unlink()


@needs_fork
def test_of_two_runs_with_one_name_the_second_is_refused(base, tmp_path, monkeypatch, capsys):
    """Even if it starts before the first has written anything."""
    load, state = demo.load, tmp_path / "video.state.safetensors"
    errors = tmp_path / "errors"
    first = fork(lambda: call(*base, "--num_inference_steps", 100), errors)

    def slow(*args):
        wait_for(state)
        return load(*args)

    monkeypatch.setattr(demo, "load", slow)
    with pytest.raises(SystemExit) as end:
        call(*base)
    assert end.value.code == 2 and f"--resume {state}" in capsys.readouterr().err.splitlines()[-1]
    assert wait(first) == 0, errors.read_text()
    assert len(frames_of(tmp_path / "video.mp4")) == 33
    assert sorted(p.name for p in tmp_path.iterdir() if p != errors) == ["video.mp4", "video.png"]


def test_latents_that_appear_meanwhile_are_not_overwritten(base, tmp_path, monkeypatch):
    latents, state = tmp_path / "video.undecoded.safetensors", tmp_path / "video.state.safetensors"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"another run.*--resume {state}"):
        patch.setattr(runs, "sample", lambda *args, sample=runs.sample: latents.touch() or sample(*args))
        call(*base)
    assert latents.stat().st_size == 0
    call(*base, "--resume", state, "--output_path", tmp_path / "other.mp4")
    assert (tmp_path / "other.mp4").exists()


def test_decoded_latents_wait_no_more(base, tmp_path, monkeypatch):
    latents = tmp_path / "video.undecoded.safetensors"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="--decode"):
        patch.setattr(CheckedCogVideoX, "decode", fails(MemoryError()))
        call(*base)
    call("--decode", latents, "--device", "cpu", "--output_path", tmp_path / "video.mp4")
    assert not latents.exists() and V.read_tensors(tmp_path / "video.safetensors", "latents")
    call(*base)


def test_a_run_resumes_with_its_model_in_another_place_and_no_other(base, tmp_path, monkeypatch, capsys, rotary_folder):
    state, model = tmp_path / "video.state.safetensors", base[base.index("--model") + 1]
    stop_at_preview(monkeypatch, *base, "--preview", 2)
    resume = [*base, "--resume", state, "--model"]
    moved = shutil.copytree(model, tmp_path / "moved")
    config = moved / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(_diffusers_version="0")))  # saved anew
    capsys.readouterr()
    assert "config.json" in refusal(capsys, *resume, rotary_folder)
    weights = moved / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:-4] + b"fine")  # a fine-tuned one
    assert "diffusion_pytorch_model" in refusal(capsys, *resume, moved)
    weights.write_bytes(kept)
    call(*resume, moved)
    assert (tmp_path / "video.mp4").exists()


def test_a_hub_model_and_its_local_copy_are_one(sincos_folder, rotary_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cache = tmp_path / "models--somebody--video"
    assert fingerprints("somebody/video") == {}
    shutil.copytree(sincos_folder, cache / "snapshots" / "0123abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    assert fingerprints("somebody/video") == fingerprints(sincos_folder) != fingerprints(rotary_folder)
    assert not any(name.startswith("vae/") for name in fingerprints(sincos_folder))  # it does not shape latents


def test_a_state_that_knows_no_files_goes_by_the_name(tmp_path, prepared):
    run, _ = prepared
    path = tmp_path / "old.safetensors"
    V.write_tensors(path, "state", {"now x0": torch.ones(1)}, dict(step=1, about=run.about()))
    assert State.read(path, run.about()).step == 1
    with pytest.raises(ValueError, match="another model: .*, not /elsewhere"):
        State.read(path, run.about() | dict(model="/elsewhere"))


def test_what_is_read_is_not_mapped_to_its_file(tmp_path):
    path, x = tmp_path / "x.safetensors", torch.arange(64.0)
    V.write_tensors(path, "state", dict(x=x, same=x, turned=x.view(8, 8).T), {})
    read = V.read_tensors(path, "state")[0]
    with path.open("r+b") as file:
        file.seek(-512, os.SEEK_END)
        file.write(bytes(512))
    assert torch.equal(read["x"], x) and torch.equal(read["same"], x) and torch.equal(read["turned"], x.view(8, 8).T)


@pytest.mark.parametrize("folder", ["c:d", "-x", "%03d", "a b'c"])
def test_a_video_of_forty_long_events_in_any_folder(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    path, about = Path(folder) / "%d-video.mp4", dict(seed=7, texts=["x" * 4000] * 40)
    path.parent.mkdir()
    V.write_video(path, (np.full((16, 32, 3), 5 * i, np.uint8) for i in range(40)), 8, comment := V.shortened(about))
    assert len(list(V.read_frames(path)[0])) == 40
    assert json.loads(comment) == dict(seed=7, texts="too long to be kept here")


def test_no_ffmpeg_is_told_before_anything_else(base, monkeypatch, capsys):
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", fails(RuntimeError("No ffmpeg exe could be found.")))
    assert "No ffmpeg exe" in refusal(capsys, *base)


def test_ffmpeg_gives_its_own_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(broken))
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho '[libx264 @ 0x1] no such encoder' >&2\nexit 1\n")
    broken.chmod(0o755)
    frames = (np.zeros((16, 32, 3), np.uint8) for _ in range(500))
    with pytest.raises(OSError, match=r"video.mp4: ffmpeg says: no such encoder\.$"):
        V.write_video(tmp_path / "video.mp4", frames, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["ffmpeg"]


# --------------------------------------------------------------------------------------------------
# Several processes


@needs_fork
@pytest.mark.parametrize("world, batch", [(2, 2), (3, 1)])
def test_processes_share_the_windows(prepared, tmp_path, world, batch):
    run, backbone = prepared
    run = replace(run, plan=replace(run.plan, recipe=replace(run.plan.recipe, window_batch=batch)))
    whole = runs.sample(run, backbone, State(run.about()))["syncos"]

    def work(rank):
        sizes, predict = [], backbone.predict_x0
        backbone.predict_x0 = lambda x, *args: sizes.append(len(x)) or predict(x, *args)
        result = runs.sample(run, backbone, State(run.about()))["syncos"]
        torch.save((result, sizes), tmp_path / f"{rank}.pt")

    assert run_processes(work, world, tmp_path) == [0] * world
    results, sizes = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)))
    assert all(torch.equal(whole, r) for r in results)
    assert sum(map(sum, sizes)) == 24  # every window once
    assert max(max(s, default=0) for s in sizes) == batch


@needs_fork
def test_a_process_that_dies_ends_the_others(tmp_path):
    def work(rank):
        if rank == 1:
            os._exit(7)
        in_batches(lambda x, t, prompts: x, 1)(torch.zeros(2, 1), 0, ["", ""])

    started = time.time()
    assert run_processes(work, 2, tmp_path) == [1, 7] and time.time() - started < 60


def test_torchrun(base, tmp_path):
    latents = tmp_path / "video.safetensors"
    call(*base, "--save_latents")
    alone = V.read_tensors(latents, "latents")[0]["syncos"]
    latents.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "demo.py"]
    done = subprocess.run([*command, *base, "--save_latents"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert torch.equal(alone, V.read_tensors(latents, "latents")[0]["syncos"])
    assert done.stdout.count("syncos: 24 model evaluations") == 1 and done.stderr.count("syncos:   0%") == 1  # one bar
