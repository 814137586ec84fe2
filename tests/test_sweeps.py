"""Sweeps: in each launcher every job ends with a sentence, the others go on, and Ctrl-C saves."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, TINY, has_logged, run_capsrun

from capsrun import cli, compose, experiments, names
from capsrun import sweep as sweeps
from capsrun.errors import Stopped, Unfinished, UserError
from capsrun.sweep import Done, Outcome, Sweep, conducted

PLUGINS = {
    "local": ("hydra-joblib-launcher", "joblib"),
    "slurm": ("hydra-submitit-launcher", "slurm"),
    "ray": ("hydra-ray-launcher", "ray"),
    "optuna": ("hydra-optuna-sweeper", "optuna"),
}


def installed(choice: str) -> bool:
    try:
        importlib.metadata.version(PLUGINS[choice][0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def needs(choice: str) -> pytest.MarkDecorator:
    package, extra = PLUGINS[choice]
    reason = f"{package} is not installed: pip install 'capsrun[{extra}]'"
    return pytest.mark.skipif(not installed(choice), reason=reason)


# Two runs that are over soon and one that cannot be begun.
MIXED = [
    "dataset=mnist5k",
    "model=cnn_baseline",
    "model.channels=[2]",
    "model.kernels_px=[5]",
    "model.pools_px=[4]",
    "model.hidden=[8]",
    "recipe.batch_size=16",
    "recipe.epochs=null",
    "recipe.steps=1",
    "name=mixed",
    "seed=0,-1,1",
]


def results(folder: Path) -> list[str]:
    return sorted(str(path.parent.relative_to(folder)) for path in folder.rglob("result.json"))


def check_mixed(cwd: Path, *launcher: str, **environment: str) -> None:
    """A failing job among good ones, and then a rerun that has nothing left to do."""
    done = run_capsrun("train", "--multirun", *launcher, *MIXED, cwd=cwd, **environment)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "seed=-1: failed: seed is -1; it must be at least 0" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "capsrun train: 1 job of the sweep failed, as said above; "
        "the same command runs what is not finished"
    )
    assert "sweep: 2 finished, 1 failed" in done.stdout
    assert results(cwd) == ["runs/mixed/seed0", "runs/mixed/seed1"], "as without a launcher"
    saved = (cwd / "runs" / "mixed" / "seed0" / "config.yaml").read_text()
    assert "sweep" not in saved
    assert "hydra" not in saved
    before = {path: (cwd / path / "result.json").stat().st_mtime_ns for path in results(cwd)}
    good = [word for word in MIXED if not word.startswith("seed=")]
    again = run_capsrun("train", "-m", *launcher, *good, "seed=0,1", cwd=cwd, **environment)
    assert again.returncode == 0, again.stderr
    assert "sweep: 2 finished (2 already)" in again.stdout
    assert before == {path: (cwd / path / "result.json").stat().st_mtime_ns for path in before}


@pytest.mark.slow
def test_one_after_the_other(in_tmp):
    check_mixed(in_tmp)


@needs("local")
def test_two_workers_of_joblib(in_tmp):
    check_mixed(in_tmp, "sweep=local")


@pytest.mark.slow
@needs("ray")
def test_two_workers_of_ray(in_tmp):
    check_mixed(in_tmp, "sweep=ray", RAY_AUTH_MODE="disabled")  # else it leaves a token at home


@pytest.mark.slow
@needs("slurm")
def test_two_workers_of_submitit(in_tmp):
    check_mixed(in_tmp, "hydra/launcher=submitit_local")


# What `sbatch`, `srun` and `sacct` do, as far as submitit uses them: jobs run as processes here.
SLURM = {
    "sbatch": """
        import os, pathlib, re, shutil, subprocess, sys
        here = pathlib.Path(os.environ["FAKE_SLURM"])
        script, me = pathlib.Path(sys.argv[-1]), os.getpid()
        shutil.copy(script, here / "script.sh")
        last = int(re.search(r"--array=0-(\\d+)%", script.read_text())[1])
        for k in range(last + 1):
            own = {"JOB_ID": me + k, "ARRAY_JOB_ID": me, "ARRAY_TASK_ID": k, "NTASKS": 1,
                   "JOB_NUM_NODES": 1, "NODEID": 0, "JOB_NODELIST": "here", "PROCID": 0,
                   "LOCALID": 0}
            numbers = {f"SLURM_{name}": str(value) for name, value in own.items()}
            job = subprocess.Popen(["bash", script], cwd="/", env={**os.environ, **numbers},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            (here / f"job{me}_{k}").write_text(str(job.pid))
        print(f"Submitted batch job {me}")
    """,
    "srun": """
        import os, sys
        first = next(n for n, word in enumerate(sys.argv) if "python" in word)
        os.execv(sys.argv[first], sys.argv[first:])
    """,
    "sacct": """
        import os, pathlib
        print("JobID|State|NodeList")
        for job in pathlib.Path(os.environ["FAKE_SLURM"]).glob("job*"):
            alive = os.path.exists(f"/proc/{job.read_text()}")
            print(f"{job.name[3:]}|{'RUNNING' if alive else 'COMPLETED'}|here")
    """,
}


@pytest.fixture
def slurm(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine on which commands like those of Slurm run jobs at once."""
    folder = tmp_path_factory.mktemp("slurm")
    for name, code in SLURM.items():
        program = folder / name
        program.write_text(f"#!{sys.executable}\n{textwrap.dedent(code)}")
        program.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.slow
@needs("slurm")
def test_slurm_is_asked_for_what_the_configuration_says(in_tmp, slurm):
    """With a stand-in for Slurm, in which a job begins in another working folder."""
    wanted = ["hydra.launcher.partition=short", "hydra.launcher.array_parallelism=2"]
    check_mixed(in_tmp, "sweep=slurm", *wanted, **slurm)
    script = (Path(slurm["FAKE_SLURM"]) / "script.sh").read_text()
    for option in (
        "array=0-1%2",
        "cpus-per-task=8",
        "gpus-per-node=1",
        "job-name=capsrun",
        "mem=16GB",
        "nodes=1",
        "ntasks-per-node=1",
        "partition=short",
        "signal=USR2@120",
        "time=240",
    ):
        assert f"#SBATCH --{option}\n" in script


@needs("slurm")
def test_without_slurm_the_machine_is_at_fault(in_tmp):
    done = run_capsrun("train", "--multirun", "sweep=slurm", "seed=0,1", cwd=in_tmp, PATH="/bin")
    assert done.returncode == 1
    assert "srun" in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("choice", ["local", "slurm", "ray", "optuna"])
def test_each_choice_composes_or_names_what_to_install(choice, capsys, in_tmp):
    arguments = ["train", "--cfg", "hydra", f"sweep={choice}"]
    if installed(choice):
        assert cli.main([*arguments, "hydra.mode=MULTIRUN"]) == 0
        assert {"local": "n_jobs: 2", "optuna": "n_trials: 20"}.get(choice, "cpus") in (
            capsys.readouterr().out
        )
    else:
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"is not installed: pip install 'capsrun[{PLUGINS[choice][1]}]'" in said
        assert said.count("\n") == 1


def test_a_choice_of_launcher_is_no_part_of_the_run():
    without = compose.compose("train", ["seed=1"])
    for choice in filter(installed, PLUGINS):
        assert compose.compose("train", ["seed=1", f"sweep={choice}"]) == without
    config = experiments.training_config(without)
    assert names.run_name(config, ["sweep=local", "seed=1"]) == "mnist-capsnet-quick"


def test_every_extra_is_one_of_the_package():
    declared = (REPOSITORY / "pyproject.toml").read_text()
    for package, extra in PLUGINS.values():
        assert f'{extra} = ["{package}' in declared
        assert extra in cli.EXTRAS.values()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--multirun", "seed=0"], True),
        (["-m"], True),
        (["--mul"], True),
        (["hydra.mode=MULTIRUN"], True),
        (["seed=0,1"], False),
        (["--cfg", "job"], False),
    ],
)
def test_what_is_a_sweep(words, expected):
    assert cli.is_sweep(words) is expected


def test_its_folder_is_where_the_runs_are(in_tmp):
    assert cli.sweep_folder("train", ["seed=0,1"]).parent == in_tmp / "runs" / ".multirun"
    assert cli.sweep_folder("train", ["runs_dir=a b"]).parent == in_tmp / "a b" / ".multirun"


def several(sweep: Sweep, *works) -> None:
    """Run some jobs here, as Hydra's own launcher does."""
    with conducted(sweep):
        for number, work in enumerate(works):
            sweep.run(number, f"seed={number}", work)


def fail(error: BaseException):
    raise error


def test_jobs_after_a_failure_go_on_and_the_code_tells_whose_fault_it_was(tmp_path, capsys):
    made = []
    sweep = Sweep(tmp_path / "a")
    mistake = UserError("seed is wrong")
    with pytest.raises(UserError, match="1 job of the sweep failed"):
        several(sweep, lambda: fail(mistake), lambda: made.append(1))
    assert made == [1]
    assert "seed=0: failed: seed is wrong" in capsys.readouterr().err
    assert [outcome.state for outcome in sweep.outcomes().values()] == ["failed", "finished"]
    with pytest.raises(Unfinished, match="2 jobs of the sweep did not finish"):
        several(Sweep(tmp_path / "b"), lambda: fail(mistake), lambda: fail(OSError(28, "full")))
    assert "seed=1: failed: [Errno 28] full" in capsys.readouterr().err
    with pytest.raises(Unfinished):
        several(Sweep(tmp_path / "c"), lambda: fail(ZeroDivisionError("a bug")))
    assert "seed=0: failed: ZeroDivisionError: a bug" in capsys.readouterr().err


def test_nothing_is_left_of_a_sweep_that_finished(tmp_path, capsys):
    sweep = Sweep(tmp_path / "a")
    several(sweep, lambda: Done(already=True), lambda: Done(2.5), lambda: Done(1.5))
    assert not sweep.folder.exists()
    table = capsys.readouterr().out.split("validation error  job\n")[1].splitlines()
    assert table[:2] == ["          1.50 %  seed=2", "          2.50 %  seed=1"]
    assert table[2] == "sweep: 3 finished (1 already)"


def test_after_a_stop_no_job_is_begun(tmp_path, capsys):
    sweep = Sweep(tmp_path / "a")
    with pytest.raises(Stopped) as stopped:
        several(sweep, lambda: fail(Stopped("stopped after step 3", signal.SIGTERM)), fail)
    assert stopped.value.signal_number == signal.SIGTERM
    assert "sweep: 0 finished, 1 interrupted, 1 not begun" in capsys.readouterr().out


def test_ctrl_c_reaches_a_job_in_this_process_at_once(tmp_path):
    made, sweep = [], Sweep(tmp_path / "a")
    with pytest.raises(Stopped) as stopped:
        several(sweep, lambda: made.append(signal.raise_signal(signal.SIGINT)), fail)
    assert stopped.value.signal_number == signal.SIGINT
    assert made == [], "the job did not go on"


def test_a_job_that_was_killed_is_named(tmp_path, capsys):
    sweep = Sweep(tmp_path / "a")
    sweep.write(0, Outcome("seed=0", sweeps.RUNNING))
    with pytest.raises(Unfinished, match="1 job of the sweep did not finish"), conducted(sweep):
        raise RuntimeError("a worker died\nand much more")
    captured = capsys.readouterr()
    assert "the sweep ended early: RuntimeError: a worker died\n" in captured.err
    assert "seed=0: ended without a word" in captured.err


def test_a_launcher_that_does_not_begin_is_said_in_a_sentence(tmp_path):
    with pytest.raises(Unfinished, match="RuntimeError: no cluster"), conducted(Sweep(tmp_path)):
        raise RuntimeError("no cluster")
    with pytest.raises(UserError, match="no setting"), conducted(Sweep(tmp_path)):
        raise UserError("no setting")


def test_a_worker_notices_that_the_command_is_gone(tmp_path):
    gone = subprocess.Popen(["true"])
    while Path(f"/proc/{gone.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert Sweep(tmp_path / "a", pid=gone.pid).told_to_stop(), "nobody has waited for it"
    gone.wait()
    assert Sweep(tmp_path / "a", pid=gone.pid).told_to_stop()
    assert not Sweep(tmp_path / "a").told_to_stop()
    elsewhere = Sweep(tmp_path / "a", pid=gone.pid, place=("another machine", ""))
    assert not elsewhere.told_to_stop(), "its processes cannot be seen from here"
    elsewhere.ask_to_stop(signal.SIGTERM)
    assert elsewhere.told_to_stop()


def test_a_worker_works_where_the_command_was_given(tmp_path, monkeypatch):
    """Even where the launcher gives it another working folder and environment."""
    monkeypatch.setenv("CAPSRUN_DATA", "there")
    there = tmp_path / "there"
    there.mkdir()
    # Of another process, so that this one is its worker.
    sweep = Sweep(tmp_path / "a", pid=os.getppid(), process_group=-1, working_folder=str(there))
    monkeypatch.delenv("CAPSRUN_DATA")
    seen = []

    def work() -> None:
        print("hello")
        seen.extend([Path.cwd(), os.environ["CAPSRUN_DATA"]])

    before = Path.cwd()
    sweep.run(4, "seed=4", work)
    assert seen == [there, "there"]
    assert Path.cwd() == before
    assert sweep.last_line_of(4) == "hello"
    assert sweep.outcomes()[4].state == "finished"


def test_a_worker_that_is_told_to_stop_does(tmp_path):
    sweep = Sweep(tmp_path / "a", pid=os.getppid(), process_group=-1)
    threading.Timer(0.2, sweep.ask_to_stop, [signal.SIGINT]).start()
    began = time.monotonic()
    sweep.run(0, "seed=0", lambda: time.sleep(60))
    assert time.monotonic() - began < 30
    assert sweep.outcomes()[0].state == "interrupted"
    sweep.run(1, "seed=1", fail)
    assert sweep.outcomes()[1].state == "not begun"


def descendants(pid: int) -> set[int]:
    """The processes that a process began, and that those began, and so on."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()[1:]]
    found, added = set(), {pid}
    while added:
        added = {child for child, parent in pairs if parent in added} - found
        found |= added
    return found


def check_stop(cwd: Path, number: int, *launcher: str, **environment: str) -> None:
    """Stop a sweep whose two jobs train: both save, no process is left, and it can go on."""
    words = ["train", "--multirun", *launcher, *TINY, "recipe.steps=100000", "name=long"]
    words += ["record.evaluate_every_steps=100000", "record.checkpoint_every_seconds=3600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "capsrun", *words, "seed=0,1,2"],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    runs = [cwd / "runs" / "long" / f"seed{seed}" for seed in (0, 1)]
    limit = time.monotonic() + 240
    while not all(has_logged(run) for run in runs):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < limit
        time.sleep(0.2)
    workers = descendants(process.pid)
    assert workers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    if number != signal.SIGKILL:
        # Ray has handlers of its own for SIGTERM, and ends the command after all is saved.
        rays_own = "sweep=ray" in launcher and number == signal.SIGTERM
        assert process.returncode == (-signal.SIGABRT if rays_own else 128 + number), err
        assert "the same command goes on: capsrun train --multirun" in err
        assert "sweep: 0 finished, 2 interrupted, 1 not begun" in out
        assert "Traceback" not in err
    limit = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < limit, "orphans are left"
        time.sleep(0.2)
    for run in runs:
        assert (run / "checkpoint.pt").exists(), "it saved only because it was asked to"
    assert not (cwd / "runs" / "long" / "seed2" / "config.yaml").exists()


@pytest.mark.slow
@needs("local")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_joblib_leaves_nothing_running(in_tmp, number):
    check_stop(in_tmp, number, "sweep=local")


@pytest.mark.slow
@needs("ray")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ray_leaves_nothing_running(in_tmp, number):
    check_stop(in_tmp, number, "sweep=ray", RAY_AUTH_MODE="disabled")


@pytest.mark.slow
@needs("optuna")
def test_a_search_proposes_the_same_trials_again(in_tmp):
    words = ["train", "--multirun", "sweep=optuna", "hydra.sweeper.n_trials=3", *TINY]
    first = run_capsrun(*words, "recipe.steps=1", cwd=in_tmp)
    assert first.returncode == 0, first.stderr
    made = results(in_tmp)
    assert len(made) == 3
    assert all("loss.margin_factor-" in run and "recipe.learning_rate-" in run for run in made)
    again = run_capsrun(*words, "recipe.steps=1", cwd=in_tmp)
    assert "sweep: 3 finished (3 already)" in again.stdout
    assert results(in_tmp) == made
    table = first.stdout.split("validation error  job\n")[1]
    assert (
        table.split("sweep:")[0]
        == (again.stdout.split("validation error  job\n")[1].split("sweep:")[0])
    )


def test_the_validation_error_of_a_run_is_the_last(tmp_path):
    assert sweeps.last_validation_error(tmp_path) is None
    lines = [{"step": 1, "error_percent/validation": 9.0}, {"step": 2, "loss/total": 1}]
    lines += [{"step": 2, "error_percent/validation": 4.0}, {"step": 3, "error_percent/test": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweeps.last_validation_error(tmp_path) == 4.0
