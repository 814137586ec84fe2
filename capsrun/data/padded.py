"""Padded MNIST: digits somewhere on a larger black canvas, to train for affNIST (§5.2).

Shapes: N digits, B batch, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from capsrun.data import batches, splits
from capsrun.data.batches import Batch
from capsrun.data.files import RawData
from capsrun.data.sets import class_names
from capsrun.data.splits import Dataset
from capsrun.data_config import DatasetConfig

BLANK_PX = 4
"""The border of MNIST's images in which most digits have no ink; it may leave the canvas."""


@dataclass(frozen=True, repr=False)
class PlacedDigits(splits.OfDigits):
    """Each of N digits at one place, or at each of the (2·shift_px + 1)² places.

    With one place it is drawn from (seed, k); else image k is at place k div N, counted row by row.
    """

    stream: int
    """Makes the places of each split its own."""

    def __len__(self) -> int:
        places = (2 * self.config.shift_px + 1) ** 2
        return len(self.labels_N) * (places if self.config.test == "all" else 1)

    def offsets(self, indices_B: Tensor) -> Tensor:
        """The row and column (B, 2) of each digit's top left corner."""
        shift_px = self.config.shift_px
        border_px = (self.config.image_px - self.digits_NCHW.shape[-1]) // 2
        if self.config.test == "all":
            return border_px + batches.nth_offset(self.numbers(indices_B)[1], shift_px)
        drawn_B2 = batches.random_offsets(indices_B, shift_px, self.config.split_seed, self.stream)
        return border_px + drawn_B2

    def batch(self, indices_B: Tensor) -> Batch:
        digits_BCHW = self.digits_NCHW[self.numbers(indices_B)[0]]
        placed_BCHW = batches.place(digits_BCHW, self.offsets(indices_B), self.config.image_px)
        pixels_BCHW = batches.to_pixels(placed_BCHW).contiguous()
        return Batch(pixels_BCHW, self.labels(indices_B), pixels_BCHW[:, None])


def make(raw: RawData, config: DatasetConfig, device: torch.device) -> Dataset:
    """Training digits at random places; validation and test digits at places fixed by split_seed.

    Raises UserError for a shift by which digits would leave the canvas.
    """
    splits.refuse_changes(config)
    splits.check_shift(config, raw.train.images_NCHW.shape[-1], BLANK_PX)
    train, validation, test = splits.parts(raw, config, device)
    return Dataset(
        config.name,
        class_names(config),
        splits.StoredImages(*train, config),
        PlacedDigits(*validation, config, batches.HELD_OUT_PLACE),
        PlacedDigits(*test, config, batches.PLACE),
        raw.sources,
    )
