"""What `capsrun COMMAND --help` prints: what the command does, its choices and its settings.

What a setting means is the comment beside it in `configs/`, and what it may be its field's limits.
"""

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from capsrun.compose import choices_made, compose, group_choices, schema_of
from capsrun.fields import limits_of
from capsrun.settings import written
from capsrun.terminal import BOLD, styled
from capsrun.yaml_files import configs_dir, inherited, path_of

WIDTH, FIRST_COLUMN = 100, 32
KEY = re.compile(r"( *)\"?([\w]+)\"?:(?: (.*?))??(?:\s+# (.*))?")
# Choices that are taken as they are.
WHOLE = ("experiment", "sweep", "budget", "queue")
MORE = re.compile(r"\s{6,}# (.*)")


def command_help(command: str, summary: str, example: str, words: Sequence[str]) -> str:
    """All of it. words: choices and settings, whose consequences it shows.

    Raises UserError for a mistake in them.
    """
    composed: Any = OmegaConf.to_container(compose(command, words), resolve=True)
    chosen = choices_made(command, words)
    meanings = comments_of(configs_dir() / f"{command}.yaml", "")
    meanings |= comments_of(configs_dir() / "common.yaml", "")
    groups = group_choices(command)
    takes = "IMAGE|FOLDER … " if command == "predict" else ""
    lines = [f"Usage: capsrun {command} {takes}[key=value …]: {summary}", f"  {example}"]
    lines += ["", styled("Choices:", BOLD)] if groups else []
    for group, choices in groups.items():
        now = f" ({chosen[group]})" if chosen.get(group) else ""
        lines += row(group + now, ", ".join(choices))
    sections: dict[str, list[str]] = {"Settings:": []}
    for group, choice in chosen.items():
        path = path_of(group, choice)
        meanings |= comments_of(path, group)
        sections[f"Of {group}={choice}: {what_it_is(path)}"] = []
    titles = {title.partition("=")[0].removeprefix("Of "): title for title in sections}
    titles["routing"] = titles.get("model", "")
    for key, value in flattened(composed):
        title = titles.get(key.partition(".")[0], "Settings:")
        said = meanings.get(key, "")
        limits = limits_of(schema_of(command), key)
        if not limits:  # a whole part of the configuration, which there is not: a CNN's routing
            continue
        if not all(word in said for word in re.findall(r"\w+", limits)):
            said = f"{said} ({limits})" if said else limits
        sections[title] += row(f"{key}={written(value)}", said)
    for title, rows in sections.items():
        lines += ["", styled(title, BOLD), *rows]
    lines += ["", "Several values, as in seed=0,1,2, and --multirun make a run of each."]
    lines += ["The rest is Hydra: --cfg job prints the configuration, --info how it came about."]
    return "\n".join(lines)


def row(left: str, right: str) -> list[str]:
    """A line of two columns, or several where it is long."""
    width = min(shutil.get_terminal_size((WIDTH, 0)).columns, 2 * WIDTH)
    wrapped = textwrap.wrap(right, max(width - FIRST_COLUMN - 2, 30)) or [""]
    indent = " " * (FIRST_COLUMN + 2)
    head = [f"  {left}"] if len(left) >= FIRST_COLUMN else []
    first = indent if head else f"  {left:<{FIRST_COLUMN}}"
    return [*head, (first + wrapped[0]).rstrip(), *(indent + line for line in wrapped[1:])]


def flattened(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(key with dots, value)` of every setting that is one by itself, no part of a choice."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            if prefix + key not in WHOLE:
                yield from flattened(value, f"{prefix}{key}.")
        elif prefix + key not in WHOLE and not (prefix and key == "name"):
            yield prefix + key, value


def what_it_is(path: Path) -> str:
    """The comment that a file begins with, to the end of its first sentence."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[2:] for line in lines[:3] if re.match("# [^@]", line))
    return re.split(r"(?<=[^.]{4}\.) ", comment)[0]


def comments_of(path: Path, group: str) -> dict[str, str]:
    """The comments beside the settings of a file, by key with dots; what it inherits first."""
    found: dict[str, str] = {}
    for parent in (choice for other, choice in inherited(path) if other == group):
        file = path_of(group, parent)
        found |= comments_of(file, group) if file.exists() else {}
    text = path.read_text(encoding="utf-8")
    package = [] if "@package _global_" in text or not group else [group]
    open_keys: list[tuple[int, str]] = []
    last = ""
    for line in text.splitlines():
        if (key := KEY.fullmatch(line)) is not None:
            indent = len(key[1])
            open_keys = [(i, name) for i, name in open_keys if i < indent] + [(indent, key[2])]
            last = ".".join([*package, *(name for _, name in open_keys)])
            if key[4]:
                found[last] = key[4]
        elif (more := MORE.fullmatch(line)) is not None and last in found:
            found[last] += f" {more[1]}"
    return found
