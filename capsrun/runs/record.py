"""What a run leaves behind: its folder, `result.json`, `metrics.jsonl`, TensorBoard."""

import contextlib
import glob
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter

from capsrun.disk import (
    LOCK,
    locked,
    read_json,
    read_yaml,
    refuse_if_locked,
    remove_leftovers,
    replacing,
)
from capsrun.errors import Busy, UserError
from capsrun.runs.checkpoint import FILE_NAME, read_checkpoint
from capsrun.runs.reader import check_result
from capsrun.settings import differing_keys, role


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write indented JSON, with lists of numbers on one line."""
    text = json.dumps(values, indent=2, ensure_ascii=False)
    text = re.sub(r"\[[\d\s.,e+-]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n")


def make_folder(folder: Path) -> None:
    """Make a folder to write to. Raises UserError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # permissions alone do not tell: the file system may be read-only or full
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written to: {error.strerror}") from error


@contextlib.contextmanager
def output(folder: Path) -> Iterator[None]:
    """Make a folder for what a command finds out about a run, and be the only one to write to it.

    Raises UserError for a run's own folder, and Busy while another process writes to this one.
    """
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder} is the folder of a training run; choose another out_dir=…")
    make_folder(folder / "pictures")
    with locked(folder / LOCK):
        clean(folder)
        yield


def clean(folder: Path) -> None:
    """Delete what a killed process left half-written in a folder with pictures."""
    remove_leftovers(folder)
    remove_leftovers(folder / "pictures")


class RunFolder:
    """The folder of one training run, which is resumed, left alone or refused when it exists.

    `config.yaml` says which run it is; `result.json` is there once the run is finished.
    """

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        """Look at `path` for the run that `config` describes; nothing is written yet.

        Raises UserError when the folder belongs to a run with other settings.
        """
        self.path, self.config = path, config
        self.pictures = path / "pictures"
        self.checkpoint = path / FILE_NAME
        self._config_file = path / "config.yaml"
        self._lock = contextlib.ExitStack()
        if self._config_file.exists():
            self._refuse_other_settings(self._config_file)
        elif self.checkpoint.exists() or (path / "result.json").exists():
            raise UserError(
                f"{path} holds results but no config.yaml that says of which settings; choose "
                "another name=…, or move that folder away"
            )

    def refuse_if_used(self) -> None:
        """Raise Busy, naming it, where another process is at work on this run."""
        refuse_if_locked(self.path / LOCK)

    def make(self) -> None:
        """Make the folder, and be the only process that writes to it, until `release`.

        Raises UserError when it cannot be written, and Busy when another process writes to it.
        """
        make_folder(self.path)
        self._lock.enter_context(locked(self.path / LOCK))
        if (self.path / "result.json").exists():  # since this process looked for it
            raise Busy(f"{self.path} has been finished by another process just now")
        make_folder(self.pictures)
        clean(self.path)
        if not self._config_file.exists():
            with replacing(self._config_file) as temporary:
                temporary.write_text(OmegaConf.to_yaml(self.config))

    def tidy(self) -> None:
        """Delete what a process left that was killed when the run was finished, if that may be."""
        with contextlib.suppress(Busy, OSError), locked(self.path / LOCK):
            clean(self.path)

    def release(self) -> None:
        """Let other processes write to the folder."""
        self._lock.close()

    def _refuse_other_settings(self, config_file: Path) -> None:
        try:
            before = read_yaml(config_file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{config_file} is damaged; move the folder away to start anew"
            ) from error
        if not isinstance(before, dict) or self.config.keys() - before.keys():
            raise UserError(f"{config_file} is damaged; move the folder away to start anew")
        different = [
            f"{key} (there {theirs}, now {ours})"
            for key, theirs, ours in differing_keys(
                before,
                self.config,
            )
            if role(key).resume
        ]
        if different:
            raise UserError(
                f"{self.path} holds a run with other settings: {', '.join(different)}; "
                "choose another name=…, or move that folder away"
            )

    def result(self) -> dict[str, Any] | None:
        """What the run found, or None while it is not finished."""
        file = self.path / "result.json"
        try:
            if not os.path.lexists(file):
                return None
            values = read_json(file)
            check_result(values)
            if values["command"] != "train":
                raise ValueError("is of another command")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is damaged; delete it to make it again") from error
        return values

    def unfinished(self) -> dict[str, Any] | None:
        """The last checkpoint of an interrupted run, or None for one that has to begin."""
        if not self.checkpoint.exists():
            return None
        try:
            checkpoint = read_checkpoint(self.checkpoint)
        except UserError as error:
            raise UserError(f"{error}; delete it to train from the start") from error
        if not {"precision", "metrics_bytes"} <= checkpoint.keys():
            raise UserError(f"{self.checkpoint} is incomplete; delete it to train from the start")
        return checkpoint

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_json(self.path / "result.json", result)


class Recorder:
    """Writes a run's numbers and pictures to `metrics.jsonl` and TensorBoard."""

    def __init__(self, folder: Path, step: int = 0, saved: Mapping[str, Any] | None = None) -> None:
        """Open the records of a run that goes on after `step`; what came later is dropped.

        saved: what `position()` gave when that step was saved; None: it begins.
        """
        self.board_folder = folder / "tensorboard"
        saved = saved or {"metrics_bytes": 0, "event_bytes": {}}
        if "event_bytes" in saved:  # else it is of an earlier version
            cut_events(self.board_folder, saved["event_bytes"])
        # A line is written as a whole, so who reads it meanwhile sees no half.
        self.stream = open(folder / "metrics.jsonl", "a", buffering=1)
        self.stream.truncate(min(saved["metrics_bytes"], self.stream.tell()))
        self.stream.seek(0, os.SEEK_END)
        self.board = SummaryWriter(str(self.board_folder), purge_step=step + 1)

    def position(self) -> dict[str, Any]:
        """Where the records end, in bytes, to be saved with a checkpoint."""
        self.flush()
        sizes = {path.name: path.stat().st_size for path in event_files(self.board_folder)}
        return {"metrics_bytes": self.stream.tell(), "event_bytes": sizes}

    def begin(self, total_steps: int) -> None:
        """Say how long the run is to be, at once: `capsrun list` shows it while the run goes on."""
        self.stream.write(json.dumps({"step": 0, "total_steps": total_steps}) + "\n")
        self.stream.flush()

    def numbers(self, step: int, values: Mapping[str, float], on_board: bool = True) -> None:
        """Record numbers by name; `a/b` puts b into TensorBoard's section a.

        on_board: whether TensorBoard gets them too; see `is_shown`.
        """
        self.stream.write(json.dumps({"step": step, **values}) + "\n")
        if not on_board:
            return
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, figure: Figure) -> None:
        """Record a figure in TensorBoard."""
        self.board.add_figure(name, figure, step)

    def flush(self) -> None:
        self.stream.flush()
        self.board.flush()

    def close(self) -> None:
        self.stream.close()
        self.board.close()


def event_files(folder: Path) -> list[Path]:
    """The files in which TensorBoard finds what a run recorded, not what was made of it later."""
    return [path for path in folder.glob("events.out.tfevents.*") if ".capsrun-" not in path.name]


def cut_events(folder: Path, sizes: Mapping[str, int]) -> None:
    """Take TensorBoard's files back to the sizes that they had, so that no step is there twice."""
    for path in event_files(folder):
        if path.name in sizes:
            os.truncate(path, min(sizes[path.name], path.stat().st_size))
        else:
            path.unlink()


def is_shown(step: int, every: int, steps: int, most: int) -> bool:
    """Whether TensorBoard gets what is recorded after this step.

    every: after how many steps something is recorded. steps: of the whole run. most: how many of
    these TensorBoard gets, evenly spaced; the last step's comes on top. So its files stay small in
    a long run, and a resumed run writes what the straight one would have written.
    """
    spacing = every * max(1, math.ceil(steps / (every * most)))
    return step % spacing == 0 or step >= steps


def show_in_tensorboard(folder: Path, key: str, drawn: Mapping[str, Figure]) -> None:
    """Put figures into `folder/tensorboard` by name, in place of earlier ones of the same key."""
    suffix = f".capsrun-{key}"
    for old in (folder / "tensorboard").glob(f"events.out.tfevents.*{glob.escape(suffix)}"):
        old.unlink()
    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=suffix) as board:
        for name, figure in drawn.items():
            board.add_figure(name, figure)
