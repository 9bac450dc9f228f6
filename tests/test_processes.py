"""Several processes without their work: they meet, wait, notice who has stopped, and leave."""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import call, needs_fork, refusal

import demo
from extras import endings, meeting, processes

THREE = dict(RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Process:
    """A fork that runs `work(rank)` as one of several programs would: with its environment, the
    demo's signals and endings, its stderr in a file."""

    def __init__(self, work, rank: int, errors: Path, **environment):
        self.errors, self.start, self.pid = errors, time.monotonic(), os.fork()
        if self.pid:
            return
        status = 1
        try:
            os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
            sys.stderr = open(2, "w", closefd=False)
            os.environ |= environment | dict(RANK=str(rank))
            atexit._clear()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            endings.catch_signals()
            work(rank)
            status = 0
        except BaseException as error:
            status = self.end(error)
        finally:
            atexit._run_exitfuncs()
            sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def end(error: BaseException) -> int:
        try:
            if isinstance(error, ValueError):
                demo.refuse(error)
            if isinstance(error, KeyboardInterrupt | OSError):
                raise SystemExit(meeting.numbered(processes.lost() or str(error) or "Stopped."))
            traceback.print_exception(error)
        except SystemExit as end:
            if isinstance(end.code, int):
                return end.code
            print(end, file=sys.stderr)
        return 1

    def says(self, words: str) -> None:
        """Wait until it has said so."""
        for _ in range(300):
            if self.errors.exists() and words in self.errors.read_text():
                return
            time.sleep(0.1)
        pytest.fail(self.errors.read_text())

    def wait(self) -> tuple[int, str, float]:
        """How it ended, what it said, and after how many seconds."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return status, self.errors.read_text().strip(), time.monotonic() - self.start


def start(work, tmp_path, ranks=(0, 1, 2), world=3) -> list[Process]:
    where = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [Process(work, rank, tmp_path / f"errors {rank}", **where) for rank in ranks]


def destroy_waits_for_all():
    """Ending a group waits for all ranks, as it may with NCCL and does not with gloo."""
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: (dist.barrier(), destroy())


# --------------------------------------------------------------------------------------------------
# Together, and no longer


@needs_fork
def test_they_work_and_leave(tmp_path):
    def work(rank):
        destroy_waits_for_all()
        assert processes.join_processes("cpu") == "cpu" and processes.rank_and_world() == (rank, 3)
        x = torch.tensor([float(rank)])
        for n in range(20):
            time.sleep(0.1 * (n == rank))  # each is late once
            processes.together(dist.all_reduce, y := x.clone())
            assert y == 3
        processes.leave_processes()
        time.sleep(rank / 10)

    assert [p.wait()[:2] for p in start(work, tmp_path)] == [(0, "")] * 3


@needs_fork
@pytest.mark.parametrize("how", ["error", "kill"])
def test_one_that_stops_ends_all_in_a_sentence(tmp_path, how):
    """Whoever stops, with or without a reason; ending the group alone would wait for it."""

    def work(rank):
        destroy_waits_for_all()
        processes.join_processes("cpu")
        for n in range(10**6):
            if rank == 1 and n == 5:
                (tmp_path / "failed").touch()
                if how == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("The disk is full.")
            processes.together(dist.all_reduce, torch.zeros(1))

    ends = [p.wait() for p in start(work, tmp_path)]
    lost = [(1, f"process {rank}: Process 1 has stopped.") for rank in range(3)]
    lost[1] = (1, "process 1: The disk is full.") if how == "error" else (-signal.SIGKILL, "")
    assert [end[:2] for end in ends] == lost and max(seconds for *_, seconds in ends) < 30


@needs_fork
def test_one_that_is_busy_is_interrupted_and_one_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(meeting, "GRACE", (0.5, 2))

    def work(rank):
        processes.join_processes("cpu")
        if rank == 0:  # rank 1 ends
            while True:
                time.sleep(0.1)
        if rank == 2:
            ctypes.CDLL(None).sleep(60)  # as a call of NCCL that waits for another process

    ends = [p.wait() for p in start(work, tmp_path)]
    assert [end[:2] for end in ends] == [
        (1, "process 0: Process 1 has stopped."), (0, ""), (1, "process 2: Process 1 has stopped."),
    ]  # fmt: skip
    assert max(seconds for *_, seconds in ends) < 30


# --------------------------------------------------------------------------------------------------
# Meeting


@needs_fork
@pytest.mark.parametrize("rank, missing", [(0, "processes 1, 2 of 0 to 2"), (1, "process 0 (")])
def test_who_waits_says_for_whom_and_ends(tmp_path, monkeypatch, rank, missing):
    monkeypatch.setattr(meeting, "PATIENCE", (0.2, 2))
    [process] = start(lambda rank: processes.join_processes("cpu"), tmp_path, [rank])
    status, said, seconds = process.wait()
    first, last = said.splitlines()
    assert status == 2 and seconds < 20
    assert first.startswith(f"process {rank}: waiting for {missing}") and "at 127.0.0.1:" in first
    assert f"waited 2 s for {missing}" in last and "unset WORLD_SIZE" in last

    monkeypatch.setattr(meeting, "PATIENCE", (0.2, 300))
    for number in (signal.SIGTERM, signal.SIGINT):
        (tmp_path / f"errors {rank}").unlink()
        [process] = start(lambda rank: processes.join_processes("cpu"), tmp_path, [rank])
        process.says("waiting")
        os.kill(process.pid, number)
        now = time.monotonic()
        status, said, _ = process.wait()
        assert status == 1 and said.splitlines()[1:] == [f"process {rank}: Stopped."] and time.monotonic() - now < 10


def test_a_port_in_use(monkeypatch):
    with socket.create_server(("", 0)) as server:
        for name, value in (THREE | dict(MASTER_PORT=str(server.getsockname()[1]))).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="port is in use.*MASTER_PORT"):
            meeting.open_store(0, 3)


@needs_fork
def test_two_processes_with_one_gpu_are_refused(tmp_path):
    """Meanwhile a stranger who connects is turned away."""

    def work(rank):
        store = meeting.open_store(rank, 3)
        if rank == 2:
            while not store.check(["first"]):
                time.sleep(0.1)
            _, port, _ = eval(store.get("first"))
            socket.create_connection(("127.0.0.1", port)).sendall(b"GET / HTTP/1.1\n".ljust(meeting.HELLO))
        line = meeting.connect(store, rank, 3, "node gpu-1" if rank else "node gpu-0")
        line.meet()

    ends = [p.wait()[:2] for p in start(work, tmp_path)]
    assert ends[0] == (2, "process 0: demo.py: processes 1, 2 of 0 to 2 have the same GPU; start as many processes as "
                          "a machine has GPUs.")  # fmt: skip
    assert ends[1:] == [(1, f"process {rank}: Process 0 has stopped.") for rank in (1, 2)]


@pytest.mark.parametrize("here, local, every, chosen", [
    (4, 3, 4, 3), (1, 3, 4, 0), (1, 0, None, 0), (8, 1, 2, 1), (2, 3, 4, "--nproc_per_node 2"), (2, 2, None, "3 GPUs"),
    (4, None, None, 2),
])  # fmt: skip
def test_each_takes_a_gpu_of_its_own(monkeypatch, here, local, every, chosen):
    """Under torchrun each sees all GPUs of its machine; under srun it may see only its own."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    for name, value in dict(LOCAL_RANK=local, LOCAL_WORLD_SIZE=every).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    with contextlib.nullcontext() if isinstance(chosen, int) else pytest.raises(ValueError, match=chosen):
        assert processes.choose_gpu(rank=6) == chosen


@pytest.mark.parametrize("environment, keyword", [
    (dict(WORLD_SIZE="4"), "unset WORLD_SIZE"),
    (THREE | dict(RANK="3"), "RANK=3"),
    (THREE | dict(RANK="x"), "RANK=x"),
    (THREE | dict(MASTER_PORT="http"), "MASTER_PORT=http"),
    (THREE | dict(MASTER_ADDR=""), "MASTER_ADDR"),
    (THREE | dict(LOCAL_RANK="none"), "LOCAL_RANK=none"),
    (dict(SLURM_STEP_NUM_TASKS="4", SLURM_PROCID="2"), "4 processes"),
    (dict(OMPI_COMM_WORLD_SIZE="2"), "2 processes"),
])  # fmt: skip
def test_an_environment_that_leads_nowhere_is_refused(base, tmp_path, monkeypatch, capsys, environment, keyword):
    for name in (*THREE, *meeting.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert keyword in refusal(capsys, *base) and not list(tmp_path.iterdir())


def test_what_several_processes_cannot_do(base, monkeypatch, capsys):
    call(*base, "--save_latents")
    for name, value in THREE.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    latents = Path(base[base.index("--output_path") + 1]).with_suffix(".safetensors")
    assert "one process" in refusal(capsys, "--decode", latents, "--device", "cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "Mac" in refusal(capsys, "--backbone", "cogvideox")


def test_a_rank_that_was_left_over_is_no_other_process(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert meeting.main_process() and not meeting.several_processes()
