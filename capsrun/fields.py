"""What is said of a setting in `config.py`: its kind, and what it may be."""

import dataclasses
import math
from typing import Any, get_args, get_origin

# How the limits of a number are said, and whether a value keeps them.
LIMITS = {
    "minimum": ("at least", lambda value, limit: value >= limit),
    "above": ("above", lambda value, limit: value > limit),
    "maximum": ("at most", lambda value, limit: value <= limit),
    "below": ("below", lambda value, limit: value < limit),
}


def setting(
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
    path: bool | None = None,
    raw: bool | None = None,
    default: Any = dataclasses.MISSING,
) -> Any:
    """A dataclass field with the values that it may take: bounds or choices.

    `above` and `below` are exclusive. For a list the bounds hold for each element. path: it is one
    of a file or a folder, in which `~` is the user's own. raw: it need not be text, as names of
    files need not. default: what it was before there was this setting, for what was stored then.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    limits = {**bounds, "choices": choices, "path": path, "raw": raw}
    metadata = {key: value for key, value in limits.items() if value is not None}
    return dataclasses.field(metadata=metadata, default=default)


def allowed_values(schema: type, key: str) -> list[str]:
    """What a setting (its name with dots) may be, as it is written; empty where that is endless."""
    found: dict[str, None] = {}
    for field in _fields(schema, key):
        flag = ("true", "false") if bool in _types(field) else ()
        found |= dict.fromkeys(flag or field.metadata.get("choices", ()))
    return list(found)


def limits_of(schema: type, key: str) -> str:
    """What a setting (its name with dots) may be, in a few words; empty for none of this schema."""
    if allowed := allowed_values(schema, key):
        return " | ".join(allowed)
    field = next(iter(_fields(schema, key)), None)
    if field is None or any(map(dataclasses.is_dataclass, _types(field))):
        return ""
    if str in _types(field):
        return "path" if "path" in field.metadata else "text"
    what = "number" if float in _types(field) else "whole number"
    # The largest number that a computer has is no news.
    kept = [name for name in LIMITS if abs(field.metadata.get(name, math.inf)) < 2**62]
    limits = ", ".join(f"{LIMITS[name][0]} {field.metadata[name]:,}" for name in kept)
    return f"{what} {limits}".rstrip()


def is_text(schema: type, key: str) -> bool:
    """Whether a setting (its name with dots) is free text: a name or a path, or several of them."""
    return any(str in _types(f) and "choices" not in f.metadata for f in _fields(schema, key))


def takes_list(schema: type, key: str) -> bool:
    """Whether a setting (its name with dots) is a list."""
    return any(get_origin(field.type) is list for field in _fields(schema, key))


def _fields(schema: type, key: str) -> list[dataclasses.Field[Any]]:
    """The field of a setting (its name with dots) in every kind of model, loss, … that has it."""
    kinds = [schema]
    *sections, name = key.split(".")
    for section in sections:
        nested = [
            part for kind in kinds for field in _named(kind, section) for part in _types(field)
        ]
        parts = [p for p in nested if isinstance(p, type) and dataclasses.is_dataclass(p)]
        # A model or a loss is of one of several kinds.
        kinds = [kind for part in parts for kind in (part, *part.__subclasses__())]
    return [field for kind in kinds for field in _named(kind, name)]


def _named(schema: type, name: str) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(schema) if field.name == name]


def _types(field: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """The types that a field may have: one, those of a union, or those of a list's elements."""
    return get_args(field.type) or (field.type,)
