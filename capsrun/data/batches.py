"""Batches made on the device: shuffled, moved, scaled; pure functions of (seed, step).

Shapes: N images of the data set, B batch, T digits in one image, C channels, H and W pixels.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# One number for each thing that is drawn, so that they do not depend on each other.
ORDER, SHIFT, SPLIT, NOISE, LIGHT, PLACE, PARTNER, WARP, HELD_OUT_PLACE, WAIT = range(1, 11)
AUGMENT, START, TARGET, PIXELS = range(11, 15)

# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Batch(NamedTuple):
    """Some images, as a network sees them."""

    images_BCHW: Tensor
    """float32; pixels in [0, 1] unless the data set says `standardise`."""
    labels_BT: Tensor
    targets_BTCHW: Tensor
    """What the reconstruction of each label should look like, pixels in [0, 1]."""
    noise_B: Tensor | None = None
    """In training, a random number for each image, int64, for a network that draws (dropout)."""


def _signed(value: int) -> int:
    """The 64-bit two's complement number with the same bits, for PyTorch has no unsigned ones."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical shift: PyTorch's own copies the sign bit in."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _mix(values: Tensor) -> Tensor:
    values = (values ^ _shift_right(values, 30)) * _signed(_MIX_1)
    values = (values ^ _shift_right(values, 27)) * _signed(_MIX_2)
    return values ^ _shift_right(values, 31)


def random_bits(counters: Tensor, *keys: int) -> Tensor:
    """Random 64-bit integers, a pure function of `keys` and each counter, equal on every device.

    With one key this is SplitMix64 seeded with it: counter n gives its n-th output, from 0.
    Further keys make independent streams. Takes and returns int64 of any shape.
    """
    state = torch.zeros((), dtype=torch.int64, device=counters.device)
    for position, key in enumerate(keys):
        state = (_mix(state + _signed(_GAMMA)) if position else state) + _signed(key)
    return _mix(state + (counters + 1) * _signed(_GAMMA))


def random_integers(counters: Tensor, low: int, high: int, *keys: int) -> Tensor:
    """Random integers in [low, high], both included; see `random_bits`.

    Some are likelier than others by at most (high − low + 1) / 2^63.
    """
    return low + _shift_right(random_bits(counters, *keys), 1) % (high - low + 1)


def random_unit(counters: Tensor, *keys: int) -> Tensor:
    """Random float32 numbers in [0, 1), multiples of 2^−24; see `random_bits`."""
    return _shift_right(random_bits(counters, *keys), 40).float() / 2**24


def random_offsets(counters_B: Tensor, shift_px: int, *keys: int) -> Tensor:
    """Shifts (B, 2) by −shift_px to shift_px rows and columns, each of them equally likely."""
    axes = torch.arange(2, device=counters_B.device)
    return random_integers(counters_B[:, None] * 2 + axes, -shift_px, shift_px, *keys)


def nth_offset(numbers_B: Tensor, shift_px: int) -> Tensor:
    """Shift (B, 2) number 0 to (2·shift_px + 1)² − 1, counted row by row."""
    side = 2 * shift_px + 1
    return torch.stack([numbers_B // side, numbers_B % side], dim=1) - shift_px


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """The order (N,) in which epoch `epoch` visits the `count` training images."""
    counters = torch.arange(count, device=device)
    return random_bits(counters, seed, ORDER, epoch).argsort(stable=True)


QUEUE = 5000
"""Records in the queue that shuffles the authors' training images."""


@lru_cache(maxsize=2)
def queue_order(seed: int, epoch: int, count: int, device: torch.device) -> Tensor:
    """The order (R,) in which a queue gives the `count` records that one pass reads into it.

    Each record comes up to `QUEUE` places before its own in the file, every one equally likely, so
    the records of a batch are neighbours of each other. What would come before the first comes last
    in the pass, as the queue is never empty between two. In the authors' queue each draw takes any
    of the records that are in it, so a few stay for several times as long.
    """
    records = torch.arange(count, device=device)
    early = random_integers(records, 0, min(QUEUE, count) - 1, seed, WAIT, epoch)
    return ((records - early) % count).argsort(stable=True)


def batch_indices(
    seed: int,
    step: int,
    batch_size: int,
    count: int,
    device: torch.device,
    steps: int = 1,
    order: Callable[[int, int, int, torch.device], Tensor] = epoch_order,
) -> tuple[Tensor, Tensor]:
    """Which images are in the batches of `steps` steps from `step` on (the first step is 0).

    Returns (indices, positions), each (steps · B,). Epochs, each in its `order`, follow each other
    without a gap, so every batch is full and one may span two epochs. positions: how many images
    the run had seen before each of these.
    """
    start, stop = step * batch_size, (step + steps) * batch_size
    parts = []
    for epoch in range(start // count, (stop - 1) // count + 1):
        first = epoch * count
        parts.append(order(seed, epoch, count, device)[max(start - first, 0) : stop - first])
    return torch.cat(parts), torch.arange(start, stop, device=device)


def place(images_BCHW: Tensor, offsets_B2: Tensor, canvas_px: int) -> Tensor:
    """Put each image on a black square canvas, its top left corner at its offset (row, column).

    What lies outside the canvas is cut off; offsets may be negative. Keeps the type; returns
    (B, C, canvas_px, canvas_px).
    """
    batch, _, height, width = images_BCHW.shape
    canvas = torch.arange(canvas_px, device=images_BCHW.device)
    rows_BY, columns_BX = (canvas - offset_B[:, None] for offset_B in offsets_B2.unbind(1))
    index_B = torch.arange(batch, device=images_BCHW.device)
    placed_BYXC = images_BCHW.permute(0, 2, 3, 1)[
        index_B[:, None, None],
        rows_BY.clamp(0, height - 1)[:, :, None],
        columns_BX.clamp(0, width - 1)[:, None, :],
    ]
    inside_BY = (rows_BY >= 0) & (rows_BY < height)
    inside_BX = (columns_BX >= 0) & (columns_BX < width)
    inside_BYX = inside_BY[:, :, None] & inside_BX[:, None, :]
    return (placed_BYXC * inside_BYX[..., None]).permute(0, 3, 1, 2)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 to float32 in [0, 1]."""
    return images.float() / 255


def in_class_order(batch: Batch) -> Batch:
    """The same images, the digits of each in the order of their classes."""
    labels_BT, order_BT = batch.labels_BT.sort(dim=1)
    rows_B1 = torch.arange(len(labels_BT), device=labels_BT.device)[:, None]
    return batch._replace(labels_BT=labels_BT, targets_BTCHW=batch.targets_BTCHW[rows_B1, order_BT])
