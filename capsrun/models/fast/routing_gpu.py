"""Votes and routing on a GPU as Triton kernels, which never write a vote to memory.

The algebra is that of `routing_cpu.cpp`: a vote is computed again wherever one is needed, and the
gradient of a vote is a short sum of products (a number for each input and output capsule, times a
vector for each output capsule), of which only the factors are kept. Sums over input capsules are
made in chunks and added up afterwards in a fixed order, so that equal inputs give equal bits.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension,
R routing iterations, S chunks of input capsules. In a kernel, a name that ends in P is a size
rounded up to a power of 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from capsrun.models.routing import squash

IMAGES_AT_ONCE = 16  # the least that a matrix product in Triton takes
CHUNK = 32  # input capsules that one program adds up


def route_fused(
    inputs_BIK: Tensor, weights_IKJD: Tensor, bias_JD: Tensor | None, iterations: int, leaky: bool
) -> Tensor:
    """Votes (Eq. 2) and routing (Procedure 1) in one; returns v of shape (B, J, D).

    Equals `route(capsule_votes(inputs, weights), bias, iterations, leaky)` to float32 rounding, and
    has the same gradients.
    """
    if bias_JD is None:
        bias_JD = inputs_BIK.new_zeros(weights_IKJD.shape[2:])
    tensors = (inputs_BIK.contiguous(), weights_IKJD.contiguous(), bias_JD)
    return _forward(*tensors, iterations, leaky)[0]


@triton.jit
def _votes(
    inputs_ptr, weights_ptr, images, known, i, count,
    K: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The inputs (images, KP), weights (KP, JP · DP) and votes (images, JP, DP) of capsule i."""
    k = tl.arange(0, KP)
    n = tl.arange(0, JP * DP)
    j, d = n // DP, n % DP
    inputs = tl.load(
        inputs_ptr + (images[:, None] * count + i) * K + k[None, :],
        mask=known[:, None] & (k < K)[None, :],
        other=0.0,
    )
    weights = tl.load(
        weights_ptr + (i * K + k[:, None]) * (J * D) + (j * D + d)[None, :],
        mask=(k < K)[:, None] & ((j < J) & (d < D))[None, :],
        other=0.0,
    )
    # Tensor cores in three passes: as exact as float32.
    votes = tl.dot(inputs, weights, input_precision="tf32x3")
    return inputs, weights, tl.reshape(votes, (images.shape[0], JP, DP))


@triton.jit
def _vectors(
    ptr, rows, known, J: tl.constexpr, D: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr
):
    """Addresses and mask of the (J, D) vectors of some rows, as (rows, JP, DP)."""
    j, d = tl.arange(0, JP), tl.arange(0, DP)
    at = rows[:, None, None] * (J * D) + j[None, :, None] * D + d[None, None, :]
    return ptr + at, known[:, None, None] & (j < J)[None, :, None] & (d < D)[None, None, :]


@triton.jit
def _forward_pass(
    inputs_ptr, weights_ptr, capsules_ptr, logits_ptr, couplings_ptr, partial_ptr, batch, count,
    FIRST: tl.constexpr, SECOND: tl.constexpr, LEAKY: tl.constexpr, STEP: tl.constexpr,
    BB: tl.constexpr, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Σ_i c_ij û_j|i over a chunk of input capsules, after adding the agreement to the logits."""
    images = tl.program_id(0) * BB + tl.arange(0, BB)
    known = images < batch
    chunk = tl.program_id(1)
    j = tl.arange(0, JP)
    capsules_at, capsules_mask = _vectors(capsules_ptr, images, known, J, D, JP, DP)
    capsules = tl.load(capsules_at, mask=capsules_mask, other=0.0)
    sums = tl.zeros((BB, JP, DP), tl.float32)
    for i in range(chunk * STEP, min((chunk + 1) * STEP, count)):
        _, _, votes = _votes(inputs_ptr, weights_ptr, images, known, i, count, K, J, D, KP, JP, DP)
        if FIRST:
            sums += votes
        else:
            at = (images[:, None] * count + i) * J + j[None, :]
            mask = known[:, None] & (j < J)[None, :]
            logits = tl.sum(votes * capsules, axis=2)
            if not SECOND:
                logits += tl.load(logits_ptr + at, mask=mask, other=0.0)
            tl.store(logits_ptr + at, logits, mask=mask)
            logits = tl.where((j < J)[None, :], logits, float("-inf"))
            highest = tl.max(logits, axis=1)
            if LEAKY:
                highest = tl.maximum(highest, 0.0)
            shares = tl.exp(logits - highest[:, None])
            total = tl.sum(shares, axis=1)
            if LEAKY:
                total += tl.exp(-highest)
            couplings = shares / total[:, None]
            tl.store(couplings_ptr + at, couplings, mask=mask)
            sums += couplings[:, :, None] * votes
    partial_at, partial_mask = _vectors(partial_ptr, chunk * batch + images, known, J, D, JP, DP)
    tl.store(partial_at, sums, mask=partial_mask)


@triton.jit
def _backward_pass(
    inputs_ptr, weights_ptr, dsums_ptr, couplings_ptr, later_ptr, dlogits_ptr, partial_ptr,
    batch, count, LAST: tl.constexpr, STEP: tl.constexpr,
    BB: tl.constexpr, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradients of an iteration's logits, and with them those of the capsules of the one before."""
    images = tl.program_id(0) * BB + tl.arange(0, BB)
    known = images < batch
    chunk = tl.program_id(1)
    j = tl.arange(0, JP)
    dsums_at, dsums_mask = _vectors(dsums_ptr, images, known, J, D, JP, DP)
    dsums = tl.load(dsums_at, mask=dsums_mask, other=0.0)
    dcapsules = tl.zeros((BB, JP, DP), tl.float32)
    for i in range(chunk * STEP, min((chunk + 1) * STEP, count)):
        _, _, votes = _votes(inputs_ptr, weights_ptr, images, known, i, count, K, J, D, KP, JP, DP)
        at = (images[:, None] * count + i) * J + j[None, :]
        mask = known[:, None] & (j < J)[None, :]
        couplings = tl.load(couplings_ptr + at, mask=mask, other=0.0)
        dcouplings = tl.sum(votes * dsums, axis=2)
        mean = tl.sum(couplings * dcouplings, axis=1)
        dlogits = couplings * (dcouplings - mean[:, None])
        if not LAST:
            dlogits += tl.load(later_ptr + at, mask=mask, other=0.0)
        tl.store(dlogits_ptr + at, dlogits, mask=mask)
        dcapsules += dlogits[:, :, None] * votes
    partial_at, partial_mask = _vectors(partial_ptr, chunk * batch + images, known, J, D, JP, DP)
    tl.store(partial_at, dcapsules, mask=partial_mask)


@triton.jit
def _input_gradients(
    inputs_ptr, weights_ptr, couplings_ptr, dlogits_ptr, dsums_ptr, capsules_ptr,
    dinputs_ptr, dweights_ptr, batch, count, SHARES: tl.constexpr, R: tl.constexpr,
    BB: tl.constexpr, K: tl.constexpr, J: tl.constexpr, D: tl.constexpr,
    KP: tl.constexpr, JP: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Gradients of the inputs and the weights of one input capsule, from those of its votes."""
    i = tl.program_id(0)
    k, j, n = tl.arange(0, KP), tl.arange(0, JP), tl.arange(0, JP * DP)
    dweights = tl.zeros((KP, JP * DP), tl.float32)
    for first in range(0, batch, BB):
        images = first + tl.arange(0, BB)
        known = images < batch
        inputs, weights, _ = _votes(
            inputs_ptr, weights_ptr, images, known, i, count, K, J, D, KP, JP, DP
        )
        at, mask = _vectors(dsums_ptr, images, known, J, D, JP, DP)
        dvotes = tl.load(at, mask=mask, other=0.0) / SHARES
        for r in tl.static_range(1, R):
            rows = (r - 1) * batch + images
            at_BJ = (rows[:, None] * count + i) * J + j[None, :]
            mask_BJ = known[:, None] & (j < J)[None, :]
            couplings = tl.load(couplings_ptr + at_BJ, mask=mask_BJ, other=0.0)
            dlogits = tl.load(dlogits_ptr + at_BJ, mask=mask_BJ, other=0.0)
            at, mask = _vectors(dsums_ptr, r * batch + images, known, J, D, JP, DP)
            dvotes += couplings[:, :, None] * tl.load(at, mask=mask, other=0.0)
            at, mask = _vectors(capsules_ptr, rows, known, J, D, JP, DP)
            dvotes += dlogits[:, :, None] * tl.load(at, mask=mask, other=0.0)
        flat = tl.reshape(dvotes, (BB, JP * DP))
        dinputs = tl.dot(flat, tl.trans(weights), input_precision="ieee")
        tl.store(
            dinputs_ptr + (images[:, None] * count + i) * K + k[None, :],
            dinputs,
            mask=known[:, None] & (k < K)[None, :],
        )
        dweights += tl.dot(tl.trans(inputs), flat, input_precision="ieee")
    tl.store(
        dweights_ptr + (i * K + k[:, None]) * (J * D) + (n // DP * D + n % DP)[None, :],
        dweights,
        mask=(k < K)[:, None] & ((n // DP < J) & (n % DP < D))[None, :],
    )


def _launch(weights_IKJD: Tensor) -> dict[str, int]:
    """Sizes and launch settings of every kernel: with these none spills its registers (sm_90)."""
    dimensions, outputs, output_dimensions = weights_IKJD.shape[1:]
    rounded_outputs = triton.next_power_of_2(outputs)
    return {
        "BB": IMAGES_AT_ONCE,
        "K": dimensions,
        "J": outputs,
        "D": output_dimensions,
        "KP": max(16, triton.next_power_of_2(dimensions)),
        "JP": rounded_outputs,
        # A matrix product in Triton sums over 16 numbers at least.
        "DP": max(triton.next_power_of_2(output_dimensions), 16 // rounded_outputs),
        "num_warps": 8,
        "num_stages": 1,
    }


def _chunks(inputs_BIK: Tensor, weights_IKJD: Tensor) -> tuple[tuple[int, int], Tensor]:
    """The grid of images and chunks of input capsules, and memory for the sums of each chunk."""
    batch, count = inputs_BIK.shape[:2]
    chunks = triton.cdiv(count, CHUNK)
    partial_SBJD = inputs_BIK.new_empty(chunks, batch, *weights_IKJD.shape[2:])
    return (triton.cdiv(batch, IMAGES_AT_ONCE), chunks), partial_SBJD


@torch.library.custom_op("capsrun::route_forward", mutates_args=())
def _forward(
    inputs_BIK: Tensor, weights_IKJD: Tensor, bias_JD: Tensor, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns v (B, J, D); s and v of each iteration (R, B, J, D); c of all but the first one.

    In the first all couplings are equal. The others are (R−1, B, I, J), or with one iteration
    (1, B, I, J), which nothing reads.
    """
    grid, partial_SBJD = _chunks(inputs_BIK, weights_IKJD)
    couplings = inputs_BIK.new_empty(
        max(iterations - 1, 1), *inputs_BIK.shape[:2], weights_IKJD.shape[2]
    )
    logits_BIJ = torch.empty_like(couplings[0])
    sums: list[Tensor] = []
    capsules: list[Tensor] = []
    for r in range(iterations):
        before = capsules[-1] if r else partial_SBJD  # not read in the first iteration
        tensors = inputs_BIK, weights_IKJD, before, logits_BIJ, couplings[r - 1], partial_SBJD
        flags = {"FIRST": r == 0, "SECOND": r == 1, "LEAKY": leaky, "STEP": CHUNK}
        _forward_pass[grid](*tensors, *inputs_BIK.shape[:2], **flags, **_launch(weights_IKJD))
        # At first all outputs, and no one, get the same.
        shares = 1 if r else weights_IKJD.shape[2] + leaky
        sums.append(partial_SBJD.sum(0) / shares + bias_JD)
        capsules.append(squash(sums[-1]))
    return capsules[-1], torch.stack(sums), torch.stack(capsules), couplings


@_forward.register_fake
def _(
    inputs_BIK: Tensor, weights_IKJD: Tensor, bias_JD: Tensor, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count = inputs_BIK.shape[:2]
    capsules_BJD = inputs_BIK.new_empty(batch, *bias_JD.shape)
    of_each_RBJD = inputs_BIK.new_empty(iterations, batch, *bias_JD.shape)
    couplings = inputs_BIK.new_empty(max(iterations - 1, 1), batch, count, len(bias_JD))
    return capsules_BJD, of_each_RBJD, torch.empty_like(of_each_RBJD), couplings


def _squash_gradient(sums: Tensor, to_capsules: Tensor) -> Tensor:
    """The gradient of `squash` at s, 0 at s = 0, without overflow where s is huge."""
    largest = torch.finfo(sums.dtype).max ** 0.45
    sums = sums.clamp(-largest, largest)
    square = sums.square().sum(-1, keepdim=True)
    norm = square.sqrt()
    product = (sums * to_capsules).sum(-1, keepdim=True)
    along = product * (1 - square) / (1 + square).square()
    along = torch.where(norm > 0, along / norm, 0.0)
    along = torch.where(square > 1e8, -product / norm / (1 + square), along)
    return to_capsules * (norm / (1 + square)) + sums * along


@torch.library.custom_op("capsrun::route_backward", mutates_args=())
def _backward(
    to_capsules_BJD: Tensor,
    inputs_BIK: Tensor,
    weights_IKJD: Tensor,
    sums_RBJD: Tensor,
    capsules_RBJD: Tensor,
    couplings: Tensor,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the inputs, the weights and the bias."""
    iterations, sizes = len(sums_RBJD), inputs_BIK.shape[:2]
    grid, partial_SBJD = _chunks(inputs_BIK, weights_IKJD)
    to_logits, to_sums_RBJD = torch.empty_like(couplings), torch.empty_like(sums_RBJD)
    for r in reversed(range(iterations)):
        to_sums_RBJD[r] = _squash_gradient(sums_RBJD[r], to_capsules_BJD)
        if r == 0:
            break
        last = r == iterations - 1
        later = to_logits[r - 1 if last else r]  # not read in the last iteration
        gradients = later, to_logits[r - 1], partial_SBJD
        tensors = inputs_BIK, weights_IKJD, to_sums_RBJD[r], couplings[r - 1], *gradients
        _backward_pass[grid](*tensors, *sizes, LAST=last, STEP=CHUNK, **_launch(weights_IKJD))
        to_capsules_BJD = partial_SBJD.sum(0)
    results = torch.empty_like(inputs_BIK), torch.empty_like(weights_IKJD)
    kept = couplings, to_logits, to_sums_RBJD, capsules_RBJD
    counts = {"SHARES": weights_IKJD.shape[2] + leaky, "R": iterations}
    _input_gradients[(sizes[1],)](
        inputs_BIK, weights_IKJD, *kept, *results, *sizes, **counts, **_launch(weights_IKJD)
    )
    return *results, to_sums_RBJD.sum((0, 1))


@_backward.register_fake
def _(
    to_capsules_BJD: Tensor,
    inputs_BIK: Tensor,
    weights_IKJD: Tensor,
    sums_RBJD: Tensor,
    capsules_RBJD: Tensor,
    couplings: Tensor,
    leaky: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    bias_JD = inputs_BIK.new_empty(weights_IKJD.shape[2:])
    return torch.empty_like(inputs_BIK), torch.empty_like(weights_IKJD), bias_JD


def _save(ctx, inputs, output) -> None:
    inputs_BIK, weights_IKJD, _, _, ctx.leaky = inputs
    ctx.save_for_backward(inputs_BIK, weights_IKJD, *output[1:])


def _gradients(ctx, to_capsules_BJD, *_):
    gradients = _backward(to_capsules_BJD.contiguous(), *ctx.saved_tensors, ctx.leaky)
    return *gradients, None, None


_forward.register_autograd(_gradients, setup_context=_save)
