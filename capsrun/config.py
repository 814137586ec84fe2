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
from typing import Any, TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from capsrun.errors import UserError, did_you_mean
from capsrun.reading import check_plain

Config = TypeVar("Config")


def setting(
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field with the values that it may take: bounds or choices.

    `above` and `below` are exclusive. For a list the bounds hold for each element.
    """
    bounds = {"minimum": minimum, "maximum": maximum, "above": above, "below": below}
    limits = {**bounds, "choices": choices}
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
    """Decides which images are held out, and how images that are made of others are made."""
    trained_on: str
    """The data set on which the model to evaluate on this one was trained."""
    trained_by: str
    """Model and recipe of that run, as in its name: `capsnet-quick`."""
    digits: int = setting(minimum=1, maximum=2)
    """How many digits one image shows."""
    source: str | None
    """The data set of whose images these are made; None: they are on disk as they are."""
    test: str = setting(choices=("sample", "all"))
    """Which of the possible test images are used; see the data set's file."""
    flip: bool
    """Whether training images are mirrored, left to right, half of the time."""
    brightness: float = setting(minimum=0, maximum=1)
    """Training images become lighter or darker by up to this share of the range of pixels."""
    contrast: float = setting(minimum=0, maximum=1)
    """The contrast of training images is multiplied by 1 − this to 1 + this."""
    standardise: bool
    """Whether the network sees each image with mean 0 and standard deviation 1."""


@dataclass(kw_only=True)
class ModelConfig:
    """Some network."""

    name: str


@dataclass(kw_only=True)
class CapsNetConfig(ModelConfig):
    """The layers of CapsNet. Values and their sources: `configs/model/capsnet.yaml`."""

    conv1_channels: int = setting(minimum=1)
    kernel_px: int = setting(minimum=1)
    padding: str = setting(choices=("valid", "same"))
    primary_types: int = setting(minimum=1)
    primary_dimensions: int = setting(minimum=1)
    primary_scale: str = setting(choices=("authors", "one"))
    digit_dimensions: int = setting(minimum=1)
    digit_bias: bool
    initialisation: str = setting(choices=("authors", "pytorch"))
    reconstruction: bool
    decoder_widths: list[int] = setting(minimum=1)


@dataclass(kw_only=True)
class CNNConfig(ModelConfig):
    """The layers of a convolutional network. Values and sources: `configs/model/cnn_*.yaml`."""

    channels: list[int] = setting(minimum=1)
    """Output channels of each convolution."""
    kernels_px: list[int] = setting(minimum=1)
    pools_px: list[int] = setting(minimum=1)
    """Size and stride of the max-pooling after each convolution; 1: none."""
    padding: str = setting(choices=("valid", "same"))
    hidden: list[int] = setting(minimum=1)
    """Widths of the fully connected layers before the last one."""
    dropout: float = setting(minimum=0, maximum=0.99)
    """Share of the last hidden layer's units that is dropped in training."""
    initialisation: str = setting(choices=("authors", "glorot", "pytorch"))


@dataclass(kw_only=True)
class RoutingConfig:
    """Routing between PrimaryCaps and DigitCaps. Values: `configs/model/capsnet.yaml`."""

    iterations: int = setting(minimum=1)
    leaky: bool
    detach: bool


@dataclass(kw_only=True)
class LossConfig:
    """Some loss. Values: `configs/loss/`."""

    name: str


@dataclass(kw_only=True)
class CrossEntropyConfig(LossConfig):
    """What the CNNs minimise."""

    activation: str = setting(choices=("softmax", "sigmoid"))
    present_target: float = setting(above=0, maximum=1)
    """Sigmoid only: the target of a class that is present."""


@dataclass(kw_only=True)
class MarginLossConfig(LossConfig):
    """The margin loss and the weight of the reconstruction."""

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
    order: str = setting(choices=("uniform", "authors"))
    """How the training images are shuffled; see `data/batches.py`."""
    learning_rate: float = setting(above=0)
    learning_rate_floor: float = setting(minimum=0)
    decay_shape: str = setting(choices=("exponential", "linear"))
    """By factors of `decay_rate`, or in a straight line to 0 at the end of the run."""
    decay_rate: float = setting(above=0, maximum=1)
    decay_steps: float | None = setting(above=0)
    decay_periods: float | None = setting(above=0)
    """How often the whole run decays; exactly one of `decay_steps` and `decay_periods` is set, and
    neither for a linear decay."""
    hold_fraction: float = setting(minimum=0, maximum=0.99)
    """Share of the run during which the learning rate does not decay yet."""
    adam_form: str = setting(choices=("tensorflow", "pytorch"))
    adam_beta1: float = setting(minimum=0, below=1)
    adam_beta2: float = setting(minimum=0, below=1)
    adam_epsilon: float = setting(above=0)
    average: float | None = setting(above=0, below=1)
    """Decay per step of a moving average of the weights, tested beside them; None: no average."""


@dataclass(kw_only=True)
class RecordConfig:
    """How often a run writes what. Values: `configs/train.yaml`."""

    log_every_steps: int = setting(minimum=1)
    evaluate_every_steps: int | None = setting(minimum=1)
    """None: once an epoch."""
    evaluate_images: int = setting(minimum=1)
    """How many test images an evaluation during training uses; the last one uses all."""
    checkpoint_every_seconds: float = setting(minimum=0)
    tensorboard_points: int = setting(minimum=1)
    """How many points a curve in TensorBoard has at most; `metrics.jsonl` has all."""
    tensorboard_pictures: int = setting(minimum=1)
    """How many evaluations of a run draw reconstructions at most, beside the last one."""


@dataclass(kw_only=True)
class StopConfig:
    """Whether to end a run before its last step. Values: `configs/train.yaml`."""

    accuracy_percent: float | None = setting(above=0, maximum=100)
    """Stop at the first evaluation that reaches this; None: make every step."""
    on: str = setting(choices=("test", "validation"))
    """The images that decide."""
    patience: int | None = setting(minimum=1)
    """Stop when so many evaluations in a row err no less on held-out images; None: never."""
    every_steps: int | None = setting(minimum=1)
    """How often it is looked at, and the model evaluated; None: as `record` says."""

    @property
    def asked(self) -> bool:
        """Whether anything may end the run before its last step."""
        return self.accuracy_percent is not None or self.patience is not None


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
    deterministic: bool
    """Whether the same command on the same machine gives the same bits; see `set_deterministic`."""
    dataset: DatasetConfig
    model: ModelConfig
    routing: RoutingConfig | None
    """None for a network without capsules."""
    loss: LossConfig
    recipe: RecipeConfig
    stop: StopConfig
    record: RecordConfig

    def evaluation_steps(self, epoch_images: int) -> int:
        """After how many steps the model is tested: what `stop` or `record` says, or an epoch."""
        chosen = self.stop.every_steps or self.record.evaluate_every_steps
        return chosen or math.ceil(epoch_images / self.recipe.batch_size)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What every command needs that uses a trained model."""

    checkpoint: str
    """A checkpoint file, or the folder of a run."""
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Picks the run whose checkpoint is the default."""
    runs_dir: str


@dataclass(kw_only=True)
class EvalConfig(CheckpointConfig):
    """Everything that `capsrun eval` needs; the model comes from the checkpoint."""

    ensemble: list[str]
    """More checkpoints, whose scores are averaged with those of the first."""
    out_dir: str | None
    """None: a folder in the run's; for a checkpoint that is no run's, in one named after it."""
    device: str = setting(choices=("auto", "cpu", "cuda"))
    precision: str = setting(choices=("auto", "fp32", "bf16"))
    compile: bool
    """See `TrainConfig.compile`."""
    split: str = setting(choices=("test", "validation", "train"))
    images: int | None = setting(minimum=1)
    """How many of the images, from the first, are tested; None: all."""
    mask: str = setting(choices=("label", "longest"))
    weights: str = setting(choices=("last", "averaged"))
    """The weights after the last step, or their moving average (`recipe.average`)."""
    pictures: int = setting(minimum=1, maximum=100)
    """How many hits, and at most how many failures, are drawn."""
    routing_images: list[int] = setting(minimum=0)
    """The images of the split whose routing is drawn, where the model has one."""
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
    format: str = setting(choices=("png", "gif", "apng"))
    """A still picture, or an animated one."""


@dataclass(kw_only=True)
class PerturbConfig(CheckpointConfig):
    """Everything that `capsrun perturb` needs; the model comes from the checkpoint."""

    out_dir: str | None
    device: str = setting(choices=("auto", "cpu", "cuda"))
    perturb: SweepConfig
    dataset: DatasetConfig


@dataclass(kw_only=True)
class ExploreSettings:
    """What the page of `capsrun explore` holds."""

    images: int = setting(minimum=1, maximum=200)
    """How many test images of each class."""
    mistakes: int = setting(minimum=0, maximum=500)
    """How many test images that the model gets wrong, on top of them."""
    search: int = setting(minimum=1)
    """Among how many test images, from the first, both are looked for."""
    encoder: str = setting(choices=("auto", "yes", "no"))
    """Whether the encoder is in the page, so that digits can be drawn."""


@dataclass(kw_only=True)
class ExploreConfig(CheckpointConfig):
    """Everything that `capsrun explore` needs; the model comes from the checkpoint."""

    out: str | None
    """The file to write; None: in the run's folder, see `output_folder`."""
    device: str = setting(choices=("auto", "cpu", "cuda"))
    explore: ExploreSettings
    dataset: DatasetConfig


@dataclass(kw_only=True)
class ExportConfig(CheckpointConfig):
    """Everything that `capsrun export` needs; the model comes from the checkpoint."""

    out_dir: str | None
    format: str = setting(choices=("onnx", "torch", "all"))
    dataset: DatasetConfig
    """Of it only what tells which run's checkpoint is the default."""


@dataclass(kw_only=True)
class DataConfig:
    """Everything that `capsrun data` needs."""

    runs_dir: str
    out_dir: str | None
    samples: int = setting(minimum=1, maximum=100)
    """How many images of each class the contact sheet shows."""
    statistics_images: int = setting(minimum=1)
    """How many images of each split the statistics are taken from."""
    dataset: DatasetConfig


@dataclass(kw_only=True)
class ListConfig:
    """Everything that `capsrun list` needs. Values: `configs/list.yaml`."""

    runs_dir: str
    name: str | None
    """Only runs whose folder has this in its name; None: all."""
    json: bool


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
    profile: bool
    """Whether to show where the time of a step goes."""
    dataset: DatasetConfig
    model: ModelConfig
    routing: RoutingConfig | None
    loss: LossConfig
    recipe: RecipeConfig


@dataclass(kw_only=True)
class BudgetConfig:
    """How long the experiments are made to run. Values: `configs/budget/`."""

    name: str
    train: list[str]
    """Overrides of `capsrun train`."""
    eval: list[str]
    """Overrides of `capsrun eval`."""
    stand_ins: dict[str, list[str]]
    """Overrides that take a smaller data set in place of one, by its name."""
    members: int = setting(minimum=1)
    """How many models an ensemble has at most."""
    seeds: list[int] = setting(minimum=0)
    """The seeds to run if none are said."""


@dataclass(kw_only=True)
class QueueEntry:
    """Some experiments, each with some seeds."""

    targets: list[str]
    seeds: list[int] = setting(minimum=0)
    length: str | None = None
    """Name of the folder of its runs, in place of the budget's; None: as long as that says."""
    train: list[str] = dataclasses.field(default_factory=list)
    """Overrides of `capsrun train`, in place of the budget's; only with a length of its own."""


@dataclass(kw_only=True)
class QueueConfig:
    """What to run, in this order. Values: `configs/queue/`."""

    entries: list[QueueEntry]


@dataclass(kw_only=True)
class ReproduceConfig:
    """Everything that `capsrun reproduce` needs. Values: `configs/reproduce.yaml`."""

    targets: list[str]
    seeds: list[int] = setting(minimum=0)
    budget: BudgetConfig
    queue: QueueConfig
    only_plan: bool
    timing: bool
    minutes: float | None = setting(above=0)
    parallel: int = setting(minimum=1)
    runs_dir: str
    device: str = setting(choices=("auto", "cpu", "cuda"))


@dataclass(kw_only=True)
class ReportConfig:
    """Everything that `capsrun report` needs. Values: `configs/report.yaml`."""

    sources: list[str]
    runs_dir: str
    out_dir: str
    keep: str | None


@dataclass(kw_only=True)
class Published:
    """A number that somebody reports."""

    error_percent: float = setting(minimum=0, maximum=100)
    spread: float | None = setting(minimum=0)
    """Standard deviation over trials, in points."""
    trials: int | None = setting(minimum=1)
    chosen: str = setting(choices=("last", "best_on_test", "unknown"))
    """Whether it is of the last step, or the best of several tests on the test images."""
    source: str


@dataclass(kw_only=True)
class Measured:
    """How long an experiment's command took when it was last timed."""

    seconds: float = setting(above=0)
    per: str = setting(choices=("step", "image", "run"))
    """Of training, of testing, or the whole command."""
    device: str
    date: str


@dataclass(kw_only=True)
class ExperimentConfig:
    """What `configs/experiment/*.yaml` says beside the settings of a run."""

    group: str = setting(
        choices=("table1", "multimnist", "affnist", "section7", "figures", "ablations")
    )
    title: str
    command: str | None
    """`train`, or what is done with the runs that it uses; None: they are all that it needs."""
    uses: list[str]
    """The experiments whose runs it needs."""
    models: int = setting(minimum=1)
    """How many models, of as many seeds, are tested together; 1: no ensemble."""
    smoke: list[str]
    """Overrides of `capsrun train` that only the budget `smoke` needs."""
    paper: Published | None
    public: list[Published]
    """Public re-implementations."""
    note: str | None
    measured: Measured | None


# Settings that came later, with the values that everything before them had.
LATER_SETTINGS: dict[str, Any] = {
    "compile": True,
    "deterministic": False,
    "dataset": {
        "trained_by": "capsnet-quick",
        "digits": 1,
        "source": None,
        "test": "all",
        "flip": False,
        "brightness": 0.0,
        "contrast": 0.0,
        "standardise": False,
    },
    "model": {"padding": "valid"},
    "recipe": {"order": "uniform", "decay_shape": "exponential", "average": None},
    "record": {
        "evaluate_images": 10_000,
        "tensorboard_points": 2000,
        "tensorboard_pictures": 20,
    },
    "stop": {"accuracy_percent": None, "on": "test", "patience": None, "every_steps": None},
}


def with_later_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """A training configuration as an older capsrun saved it, with what it lacks."""
    completed = {**values}
    for key, later in LATER_SETTINGS.items():
        if isinstance(later, Mapping) and isinstance(completed.get(key, {}), Mapping):
            later = {**later, **completed.get(key, {})}
        elif key in completed:
            continue
        completed[key] = later
    return completed


# Settings that a configuration may have; those of a run are about 60.
MOST_VALUES = 10_000


def from_dict(schema: type[Config], values: Any) -> Config:
    """Turn plain nested data (a dict or an OmegaConf node) into `schema`, checked.

    Raises UserError for a missing or unknown key, a wrong type, or a value out of range.
    """
    try:
        if not OmegaConf.is_config(values):  # what is composed is plain already
            _check_stored(values)
        merged = OmegaConf.merge(_structured(schema, values), values)
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(describe_config_error(error)) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"this is not a configuration: {error}") from error
    check_ranges(config)
    if isinstance(config, TrainConfig):
        _check_training(config)
    return config


def _check_stored(values: Any) -> None:
    """Raise ValueError for values from a file that no run can have stored there."""
    check_plain(values, MOST_VALUES)
    pending = [values]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple):
            pending += value
        elif isinstance(value, str) and "${" in value:  # it could ask for environment variables
            raise ValueError(f"it holds {value!r}, whose value is elsewhere")


def _structured(schema: type, values: Any) -> Any:
    """An empty `schema` with the kind of model and of loss that the values are about."""
    node = OmegaConf.structured(schema)
    names = {field.name for field in dataclasses.fields(schema)}
    given = OmegaConf.create(values) if isinstance(values, dict) else values
    if not isinstance(given, DictConfig):
        return node  # merging will say what is wrong
    if "model" in names:
        is_cnn = OmegaConf.select(given, "model.kernels_px") is not None
        node.model = OmegaConf.structured(CNNConfig if is_cnn else CapsNetConfig)
    if "loss" in names:
        by_entropy = OmegaConf.select(given, "loss.activation") is not None
        node.loss = OmegaConf.structured(CrossEntropyConfig if by_entropy else MarginLossConfig)
    return node


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
            if dataclasses.is_dataclass(item):
                check_ranges(item, key + ".")
            else:
                _check_value(key, item, field.metadata)


def _check_value(key: str, value: Any, limits: Mapping[str, Any]) -> None:
    if value is None:
        return
    if isinstance(value, list | dict) and limits:  # OmegaConf lets [[]] pass for a list of numbers
        raise UserError(f"{key} holds {value}, which is neither a number nor text")
    if "choices" in limits and value not in limits["choices"]:
        allowed = ", ".join(limits["choices"])
        hint = did_you_mean(str(value), limits["choices"])
        raise UserError(f"{key} is {value!r}{hint}; it can be one of: {allowed}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} is {value}; it must be a finite number")
    if "minimum" in limits and not value >= limits["minimum"]:
        raise UserError(f"{key} is {value}; it must be at least {limits['minimum']}")
    if "above" in limits and not value > limits["above"]:
        raise UserError(f"{key} is {value}; it must be above {limits['above']}")
    if "maximum" in limits and not value <= limits["maximum"]:
        raise UserError(f"{key} is {value}; it must be at most {limits['maximum']}")
    if "below" in limits and not value < limits["below"]:
        raise UserError(f"{key} is {value}; it must be below {limits['below']}")


def allowed_values(schema: type, key: str) -> list[str]:
    """What a setting (its name with dots) may be, as it is written; empty where that is endless."""
    kinds = [schema]
    *sections, name = key.split(".")
    for section in sections:
        nested = [part for kind in kinds for part in _types(kind, section)]
        parts = [p for p in nested if isinstance(p, type) and dataclasses.is_dataclass(p)]
        # A model or a loss is of one of several kinds.
        kinds = [kind for part in parts for kind in (part, *part.__subclasses__())]
    found: dict[str, None] = {}
    for kind in kinds:
        for field in dataclasses.fields(kind):
            if field.name == name:
                is_flag = bool in _types(kind, name)
                values = ("true", "false") if is_flag else field.metadata.get("choices", ())
                found |= dict.fromkeys(values)
    return list(found)


def _types(schema: type, name: str) -> tuple[Any, ...]:
    """The types that a field may have: one, or those of a union; none where there is no field."""
    types = [field.type for field in dataclasses.fields(schema) if field.name == name]
    return get_args(types[0]) or tuple(types) if types else ()


def _check_training(config: TrainConfig) -> None:
    """Raise UserError for settings that are each allowed but contradict each other."""
    recipe = config.recipe
    if (recipe.steps is None) == (recipe.epochs is None):
        raise UserError("set exactly one of recipe.steps and recipe.epochs (the other to null)")
    decays = [recipe.decay_steps, recipe.decay_periods].count(None)
    if recipe.decay_shape == "exponential" and decays != 1:
        raise UserError("set exactly one of recipe.decay_steps and recipe.decay_periods")
    if recipe.decay_shape == "linear" and decays != 2:
        raise UserError(
            "recipe.decay_shape=linear ends with the run: set recipe.decay_steps and "
            "recipe.decay_periods to null"
        )
    check_kinds(config.model, config.routing, config.loss)
    if isinstance(config.model, CNNConfig):
        model = config.model
        if not len(model.channels) == len(model.kernels_px) == len(model.pools_px) > 0:
            raise UserError(
                "model.channels, model.kernels_px and model.pools_px have a value for each layer, "
                f"but there are {len(model.channels)}, {len(model.kernels_px)} and "
                f"{len(model.pools_px)}"
            )
    stop = config.stop
    if stop.accuracy_percent is None and stop.on != "test":
        raise UserError(
            "stop.on needs stop.accuracy_percent=…; stop.patience is always of held-out images"
        )
    if not stop.asked and stop.every_steps is not None:
        raise UserError("stop.every_steps needs stop.accuracy_percent=… or stop.patience=…")
    if stop.accuracy_percent is not None and stop.patience is not None:
        raise UserError("set one of stop.accuracy_percent and stop.patience: either ends the run")
    on_validation = stop.accuracy_percent is not None and stop.on == "validation"
    if (on_validation or stop.patience is not None) and not config.dataset.validation:
        setting = "stop.on=validation" if on_validation else "stop.patience"
        raise UserError(
            f"{setting} needs held-out training images: dataset.validation=10000 (of MNIST)"
        )
    if config.name is not None and not is_name(config.name):
        raise UserError(f"name={config.name} does not name a folder below runs_dir")


def is_name(name: str) -> bool:
    """Whether this can be the name of a run: a folder below another one."""
    path = PurePath(name)
    is_below = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return is_below and "\0" not in name


def check_kinds(model: ModelConfig, routing: RoutingConfig | None, loss: LossConfig) -> None:
    """Refuse a loss that is not for the outputs of the model."""
    is_capsnet = isinstance(model, CapsNetConfig)
    if is_capsnet and (isinstance(loss, CrossEntropyConfig) or routing is None):
        raise UserError(
            f"loss={loss.name} is not for model={model.name}, which has capsules: loss=authors or "
            "loss=paper"
        )
    if not is_capsnet and isinstance(loss, MarginLossConfig):
        raise UserError(
            f"loss={loss.name} is for capsules, which model={model.name} has not: "
            "loss=cross_entropy or loss=sigmoid_cross_entropy"
        )


def differing_keys(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list:
    """List `(key, our value, their value)` where two nested configurations differ."""
    found = []
    for key in sorted({*ours, *theirs}, key=str):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((prefix + key, a, b))
    return found
