"""Tab completion for bash, zsh and fish: what is offered, the shells' scripts, and installing them.

The scripts ask `capsrun completion words SHELL LINE` for every word that could come next, so that
they need not know what capsrun can do.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from capsrun.compose import FLAGS, OFFERED, OPTIONS, group_choices, setting_names, setting_values
from capsrun.errors import UserError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
ACTIONS = ("install", "uninstall", *SHELLS)
# What the shells' scripts call; it is for nobody else.
WORDS = "words"
# Settings that are paths, by the last part of their names, with the endings of the files that fit.
PATHS: dict[str, tuple[str, ...]] = {
    "checkpoint": (".pt",),
    "ensemble": (".pt",),
    "image": (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    "out": (".html",),
    "sources": (),
    "keep": (),
}
# Only names that Hydra reads without quotes are offered.
PLAIN_NAME = re.compile(r"[\w.+@%~: -]+")


@dataclass(frozen=True)
class Vocabulary:
    """What can be typed, as `cli.py` knows it."""

    commands: Sequence[str]
    flags: Mapping[str, Iterable[str]]
    """Options that only some commands have."""
    groups: Callable[[str], Mapping[str, Sequence[str]]]
    """Of a command: the choices of dataset, model, …."""
    settings: Callable[[str, Sequence[str]], Sequence[str]]
    """Of a command and some choices: the names of its settings, with dots."""
    values: Callable[[str, str], Sequence[str]]
    """Of a command and a setting: what it may be, where that is not endless."""


def answer(shell: str, line: str, word_breaks: str, vocabulary: Vocabulary) -> list[str]:
    """What a shell is told: one candidate a line, in the form in which it wants them.

    line: what is typed so far, up to the cursor. word_breaks: of bash, $COMP_WORDBREAKS.
    """
    words, quoted = split(line)
    found = candidates(words, vocabulary)
    if shell != "bash":
        return found
    # bash replaces only what follows the last = or : of a word, and adds no space by itself.
    if quoted:
        return [word + ("" if goes_on(word) else " ") for word in found]
    breaks = [words[-1].rfind(sign) for sign in "=:" if sign in word_breaks]
    start = 1 + max(breaks, default=-1)
    return [escaped(word[start:]) + ("" if goes_on(word) else " ") for word in found]


def escaped(word: str) -> str:
    """A word with backslashes before what bash would take for something else."""
    return re.sub(r"([^\w@%+=:,./~\[\]-])", r"\\\1", word)


def goes_on(word: str) -> bool:
    """Whether more has to be typed before the next word: a value, a path, the rest of a list."""
    return word.endswith(("=", "/")) or ("=[" in word and not word.endswith("]"))


def split(line: str) -> tuple[list[str], bool]:
    """The words after the name of the program, the last of which may be empty or half typed.

    Also whether that word has a quote that is still open.
    """
    for closing in ("", "'", '"', "\\"):
        try:
            # The letter keeps a word that is empty so far.
            words = shlex.split(f"{line}{closing}" if closing else f"{line}x")
        except ValueError:
            continue
        if not closing:
            words[-1] = words[-1][:-1]
        while words and re.match(r"\w+=", words[0]):  # VARIABLE=value capsrun …
            words.pop(0)
        return words[1:] or [""], closing in ("'", '"')
    return [""], False


def candidates(words: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """The words that the last of `words` can become; see `goes_on`."""
    *before, word = words
    if not before:
        possible = [*vocabulary.commands, "--help", "--version"]
    elif before[0] == "completion":
        possible = completion_words(before[1:])
    elif before[0] not in vocabulary.commands:
        possible = []
    elif before[-1] in ("--cfg", "-c", "--info", "-i"):
        possible = list(OPTIONS["--cfg" if before[-1] in ("--cfg", "-c") else "--info"])
    elif word.startswith("-"):
        possible = [*OFFERED, *vocabulary.flags.get(before[0], ())]
    elif "=" in word:
        possible = values(before[0], word, vocabulary)
    else:
        possible = keys(before[0], before[1:], vocabulary)
    return [candidate for candidate in dict.fromkeys(possible) if candidate.startswith(word)]


def completion_words(before: Sequence[str]) -> list[str]:
    """What can follow `capsrun completion`."""
    if not before:
        return list(ACTIONS)
    return list(SHELLS) if before[0] in ("install", "uninstall") and len(before) == 1 else []


def keys(command: str, before: Sequence[str], vocabulary: Vocabulary) -> list[str]:
    """The groups and settings of a command, but for those that were given a value before."""
    groups = vocabulary.groups(command)
    chosen = [word for word in before if word.partition("=")[0] in groups]
    settings = vocabulary.settings(command, chosen)
    sections = {name.rpartition(".")[0] for name in settings}
    # A choice has its name, and what an experiment's file tells about it is no setting of a run.
    no_settings = {*sections, *(f"{group}.name" for group in groups)}
    own = [s for s in settings if s not in no_settings and not s.startswith("experiment.")]
    given = {word.partition("=")[0] for word in before}
    return [f"{name}=" for name in (*groups, *own) if name not in given]


def values(command: str, word: str, vocabulary: Vocabulary) -> list[str]:
    """What a word that has a key can become."""
    key, _, value = word.partition("=")
    last = key.rpartition(".")[2]
    is_path = last in PATHS or last.endswith("_dir")
    start = f"{key}="
    if value.startswith("[") or not is_path:  # the last of a list, or of a sweep
        start += value[: 1 + max(value.rfind(sign) for sign in "[,")]
    if is_path:
        return [f"{start}{path}" for path in paths(word[len(start) :], PATHS.get(last, ()))]
    group = vocabulary.groups(command).get(key)
    return [f"{start}{choice}" for choice in group or vocabulary.values(command, key)]


def paths(start: str, endings: tuple[str, ...]) -> list[str]:
    """The folders, and files with these endings, whose paths begin so."""
    folder, slash, name = start.rpartition("/")
    found = []
    for entry in sorted(Path(folder + slash or ".").expanduser().iterdir()):
        hidden = entry.name.startswith(".") and not name.startswith(".")
        if entry.name.startswith(name) and not hidden and PLAIN_NAME.fullmatch(entry.name):
            if entry.is_dir():
                found.append(f"{folder}{slash}{entry.name}/")
            elif entry.suffix.lower() in endings:
                found.append(f"{folder}{slash}{entry.name}")
    return found


BASH = r"""# Completion of capsrun for bash; see `capsrun completion`.
_capsrun() {
    local candidate
    COMPREPLY=()
    # The words of COMP_WORDS are broken at = and :, so the line itself is sent.
    while IFS= read -r candidate; do
        COMPREPLY+=("$candidate")
    done < <("${1/#\~/$HOME}" completion words bash "${COMP_LINE:0:COMP_POINT}" \
        "$COMP_WORDBREAKS" 2>/dev/null)
}
complete -o nospace -F _capsrun capsrun
"""

ZSH = r"""#compdef capsrun
# Completion of capsrun for zsh; see `capsrun completion`.
_capsrun() {
    local program=${(Q)words[1]} found
    local line="${(j: :)words[1,CURRENT-1]} $PREFIX"
    local -a going_on whole
    for found in "${(@f)$(${program/#\~/$HOME} completion words zsh "$line" 2>/dev/null)}"; do
        [[ $PREFIX == *=* ]] && found=${found#*=}
        case $found in
            '') ;;
            *[=/]|\[*[^]]) going_on+=("$found") ;;
            *) whole+=("$found") ;;
        esac
    done
    # Only the values are listed, without the key before them.
    [[ $PREFIX == *=* ]] && compset -P 1 '*='
    (( $#going_on )) && compadd -S '' -- "${going_on[@]}"
    (( $#whole )) && compadd -- "${whole[@]}"
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
compdef _capsrun capsrun
"""

FISH = r"""# Completion of capsrun for fish; see `capsrun completion`.
function __capsrun_words
    set -l program (string replace -r '^~' $HOME -- (commandline -op)[1])
    $program completion words fish (commandline -cp) 2>/dev/null
end
complete -c capsrun -f -a '(__capsrun_words)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}
# At the end of the line that is added to a shell's own file, by which it is found again.
MARK = "# capsrun completion"


@dataclass(frozen=True)
class Place:
    """Where a shell's script goes."""

    script: Path
    startup: Path | None
    """The shell's own file that has to load it; None where the shell finds it by itself."""

    @property
    def line(self) -> str:
        """What loads the script, if it is there."""
        path = shlex.quote(str(self.script))
        return f"[ -r {path} ] && . {path}  {MARK}"


def place_of(shell: str) -> Place:
    """Where the script of a shell goes, for this user."""
    home = Path.home()
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    if shell == "bash":
        return Place(data / "bash-completion/completions/capsrun", home / ".bashrc")
    if shell == "zsh":
        startup = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        return Place(data / "zsh/site-functions/_capsrun", startup)
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    return Place(config / "fish/completions/capsrun.fish", None)


def install(shell: str | None) -> list[str]:
    """Write a shell's script and see that the shell loads it; returns what to say about it.

    shell: None: the one that $SHELL names. Doing it again changes nothing. Raises UserError where
    the shell is not known or its files cannot be written.
    """
    shell = known_shell(shell)
    place = place_of(shell)
    said = []
    try:
        place.script.parent.mkdir(parents=True, exist_ok=True)
        place.script.write_text(SCRIPTS[shell])
        said.append(f"written: {place.script}")
        if place.startup is not None:
            said.append(add_line(place.startup, place.line))
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"the completion for {shell} cannot be written: {error}; `capsrun completion {shell}` "
            "prints it, to be put where you like"
        ) from error
    here = [] if shell == "fish" else [f"at once, in this one: . {shlex.quote(str(place.script))}"]
    return [
        *said,
        "undo: capsrun completion uninstall",
        *here,
        f"next: open a new {shell}, and type: capsrun train dataset=mn<Tab>",
    ]


def add_line(file: Path, line: str) -> str:
    """Put a line at the end of a file that lacks it; returns what was done."""
    text = file.read_text() if file.exists() else ""
    kept = without_mark(text)
    if text == kept + line + "\n":
        return f"{file} loads it already"
    file.write_text(kept + ("" if not kept or kept.endswith("\n") else "\n") + line + "\n")
    return f"added to {file}: {line}"


def without_mark(text: str) -> str:
    """A text without the lines that capsrun added to it."""
    return "".join(
        line for line in text.splitlines(keepends=True) if not line.rstrip().endswith(MARK)
    )


def uninstall(shell: str | None) -> list[str]:
    """Undo `install`, for one shell or (None) for all; returns what to say about it.

    Raises UserError where that is not possible.
    """
    said = []
    for name in SHELLS if shell is None else [known_shell(shell)]:
        place = place_of(name)
        try:
            if place.script.exists():
                place.script.unlink()
                said.append(f"deleted: {place.script}")
            if place.startup is not None and place.startup.exists():
                text = place.startup.read_text()
                if without_mark(text) != text:
                    place.startup.write_text(without_mark(text))
                    said.append(f"taken out of {place.startup}: the line that loads it")
        except (OSError, UnicodeError) as error:
            raise UserError(f"the completion for {name} cannot be removed: {error}") from error
    return [*said, "next: open a new terminal"] if said else ["no completion is installed"]


def known_shell(shell: str | None) -> str:
    """The name of a shell that has a script. Raises UserError for another one."""
    name = Path(os.environ.get("SHELL", "")).name if shell is None else shell
    if name in SHELLS:
        return name
    if shell is None:
        raise UserError(
            f"$SHELL is {os.environ.get('SHELL', 'not set')!r}, for which there is no completion; "
            f"say for which shell: capsrun completion install {'|'.join(SHELLS)}"
        )
    raise UserError(
        f"there is no completion for {shell!r}{did_you_mean(shell, SHELLS)}; there is for "
        f"{', '.join(SHELLS)}"
    )


HELP = """capsrun completion [install|uninstall|bash|zsh|fish]

Lets the Tab key complete commands, settings, their choices and paths.

  capsrun completion install     for your shell ($SHELL); say bash, zsh or fish for another one
  capsrun completion uninstall   undo that
  capsrun completion bash        print the script, to be put where you like (so zsh, fish)"""


def main(arguments: Sequence[str], commands: Sequence[str]) -> None:
    """`capsrun completion …`. Raises UserError for words that it does not know.

    commands: what can follow `capsrun`.
    """
    vocabulary = Vocabulary(commands, FLAGS, group_choices, setting_names, setting_values)
    action, *rest = arguments or ["--help"]
    if action == WORDS:
        try:
            shell, line, word_breaks = [*rest, "", ""][:3]
            for word in answer(shell, line, word_breaks, vocabulary):
                print(word)
        except Exception:  # whatever is wrong, somebody who presses Tab is not to be told so
            return
    elif action in ("-h", "--help", "help"):
        print(HELP)
    elif action in SHELLS and not rest:
        print(SCRIPTS[action], end="")
    elif action in ("install", "uninstall") and len(rest) <= 1:
        do = install if action == "install" else uninstall
        print("\n".join(do(rest[0] if rest else None)))
    else:
        hint = did_you_mean(action, ACTIONS) if action not in ACTIONS else ""
        raise UserError(
            f"{shlex.join(arguments)!r} is nothing that it does{hint}; it does: "
            f"{', '.join(ACTIONS)}"
        )
