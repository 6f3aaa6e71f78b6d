"""Which device a process works on, with how many threads, and how its memory is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import re

import torch

_GPU_IDS = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")
_GPU_COUNTS = ("SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK")
"""Set in the environment where somebody asked for GPUs."""

_MALLOC_SETTINGS = {
    -3: 2**25,  # M_MMAP_THRESHOLD: the most that every glibc takes; larger blocks are still mapped and unmapped
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: never
    -2: 2**26,  # M_TOP_PAD: in strides of 64 MiB
}


def resolve_device(name: str) -> torch.device:
    """This process's device: ``auto`` is CUDA where there is one; of several GPUs, that of ``LOCAL_RANK``.

    A CUDA device has its index: ``torch.cuda.set_device`` asks for one.

    Raises:
        ValueError: if there is no such device, or ``auto`` would take the CPU where the environment asks for GPUs.
    """
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", name) is None:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:INDEX, got {name!r}")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and num_gpus == 0:
        none = dict.fromkeys(_GPU_IDS, ("", "-1", "NoDevFiles")) | dict.fromkeys(_GPU_COUNTS, ("", "0"))
        asked = [f"{key}={os.environ[key]}" for key in none if os.environ.get(key, "") not in none[key]]
        if asked:
            raise ValueError(
                f"device=auto would be the CPU, but GPUs were asked for ({', '.join(asked)}) and {_torch_build()} sees "
                "none: mend the driver, the container or the installation, or choose device=cpu"
            )
        name = "cpu"
    if name == "cpu":
        return torch.device(name)
    if name in ("auto", "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0) if num_gpus > 1 else 0}"
    device = torch.device(name)
    if device.index >= num_gpus:
        raise ValueError(f"device={name} must be one of the {num_gpus} GPUs that {_torch_build()} sees, from cuda:0")
    return device


def describe_device(device: torch.device) -> str:
    """The device and the torch that drives it, for logs."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device} ({name}), {_torch_build()}"


def _torch_build() -> str:
    return f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'})"


def prepare_cpu(num_threads: int | None) -> None:
    """Set torch's CPU threads, ``None`` for torch's own choice, and keep freed memory for the next step.

    By default glibc hands large blocks back to the system, and gets them anew, cleared page by page, at the next step.
    Other C libraries (musl, macOS) have no such setting: nothing changes there.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in _MALLOC_SETTINGS.items():
            if libc.mallopt(parameter, value) != 1:
                raise OSError(f"mallopt({parameter}, {value}) was refused by {' '.join(platform.libc_ver())}")


def tune(device: torch.device, *, try_algorithms: bool) -> None:
    """Settings for a CUDA device; nothing changes on the CPU.

    Args:
        device (torch.device): where the network is.

    Keyword Args:
        try_algorithms (bool): take the fastest algorithm of each convolution, tried once per shape: for fixed shapes,
            and where two processes need not agree in the last bits.
    """
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = try_algorithms
        torch.set_float32_matmul_precision("high")  # TF32, as torch does convolutions
