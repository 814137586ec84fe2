"""C++ kernels that are compiled where they are used, for its processor and the sizes at hand.

It takes a C++ compiler and seconds; the result is kept in the user's cache folder.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from capsrun.errors import notice

FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wno-psabi"]


def load_library(source: Path, *macros: str) -> ctypes.CDLL | None:
    """Build `source` with these macros (`K=8`), or take it from the cache; None where that fails.

    Says once why it failed, and that it makes steps slower.
    """
    found = shutil.which("g++") or shutil.which("clang++")
    compiler = shlex.split(os.environ.get("CXX", "")) or ([found] if found else [])
    if not compiler:
        notice(
            "no C++ compiler (g++ or clang++) here, so a step takes several times longer; install "
            "g++ for the fast way"
        )
        return None
    try:
        return ctypes.CDLL(str(_build(source, compiler, [f"-D{macro}" for macro in macros])))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next(iter(said.strip().splitlines()), type(error).__name__)
        notice(
            f"the fast kernels could not be built with {compiler[0]} ({reason}), so a step takes "
            "several times longer; install g++, or name another compiler in the variable CXX"
        )
        return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a kernel; null without one."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _build(source: Path, compiler: list[str], defines: list[str]) -> Path:
    """Compile the kernels into the cache folder, unless they are there; returns the library."""
    # Two OpenMP runtimes in one process would fight for the cores, so PyTorch's own is linked.
    openmp = sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]
    flags = [*FLAGS, *defines]
    code = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    # What `-march=native` depends on, for a cache folder that several machines share.
    processor = [platform.machine(), platform.processor(), *sorted(cpu_features())]
    key = "\n".join([*code, *compiler, _run(*compiler, "--version"), *flags, *openmp, *processor])
    library = _cache_dir() / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Built aside and renamed: another process never loads half a library.
            compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
            _run(*compiler, *flags, "-c", str(source), "-o", str(compiled))
            _run(*compiler, "-shared", str(compiled), "-o", str(linked), *(openmp or ["-fopenmp"]))
            linked.replace(library)
    return library


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def _cache_dir() -> Path:
    """The user's cache folder, or where it cannot be written one for this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capsrun"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(_folder_of_this_process().name)


@functools.cache
def _folder_of_this_process() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="capsrun-")  # removed when the process ends


@functools.cache
def cpu_features() -> frozenset[str]:
    """What Linux says the CPU can do; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    # Every core has a line; "Features" on Arm.
    names = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(names.split())
