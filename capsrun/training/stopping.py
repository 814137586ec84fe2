"""What ends a run before its last step: an accuracy that is reached, or no progress any more."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from capsrun.config import StopConfig
from capsrun.terminal import counted
from capsrun.training.metrics import Score


def reaches_target(stop: StopConfig, scores: Mapping[str, Score]) -> bool:
    """Whether there is an accuracy at which to stop, and the images that decide are so far."""
    if stop.accuracy_percent is None:
        return False
    score = scores[stop.on]
    # Counted in images, so that 99.23 % of 10,000 is 9,923 and no rounding decides.
    needed = math.ceil(stop.accuracy_percent * score.count / 100 - 1e-6)
    return score.count - score.errors >= needed


def is_out_of_patience(stop: StopConfig, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `stop.patience` evaluations erred no less on held-out images than before.

    rows: what was recorded so far.
    """
    if stop.patience is None:
        return False
    key = "error_percent/validation"
    errors = [row[key] for row in rows if key in row]
    before, last = errors[: -stop.patience], errors[-stop.patience :]
    return bool(before) and min(last) >= min(before)


def how_it_stopped(
    stop: StopConfig, scores: Mapping[str, Score], ended: bool
) -> dict[str, Any] | None:
    """What was to stop a run, and whether that came, for `result.json`; None: nothing was to.

    scores: of the last step. ended: whether an evaluation has ended the run.
    """
    if stop.accuracy_percent is not None:
        # What an evaluation has decided stays, should the last test differ by a rounding.
        reached = ended or reaches_target(stop, scores)
        return {"accuracy_percent": stop.accuracy_percent, "on": stop.on, "reached": reached}
    if stop.patience is not None:
        return {"patience": stop.patience, "on": "validation", "reached": ended}
    return None


def stopped_line(stopped: Mapping[str, Any]) -> str:
    """What `result.json` says about it, as a sentence."""
    length = f"{counted(stopped['steps'], 'step')} ({stopped['epochs']:.2f} epochs)"
    if "patience" in stopped:
        tests = counted(stopped["patience"], "evaluation")
        better = f"{tests} in a row erred no less on held-out images"
        return f"stopped after {length}: {better}" if stopped["reached"] else f"made all {length}"
    target = f"{stopped['accuracy_percent']:g} % on the {stopped['on']} images"
    if stopped["reached"]:
        return f"stopped after {length}, which reached {target}"
    return f"{target} was not reached in {length}"
