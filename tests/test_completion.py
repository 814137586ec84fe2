"""Tab completion: what is offered, in real shells, how fast, and installing it."""

import os
import pty
import re
import resource
import select
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_python

from capsrun import cli, completion, compose
from capsrun.models.fast import native

# A program of the name that the shells look for.
PROGRAM = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m capsrun "$@"\n'


def needs(shell):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not installed")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty home folder, to work in, with capsrun on the PATH."""
    for variable in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR", "CAPSRUN_DATA"):
        monkeypatch.delenv(variable, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "capsrun").write_text(PROGRAM)
    (programs / "capsrun").chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(home)
    return home


def offered(typed):
    """What is offered when Tab is pressed after these words, separated by blanks."""
    return completion.candidates(typed.split(" "), list(cli.ALL))


# What is typed, and what is offered.
OFFERED = {
    "tr": "train",
    "re": "report reproduce",
    "--v": "--version",
    "comp": "completion",
    "completion un": "uninstall",
    "completion install ": "bash zsh fish",
    "completion install zsh ": "",
    "train dataset=mnist": ("dataset=mnist dataset=mnist1k dataset=mnist5k dataset=mnist_padded"),
    "train dataset.s": "dataset.source= dataset.shift_px= dataset.standardise= dataset.split_seed=",
    "train routing.i": "routing.iterations=",
    "train model=cnn_baseline routing.": "",
    "train model=cnn_baseline model.ch": "model.channels=",
    "train model.ch": "",
    "train seed=3 see": "",
    "train compile=": "compile=true compile=false",
    "train model.padding=s": "model.padding=same",
    "train model=cnn_authors loss.activation=so": "loss.activation=softmax",
    "train experiment=ablation_d": "experiment=ablation_detach",
    "train --multirun loss=authors,pap": "loss=authors,paper",
    "train --m": "--multirun",
    "train --cfg ": "job hydra all",
    "bench --pr": "--profile",
    "eval split=te": "split=test",
    "eval recipe": "",
    "eval att": "attack=",
    "eval attack=": "attack=bim attack=fgsm attack=pgd",
    "eval attack=pgd attack.st": "attack.step_size= attack.steps=",
    "eval attack=pgd attack.loss=": "attack.loss=difference attack.loss=trained",
    "eval detect=[mnist5k,k": "detect=[mnist5k,kmnist]",
    "eval detect=no": "detect=noise",
    "perturb perturb.invert=a": "perturb.invert=auto",
    "reproduce targets=[table1,figure_": (
        "targets=[table1,figure_3] targets=[table1,figure_4] targets=[table1,figure_5] "
        "targets=[table1,figure_a1] targets=[table1,figure_b1]"
    ),
    "reproduce budget=s": "budget=short budget=smoke",
    "nonsense ": "",
    "train nonsense=": "",
    "train dataset=nonsense loss=p": "loss=paper",
}


@pytest.mark.parametrize("typed", OFFERED)
def test_what_is_offered(typed):
    assert sorted(offered(typed)) == sorted(OFFERED[typed].split())


def test_images_and_folders_are_offered_to_predict(in_tmp):
    for name in ("a.png", "b.jpg", "notes.txt"):
        (in_tmp / name).write_bytes(b"")
    (in_tmp / "photos").mkdir()
    assert {"a.png", "b.jpg", "photos/", "checkpoint="} <= {*offered("predict ")}
    assert offered("predict a") == ["a.png"]
    assert "notes.txt" not in offered("predict n")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_group_and_setting_is_offered_and_nothing_else(command):
    """What is offered with a value that it has can be composed."""
    keys = {key.removesuffix("=") for key in offered(f"{command} ") if key.endswith("=")}
    settings = set(compose.setting_names(command, []))
    groups = set(compose.group_choices(command))
    assert groups <= keys <= settings | groups
    for key in ("runs_dir", "seed", "dataset.data_dir", "record.log_every_steps"):
        assert (key in keys) == (key in settings)


def test_a_folder_of_ones_own_and_its_files_are_offered(home):
    (home / "own" / "recipe").mkdir(parents=True)
    (home / "own" / "recipe" / "mine.yaml").write_text("defaults: [quick, _self_]\n")
    assert offered("train --config-dir o") == ["own/"]
    assert offered("train --config-dir own recipe=mi") == ["recipe=mine"]
    assert offered("train recipe=mi") == []
    assert offered("list columns=[routing.it") == ["columns=[routing.iterations]"]


def test_paths_are_offered_where_a_setting_is_one(home):
    for name in ("runs/a b/seed0", "runs/.hidden", "runs/c=d", "data"):
        (home / name).mkdir(parents=True)
    for name in ("five.png", "model.pt", "notes.txt"):
        (home / name).touch()
    for typed, values in {
        "eval checkpoint=": ["data/", "model.pt", "runs/", "small"],
        "eval checkpoint=r": ["runs/"],
        "eval attack=pgd attack.source=mo": ["model.pt"],
        "eval checkpoint=runs/": ["runs/a b/"],
        "eval ensemble=[model.pt,mo": ["[model.pt,model.pt]"],
        "eval checkpoint=~/mo": ["~/model.pt"],
        "perturb perturb.image=": ["data/", "five.png", "runs/"],
        "train runs_dir=": ["data/", "runs/"],
        f"train runs_dir={home}/da": [f"{home}/data/"],
    }.items():
        key = typed.split()[-1].partition("=")[0]
        assert offered(typed) == [f"{key}={value}" for value in values]


@pytest.mark.parametrize("line", ["capsrun ", "capsrun train rec"])
def test_it_answers_at_once_and_imports_no_torch(line):
    script = """
import sys, argcomplete
from capsrun import cli
def check(parser):
    assert not {"torch", "matplotlib", "numpy"} & set(sys.modules), sys.modules
    original(parser, exit_method=sys.exit, output_stream=sys.stdout)
original, argcomplete.autocomplete = argcomplete.autocomplete, check
cli.main([])
"""
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line))}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_python("-c", script, env={**os.environ, **asked})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert {"train", "recipe="} & set(done.stdout.split("\013"))
    assert after.ru_utime - before.ru_utime < 1.0  # 0.4 where nothing else runs


def typed(shell: list[str], setup: str, lines: list[str]) -> list[str]:
    """What becomes of lines in a shell on a terminal when Tab is pressed at the end of each.

    setup: makes Ctrl-T print the line that is typed as `<line>`, and empty it.
    """
    main, side = pty.openpty()
    terminal = {"stdin": side, "stdout": side, "stderr": side, "start_new_session": True}
    environment = {**os.environ, "TERM": "xterm", "PS1": "$ "}
    process = subprocess.Popen(shell, env=environment, **terminal)
    os.close(side)

    def until(pattern: str) -> str:
        shown, ends = "", time.monotonic() + 30
        while not (found := re.search(pattern, shown)):
            assert time.monotonic() < ends, shown
            if select.select([main], [], [], 1)[0]:
                shown += os.read(main, 4096).decode()
        return found[1]

    try:
        os.write(main, f"{setup}; echo rea''dy\n".encode())
        until("(ready)")
        became = []
        for line in lines:
            os.write(main, line.encode() + b"\t")
            time.sleep(0.2)  # a shell may take keys that wait for another paste
            os.write(main, b"\x14")
            became.append(until("<(.*)>\r\n"))
        return became
    finally:
        process.kill()
        process.wait()
        os.close(main)


TYPED = {
    "capsrun tr": "capsrun train ",
    "capsrun train dataset=km": "capsrun train dataset=kmnist ",
    "capsrun train model=cnn_baseline model.chan": (
        "capsrun train model=cnn_baseline model.channels="
    ),
    "capsrun eval checkpoint=my": "capsrun eval checkpoint=my\\ runs/",
    "capsrun train dataset=mnist_": "capsrun train dataset=mnist_padded ",
    "capsrun train device=c": "capsrun train device=c",
}


# See `typed`.
SETUPS = {
    "bash": (
        "show() { printf '\\n<%s>\\n' \"$READLINE_LINE\"; READLINE_LINE=; }; "
        "bind 'set bell-style none'; bind -x '\"\\C-t\": show'"
    ),
    "zsh": (
        "unsetopt beep; show() { print -r -- $'\\n'\"<$BUFFER>\"; BUFFER= }; "
        "zle -N show; bindkey '^T' show"
    ),
}


@pytest.mark.parametrize("shell", [pytest.param(name, marks=needs(name)) for name in SETUPS])
def test_bash_and_zsh_as_it_is_typed(home, shell):
    (home / "my runs").mkdir()
    completion.install(shell)
    assert typed([shell, "-i"], SETUPS[shell], list(TYPED)) == list(TYPED.values())


@needs("fish")
def test_fish(home):
    completion.install("fish")
    for line, expected in {
        "capsrun tr": ["train"],
        "capsrun train dataset=km": ["dataset=kmnist"],
        "capsrun train model=cnn_baseline model.chan": ["model.channels="],
        "capsrun nonsense ": [],
    }.items():
        command = ["fish", "-c", f"complete -C {shlex.quote(line)}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert [shown.split("\t")[0] for shown in done.stdout.splitlines()] == expected


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_scripts_are_printed_and_are_correct(shell, capsys, tmp_path):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "capsrun" in script
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


@pytest.mark.parametrize(("shell", "startup"), [("bash", ".bashrc"), ("zsh", ".zshrc")])
def test_installing_adds_one_line_once_and_uninstalling_takes_it_out(home, capsys, shell, startup):
    before = "alias ll='ls -l'\n# the end, without a newline"
    (home / "dotfiles").write_text(before)
    (home / "dotfiles").chmod(0o600)
    (home / startup).symlink_to("dotfiles")
    assert cli.main(["completion", "install", shell]) == 0
    said = capsys.readouterr().out
    script = completion.places(shell)[0]
    for part in (f"written: {script}", f"added to {home / startup}: ", "uninstall", "next: "):
        assert part in said
    added = (home / startup).read_text()
    assert added.startswith(before + "\n")
    assert added.count("\n") == 3
    assert script.read_text() == completion.script(shell)
    assert cli.main(["completion", "install", shell]) == 0
    assert "loads it already" in capsys.readouterr().out
    assert (home / startup).read_text() == added
    assert cli.main(["completion", "uninstall"]) == 0
    assert f"deleted: {script}" in capsys.readouterr().out
    assert (home / startup).read_text() == before + "\n"
    assert not script.exists()
    assert (home / startup).is_symlink()
    assert (home / "dotfiles").stat().st_mode & 0o777 == 0o600
    assert cli.main(["completion", "uninstall"]) == 0
    assert capsys.readouterr().out == "no completion is installed\n"


ODD = b"export NAME=J\xfcrgen\x0c\r\nalias \xe2\x80\xa8a=b\n\nlast"


def test_other_lines_of_a_shells_file_stay_as_they_are_and_whose_they_are(home, monkeypatch):
    """Whatever their encoding and line ends; also where root installs it for somebody."""
    owners = []
    monkeypatch.setattr("os.chown", lambda _, *owner: owners.append(owner))
    file = home / ".bashrc"
    file.write_bytes(ODD)
    completion.install("bash")
    assert file.read_bytes().startswith(ODD + b"\n[ -r ")
    completion.uninstall(["bash"])
    assert file.read_bytes() == ODD + b"\n"
    assert owners == 2 * [(file.stat().st_uid, file.stat().st_gid)]


@pytest.mark.parametrize("file", [".bashrc", ".local/share/bash-completion/completions/capsrun"])
def test_a_full_disk_leaves_what_there_was(home, monkeypatch, refused, file):
    completion.install("bash")
    (home / file).write_text("mine")

    def refuse(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    said = refused("completion", "install", "bash")
    assert "cannot be written or removed: [Errno 28] No space left on device: '" in said
    assert (home / file).read_text() == "mine"
    assert not list(home.rglob("*.capsrun-part"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "{} is no regular file"),
        (os.mkdir, "Is a directory: '{}'"),
        (lambda file: file.symlink_to("/dev/zero"), "{} is no regular file"),
    ],
)
def test_a_shells_file_that_is_none_is_refused(home, refused, make, said):
    make(home / ".bashrc")
    assert said.format(home / ".bashrc") in refused("completion", "install", "bash")


def test_the_line_does_no_harm_where_the_script_is_gone(home):
    completion.install("bash")
    completion.places("bash")[0].unlink()
    command = f". {home}/.bashrc; echo fine"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_the_shell_is_that_of_the_user_and_fish_needs_no_line(home, monkeypatch, capsys):
    def files():
        return {path.name for path in home.rglob("*") if path.is_file()}

    monkeypatch.setenv("SHELL", "/usr/bin/fish")
    assert cli.main(["completion", "install"]) == 0
    assert files() == {"capsrun.fish"}
    assert cli.main(["completion", "uninstall", "fish"]) == 0
    assert files() == set()
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert cli.main(["completion", "install"]) == 0
    assert ".zshrc" in files()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert cli.main(["completion", "install"]) == 2
    assert "capsrun completion install bash|zsh|fish" in capsys.readouterr().err


def test_a_user_without_a_home(home, monkeypatch, refused):
    """As in a container that runs under the number of a user that it does not know."""

    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert "determine home directory; `capsrun" in refused("completion", "install", "bash")
    assert native._cache_dir() is None


def test_a_home_that_cannot_be_written(home, capsys):
    (home / ".local").write_text("a file")
    assert cli.main(["completion", "install", "bash"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "`capsrun completion bash|zsh|fish` prints it" in message
    assert not (home / ".bashrc").exists()
