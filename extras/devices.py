"""The device that a run asks for: is it there, and can this build of torch use it?"""

import logging
import os
import re
import shutil
import warnings
from pathlib import Path

import torch

CPU = "use --device cpu (slow for large models)"
BUILDS = "https://pytorch.org/get-started/previous-versions"


def device_kind(device: str) -> str:
    """Kind of a device: cuda, mps or cpu. Raises ValueError for others."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = None
    if kind not in ("cuda", "mps", "cpu"):
        raise ValueError(f"The device {device} is unknown; use cuda, mps or cpu.")
    return kind


def missing_device(device: str) -> str:
    """Why a device cannot be used, and what to do, else an empty string."""
    kind, index = device_kind(device), torch.device(device).index or 0
    if kind == "cuda":
        return missing_cuda(index)
    if (kind == "cpu" or torch.backends.mps.is_available()) and index == 0:
        return ""
    return f"{device.upper()} is not available on this machine; {CPU}."


def missing_cuda(index: int) -> str:
    """`missing_device` for an NVIDIA GPU (or an AMD one, which torch calls cuda, too)."""
    version, cuda = torch.__version__, torch.version.cuda or torch.version.hip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch would warn of is the reason below
        if torch.cuda.is_available():
            count = torch.cuda.device_count()
            if index >= count:
                return (
                    f"cuda:{index} is not available: this machine has {count} GPU{'s' * (count > 1)}, from cuda:0 on."
                )
            return foreign_gpu(index)
        try:
            torch.cuda.init()
            reason = "it does not start"
        except Exception as error:  # noqa: BLE001, whatever a driver answers
            reason = re.split(r"\.\s", str(error).strip())[0].rstrip(".")
    if not cuda and nvidia_driver():
        return (
            f"CUDA is not available: this machine has an NVIDIA GPU, but torch {version} is a build for the CPU alone. "
            f"Install one for CUDA ({BUILDS}), or {CPU}."
        )
    if not cuda or "Found no NVIDIA driver" in reason:
        return f"CUDA is not available on this machine; {CPU}."
    advice = f"Update the driver, install torch for an older CUDA ({BUILDS}), or {CPU}"
    advice = advice if "too old" in reason else CPU.capitalize()
    return f"CUDA is not available to torch {version}, which is built for CUDA {cuda}: {reason}. {advice}."


def nvidia_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    library = Path(os.environ.get("SYSTEMROOT", "C:/Windows"), "System32", "nvcuda.dll")
    return bool(shutil.which("nvidia-smi")) or library.exists() or Path("/proc/driver/nvidia/version").exists()


def foreign_gpu(index: int) -> str:
    """A message if this build of torch has no code for the GPU: too old, or too new."""
    built = [
        (kind, divmod(int(n), 10))
        for kind, n in re.findall(r"(sm|compute)_(\d+)", " ".join(torch.cuda.get_arch_list()))
    ]
    if not built:  # for AMD
        return ""
    mine = torch.cuda.get_device_capability(index)
    fits = lambda kind, it: it <= mine if kind == "compute" else it[0] == mine[0] and it[1] <= mine[1]  # noqa: E731
    if any(fits(*each) for each in built):
        return ""
    name = torch.cuda.get_device_name(index)
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) has no code for the {name} (compute capability "
        f"{mine[0]}.{mine[1]}). Install a torch that has ({BUILDS}), or {CPU}."
    )


def check_device(device: str, dtype: torch.dtype) -> None:
    """Raise ValueError if a run cannot use the device, or not with this dtype; warn if slowly."""
    if missing := missing_device(device):
        raise ValueError(missing)
    if dtype != torch.bfloat16:
        return
    if device_kind(device) == "mps" and not torch.backends.mps.is_macos_or_newer(14, 0):
        raise ValueError("bfloat16 on a Mac's GPU needs macOS 14 or newer; use --dtype float16 or float32.")
    if device_kind(device) == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device)[0] < 8:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"The {name} only emulates bfloat16, slowly; --dtype float16 is faster.", stacklevel=2)


def check_compile(device: str) -> None:
    """Compile a line with torch.compile, which may need a C++ compiler, Python's headers or triton.
    Raises ValueError with the reason if that fails."""
    config = getattr(torch.compiler, "config", None)
    caches = getattr(config, "force_disable_caches", None)  # newer torch; another machine may share them
    if caches is not None:
        config.force_disable_caches = True
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001, any of a compiler's
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"--compile does not work here ({lines[0]}); install what is missing, or leave it out."
        ) from None
    finally:
        if caches is not None:
            config.force_disable_caches = caches
        logging.disable(logging.NOTSET)
        torch.compiler.reset()
