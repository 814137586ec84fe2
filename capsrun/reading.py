"""Reads what somebody else may have written: regular files only, and no more than is believable.

Nothing here imports PyTorch. Whatever is wrong with a file is an OSError or a ValueError, whose
message is the end of a sentence that begins with the file's name.
"""

import json
import os
import stat
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any, Protocol

from capsrun.terminal import size

# The largest that capsrun writes is the metrics.jsonl of a long run, with a few MB.
MOST_TEXT_BYTES = 50_000_000
MOST_YAML_BYTES = 100_000
MOST_VALUES, MOST_DEPTH = 1_000_000, 30
# With so many a file can stand for a thousand times what it holds, not for a billion times.
MOST_ALIASES = 20
CHUNK_BYTES = 1 << 20


def read_bytes(path: Path, most_bytes: int) -> bytes:
    """The content of a file.

    Raises OSError for one that cannot be opened, and ValueError for what is no regular file (a
    device or a pipe may have no end) or is larger than `most_bytes`.
    """
    # A pipe would else be waited for until somebody writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is no regular file")
        if status.st_size > most_bytes:
            raise ValueError(f"holds more than {size(most_bytes)}")
        return stream.read(status.st_size)


class Stream(Protocol):
    """What bytes come out of."""

    def read(self, size: int, /) -> bytes: ...


def read_at_most(stream: Stream, most_bytes: int) -> bytes:
    """All that an unpacked stream gives, piece by piece. Raises ValueError where it is too much.

    What a header claims is not asked.
    """
    content = bytearray()
    while piece := stream.read(CHUNK_BYTES):
        content += piece
        if len(content) > most_bytes:
            raise ValueError(f"holds more than {size(most_bytes)}")
    return bytes(content)


def read_text(path: Path) -> str:
    """A text file in UTF-8. Raises as `read_bytes` does."""
    return read_bytes(path, MOST_TEXT_BYTES).decode()


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_text(path))


def parse_json(text: str) -> Any:
    """What a JSON text holds. Raises ValueError where it is none or is not `check_plain`."""
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    check_plain(values)
    return values


def read_yaml(path: Path) -> Any:
    """What a YAML file holds, as plain values.

    Raises OSError or ValueError for one that cannot be read, with aliases (a few lines of them
    stand for billions of values) or tags of Python objects, and as `check_plain` does.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    text = read_bytes(path, MOST_YAML_BYTES).decode()
    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        values = OmegaConf.to_container(OmegaConf.create(text))
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"is no YAML file of settings: {error}") from error
    check_plain(values)
    return values


def check_own_yaml(path: Path) -> None:
    """Look at a YAML file that somebody gives to Hydra, which would believe it.

    Raises OSError or ValueError for one that cannot be read, that has so many aliases that a few
    lines may stand for billions of values, or that names a function for Hydra to call.
    """
    import yaml

    try:
        text = read_bytes(path, MOST_YAML_BYTES).decode()
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), MOST_ALIASES, ("_target_",))
    except yaml.YAMLError as error:
        raise ValueError(f"is no YAML: {' '.join(str(error).split())}") from error


def _check_events(
    events: Iterable[Any], most_aliases: int = 0, refused_words: Container[str] = ()
) -> None:
    """Look at YAML before anything is made of it."""
    import yaml

    depth = aliases = 0
    for event in events:
        aliases += isinstance(event, yaml.AliasEvent)
        if aliases > most_aliases:
            raise ValueError("has too many aliases" if most_aliases else "has aliases")
        if isinstance(event, yaml.ScalarEvent) and event.value in refused_words:
            raise ValueError(f"has {event.value}, which could run any program; take it out")
        if "python" in (getattr(event, "tag", None) or ""):
            raise ValueError("has tags of Python objects")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ValueError("is nested too deeply")


def _not_plain(value: Any) -> None:
    raise ValueError(f"holds a {type(value).__name__}")


def check_plain(
    value: Any, most_values: int = MOST_VALUES, check_other: Callable[[Any], None] = _not_plain
) -> None:
    """Raise ValueError unless a value is made of plain ones, not too many and not too deep.

    Plain are None, bool, int of 64 bits, float, text that can be written, and lists and
    dictionaries of them. What is in two places counts twice.
    check_other: raises ValueError for values of other types that are not allowed.
    """
    pending = [(value, 0)]
    count = 0
    while pending:
        value, depth = pending.pop()
        count += 1
        if isinstance(value, dict | list | tuple):
            if depth >= MOST_DEPTH:
                raise ValueError("is nested too deeply")
            if count + len(pending) + 2 * len(value) > most_values:
                raise ValueError(f"holds more than {most_values:,} values")
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            pending += [(part, depth + 1) for part in parts]
        elif isinstance(value, str):
            value.encode()  # half a character, as "\ud800" in JSON, cannot be
        elif isinstance(value, int):
            if not -(2**63) <= value < 2**63:
                raise ValueError("holds a number of more than 64 bits")
        elif value is not None and not isinstance(value, float):
            check_other(value)
