"""Looks into the file of a checkpoint before PyTorch reads it.

PyTorch runs nothing of such a file, but believes it: what is compressed may unpack to any size, and
some of what it makes takes memory that the file only claims. A checkpoint of capsrun needs none of
that: it is a zip archive, not compressed, whose pickle names a few kinds of tensors.
"""

import collections
import io
import os
import pickle
import pickletools
import stat
import zipfile
from pathlib import Path
from typing import Any

import torch

from capsrun.reading import check_plain

MOST_PICKLE_BYTES = 1_000_000
OPERATIONS = (
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2"),
    *("LONG1", "BINFLOAT", "BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "BINPUT"),
    *("LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID"),
)
STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Byte", "Bool")
MOST_VALUES = 100_000


def check_archive(path: Path) -> None:
    """Raise an exception, OSError where it cannot be read, for a file of other parts than ours."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no regular file")
        if stream.read(4) != b"PK\x03\x04":  # PyTorch would read it in another way
            raise ValueError("no zip archive")
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
            names = {member.filename for member in members}
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("compressed")
            if sum(member.file_size for member in members) > status.st_size:
                raise ValueError("its parts overlap")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if len(names) != len(members) or len(pickles) != 1:
                raise ValueError("parts of the same name")
            if pickles[0].file_size > MOST_PICKLE_BYTES:
                raise ValueError("too many values")
            content = archive.read(pickles[0])
    check_pickle(content)


def check_pickle(content: bytes) -> None:
    """Raise an exception for a pickle of anything but plain values and dense tensors.

    Nothing is run and no tensor is made.
    """
    for operation, _, _ in pickletools.genops(content):
        if operation.name not in OPERATIONS:
            raise ValueError(f"a pickle with {operation.name}")
    _Checker(io.BytesIO(content)).load()


class _Checker(pickle._Unpickler):
    """Goes through a pickle with nothing in the places of tensors.

    The one that is written in C would reserve memory that the pickle asks for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return _ordered
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _no_tensor
        if module == "torch" and name.removesuffix("Storage") in STORAGES:
            return None
        raise ValueError(f"a pickle with {module}.{name}")

    def persistent_load(self, pid: Any) -> None:
        """A storage."""

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # Tuples of tuples of tuples can take for ever to hash.
        if not isinstance(key, str | int) or not isinstance(self.stack[-1], dict):  # type: ignore
            raise ValueError("a key that is neither a name nor a number")
        self.stack[-1][key] = value  # type: ignore[attr-defined]

    dispatch = pickle._Unpickler.dispatch | {  # type: ignore[assignment]
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
    }


def _ordered() -> dict[Any, Any]:
    """It may not be made of another one: copies of copies can take for ever."""
    return collections.OrderedDict()


def _no_tensor(*arguments: Any) -> None:
    pass


def check_values(checkpoint: Any, file_bytes: int) -> None:
    """Raise ValueError unless the values are plain or tensors that the file really holds.

    A tensor can claim more numbers than it has, by using each again and again.
    """
    left = file_bytes

    def check_tensor(value: Any) -> None:
        nonlocal left
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"a {type(value).__name__} that is no dense tensor")
        left -= value.numel() * value.element_size()
        if left < 0:
            raise ValueError("tensors that are larger than their file")

    check_plain(checkpoint, MOST_VALUES, check_tensor)
