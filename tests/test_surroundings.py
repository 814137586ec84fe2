"""What is set outside of capsrun does not change what it does: encodings, launchers' variables."""

import contextlib
import io
import os
import signal
import subprocess
import sys

import pytest
from conftest import run_python

from capsrun import disk
from capsrun.cli import main
from capsrun.errors import Busy, UserError, process_rank
from capsrun.runs.recorder import Recorder


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "shift_jis"])
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["list"], ["nonsense"]])
def test_a_terminal_that_lacks_a_character_shows_another(monkeypatch, in_tmp, encoding, words):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with contextlib.suppress(SystemExit):  # by which Hydra's own help ends
        assert main(words) == (2 if words == ["nonsense"] else 0)
    for stream in streams:
        stream.flush()
    printed = b"".join(stream.buffer.getvalue() for stream in streams)
    assert b"capsrun" in printed


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_ends_nothing(tmp_path, closed):
    command = f"{sys.executable} -m capsrun list runs_dir=none {closed}"
    assert subprocess.run(command, shell=True, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize("word", ["name=f\udcfcr", "runs_dir=\udcc3\udcbc", "name=\ud800"])
def test_bytes_that_are_no_text_are_refused_before_anything_is_written(refused, in_tmp, word):
    assert "is no text in the encoding" in refused("train", word)
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize(
    ("rank", "count", "found"),
    [
        ("", "", (0, 1)),
        ("x", "2", (0, 1)),
        (None, "2", (0, 1)),
        ("1", None, (0, 1)),
        ("-1", "2", (0, 1)),
        ("²", "3", (0, 1)),
        ("5", "2", (0, 1)),
        ("1", "2", (1, 2)),
    ],
)
def test_variables_of_launchers_count_as_a_pair_of_numbers(monkeypatch, rank, count, found):
    for name, value in (("RANK", rank), ("WORLD_SIZE", count)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert process_rank() == found


def test_ctrl_c_while_python_ends_has_no_traceback():
    """What libraries do then takes a moment."""
    script = """
import atexit, os, signal
from capsrun.cli import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
main(["--version"])
"""
    done = run_python("-c", script)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("words", [["list"], ["train", "--help"], ["report"], ["train", "-m"]])
def test_a_working_folder_that_was_deleted_is_said(in_tmp, refused, words):
    (in_tmp / "gone").mkdir()
    os.chdir(in_tmp / "gone")
    (in_tmp / "gone").rmdir()
    assert "the folder that you are in cannot be used (No such file or" in refused(*words)


def test_a_lock_that_is_no_plain_file_is_refused_and_nothing_is_written(tmp_path):
    """In a run from somebody else a `.lock` may be a link to any file of one's own."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(UserError, match="no plain file"), disk.locked(tmp_path / ".lock"):
        pass
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock-owner").symlink_to(precious)
    with disk.locked(tmp_path / ".lock"):
        assert "process" in (tmp_path / ".lock-owner").read_text()
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    """As root one could rename over a device."""
    path = tmp_path / "page.html"
    make(path)
    before = os.lstat(path)
    with pytest.raises(UserError, match="is there, and is no file"), disk.replacing(path):
        pass
    assert os.path.samestat(os.lstat(path), before)
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_not_written_through_a_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (tmp_path / "metrics.jsonl").symlink_to(precious)
    with pytest.raises(UserError, match="is no plain file"):
        Recorder(tmp_path, steps=3)
    assert precious.read_text() == "mine"


def test_a_pipe_in_place_of_a_lock_or_its_owner_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".lock")
    assert disk.holder(tmp_path / ".lock") is None
    (tmp_path / ".lock").unlink()
    with disk.locked(tmp_path / ".lock"):
        (tmp_path / ".lock-owner").unlink()
        os.mkfifo(tmp_path / ".lock-owner")
        with pytest.raises(Busy, match="another process"):
            disk.refuse_if_locked(tmp_path / ".lock")


def test_who_holds_a_lock_sees_that_its_file_was_deleted(tmp_path):
    with disk.locked(tmp_path / ".lock") as is_held:
        assert is_held()
        (tmp_path / ".lock").unlink()
        assert not is_held()
        (tmp_path / ".lock").touch()
        assert not is_held()


STYLE = """
text.usetex: True
image.origin: lower
figure.facecolor: black
text.color: white
axes.labelcolor: white
savefig.transparent: True
savefig.dpi: 13
font.size: 30
lines.linewidth: 9
"""


@pytest.mark.parametrize("command", ["perturb", "eval"])
def test_pictures_do_not_depend_on_what_is_set_for_matplotlib(
    tiny_run, tmp_path, monkeypatch, command
):
    """Neither on a style in a matplotlibrc, nor on a backend, which a notebook sets; such files may
    be damaged, too.
    """
    words = [command, "dataset=mnist5k", f"checkpoint={tiny_run}"]
    words += ["perturb.digit=3"] if command == "perturb" else ["images=50"]
    drawn = []
    for name in ("plain", "styled"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "styled":
            (folder / "matplotlibrc").write_bytes(f"{STYLE}\nfoo.bar: 3\n# é".encode("latin-1"))
            styles = tmp_path / "config" / "stylelib"
            styles.mkdir(parents=True)
            (styles / "mine.mplstyle").write_bytes(b"# \xff")
            monkeypatch.setenv("MPLCONFIGDIR", str(styles.parent))
            monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
        done = run_python("-m", "capsrun", *words, f"out_dir={folder}/out", cwd=folder)
        assert (done.returncode, done.stderr) == (0, "")
        pictures = sorted((folder / "out" / "pictures").iterdir())
        drawn.append({path.name: path.read_bytes() for path in pictures})
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) >= 1
