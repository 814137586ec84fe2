"""Two processes at once: locks, and that what two do at the same place does not collide."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from conftest import TINY, train_config

from capsrun import cli, disk
from capsrun.commands import reproduce
from capsrun.commands.train import train
from capsrun.disk import holder, locked, remove_leftovers
from capsrun.errors import Busy
from capsrun.runs.folder import RunFolder
from capsrun.runs.jobs import Job
from capsrun.runs.progress import StopRequest


def python(script: str, path: Path) -> subprocess.Popen:
    """Start a script that is given a path."""
    words = [sys.executable, "-c", f"import sys, time, pathlib\n{script}", str(path)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


HOLD = """
from capsrun.disk import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def hold(path: Path) -> subprocess.Popen:
    """Start a process that holds a lock, and wait until it does."""
    process = python(HOLD, path)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_lock_is_refused_and_its_owner_named_and_a_dead_process_keeps_none(tmp_path):
    path = tmp_path / ".lock"
    with hold(path) as other:
        began, owner = time.monotonic(), f"process {other.pid}"
        with pytest.raises(Busy, match=rf"{tmp_path} is in use by {owner} on \S+ since"):
            locked(path).__enter__()
        assert time.monotonic() - began < 2, "at once"
        assert owner in holder(path)
        other.kill()
    assert path.exists(), "it could not delete it"
    assert holder(path) is None
    with locked(path):
        assert f"process {os.getpid()} " in holder(path)
    assert holder(path) is None


def test_who_looks_whether_a_lock_is_taken_does_not_take_it(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    stop = threading.Event()

    def look():
        while not stop.is_set():
            holder(path)

    threads = [threading.Thread(target=look) for _ in range(3)]
    with ExitStack() as at_the_end:
        at_the_end.callback(lambda: [thread.join() for thread in threads])
        at_the_end.callback(stop.set)
        for thread in threads:
            thread.start()
        for _ in range(20):
            with locked(path):
                pass
            path.touch()


def test_of_many_that_want_a_lock_one_at_a_time_has_it(tmp_path):
    """Also while its file is deleted and made again all the time."""
    script = """
from capsrun import disk
folder = pathlib.Path(sys.argv[1])
disk.PAUSE_SECONDS = disk.RETRY_SECONDS = 0.001
for _ in range(20):
    with disk.locked(folder / ".lock", "counting"):
        number = int((folder / "number").read_text())
        time.sleep(0.001)
        (folder / "number").write_text(str(number + 1))
"""
    (tmp_path / "number").write_text("0")
    processes = [python(script, tmp_path) for _ in range(4)]
    for process in processes:
        process.communicate(timeout=120)
    assert [process.returncode for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "80"


def test_without_locks_in_the_file_system_it_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(disk.FileLock, "acquire", refuse)
    monkeypatch.setattr("capsrun.errors.notices", [])
    with locked(tmp_path / ".lock"):
        assert holder(tmp_path / ".lock") is None
    assert "has no locks (No locks available)" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_lock_that_this_user_may_not_take_is_not_gone_on_without(tmp_path, monkeypatch, number):
    """Whoever may take it could be at work there."""

    def refuse(*args, **options):
        raise OSError(number, os.strerror(number), str(tmp_path / ".lock"))

    monkeypatch.setattr(disk.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match=os.strerror(number)), locked(tmp_path / ".lock"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_killed_processes_left_is_deleted_but_not_what_others_write(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    # Process 1 is alive.
    kept = [".bashrc.20231101", ".result.json.1.capsrun-part", "checkpoint.pt"]
    for name in (f".checkpoint.pt.{dead.pid}.capsrun-part", *kept):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_training_refuses_a_run_at_which_another_process_is_at_work(in_tmp, monkeypatch, capsys):
    """At once, and also where that began after this one had looked."""
    folder = in_tmp / "runs" / "twice" / "seed0"
    folder.mkdir(parents=True)
    words = ["train", *TINY, "name=twice"]
    with hold(folder / ".lock") as other:
        with monkeypatch.context() as patch:
            patch.setattr("capsrun.commands.train.load_dataset", lambda *_: 1 / 0)
            assert cli.main(words) == os.EX_TEMPFAIL
        with monkeypatch.context() as patch:
            patch.setattr("capsrun.disk.refuse_if_locked", lambda _: None)
            assert cli.main(words) == os.EX_TEMPFAIL
        other.kill()
    said = capsys.readouterr().err
    assert said.count(f"runs/twice/seed0 is in use by process {other.pid} on") == 2
    assert {path.name for path in folder.iterdir()} == {".lock", ".lock-owner"}, "no more"


def test_a_run_that_another_process_has_finished_meanwhile_is_left_to_it(tiny_run, tmp_path):
    folder = RunFolder(tmp_path, {})
    assert folder.result() is None
    shutil.copy(tiny_run / "result.json", tmp_path)
    with closing(folder), pytest.raises(Busy, match="has been finished by another process"):
        folder.open()
    assert holder(tmp_path / ".lock") is None


def test_who_waits_for_a_lock_says_so_and_gets_it(tmp_path, capsys):
    done = []

    def wait():
        with locked(tmp_path / ".lock", "downloading digits"):
            done.append("second")

    with locked(tmp_path / ".lock", "downloading digits"):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(1)
        done.append("first")
    waiting.join()
    assert done == ["first", "second"]
    assert "which is downloading digits; waiting for it" in capsys.readouterr().out


@pytest.mark.slow
def test_two_that_begin_at_the_same_time_do_not_meet(in_tmp):
    """Whichever is the first trains; the other one is refused, or finds the run finished."""
    words = [sys.executable, "-m", "capsrun", "train", *TINY, "name=race"]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, os.EX_TEMPFAIL]), said
    result = json.loads((in_tmp / "runs/race/seed0/result.json").read_text())
    assert result["steps"] == 12


def test_eval_refuses_a_folder_that_another_process_writes(tiny_run, in_tmp, capsys):
    words = ["eval", "dataset=mnist5k", f"checkpoint={tiny_run}", "out_dir=out", "images=50"]
    (in_tmp / "out").mkdir()
    with locked(Path("out/.lock")):
        assert cli.main(words) == os.EX_TEMPFAIL
        assert cli.main(["perturb", *words[1:-1]]) == os.EX_TEMPFAIL
    assert "out is in use by process" in capsys.readouterr().err
    assert cli.main(words) == 0


def test_a_failed_run_gives_its_lock_back(in_tmp, monkeypatch):
    config = train_config(*TINY, "name=run")
    for part in ("build_model", "training_loop"):
        with monkeypatch.context() as patch:
            patch.setattr(f"capsrun.commands.train.{part}", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                train(config, in_tmp / "run")
    assert holder(in_tmp / "run" / ".lock") is None
    assert train(config, in_tmp / "run")["steps"] == 12


MAKE = "pathlib.Path(sys.argv[1]).touch()"


def test_two_that_reproduce_share_the_jobs(tmp_path, monkeypatch):
    """A job at which another process is at work is left to it, and what needs it waits."""
    started = []
    monkeypatch.setattr("capsrun.errors.notices", [])

    def start(job, beside, quiet):
        started.append(str(job))
        return python(MAKE, job.result)

    monkeypatch.setattr(reproduce, "start", start)
    taken = Job("taken", 0, tmp_path / "taken", ())
    needs_it = Job("needs_it", 0, tmp_path / "needs_it", (), (taken,))
    free = Job("free", 0, tmp_path / "free", ())
    for job in (taken, needs_it, free):
        job.folder.mkdir()
    with hold(taken.folder / ".lock") as other:

        def finish_it():
            time.sleep(2)
            taken.result.touch()
            other.kill()

        threading.Thread(target=finish_it).start()
        outcome = reproduce.run([taken, needs_it, free], 1, None, StopRequest())
    assert started == ["free seed 0", "needs_it seed 0"]
    finished = {str(job) for job in outcome.finished}
    assert finished == {"taken seed 0", "free seed 0", "needs_it seed 0"}
    assert not outcome.waiting


def test_a_job_whose_run_was_taken_at_the_last_moment_is_tried_again(tmp_path, monkeypatch):
    job = Job("late", 0, tmp_path / "late", ())
    job.folder.mkdir()
    codes = ["sys.exit(75)", MAKE]
    monkeypatch.setattr(reproduce, "start", lambda job, *_, **__: python(codes.pop(0), job.result))
    outcome = reproduce.run([job], 1, None, StopRequest())
    assert (outcome.finished, outcome.failed, codes) == ([job], [], [])


def test_two_downloads_of_the_same_set_both_succeed(tmp_path):
    """The second waits for the first, and then finds what it wants: it is downloaded once."""
    script = """
from capsrun.data import files
folder = pathlib.Path(sys.argv[1])
def slowly(path, *arguments):
    with open(folder / "downloads", "a") as log: log.write("x")
    time.sleep(3); path.write_bytes(b"whole")
files._download = slowly
home = files.Home(folder, "data", "A set", "no")
assert files.obtain(home, "set.zip", ["http://x"], None, files.read_file) == b"whole"
"""
    both = [python(script, tmp_path) for _ in range(2)]
    said = [process.communicate(timeout=100)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "x"
    assert sum("which is downloading A set; waiting for it" in text for text in said) == 1
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["set.zip"]
