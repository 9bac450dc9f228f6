"""Several processes, started by torchrun: they meet, share the model's work, and leave."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backbones import Backbone


def main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def several_processes() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, once they have met."""
    several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if several else (0, 1)


def join_processes(device: str | None) -> str | None:
    """Under torchrun: meet the other processes. Each takes a GPU; the first writes and prints.

    Returns the device of this process. Raises ValueError if there are not enough GPUs.
    """
    if not several_processes():
        return device
    if device and device.startswith("cuda:"):
        raise ValueError(f"--device {device} would put every process on one GPU; use --device cuda.")
    gpu = torch.cuda.is_available() and device in (None, "cuda")
    here, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if gpu and local > here:
        raise ValueError(f"{local} processes need {local} GPUs, this machine has {here}; use --nproc_per_node {here}.")
    if gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(days=1))  # previews may take the first long
    atexit.register(leave_processes)
    if not main_process():
        sys.stdout = open(os.devnull, "w")
    return device


def leave_processes() -> None:
    """Destroy the group on all ranks together, before the first decodes alone:
    NCCL ranks may wait for each other."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def encode(backbone: Backbone, texts: Sequence[str]) -> None:
    """The first process encodes the prompts and hands them on: a text encoder takes up to 10 GB."""
    if main_process():
        backbone.encode(texts)
    if several_processes():
        shared = [{text: [x.cpu() for x in parts] for text, parts in backbone.texts.items()}]
        dist.broadcast_object_list(shared, src=0)
        backbone.texts = {text: tuple(x.to(backbone.device) for x in parts) for text, parts in shared[0].items()}


def in_batches(predict: Callable, size: int, done: Callable[[int], Any] = lambda n: None) -> Callable:
    """`predict_x0` with at most `size` windows at a time, calling `done(windows)` after each batch.

    t may also be a tensor with one row per window.
    Several processes share the batches, and all get all results. Batches stay whole, so that every
    matrix product has the size that it has in one process: the result is the same bit for bit.
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
            try:
                dist.all_reduce(out)  # each window comes from one process, and is zero in all others
            except RuntimeError as error:
                raise ConnectionError("Another process has stopped.") from error
        return out

    return predict_in_batches
