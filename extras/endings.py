"""How a run ends: a signal or an error first saves what there is, then says why."""

import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from extras.errors import first_line
from extras.meeting import numbered
from extras.processes import lost

SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
]


def catch_signals() -> None:
    """Let whatever signal would end the program act as Ctrl-C: those of cluster schedulers, a
    dropped ssh, a closed console. One that is ignored stays so (nohup)."""
    if threading.current_thread() is threading.main_thread():  # no other may ask for signals
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler == signal.SIG_DFL or (number == signal.SIGINT and callable(handler)):
                signal.signal(number, signal.default_int_handler)


@contextmanager
def undisturbed(drop: bool = False) -> Iterator[None]:
    """Let signals wait until the end of this context, or be dropped."""
    waiting, handlers = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}
    for number in handlers:
        signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting and not drop:
            signal.raise_signal(waiting[0])


class Ending:
    """Context of a run. Whatever stops it, `keep(error)` first saves what there is and says where;
    then one sentence says why. An error of an unknown kind shows its traceback, too."""

    keep: Callable[[BaseException], str] = staticmethod(lambda error: "")

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        safe = self.keep(error)
        if not (why := reason(error)):
            traceback.print_exception(error)
            why = f"Stopped by an unexpected {type(error).__name__}; its traceback is above."
        raise SystemExit(numbered(f"{lost() or why} {safe}".strip())) from None


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the GPU or the machine. Some libraries say so only in words."""
    words = ("out of memory", "alloc_failed", "allocate memory", "not enough memory", "unable to allocate")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in words))


def reason(error: BaseException) -> str:
    """Why a run stopped, in a sentence; empty for errors that nobody foresaw."""
    if isinstance(error, KeyboardInterrupt):
        return "Stopped."
    if lacks_memory(error):
        if isinstance(error, MemoryError | OSError) or "CPU" in str(error):
            return (
                "The machine's memory is not enough. What helps: --window_batch 1, --vae_tiling (decoding, CogVideoX), "
                "closing other programs."
            )
        return (
            "The GPU's memory is not enough. What helps, the cheapest first: --window_batch 1, --vae_tiling (decoding, "
            "CogVideoX), --offload model, --offload sequential (much slower)."
        )
    gpu = ("CUDA error", "CUDA driver error", "HIP error", "cuDNN error", "NCCL error", "_STATUS_")
    if isinstance(error, RuntimeError) and any(words in str(error) for words in gpu):
        return f"The GPU failed: {first_line(error)}"
    return first_line(error) if isinstance(error, OSError | FloatingPointError) else ""
