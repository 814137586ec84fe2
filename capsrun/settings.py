"""Settings as plain data: checked, compared, and what each of them decides."""

import dataclasses
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from capsrun.checks import check_together
from capsrun.data_config import DatasetConfig, OwnDataConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.fields import LIMITS, is_text
from capsrun.model_config import (
    ROUTINGS,
    CapsNetConfig,
    CNNConfig,
    CrossEntropyConfig,
    EfficientCapsNetConfig,
    LogLikelihoodConfig,
    LossConfig,
    MarginLossConfig,
    ModelConfig,
    OtherRoutingConfig,
    SpreadLossConfig,
)

Config = TypeVar("Config")


@dataclass(frozen=True)
class Role:
    """What a setting of a training run decides."""

    result: bool = True
    """What comes out: results that differ in it are never averaged."""
    name: bool = True
    """The name of the run's folder, where it is chosen on the command line."""
    resume: bool = True
    """Whether a run can be resumed: with another value it is another run."""
    length: bool = False
    """How long and how the network is optimised, not which network on which images."""
    test: bool = True
    """Which test images there are."""
    optional: bool = False
    """Whether null says nothing, as results do that were stored before there was this setting."""


_NOTHING = Role(result=False, name=False, resume=False, test=False)
_NO_TEST = Role(test=False)
# The one home of what settings decide: those that are not here decide everything.
ROLES = {
    "name": Role(result=False, name=False),
    "experiment": _NOTHING,
    "sweep": _NOTHING,
    "seed": Role(result=False, name=False),  # results of several seeds are what is averaged
    "runs_dir": _NOTHING,
    "device": _NOTHING,
    "compile": _NOTHING,
    "deterministic": Role(result=False),
    "precision": Role(result=False),  # a result says which one was used
    "record": _NOTHING,
    # Test errors of one run are compared, and so are of the same images.
    "record.evaluate_images": Role(result=False, name=False),
    "dataset.data_dir": _NOTHING,
    "dataset.path": Role(name=False),  # whose last part is the name
    "dataset.trained_on": _NOTHING,
    "dataset.trained_by": _NOTHING,
    "dataset.validation": _NO_TEST,
    "dataset.flip": _NO_TEST,
    "dataset.brightness": _NO_TEST,
    "dataset.contrast": _NO_TEST,
    "dataset.augment": Role(test=False, optional=True),
    "model.name": Role(result=False),
    "recipe": Role(length=True),
    "recipe.order": Role(),
    "recipe.average": Role(result=False),  # tested beside the weights, in which it changes nothing
    "stop.accuracy_percent": Role(length=True),
    "stop.patience": Role(length=True),
    "stop.every_steps": Role(length=True),
}


def role(key: str) -> Role:
    """What a setting (its name with dots) decides."""
    while key:
        if key in ROLES:
            return ROLES[key]
        key = key.rpartition(".")[0]
    return Role()


def deciding(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training run that decide what it computes, but for the seed."""
    deciding = {key: value for key, value in flattened(training) if role(key).result}
    return {k: v for k, v in deciding.items() if not (role(k).optional and v == repr(None))}


def deciding_test(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a data set that decide which test images there are."""
    kept = {key: value for key, value in dataset.items() if role(f"dataset.{key}").test}
    if dataset["source"] is None:  # images that are not made of others are not moved for testing
        del kept["shift_px"]
    return kept


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """`(key with dots, value)` of nested settings; a list counts as one value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            # 0 and 0.0 are the same setting, whichever way a file has it.
            number = isinstance(value, int | float) and not isinstance(value, bool)
            yield prefix + str(key), float(value) if number else repr(value)


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list:
    """List `(key, our value, their value)` where two nested configurations differ."""
    found = []
    for key in sorted({*ours, *theirs}, key=str):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def from_dict(schema: type[Config], values: Any) -> Config:
    """Turn plain nested data (a dict or an OmegaConf node) into `schema`, checked.

    One value stands for a list of one. Raises UserError for a missing or unknown key, a wrong
    type, a value out of range, or settings that contradict each other.
    """
    try:
        if not OmegaConf.is_config(values):  # what is composed is plain already
            _check_stored(values)
        given = OmegaConf.create(values) if isinstance(values, dict) else values
        _refuse_misread(schema, given)
        merged = OmegaConf.merge(_structured(schema, given), _with_lists(schema, given))
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"this is not a configuration: {error}") from error
    check_ranges(config)
    check_together(config)
    _expand_home(config)
    return config


def _expand_home(config: Any) -> None:
    """Put the user's own folder in place of a leading `~` of every path."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _expand_home(value)
        elif field.metadata.get("path") and value is not None:
            several = isinstance(value, list)
            expanded = [os.path.expanduser(path) for path in (value if several else [value])]
            setattr(config, field.name, expanded if several else expanded[0])


def _check_stored(value: Any) -> None:
    """Raise ValueError for values from a file that no run can have stored there."""
    if isinstance(value, str) and "${" in value:  # it could ask for environment variables
        raise ValueError(f"it holds {value!r}, whose value is elsewhere")
    parts = value.values() if isinstance(value, dict) else value
    for part in parts if isinstance(value, dict | list) else ():
        _check_stored(part)


def _structured(schema: type, given: Any) -> Any:
    """An empty `schema` with the kinds of model, routing and loss that the values are about."""
    if schema is DatasetConfig and _has(given, "path"):
        schema = OwnDataConfig
    node = OmegaConf.structured(schema)
    names = {field.name for field in dataclasses.fields(schema)}
    if not isinstance(given, DictConfig):
        return node  # merging will say what is wrong
    if "dataset" in names and _has(given, "dataset.path"):
        node.dataset = OmegaConf.structured(OwnDataConfig)
    if "model" in names:
        node.model = OmegaConf.structured(_model_of(given))
    if "routing" in names and OmegaConf.select(given, "routing") is not None:
        algorithm = OmegaConf.select(given, "routing.algorithm") or "dynamic"
        known = ROUTINGS.get(algorithm)
        node.routing = OmegaConf.structured(known.settings if known else OtherRoutingConfig)
    if "loss" in names:
        node.loss = OmegaConf.structured(_loss_of(given))
    return node


def _model_of(given: Any) -> type[ModelConfig]:
    """Which kind of network the values are about, likewise."""
    if OmegaConf.select(given, "model.strides") is not None:
        return EfficientCapsNetConfig
    is_cnn = OmegaConf.select(given, "model.kernels_px") is not None
    return CNNConfig if is_cnn else CapsNetConfig


def _loss_of(given: Any) -> type[LossConfig]:
    """Which kind of loss the values are about: each has settings that the others have not."""
    loss = OmegaConf.select(given, "loss")
    keys = {*loss} if isinstance(loss, DictConfig) else set()
    if "activation" in keys:
        return CrossEntropyConfig
    if "margin_first" in keys:
        return SpreadLossConfig
    return LogLikelihoodConfig if keys == {"name", "reconstruction_weight"} else MarginLossConfig


def _has(given: Any, key: str) -> bool:
    """Whether some values have a setting (its name with dots), with a value or without."""
    section, _, name = key.rpartition(".")
    values = OmegaConf.select(given, section) if section else given
    return isinstance(values, DictConfig) and name in values.keys()  # noqa: SIM118


def _with_lists(schema: type, given: Any) -> Any:
    """The values with a list of one in place of each single value where a list belongs."""
    if not isinstance(given, DictConfig):
        return given
    given = given.copy()
    for name, kind in get_type_hints(schema).items():
        value = OmegaConf.select(given, name)
        if get_origin(kind) is list and isinstance(value, str | int | float):
            given[name] = [value]
        for part in (kind, *get_args(kind)) if isinstance(value, DictConfig) else ():
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                given[name] = _with_lists(part, value)
    return given


def _refuse_misread(schema: type, given: Any, prefix: str = "") -> None:
    """Raise UserError for a name or a path in a file that YAML has read as something else.

    12e4567 would become inf, 1.10 the same as 1.1, and 0012 the same as 10.
    """
    for name, kind in get_type_hints(schema).items():
        value = OmegaConf.select(given, name) if isinstance(given, DictConfig) else None
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            _refuse_misread(kind, value, f"{prefix}{name}.")
        elif is_text(schema, name):
            for item in value if isinstance(value, ListConfig) else [value]:
                if isinstance(item, bool | int | float):
                    raise UserError(
                        f"{prefix}{name} is {item}, as it is read: a name or a path that looks "
                        "like a number or a flag is to be in quotes"
                    )


def describe_config_error(error: OmegaConfBaseException) -> str:
    """One sentence for what OmegaConf says in several lines."""
    if isinstance(error, MissingMandatoryValue):
        hint = f": {error.full_key}=…" if f"{error.full_key}".endswith("path") else ""
        return f"setting {error.full_key} has no value{hint}"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"there is no setting {error.full_key!r}"
    reason = str(error.msg or error).split("\n")[0].rstrip(".")
    key = error.full_key
    if "is not a subclass of" in reason:
        value = reason.partition("value: ")[2]
        return f"setting {key} is {value}, where settings of its own belong; see configs/"
    return f"setting {key}: {reason}" if key and key not in reason else reason


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError, naming the setting, where a value is outside what its field allows."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(item):
                check_ranges(item, f"{prefix}{field.name}.")
            elif item is not None:
                _check_value(prefix + field.name, item, field.metadata)


def _check_value(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, list | dict) and limits:  # OmegaConf lets [[]] pass for a list of numbers
        raise UserError(f"{key} holds {value}, which is neither a number nor text")
    if isinstance(value, str) and not limits.get("raw") and not is_encodable(value):
        raise UserError(
            f"{key} is {value!r}, which is no text in the encoding {sys.getfilesystemencoding()}, "
            "as the locale has it; use another name, or set LC_ALL=C.UTF-8"
        )
    if "choices" in limits and value not in limits["choices"]:
        allowed = ", ".join(limits["choices"])
        hint = did_you_mean(str(value), limits["choices"])
        raise UserError(f"{key} is {value!r}{hint}; it can be one of: {allowed}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}; it must be a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key} is {value}; it must be below 2^63")
    for name, (said, keeps) in LIMITS.items():
        if name in limits and not keeps(value, limits[name]):
            raise UserError(f"{key} is {value}; it must be {said} {limits[name]}")


def is_encodable(text: str) -> bool:
    """Whether it is text: names of files need not be."""
    return text.encode(errors="replace").decode() == text


def written(value: Any) -> str:
    """A value as it is typed."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{','.join(map(written, value))}]" if isinstance(value, list) else f"{value}"
