"""The numbers in a MATLAB 5 file: arrays, and structs of arrays.

A reader of our own, of the little that the data sets need: it takes from a file no more memory than
`MOST_BYTES`, whatever its headers claim, and makes nothing but arrays of numbers.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

MOST_BYTES = 1_000_000_000
"""Most that a file may hold, unpacked; affNIST's test set, the largest, has about 600 MB."""
MATRIX, COMPRESSED = 14, 15
STRUCT = 2
HEADER_BYTES = 128
# How numbers are stored, and which class they have in MATLAB, which may store them smaller.
STORED = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8"}
CLASSES[15] = "u8"
# More fields or dimensions than these has no file that is read here.
MOST_FIELDS, MOST_DIMENSIONS = 100, 8


class Array(NamedTuple):
    """Numbers as they are in a file, not copied."""

    numbers: np.ndarray
    """In the type in which they are stored."""
    kind: np.dtype
    """Their type in MATLAB."""


def read(content: bytes) -> dict[str, Any]:
    """The variables by name: an `Array`, a dict of them for a struct; others are left out.

    Raises ValueError for a file that is damaged, cut short, of another version or too large.
    """
    if content[124:128] not in (b"\0\1IM", b"\1\0MI"):
        raise ValueError("it does not begin as MATLAB 5 files do (versions 5 to 7, not 7.3)")
    order = "<" if content[126:128] == b"IM" else ">"
    variables, left = {}, MOST_BYTES
    try:
        for kind, data in _elements(memoryview(content)[HEADER_BYTES:], order):
            if kind == COMPRESSED:
                data = _inflated(data, left)
                left -= len(data)
                kind, data = next(_elements(data, order))
            if kind == MATRIX:
                name, value = _matrix(data, order, inside=False)
                if value is not None:
                    variables[name] = value
    except (struct.error, zlib.error, StopIteration) as error:
        raise ValueError(f"it is cut short or damaged: {error}") from error
    return variables


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each element: eight bytes that tell both, then the content."""
    while len(data):
        kind, size = struct.unpack_from(order + "II", data)
        start = 8
        if kind >> 16:  # up to four bytes are put into the second half of the tag
            kind, size, start = kind & 0xFFFF, kind >> 16, 4
            if size > 4:
                raise ValueError("it is damaged: a short element is too long")
        if len(data) < start + size:
            raise ValueError(f"it is cut short: {size:,} bytes are promised, {len(data):,} left")
        yield kind, data[start : start + size]
        padded = size if kind == COMPRESSED else -(-size // 8) * 8
        data = data[8 if start == 4 else start + padded :]


def _inflated(data: memoryview, most_bytes: int) -> memoryview:
    unpacker = zlib.decompressobj()
    content = unpacker.decompress(data, most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"it holds more than {MOST_BYTES:,} bytes")
    if not unpacker.eof:
        raise ValueError("it is cut short")
    return memoryview(content)


def _matrix(data: memoryview, order: str, inside: bool) -> tuple[str, Any]:
    """Name and value of a matrix; the value is None where it is neither of numbers nor a struct.

    inside: whether it is a field of a struct.
    """
    parts = _elements(data, order)
    flags, sizes, name = next(parts)[1], next(parts)[1], next(parts)[1]
    kind = struct.unpack_from(order + "I", flags)[0]
    is_complex, kind = kind & 0x800, kind & 0xFF
    title = bytes(name).decode("latin-1")
    shape = np.frombuffer(sizes, order + "i4").tolist()
    if not 1 <= len(shape) <= MOST_DIMENSIONS or min(shape) < 0:
        raise ValueError(f"it is damaged: an array of {shape}")
    if kind in CLASSES and not is_complex:
        stored, numbers = next(parts)
        if stored not in STORED:
            raise ValueError(f"it is damaged: numbers of type {stored}")
        array = np.frombuffer(numbers, order + STORED[stored])
        return title, Array(array.reshape(shape, order="F"), np.dtype(CLASSES[kind]))
    if kind == STRUCT and not inside and all(side == 1 for side in shape):
        length = struct.unpack_from(order + "i", next(parts)[1])[0]
        names = bytes(next(parts)[1])
        if length < 1 or len(names) > MOST_FIELDS * length:
            raise ValueError("it is damaged: the names of a struct's fields")
        fields = {}
        for start in range(0, len(names), length):
            field = names[start : start + length].split(b"\0")[0].decode("latin-1")
            fields[field] = _matrix(next(parts)[1], order, inside=True)[1]
        return title, {field: value for field, value in fields.items() if value is not None}
    return title, None
