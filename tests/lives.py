"""Train in processes that are killed again and again: `python tests/lives.py FOLDER KILLS SEED`.

Everything is imported once; each life is a fork of this process, which takes a tenth of the time of
a new one. A life is killed by SIGKILL at a random moment, at a random operation on files, in the
middle of writing a checkpoint or a record of TensorBoard, or in the middle of a test. The next one
goes on, until enough have been killed and the last run is finished. Prints, as JSON, how many were
killed in which way, and how many runs they made.

No operation of PyTorch may run before the fork with more than one thread: OpenMP's do not survive.
"""

import collections
import functools
import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # Adam does that, in each life otherwise
from conftest import TINY, train_config
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from capsrun.commands import train
from capsrun.commands import writer as training
from capsrun.data import official  # noqa: F401
from capsrun.runs.checkpoint import read_checkpoint

SETTINGS = [
    *(word for word in TINY if not word.startswith("record.")),
    "recipe.steps=30",
    "record.log_every_steps=2",
    "record.evaluate_every_steps=12",
    "record.evaluate_images=500",
    "record.checkpoint_every_seconds=0.02",
]


CONFIG = train_config(*SETTINGS, "name=run")


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file_operation(number: int) -> None:
    """Die when a file has been opened, renamed, cut or deleted so often."""
    calls = itertools.count(1)
    watched = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")

    def count(event: str, _: object) -> None:
        if event in watched and next(calls) == number:
            die()

    sys.addaudithook(count)


def in_checkpoint(number: int) -> None:
    """Die with a part of a checkpoint written."""
    whole, calls = Path.write_bytes, itertools.count(1)

    def write_bytes(path: Path, content: bytes) -> None:
        if next(calls) == number:
            whole(path, bytes(content)[: len(content) // 2])
            die()
        whole(path, content)

    Path.write_bytes = write_bytes


def in_flush(number: int) -> None:
    """Die with a part of a record in TensorBoard's file."""
    whole, calls = RecordWriter.write, itertools.count(1)

    def write(writer: RecordWriter, content: bytes) -> None:
        whole(writer, content)
        if next(calls) == number:
            writer.flush()
            name = writer._writer.filename
            os.truncate(name, os.path.getsize(name) - len(content) // 2)
            die()

    RecordWriter.write = write


def in_test(number: int) -> None:
    """Die while the model is tested."""
    whole, calls = training.stoppable, itertools.count(1)

    def stoppable(*arguments: object):
        for item in whole(*arguments):
            if next(calls) == number:
                die()
            yield item

    training.stoppable = stoppable


# Each way to die, and how many of such moments one run has at least.
WAYS = {at_file_operation: 150, in_checkpoint: 10, in_flush: 60, in_test: 10}


def live(folder: Path, prepare=None, seconds: float | None = None) -> bool:
    """Run the command in a fork; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            log = os.open("log.txt", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(log, 1), os.dup2(log, 2)
            if prepare is not None:
                prepare()
            train.train(CONFIG, Path("runs/run/seed0"))
            code = 0
        except BaseException as error:
            print(f"Traceback: {error!r}", file=sys.stderr)
            code = 99
        sys.stdout.flush()
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"ended with {code}:\n{(folder / 'log.txt').read_text()}")
    return code == 0


def check_whole(folder: Path) -> None:
    """Fail for a file of a killed run that is half-written."""
    readers = {".json": json.loads, ".yaml": OmegaConf.create}
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix in readers:
            assert readers[path.suffix](path.read_text()), path
        elif path.suffix == ".pt":
            read_checkpoint(path)
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>"), path
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    (folder / "straight").mkdir()
    began = time.monotonic()
    assert live(folder / "straight")
    length = time.monotonic() - began
    chance = random.Random(seed)
    killed, runs = collections.Counter[str](), 0
    ways = itertools.cycle([None, *WAYS])
    while True:
        runs += 1
        place = folder / f"killed{runs}"
        place.mkdir()
        while sum(killed.values()) < kills:
            way = next(ways)
            if way is None:
                finished = live(place, seconds=chance.uniform(0, length))
            else:
                number = chance.randint(1, WAYS[way])
                finished = live(place, functools.partial(way, number))
            if finished:
                break
            killed[way.__name__ if way else "at_random_moment"] += 1
            check_whole(place / "runs")
        else:
            assert live(place)
        if sum(killed.values()) >= kills:
            break
    print(json.dumps({"killed": killed, "runs": runs}))


if __name__ == "__main__":
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    Path(sys.argv[1]).mkdir(parents=True)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
