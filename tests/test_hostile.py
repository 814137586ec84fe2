"""Files of other people: whatever is in them, reading them ends in a result or in a sentence."""

import contextlib
import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import savemat

from capsrun import disk
from capsrun.data import affnist, official, smallnorb
from capsrun.data.files import unpacked
from capsrun.errors import UserError
from capsrun.runs.checkpoint import FORMAT, read_checkpoint

NAME = "some file"
PATH = Path(NAME)


def mat(**values):
    stream = io.BytesIO()
    savemat(stream, values)
    return stream.getvalue()


def torch_bytes():
    stream = io.BytesIO()
    values = {"format": FORMAT, "config": {}, "step": 3, "model": {"weight": torch.ones(2)}}
    torch.save(values | {"optimizer": None, "train_seconds": 1.5}, stream)
    return stream.getvalue()


IMAGES = np.full((affnist.SIDE_PX**2, 2), 200, np.uint8)
AFFNIST = mat(affNISTdata={"image": IMAGES, "label_int": np.array([[1, 7]], np.uint8)})
SVHN = mat(X=np.ones((32, 32, 3, 2), np.uint8), y=np.array([[10], [3]], np.uint8))
IDX = struct.pack(">4B3I", 0, 0, 8, 3, 2, 3, 3) + bytes(18)
NORB = struct.pack("<II3I", smallnorb.BYTES, 3, 2, 3, 3) + bytes(18)
CIFAR = bytes(2 * 3073)


def from_file(read):
    """A reader of files as one of bytes, which are written to a file in the working folder."""

    def reader(content):
        PATH.write_bytes(content)
        return read(PATH)

    return reader


READERS = {
    "idx": (lambda content: official.parse_idx(content, 3, PATH), IDX),
    "gzip": (lambda content: unpacked(Path("file.gz"), content), gzip.compress(IDX)),
    "cifar10": (lambda content: official.parse_cifar(content, NAME), CIFAR),
    "svhn": (lambda content: official.parse_svhn(content, PATH), SVHN),
    "affnist": (lambda content: affnist.read_images(content, NAME), AFFNIST),
    "smallnorb": (lambda content: smallnorb.parse(content, smallnorb.BYTES, NAME), NORB),
    "json": (from_file(disk.read_json), b'{"errors": [1, 2.5e3, null], "name": "\xc3\xa9"}'),
    "yaml": (from_file(disk.read_yaml), b"a: {b: [1, 2.5, x]}\nc: &d [2001-01-01]\n"),
    "checkpoint": (from_file(read_checkpoint), torch_bytes()),
}


def mutations(content):
    """The content with some bytes changed, cut short or lengthened, or other bytes altogether."""
    places = st.integers(0, len(content) - 1)
    changes = st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)

    def changed(edits, length, end):
        mutable = bytearray(content)
        for place, byte in edits:
            mutable[place] = byte
        return bytes(mutable[:length]) + end

    # The beginning of a file, where its sizes and types are, is changed more often.
    near = st.lists(st.tuples(st.integers(0, min(300, len(content) - 1)), st.integers(0, 255)))
    lengths = st.just(len(content)) | places
    return st.binary(max_size=300) | st.builds(
        changed, changes | near, lengths, st.just(b"") | st.binary(max_size=9)
    )


@pytest.mark.parametrize("name", READERS)
def test_hostile_bytes_end_in_a_result_or_a_sentence(name, in_tmp, monkeypatch):
    monkeypatch.setattr(official, "CIFAR_RECORDS", 2)
    reader, good = READERS[name]
    reader(good)

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations(good))
    def check(content):
        with contextlib.suppress(UserError, ValueError, OSError):
            reader(content)

    check()
