"""Records the numbers and pictures of a run: `metrics.jsonl` and TensorBoard."""

import glob
import json
import math
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from capsrun.disk import refuse_unless_plain
from capsrun.runs.reader import METRICS, read_metrics
from capsrun.settings import deciding


class Recorder:
    """Writes a run's numbers and pictures to `metrics.jsonl` and TensorBoard."""

    def __init__(self, folder: Path, steps: int, step: int = 0, metrics_bytes: int = 0) -> None:
        """Open the records of a run of `steps`, after `step` of them; what came later is dropped.

        metrics_bytes: what `metrics_bytes` gave when that step was saved.
        Raises UserError where `metrics.jsonl` is a link, which could be to any file.
        """
        refuse_unless_plain(folder / METRICS)
        # A line is written as a whole, so who reads it meanwhile sees no half.
        self.stream = open(folder / METRICS, "a", encoding="utf-8", buffering=1)
        self.stream.truncate(min(metrics_bytes, self.stream.tell()))
        self.stream.seek(0, os.SEEK_END)
        if step == 0:  # `capsrun list` shows how long the run is to be while it goes on
            self.stream.write(json.dumps({"step": 0, "total_steps": steps}) + "\n")
            # An end before the first checkpoint left records: TensorBoard would purge its numbers
            # and pictures as below, but show the texts of both.
            remove_events(folder)
        # TensorBoard forgets what it has of `step` and of later ones: of `step` too, as a test may
        # have been made after it was saved. What was saved of it is written again.
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for row in read_metrics(folder) if step else []:
            if row.pop("step") == step:
                self._show(step, row)

    def metrics_bytes(self) -> int:
        """Where `metrics.jsonl` ends, to be saved with a checkpoint."""
        self.flush()
        return self.stream.tell()

    def settings(self, config: Mapping[str, Any]) -> None:
        """Put the settings of a run that begins into TensorBoard: all of them as text, and those
        that decide what comes out as HParams, by which it compares runs.

        It is not told which HParams and metrics there are: it would take one run's for those of
        all, where it else collects them, and shows in which settings the runs differ.
        """
        self.board.add_text("configuration", textwrap.indent(OmegaConf.to_yaml(config), "    "))
        decide = {"model.name": config["model"]["name"], **deciding(config)}
        shown = {
            key: value if isinstance(value, float) else value.strip("'")
            for key, value in decide.items()
            if value != "None"
        }
        _, begun, _ = hparams({**shown, "seed": config["seed"]}, {})
        self.board.file_writer.add_summary(begun)  # type: ignore[attr-defined]

    def finished(self) -> None:
        """Let TensorBoard's HParams say that the run has succeeded."""
        *_, ended = hparams({}, {})
        self.board.file_writer.add_summary(ended)  # type: ignore[attr-defined]

    def numbers(self, step: int, values: Mapping[str, float], on_board: bool = True) -> None:
        """Record numbers by name; `a/b` puts b into TensorBoard's section a.

        on_board: whether TensorBoard gets them too; see `is_shown`.
        """
        known = {name: value for name, value in values.items() if math.isfinite(value)}
        self.stream.write(json.dumps({"step": step, **known}) + "\n")
        if on_board:
            self._show(step, values)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, pixels_HWC: np.ndarray) -> None:
        """Record a picture in TensorBoard: colours, uint8."""
        self.board.add_image(name, pixels_HWC, step, dataformats="HWC")

    def flush(self) -> None:
        self.stream.flush()
        self.board.flush()

    def close(self) -> None:
        self.stream.close()
        self.board.close()


def is_shown(step: int, every: int, steps: int, most: int) -> bool:
    """Whether TensorBoard gets what is recorded after this step.

    every: after how many steps something is recorded. steps: of the whole run. most: how many of
    these TensorBoard gets, evenly spaced; the last step's comes on top. So its files stay small in
    a long run, and a resumed run writes what the straight one would have written.
    """
    spacing = every * max(1, math.ceil(steps / (every * most)))
    return step % spacing == 0 or step >= steps


def show_in_tensorboard(folder: Path, key: str, drawn: Mapping[str, np.ndarray]) -> None:
    """Put pictures into `folder/tensorboard` by name, in place of earlier ones of the same key."""
    suffix = f".capsrun-{key}"
    remove_events(folder, suffix)
    with SummaryWriter(str(folder / "tensorboard"), filename_suffix=suffix) as board:
        for name, pixels_HWC in drawn.items():
            board.add_image(name, pixels_HWC, dataformats="HWC")


def remove_events(folder: Path, suffix: str = "") -> None:
    """Remove TensorBoard's files in `folder/tensorboard` whose names end with the suffix."""
    for old in (folder / "tensorboard").glob(f"events.out.tfevents.*{glob.escape(suffix)}"):
        old.unlink()
