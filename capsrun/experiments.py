"""The rows and figures of the paper: what `configs/experiment/` says of each."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from capsrun.compose import GROUPS, compose, configs_dir, experiment_names
from capsrun.config import EvalConfig, TrainConfig, setting
from capsrun.settings import Config, from_dict


@dataclass(kw_only=True)
class Published:
    """A number that somebody reports."""

    error_percent: float = setting(minimum=0, maximum=100)
    spread: float | None = None
    """Standard deviation over trials, in points."""
    trials: int | None = None
    chosen: str = setting(choices=("last", "best_on_test", "unknown"))
    """Whether it is of the last step, or the best of several tests on the test images."""
    source: str


@dataclass(kw_only=True)
class Experiment:
    """What a file of `configs/experiment/` says beside the settings of a run."""

    group: str = setting(choices=tuple(GROUPS))
    title: str
    order: int = 1
    """The place in its group, before the alphabetical one."""
    summary: bool = True
    """Whether it is one of the numbers of the paper, which the report begins with."""
    command: str | None = "train"
    """`train`, or what is done with the runs that it uses; None: they are all that it needs."""
    uses: list[str] = dataclasses.field(default_factory=list)
    """The experiments whose runs it needs."""
    models: int = 1
    """How many models, of as many seeds, are tested together; 1: no ensemble."""
    smoke: list[str] = dataclasses.field(default_factory=list)
    """Overrides of `capsrun train` that only the budget `smoke` needs."""
    paper: Published | None = None
    public: list[Published] = dataclasses.field(default_factory=list)
    """Public re-implementations."""
    note: str | None = None


def settings_for(schema: type[Config], cfg: Any) -> Config:
    """The settings of a command, composed, without what a choice says for another purpose.

    That is what is told about an experiment, and when a recipe stops, where nothing is trained.
    """
    names = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    kept = [key for key in cfg if key in names or key not in ("experiment", "stop")]
    return from_dict(schema, OmegaConf.masked_copy(cfg, kept))


def training_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of `capsrun train` with these overrides. Raises UserError for a mistake."""
    return settings_for(TrainConfig, compose("train", overrides))


class Experiments:
    """The experiments, each read or composed once."""

    def __init__(self) -> None:
        self._about: dict[str, Experiment] = {}
        self._composed: dict[tuple[str, ...], Any] = {}

    def names(self) -> list[str]:
        """Every experiment."""
        return experiment_names()

    def about(self, name: str) -> Experiment:
        """What is told about one."""
        if name not in self._about:
            file = OmegaConf.load(configs_dir() / "experiment" / f"{name}.yaml")
            self._about[name] = from_dict(Experiment, file.experiment)
        return self._about[name]

    def training(self, overrides: Sequence[str]) -> TrainConfig:
        """The run that `capsrun train` makes of these overrides."""
        key = ("train", *overrides)
        if key not in self._composed:
            self._composed[key] = training_config(overrides)
        return self._composed[key]

    def tested(self, arguments: Sequence[str]) -> EvalConfig | None:
        """What `capsrun eval …` tests; None for another command."""
        if arguments[0] != "eval":
            return None
        key = tuple(arguments)
        if key not in self._composed:
            self._composed[key] = from_dict(EvalConfig, compose("eval", arguments[1:]))
        return self._composed[key]
