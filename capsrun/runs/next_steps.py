"""What to do next: the commands that are suggested when one has done its work."""

import shlex
from collections.abc import Iterable, Sequence

from capsrun.config import CapsNetConfig, ModelConfig


def command(*words: str) -> str:
    """A command of capsrun as it is typed into a shell."""
    return shlex.join(["capsrun", *words])


def next_lines(commands: Iterable[str]) -> str:
    """The lines that suggest some commands, one on each, to be copied."""
    return "next: " + "\n      ".join(commands)


def uses_of_model(model: ModelConfig, words: Sequence[str]) -> list[str]:
    """The commands that look into a trained model, if it has capsules and a decoder to show them.

    words: what they are told to find its checkpoint and its images.
    """
    if not (isinstance(model, CapsNetConfig) and model.reconstruction):
        return []
    return [command("perturb", *words), command("explore", *words)]
