"""What files of plain data hold: a result, its part on changed images, the settings of a run."""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args, get_origin

from capsrun.config import RecipeConfig, StopConfig
from capsrun.data_config import dataset_schema

NUMBER: Any = int | float
# What a result holds: the type of each value, with the least that a number may be, or what it holds
# itself, in a list all alike; with a `?`, if anything.
SHAPE: dict[str, Any] = {
    **dict.fromkeys(("name", "model", "date", "device", "precision"), str),
    **dict.fromkeys(("seed", "steps"), int),
    "config": dict,
    "versions": {"torch": str},
    "parameters?": int,
    **dict.fromkeys(("git_commit?", "checkpoint?", "time?"), str),
    "finished?": bool,
    "stopped?": {"reached": bool},
    **dict.fromkeys(("ensemble?", "others_trained?"), list),
    "scores?": {"test_averaged?": {"error_percent": NUMBER}},
    "best_on_test?": dict.fromkeys(("error_percent", "evaluations", "count"), NUMBER),
}
TEST_SHAPE: dict[str, Any] = {"dataset": str, "errors": int, "count": int}
TEST_SHAPE |= dict.fromkeys(("error_percent", "train_seconds"), NUMBER)
# What an evaluation holds of changed images.
ROWS = [{"value": NUMBER, "error_percent": NUMBER}]
WITHIN = {"epsilon": NUMBER, "error_percent": NUMBER, "success_percent?": NUMBER}
SET = {"flagged_percent": NUMBER, "roc_area": NUMBER}
CHANGED: dict[str, Any] = {
    "curves?": {"rotate?": ROWS, "shift?": ROWS, "scale?": ROWS},
    "attack?": [WITHIN],
    "detection?": {
        "real_flagged_percent": NUMBER,
        "sets": dict,
        "attack": [{"epsilon": NUMBER, "undetected_percent": NUMBER}],
    },
}
ATTACK = {"name": str, "targeted": bool, "random_start": bool, "loss": str, "source?": str}
ATTACK |= {
    "reconstructive?": bool,
    "steps": int,
    "restarts": int,
    "seed": int,
    "step_size?": NUMBER,
}
# No number of a network is larger, and sums of such numbers are finite.
LARGEST = 1e38


def check_changed(values: Mapping[str, Any]) -> None:
    """Raise ValueError where what was found of changed images is not sound."""
    check_shape(values, CHANGED)
    detection = values.get("detection")
    for name, found in detection["sets"].items() if detection else ():
        check_shape(found, SET, name)
    if values.get("attack"):
        check_shape(values["config"], {"attack": ATTACK})


def check_shape(value: Any, shape: Any, name: str = "result") -> None:
    """Raise ValueError where plain data is not of a shape; see `SHAPE`."""
    kind: Any = type(shape) if isinstance(shape, dict | list) else shape
    kind, least = shape if isinstance(shape, tuple) else (kind, -LARGEST)
    # True counts as a number in Python, but not here.
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"no sound {name!r}")
    if isinstance(value, NUMBER) and not least <= value <= LARGEST:  # which NaN is not either
        raise ValueError(f"no sound {name!r}")
    items: list[Any] = value if isinstance(shape, list) else []
    for item in items:
        check_shape(item, shape[0], name)
    for key, part in shape.items() if isinstance(shape, dict) else ():
        found = value.get(key.removesuffix("?"))
        if found is not None or not key.endswith("?"):
            check_shape(found, part, key.removesuffix("?"))


def check_training(config: Any) -> None:
    """Raise LookupError, TypeError or ValueError where a run's settings are not of their types."""
    nested = {"model": {"name": str}, "record": {"evaluate_images": int}}
    check_shape(config, {"seed": int, "name?": str, **nested})
    dataset = dataset_schema(config["dataset"])
    for key, schema in (("dataset", dataset), ("recipe", RecipeConfig), ("stop", StopConfig)):
        named = {setting.name: setting.default for setting in fields(schema)}
        needed = {name for name, default in named.items() if default is MISSING}
        if differing := (needed - {*config[key]}) | ({*config[key]} - {*named}):
            raise TypeError(f"{key} lacks a setting, or has one too many: {', '.join(differing)}")
        section: Any = schema(**config[key])
        for setting in fields(section):
            kind: Any = setting.type
            number = float in (kind, *get_args(kind))  # for which 1 does as well as 1.0
            kind = kind | int if number else list if get_origin(kind) is list else kind
            if not isinstance(getattr(section, setting.name), kind):
                raise TypeError(f"{key}.{setting.name} is not of type {kind}")
