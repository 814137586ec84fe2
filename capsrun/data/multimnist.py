"""MultiMNIST: two overlapping digits of different classes, made on the device by index (§6).

Shapes: N digits, B batch, J classes, M digits of other classes, T = 2 digits in one image,
C channels, H and W pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from capsrun.data import batches, splits
from capsrun.data.batches import PARTNER, SHIFT, Batch
from capsrun.data.files import Part, RawData
from capsrun.data.sets import class_names
from capsrun.data.splits import Dataset, OfDigits, TrainingSplit
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

PARTNERS = 1000
"""Partners of each digit (§6)."""
SAMPLED_PARTNERS = 10
"""Of them, those in the default test images."""
OVER_PX = 2
"""How far the frame of a digit may leave the canvas: the authors' README shifts by 6 with a border
of 4, and about one digit in a hundred loses some ink."""


@dataclass(frozen=True, repr=False)
class DigitPairs(OfDigits, TrainingSplit):
    """Each of N base digits with some partners of other classes, added and clipped at 255.

    Image k is base digit k mod N with its partner number k div N: a pure function of (seed, k).
    The base has the same shift in all of its images; a partner has its own in each (authors' code).
    The partners of a base are a stretch of a shuffled list of all digits of other classes, which
    begins at a random place: so none comes twice.
    """

    digits = 2

    others_JM: Tensor
    """For each class the digits of all other classes, shuffled; shorter rows end in zeros."""
    others_J: Tensor
    """How many of them there are."""
    partners: int
    key: int
    """Makes the draws of each split its own."""

    def __len__(self) -> int:
        return len(self.labels_N) * self.partners

    @property
    def epoch_images(self) -> int:
        """A pass over the base digits, each with one partner; the next pass has the next one."""
        return len(self.labels_N)

    def training_batch(self, indices_B: Tensor, positions_B: Tensor, seed: int) -> Batch:
        """Images of an epoch; which partner each base has follows from the number of the epoch."""
        epochs_B = positions_B // self.epoch_images
        return self.batch(epochs_B % self.partners * self.epoch_images + indices_B)

    def pairs(self, indices_B: Tensor) -> Tensor:
        """Which two digits (B, T) are in each image."""
        bases_B, numbers_B = self.numbers(indices_B)
        classes_B = self.labels_N[bases_B]
        keys = self.config.split_seed, PARTNER, self.key
        starts_B = batches.random_integers(bases_B, 0, 2**48, *keys)
        places_B = (starts_B + numbers_B) % self.others_J[classes_B]
        return torch.stack([bases_B, self.others_JM[classes_B, places_B]], dim=1)

    def labels(self, indices_B: Tensor) -> Tensor:
        return self.labels_N[self.pairs(indices_B)]

    def offsets(self, indices_B: Tensor) -> Tensor:
        """The row and column (B, T, 2) of the top left corner of each digit's own image."""
        seed, shift_px = self.config.split_seed, self.config.shift_px
        bases_B, _ = self.numbers(indices_B)
        base_B2 = batches.random_offsets(bases_B, shift_px, seed, SHIFT, self.key, 0)
        partner_B2 = batches.random_offsets(indices_B, shift_px, seed, SHIFT, self.key, 1)
        border_px = (self.config.image_px - self.digits_NCHW.shape[-1]) // 2
        return border_px + torch.stack([base_B2, partner_B2], dim=1)

    def batch(self, indices_B: Tensor) -> Batch:
        pairs_BT = self.pairs(indices_B)
        digits = self.digits_NCHW[pairs_BT.flatten()]
        placed = batches.place(digits, self.offsets(indices_B).flatten(0, 1), self.config.image_px)
        digits_BTCHW = placed.unflatten(0, pairs_BT.shape)
        images_BCHW = digits_BTCHW.short().sum(1).clamp(max=255)
        targets_BTCHW = batches.to_pixels(digits_BTCHW).contiguous()
        return Batch(batches.to_pixels(images_BCHW), self.labels_N[pairs_BT], targets_BTCHW)

    def frame_overlap(self, indices_B: Tensor) -> Tensor:
        """Share (B,) of a digit's own image frame (28×28) that the other one's covers.

        §6 reports 80 % on average, which is what shifts of up to 4 px make of these frames.
        """
        side = self.digits_NCHW.shape[-1]
        apart_B2 = self.offsets(indices_B).diff(dim=1).squeeze(1).abs()
        return ((side - apart_B2).clamp(min=0) / side).prod(1)


def ink_overlap(targets_BTCHW: Tensor) -> Tensor:
    """Intersection (B,) of the bounding boxes of two digits' ink, divided by the smaller box."""
    ink_BTHW = targets_BTCHW.amax(2) > 0
    intersection_B = torch.ones(len(ink_BTHW), device=ink_BTHW.device)
    areas_BT = torch.ones(ink_BTHW.shape[:2], device=ink_BTHW.device)
    for axis in (3, 2):
        lines = ink_BTHW.any(axis)  # rows, then columns, that have ink
        first_BT = lines.int().argmax(2)
        last_BT = lines.shape[2] - lines.flip(2).int().argmax(2)
        common_B = (last_BT.amin(1) - first_BT.amax(1)).clamp(min=0)
        intersection_B = intersection_B * common_B
        areas_BT = areas_BT * (last_BT - first_BT)
    return intersection_B / areas_BT.amin(1)


def make(raw: RawData, config: DatasetConfig, device: torch.device) -> Dataset:
    """Pairs within the training, the validation and the test digits.

    Raises UserError for a shift that would push digits off the canvas, or where the digits are too
    few to have partners.
    """
    splits.refuse_changes(config)
    splits.check_shift(config, raw.train.images_NCHW.shape[-1], OVER_PX)
    train, validation, test = splits.parts(raw, config, device)
    sampled = SAMPLED_PARTNERS if config.test == "sample" else PARTNERS
    pairs = (
        digit_pairs(train, config, PARTNERS, 0),
        digit_pairs(validation, config, sampled, 1),
        digit_pairs(test, config, sampled, 2),
    )
    return Dataset(config.name, class_names(config), *pairs, raw.sources)


def digit_pairs(part: Part, config: DatasetConfig, partners: int, key: int) -> DigitPairs:
    """Pair the digits of one part of a data set."""
    device, labels_N = part.labels_N.device, part.labels_N
    counters = torch.arange(len(labels_N), device=device)
    drawn = batches.random_bits(counters, config.split_seed, PARTNER, key, 1)
    shuffled = drawn.argsort(stable=True)
    rows = [shuffled[labels_N[shuffled] != label] for label in range(config.classes)]
    others_J = torch.tensor([len(row) for row in rows], device=device)
    others_JM = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    if len(labels_N) and not int(others_J.min()):
        raise UserError(f"{config.name}: all digits are of one class, so none has a partner")
    # A base has at most as many partners as there are digits of other classes.
    partners = min(partners, int(others_J.min())) if len(labels_N) else partners
    return DigitPairs(part.images_NCHW, labels_N, config, others_JM, others_J, partners, key)
