"""SVHN, the cropped digits, from its official MATLAB files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capsrun.config import DatasetConfig
from capsrun.data import matlab
from capsrun.data.download import file_md5, obtain
from capsrun.data.files import RawData, Source, stored_bytes
from capsrun.errors import UserError

URL = "http://ufldl.stanford.edu/housenumbers/"
MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}
INSTEAD = "put train_32x32.mat and test_32x32.mat there"


def load(config: DatasetConfig) -> RawData:
    """Read the files from `data_dir/SVHN`, downloading them if need be.

    Raises UserError when they cannot be had or are damaged.
    """
    folder = Path(config.data_dir).expanduser() / "SVHN"
    arrays: list[Tensor] = []
    sources: list[Source] = []
    for name, md5 in MD5.items():
        path = obtain(URL + name, folder / name, md5, "SVHN", INSTEAD)
        found = file_md5(path)
        if found != md5:
            raise UserError(
                f"{path} is damaged: it does not have the published MD5 checksum; delete it and "
                "run the command again to download it"
            )
        arrays += parse(path)
        sources.append(Source(name, found, verified=True))
    train_images, train_labels, test_images, test_labels = arrays
    return RawData(
        train_images,
        train_labels,
        test_images,
        test_labels,
        tuple("0123456789"),
        tuple(sources),
    )


def parse(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) and labels (N,), uint8, of one file; its class 10 is the digit 0.

    Raises UserError, naming it, when it is damaged or holds something else.
    """
    try:
        values = matlab.read(stored_bytes(path, matlab.MOST_BYTES))
    except ValueError as error:
        raise UserError(f"{path} is damaged or no MATLAB file: {error}") from error
    arrays = (values.get("X"), values.get("y"))
    images, labels = (a.numbers if isinstance(a, matlab.Array) else None for a in arrays)
    if (
        images is None
        or labels is None
        or images.dtype != np.uint8
        or images.shape != (32, 32, 3, labels.size)
    ):
        raise UserError(
            f"{path} is not SVHN: it lacks X of (32, 32, 3, N) bytes and y of N classes"
        )
    if not labels.size or not np.isin(labels, range(1, 11)).all():
        raise UserError(f"{path} holds classes other than 1 to 10, or none")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(3, 2, 0, 1)))
    return pixels, torch.from_numpy((labels.ravel() % 10).astype(np.uint8))
