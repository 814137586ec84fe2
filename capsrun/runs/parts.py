"""On what the steps of a run were computed, where it was interrupted and went on elsewhere.

A part is a dict: `first_step` and `last_step` (from 1, both included), `device`, `precision`,
`processes`, `versions` and `git_commit`. Parts lie without a gap; neighbours differ in what they
say of.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Part = dict[str, Any]

SAID = ("device", "precision", "processes", "versions", "git_commit")


def are_parts(values: Any) -> bool:
    """Whether what somebody saved is a list of parts."""
    return isinstance(values, list) and all(
        isinstance(part, dict)
        and {"first_step", "last_step", "device", "precision", "versions", "git_commit"}
        <= part.keys()
        and type(part["first_step"]) is type(part["last_step"]) is int
        and isinstance(part["versions"], dict)
        and all(type(word) is str for pair in part["versions"].items() for word in pair)
        for part in values
    )


def extended(parts: Sequence[Part], step: int, provenance: Mapping[str, Any]) -> list[Part]:
    """The parts of a run after `step`, whose last steps were computed as `provenance` says.

    parts: as they were when these steps began. Where nothing differs no new part begins, so a run
    that was interrupted on the same machine has the parts of one that was not.
    """
    done = parts[-1]["last_step"] if parts else 0
    if step <= done:
        return list(parts)
    said = {key: provenance[key] for key in SAID}
    if parts and not differences(parts[-1], said):
        return [*parts[:-1], {**parts[-1], "last_step": step}]
    return [*parts, {"first_step": done + 1, "last_step": step, **said}]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What may change the numbers, as `torch 2.8.0 (before: 2.7.1)`."""
    ours, theirs = _named(now), _named(before)
    names = dict.fromkeys([*theirs, *ours])
    return [
        f"{name} {ours.get(name, 'unknown')} (before: {theirs.get(name, 'unknown')})"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _named(part: Mapping[str, Any]) -> dict[str, str]:
    """What is compared; of Python's version only what is not a repair."""
    named = {name: part[name] or "unknown" for name in ("device", "precision")}
    named["processes"] = str(part.get("processes") or "unknown")
    named |= part["versions"]
    if "python" in named:
        named["python"] = ".".join(named["python"].split(".")[:2])
    return named | {"commit": part["git_commit"] or "unknown"}


def changes(parts: Sequence[Part]) -> list[str]:
    """A sentence for each time that a run went on in a way in which its numbers may differ."""
    return [
        f"after step {before['last_step']:,} the run went on with "
        f"{', '.join(differences(before, now))}, which may change its numbers"
        for before, now in itertools.pairwise(parts)
        if before["device"] is not None
    ]


def changes_now(parts: Sequence[Part], provenance: Mapping[str, Any]) -> list[str]:
    """The sentence about a run that goes on as `provenance` says, if there is any."""
    if not parts:
        return []
    return changes(extended(parts[-1:], parts[-1]["last_step"] + 1, provenance))


def of_checkpoint(checkpoint: Mapping[str, Any]) -> list[Part]:
    """The parts of an interrupted run.

    In a checkpoint from before they were kept there is one, of which only the precision is known.
    """
    if "parts" in checkpoint or not checkpoint["step"]:
        return checkpoint.get("parts", [])
    known: Part = {"first_step": 1, "last_step": checkpoint["step"], "device": None}
    return [known | {"precision": checkpoint["precision"], "versions": {}, "git_commit": None}]
