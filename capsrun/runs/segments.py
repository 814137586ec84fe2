"""On what the steps of a run were computed, where it was interrupted and went on elsewhere.

A segment is a dict: `first_step` and `last_step` (from 1, both included), `device`, `precision`,
`processes`, `versions` and `git_commit`. Segments lie without a gap, and neighbours differ in more
than their steps. In `result.json` and in a checkpoint they are the `parts`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Segment = dict[str, Any]

# As `reader.check_shape` checks it.
SHAPE: dict[str, Any] = dict.fromkeys(("first_step", "last_step", "processes"), (int, 1))
SHAPE |= {"device": str, "precision": str, "versions": {"python": str}, "git_commit?": str}
SAID = ("device", "precision", "processes", "versions", "git_commit")


def extended(
    segments: Sequence[Segment], step: int, provenance: Mapping[str, Any]
) -> list[Segment]:
    """The segments of a run after `step`, whose last steps were computed as `provenance` says.

    segments: as they were when these steps began. Where nothing differs no new one begins, so a run
    that was interrupted on the same machine has the segments of one that was not.
    """
    done = segments[-1]["last_step"] if segments else 0
    if step <= done:
        return list(segments)
    said = {key: provenance[key] for key in SAID}
    if segments and not differences(segments[-1], said):
        return [*segments[:-1], {**segments[-1], "last_step": step}]
    return [*segments, {"first_step": done + 1, "last_step": step, **said}]


def changes(segments: Sequence[Segment]) -> list[str]:
    """A sentence for each time that a run went on in a way in which its numbers may differ."""
    return [
        f"after step {before['last_step']:,} the run went on with "
        f"{', '.join(differences(before, now))}, which may change its numbers"
        for before, now in itertools.pairwise(segments)
    ]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may change the numbers, as `torch 2.8.0 (before: 2.7.1)`."""
    theirs, ours = _compared(before), _compared(now)
    return [
        f"{name} {ours.get(name, 'unknown')} (before: {theirs.get(name, 'unknown')})"
        for name in dict.fromkeys([*theirs, *ours])
        if ours.get(name) != theirs.get(name)
    ]


def _compared(segment: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared, by name; of Python's version only what is not a repair."""
    versions = segment["versions"]
    return {
        **{name: segment[name] for name in ("device", "precision", "processes")},
        **versions,
        "python": versions["python"].rpartition(".")[0],
        "commit": segment.get("git_commit") or "unknown",
    }
