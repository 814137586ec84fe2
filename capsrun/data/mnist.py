"""MNIST and the two data sets that share its format, downloaded through torchvision."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsrun.config import DatasetConfig
from capsrun.data.files import IdxFile, RawData, fetch, find_idx, read_idx
from capsrun.errors import UserError


@dataclass(frozen=True)
class IdxDataset:
    """What tells one MNIST-like data set from another."""

    title: str
    torchvision_name: str
    """Name of the class in `torchvision.datasets` that downloads it, and of its folder."""
    class_names: tuple[str, ...]
    content_md5: dict[str, str]
    """MD5 of the uncompressed files, where it is published."""


DATASETS = {
    "mnist": IdxDataset(
        "MNIST",
        "MNIST",
        tuple("0123456789"),
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
    "fashion_mnist": IdxDataset(
        "Fashion-MNIST",
        "FashionMNIST",
        (
            "T-shirt",
            "trouser",
            "pullover",
            "dress",
            "coat",
            "sandal",
            "shirt",
            "sneaker",
            "bag",
            "boot",
        ),
        {},
    ),
    "kmnist": IdxDataset(
        "Kuzushiji-MNIST",
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        {},
    ),
}


def load(config: DatasetConfig) -> RawData:
    """Read the data set from `data_dir/<its folder>/raw`, downloading it first if it is not there.

    Raises UserError; see `capsrun.data.files`.
    """
    dataset = DATASETS[config.source or config.name]
    data_dir = Path(config.data_dir).expanduser()
    raw_folder = f"{dataset.torchvision_name}/raw"
    files = _files(dataset)

    def lacking() -> list[IdxFile]:
        return [file for file in files if find_idx(data_dir / raw_folder, file) is None]

    missing = lacking()
    if missing:
        if len(missing) < len(files):
            names = ", ".join(file.name for file in missing)
            print(f"{data_dir / raw_folder} lacks {names}")
        fetch(
            lambda folder: _download(dataset, folder),
            lambda: not lacking(),
            raw_folder,
            data_dir,
            dataset.title,
        )
    arrays, sources = zip(
        *(
            read_idx(data_dir / raw_folder, file, 1 if "labels" in file.name else 3)
            for file in files
        )
    )
    train_images, train_labels, test_images, test_labels = arrays
    for images, labels in ((train_images, train_labels), (test_images, test_labels)):
        _check_pair(images, labels, dataset, data_dir / raw_folder)
    return RawData(
        train_images[:, None],
        train_labels,
        test_images[:, None],
        test_labels,
        dataset.class_names,
        sources,
    )


def _torchvision_class(dataset: IdxDataset) -> Any:
    # Imported late: torchvision takes half a second, and only its checksums and downloads are used.
    from torchvision import datasets

    return getattr(datasets, dataset.torchvision_name)


def _files(dataset: IdxDataset) -> list[IdxFile]:
    """Training images and labels, test images and labels."""
    files = []
    for gzip_name, gzip_md5 in _torchvision_class(dataset).resources:
        name = gzip_name.removesuffix(".gz")
        files.append(IdxFile(name, dataset.content_md5.get(name), gzip_md5))
    return files


def _download(dataset: IdxDataset, folder: Path) -> None:
    from torchvision.datasets import utils

    # torchvision's own bar writes into pipes and files too, where nobody watches it.
    loud = utils.tqdm
    utils.tqdm = functools.partial(loud, disable=None, leave=False, desc=dataset.title)
    try:
        _torchvision_class(dataset)(str(folder), download=True)
    finally:
        utils.tqdm = loud


def _check_pair(images: Any, labels: Any, dataset: IdxDataset, folder: Path) -> None:
    if len(images) != len(labels):
        raise UserError(
            f"{folder} holds {len(images)} images but {len(labels)} labels: the files do not "
            "belong together"
        )
    if int(labels.max()) >= len(dataset.class_names):
        raise UserError(
            f"{folder} holds label {int(labels.max())}; {dataset.title} has only "
            f"{len(dataset.class_names)} classes"
        )
