"""The command line: the table of commands, how they end, and what is said about that.

PyTorch is imported by a command's own file only, once that command's settings are composed and
checked: so `--help` and `--cfg job` answer at once.
"""

import atexit
import contextlib
import importlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from capsrun import __version__, completion, compose, errors
from capsrun.errors import Busy, Noisy, Stopped, Unfinished, UserError, process_rank
from capsrun.names import as_chosen
from capsrun.terminal import BOLD, RED, printable_lines, styled
from capsrun.yaml_files import without_config_dir

# So long other processes wait for the first one to say why all of them end.
OTHERS_WAIT_SECONDS = 10.0


class Command(NamedTuple):
    """What `capsrun --help` says of a command; it is `main` of the file of its name."""

    summary: str
    example: str


COMMANDS = {
    "train": Command(
        "train a model, or go on where its run was interrupted",
        "capsrun train dataset=mnist",
    ),
    "eval": Command(
        "test a trained model: errors, confusion matrix, pictures",
        "capsrun eval dataset=mnist",
    ),
    "perturb": Command(
        "move each dimension of a capsule and draw what comes out",
        "capsrun perturb perturb.digit=5",
    ),
    "predict": Command(
        "say of which class images of one's own are",
        "capsrun predict photo.jpg",
    ),
    "explore": Command(
        "make a page in which capsules are moved by hand",
        "capsrun explore dataset=mnist",
    ),
    "export": Command(
        "write a trained model as ONNX and for torch.export, checked",
        "capsrun export dataset=mnist",
    ),
    "data": Command(
        "fetch, verify and show a data set",
        "capsrun data dataset=mnist",
    ),
    "list": Command(
        "the runs that there are: error, steps, age, state, tests",
        "capsrun list name=mnist",
    ),
    "report": Command(
        "what was measured, beside what the paper reports",
        "capsrun report",
    ),
    "reproduce": Command(
        "run the paper's experiments, as far as they are not finished",
        "capsrun reproduce budget=smoke targets=table1",
    ),
    "bench": Command(
        "time training here, beside a textbook and what the machine can do",
        "capsrun bench",
    ),
}
# It completes the others and has no settings of its own.
COMPLETION = Command(
    "let the Tab key complete all of this in bash, zsh or fish",
    "capsrun completion install",
)
ALL = {**COMMANDS, "completion": COMPLETION}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done. 1: a fault of the machine. 2: a mistake of the user. 75: another process is at work
    there. 128 + n: stopped by signal n.
    """
    if completion.WANTED in os.environ:
        completion.answer_shell(list(ALL))
    arguments = list(sys.argv[1:] if argv is None else argv)
    print_anywhere()
    threading.excepthook = without_told_twice
    signals: list[int] = []
    with interruptible(signals):
        try:
            return run(arguments, signals)
        except KeyboardInterrupt:  # while it is said why the program ends
            return 128 + (signals[-1] if signals else signal.SIGINT)
        finally:  # one that comes while Python itself ends has no traceback either
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def run(arguments: Sequence[str], signals: Sequence[int]) -> int:
    """Run one command and return its exit code; see `main`.

    signals: those that came before the command took care of them itself.
    """
    name, *rest = arguments or ["--help"]
    where = f"capsrun {name}" if name in ALL else "capsrun"
    try:
        answer(name, rest)
    except UserError as error:
        return fail(where, error, 2)
    except Stopped as stopped:
        again = f"the same command goes on: {shlex.join(['capsrun', *arguments])}"
        if process_rank()[1] > 1:
            again = "the same torchrun command goes on, with any number of processes"
        if process_rank()[0] == 0:
            say(f"{stopped}; {again}")
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return stopped_at_once(arguments, signals)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Busy as error:
        return fail(where, f"{error}; wait until that has ended, or stop it", os.EX_TEMPFAIL)
    except (Noisy, Unfinished) as error:
        return fail(where, error, 1)
    except OSError as error:
        # The machine's fault, a full disk say; what is finished or saved is whole.
        file = f"{error.filename}: " if error.filename else ""
        return fail(where, f"{file}{error.strerror or error}", 1)
    except Exception as error:
        if errors.is_out_of_memory(error):
            less = "in training, a smaller recipe.batch_size takes less"
            return fail(where, f"there is not enough memory, here or on the GPU; {less}", 1)
        if not signals:
            raise
        # Libraries that are being imported turn Ctrl-C into faults of their own.
        return stopped_at_once(arguments, signals)
    return 0


def answer(name: str, arguments: list[str]) -> None:
    """Do what the words after `capsrun` ask for. Raises what the command raises."""
    if name == "help" and arguments:
        name, arguments = arguments[0], [*arguments[1:], "--help"]
    if name in ("-h", "--help", "help"):
        print(usage(), flush=True)
    elif "--version" in (name, *arguments):
        print(f"capsrun {__version__}")
    elif name == "completion":
        completion.main(arguments)
    elif name not in COMMANDS:
        raise UserError(compose.describe_unknown_command(name, list(ALL)))
    else:
        arguments = without_config_dir(arguments)
        refuse_several_processes(name, arguments)
        refuse_a_folder_that_is_gone()
        if any(word in ("-h", "--help") for word in arguments):
            from capsrun.help import command_help

            words = [word for word in arguments if not word.startswith("-")]
            if name == "predict":  # what the images are changes nothing
                words = [word for word in words if "=" in word]
            return print(command_help(name, *COMMANDS[name], words), flush=True)
        arguments = [compose.FLAGS.get(name, {}).get(word, word) for word in arguments]
        if name == "predict":
            arguments = with_images(arguments)
        compose.refuse_unknown_options(name, arguments)
        # Hydra wants the settings side by side: an option between them ends them.
        arguments.sort(key=lambda word: "=" in word and not word.startswith("-"))
        if compose.is_sweep(arguments):
            from capsrun.sweep import run_sweep

            run_sweep(name, arguments, run_command)
        elif (found := compose.composed(name, arguments)) is not None:
            run_command(name, *found)


def with_images(words: Sequence[str]) -> list[str]:
    """The words after `predict` with the files and folders among them as the setting `images`."""
    images = [
        word
        for before, word in zip(["", *words], words)
        if not word.startswith("-") and ("=" not in word or os.path.exists(word))
        # What is said after `--cfg` is no image.
        if not compose.OPTIONS.get(compose.option_of(before) or "")
    ]
    if not images:
        return list(words)
    if any(word.startswith("images=") for word in words):
        raise UserError("name the images after `predict`, or say images=[…], but not both")
    rest = [word for word in words if word not in images]
    return [*rest, f"images=[{','.join(map(compose.in_quotes, images))}]"]


def run_command(name: str, cfg: Any, overrides: list[str]) -> Any:
    """Check the composed settings of a command and do its work; returns what its `main` does."""
    from capsrun.experiments import settings_for

    errors.begin_run()
    config: Any = settings_for(compose.schema_of(name), cfg, overrides)
    if hasattr(config, "dataset"):
        config.dataset = as_chosen(config.dataset, overrides)
    return importlib.import_module(f"capsrun.commands.{name}").main(config, overrides)


def print_anywhere() -> None:
    """Let nothing that is printed end the program, whatever the terminal or log can show.

    A character that it cannot show becomes `?`, and of a stream that is closed nobody reads.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@contextlib.contextmanager
def interruptible(signals: list[int]) -> Iterator[None]:
    """Let SIGTERM end the program as Ctrl-C does, and remember which of them came."""

    def end(number: int, _: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    with errors.handling(end):
        yield


def stopped_at_once(arguments: Sequence[str], signals: Sequence[int]) -> int:
    """Say so, and return the exit code."""
    again = shlex.join(["capsrun", *arguments])
    if process_rank()[0] == 0:
        say(f"stopped at once; the same command goes on after what is saved, or anew: {again}")
    return 128 + (signals[-1] if signals else signal.SIGINT)


def without_told_twice(failure: threading.ExceptHookArgs) -> None:
    """Print what ended a thread, but not where the main thread is going to raise it.

    TensorBoard's writer keeps what it failed of, a full disk say, for the next that wants to write.
    """
    if getattr(failure.thread, "exception", None) is not failure.exc_value:
        threading.__excepthook__(failure)


def fail(where: str, error: object, code: int) -> int:
    """Say why a command ended, and return the exit code."""
    say(f"{styled(f'{where}:', RED, sys.stderr)} {printable_lines(str(error))}")
    return code


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
    if process_rank()[1] > 1 and (name != "train" or compose.is_sweep(arguments)):
        what = f"{name} is one process" if name != "train" else "a sweep starts its own processes"
        raise UserError(f"{what}: start it without torchrun")


def refuse_a_folder_that_is_gone() -> None:
    """Raise UserError where the working folder was deleted: every path would lead nowhere."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the folder that you are in cannot be used ({error.strerror}): it was deleted, maybe, "
            "and made again; cd to it, or to another one"
        ) from error


def usage() -> str:
    """What `capsrun --help` prints."""
    lines = [
        "capsrun reproduces Dynamic Routing Between Capsules (Sabour, Frosst, Hinton, NIPS 2017).",
        "",
        "Usage: capsrun COMMAND [key=value …]",
        "",
    ]
    for name, command in ALL.items():
        lines += [f"  {styled(f'{name:<10}', BOLD)}  {command.summary}"]
        lines += [f"  {'':<10}    {command.example}"]
    lines += [
        "",
        "`capsrun train --help` lists the choices and settings of a command, and what they mean;",
        "they are Hydra's: `--cfg job` shows them composed, `--multirun seed=0,1,2` runs three.",
        "",
        "First steps: `capsrun train dataset=mnist5k` (5,000 digits, no download), `capsrun list`.",
    ]
    return "\n".join(lines)
