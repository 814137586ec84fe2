"""Where the YAML files are: capsrun's, and those of a folder of one's own (`--config-dir`).

Nothing here knows Hydra, which composes them.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from capsrun.disk import MOST_YAML_BYTES
from capsrun.errors import UserError

# The groups that experiments are in, with their titles in the report.
GROUPS = {
    "table1": "Table 1: MNIST",
    "multimnist": "Table 1: MultiMNIST",
    "affnist": "Padded MNIST and affNIST (§5.2)",
    "section7": "Other data sets (§7)",
    "figures": "Figures",
    "ablations": "What the number depends on",
    "own": "Experiments of your own",
}
OPTION = re.compile(r"(?:--config-d(?:ir?)?|-cd)(?:=(.*))?", re.DOTALL)
# What Hydra takes as a choice, and nobody for a number or a flag.
NAME = re.compile(
    r"(?!(true|false|null|inf|nan|[-+]?[\d_.]+(e[-+]?[\d_]+)?)$)[\w.+-]+", re.ASCII | re.IGNORECASE
)
# The folder of `--config-dir` while a command runs that has one, as it was typed.
_own: list[Path] = []


def configs_dir() -> Path:
    """Where those of capsrun are: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def own_dir() -> Path | None:
    """The folder of `--config-dir`; None without one."""
    return _own[0] if _own else None


def own_option() -> list[str]:
    """What tells another command of that folder."""
    return ["--config-dir", str(_own[0])] if _own else []


def use_own_dir(folder: Path | None) -> None:
    """Let a folder's files count beside capsrun's from now on; None: no folder's.

    Raises UserError where it is no folder, or a file there has the name of another one of capsrun.
    """
    _own.clear()
    if folder is None:
        return
    if not folder.is_dir():
        raise UserError(f"--config-dir: there is no folder {folder}")
    groups = [path.name for path in configs_dir().iterdir() if path.is_dir()]
    for path in sorted(path for group in groups for path in folder.glob(f"{group}/*.yaml")):
        if not path.is_file() or path.stat().st_size > MOST_YAML_BYTES:
            raise UserError(f"{path} is no file of settings")  # but a pipe, say
        if not NAME.fullmatch(path.stem):
            raise UserError(
                f"{path}: such a name cannot be chosen; give it letters, digits, - and _, and none "
                "of a number or a flag"
            )
        ours = configs_dir() / path.relative_to(folder)
        if ours.exists() and ours.read_bytes() != path.read_bytes():
            group, name = path.parent.name, path.stem
            raise UserError(
                f"{path}: capsrun has a {group}={name} that is another one; give yours another name"
            )
    _own.append(folder)


def without_config_dir(arguments: Sequence[str]) -> list[str]:
    """The words of a command but for `--config-dir DIR`, whose files count from now on.

    Raises UserError as `use_own_dir` does.
    """
    rest: list[str] = []
    folder: str | None = None
    words = iter(arguments)
    for word in words:
        if (option := OPTION.fullmatch(word)) is None:
            rest.append(word)
        elif not (folder := option[1] if option[1] is not None else next(words, "")):
            raise UserError(f"{word} needs a folder: --config-dir FOLDER")
    use_own_dir(None if folder is None else Path(os.path.expanduser(folder)))
    return rest


def choices_of(group: str) -> list[str]:
    """The files of a group, capsrun's and one's own, in alphabetical order."""
    folders = [folder / group for folder in (configs_dir(), *_own)]
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def path_of(group: str, choice: str) -> Path:
    """The file of a choice."""
    file = Path(group, f"{choice.removesuffix('.yaml')}.yaml")
    ours = configs_dir() / file
    return _own[0] / file if _own and not ours.exists() else ours


def chosen_files(words: Iterable[str]) -> list[Path]:
    """The files of one's own that some words choose, each before those that it inherits.

    Raises UserError, naming file and line, for one that is damaged.
    """
    found: dict[Path, None] = {}
    groups = {path.parent.name for folder in _own for path in folder.glob("*/*.yaml")}
    wanted = [
        (group.lstrip("+"), choice.strip("'\""))
        for group, _, values in (word.partition("=") for word in words)
        for choice in values.split(",")
    ]
    while wanted:
        group, choice = wanted.pop(0)
        if group not in groups:
            continue
        path = path_of(group, choice)
        if path not in found and path.is_relative_to(_own[0]) and path.exists():
            found[path] = None
            keys_of(path)  # which raises what there is to say
            wanted += inherited(path)
    return list(found)


def inherited(path: Path) -> Iterator[tuple[str, str]]:
    """`(group, choice)` of everything that a file's list of defaults names."""
    import yaml

    for entry in (yaml.safe_load(path.read_bytes()) or {}).get("defaults") or []:
        if isinstance(entry, dict):  # of another group
            for key, choice in entry.items():
                yield str(key).split()[-1].partition("@")[0].lstrip("/"), str(choice)
        else:
            yield path.parent.name, str(entry).partition("@")[0]


def inherited_by(group: str, choice: str, words: Iterable[str]) -> str:
    """File and line in which one of one's own, chosen by these words, names a choice; else ''."""
    for path in chosen_files(words):
        if (group, choice) in inherited(path):
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            return f"{path}, line {next(n for n, line in lines if choice in line)}: "
    return ""


def keys_of(path: Path) -> list[tuple[str, int]]:
    """`(setting, with dots, and its line)` of all that a file says.

    Raises UserError, naming the line, for what is no YAML, or is not written as `key: value`.
    """
    import yaml

    def walk(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
        said = set()
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in said:
                raise UserError(f"{path}, line {line}: {name} is there a second time")
            said.add(name)
            yield name, line
            if isinstance(value, yaml.MappingNode):
                yield from walk(value, f"{name}.")

    content = path.read_bytes()
    try:
        text = content.decode()
        root = yaml.compose(text, yaml.SafeLoader)
        yaml.safe_load(text)  # which sees more
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: this is not UTF-8; save it in that encoding"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else path
        raise UserError(f"{where}: {error.problem}") from None
    except yaml.YAMLError as error:  # a character that no text has
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        raise UserError(f"{path}, line {line}: settings are written as `key: value`")
    is_global = re.search(r"^#\s*@package\s+_global_", text, re.MULTILINE)
    try:
        return list(walk(root, "" if is_global else f"{path.parent.name}."))
    except RecursionError:
        raise UserError(f"{path}: a part of it holds itself, by an alias") from None


def with_place(message: str, files: Iterable[Path], words: Iterable[str] = ()) -> str:
    """What is wrong, after the file of one's own and the line that say so, where one does.

    words: of the command line, which overrule the files.
    """
    named = set(re.findall(r"\w+(?:\.\w+)*", message))
    said = {word.partition("=")[0].lstrip("+") for word in words}
    for path in files:
        if re.fullmatch(rf"setting {path.parent.name}\.\w+ has no value", message):
            rest = "takes what is not said from another file"
            return f"{path}: {message}; `defaults: [OTHER, _self_]` {rest}"
        for key, line in keys_of(path):
            if named & {key, key.removeprefix("experiment.")} and key not in said:
                return f"{path}, line {line}: {message}"
    return message
