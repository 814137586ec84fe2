"""Votes and routing on a CPU as one kernel (`routing_cpu.cpp`), compiled where it is used.

Ten times faster than the operations of `routing.py`, which it equals to float32 rounding. It needs
a C++ compiler and takes a second to build; the result is kept in the user's cache folder.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension,
R routing iterations.
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
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from capsrun.errors import notice

SOURCE = Path(__file__).with_suffix(".cpp")
# A thread has vectors of K and of J · D numbers for 16 images on its stack, and the K · J · D
# weights of an input capsule: with these limits about a megabyte.
LARGEST_INPUT, LARGEST_OUTPUT, LARGEST_WEIGHT = 1024, 2048, 2**17


def route_fused(
    inputs_BIK: Tensor, weights_IKJD: Tensor, bias_JD: Tensor | None, iterations: int, leaky: bool
) -> Tensor | None:
    """Votes (Eq. 2) and routing (Procedure 1) in one; returns v of shape (B, J, D).

    Equals `route(capsule_votes(inputs, weights), bias, iterations, leaky)` to float32 rounding, and
    has the same gradients. None, having said why once, where this machine cannot compile it or the
    kernel does not take these tensors.
    """
    tensors = [inputs_BIK, weights_IKJD] + ([] if bias_JD is None else [bias_JD])
    if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return None  # nothing that a user could mend: checks in double precision, say
    _, dimensions, outputs, output_dimensions = weights_IKJD.shape
    output_size = outputs * output_dimensions
    if (
        dimensions > LARGEST_INPUT
        or output_size > LARGEST_OUTPUT
        or dimensions * output_size > LARGEST_WEIGHT
    ):
        notice(
            f"routing from {dimensions} dimensions to {outputs} capsules of {output_dimensions} is "
            "too large for the fast way, so it takes ten times longer"
        )
        return None
    kernels = load_kernels(dimensions, outputs, output_dimensions)
    if kernels is None:
        return None
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return _Route.apply(inputs_BIK, weights_IKJD, bias_JD, iterations, leaky, kernels, keep)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs_BIK: Tensor,
        weights_IKJD: Tensor,
        bias_JD: Tensor | None,
        iterations: int,
        leaky: bool,
        kernels: ctypes.CDLL,
        keep: bool,
    ) -> Tensor:
        """keep: keep what the backward pass needs; autograd does not tell while testing."""
        inputs_BIK, weights_IKJD = inputs_BIK.contiguous(), weights_IKJD.contiguous()
        bias_JD = None if bias_JD is None else bias_JD.contiguous()
        batch, count = inputs_BIK.shape[:2]
        outputs, dimensions = weights_IKJD.shape[2:]
        capsules_BJD = inputs_BIK.new_empty(batch, outputs, dimensions)
        sums_BRJD = couplings = None
        if keep:
            lanes = kernels.lanes()
            groups = -(-batch // lanes)
            sums_BRJD = inputs_BIK.new_empty(batch, iterations, outputs, dimensions)
            couplings = inputs_BIK.new_empty(groups, iterations - 1, count, outputs, lanes)
        kernels.route_forward(
            *map(_address, (inputs_BIK, weights_IKJD, bias_JD)),
            *(batch, count, iterations, int(leaky), torch.get_num_threads()),
            *map(_address, (capsules_BJD, sums_BRJD, couplings)),
        )
        ctx.save_for_backward(inputs_BIK, weights_IKJD, sums_BRJD, couplings)
        ctx.iterations, ctx.leaky, ctx.kernels = iterations, leaky, kernels
        return capsules_BJD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs_BIK, weights_IKJD, sums_BRJD, couplings = ctx.saved_tensors
        batch, count = inputs_BIK.shape[:2]
        outputs, dimensions = weights_IKJD.shape[2:]
        to_capsules_BJD = gradients[0].contiguous()
        to_couplings = torch.empty_like(couplings)
        terms = inputs_BIK.new_empty(batch, 2 * ctx.iterations - 1, outputs, dimensions)
        to_inputs_BIK, to_weights_IKJD = (
            torch.empty_like(inputs_BIK),
            torch.empty_like(weights_IKJD),
        )
        to_sums_BRJD = torch.empty_like(sums_BRJD)
        ctx.kernels.route_backward(
            *map(_address, (inputs_BIK, weights_IKJD, sums_BRJD, couplings, to_capsules_BJD)),
            *(batch, count, ctx.iterations, int(ctx.leaky), torch.get_num_threads()),
            *map(_address, (to_couplings, terms, to_inputs_BIK, to_weights_IKJD, to_sums_BRJD)),
        )
        to_bias_JD = to_sums_BRJD.sum((0, 1)) if ctx.needs_input_grad[2] else None
        return to_inputs_BIK, to_weights_IKJD, to_bias_JD, None, None, None, None


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def load_kernels(dimensions: int, outputs: int, output_dimensions: int) -> ctypes.CDLL | None:
    """Build the kernels for these sizes (K, J, D), or take them from the cache; None without them.

    Says once why there are none.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or list(
        filter(None, [shutil.which("g++") or shutil.which("clang++")])
    )
    if not compiler:
        notice(
            "no C++ compiler (g++ or clang++) here, so routing takes ten times longer; install g++ "
            "for the fast way"
        )
        return None
    sizes = [f"-DK={dimensions}", f"-DJ={outputs}", f"-DD={output_dimensions}"]
    try:
        kernels = ctypes.CDLL(str(_build(compiler, sizes)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = next(iter(said.strip().splitlines()), type(error).__name__)
        notice(
            f"the fast routing could not be built with {compiler[0]} ({reason}), so routing takes "
            "ten times longer; install g++, or name another compiler in the variable CXX"
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int
    kernels.route_forward.argtypes = [pointer] * 3 + [number] * 5 + [pointer] * 3
    kernels.route_backward.argtypes = [pointer] * 5 + [number] * 5 + [pointer] * 5
    kernels.route_forward.restype = kernels.route_backward.restype = None
    return kernels


def _build(compiler: list[str], sizes: list[str]) -> Path:
    """Compile the kernels into the cache folder, unless they are there; returns the library."""
    flags = ["-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", *sizes]
    # Two OpenMP runtimes in one process would fight for the cores, so PyTorch's own is linked.
    openmp = sorted(map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*.so*")))[:1]
    version = _run(*compiler, "--version")
    key = "\n".join([SOURCE.read_text(), *compiler, version, *flags, *openmp, _cpu()])
    library = _cache_dir() / f"routing-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            # Built aside and renamed: another process never loads half a library.
            compiled, linked = Path(folder) / "routing.o", Path(folder) / "routing.so"
            _run(*compiler, *flags, "-c", str(SOURCE), "-o", str(compiled))
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
        return Path(tempfile.mkdtemp(prefix="capsrun-"))


def _cpu() -> str:
    """What `-march=native` depends on, for a cache folder that several machines share."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {features}"
