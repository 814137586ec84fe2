"""Where and in which precision the numbers are computed, and what a result says of that."""

import contextlib
import ctypes
import datetime
import os
import platform
import re
import resource
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import capsrun
from capsrun.errors import UserError
from capsrun.models.fast.native import cpu_features
from capsrun.terminal import counted


def resolve_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises UserError for a GPU that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda, but PyTorch finds no CUDA GPU here; use device=cpu or device=auto"
        )
    if name == "cpu":
        heed_cpu_quota()
    return torch.device(name)


def checked_device(device: str | torch.device) -> torch.device:
    """A device as PyTorch names it. Raises UserError for one that is not there."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(
            f"device={device} cannot be used here; take 'cpu', or 'cuda' where there is a GPU"
        ) from error
    return found


def heed_cpu_quota(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> None:
    """Use no more threads than a container may run at once, where it is limited by a quota.

    PyTorch counts the cores that the process may use, but knows nothing of quotas: threads beyond
    them would wait for each other.
    """
    # No quota is "max", and only a Linux with control groups has the file.
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, group.read_bytes().split())
        torch.set_num_threads(min(torch.get_num_threads(), max(1, quota // period)))


def set_deterministic(on: bool) -> None:
    """Have the same settings give the same bits on the same machine, or be as fast as can be.

    On a CPU everything is deterministic in any case, for one number of threads: PyTorch adds in an
    order that depends on it. On a GPU cuDNN and cuBLAS then take the algorithms that add in a fixed
    order, none is chosen by its speed (see `training/graph.py`), and PyTorch raises RuntimeError
    for an operation that has no such algorithm. To be called before the GPU computes anything.
    """
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    # Filling all that is allocated with NaN would take time in every step, and only show what reads
    # before it writes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if on:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def resolve_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the processor computes it in hardware, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & cpu_features() else "fp32"


def keep_freed_memory() -> bool:
    """Have glibc keep memory that is freed for what is allocated next, in the whole process.

    Large tensors would otherwise be given back and had again, page by page, in every step: up to
    a sixth of its time. Returns whether that was possible: elsewhere than with glibc it is not.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    return mallopt(trim_threshold, -1) == mallopt(mmap_max, 0) == 1


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Convolutions and the decoder in bf16 or not; capsules and losses are float32 in any case."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def begin_memory_count(device: torch.device) -> None:
    """Let `memory_gb` count from now on, so that a run's peak is not that of one before it.

    On a CPU this works on Linux alone, and not where a sandbox forbids it; elsewhere the peak stays
    that of the whole process.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # what `keep_freed_memory` has kept of earlier runs
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_bytes(b"5")  # sets VmHWM to what is held now


def memory_gb(device: torch.device) -> float:
    """Most memory held since `begin_memory_count`, or the process's start, in 10⁹ bytes.

    Of the GPU, or of this process on a CPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9  # with what graphs hold
    if sys.platform == "linux":  # not getrusage: a process inherits that of the one that started it
        status = Path("/proc/self/status").read_bytes()
        if found := re.search(rb"VmHWM:\s+(\d+) kB", status):
            return int(found[1]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def describe_device(device: torch.device) -> str:
    """Name of the processor, and on a CPU how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*: (.+)", facts, re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name}, {counted(torch.get_num_threads(), 'thread')}"


def provenance(device: torch.device, precision: str) -> dict[str, Any]:
    """Where a number comes from: for `result.json`."""
    versions = {
        "capsrun": capsrun.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain string: a checkpoint holds nothing else
    }
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
    now = datetime.datetime.now(datetime.UTC)
    return {
        "device": describe_device(device),
        "precision": precision,
        "date": now.date().isoformat(),
        "time": now.time().isoformat("milliseconds"),
        "versions": versions,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, + if it was changed; None elsewhere."""
    checkout = Path(capsrun.__file__).parents[1]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    # Hooks of git, and whatever is started in one, have variables that name another repository.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, cwd=checkout, env=ours, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode("ascii", "replace").strip()
