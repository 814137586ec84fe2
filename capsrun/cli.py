"""The command line: the table of commands, Hydra, and what is said about mistakes.

Only this file knows Hydra, and PyTorch is imported by a command's own file only, once that
command's configuration is composed: so `--help` and `--cfg job` answer at once.
"""

import contextlib
import difflib
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capsrun import __version__, completion
from capsrun.errors import Busy, Noisy, Stopped, Unfinished, UserError, did_you_mean, process_rank
from capsrun.runs.sweep import Done, Sweep, conducted, handling, last_validation_error
from capsrun.terminal import BOLD, RED, styled

# So long other processes wait for the first one to say why all of them end.
OTHERS_WAIT_SECONDS = 10.0
# These choices make the first part of a run's name …
FIRST_IN_NAME = ("dataset", "model", "recipe")
# … and these do not belong into it.
NOT_IN_NAME = (
    "experiment",
    "sweep",
    "seed",
    "name",
    "runs_dir",
    "device",
    "compile",
    "deterministic",
    "dataset.data_dir",
)
# What is missing where a plugin of Hydra is not installed, as an extra of this package.
EXTRAS = {
    "hydra/launcher/joblib": "joblib",
    "hydra/launcher/submitit_slurm": "slurm",
    "hydra/launcher/submitit_local": "slurm",
    "hydra/launcher/ray": "ray",
    "hydra/sweeper/optuna": "optuna",
}


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    run: Callable[[Any, list[str]], Done | None]
    """Takes the composed configuration and the overrides of the job."""
    summary: str
    example: str


def run_train(cfg: Any, overrides: list[str]) -> Done:
    config = training_config(cfg)
    config.name = config.name or run_name(config, overrides)

    from capsrun.commands.train import train

    out_dir = Path(config.runs_dir) / config.name / f"seed{config.seed}"
    already = (out_dir / "result.json").exists()
    train(config, out_dir, model_words(config, out_dir))
    return Done(last_validation_error(out_dir), already)


def training_config(cfg: Any) -> Any:
    """The `TrainConfig` of a composed configuration, without what is told about the experiment."""
    from omegaconf import OmegaConf

    from capsrun.config import TrainConfig, from_dict

    settings = [key for key in cfg if key != "experiment"]
    return from_dict(TrainConfig, OmegaConf.masked_copy(cfg, settings))


def run_eval(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import EvalConfig, from_dict

    if isinstance(cfg.routing_images, int):  # routing_images=8 means routing_images=[8]
        cfg.routing_images = [cfg.routing_images]
    config = from_dict(EvalConfig, cfg)

    from capsrun.commands.evaluate import evaluate

    checkpoint = checkpoint_of(config)
    evaluate(config, checkpoint, model_words(config, checkpoint))


def run_perturb(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import PerturbConfig, from_dict

    config = from_dict(PerturbConfig, cfg)

    from capsrun.commands.perturb import perturb

    checkpoint = checkpoint_of(config)
    perturb(config, checkpoint)
    suggest(["explore", *model_words(config, checkpoint)], ["report", *folder_words(config)])


def run_explore(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import ExploreConfig, from_dict

    config = from_dict(ExploreConfig, cfg)

    from capsrun.commands.explore import explore

    checkpoint = checkpoint_of(config)
    explore(config, checkpoint)
    words = model_words(config, checkpoint)
    suggest(["perturb", *words, "perturb.format=gif"], ["export", *words])


def run_export(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import ExportConfig, from_dict

    config = from_dict(ExportConfig, cfg)

    from capsrun.commands.export import export

    export(config, checkpoint_of(config))


def run_data(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import DataConfig, from_dict

    config = from_dict(DataConfig, cfg)

    from capsrun.commands.data import show_data

    show_data(config)
    suggest(data_use(config.dataset))


def run_list(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import ListConfig, TrainConfig, from_dict, with_later_settings
    from capsrun.runs.inventory import FINISHED, INTERRUPTED

    config = from_dict(ListConfig, cfg)

    from capsrun.commands.list import list_runs

    runs = list_runs(config)
    if config.json:
        return
    finished = [run for run in runs if run.status == FINISHED]
    if not runs:
        suggest(["train", "dataset=mnist5k"], ["train", "dataset=mnist"])
    elif finished:  # the latest is the last
        try:
            trained = from_dict(TrainConfig, with_later_settings(finished[-1].config))
        except UserError:  # it is of another version
            return suggest(["report", *folder_words(config)])
        trained.runs_dir = config.runs_dir  # the folder may have been moved
        words = model_words(trained, finished[-1].folder)
        suggest(["eval", *words], ["report", *folder_words(config)])
    elif any(run.status == INTERRUPTED for run in runs):
        print("next: the command that began a run goes on with it where it was interrupted")


def run_bench(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import BenchConfig, from_dict

    if "stop" in cfg:
        raise UserError("bench trains to no target: take a recipe that does not say when to stop")
    config = from_dict(BenchConfig, cfg)

    from capsrun.commands.bench import bench

    bench(config)
    suggest(["train", f"dataset={config.dataset.name}"])


def run_reproduce(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import ReproduceConfig, from_dict

    refuse_unused(cfg, overrides)
    if isinstance(cfg.targets, str):  # targets=table1 means targets=[table1]
        cfg.targets = cfg.targets.split(",")
    if isinstance(cfg.seeds, int):
        cfg.seeds = [cfg.seeds]
    config = from_dict(ReproduceConfig, cfg)

    from capsrun.commands.reproduce import reproduce

    reproduce(config, Experiments())
    if config.only_plan:
        again = [word for word in overrides if not word.startswith("only_plan=")]
        suggest(["reproduce", *again])
    else:
        suggest(["list", *folder_words(config)], ["report", *folder_words(config)])


def refuse_unused(cfg: Any, overrides: list[str]) -> None:
    """Raise UserError where a queue says itself what was asked for on the command line."""
    from omegaconf import OmegaConf

    as_written = str(OmegaConf.to_container(cfg.queue, resolve=False))
    used = {key: f"${{{key}}}" in as_written for key in ("targets", "seeds")}
    used["budget"] = any(entry.get("length") is None for entry in cfg.queue.entries)
    given = {word.partition("=")[0] for word in overrides}
    for key, is_used in used.items():
        if key in given and not is_used:
            raise UserError(f"each entry of this queue has its own {key}: leave {key}= away")


def run_report(cfg: Any, overrides: list[str]) -> None:
    from capsrun.config import ReportConfig, from_dict

    config = from_dict(ReportConfig, cfg)

    from capsrun.commands.report import report

    report(config, Experiments())
    suggest(["reproduce", "only_plan=true", *folder_words(config)])


COMMANDS = {
    "train": Command(
        run_train,
        "train a model, or go on where its run was interrupted",
        "capsrun train dataset=mnist",
    ),
    "eval": Command(
        run_eval,
        "test a trained model: errors, confusion matrix, pictures",
        "capsrun eval dataset=mnist",
    ),
    "perturb": Command(
        run_perturb,
        "move each dimension of a capsule and draw what comes out",
        "capsrun perturb perturb.digit=5",
    ),
    "explore": Command(
        run_explore,
        "make a page in which capsules are moved by hand",
        "capsrun explore dataset=mnist",
    ),
    "export": Command(
        run_export,
        "write a trained model as ONNX and for torch.export, checked",
        "capsrun export dataset=mnist",
    ),
    "data": Command(
        run_data,
        "fetch, verify and show a data set",
        "capsrun data dataset=mnist",
    ),
    "list": Command(
        run_list,
        "the runs that there are: error, steps, age, state, tests",
        "capsrun list name=mnist",
    ),
    "report": Command(
        run_report,
        "what was measured, beside what the paper reports",
        "capsrun report",
    ),
    "reproduce": Command(
        run_reproduce,
        "run the paper's experiments, as far as they are not finished",
        "capsrun reproduce budget=smoke targets=table1",
    ),
    "bench": Command(
        run_bench,
        "time training here, beside a textbook and what the machine can do",
        "capsrun bench",
    ),
}
# It completes the others and has no settings of its own.
COMPLETION = "completion"
# What Hydra and OmegaConf let through where words or files are not what they expect.
UNREADABLE = (ValueError, TypeError, AttributeError, LookupError, AssertionError, RecursionError)
# Short forms of settings that Hydra's own options look like.
FLAGS = {"bench": {"--profile": "profile=true"}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: a fault of the machine. 2: a mistake of the user. 75: another process is at work
    there. 128 + n: stopped by signal n.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, *rest = arguments or ["--help"]
    threading.excepthook = without_told_twice
    asked: list[int] = []
    with interruptible(asked):
        try:
            return answered(name, rest, arguments, asked)
        except KeyboardInterrupt:  # while it is said why the program ends
            return 128 + (asked[-1] if asked else signal.SIGINT)


def answered(name: str, rest: list[str], arguments: list[str], asked: list[int]) -> int:
    """Run one command and return its exit code; see `main`.

    asked: the signals that came before the command took care of them itself.
    """
    try:
        if name in ("-h", "--help", "help"):
            print(usage(), flush=True)
        elif name == "--version":
            print(f"capsrun {__version__}")
        elif name == COMPLETION:
            run_completion(rest)
        elif name not in COMMANDS:
            raise UserError(describe_unknown_command(name))
        else:
            refuse_several_processes(name, rest)
            rest = [FLAGS.get(name, {}).get(word, word) for word in rest]
            refuse_unknown_flags(name, rest)
            # Hydra wants the settings side by side: an option between them ends them.
            rest.sort(key=lambda word: "=" in word and not word.startswith("-"))
            run_command(name, rest)
    except UserError as error:
        fail(f"capsrun {name}" if name in (COMPLETION, *COMMANDS) else "capsrun", error)
        return 2
    except Stopped as stopped:
        again = f"the same command goes on: {shlex.join(['capsrun', *arguments])}"
        if process_rank()[1] > 1:
            again = "the same torchrun command goes on, with any number of processes"
        if process_rank()[0] == 0:
            say(f"{stopped}; {again}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return stopped_at_once(arguments, asked[-1] if asked else signal.SIGINT)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Busy as error:
        fail(f"capsrun {name}", Busy(f"{error}; wait until that has ended, or stop it"))
        return os.EX_TEMPFAIL
    except (Noisy, Unfinished) as error:
        fail(f"capsrun {name}", error)
        return 1
    except OSError as error:
        # The machine's fault, a full disk say; what is finished or saved is whole.
        where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        fail(f"capsrun {name}", OSError(where))
        return 1
    except Exception:
        if not asked:
            raise
        # Libraries that are being imported turn Ctrl-C into faults of their own.
        return stopped_at_once(arguments, asked[-1])
    return 0


@contextlib.contextmanager
def interruptible(asked: list[int]) -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, and remember which of them came."""

    def end(number: int, _: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    with handling(end):
        yield


def stopped_at_once(arguments: Sequence[str], number: int) -> int:
    """Say so, and return the exit code."""
    again = shlex.join(["capsrun", *arguments])
    if process_rank()[0] == 0:
        say(f"stopped at once; the same command goes on after what is saved, or anew: {again}")
    return 128 + number


def without_told_twice(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but not where the main thread is going to raise it.

    TensorBoard's writer keeps what it failed of, a full disk say, for the next that wants to write.
    """
    if getattr(failure.thread, "exception", None) is not failure.exc_value:
        threading.__excepthook__(failure)


def fail(where: str, error: Exception) -> None:
    """Print why a command ended."""
    say(f"{styled(f'{where}:', RED, sys.stderr)} {error}")


def say(message: str) -> None:
    """Print why this process ends to stderr; of several, which end together, the first one does.

    torchrun ends the others as soon as one has ended, so they wait; one that is still there then
    has something of its own to say.
    """
    rank, _ = process_rank()
    if rank:
        time.sleep(OTHERS_WAIT_SECONDS)
        message = f"[rank {rank}] {message}"
    print(message, file=sys.stderr, flush=True)


def refuse_several_processes(name: str, arguments: Iterable[str]) -> None:
    """Raise UserError for what torchrun would only run several times over."""
    if process_rank()[1] > 1 and (name != "train" or is_sweep(arguments)):
        what = f"{name} is one process" if name != "train" else "a sweep starts its own processes"
        raise UserError(f"{what}: start it without torchrun")


def usage() -> str:
    """What `capsrun --help` prints."""
    lines = [
        "capsrun reproduces Dynamic Routing Between Capsules (Sabour, Frosst, Hinton, NIPS 2017).",
        "",
        "Usage: capsrun COMMAND [key=value …]",
        "",
    ]
    examples = {name: (command.summary, command.example) for name, command in COMMANDS.items()}
    examples[COMPLETION] = (
        "let the Tab key complete all of this in bash, zsh or fish",
        "capsrun completion install",
    )
    for name, (summary, example) in examples.items():
        lines += [f"  {styled(f'{name:<10}', BOLD)}  {summary}", f"  {'':<10}    {example}"]
    lines += [
        "",
        "After the command everything is Hydra: `capsrun train --help` lists the choices and the",
        "settings, `--cfg job` shows them composed, `--multirun seed=0,1,2` runs several.",
        "",
        "First steps: `capsrun train dataset=mnist5k` (5,000 digits, no download), `capsrun list`.",
    ]
    return "\n".join(lines)


def configs_dir() -> Path:
    """The YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def run_command(name: str, arguments: list[str]) -> None:
    """Compose the command's configuration with Hydra and run it, once or for each job of a sweep.

    Raises UserError for a mistake in the configuration, and whatever the command raises; a sweep
    raises what `conducted` does.
    """
    check_config_folders(arguments)
    failures: list[Exception] = []

    def job(cfg: Any) -> None:
        # Hydra writes a line of its own about an exception that it sees, so it sees none of ours.
        try:
            COMMANDS[name].run(cfg, task_words())
        except Exception as error:
            failures.append(error)
            raise SystemExit(2) from error

    if is_sweep(arguments):
        sweep = Sweep(sweep_folder(name, arguments))
        with conducted(sweep):
            start_hydra(name, arguments, SweepJob(name, tuple(arguments), sweep))
        return
    try:
        start_hydra(name, arguments, job)
    except SystemExit:
        if not failures:
            raise
    if failures:
        raise described(failures[0], name, arguments) from failures[0]


def start_hydra(name: str, arguments: Sequence[str], job: Callable[[Any], Any]) -> None:
    """Let Hydra compose the configurations and call `job` with them.

    Raises UserError for a mistake in the configuration.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    saved_argv, sys.argv = sys.argv, [f"capsrun {name}", *arguments]
    # Hydra then raises what goes wrong instead of printing it and ending the program.
    saved_mode = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        start = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=name)
        start(job)()
    except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        # The commands' own exceptions do not come this way, so this is about the configuration.
        raise UserError(describe_hydra_error(error, name, arguments)) from error
    finally:
        sys.argv = saved_argv
        if saved_mode is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = saved_mode


def task_words() -> list[str]:
    """The overrides of the job that Hydra runs, without those that are about Hydra."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def described(error: Exception, name: str, arguments: Sequence[str]) -> Exception:
    """An error of a command as the user is told it."""
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, OmegaConfBaseException):
        return UserError(describe_hydra_error(error, name, arguments))
    return error


@dataclass(frozen=True)
class SweepJob:
    """What Hydra calls with the configuration of each job of a sweep, wherever that runs."""

    command: str
    arguments: tuple[str, ...]
    """Of the sweep."""
    sweep: Sweep

    def __call__(self, cfg: Any) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        words = task_words()
        said = {word.replace(" ", "") for word in self.arguments}
        number = HydraConfig.get().job.num
        own = [word for word in words if word.replace(" ", "") not in said]

        def work() -> Done | None:
            try:
                return COMMANDS[self.command].run(cfg, words)
            except Exception as error:
                raise described(error, self.command, words) from error

        return self.sweep.run(number, " ".join(own) or f"job {number}", work)


def is_sweep(arguments: Iterable[str]) -> bool:
    """Whether these words ask Hydra for several jobs."""
    return any(
        word in ("-m", "hydra.mode=MULTIRUN")
        or (word.startswith("--m") and "--multirun".startswith(word))
        for word in arguments
    )


def sweep_folder(name: str, arguments: Iterable[str]) -> Path:
    """A folder of its own for what the jobs of a sweep say; it is not made yet."""
    told = [word for word in arguments if word.startswith("runs_dir=")]
    try:
        runs_dir = compose_checked(name, told).runs_dir
    except UserError:  # several of them, say, or what Hydra will refuse
        runs_dir = "runs"
    return (
        Path(runs_dir).absolute() / ".multirun" / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    )


def check_config_folders(arguments: Sequence[str]) -> None:
    """Raise UserError for a folder of YAML files, told to Hydra by an option, that is not safe."""
    from capsrun.reading import check_own_yaml

    for number, word in enumerate(arguments):
        match = re.match(r"(?:--config-[dp]\w*=?|-c[dp])(.*)", word)
        if match is None:
            continue
        folder = Path(match[1] or "".join(arguments[number + 1 : number + 2]))
        for path in sorted(folder.rglob("*.y*ml")):
            try:
                check_own_yaml(path)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} {error}") from error


def compose(name: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration that a command's overrides make."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    # A command asks for another one's configuration, or a program with a Hydra of its own for ours.
    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
            return hydra.compose(config_name=name, overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = running


def compose_checked(name: str, overrides: Sequence[str] = ()) -> Any:
    """Compose as `compose` does. Raises UserError, one sentence, for a mistake in the overrides."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return compose(name, overrides)
    except (HydraException, OmegaConfBaseException, *UNREADABLE) as error:
        raise UserError(describe_hydra_error(error, name, overrides)) from error


class Experiments:
    """The rows and figures of the paper: the files of `configs/experiment/`, each read once."""

    def __init__(self) -> None:
        self._about: dict[str, Any] = {}
        self._composed: dict[tuple[str, ...], Any] = {}

    def names(self) -> list[str]:
        """Their names, in alphabetical order."""
        return sorted(path.stem for path in (configs_dir() / "experiment").glob("*.yaml"))

    def about(self, name: str) -> Any:
        """What is told about an experiment: an `ExperimentConfig`."""
        from omegaconf import OmegaConf

        from capsrun.config import ExperimentConfig, from_dict

        if name not in self._about:
            file = OmegaConf.load(configs_dir() / "experiment" / f"{name}.yaml")
            self._about[name] = from_dict(ExperimentConfig, file.experiment)
        return self._about[name]

    def training(self, overrides: Sequence[str]) -> Any:
        """The `TrainConfig` that `capsrun train` makes of these overrides."""
        key = ("train", *overrides)
        if key not in self._composed:
            self._composed[key] = training_config(compose("train", overrides))
        return self._composed[key]

    def tested(self, arguments: Sequence[str]) -> Any:
        """The `EvalConfig` of `capsrun eval …`; None for another command."""
        from capsrun.config import EvalConfig, from_dict

        if arguments[0] != "eval":
            return None
        key = tuple(arguments)
        if key not in self._composed:
            self._composed[key] = from_dict(EvalConfig, compose("eval", arguments[1:]))
        return self._composed[key]


def describe_hydra_error(error: Exception, command: str, arguments: Sequence[str]) -> str:
    """One sentence for what Hydra and OmegaConf say in several lines.

    arguments: the words after the command.
    """
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

    from capsrun.config import describe_config_error

    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException) and error.options:
        folder, _, choice = str(error.missing_cfg_file).rpartition("/")
        if (extra := EXTRAS.get(f"{folder}/{choice}")) is not None:
            package = f"pip install 'capsrun[{extra}]'"
            return f"{folder}={choice} needs a package that is not installed: {package}"
        options = ", ".join(error.options)
        hint = did_you_mean(choice, error.options)
        return f"there is no {folder}={choice}{hint}; there are: {options}"
    if isinstance(error, OverrideParseException):
        return describe_unreadable(str(error.override), command)
    group = re.match(r"Could not override '(.*?)'\. No match in the defaults list", str(error))
    if group or isinstance(cause, ConfigKeyError | ConfigAttributeError):
        key = group[1] if group else str(cause.full_key)  # type: ignore[attr-defined]
        groups = group_choices(command)
        chosen = [
            word
            for word in arguments
            if word.partition("=")[0] in groups and re.match(r"\w+=\w+$", word)
        ]
        names = setting_names(command, chosen)
        if key in setting_names(command, []):  # but not with what was chosen: a CNN has no routing
            return f"with {' '.join(chosen)} there is no setting {key!r}"
        hint = did_you_mean(key, names)
        return f"there is no setting {key!r}{hint}; `capsrun {command} --cfg job` shows them all"
    if "Config group override must be" in str(error):
        return (
            f"dataset, model and the like take one of their choices; see `capsrun {command} --help`"
        )
    if isinstance(cause, OmegaConfBaseException):
        return describe_config_error(cause)
    return " ".join(str(error).split()) or repr(error)


def describe_unreadable(word: str, command: str) -> str:
    """One sentence for a word that is not key=value, maybe because the key was left out."""
    groups = group_choices(command)
    told = {choice: f"{group}={choice}" for group in groups for choice in groups[group]}
    if command == "reproduce":
        told |= {target: f"targets={target}" for target in reproduce_targets()}
    # `seed` lacks a value; `dataset` does too, and is no setting but a choice.
    for key in (*groups, *setting_names(command, [])):
        told.setdefault(key, f"{key}=…")
    close = difflib.get_close_matches(word, told, n=1)
    hint = f"did you mean {told[close[0]]}?" if close else "quote values with special characters"
    return f"{word!r} cannot be read as key=value; {hint}"


def describe_unknown_command(word: str) -> str:
    """One sentence for what is no command, maybe because the command was left out."""
    missing = f"there is no command {word!r}"
    if re.match(r"[\w.]+=", word):
        return f"{missing}; settings come after a command: capsrun train {word}"
    for command in ("train", "reproduce"):
        for group, choices in group_choices(command).items():
            if word in choices and group != "experiment":
                return f"{missing}; did you mean `capsrun {command} {group}={word}`?"
    if word in reproduce_targets():
        return f"{missing}; did you mean `capsrun reproduce targets={word}`?"
    hint = did_you_mean(word, (*COMMANDS, COMPLETION))
    return f"{missing}{hint or '; `capsrun` lists them'}"


def refuse_unknown_flags(command: str, arguments: Sequence[str]) -> None:
    """Raise UserError for an option that Hydra does not have: a setting with dashes, mostly."""
    for number, word in enumerate(arguments):
        flag, _, value = word.partition("=")
        values = (*completion.OPTIONS["--cfg"], *completion.OPTIONS["--info"])
        known = flag in completion.SHORT_OPTIONS or (
            flag[:2] in ("-c", "-i") and flag[2:] in values
        )
        if not word.startswith("-") or known:
            continue
        if flag != "--" and any(option.startswith(flag) for option in completion.OPTIONS):
            continue  # Hydra takes shortened ones too
        key = flag.lstrip("-").replace("-", "_")
        names = (*group_choices(command), *setting_names(command, []))
        meant = next((n for n in names if n == key or n.endswith("." + key)), None)
        if meant is not None:
            follows = arguments[number + 1 : number + 2]
            value = value or (follows[0] if follows and "=" not in follows[0] else "…")
            raise UserError(
                f"there is no option {flag}; settings are written without dashes: {meant}={value}"
            )
        hint = did_you_mean(flag, (*completion.OFFERED, *FLAGS.get(command, ())))
        raise UserError(
            f"there is no option {flag}{hint}; `capsrun {command} --help` shows what there is"
        )


def group_choices(command: str) -> dict[str, list[str]]:
    """The choices of dataset, model, … that a command has."""
    from omegaconf import DictConfig, OmegaConf

    defaults = OmegaConf.load(configs_dir() / f"{command}.yaml").defaults
    groups = [str(key) for entry in defaults if isinstance(entry, DictConfig) for key in entry]
    return {
        group: sorted(path.stem for path in (configs_dir() / group).glob("*.yaml"))
        for group in groups
        if not group.startswith("override ")
    }


def reproduce_targets() -> list[str]:
    """What `capsrun reproduce targets=` takes."""
    from capsrun.runs.jobs import GROUPS

    return ["all", *GROUPS, *Experiments().names()]


def setting_values(command: str, key: str) -> list[str]:
    """What a setting may be, where that is not endless."""
    from capsrun import config

    if (command, key) == ("reproduce", "targets"):
        return reproduce_targets()
    # A command's settings are of a class that is named after it.
    schema = getattr(config, f"{command.capitalize()}Config", None)
    return config.allowed_values(schema, key) if schema else []


def run_completion(arguments: Sequence[str]) -> None:
    """`capsrun completion`, which Hydra has no part in."""
    vocabulary = completion.Vocabulary(
        list(COMMANDS), FLAGS, group_choices, setting_names, setting_values
    )
    completion.run(arguments, vocabulary)


def setting_names(command: str, choices: Sequence[str]) -> list[str]:
    """Every key of a command's configuration, with dots, for some choices of dataset, model, …."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    def names(values: dict[str, Any], prefix: str) -> Iterable[str]:
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{key}.")

    try:
        chosen = compose(command, choices)
    except HydraException:  # a choice that this command does not have
        chosen = compose(command)
    return list(names(OmegaConf.to_container(chosen), ""))  # type: ignore[arg-type]


def run_name(config: Any, overrides: Iterable[str]) -> str:
    """Name a run's folder after what was chosen: `mnist-capsnet-quick+loss-paper`.

    Only characters that neither a shell, make nor Hydra takes for something else.
    """
    overrides = list(overrides)
    experiment = [word.partition("=")[2] for word in overrides if word.startswith("experiment=")]
    if experiment:
        base, not_in_name = experiment[-1], [*NOT_IN_NAME]
    else:
        base = f"{config.dataset.name}-{config.model.name}-{config.recipe.name}"
        not_in_name = [*NOT_IN_NAME, *FIRST_IN_NAME]
    chosen = []
    for override in overrides:
        key, _, value = override.partition("=")
        is_length = override in ("recipe.epochs=null", "recipe.steps=null")  # the other one says it
        is_free = key.lstrip("+~") in not_in_name or key.startswith("record.")
        if not is_length and not is_free:
            chosen.append(re.sub(r"[^\w.-]+", "_", f"{key.lstrip('+~')}-{value}").strip("_"))
    return "+".join([base, *sorted(chosen)])


def checkpoint_of(config: Any) -> Path:
    """The checkpoint file that eval, perturb, explore and export use; see `find_checkpoint`."""
    from capsrun.runs.checkpoint import find_checkpoint, train_command

    default = f"{config.dataset.trained_on}-{config.dataset.trained_by}/seed{config.seed}"
    if config.checkpoint != f"{config.runs_dir}/{default}":  # somebody said which
        return find_checkpoint(config.checkpoint)
    train = train_command(config.dataset)
    if config.seed:
        train += f" seed={config.seed}"
    return find_checkpoint(config.checkpoint, train)


def model_words(config: Any, checkpoint: Path) -> list[str]:
    """What eval, perturb and explore are to be told to use a model; no more than they need.

    config: of a training run, or of a command that uses its model. checkpoint: a run's folder, or a
    file.
    """
    from capsrun.runs.jobs import word

    words, usual = dataset_words(config.dataset)
    folder = checkpoint.parent if checkpoint.name == "checkpoint.pt" else checkpoint
    found_at = f"{usual.trained_on}-{usual.trained_by}/seed{config.seed}"
    if folder == Path(config.runs_dir) / found_at:  # where it is looked for if nothing is said
        return [*words, *([f"seed={config.seed}"] if config.seed else []), *folder_words(config)]
    return [*words, word("checkpoint", folder)]


def dataset_words(dataset: Any) -> tuple[list[str], Any]:
    """What makes the settings of a data set on the command line; also how they are without that."""
    from capsrun.config import DatasetConfig, differing_keys, from_dict
    from capsrun.runs.jobs import quoted

    words = [] if dataset.name == "mnist" else [f"dataset={dataset.name}"]
    if dataset.name not in group_choices("eval")["dataset"]:  # which will be said elsewhere
        return words, dataset
    usual = from_dict(DatasetConfig, compose("eval", words).dataset)
    for key, ours, _ in differing_keys(vars(dataset), vars(usual)):
        if key not in ("trained_on", "trained_by"):
            plain = {None: "null", True: "true", False: "false"}
            value = plain[ours] if ours is None or isinstance(ours, bool) else quoted(ours)
            words.append(f"dataset.{key}={value}")
    return words, usual


def folder_words(config: Any) -> list[str]:
    """What tells another command where the runs are, if it does not know."""
    from capsrun.runs.jobs import word

    return [] if config.runs_dir == "runs" else [word("runs_dir", config.runs_dir)]


def data_use(dataset: Any) -> list[str]:
    """The command that a data set is for."""
    from capsrun.data import known

    return ["eval" if known(dataset.name).for_testing else "train", *dataset_words(dataset)[0]]


def suggest(*commands: Sequence[str]) -> None:
    """Say what to do next."""
    from capsrun.runs.next_steps import command, next_lines

    print(next_lines(command(*words) for words in commands))
