"""What Hydra makes of the words after a command, and what is said about mistakes in them.

Only this file and `sweep.py` know Hydra. Nothing here imports PyTorch.
"""

import difflib
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from capsrun.errors import UserError, did_you_mean
from capsrun.yaml_files import (
    GROUPS,
    choices_of,
    chosen_files,
    configs_dir,
    inherited_by,
    own_dir,
    with_place,
)

HYDRA = threading.RLock()
# What is missing where a plugin of Hydra is not installed, as an extra of this package.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}
# Two ways to say the same.
EITHER = (("recipe.steps", "recipe.epochs"), ("recipe.decay_steps", "recipe.decay_periods"))
# Flags, as Hydra knows them, where a setting may be `auto` too.
FLAG_WORDS = {"yes": "true", "no": "false", "true": "true", "false": "false"}
# What Hydra reads as the text that it is.
PLAIN = re.compile(r"(?!(true|false|null|inf|nan)$)[a-z_/][a-z_0-9/.-]*", re.ASCII | re.IGNORECASE)
# What Hydra and OmegaConf let through where words or files are not what they expect.
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError)
# The options of Hydra that are of use here, with the values that some have.
OPTIONS: dict[str, tuple[str, ...]] = {
    "--help": (),
    "--cfg": ("job", "hydra", "all"),
    "--resolve": (),
    "--multirun": (),
    "--config-dir": (),
    "--info": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}
SHORT_OPTIONS = {"-c": "--cfg", "-i": "--info", "-m": "--multirun"}
# Short forms of settings that Hydra's own options look like.
FLAGS = {"bench": {"--profile": "profile=true"}}


def compose(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration that a command's overrides make.

    Raises UserError, one sentence, for a mistake in the overrides.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        chosen_files(overrides)
        return _compose(name, overrides)
    except (HydraException, OmegaConfBaseException, YAMLError, *UNREADABLE) as error:
        raise UserError(describe_hydra_error(error, name, overrides)) from error


def choices_made(name: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Which dataset, model, … a command's overrides choose; those that are none are left out."""
    made = _compose(name, overrides, return_hydra_config=True).hydra.runtime.choices
    return {group: made[group] for group in group_choices(name) if made.get(group)}


def _compose(name: str, overrides: Sequence[str] = (), **how: Any) -> Any:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    # A command asks for another one's configuration, or a program with a Hydra of its own for ours.
    # It is one for all threads.
    with HYDRA:
        running = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
                words = for_hydra(name, overrides, several=False)
                return hydra.compose(config_name=name, overrides=words, **how)
        finally:
            GlobalHydra.instance().hydra = running


def start_hydra(name: str, arguments: Sequence[str], job: Callable[[Any], Any]) -> None:
    """Let Hydra answer its options, or call `job` with the configuration of each of its jobs.

    Raises UserError for a mistake in the arguments, and whatever `job` raises of `BaseException`.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    words = for_hydra(name, arguments, is_sweep(arguments))
    saved_argv, sys.argv = sys.argv, [f"capsrun {name}", *words]
    # Hydra then raises what goes wrong instead of printing it and ending the program.
    saved_mode = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        chosen_files(arguments)
        start = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=name)
        start(job)()
    except (HydraException, OmegaConfBaseException, YAMLError, *UNREADABLE) as error:
        raise UserError(describe_hydra_error(error, name, arguments)) from error
    finally:
        sys.argv = saved_argv
        if saved_mode is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_mode


def for_hydra(command: str, words: Sequence[str], several: bool) -> list[str]:
    """The words after a command as Hydra is to have them; see `as_typed`.

    Of two settings of which one is null where the other is not, who says one has said both.
    """
    if not os.environ.get("CAPSRUN_DATA"):  # set to nothing is not set
        os.environ.pop("CAPSRUN_DATA", None)
    said = {word.partition("=")[0].lstrip("+") for word in words}
    implied = [
        f"{other}=null"
        for one, other in (*EITHER, *(pair[::-1] for pair in EITHER))
        if one in said and other not in said and f"{one}=null" not in words
    ]
    if (folder := own_dir()) is not None:
        implied.append(f"hydra.searchpath=[{in_quotes(f'file://{folder.absolute()}')}]")
    return [as_typed(command, word, several) for word in words] + implied


def as_typed(command: str, word: str, several: bool) -> str:
    """An override whose value Hydra takes as it was typed, where that is a name or a path.

    Hydra would read some as numbers (12e4567), flags or interpolations, and refuse others (a=b, é).
    What is in quotes, or a list in brackets, is written in Hydra's own way and stays as it is, as
    `null` does and, in a sweep (`several`), what its functions make; commas there are between
    values.
    """
    from capsrun.fields import allowed_values, is_text, takes_list

    key, _, value = word.partition("=")
    each = value.split(",") if several else [value]
    if "auto" in allowed_values(schema_of(command), key.lstrip("+")) and {*each} & {*FLAG_WORDS}:
        # Not the flags that Hydra makes of them.
        return f"{key}=" + ",".join(f"'{FLAG_WORDS.get(word, word)}'" for word in each)
    quotes = value[:1] in ("'", '"') and len(value) > 1 and value[0] == value[-1]
    if value in ("", "null") or quotes or PLAIN.fullmatch(value):
        return word
    schema, setting = schema_of(command), key.lstrip("+")
    is_list = value[0] == "[" and (several or takes_list(schema, setting))
    if is_list or not is_text(schema, setting):
        return word
    if not several:
        return f"{key}={in_quotes(value)}"
    if re.search(r"['\"(]", value):
        return word
    return f"{key}={','.join(map(in_quotes, value.split(',')))}"


def quoted(value: Any) -> str:
    """A value, a path say, as it is written in an override: in quotes where it needs them."""
    if isinstance(value, list):
        return f"[{','.join(map(quoted, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    text = str(value)
    return text if re.fullmatch(r"[\w./+-]+", text, re.ASCII) else in_quotes(text)


def in_quotes(text: str) -> str:
    """Text as Hydra's grammar has it, none of it an interpolation."""
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return "'" + re.sub(r"(\\*)\$\{", r"\1\1\\${", text) + "'"


def composed(name: str, arguments: Sequence[str]) -> tuple[Any, list[str]] | None:
    """The configuration of a command and its overrides; None where Hydra has answered an option.

    Raises UserError for a mistake in the arguments.
    """
    found: list[tuple[Any, list[str]]] = []
    start_hydra(name, arguments, lambda cfg: found.append((cfg, task_words())))
    return found[0] if found else None


def task_words() -> list[str]:
    """The overrides of the job that Hydra runs, without those that are about Hydra."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    # As they were typed: what is in `${…}` belongs to the settings.
    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return words


def is_sweep(arguments: Iterable[str]) -> bool:
    """Whether these words ask Hydra for several jobs."""
    return any(
        word in ("-m", "hydra.mode=MULTIRUN")
        or (word.startswith("--m") and "--multirun".startswith(word))
        for word in arguments
    )


def group_choices(command: str) -> dict[str, list[str]]:
    """The choices of dataset, model, … that a command has."""
    from omegaconf import DictConfig, OmegaConf

    defaults = OmegaConf.load(configs_dir() / f"{command}.yaml").defaults
    groups = [str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry]
    return {group: choices_of(group) for group in groups if not group.startswith("override ")}


def setting_names(command: str, choices: Sequence[str] = ()) -> list[str]:
    """Every key of a command's configuration, with dots, for some choices of dataset, model, …."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    def names(values: dict[str, Any], prefix: str) -> Iterable[str]:
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{key}.")

    try:
        chosen = _compose(command, choices)
    except HydraException:  # a choice that this command does not have
        chosen = _compose(command)
    return list(names(OmegaConf.to_container(chosen), ""))  # type: ignore[arg-type]


def setting_values(command: str, key: str) -> list[str]:
    """What a setting may be, where that is not endless."""
    from capsrun.fields import allowed_values

    if key == "targets":
        return targets()
    return setting_names("train") if key == "columns" else allowed_values(schema_of(command), key)


def schema_of(command: str) -> type:
    """The dataclass of a command's settings: in `config.py`, or in the command's own file."""
    from capsrun import config

    name = f"{command.capitalize()}Config"
    if hasattr(config, name):  # so that a mistake is answered before PyTorch is imported
        return getattr(config, name)
    return getattr(importlib.import_module(f"capsrun.commands.{command}"), name)


def targets() -> list[str]:
    """What `capsrun reproduce targets=` takes."""
    groups = [group for group in GROUPS if group != "own" or own_dir() is not None]
    return ["all", *groups, *choices_of("experiment")]


def describe_hydra_error(error: Exception, command: str, arguments: Sequence[str]) -> str:
    """One sentence for what Hydra and OmegaConf say in several lines.

    arguments: the words after the command.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    from capsrun.settings import describe_config_error

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _describe_missing(str(error.missing_cfg_file), error.options, arguments)
    if isinstance(error, OverrideParseException):
        return describe_unreadable(str(error.override), command)
    group = re.match(r"Could not override '(.*?)'\. No match in the defaults list", str(error))
    if group or isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = group[1] if group else str(cause.full_key)  # type: ignore[attr-defined]
        return _describe_unknown_key(key, command, arguments)
    if isinstance(error, RecursionError):
        return f"one of {', '.join(map(str, chosen_files(arguments)))} inherits itself"
    if "Config group override must be" in str(error):
        return (
            f"dataset, model and the like take one of their choices; see `capsrun {command} --help`"
        )
    if isinstance(cause, OmegaConfBaseException):
        return with_place(describe_config_error(cause), chosen_files(arguments), arguments)
    return " ".join(str(error).split()) or repr(error)


def _describe_missing(file: str, options: Sequence[str] | None, arguments: Sequence[str]) -> str:
    folder, _, choice = file.rpartition("/")
    options = options or choices_of(folder)
    if (extra := EXTRAS.get(f"{folder}/{choice}")) is not None:
        package = f"pip install 'capsrun[{extra}]'"
        return f"{folder}={choice} needs a package that is not installed: {package}"
    hint = did_you_mean(choice, options)
    where = inherited_by(folder, choice, arguments)
    return f"{where}there is no {folder}={choice}{hint}; there are: {', '.join(options)}"


def _describe_unknown_key(key: str, command: str, arguments: Sequence[str]) -> str:
    groups = group_choices(command)
    chosen = [w for w in arguments if w.partition("=")[0] in groups and re.match(r"\w+=\w+$", w)]
    names = setting_names(command, chosen)
    if key in setting_names(command):  # but not with what was chosen: a CNN has no routing
        return f"with {' '.join(chosen)} there is no setting {key!r}"
    group = key.partition(".")[0]
    if group in groups and group != key and not any(name.startswith(f"{group}.") for name in names):
        return f"{key} is of a choice that was not made: {group}={', '.join(groups[group])}"
    hint = did_you_mean(key, names)
    return f"there is no setting {key!r}{hint}; `capsrun {command} --cfg job` shows them all"


def describe_unreadable(word: str, command: str) -> str:
    """One sentence for a word that is not key=value, maybe because the key was left out."""
    groups = group_choices(command)
    told = {choice: f"{group}={choice}" for group in groups for choice in groups[group]}
    if command == "reproduce":
        told |= {target: f"targets={target}" for target in targets()}
    # `seed` lacks a value; `dataset` does too, and is no setting but a choice.
    for key in (*groups, *setting_names(command)):
        told.setdefault(key, f"{key}=…")
    close = difflib.get_close_matches(word, told, n=1)
    hint = f"did you mean {told[close[0]]}?" if close else "quote values with special characters"
    key, _, value = word.partition("=")
    if value.startswith("["):
        hint = f"what has special characters is in quotes inside a list: {key}=['a b','c']"
    return f"{word!r} cannot be read as key=value; {hint}"


def describe_unknown_command(word: str, commands: Sequence[str]) -> str:
    """One sentence for what is no command, maybe because the command was left out."""
    missing = f"there is no command {word!r}"
    if re.match(r"[\w.]+=", word):
        return f"{missing}; settings come after a command: capsrun train {word}"
    for command in ("train", "reproduce"):
        for group, choices in group_choices(command).items():
            if word in choices and group != "experiment":
                return f"{missing}; did you mean `capsrun {command} {group}={word}`?"
    if word in targets():
        return f"{missing}; did you mean `capsrun reproduce targets={word}`?"
    return f"{missing}{did_you_mean(word, commands) or '; `capsrun` lists them'}"


def refuse_unknown_options(command: str, arguments: Sequence[str]) -> None:
    """Raise UserError for an option that there is not, a setting with dashes mostly, and for a
    value that an option does not have.

    `--help` and `--config-dir` are answered before.
    """
    for word, following in zip(arguments, [*arguments[1:], ""]):
        if not word.startswith("-"):
            continue
        option, given, value = word.partition("=")
        if (full := option_of(option)) is None:
            raise UserError(
                f"there is no option {option}{meant(command, option, value, following)}"
            )
        values = OPTIONS[full]
        value = value if given else option[2:] if option[:2] in SHORT_OPTIONS else ""
        value = value or following
        # Alone, --info tells all.
        if values and value not in values and not (full == "--info" and value == ""):
            raise UserError(f"{full} is followed by one of {', '.join(values)}: {full} {values[0]}")


def option_of(word: str) -> str | None:
    """The option that a word means: Hydra takes shortened ones, and values without a space."""
    if word[:2] in SHORT_OPTIONS:
        full = SHORT_OPTIONS[word[:2]]
        return full if word[2:] in ("", *OPTIONS[full]) else None
    found = [full for full in OPTIONS if full.startswith(word) and full != "--config-dir"]
    return found[0] if len(word) > len("--x") and found else None


def meant(command: str, option: str, value: str, following: str) -> str:
    """What somebody may have meant by an option that there is not."""
    key = option.lstrip("-").replace("-", "_")
    names = (*group_choices(command), *setting_names(command))
    setting = next((name for name in names if name == key or name.endswith("." + key)), None)
    if setting is not None:
        value = value or (following if following and "=" not in following else "…")
        return f"; settings are written without dashes: {setting}={value}"
    hint = did_you_mean(option, (*OPTIONS, *FLAGS.get(command, ())))
    return f"{hint}; `capsrun {command} --help` shows what there is"
