"""Long runs, on random weights: kills, resume, signals, several processes, previews."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import call, frames_of, run_processes, settled
from safetensors import torch as safetensors

from backbones import CogVideoX
from extras import options, runs
from extras import videos as V
from extras.processes import in_batches

ROOT = Path(__file__).parents[1]


@pytest.fixture
def prepared(base):
    """A small run and its backbone: 4 steps, 2 of them refined; 24 model evaluations."""
    args = settled(*base)
    run = options.plan_run(args)
    backbone = run.plan.recipe.backbone(run.plan.recipe.model, run.device, run.dtype, run.plan.recipe.guidance_scale)
    backbone.encode(run.plan.texts)
    backbone.load()
    return run, backbone


def fork(work, errors: Path) -> int:
    """`work()` in a process of its own that ends as a program does, its
    stderr in a file. Returns its number."""
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


@pytest.mark.parametrize("moment, done", {"sampling": 1, "writing": 2, "before replacing": 1, "replaced": 3}.items())
def test_a_kill_at_any_moment_costs_at_most_one_step(prepared, tmp_path, moment, done):
    run, backbone = prepared
    path = tmp_path / "state.safetensors"
    whole = runs.sample(run, backbone, runs.State(run.about()))["syncos"]
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
        runs.sample(run, backbone, runs.State(run.about()), path)

    assert wait(fork(work, tmp_path / "errors")) == -signal.SIGKILL
    state = runs.State.read(path, run.about())
    assert state.step == done
    resumed = runs.sample(run, backbone, state, look=lambda method, step, x0: steps.append(step))["syncos"]
    assert torch.equal(resumed, whole) and steps == list(range(done, 4)) and len(state.trace["syncos"]) == 4


def test_ctrl_c_saves_the_state_and_says_how_to_resume(base, tmp_path, monkeypatch, capsys):
    words = [*base, "--compare", "--save_latents"]
    latents, state = tmp_path / "video.safetensors", tmp_path / "video.state.safetensors"
    call(*words)
    whole = V.read_tensors(latents, "latents")[0]
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

    state.write_bytes(b"damaged")
    with pytest.raises(SystemExit) as end:
        call(*words, "--resume", state)
    assert end.value.code == 2 and "state" in capsys.readouterr().err


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


def test_two_runs_write_one_output(base, tmp_path):
    files = [tmp_path / "errors 1", tmp_path / "errors 2"]
    assert [wait(pid) for pid in [fork(lambda: call(*base), file) for file in files]] == [0, 0]
    assert len(frames_of(tmp_path / "video.mp4")) == 33
    assert sorted(p.name for p in tmp_path.iterdir() if p not in files) == ["video.mp4", "video.png"]


def test_preview_is_a_picture_of_each_event(base, tmp_path, monkeypatch):
    seen, sheet = [], V.contact_sheet
    monkeypatch.setattr(V, "contact_sheet", lambda *args: (seen.append(args), sheet(*args)))
    call(*base, "--preview", 2)
    previews = [args for args in seen if args[0] == tmp_path / "video.preview.png"]
    assert [args[3] for args in previews] == [f"syncos, estimate after step {n} of 4" for n in (2, 4)]
    assert previews[0][2] == [([8], "it runs"), ([24], "it jumps")] and (tmp_path / "video.preview.png").exists()


# --------------------------------------------------------------------------------------------------
# Several processes


@pytest.mark.parametrize("world, batch", [(2, 2), (3, 1)])
def test_processes_share_the_windows(prepared, tmp_path, world, batch):
    run, backbone = prepared
    run = replace(run, plan=replace(run.plan, recipe=replace(run.plan.recipe, window_batch=batch)))
    whole = runs.sample(run, backbone, runs.State(run.about()))["syncos"]

    def work(rank):
        sizes, predict = [], backbone.predict_x0
        backbone.predict_x0 = lambda x, *args: sizes.append(len(x)) or predict(x, *args)
        result = runs.sample(run, backbone, runs.State(run.about()))["syncos"]
        torch.save((result, sizes), tmp_path / f"{rank}.pt")

    assert run_processes(work, world, tmp_path) == [0] * world
    results, sizes = zip(*(torch.load(tmp_path / f"{rank}.pt") for rank in range(world)))
    assert all(torch.equal(whole, r) for r in results)
    assert sum(map(sum, sizes)) == 24  # every window once
    assert max(max(s, default=0) for s in sizes) == batch


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
