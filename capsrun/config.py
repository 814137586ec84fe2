"""Every setting's name, type, unit and allowed range. The values live in `configs/`, not here.

A field's `setting(...)` says what is allowed; `settings.from_dict` makes these of plain data.
"""

import math
from dataclasses import dataclass

from capsrun.attack_config import AttackConfig
from capsrun.data_config import DatasetConfig
from capsrun.fields import setting
from capsrun.model_config import LossConfig, ModelConfig, RoutingConfig


@dataclass(kw_only=True)
class RecipeConfig:
    """How long and how to optimise. Values: `configs/recipe/`."""

    name: str
    steps: int | None = setting(minimum=1, maximum=10**9)
    epochs: float | None = setting(above=0, maximum=10**6)
    """Length in passes over the training images; exactly one of `steps` and `epochs` is set."""
    batch_size: int = setting(minimum=1, maximum=10**6)
    order: str = setting(choices=("uniform", "authors"))
    """How the training images are shuffled; see `data/batches.py`."""
    learning_rate: float = setting(above=0)
    learning_rate_floor: float = setting(minimum=0, maximum=10**3)
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
    adam_epsilon: float = setting(minimum=1e-30, maximum=10**3)
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
    tensorboard_points: int = setting(minimum=1, maximum=10**7)
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
    """How often it is looked at, and the model evaluated; None: once an epoch."""

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
    init: str | None = setting(path=True)
    """A file or a run's folder, whose weights a new run begins with; None: random ones."""
    runs_dir: str = setting(path=True)
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
        """After how many steps the model is tested: what `stop` or `record` says, or an epoch.

        `record` has no say where a run may stop (see `settings.py`): there, how often it is tested
        decides what comes out.
        """
        chosen = self.stop.every_steps or self.record.evaluate_every_steps
        return chosen or math.ceil(epoch_images / self.recipe.batch_size)


@dataclass(kw_only=True)
class CheckpointConfig:
    """What every command needs that uses a trained model."""

    checkpoint: str | None = setting(path=True)
    """A file, or a run's folder; None: that of the run which train makes for `dataset`."""
    seed: int = setting(minimum=0, maximum=2**63 - 1)
    """Picks the run whose checkpoint is the default."""
    runs_dir: str = setting(path=True)
    dataset: DatasetConfig


@dataclass(kw_only=True)
class EvalConfig(CheckpointConfig):
    """Everything that `capsrun eval` needs; the model comes from the checkpoint."""

    ensemble: list[str] = setting(path=True)
    """More checkpoints, whose scores are averaged with those of the first."""
    out_dir: str | None = setting(path=True)
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
    predictions: int = setting(minimum=0)
    """Of how many of the images, from the first, `predictions.csv` has a line."""
    pictures: int = setting(minimum=1, maximum=100)
    """How many hits, and at most how many failures, are drawn."""
    routing_images: list[int] = setting(minimum=0)
    """The images of the split whose routing is drawn, where the model has one."""
    rotate: list[float] = setting(minimum=-360, maximum=360)
    """Degrees, counter-clockwise: the images are tested rotated by each of them, too."""
    shift: list[float] = setting(minimum=0, maximum=1_000)
    """And moved by each of so many pixels; see `data/warped.py`."""
    scale: list[float] = setting(minimum=0.01, maximum=100)
    """And made larger or smaller by each of these factors."""
    attack: AttackConfig | None
    detect: list[str]
    """Other data sets, or `noise`, to be told from the tested images by their reconstructions."""


@dataclass(kw_only=True)
class SweepConfig:
    """Which image `capsrun perturb` takes and how it moves the capsule's dimensions."""

    digit: str | None
    """The name of a class, or its number."""
    index: int | None = setting(minimum=0)
    image: str | None = setting(path=True)
    invert: str = setting(choices=("auto", "true", "false"))
    low: float
    high: float
    step: float = setting(above=0)
    format: str = setting(choices=("png", "gif", "apng"))
    """A still picture, or an animated one."""


@dataclass(kw_only=True)
class PerturbConfig(CheckpointConfig):
    """Everything that `capsrun perturb` needs; the model comes from the checkpoint."""

    out_dir: str | None = setting(path=True)
    device: str = setting(choices=("auto", "cpu", "cuda"))
    perturb: SweepConfig


@dataclass(kw_only=True)
class PredictConfig(CheckpointConfig):
    """Everything that `capsrun predict` needs; the model comes from the checkpoint."""

    images: list[str] = setting(path=True, raw=True)
    """Files, and folders of them."""
    out_dir: str | None = setting(path=True)
    device: str = setting(choices=("auto", "cpu", "cuda"))
    invert: str = setting(choices=("auto", "true", "false"))
    json: bool
    csv: str | None = setting(path=True)


@dataclass(kw_only=True)
class ExploreSettings:
    """What the page of `capsrun explore` holds."""

    images: int = setting(minimum=1, maximum=200)
    """How many test images of each class."""
    mistakes: int = setting(minimum=0, maximum=500)
    """How many test images that the model gets wrong, on top of them."""
    search: int = setting(minimum=1)
    """Among how many test images, from the first, both are looked for."""
    encoder: str = setting(choices=("auto", "true", "false"))
    """Whether the encoder is in the page, so that digits can be drawn."""
    limit_mb: float = setting(above=0)
    """The page is not larger, in 10⁶ bytes, unless it is to have the encoder in any case."""


@dataclass(kw_only=True)
class ExploreConfig(CheckpointConfig):
    """Everything that `capsrun explore` needs; the model comes from the checkpoint."""

    out: str | None = setting(path=True)
    """The file to write; None: in the run's folder, see `output_folder`."""
    device: str = setting(choices=("auto", "cpu", "cuda"))
    explore: ExploreSettings


@dataclass(kw_only=True)
class ExportConfig(CheckpointConfig):
    """Everything that `capsrun export` needs; the model comes from the checkpoint."""

    out_dir: str | None = setting(path=True)
    format: str = setting(choices=("onnx", "torch", "all"))


@dataclass(kw_only=True)
class DataConfig:
    """Everything that `capsrun data` needs."""

    runs_dir: str = setting(path=True)
    out_dir: str | None = setting(path=True)
    samples: int = setting(minimum=1, maximum=100)
    """How many images of each class the contact sheet shows."""
    statistics_images: int = setting(minimum=1)
    """How many images of each split the statistics are taken from."""
    dataset: DatasetConfig


@dataclass(kw_only=True)
class BenchConfig:
    """Everything that `capsrun bench` needs. Values: `configs/bench.yaml`."""

    runs_dir: str = setting(path=True)
    out_dir: str | None = setting(path=True)
    device: str = setting(choices=("auto", "cpu", "cuda"))
    precision: str = setting(choices=("auto", "fp32", "bf16"))
    rounds: int = setting(minimum=3, maximum=1_000)
    """How many turns everything gets."""
    turn_seconds: float = setting(above=0, maximum=3_600)
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
