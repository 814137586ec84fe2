"""The digits that come with capsrun: for a look without a download."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from capsrun.data import files
from capsrun.data.files import Part, RawData
from capsrun.data_config import DatasetConfig

CLASSES, OF_EACH, SIDE_PX = 10, 100, 28
# A row of digits for each class.
FILE = Path(__file__).parent.parent / "weights" / "mnist1k.png"
MD5 = "2e3a1de28eecffc2429ba7648b74b334"


def mnist1k(config: DatasetConfig) -> RawData:
    """The first 100 test digits of each class of MNIST, one class after the other in turn.

    Raises UserError when the installation is damaged.
    """
    with files.parsing(FILE):
        rows_HW = torch.from_numpy(np.array(Image.open(FILE)))
    grid = rows_HW.reshape(CLASSES, SIDE_PX, OF_EACH, SIDE_PX).permute(2, 0, 1, 3)
    images_NCHW = grid.reshape(-1, 1, SIDE_PX, SIDE_PX).contiguous()
    labels_N = torch.arange(CLASSES).repeat(OF_EACH)
    source = files.verify(FILE, images_NCHW.numpy().tobytes(), MD5)
    nothing = Part(images_NCHW[:0], labels_N[:0])
    return RawData(nothing, Part(images_NCHW, labels_N), (source,))
