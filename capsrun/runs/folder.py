"""What a run is on disk: its folder, which one process at a time writes to."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsrun import disk
from capsrun.errors import Busy, UserError
from capsrun.runs import segments
from capsrun.runs.checkpoint import FILE_NAME, read_checkpoint
from capsrun.runs.reader import CONFIG, METRICS, RESULT, read_result
from capsrun.settings import differing_keys, role

# What a command leaves of what it finds out about a run.
OUTPUT = (RESULT, "index.html", "predictions.csv", "pictures/*")
# What a checkpoint holds of an unfinished run beside what makes a model of it.
TO_GO_ON = {"precision": str, "metrics_bytes": (int, 0), "parts": [segments.SHAPE]}
TO_GO_ON["init_md5?"] = str
# What `train` leaves in its folder beside the checkpoint, the settings and the result.
RUN = ("index.html", METRICS, "pictures/*", "tensorboard/*")


@contextlib.contextmanager
def output(folder: Path) -> Iterator[None]:
    """Make a folder for what a command finds out about a run, and be the only one to write to it.

    Raises UserError for a run's own folder, and Busy while another process writes to this one.
    """
    found = read_result(folder / RESULT)
    if (folder / CONFIG).exists() or (found is not None and found.command == "train"):
        raise UserError(f"{folder} is the folder of a training run; {disk.ELSEWHERE}")
    # A result that was copied is without its lock.
    with disk.own_folder(folder, *(OUTPUT if found is None else ())):
        disk.make_folder(folder / "pictures")
        clean(folder)
        yield


def clean(folder: Path) -> None:
    """Delete what a killed process left half-written in a folder with pictures."""
    disk.remove_leftovers(folder)
    disk.remove_leftovers(folder / "pictures")


class RunFolder:
    """The folder of one training run, which is resumed, left alone or refused when it exists.

    `config.yaml` says which run it is; `result.json` is there once the run is finished.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Nothing is read or written yet. config: the `TrainConfig` as a dict."""
        self.path, self.config = path, config
        self.pictures = path / "pictures"
        self.checkpoint = path / FILE_NAME
        self._lock = contextlib.ExitStack()
        self.is_held: Callable[[], bool] = lambda: True
        """Whether the folder is still the one that was opened; see `disk.locked`."""

    def result(self) -> dict[str, Any] | None:
        """What the run found, or None while it is not finished; nothing is written.

        Raises UserError for a damaged result and where the folder is of a run with other settings,
        and Busy, naming it, where another process is at work on this run.
        """
        self._refuse_other_settings()
        file = self.path / RESULT
        if not os.path.lexists(file):
            disk.refuse_if_locked(self.path / disk.LOCK)
            return None
        if not os.access(file, os.R_OK):
            raise UserError(f"{file} cannot be read, by this user at least")
        found = read_result(file)
        if found is None or found.command != "train":
            raise UserError(f"{file} is damaged; delete it to make it again")
        return found.values

    def _refuse_other_settings(self) -> None:
        file = self.path / CONFIG
        if not file.exists():
            if self.checkpoint.exists() or (self.path / RESULT).exists():
                raise UserError(
                    f"{self.path} holds results but no config.yaml that says of which settings; "
                    "choose another name=…, or move that folder away"
                )
            disk.refuse_foreign(self.path, RUN, "choose another name=…")
            return
        try:
            before = disk.read_yaml(file)
            if not isinstance(before, dict):
                raise ValueError("holds no settings")
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{file} is damaged; move the folder away to start anew") from error
        if different := self._differing(before):
            raise UserError(
                f"{self.path} holds a run with other settings: {different}; "
                "choose another name=…, or move that folder away"
            )

    def _differing(self, before: dict[str, Any]) -> str:
        """The settings that make another run of it than one that was begun; maybe empty."""
        return ", ".join(
            f"{key} (there {theirs}, now {ours})"
            for key, theirs, ours in differing_keys(before, self.config)
            if role(key).resume
        )

    def open(self) -> dict[str, Any] | None:
        """Make the folder, and be the only process that writes to it, until `close`.

        Returns the last checkpoint of an interrupted run, or None for one that has to begin.
        Raises UserError when the folder cannot be written or the checkpoint cannot be used, and
        Busy when another process writes to it.
        """
        disk.make_folder(self.path)
        self.is_held = self._lock.enter_context(disk.locked(self.path / disk.LOCK))
        if (self.path / RESULT).exists():  # since this process looked for it
            raise Busy(f"{self.path} has been finished by another process just now")
        disk.make_folder(self.pictures)
        clean(self.path)
        if not (self.path / CONFIG).exists():
            disk.write_file(self.path / CONFIG, OmegaConf.to_yaml(self.config))
        if not self.checkpoint.exists():
            return None
        try:
            found = read_checkpoint(self.checkpoint, TO_GO_ON)
            if different := self._differing(found["config"]):
                raise UserError(f"{self.checkpoint} is of a run with other settings: {different}")
        except UserError as error:
            raise UserError(f"{error}; delete it to train from the start") from error
        return found

    def tidy(self) -> None:
        """Delete what a process left that was killed when the run was finished, if that may be."""
        with contextlib.suppress(Busy, OSError), disk.locked(self.path / disk.LOCK):
            clean(self.path)

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.close()
