"""The table of data sets, and what is to be known of each before its files are read."""

from dataclasses import dataclass

from capsrun.data_config import DatasetConfig, OwnDataConfig
from capsrun.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Entry:
    """What is to be known of a data set before its files are read."""

    read: str | None
    """What makes a `RawData` of its files and the settings, as `file.function` of this folder;
    None: it is made of the images of `dataset.source`."""
    make: str = "splits.stored_dataset"
    """What makes a `Dataset` of a `RawData`, the settings and a device."""
    is_source: bool = False
    """Whether other data sets may be made of it."""
    digits: int = 1
    """In each image."""
    sampled: bool = False
    """Whether `dataset.test` chooses between some of the test images and all of them."""
    for_testing: bool = False
    """Whether there are test images only."""
    classes: str = "0 1 2 3 4 5 6 7 8 9"
    """Their names, between blanks."""
    picked_from: str | None = None
    """The data set of whose training images it consists; split_seed picks those for testing."""
    images: tuple[int, int] | None = None
    """How many training and test images there are; None: as many as its source has."""
    copies: int = 1
    """How many test images are made of each of the source's; of a sampled data set, by default."""
    photos: bool = False
    """Whether these are photographs as they are, and not light ink, or clothes, on black."""
    reader: str | None = None
    """The file of this folder that reads images of one's own, whose settings are an
    `OwnDataConfig`; see `own_data.py`. None: they are nobody's own."""
    digit_px: int | None = None
    """The longest side of MNIST's digits; None: images that were made in another way."""


CLOTHES = "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot"
SYLLABLES = "o ki su tsu na ha ma ya re wo"
PHOTOS = "airplane automobile bird cat deer dog frog horse ship truck"
TOYS = "animal human airplane truck car"

DATASETS = {
    "mnist": Entry("official.mnist", is_source=True, images=(60_000, 10_000), digit_px=20),
    "mnist5k": Entry(
        "official.mnist5k", is_source=True, picked_from="mnist", images=(4000, 1000), digit_px=20
    ),
    "mnist1k": Entry("packaged.mnist1k", for_testing=True, images=(0, 1000), digit_px=20),
    "fashion_mnist": Entry(
        "official.mnist", is_source=True, images=(60_000, 10_000), classes=CLOTHES
    ),
    "kmnist": Entry("official.mnist", is_source=True, images=(60_000, 10_000), classes=SYLLABLES),
    "mnist_padded": Entry(None, "padded.make", sampled=True),
    "affnist": Entry("affnist.load", for_testing=True, images=(0, 320_000)),
    "affnist_like": Entry(None, "affnist_like.make", for_testing=True, copies=32),
    "multimnist": Entry(None, "multimnist.make", digits=2, sampled=True, copies=10),
    "cifar10": Entry("official.cifar10", images=(50_000, 10_000), photos=True, classes=PHOTOS),
    "svhn": Entry("official.svhn", images=(73_257, 26_032), photos=True),
    "smallnorb": Entry("smallnorb.load", images=(24_300, 24_300), photos=True, classes=TOYS),
    "folder": Entry("own_data.load", reader="own_folder"),
    "idx": Entry("own_data.load", reader="own_idx"),
    "table": Entry("own_data.load", reader="own_table"),
}


def known(name: str) -> Entry:
    """The entry of a data set. Raises UserError when there is none of this name."""
    if name not in DATASETS:
        hint = did_you_mean(name, DATASETS)
        raise UserError(f"there is no data set {name!r}{hint}; there are {', '.join(DATASETS)}")
    return DATASETS[name]


def class_names(config: DatasetConfig) -> tuple[str, ...]:
    """What the classes of a data set are called, in the order of their numbers."""
    if isinstance(config, OwnDataConfig):
        return tuple(config.class_names)
    return tuple(known(config.source or config.name).classes.split())


def made_of(config: DatasetConfig) -> tuple[bool, int | None]:
    """Whether images are of light ink, or clothes, on black, and no photographs; and of MNIST's
    digits, or what is made as these, the longest side in pixels, else None.
    """
    if isinstance(config, OwnDataConfig):  # MNIST's are 20 of 28 pixels long
        drawn = config.drawn and config.channels == 1
        return drawn, round(config.image_px * 20 / 28) if drawn else None
    kind = known(config.source or config.name)
    return not kind.photos and config.channels == 1, kind.digit_px
