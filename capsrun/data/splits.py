"""What the commands take images from: the splits of a data set, found or made by index.

Shapes: N images, B batch, T digits in one image, C channels, H and W pixels.
"""

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import data

from capsrun.data import batches
from capsrun.data.augment import augment, check_augment
from capsrun.data.batches import Batch
from capsrun.data.files import Part, RawData, Source
from capsrun.data.sets import class_names
from capsrun.data_config import DatasetConfig
from capsrun.errors import UserError

SPLITS = "train", "validation", "test"


class Split(data.Dataset[tuple[Tensor, int | Tensor]], ABC):
    """Some images and what they show, N of them stored.

    By number it gives one image and its label, as a `torch.utils.data.DataLoader` takes them;
    `batch` makes many at once, on the device.

    >>> import capsrun
    >>> test = capsrun.load_dataset("mnist5k").test
    >>> image, label = test[0]
    >>> image.shape, label == int(test.labels_N[0])
    (torch.Size([1, 28, 28]), True)
    """

    labels_N: Tensor
    """int64 class numbers of what is stored."""
    config: DatasetConfig
    digits = 1
    """How many digits one image shows."""

    def __len__(self) -> int:
        """How many images there are: as many as are stored, if each is one of them."""
        return len(self.labels_N)

    def labels(self, indices_B: Tensor) -> Tensor:
        """The classes (B, T) that some images show, int64."""
        return self.labels_N[indices_B][:, None]

    @abstractmethod
    def batch(self, indices_B: Tensor) -> Batch:
        """Some images as they are tested, not changed at random."""

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        """Image number `index`, negative from the end, as it is tested: not moved or lit at random.

        Returns it (C, H, W), with pixels in [0, 1] unless the data set says `standardise`, and its
        class; the classes (T,) where it shows several digits.
        Raises IndexError beyond the last one, and TypeError for what is no number.
        """
        try:
            number = operator.index(index)
        except TypeError:
            many = "many are split.batch(indices), or torch.utils.data.Subset(split, indices)"
            raise TypeError(f"an image is taken by its number, not {index!r}; {many}") from None
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no image {number} among {len(self)}")
        batch = self.batch(torch.tensor([number % len(self)], device=self.device))
        labels_T = batch.labels_BT[0]
        return batch.images_BCHW[0], int(labels_T) if self.digits == 1 else labels_T

    def __repr__(self) -> str:
        size = f"{self.config.channels}×{self.config.image_px}×{self.config.image_px}"
        return f"{type(self).__name__}({len(self):,} images of {size}, {self.config.name})"

    @property
    def device(self) -> torch.device:
        """Where batches are made."""
        return self.labels_N.device

    def indices(self, start: int, stop: int) -> Tensor:
        """The numbers of the images from `start` to before `stop`, on the device."""
        return torch.arange(start, min(stop, len(self)), device=self.device)


class TrainingSplit(Split):
    """Images that a run can be trained on, too."""

    @property
    def epoch_images(self) -> int:
        """How many images a pass of training makes."""
        return len(self)

    @abstractmethod
    def training_batch(self, indices_B: Tensor, positions_B: Tensor, seed: int) -> Batch:
        """Some images of an epoch, changed at random as they are in training.

        positions_B: how many images the run had seen before each; with `seed` they decide.
        """


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of a training run: in random order, changed at random as the images allow."""

    images: TrainingSplit
    seed: int
    batch_size: int
    share: slice = field(default_factory=lambda: slice(None))
    """Which images of a batch are made here, the others being made by other processes."""
    order: str = "uniform"
    """`authors`: each image at each shift, as a queue gives them; see `queue_order`."""

    def __post_init__(self) -> None:
        """Raises UserError for an order that these images cannot have."""
        if self.order == "authors" and (self.stored is None or varies(self.stored.config)):
            raise UserError(
                "recipe.order=authors needs single images that are moved by every shift in turn, "
                "and not changed otherwise, which these are not; leave it out"
            )

    @property
    def stored(self) -> "StoredImages | None":
        """The images where they come record by record, else nothing."""
        if self.order == "authors" and isinstance(self.images, StoredImages):
            return self.images
        return None

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0; here only its share."""
        indices_B, positions_B = self.draw(step)
        return self.assemble(indices_B[self.share], positions_B[self.share])

    def draw(self, step: int, steps: int = 1) -> tuple[Tensor, Tensor]:
        """Which images, or records, the next `steps` batches hold; see `batch_indices`."""
        count, order = self.images.epoch_images, batches.epoch_order
        if self.stored is not None:
            count, order = self.stored.records, batches.queue_order
        where = self.images.device
        return batches.batch_indices(self.seed, step, self.batch_size, count, where, steps, order)

    def assemble(self, indices_B: Tensor, positions_B: Tensor) -> Batch:
        """Make one batch of what `draw` returned, without any work or waiting on the host."""
        if self.stored is not None:
            batch = self.stored.record_batch(indices_B)
        else:
            batch = self.images.training_batch(indices_B, positions_B, self.seed)
        return batch._replace(noise_B=batches.random_bits(positions_B, self.seed, batches.NOISE))


@dataclass(frozen=True, repr=False)
class StoredImages(TrainingSplit):
    """Images that are kept as they are, and put in the middle of the canvas or cut to it.

    In training each is moved by its own random shift: every one of the (2·shift_px + 1)² shifts is
    equally likely (§5), and what moves in is black. Then it is mirrored and lit as `config` says.
    """

    images_NCHW: Tensor
    """uint8, 0 is black."""
    labels_N: Tensor
    config: DatasetConfig

    def batch(self, indices_B: Tensor) -> Batch:
        pixels_BCHW = self._moved(indices_B, torch.zeros_like(indices_B)[:, None].expand(-1, 2))
        return self._as_batch(pixels_BCHW, indices_B)

    def training_batch(self, indices_B: Tensor, positions_B: Tensor, seed: int) -> Batch:
        moves_B2 = batches.random_offsets(positions_B, self.config.shift_px, seed, batches.SHIFT)
        pixels_BCHW = self._moved(indices_B, moves_B2)
        return self._as_batch(vary(pixels_BCHW, positions_B, seed, self.config), indices_B)

    @property
    def records(self) -> int:
        """How many records the authors' file has of them: each image at each shift."""
        return len(self) * (2 * self.config.shift_px + 1) ** 2

    def record_batch(self, records_B: Tensor) -> Batch:
        """Some records of the authors' file.

        An image's records are its shifts, row by row; the images are in the order of the file.
        """
        shifts = (2 * self.config.shift_px + 1) ** 2
        indices_B = records_B // shifts
        moves_B2 = batches.nth_offset(records_B % shifts, self.config.shift_px)
        return self._as_batch(self._moved(indices_B, moves_B2), indices_B)

    def _moved(self, indices_B: Tensor, moves_B2: Tensor) -> Tensor:
        images_BCHW = self.images_NCHW[indices_B]
        # Of an image in the middle; negative where it is cut.
        border_px = (self.config.image_px - images_BCHW.shape[-1]) // 2
        placed_BCHW = batches.place(images_BCHW, border_px + moves_B2, self.config.image_px)
        return batches.to_pixels(placed_BCHW).contiguous()

    def _as_batch(self, pixels_BCHW: Tensor, indices_B: Tensor) -> Batch:
        targets_BTCHW = pixels_BCHW.clamp(0, 1)[:, None]  # light may have made them brighter
        seen_BCHW = standardise(pixels_BCHW) if self.config.standardise else targets_BTCHW[:, 0]
        return Batch(seen_BCHW, self.labels(indices_B), targets_BTCHW)


def varies(config: DatasetConfig) -> bool:
    """Whether training images are changed at random in more than their place."""
    return bool(config.flip or config.brightness or config.contrast or config.augment)


def vary(pixels_BCHW: Tensor, positions_B: Tensor, seed: int, config: DatasetConfig) -> Tensor:
    """Augment, mirror, light images, and change their contrast, as `config` says.

    The contrast is that about the mean of each channel. Pixels may leave [0, 1].
    """
    if not varies(config):
        return pixels_BCHW
    if config.augment is not None:
        pixels_BCHW = augment(pixels_BCHW, positions_B, seed)
    counters_B3 = positions_B[:, None] * 3 + torch.arange(3, device=positions_B.device)
    draws_B3111 = batches.random_unit(counters_B3, seed, batches.LIGHT)[..., None, None, None]
    mirrored_B, lighter_B, contrast_B = draws_B3111.unbind(1)
    if config.flip:
        pixels_BCHW = torch.where(mirrored_B < 0.5, pixels_BCHW.flip(3), pixels_BCHW)
    if config.brightness:
        pixels_BCHW = pixels_BCHW + config.brightness * (2 * lighter_B - 1)
    if config.contrast:
        mean_BC11 = pixels_BCHW.mean((2, 3), keepdim=True)
        factor_B111 = 1 + config.contrast * (2 * contrast_B - 1)
        pixels_BCHW = mean_BC11 + factor_B111 * (pixels_BCHW - mean_BC11)
    return pixels_BCHW


def standardise(pixels_BCHW: Tensor) -> Tensor:
    """Give each image mean 0 and standard deviation 1, an image of one grey only mean 0.

    As the authors' code does: the deviation counts as at least 1/√n, n numbers in an image.
    """
    flat_BN = pixels_BCHW.flatten(1)
    least = flat_BN.shape[1] ** -0.5
    deviation_B1 = flat_BN.std(1, unbiased=False, keepdim=True).clamp(min=least)
    return ((flat_BN - flat_BN.mean(1, keepdim=True)) / deviation_B1).reshape(pixels_BCHW.shape)


@dataclass(frozen=True, repr=False)
class OfDigits(Split):
    """Images that are made of N digits: image k, of however many, of digit k mod N."""

    digits_NCHW: Tensor
    """uint8."""
    labels_N: Tensor
    config: DatasetConfig

    def numbers(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Which digit each image is made of, and which of this digit's images it is."""
        return indices_B % len(self.labels_N), indices_B // len(self.labels_N)

    def labels(self, indices_B: Tensor) -> Tensor:
        return self.labels_N[self.numbers(indices_B)[0]][:, None]


@dataclass(frozen=True, repr=False)
class Dataset:
    """A data set on a device, with the validation images taken out of the training images."""

    name: str
    class_names: tuple[str, ...]
    train: TrainingSplit
    """Empty where a data set is for testing only."""
    validation: Split
    """Empty unless the configuration asks for one."""
    test: Split
    sources: tuple[Source, ...]
    """Where it came from, and what vouches for it."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, key)):,} {key}" for key in SPLITS)
        return f"Dataset({self.name}: images {counts}; {len(self.class_names)} classes)"

    @property
    def unverified(self) -> list[str]:
        """The MD5 of each file that nobody vouches for: it may hold anything."""
        return sorted(source.md5 for source in self.sources if not source.verified)

    def split(self, name: str) -> Split:
        """The split called `name`. Raises UserError when it is empty."""
        split: Split = getattr(self, name)
        if not len(split) and not len(self.train):
            raise UserError(f"{self.name} is for testing: it has no {name} split")
        if not len(split):
            raise UserError(
                f"no training images of {self.name} are held out, so there is no {name} split; "
                f"train with dataset.validation={self.train.epoch_images // 6}, and say so here too"
            )
        return split


def parts(raw: RawData, config: DatasetConfig, device: torch.device) -> tuple[Part, Part, Part]:
    """The training, validation and test images, on the device, each in the order of its file.

    Raises UserError when more are to be held out than there are, or for another number of channels.
    """
    images_NCHW, labels_N = raw.train
    if images_NCHW.shape[1] != config.channels:
        raise UserError(
            f"{config.name} has images of {images_NCHW.shape[1]} channel(s), but "
            f"dataset.channels is {config.channels}"
        )
    count = len(labels_N)
    if config.validation and config.validation >= count:
        raise UserError(
            f"dataset.validation is {config.validation}, but {config.name} has only {count} "
            "training images"
        )
    drawn = batches.random_bits(torch.arange(count), config.split_seed, batches.SPLIT)
    order = drawn.argsort()
    kept = count - config.validation
    train, validation = (chosen.sort().values for chosen in (order[:kept], order[kept:]))
    return (
        _on_device(images_NCHW[train], labels_N[train], device),
        _on_device(images_NCHW[validation], labels_N[validation], device),
        _on_device(*raw.test, device),
    )


def _on_device(images_NCHW: Tensor, labels_N: Tensor, device: torch.device) -> Part:
    return Part(images_NCHW.to(device), labels_N.long().to(device))


def stored_dataset(raw: RawData, config: DatasetConfig, device: torch.device) -> Dataset:
    """A data set of images that are kept as they are.

    Raises UserError for settings that do not fit them.
    """
    check_augment(config)
    stored_px = raw.train.images_NCHW.shape[-1]
    # Images as large as the canvas may be moved over its edge (§5), by less than their size.
    check_shift(config, stored_px, stored_px - 1 if config.image_px == stored_px else 0)
    train, validation, test = (StoredImages(*part, config) for part in parts(raw, config, device))
    return Dataset(config.title, class_names(config), train, validation, test, raw.sources)


def check_shift(config: DatasetConfig, stored_px: int, over_px: int = 0) -> None:
    """Refuse a canvas smaller than the digits on it, and shifts that push images off it.

    Photos may be cut to a smaller canvas. over_px: by how much an image may leave the canvas.
    """
    if config.source is not None and config.image_px < stored_px:
        raise UserError(
            f"dataset.image_px is {config.image_px}, but {config.name} is made of images of "
            f"{stored_px} px"
        )
    most_px = abs(config.image_px - stored_px) // 2 + over_px
    if config.shift_px > most_px:
        raise UserError(
            f"dataset.shift_px is {config.shift_px}, but images of {stored_px} px can be moved by "
            f"at most {most_px} px on {config.name}'s canvas of {config.image_px} px"
        )


def refuse_changes(config: DatasetConfig, *unused: str) -> None:
    """Raise UserError for changes of photos, and more settings, without effect on this data set."""
    for key in ("flip", "brightness", "contrast", "augment", "standardise", *unused):
        if getattr(config, key):
            raise UserError(f"dataset.{key} has no effect on {config.name}; leave it out")
