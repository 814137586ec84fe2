"""Faults of the machine while a run goes on: one sentence, and nothing lost that was saved."""

import contextlib
import functools
import itertools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_python, train_config
from test_train import assert_same_run, assert_same_weights, metrics

from capsrun import cli
from capsrun.commands import writer as training
from capsrun.commands.train import train
from capsrun.data.splits import TrainingBatches
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.runs.progress import ProgressLine

# A checkpoint after every step.
ARGUMENTS = [*TINY, "record.checkpoint_every_seconds=0", "name=run"]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own of a few megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8000000", "none", str(folder)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here (it takes root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def at_step(monkeypatch, step: int, act: Callable[[], object]) -> None:
    """Do something before a step is made."""
    original, calls = TrainingBatches.batch, itertools.count(1)

    def batch(*arguments):
        if next(calls) == step:
            act()
        return original(*arguments)

    monkeypatch.setattr(TrainingBatches, "batch", batch)


def fill(folder: Path) -> None:
    """Leave no byte of a disk."""
    with open(folder / "filler", "wb", buffering=0) as filler:
        for size in (1 << 16, 1 << 10, 1):
            with contextlib.suppress(OSError):
                while True:
                    filler.write(b"x" * size)


def said_of(act: Callable[[], object], monkeypatch, capsys, words=ARGUMENTS) -> str:
    """What is said of something that happens before the sixth step, and ends the command."""
    with monkeypatch.context() as patch:
        at_step(patch, 6, act)
        assert cli.main(["train", *words]) == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_a_full_disk(small_disk, tiny_run, monkeypatch, capsys):
    folder, words = small_disk / "run" / "seed0", [*ARGUMENTS, f"runs_dir={small_disk}"]
    said = said_of(lambda: fill(small_disk), monkeypatch, capsys, words)
    assert f"{folder} cannot be written any more: No space left on device" in said
    assert "saved is the last checkpoint, and the same command goes on from there" in said
    assert read_checkpoint(folder / "checkpoint.pt")["step"] == 5
    # Still full: nothing is lost by trying.
    assert cli.main(["train", *words]) in (1, 2)
    assert "No space left on device" in capsys.readouterr().err
    assert read_checkpoint(folder / "checkpoint.pt")["step"] == 5
    (small_disk / "filler").unlink()
    assert cli.main(["train", *words]) == 0
    assert_same_weights(folder, tiny_run)
    assert metrics(folder) == metrics(tiny_run)


def test_a_disk_that_becomes_read_only(small_disk, monkeypatch, capsys):
    def remount(option: str) -> None:
        words = ["mount", "-o", f"remount,{option}", str(small_disk)]
        subprocess.run(words, check=False, capture_output=True)

    folder, words = small_disk / "run" / "seed0", [*ARGUMENTS, f"runs_dir={small_disk}"]

    def refuse(*_):
        raise OSError(30, "Read-only file system", str(folder / "metrics.jsonl"))

    # What is open for writing keeps a file system from that; TensorBoard's file is, so by force.
    with monkeypatch.context() as patch:
        act = functools.partial(patch.setattr, "pathlib.Path.write_bytes", refuse)
        said = said_of(act, monkeypatch, capsys, words)
    assert "cannot be written any more: Read-only file system" in said
    remount("ro")
    assert cli.main(["train", *words]) == 2
    assert "cannot be written to: Read-only file system" in capsys.readouterr().err
    assert load_checkpoint(folder).step == 5
    remount("rw")


def test_a_quota(in_tmp, monkeypatch, capsys):
    """The system's limit for the size of a file, as a quota for all of them, refuses a write."""
    kind = resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(kind)
    try:
        act = functools.partial(resource.setrlimit, kind, (10_000, hard))
        said = said_of(act, monkeypatch, capsys)
    finally:
        resource.setrlimit(kind, (soft, hard))
    assert "runs/run/seed0 cannot be written any more: File too large" in said
    folder = in_tmp / "runs" / "run" / "seed0"
    assert read_checkpoint(folder / "checkpoint.pt")["step"] == 5
    assert not list(folder.glob(".*.capsrun-part"))
    assert cli.main(["train", *ARGUMENTS]) == 0


def test_too_little_memory(in_tmp, monkeypatch, capsys):
    said = said_of(lambda: torch.empty(10**15), monkeypatch, capsys)
    assert "there is not enough memory, here or on the GPU" in said
    folder = in_tmp / "runs" / "run" / "seed0"
    assert read_checkpoint(folder / "checkpoint.pt")["step"] == 5


def test_a_folder_that_is_deleted_and_begun_anew_is_left_to_who_did_that(
    in_tmp, monkeypatch, capsys
):
    """Its checkpoint would be that of a run with other settings."""
    folder = in_tmp / "runs" / "run" / "seed0"

    def begin_anew():
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / ".lock-owner").write_text("another process")

    said = said_of(begin_anew, monkeypatch, capsys)
    assert "runs/run/seed0 has vanished while the run went on" in said
    assert sorted(path.name for path in folder.iterdir()) == [".lock", ".lock-owner"]


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(in_tmp, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert cli.main(["train", *ARGUMENTS]) == 128 + signal.SIGINT
    file = in_tmp / "runs" / "run" / "seed0" / "checkpoint.pt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["config"]["recipe"]["learning_rate"] = 0.5
    torch.save(checkpoint, file)
    assert cli.main(["train", *ARGUMENTS]) == 2
    said = capsys.readouterr().err
    assert "is of a run with other settings: recipe.learning_rate (there 0.5, now 0.004)" in said


def test_a_folder_that_vanishes(in_tmp, monkeypatch, capsys):
    folder = in_tmp / "runs" / "run" / "seed0"
    said = said_of(lambda: shutil.rmtree(folder), monkeypatch, capsys)
    assert "runs/run/seed0 has vanished while the run went on; the same command begins" in said
    assert not folder.exists()
    assert cli.main(["train", *ARGUMENTS]) == 0


@pytest.mark.slow
def test_a_full_disk_in_a_process_of_its_own_has_no_traceback_either(small_disk):
    """TensorBoard writes in a thread, which ends before the run does."""
    script = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_faults, pytest
from capsrun import cli
disk = Path(sys.argv[2])
test_faults.at_step(pytest.MonkeyPatch(), 3, lambda: test_faults.fill(disk))
sys.exit(cli.main(["train", *test_faults.TINY, "name=run", f"runs_dir={disk}"]))
"""
    done = run_python("-c", script, str(Path(__file__).parent), str(small_disk))
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr.splitlines()[-1]


def test_pictures_and_results_are_complete_after_a_fault_at_the_end(
    tmp_path, monkeypatch, tiny_run
):
    """The disk fills while the trained model is tested: only that is to be done again."""
    config = train_config(*TINY, "name=run")
    monkeypatch.setattr("capsrun.errors.notices", [])

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", refuse)
        with pytest.raises(OSError, match="cannot be written any more"):
            train(config, tmp_path / "run")
    assert load_checkpoint(tmp_path / "run").finished
    train(config, tmp_path / "run")
    assert_same_run(tmp_path / "run", tiny_run)


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    def refuse(*_):
        raise BrokenPipeError

    monkeypatch.setattr(ProgressLine, "say", refuse)
    with pytest.raises(BrokenPipeError):
        train(train_config(*ARGUMENTS), tmp_path / "run")
