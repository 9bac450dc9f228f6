"""Several processes, started by torchrun: they meet, share the model's work, and leave together."""

import atexit
import os
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backbones import Backbone
from extras import meeting
from extras.meeting import main_process, several_processes

LINE: meeting.Line | None = None


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if several_processes() else (0, 1)


def join_processes(device: str) -> str:
    """Under torchrun: meet the other processes. Each takes a GPU; the first writes and prints.

    Returns the device of this process. Raises ValueError if they cannot meet or have too few GPUs,
    ConnectionError if one stops while they meet.
    """
    global LINE
    meeting.check_launch(device)
    if not several_processes():
        return device
    (rank, world), gpu = rank_and_world(), ""
    if device == "cuda":
        device = f"cuda:{choose_gpu(rank)}"
        torch.cuda.set_device(device)
        gpu = f"{socket.gethostname()} {getattr(torch.cuda.get_device_properties(device), 'uuid', rank)}"
    store = meeting.open_store(rank, world)
    LINE = meeting.connect(store, rank, world, gpu)
    atexit.register(LINE.close)
    backend = "nccl" if gpu and dist.is_nccl_available() else "gloo"
    together(dist.init_process_group, backend, timeout=timedelta(minutes=10), store=store, rank=rank, world_size=world)
    return device


def choose_gpu(rank: int) -> int:
    """The GPU of this process among those that it sees: the machine's, or its own alone. Raises
    ValueError."""
    here = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_RANK", rank % here))
    if (every := max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), local + 1)) > here > 1:
        raise ValueError(f"{every} processes need {every} GPUs, this machine has {here}; use --nproc_per_node {here}.")
    return min(local, here - 1)


def together(collective: Callable, *args: Any, **options: Any) -> None:
    """Call a collective once all processes have come to it, so that it never hangs on one that has
    stopped. Raises ConnectionError if one has."""
    if LINE:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # this GPU is here too; if it has failed, it says so here
        LINE.meet()
    try:
        collective(*args, **options)
    except RuntimeError as error:
        raise ConnectionError(
            f"Another process has stopped, or is out of reach: {str(error).splitlines()[0]}"
        ) from None


def leave_processes() -> None:
    """Destroy the group on all ranks together, before the first decodes alone: NCCL ranks may wait
    for each other. A process that fails does not get here; the others notice that it has ended."""
    if dist.is_available() and dist.is_initialized():
        if LINE:
            LINE.meet("leave")
            atexit.unregister(LINE.close)
        dist.destroy_process_group()


def lost() -> str:
    """A sentence on the process whose end stops this one, or an empty string."""
    if LINE and LINE.lost:
        LINE.noticed.set()
    return LINE.lost if LINE else ""


def encode(backbone: Backbone, texts: Sequence[str]) -> None:
    """The first process encodes the prompts and hands them on: a text encoder takes up to 10 GB."""
    if main_process():
        backbone.encode(texts)
    if several_processes():
        shared = [{text: [x.cpu() for x in parts] for text, parts in backbone.texts.items()}]
        together(dist.broadcast_object_list, shared, src=0)
        backbone.texts = {text: tuple(x.to(backbone.device) for x in parts) for text, parts in shared[0].items()}


def in_batches(predict: Callable, size: int, done: Callable[[int], Any] = lambda n: None) -> Callable:
    """`predict_x0` with at most `size` windows at a time, calling `done(windows)` after each batch.

    t may also be a tensor with one row per window.
    Several processes share the batches, and all get all results. Batches stay whole, so that every
    matrix product has the size that it has in one process: the result is the same bit for bit.
    Raises ConnectionError if a process has stopped.
    """

    def predict_in_batches(latents: Tensor, t: float | Tensor, prompts: list[str]) -> Tensor:
        rank, world = rank_and_world()
        out = torch.zeros_like(latents)
        for n, i in enumerate(range(0, len(prompts), size)):
            batch = slice(i, i + size)
            if n % world == rank:
                out[batch] = predict(latents[batch], t[batch] if isinstance(t, Tensor) else t, prompts[batch])
            done(len(prompts[batch]))
        if world > 1:
            together(dist.all_reduce, out)  # each window comes from one process, and is zero in all others
        return out

    return predict_in_batches
