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
import stat
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from capsrun import disk
from capsrun.errors import notice

# A library is kept with the SHA-256 of it at its end, which the loader of the system does not read.
DIGEST_BYTES, MOST_BYTES = 32, 100_000_000
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-Wno-psabi"]


def load_library(source: Path, *macros: str) -> ctypes.CDLL | None:
    """Build `source` with these macros (`K=8`), or take it from the cache; None where that fails.

    Says once why it failed, and that it makes steps slower.
    """
    found = shutil.which("g++") or shutil.which("clang++")
    said = os.environ.get("CXX") or found
    if not said:
        notice(
            "no C++ compiler (g++ or clang++) here, so a step takes several times longer; install "
            "g++ for the fast way"
        )
        return None
    try:
        return _load(source, shlex.split(said), [f"-D{macro}" for macro in macros])
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or str(error)
        reason = next(iter(told.strip().splitlines()), type(error).__name__)
        notice(
            f"the fast kernels could not be built with {said} ({reason}), so a step takes "
            "several times longer; install g++, or name another compiler in the variable CXX"
        )
        return None


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a kernel; null without one."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _load(source: Path, compiler: list[str], defines: list[str]) -> ctypes.CDLL:
    """The kernels as they are kept, or built anew and, where that may be, kept."""
    # Two OpenMP runtimes in one process would fight for the cores, so PyTorch's own is linked.
    openmp = sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]
    flags = [*FLAGS, *defines]
    files = [source, *sorted(source.parent.glob("*.h"))]
    code = [path.read_text(encoding="utf-8") for path in files]
    # What `-march=native` depends on, for a cache folder that several machines share.
    processor = [platform.machine(), platform.processor(), *sorted(cpu_features())]
    key = "\n".join([*code, *compiler, _run(*compiler, "--version"), *flags, *openmp, *processor])
    cache = _cache_dir()
    kept = cache / f"{source.stem}-{_digest(key.encode()).hex()[:16]}.so" if cache else None
    if kept and _is_sound(kept):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="capsrun-", dir=cache) as folder:
        compiled, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        _run(*compiler, *flags, "-c", str(source), "-o", str(compiled))
        _run(*compiler, "-shared", str(compiled), "-o", str(linked), *(openmp or ["-fopenmp"]))
        with open(linked, "rb+") as stream:
            stream.write(_digest(stream.read()))
            os.fsync(stream.fileno())
        library = ctypes.CDLL(str(linked))  # it stays when its file goes
        if kept:  # renamed: another process never loads half a library
            linked.replace(kept)
    return library


def _run(*command: str) -> str:
    done = subprocess.run(
        command, check=True, capture_output=True, timeout=120, encoding="utf-8", errors="replace"
    )
    return done.stdout


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_sound(library: Path) -> bool:
    """Whether a library in the cache is this user's, and whole: its digest is what it ends with."""
    try:
        content = disk.read_bytes(library, MOST_BYTES) if _is_private(library) else b""
    except (OSError, ValueError):
        return False
    code, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    return bool(code) and _digest(code) == digest


def _cache_dir() -> Path | None:
    """The user's cache folder; None where it cannot be written, or others can write there too."""
    try:
        named = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # As its specification says, one that is not absolute is none.
        folder = (named if named.is_absolute() else Path.home() / ".cache") / "capsrun"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            notice(f"others may write to {folder}, so kernels are not kept there; chmod go-w it")
            return None
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # the latter where there is no home
        return None


def _is_private(path: Path) -> bool:
    """Whether a file or a folder, no link, is this user's, and nobody else may write to it."""
    status = os.lstat(path)
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@functools.cache
def cpu_features() -> frozenset[str]:
    """What Linux says the CPU can do; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    # Every core has a line; "Features" on Arm.
    names = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(names.split())
