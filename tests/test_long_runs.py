"""Runs that are stopped, and runs by several processes, on random weights."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import torch as safetensors
from test_demo import call

import demo
import videos
from backbones import CogVideoX, in_batches

ROOT = Path(__file__).parent.parent


@pytest.fixture
def prepared(base):
    """A small run's plan and backbone: 4 steps, 2 of them refined; 8 calls of the model in all."""
    args = demo.make_parser().parse_args(base)
    plan = demo.make_plan(args)
    backbone = demo.load(args, plan.recipe, plan.device, plan.dtype)
    backbone.encode(plan.prompts)
    backbone.load()
    return plan, backbone


def in_child(work) -> int:
    """Run `work` in a forked process; its exit code, or minus the signal that ended it."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(call: int, function):
    """`function`, but the process is killed when it is called for the `call`-th time."""
    calls = iter(range(call))

    def wrapped(*args, **kwargs):
        return function(*args, **kwargs) if next(calls, None) is not None else die()

    return wrapped


def half_written(tensors, path, **_):
    Path(path).write_bytes(b"\x40\x00\x00\x00half a file")
    die()


KILLS = [("predict", n) for n in range(0, 20, 2)] + [("save", n) for n in range(4)] + [("half", n) for n in range(3)]
KILLS += [("replaced", n) for n in range(3)]


@pytest.mark.parametrize("where, n", KILLS)
def test_a_kill_at_any_moment_costs_at_most_one_step(prepared, tmp_path, where, n):
    plan, backbone = prepared
    path = tmp_path / "state.safetensors"
    whole = demo.sample(plan, backbone, demo.State(plan.about()))["syncos"]
    steps = []

    def work():
        if where == "predict":
            backbone.predict_x0 = kill_at(n, backbone.predict_x0)
        elif where == "save":  # before the new file takes the old one's place
            os.replace = kill_at(n, os.replace)
        elif where == "replaced":  # right after
            replace, kill = os.replace, kill_at(n, lambda: None)
            os.replace = lambda *names: (replace(*names), kill())
        else:
            save, calls = safetensors.save_file, iter(range(n))
            safetensors.save_file = lambda *a, **k: (save if next(calls, None) is not None else half_written)(*a, **k)
        demo.sample(plan, backbone, demo.State(plan.about()), path)

    assert in_child(work) == -signal.SIGKILL
    state = demo.State.read(path, plan.about()) if path.exists() else demo.State(plan.about())
    if where != "predict":
        assert state.step == n + (where == "replaced")
    left = 4 - state.step
    resumed = demo.sample(plan, backbone, state, look=lambda method, step, x0: steps.append(step))["syncos"]
    assert torch.equal(resumed, whole) and len(steps) == left and len(state.trace["syncos"]) == 4


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(base, tmp_path, monkeypatch, capsys):
    words = [*base, "--compare", "--save_latents"]
    call(*words)
    whole = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]
    predict = CogVideoX.predict_x0
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 20:  # Gen-L-Video needs 12 calls
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            os.kill(os.getpid(), signal.SIGINT)
        return predict(self, *args)

    monkeypatch.setattr(CogVideoX, "predict_x0", interrupted)
    with pytest.raises(SystemExit, match="same command with --resume .*video.state.safetensors goes on"):
        call(*words)
    state = tmp_path / "video.state.safetensors"
    assert state.exists()
    with pytest.raises(SystemExit) as exit:
        call(*words, "--resume", state, "--seed", 3)
    assert exit.value.code == 2 and "is of another run: seed was 0 there and is 3 here" in capsys.readouterr().err
    monkeypatch.setattr(CogVideoX, "predict_x0", lambda self, *args: calls.append(1) or predict(self, *args))
    calls.clear()
    call(*words, "--resume", state)
    resumed = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]
    assert len(calls) < 24 and all(torch.equal(resumed[k], whole[k]) for k in whole) and not state.exists()
    state.write_bytes(b"damaged")
    with pytest.raises(SystemExit) as exit:
        call(*words, "--resume", state)
    assert exit.value.code == 2 and "holds no state that this program saved" in capsys.readouterr().err


def test_no_memory_names_what_helps(base, tmp_path, monkeypatch):
    decode = CogVideoX.decode

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(CogVideoX, "predict_x0", full)
    with pytest.raises(SystemExit, match="--window_batch 1, --vae_tiling .*, --offload model, --offload sequential"):
        call(*base)
    monkeypatch.undo()
    monkeypatch.setattr(CogVideoX, "decode", full)
    with pytest.raises(SystemExit, match="--decode .*video.undecoded.safetensors --vae_tiling goes on"):
        call(*base)
    monkeypatch.setattr(CogVideoX, "decode", decode)


def test_preview_is_a_picture_of_each_event(base, tmp_path, monkeypatch):
    seen = []
    sheet = videos.contact_sheet
    monkeypatch.setattr(videos, "contact_sheet", lambda *args: (seen.append(args), sheet(*args)))
    call(*base, "--preview", 2)
    previews = [args for args in seen if args[0].name == "video.preview.png"]
    assert [args[3] for args in previews] == [f"syncos, estimate after step {n} of 4" for n in (2, 4)]
    assert previews[0][2] == [([8], "it runs"), ([24], "it jumps")] and (tmp_path / "video.preview.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def run_processes(work, world: int, folder) -> list[int]:
    """work(rank) in each of `world` forked processes that know each other; their exit codes."""
    children = []
    for rank in range(world):
        if (pid := os.fork()) == 0:
            try:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
                work(rank)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_processes_share_the_windows(prepared, tmp_path, world, batch):
    plan, backbone = prepared
    object.__setattr__(plan.recipe, "window_batch", batch)
    whole = demo.sample(plan, backbone, demo.State(plan.about()))["syncos"]

    def work(rank):
        sizes, predict = [], backbone.predict_x0
        backbone.predict_x0 = lambda x, *args: sizes.append(len(x)) or predict(x, *args)
        result = demo.sample(plan, backbone, demo.State(plan.about()))["syncos"]
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
    first, second = run_processes(work, 2, tmp_path)
    assert first == 1 and second == 7 and time.time() - started < 60


def test_torchrun(base, tmp_path):
    call(*base, "--save_latents")
    alone = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]["syncos"]
    (tmp_path / "video.safetensors").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "demo.py")]
    done = subprocess.run(
        [*command, *base, "--save_latents"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    together = videos.read_tensors(tmp_path / "video.safetensors", "latents")[0]["syncos"]
    assert torch.equal(alone, together)
    assert done.stdout.count("syncos: 24 model evaluations") == 1 and done.stderr.count("syncos:   0%") == 1  # one bar
