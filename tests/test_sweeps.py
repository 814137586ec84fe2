"""Sweeps: every job ends with a sentence, the others go on, and a signal saves."""

import contextlib
import errno
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, TINY, has_logged, run_capsrun, train_config

from capsrun import cli, compose, errors, names
from capsrun.errors import Stopped, Unfinished, UserError
from capsrun.sweep import Outcome, Sweep, run_sweep, show_summary

PLUGINS = {
    "local": ("hydra-joblib-launcher", "joblib"),
    "slurm": ("hydra-submitit-launcher", "slurm"),
    "ray": ("hydra-ray-launcher", "ray"),
    "optuna": ("hydra-optuna-sweeper", "optuna"),
}


def installed(choice):
    try:
        importlib.metadata.version(PLUGINS[choice][0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs(choice):
    package, extra = PLUGINS[choice]
    reason = f"{package} is not installed: pip install 'capsrun[{extra}]'"
    return pytest.mark.skipif(not installed(choice), reason=reason)


def working(**ends):
    """What runs a job: by its seed it raises something, or returns a result with this error.

    It is made here so that workers get it whole, and need not import this file.
    """

    def work(name, cfg, words):
        end = ends.get(f"seed{cfg.seed}", 0.0)
        if isinstance(end, BaseException):
            raise end
        if callable(end):
            return end()
        return {"error_percent": 10 - end, "scores": {"validation": {"error_percent": end}}}

    return work


@pytest.mark.parametrize(
    "launcher",
    [
        [],
        pytest.param(["sweep=local"], marks=needs("local")),
        pytest.param(["hydra/launcher=submitit_local"], marks=[needs("slurm"), pytest.mark.slow]),
    ],
)
def test_a_failing_job_stops_no_other(in_tmp, capsys, launcher):
    work = working(seed0=2.5, seed1=UserError("seed is wrong"), seed2=1.5)
    with pytest.raises(UserError, match="1 job of the sweep failed; the same command runs"):
        run_sweep("train", ["--multirun", *launcher, "seed=0,1,2,3", "recipe.steps=9"], work)
    captured = capsys.readouterr()
    assert captured.out.endswith(
        "  validation error (%)    test error (%)  job\n"
        "                  0.00             10.00  seed=3\n"
        "                  1.50              8.50  seed=2\n"
        "                  2.50              7.50  seed=0\n"
        "\nsweep: 3 finished, 1 not\n"
    )
    assert captured.err.endswith("seed=1: failed: seed is wrong\n")
    assert not list(in_tmp.glob("runs/.multirun/*-*"))


def test_what_is_swept_is_in_the_names_and_the_table_has_the_test_errors(in_tmp, capsys):
    """Also of runs with a name, and not what the command says without being told."""
    made = []

    def work(name, cfg, words):
        made.append((cfg.name, cfg.recipe.steps, cfg.recipe.epochs))
        return {"error_percent": 30.0 / cfg.recipe.steps}

    words = ["runs_dir=my runs", "dataset=mnist5k", "name=mine", "recipe.steps=10,20"]
    run_sweep("train", ["-m", *words], work)
    assert made == [("mine+recipe.steps-10", 10, None), ("mine+recipe.steps-20", 20, None)]
    assert capsys.readouterr().out.endswith(
        "  test error (%)  job\n"
        "            3.00  recipe.steps=10\n"
        "            1.50  recipe.steps=20\n"
        "\nsweep: 2 finished\n"
    )


def test_a_full_disk_is_said_with_its_place(in_tmp, monkeypatch):
    """Hydra writes a file of its own before the first job."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("capsrun.sweep.start_hydra", full)
    with pytest.raises(Unfinished, match=r"runs/\.multirun: No space left on device"):
        run_sweep("train", [*TINY, "--multirun", "seed=0,1"], lambda *_: None)


def test_names_that_a_function_makes_are_names(in_tmp, capsys):
    words = [*TINY, "recipe.steps=1", "compile=false"]
    assert cli.main(["train", "--multirun", *words, "name=range(1,3)"]) == 0
    assert {path.name for path in (in_tmp / "runs").glob("[12]*")} == {"1", "2"}


def test_a_sweep_of_tests_has_a_table_too(in_tmp, capsys, tiny_run):
    words = ["eval", "--multirun", "dataset=mnist5k", f"checkpoint={tiny_run}"]
    assert cli.main([*words, "images=10,20", f"runs_dir={in_tmp}", "out_dir=out"]) == 0
    table = capsys.readouterr().out.rpartition("test error (%)  job\n")[2].splitlines()
    assert [line.split()[1] for line in table[:2]] == ["images=10", "images=20"]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "full"), "seed=1: failed: [Errno 28] full"),
        (ZeroDivisionError("a bug\nand more"), "seed=1: failed: ZeroDivisionError: a bug\n"),
    ],
)
def test_a_fault_of_the_machine_is_no_mistake_of_the_user(in_tmp, capsys, error, said):
    work = working(seed0=UserError("seed is wrong"), seed1=error)
    with pytest.raises(Unfinished, match="2 jobs of the sweep failed"):
        run_sweep("train", ["-m", "seed=0,1"], work)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sede=0,1"], "did you mean 'seed'"),
        (["model=capsnet,cnn_baseline", "routing.iterations=1"], "there is no setting"),
    ],
)
def test_a_sweep_of_what_cannot_be_composed(in_tmp, capsys, words, message):
    with pytest.raises(UserError, match=message):
        run_sweep("train", ["-m", *words], working())
    assert capsys.readouterr().out == "", "no job was begun"
    assert list(in_tmp.rglob("*.json")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_in_this_process_and_begins_no_other(in_tmp, capsys, number):
    for end in (Stopped("saved after step 3", number), lambda: signal.raise_signal(number)):
        with pytest.raises(Stopped) as stopped:
            run_sweep("train", ["-m", "seed=0,1,2"], working(seed0=3.0, seed1=end))
        assert stopped.value.signal_number == number
        captured = capsys.readouterr()
        assert "sweep: 1 finished, 1 not\n" in captured.out
        assert "seed=2" not in captured.out


def test_a_signal_stops_jobs_in_other_processes_once(tmp_path, monkeypatch, capsys):
    sent = []
    monkeypatch.setattr(os, "kill", lambda *process: sent.append(process))
    sweep = Sweep("train", [], working(), tmp_path)
    parent = os.getppid()
    outcomes = [
        Outcome("a", 0),
        Outcome("b", process=(os.uname().nodename, parent)),
        Outcome("c", process=("elsewhere", parent)),
    ]
    for number, outcome in enumerate(outcomes):
        (tmp_path / f"{number}.json").write_text(json.dumps(vars(outcome)))
    sweep.stop(signal.SIGTERM, None)
    assert sent == [(parent, signal.SIGTERM)]
    assert sweep(None) is None, "no job begins any more"
    with pytest.raises(KeyboardInterrupt):
        sweep.stop(signal.SIGTERM, None)
    show_summary(sweep.outcomes())
    assert "b: ended without a word" in capsys.readouterr().err


def test_what_one_job_notes_is_not_in_the_next(in_tmp, monkeypatch):
    kept = []

    def main(config, overrides):
        if config.name == "a":
            errors.notice("something about the first")
        kept.append(list(errors.notices))

    monkeypatch.setattr("capsrun.commands.list.main", main)
    assert cli.main(["list", "--multirun", "name=a,b"]) == 0
    assert kept == [["something about the first"], []]


@needs("slurm")
def test_without_slurm_the_machine_is_at_fault(in_tmp, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/bin")
    assert cli.main(["train", "--multirun", "sweep=slurm", "seed=0,1"]) == 1
    said = capsys.readouterr().err
    assert "srun" in said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize("choice", PLUGINS)
def test_each_choice_composes_or_names_what_to_install(choice, capsys, in_tmp):
    arguments = ["train", "--cfg", "hydra", f"sweep={choice}"]
    if installed(choice):
        assert cli.main([*arguments, "hydra.mode=MULTIRUN"]) == 0
        shown = {"local": "n_jobs: 2", "optuna": "n_trials: 20"}.get(choice, "cpus")
        assert shown in capsys.readouterr().out
        without = compose.compose("train", ["seed=1"])
        assert compose.compose("train", ["seed=1", f"sweep={choice}"]) == without
    else:
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"is not installed: pip install 'capsrun[{PLUGINS[choice][1]}]'" in said
        assert said.count("\n") == 1


def test_the_launcher_is_no_part_of_the_run_and_its_package_an_extra_of_ours():
    name = names.run_name(train_config("seed=1"), ["sweep=local", "seed=1"])
    assert name == "mnist-capsnet-quick"
    declared = (REPOSITORY / "pyproject.toml").read_text()
    for package, extra in PLUGINS.values():
        assert f'{extra} = ["{package}' in declared
        assert extra in compose.EXTRAS.values()


def test_what_is_a_sweep():
    for words in (["--multirun", "seed=0"], ["-m"], ["--mul"], ["hydra.mode=MULTIRUN"]):
        assert compose.is_sweep(words) is True
    for words in (["seed=0,1"], ["--cfg", "job"]):
        assert compose.is_sweep(words) is False


def test_finished_runs_are_left_alone(in_tmp, capsys, tiny_run):
    runs = in_tmp / "runs" / "run"
    shutil.copytree(tiny_run, runs / "seed0")
    assert cli.main(["train", "--multirun", *TINY, "name=run", "seed=0,1"]) == 0
    out = capsys.readouterr().out
    assert out.count("is finished already") == 1
    assert out.endswith("sweep: 2 finished\n")
    assert "hydra" not in (runs / "seed1" / "config.yaml").read_text()


@pytest.mark.slow
@needs("local")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_save_when_the_command_is_stopped(in_tmp, number):
    words = ["train", "--multirun", "sweep=local", *TINY, "recipe.steps=100000", "name=long"]
    words += ["record.evaluate_every_steps=100000", "record.checkpoint_every_seconds=3600"]
    words = [sys.executable, "-m", "capsrun", *words, "seed=0,1,2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, process_group=0, **pipes)
    runs = [in_tmp / "runs" / "long" / f"seed{seed}" for seed in (0, 1)]
    try:
        limit = time.monotonic() + 300
        while not all(has_logged(run) for run in runs):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
            time.sleep(0.2)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, err
    assert "the same command goes on: capsrun train --multirun" in err
    assert "sweep: 0 finished, 2 not" in out
    assert all((run / "checkpoint.pt").exists() for run in runs)
    assert not (in_tmp / "runs" / "long" / "seed2").exists()


@pytest.mark.slow
@needs("optuna")
def test_a_search_proposes_the_same_trials_again(in_tmp):
    words = ["train", "--multirun", "sweep=optuna", "hydra.sweeper.n_trials=3", *TINY]
    first = run_capsrun(*words, "recipe.steps=1", cwd=in_tmp)
    assert first.returncode == 0, first.stderr
    made = sorted(str(path.relative_to(in_tmp)) for path in in_tmp.rglob("result.json"))
    assert len(made) == 3
    assert all("loss.margin_factor-" in run and "recipe.learning_rate-" in run for run in made)
    again = run_capsrun(*words, "recipe.steps=1", cwd=in_tmp)
    assert again.stdout.count("is finished already") == 3
    tables = [done.stdout[done.stdout.index("validation error (%)") :] for done in (first, again)]
    assert tables[0] == tables[1]
