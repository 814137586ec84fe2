"""Tab completion for bash, zsh and fish: what is offered, and installing it.

argcomplete has the scripts for the shells and knows how each of them splits and quotes words; the
scripts run capsrun itself with the line in environment variables.
"""

import contextlib
import os
import re
import shlex
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from capsrun.compose import FLAGS, OPTIONS, group_choices, setting_names, setting_values
from capsrun.disk import MOST_TEXT_BYTES, read_bytes, replacing, write_file
from capsrun.errors import UserError, did_you_mean
from capsrun.names import SMALL
from capsrun.yaml_files import without_config_dir

SHELLS = ("bash", "zsh", "fish")
ACTIONS = ("install", "uninstall", *SHELLS)
# What argcomplete's scripts set when they want to know what comes next.
WANTED = "_ARGCOMPLETE"
# Settings that are paths, by the last part of their names, with the endings of the files that fit.
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
PATHS: dict[str, tuple[str, ...]] = {
    "checkpoint": (".pt",),
    "ensemble": (".pt",),
    "image": PICTURES,
    "images": PICTURES,
    "path": (".csv", ".gz", ".npz", ".parquet"),
    "csv": (".csv",),
    "init": (".pt",),
    "out": (".html",),
    "sources": (),
    "keep": (),
    "attack.source": (".pt",),  # that of a data set is none
}
# Only names that Hydra reads without quotes are offered.
PLAIN_NAME = re.compile(r"[\w.+@%~: -]+")
# At the end of the line that is added to a shell's own file, by which it is found again.
MARK = "# capsrun completion"
HELP = """capsrun completion [install|uninstall|bash|zsh|fish]

Lets the Tab key complete commands, settings, their choices and paths.

  capsrun completion install     for your shell ($SHELL); say bash, zsh or fish for another one
  capsrun completion uninstall   undo that
  capsrun completion bash        print the script, to be put where you like (so zsh, fish)"""


def answer_shell(commands: Sequence[str]) -> None:
    """Tell the shell whose script started this process what can come next, and end the process.

    commands: what can follow `capsrun`.
    """
    import argcomplete

    def complete(prefix: str, parsed_args: Namespace, **_: object) -> list[str]:
        return candidates([*parsed_args.words, prefix], commands)

    # Words with dashes are Hydra's business.
    parser = ArgumentParser(add_help=False, prefix_chars="\0")
    parser.add_argument("words", nargs="*").completer = complete  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser)


def candidates(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """What the last of the words after `capsrun`, maybe empty, can become."""
    *before, word = words
    if before and before[-1] in ("--config-dir", "-cd"):
        return paths(word, ())
    with contextlib.suppress(UserError):  # which the command itself will say
        before = without_config_dir(before)
    if not before:
        possible = [*commands, "--help", "--version"]
    elif before[0] == "completion":
        installs = len(before) == 2 and before[1] in ("install", "uninstall")
        possible = list(SHELLS if installs else ACTIONS if len(before) == 1 else ())
    elif before[0] not in commands:
        possible = []
    elif before[-1] in ("--cfg", "-c", "--info", "-i"):
        possible = list(OPTIONS["--cfg" if before[-1] in ("--cfg", "-c") else "--info"])
    elif word.startswith("-"):
        possible = [*OPTIONS, *FLAGS.get(before[0], ())]
    elif "=" in word:
        possible = values(before[0], word)
    else:
        possible = keys(before[0], before[1:])
        possible += paths(word, PICTURES) if before[0] == "predict" else []
    return [candidate for candidate in possible if candidate.startswith(word)]


def keys(command: str, before: Sequence[str]) -> list[str]:
    """The groups and settings of a command, but for those that were given a value before."""
    groups = group_choices(command)
    settings = setting_names(command, [w for w in before if w.partition("=")[0] in groups])
    # Not the sections, nor the names that choices have, nor what is said about an experiment.
    others = {*(name.rpartition(".")[0] for name in settings), *(f"{g}.name" for g in groups)}
    others |= {name for name in settings if name.startswith("experiment.")}
    given = {word.partition("=")[0] for word in before}
    names = dict.fromkeys([*groups, *(name for name in settings if name not in others)])
    return [f"{name}=" for name in names if name not in given]


def values(command: str, word: str) -> list[str]:
    """What a word that has a key can become; a list is closed after its last value."""
    key, _, value = word.partition("=")
    last = key if key in PATHS else key.rpartition(".")[2]
    is_path = last in PATHS or last.endswith("_dir")
    start, end = f"{key}=", "]" if value.startswith("[") else ""
    if end or not is_path:  # the last of a list, or of a sweep
        start += value[: 1 + max(value.rfind(sign) for sign in "[,")]
    if is_path:
        found = paths(word[len(start) :], PATHS.get(last, ()))
        found += [SMALL] if last in ("checkpoint", "init", "attack.source") else []
    elif key == "detect":
        found = [*group_choices(command)["dataset"], "noise"]
    else:
        found = group_choices(command).get(key) or setting_values(command, key)
    return [start + each + ("" if each.endswith("/") else end) for each in found]


def paths(start: str, endings: tuple[str, ...]) -> list[str]:
    """The folders, and files with these endings, whose paths begin so."""
    folder, slash, name = start.rpartition("/")
    found = []
    for entry in sorted(Path(os.path.expanduser(folder + slash) or ".").iterdir()):
        hidden = entry.name.startswith(".") and not name.startswith(".")
        if entry.name.startswith(name) and not hidden and PLAIN_NAME.fullmatch(entry.name):
            if entry.is_dir():
                found.append(f"{folder}{slash}{entry.name}/")
            elif entry.suffix.lower() in endings:
                found.append(f"{folder}{slash}{entry.name}")
    return found


def script(shell: str) -> str:
    """What a shell has to load."""
    import argcomplete

    code = argcomplete.shellcode(["capsrun"], shell=shell, complete_arguments=["-o", "nospace"])
    if shell == "zsh":  # whose own completion may not be on yet
        on = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }"
        return code.replace("\n", f"\n{on}\n", 1)
    return code


def places(shell: str) -> tuple[Path, Path | None]:
    """Where a shell's script goes, and the shell's own file that has to load it, if any has to."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    if shell == "bash":
        return data / "bash-completion/completions/capsrun", home / ".bashrc"
    if shell == "zsh":
        startup = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        return data / "zsh/site-functions/_capsrun", startup
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return config / "fish/completions/capsrun.fish", None


def install(shell: str) -> None:
    """Write a shell's script and see that the shell loads it; doing it again changes nothing."""
    file, startup = places(shell)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, script(shell))
    print(f"written: {file}")
    path = shlex.quote(str(file))
    if startup is not None:
        line = f"[ -r {path} ] && . {path}  {MARK}"
        if change_line(startup, line):
            print(f"added to {startup}: {line}")
        else:
            print(f"{startup} loads it already")
    print("undo: capsrun completion uninstall")
    if startup is not None:
        print(f"at once, in this one: . {path}")
    print(f"next: open a new {shell}, and type: capsrun train dataset=mn<Tab>")


def uninstall(shells: Sequence[str]) -> None:
    """Undo `install` for some shells."""
    found = False
    for file, startup in map(places, shells):
        if file.exists():
            file.unlink()
            print(f"deleted: {file}")
            found = True
        if startup is not None and startup.exists() and change_line(startup, None):
            print(f"taken out of {startup}: the line that loads it")
            found = True
    print("next: open a new terminal" if found else "no completion is installed")


def change_line(file: Path, line: str | None) -> bool:
    """Put our line at the end of a shell's file, or take it out; returns whether that changed it.

    The file is never half-written, keeps its owner, its permissions and every byte of its other
    lines, and may be a link to another place. Raises OSError where it cannot be read or written.
    """
    try:
        before = read_bytes(file, MOST_TEXT_BYTES) if file.exists() else b""
    except ValueError as error:
        raise OSError(f"{file} {error}") from error
    new = re.sub(rb"(?m)^.*%b[ \t\r]*(\n|\Z)" % MARK.encode(), b"", before)
    if line is not None:
        new += b"\n" if new and not new.endswith(b"\n") else b""
        new += os.fsencode(line) + b"\n"
    if new == before:
        return False
    with replacing(file.resolve()) as temporary:
        temporary.write_bytes(new)
        if file.exists():
            status = file.stat()
            os.chown(temporary, status.st_uid, status.st_gid)
            shutil.copymode(file, temporary)
    return True


def main(arguments: Sequence[str]) -> None:
    """`capsrun completion …`. Raises UserError for words that it does not know."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help", "help"):
        print(HELP)
    elif action in SHELLS and not rest:
        print(script(action), end="")
    elif action in ("install", "uninstall") and len(rest) <= 1:
        own = Path(os.environ.get("SHELL", "")).name
        shell = rest[0] if rest else own
        if shell not in SHELLS and (rest or action == "install"):
            which = repr(shell) if rest else f"$SHELL, which is {os.environ.get('SHELL', '')!r}"
            raise UserError(
                f"there is no completion for {which}{did_you_mean(shell, SHELLS)}; there is: "
                f"capsrun completion {action} {'|'.join(SHELLS)}"
            )
        try:
            if action == "install":
                install(shell)
            else:
                uninstall([shell] if rest else SHELLS)
        except (OSError, RuntimeError) as error:  # the last where there is no home
            why = str(error).rstrip(".")
            raise UserError(
                f"the completion cannot be written or removed: {why}; `capsrun completion "
                "bash|zsh|fish` prints it, to be put where you like"
            ) from error
    else:
        hint = did_you_mean(action, ACTIONS) if action not in ACTIONS else ""
        raise UserError(
            f"{shlex.join(arguments)!r} is nothing that it does{hint}; it does: "
            f"{', '.join(ACTIONS)}"
        )
