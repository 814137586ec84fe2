"""The rows and figures of the paper: what `configs/experiment/` says of each."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from capsrun.compose import compose
from capsrun.config import EvalConfig, TrainConfig
from capsrun.errors import UserError, did_you_mean
from capsrun.fields import setting
from capsrun.settings import Config, from_dict
from capsrun.yaml_files import (
    GROUPS,
    choices_of,
    chosen_files,
    keys_of,
    own_dir,
    path_of,
    with_place,
)


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
    """What a file of `configs/experiment/`, or of one's own, says beside the settings of a run."""

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


def settings_for(schema: type[Config], cfg: Any, overrides: Sequence[str] = ()) -> Config:
    """The settings of a command, composed, without what a choice says for another purpose.

    That is what is told about an experiment, and when a recipe stops, where nothing is trained.
    overrides: what they were composed of. Raises UserError, naming a file of one's own that has it,
    for a mistake in them.
    """
    names = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    kept = [key for key in cfg if key in names or key not in ("experiment", "stop")]
    try:
        return from_dict(schema, OmegaConf.masked_copy(cfg, kept))
    except UserError as error:
        raise UserError(with_place(str(error), chosen_files(overrides), overrides)) from error


def training_config(overrides: Sequence[str] = ()) -> TrainConfig:
    """The settings of `capsrun train` with these overrides. Raises UserError for a mistake."""
    return settings_for(TrainConfig, compose("train", overrides), overrides)


@functools.cache
def defaults(*overrides: str) -> TrainConfig:
    """The same, composed once, for whoever does not change it."""
    return training_config(overrides)


class Experiments:
    """The experiments, each read or composed once."""

    def __init__(self) -> None:
        self._about: dict[str, Experiment] = {}
        self._composed: dict[tuple[str, ...], Any] = {}

    def names(self) -> list[str]:
        """Every experiment."""
        return choices_of("experiment")

    def is_own(self, name: str) -> bool:
        """Whether it is one of one's own; its file need not be right for that."""
        folder = own_dir()
        return folder is not None and path_of("experiment", name).is_relative_to(folder)

    def of_group(self, group: str) -> list[str]:
        """The experiments of a group, in alphabetical order."""
        if group == "own":
            return [name for name in self.names() if self.is_own(name)]
        known = [name for name in self.names() if not self.is_own(name)]
        return [name for name in known if self.about(name).group == group]

    def about(self, name: str) -> Experiment:
        """What is told about one; of one's own that need be nothing, not even its title.

        Raises UserError for a mistake in its file.
        """
        if name not in self._about:
            path = path_of("experiment", name)
            keys_of(path)  # which raises what there is to say of the file as a whole
            file: Any = OmegaConf.load(path)
            said = (file.get("experiment") or {}).items()
            said = {key: value for key, value in said if value is not None or key == "command"}
            # It is none of the paper's, whatever it says.
            own = {"group": "own", "summary": False} if self.is_own(name) else {}
            try:
                values = {"title": name, **said, **own}
                self._about[name] = from_dict(Experiment, OmegaConf.create(values))
                self._check_uses(self._about[name])
            except UserError as error:
                raise UserError(with_place(str(error), [path])) from error
        return self._about[name]

    def _check_uses(self, about: Experiment) -> None:
        """Raise UserError for an experiment that uses none, or one that does not exist."""
        if about.command != "train" and not about.uses:
            raise UserError(f"experiment.uses names no run for experiment.command={about.command}")
        for used in about.uses:
            if used not in self.names():
                hint = did_you_mean(used, self.names())
                raise UserError(f"experiment.uses names {used!r}, which is no experiment{hint}")

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
