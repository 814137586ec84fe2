"""Every setting's name, type, unit and allowed range. The values live in `configs/`, not here.

A field's `setting(...)` says what is allowed; `from_dict` turns plain data (a composed YAML file, a
checkpoint's `config`) into these dataclasses and refuses what is missing, unknown, of the wrong
type or out of range.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from capsrun.errors import UserError

Config = TypeVar("Config")


def setting(
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with the values that it may take: bounds (`above` is exclusive) or choices.

    For a list the bounds hold for each element.
    """
    limits = {"minimum": minimum, "maximum": maximum, "above": above, "choices": choices}
    return dataclasses.field(metadata={k: v for k, v in limits.items() if v is not None})


@dataclass(kw_only=True)
class DatasetConfig:
    """Which images, and how training changes them. Values: `configs/dataset/`."""

    name: str
    data_dir: str
    """Folder that holds (or will hold) the data sets."""
    image_px: int = setting(minimum=1)
    channels: int = setting(minimum=1)
    classes: int = setting(minimum=2)
    shift_px: int = setting(minimum=0)
    """Training images are moved by up to this many pixels along each axis."""
    validation: int = setting(minimum=0)
    """How many training images are held out for choosing between models; 0 trains on all."""
    split_seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Decides which images are held out (and, for mnist5k, which are test images)."""
    trained_on: str
    """The data set on which the model to evaluate on this one was trained."""


@dataclass(kw_only=True)
class CapsNetConfig:
    """The layers of CapsNet. Values and their sources: `configs/model/capsnet.yaml`."""

    name: str = setting(choices=("capsnet",))
    conv1_channels: int = setting(minimum=1)
    kernel_px: int = setting(minimum=1)
    primary_types: int = setting(minimum=1)
    primary_dimensions: int = setting(minimum=1)
    primary_scale: str = setting(choices=("authors", "one"))
    digit_dimensions: int = setting(minimum=1)
    digit_bias: bool
    initialisation: str = setting(choices=("authors", "pytorch"))
    reconstruction: bool
    decoder_widths: list[int] = setting(minimum=1)


@dataclass(kw_only=True)
class RoutingConfig:
    """Routing between PrimaryCaps and DigitCaps. Values: `configs/model/capsnet.yaml`."""

    iterations: int = setting(minimum=1)
    leaky: bool
    detach: bool


@dataclass(kw_only=True)
class LossConfig:
    """The margin loss and the weight of the reconstruction. Values: `configs/loss/`."""

    name: str
    margin_present: float = setting(minimum=0, maximum=1)
    margin_absent: float = setting(minimum=0, maximum=1)
    absent_weight: float = setting(minimum=0)
    margin_factor: float = setting(above=0)
    class_reduction: str = setting(choices=("mean", "sum"))
    reconstruction_weight: float = setting(minimum=0)


@dataclass(kw_only=True)
class RecipeConfig:
    """How long and how to optimise. Values: `configs/recipe/`."""

    name: str
    steps: int | None = setting(minimum=1)
    epochs: float | None = setting(above=0)
    """Length in passes over the training images; exactly one of `steps` and `epochs` is set."""
    batch_size: int = setting(minimum=1)
    learning_rate: float = setting(above=0)
    learning_rate_floor: float = setting(minimum=0)
    decay_rate: float = setting(above=0, maximum=1)
    decay_steps: float | None = setting(above=0)
    decay_periods: float | None = setting(above=0)
    """How often the whole run decays; exactly one of `decay_steps` and `decay_periods` is set."""
    hold_fraction: float = setting(minimum=0, maximum=0.99)
    """Share of the run during which the learning rate does not decay yet."""
    adam_form: str = setting(choices=("tensorflow", "pytorch"))
    adam_beta1: float = setting(minimum=0, maximum=0.999999)
    adam_beta2: float = setting(minimum=0, maximum=0.9999999)
    adam_epsilon: float = setting(above=0)


@dataclass(kw_only=True)
class RecordConfig:
    """How often a run writes what. Values: `configs/train.yaml`."""

    log_every_steps: int = setting(minimum=1)
    evaluate_every_steps: int | None = setting(minimum=1)
    """None: once an epoch."""
    checkpoint_every_seconds: float = setting(minimum=0)


@dataclass(kw_only=True)
class TrainConfig:
    """Everything that `capsrun train` needs. Values: `configs/train.yaml`."""

    name: str | None
    """Name of the run's folder; None: made from what was chosen on the command line."""
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    runs_dir: str
    device: str = setting(choices=("auto", "cpu", "cuda"))
    precision: str = setting(choices=("auto", "fp32", "bf16"))
    compile: bool
    """Whether to build and use the fastest code for this machine, or PyTorch's operations only."""
    dataset: DatasetConfig
    model: CapsNetConfig
    routing: RoutingConfig
    loss: LossConfig
    recipe: RecipeConfig
    record: RecordConfig


@dataclass(kw_only=True)
class EvalConfig:
    """Everything that `capsrun eval` needs; the model comes from the checkpoint."""

    checkpoint: str
    """A checkpoint file, or the folder of a run."""
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Picks the run whose checkpoint is the default."""
    runs_dir: str
    out_dir: str | None
    """None: a folder beside the checkpoint."""
    device: str = setting(choices=("auto", "cpu", "cuda"))
    precision: str = setting(choices=("auto", "fp32", "bf16"))
    compile: bool
    """See `TrainConfig.compile`."""
    split: str = setting(choices=("test", "validation", "train"))
    mask: str = setting(choices=("label", "longest"))
    pictures: int = setting(minimum=1, maximum=100)
    """How many hits, and at most how many failures, are drawn."""
    dataset: DatasetConfig


@dataclass(kw_only=True)
class SweepConfig:
    """Which image `capsrun perturb` takes and how it moves the capsule's dimensions."""

    digit: int | None = setting(minimum=0)
    index: int | None = setting(minimum=0)
    image: str | None
    invert: str = setting(choices=("auto", "yes", "no"))
    low: float
    high: float
    step: float = setting(above=0)


@dataclass(kw_only=True)
class PerturbConfig:
    """Everything that `capsrun perturb` needs; the model comes from the checkpoint."""

    checkpoint: str
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    runs_dir: str
    out_dir: str | None
    device: str = setting(choices=("auto", "cpu", "cuda"))
    perturb: SweepConfig
    dataset: DatasetConfig


@dataclass(kw_only=True)
class DataConfig:
    """Everything that `capsrun data` needs."""

    runs_dir: str
    out_dir: str | None
    samples: int = setting(minimum=1, maximum=100)
    """How many images of each class the contact sheet shows."""
    dataset: DatasetConfig


@dataclass(kw_only=True)
class BenchConfig:
    """Everything that `capsrun bench` needs. Values: `configs/bench.yaml`."""

    runs_dir: str
    out_dir: str | None
    device: str = setting(choices=("auto", "cpu", "cuda"))
    precision: str = setting(choices=("auto", "fp32", "bf16"))
    rounds: int = setting(minimum=3)
    """How many turns everything gets."""
    turn_seconds: float = setting(above=0)
    """Work is repeated for about so long in a turn."""
    spread_percent: float = setting(above=0)
    """A figure whose turns differ by more (interquartile range) is not quoted."""
    memory: bool
    """Whether to measure memory too, in a process for each kind of step."""
    profile: bool
    """Whether to show where the time of a step goes."""
    dataset: DatasetConfig
    model: CapsNetConfig
    routing: RoutingConfig
    loss: LossConfig
    recipe: RecipeConfig


def from_dict(schema: type[Config], values: Any) -> Config:
    """Turn plain nested data (a dict or an OmegaConf node) into `schema`, checked.

    Raises UserError for a missing or unknown key, a wrong type, or a value out of range.
    """
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    except (ValueError, TypeError) as error:
        raise UserError(f"this is not a configuration: {error}") from error
    check_ranges(config)
    if isinstance(config, TrainConfig):
        _check_training(config)
    return config


def describe_config_error(error: OmegaConfBaseException) -> str:
    """One sentence for what OmegaConf says in several lines."""
    if isinstance(error, MissingMandatoryValue):
        return f"setting {error.full_key} has no value"
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return f"there is no setting {error.full_key!r}"
    reason = str(error.msg or error).split("\n")[0].rstrip(".")
    key = error.full_key
    return f"setting {key}: {reason}" if key and key not in reason else reason


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raise UserError, naming the setting, where a value is outside what its field allows."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        key = prefix + field.name
        if dataclasses.is_dataclass(value):
            check_ranges(value, key + ".")
            continue
        for item in value if isinstance(value, list) else [value]:
            _check_value(key, item, field.metadata)


def _check_value(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        allowed = ", ".join(limits["choices"])
        raise UserError(f"{key} is {value!r}; it can be one of: {allowed}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}; it must be a finite number")
    if "minimum" in limits and not value >= limits["minimum"]:
        raise UserError(f"{key} is {value}; it must be at least {limits['minimum']}")
    if "above" in limits and not value > limits["above"]:
        raise UserError(f"{key} is {value}; it must be above {limits['above']}")
    if "maximum" in limits and not value <= limits["maximum"]:
        raise UserError(f"{key} is {value}; it must be at most {limits['maximum']}")


def _check_training(config: TrainConfig) -> None:
    """Raise UserError for settings that are each allowed but contradict each other."""
    recipe = config.recipe
    if (recipe.steps is None) == (recipe.epochs is None):
        raise UserError("set exactly one of recipe.steps and recipe.epochs (the other to null)")
    if (recipe.decay_steps is None) == (recipe.decay_periods is None):
        raise UserError("set exactly one of recipe.decay_steps and recipe.decay_periods")
    if config.name is not None:
        path = PurePath(config.name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise UserError(f"name={config.name} does not name a folder below runs_dir")


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list:
    """List `(key, our value, their value)` where two nested configurations differ."""
    found = []
    for key in sorted({*ours, *theirs}):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found
