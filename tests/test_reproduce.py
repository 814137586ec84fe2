"""The paper's experiments as data, as jobs, and run."""

import dataclasses
import datetime
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, REPOSITORY, TINY, has_logged, run_capsrun, train_config

from capsrun import cli, compose, experiments, names
from capsrun.bench import estimate
from capsrun.bench.estimate import Cost
from capsrun.commands import reproduce
from capsrun.commands.reproduce import Outcome, ReproduceConfig
from capsrun.config import EvalConfig, PerturbConfig, TrainConfig
from capsrun.data import load_dataset, sizes
from capsrun.errors import UserError
from capsrun.experiments import GROUPS
from capsrun.models.routing import route
from capsrun.runs.jobs import BudgetConfig, Job, JobMaker, QueueEntry, threads_each
from capsrun.runs.progress import StopRequest
from capsrun.settings import from_dict
from capsrun.training.schedule import learning_rate

EXPERIMENTS = experiments.Experiments()
NAMES = EXPERIMENTS.names()
BUDGETS = ("smoke", "short", "full")
# Table 1, §5.2 and §7: error, standard deviation.
PAPER = {
    "table1_mnist_baseline": (0.39, None),
    "table1_mnist_baseline_validation": (0.39, None),
    "table1_mnist_1": (0.34, 0.032),
    "table1_mnist_1_reconstruction": (0.29, 0.011),
    "table1_mnist_3": (0.35, 0.036),
    "table1_mnist_3_reconstruction": (0.25, 0.005),
    "table1_multimnist_baseline": (8.1, None),
    "table1_multimnist_1_reconstruction": (7.5, None),
    "table1_multimnist_3_reconstruction": (5.2, None),
    "affnist_capsnet": (21, None),
    "affnist_cnn": (34, None),
    "section7_cifar10_ensemble": (10.6, None),
    "section7_smallnorb": (2.7, None),
    "section7_svhn": (4.3, None),
    "ablation_iterations_1": (0.29, 0.011),
    "ablation_iterations_3": (0.25, 0.005),
    "ablation_no_reconstruction": (0.35, 0.036),
}


def budget(name: str) -> BudgetConfig:
    return from_dict(ReproduceConfig, compose.compose("reproduce", [f"budget={name}"])).budget


def maker(name: str = "smoke", runs_dir: str = "runs", device: str = "auto") -> JobMaker:
    return JobMaker(EXPERIMENTS, budget(name), runs_dir, device)


def entry(targets: list[str], seeds: list[int]) -> QueueEntry:
    return QueueEntry(targets=targets, seeds=seeds)


def all_jobs(name: str, seeds: tuple[int, ...] = (0,)) -> list[Job]:
    return maker(name).queue([entry(["all"], list(seeds))])


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_complete(name):
    about = EXPERIMENTS.about(name)
    assert about.group in GROUPS
    assert set(about.uses) <= set(NAMES)
    assert bool(about.uses) == (about.command != "train")
    assert (about.measured is not None) == (about.command is not None)
    training = EXPERIMENTS.training([f"experiment={name}"])
    assert training.recipe.steps == (600_000 if "cifar10" in name else 300_000)
    paper = None if about.paper is None else (about.paper.error_percent, about.paper.spread)
    assert paper == PAPER.get(name)


def test_every_published_number_has_its_source():
    for name in NAMES:
        about = EXPERIMENTS.about(name)
        for number in (about.paper, *about.public):
            assert number is None or number.source


@pytest.mark.parametrize("name", [n for n in NAMES if EXPERIMENTS.about(n).command != "train"])
def test_what_uses_a_model_is_of_the_network_that_it_names(name):
    used = EXPERIMENTS.about(name).uses[-1]
    assert EXPERIMENTS.training([f"experiment={name}"]) == EXPERIMENTS.training(
        [f"experiment={used}"]
    )


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("ablation_loss_paper", "loss.class_reduction", "sum"),
        ("ablation_detach", "routing.detach", True),
        ("ablation_no_bias", "model.digit_bias", False),
        ("ablation_iterations_2", "routing.iterations", 2),
        ("ablation_iterations_5", "routing.iterations", 5),
        ("ablation_order", "recipe.order", "authors"),
        ("ablation_primary_scale", "model.primary_scale", "one"),
        ("ablation_initialisation", "model.initialisation", "pytorch"),
    ],
)
def test_an_ablation_changes_one_thing(name, key, value):
    node, _, field = key.partition(".")
    reference = EXPERIMENTS.training(["experiment=table1_mnist_3_reconstruction"])
    changed = EXPERIMENTS.training([f"experiment={name}"])
    assert getattr(getattr(changed, node), field) == value
    for other in ("dataset", "model", "routing", "recipe", "stop", "record"):
        if other != node:
            assert getattr(changed, other) == getattr(reference, other)


def test_uniform_coupling_is_one_iteration():
    votes_BIJD = torch.randn(2, 7, 10, 4)
    bias_JD = torch.randn(10, 4)
    sums_BJD = votes_BIJD.mean(1) * 7 / 10 + bias_JD
    squared = sums_BJD.square().sum(-1, keepdim=True)
    expected = squared / (1 + squared) * sums_BJD / squared.sqrt()
    torch.testing.assert_close(route(votes_BIJD, bias_JD, 1), expected)


@pytest.mark.parametrize("name", BUDGETS)
def test_every_command_of_a_budget_composes(name):
    schemas = {"train": TrainConfig, "eval": EvalConfig, "perturb": PerturbConfig}
    for job in all_jobs(name):
        composed = compose.compose(job.arguments[0], job.arguments[1:])
        if job.trains:
            config = experiments.training_config(composed)
            folder = Path(config.runs_dir) / config.name / f"seed{config.seed}"
            longest = 600_000 if config.dataset.name == "cifar10" else 300_000
            limit = {"smoke": 4, "short": 30_000, "full": longest}[name]
            assert config.recipe.steps == limit
            if name == "smoke":
                assert "mnist5k" in (config.dataset.name, config.dataset.source) or (
                    config.dataset.name in ("cifar10", "svhn", "smallnorb")
                )
        else:
            config = from_dict(schemas[job.arguments[0]], composed)
            folder = Path(config.out_dir)
            if job.arguments[0] == "eval":
                assert config.images == (1000 if name == "smoke" else None)
            assert Path(config.checkpoint) == job.needs[0].folder
        assert folder == job.folder


def test_affnist_stops_where_the_paper_stopped_whatever_the_length():
    for name in BUDGETS:
        (job,) = maker(name).queue([entry(["padded_capsnet"], [0])])
        training = EXPERIMENTS.training(job.arguments[1:])
        assert training.stop.accuracy_percent == 99.23


def test_what_a_job_uses_comes_before_it():
    for name in BUDGETS:
        jobs = all_jobs(name, (0, 1))
        places = {(job.experiment, job.seed): place for place, job in enumerate(jobs)}
        assert len(places) == len(jobs)
        for place, job in enumerate(jobs):
            assert all(places[need.experiment, need.seed] < place for need in job.needs)


def test_every_experiment_is_run_or_stands_for_others():
    run = {job.experiment for job in all_jobs("smoke")}
    for name in NAMES:
        about = EXPERIMENTS.about(name)
        assert name in run if about.command else set(about.uses) <= run


def test_an_ensemble_is_of_the_first_seeds_and_made_once():
    jobs = maker("full").queue([entry(["section7_cifar10_ensemble"], [0, 1])])
    assert [(job.experiment, job.seed) for job in jobs] == [
        *(("section7_cifar10", seed) for seed in range(7)),
        ("section7_cifar10_ensemble", 0),
    ]
    assert len(jobs[-1].needs) == 7
    assert jobs[-1].arguments[-2].count("section7_cifar10/seed") == 6


def test_targets_are_experiments_and_groups():
    assert maker().chosen(["table1"])[0] == "table1_mnist_1"
    assert maker().chosen(["figure_4", "table1", "figure_4"])[0] == "figure_4"
    assert set(maker().chosen(["all"])) == set(NAMES)
    with pytest.raises(UserError, match="there is no experiment 'table2'"):
        maker().chosen(["table2"])


def test_one_target_may_stand_alone(in_tmp, capsys):
    words = ["reproduce", "budget=smoke", "only_plan=true", "timing=false"]
    assert cli.main([*words, "targets=table1_mnist_1", "seeds=4"]) == 0
    assert "1 jobs, 0 of them finished" in capsys.readouterr().out
    assert cli.main([*words, "targets=[]"]) == 2
    assert "there is nothing to run" in capsys.readouterr().err
    assert cli.main([*words, "targets=figure_4"]) == 0  # smoke has one seed of its own accord
    assert "2 jobs" in capsys.readouterr().out


def test_a_folder_of_any_name_reaches_the_commands():
    (_, job) = maker("smoke", "my runs, (1)'s").queue([entry(["figure_4"], [0])])
    composed = compose.compose(job.arguments[0], job.arguments[1:])
    assert Path(composed.checkpoint) == job.needs[0].folder
    assert Path(composed.out_dir) == job.folder
    training = EXPERIMENTS.training(job.needs[0].arguments[1:])
    assert training.runs_dir == "my runs, (1)'s"


def test_device_and_folder_are_passed_on():
    (job,) = maker("smoke", "elsewhere", "cpu").queue([entry(["table1_mnist_1"], [3])])
    config = EXPERIMENTS.training(job.arguments[1:])
    assert (config.device, config.runs_dir, config.seed) == ("cpu", "elsewhere", 3)
    assert job.folder == Path("elsewhere/smoke/table1_mnist_1/seed3")


@pytest.mark.parametrize("source", [None, "mnist5k"])
@pytest.mark.parametrize("dataset", ["mnist5k", "mnist_padded", "multimnist", "affnist_like"])
def test_sizes_are_those_of_the_data_sets(dataset, source):
    if dataset == "mnist5k" and source:
        pytest.skip("mnist5k has its own files")
    if dataset != "mnist5k" and not source and not MNIST_DIR.is_dir():
        pytest.skip("needs MNIST")
    words = [f"dataset={dataset}"] + ([f"dataset.source={source}"] if source else [])
    words += [f"dataset.data_dir={MNIST_DIR}"]
    config = train_config(*words).dataset
    loaded = load_dataset(config, torch.device("cpu"))
    in_epoch = loaded.train.epoch_images if len(loaded.train) else 0
    expected = sizes(config)
    assert expected[1] == len(loaded.test)
    assert in_epoch in (0, expected[0])


def test_estimates():
    length = ["recipe.epochs=2", "recipe.steps=null", "recipe.batch_size=100"]
    config = train_config(*TINY, *length, "record.evaluate_every_steps=40")
    assert estimate.training_seconds(config, 0.5, 0) == pytest.approx(
        8 + 0.5 * (80 + (2 + 1) * 10 / 3)
    )
    assert estimate.training_seconds(config, 0.5, 40) == pytest.approx(
        8 + 0.5 * (40 + (1 + 1) * 10 / 3)
    )
    config.recipe.average = 0.9  # whose weights are tested, too
    assert estimate.training_seconds(config, 0.5, 0) == pytest.approx(8 + 0.5 * (80 + 6 * 10 / 3))
    config.recipe.average = None
    assert estimate.training_seconds(config, 0.5, 0, ended=40) == pytest.approx(
        8 + 0.5 * (40 + (1 + 1) * 10 / 3)
    )
    test = from_dict(EvalConfig, compose.compose("eval", ["dataset=mnist5k"]))
    assert estimate.testing_seconds(0.3, test) == pytest.approx(100)
    test.images = 100
    assert estimate.testing_seconds(0.3, test) == pytest.approx(10)
    assert estimate.testing_seconds(0.3, None) == 0


def test_jobs_are_timed(capfd):
    tiny = [w for w in TINY if not w.startswith("dataset=")]
    plan = dataclasses.replace(budget("smoke"), train=tiny)
    jobs = JobMaker(EXPERIMENTS, plan, "runs", "cpu").queue(
        [entry(["figure_4", "ablation_uniform"], [0])]
    )
    costs = estimate.job_costs(jobs, EXPERIMENTS, "cpu")
    assert [job.experiment for job in costs] == [
        "table1_mnist_3_reconstruction",
        "figure_4",
        "table1_mnist_1_reconstruction",
    ]
    assert all(8 <= cost.seconds < 60 for cost in costs.values())
    assert all(0.1 < cost.memory_gb < 50 for cost in costs.values())
    assert capfd.readouterr().err.count("timing") == 2  # two networks, three jobs


def test_a_run_that_stops_early_is_expected_to_end_where_other_seeds_did(in_tmp):
    """Until one has, its time is an upper bound."""
    tiny = [w for w in TINY if not w.startswith("dataset=")]
    plan = dataclasses.replace(budget("smoke"), train=[*tiny, "recipe.epochs=null"])
    plan.train.append("recipe.steps=1000000")
    seeds = JobMaker(EXPERIMENTS, plan, "runs", "cpu").queue([entry(["padded_capsnet"], [0, 1, 2])])
    for job in seeds[:2]:
        job.folder.mkdir(parents=True)
    left = seeds[2:]
    (longest,) = estimate.job_costs(left, EXPERIMENTS, "cpu").values()
    assert longest.may_stop_early
    seeds[0].result.write_text('{"steps": 100}')
    seeds[1].result.write_text('{"steps": 300}')
    assert left[0].others_ended() == 200
    (shorter,) = estimate.job_costs(left, EXPERIMENTS, "cpu").values()
    assert not shorter.may_stop_early
    assert shorter.seconds < longest.seconds / 100
    # One that went on further than they did may go on for long.
    left[0].folder.mkdir()
    (left[0].folder / "checkpoint.pt").touch()
    (left[0].folder / "metrics.jsonl").write_text('{"step": 250}\n')
    (further,) = estimate.job_costs(left, EXPERIMENTS, "cpu").values()
    assert further.may_stop_early
    assert further.seconds > 100 * shorter.seconds


# Running.


def fake(tmp_path: Path, name: str, code: str, needs: tuple[Job, ...] = ()) -> Job:
    """A job that runs some Python instead of a command; `done()` in it makes the result."""
    folder = tmp_path / name
    folder.mkdir()
    return Job(name, 0, folder, (code,), needs)


@pytest.fixture
def python_jobs(monkeypatch):
    """Jobs whose arguments are Python; with how many each was begun to share the cores."""
    shares = {}

    def start(job: Job, beside: int, quiet: bool) -> subprocess.Popen:
        shares[job.experiment] = beside
        head = f"import time, sys\ndef done(): open({str(job.result)!r}, 'w').close()\n"
        return subprocess.Popen([sys.executable, "-c", head + job.arguments[0]])

    monkeypatch.setattr(reproduce, "start", start)
    return shares


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_failed_job_does_not_stop_the_others(tmp_path, python_jobs, parallel):
    good = fake(tmp_path, "good", "done()")
    bad = fake(tmp_path, "bad", "sys.exit(2)")
    empty = fake(tmp_path, "empty", "")  # ends well, but makes nothing
    needs_bad = fake(tmp_path, "needs_bad", "done()", (bad,))
    needs_good = fake(tmp_path, "needs_good", "done()", (good,))
    outcome = reproduce.run(
        [bad, good, empty, needs_bad, needs_good], parallel, None, StopRequest()
    )
    assert set(outcome.finished) == {good, needs_good}
    assert set(outcome.failed) == {bad, empty}
    assert outcome.waiting == [needs_bad]


def test_jobs_run_beside_each_other(tmp_path, python_jobs):
    jobs = [fake(tmp_path, str(k), "time.sleep(2); done()") for k in range(3)]
    began = time.monotonic()
    assert len(reproduce.run(jobs, 3, None, StopRequest()).finished) == 3
    assert time.monotonic() - began < 5


def test_when_the_time_is_over_jobs_are_asked_to_save(tmp_path, python_jobs):
    code = (
        "import signal, os\n"
        "def save(*a):\n    open(os.path.join({0!r}, 'saved'), 'w').close(); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\ntime.sleep(30)"
    )
    slow = fake(tmp_path, "slow", code.format(str(tmp_path)))
    later = fake(tmp_path, "later", "done()")
    outcome = reproduce.run([slow, later], 1, time.monotonic() + 1.5, StopRequest())
    assert (outcome.interrupted, outcome.waiting) == ([slow], [later])
    assert (tmp_path / "saved").exists()


def test_a_job_that_does_not_save_in_time_is_killed(tmp_path, python_jobs, monkeypatch):
    monkeypatch.setattr(reproduce, "GRACE_SECONDS", 1.0)
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    deaf = fake(tmp_path, "deaf", code)
    began = time.monotonic()
    outcome = reproduce.run([deaf], 1, began + 1, StopRequest())
    assert outcome.interrupted == [deaf]
    assert time.monotonic() - began < 10


def test_nothing_runs_on_after_a_second_ctrl_c(tmp_path, python_jobs, monkeypatch):
    started = []
    start = reproduce.start

    def remembered(job: Job, beside: int, quiet: bool) -> subprocess.Popen:
        started.append(start(job, beside, quiet))
        return started[-1]

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "start", remembered)
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=interrupted)
    monkeypatch.setattr(reproduce, "time", clock)
    with pytest.raises(KeyboardInterrupt):
        reproduce.run([fake(tmp_path, "a", "time.sleep(60)")], 1, None, StopRequest())
    assert started[0].wait(10) == -signal.SIGKILL


def test_ctrl_c_ends_what_runs_and_begins_nothing(tmp_path, python_jobs):
    stop = StopRequest()
    stop.signal_number = signal.SIGINT
    outcome = reproduce.run([fake(tmp_path, "a", "done()")], 1, None, stop)
    assert len(outcome.waiting) == 1
    assert not outcome.failed


def budget_of(*overrides: str) -> str:
    """The words as a list that Hydra takes from a command line."""
    return "budget.train=[" + ",".join(f"'{word}'" for word in overrides) + "]"


def test_reproduce_runs_what_is_needed_and_only_once(in_tmp):
    small = [word for word in TINY if not word.startswith(("dataset=", "model.decoder"))]
    words = ["reproduce", "budget=smoke", budget_of(*small), "timing=false"]
    words += ["targets=[figure_4]", "seeds=[0]"]
    first = run_capsrun(*words, cwd=in_tmp)
    assert first.returncode == 0, first.stderr
    folder = in_tmp / "runs/smoke"
    assert (folder / "table1_mnist_3_reconstruction/seed0/result.json").exists()
    assert len(list((folder / "figure_4/seed0/pictures").glob("digit_*.png"))) == 10
    second = run_capsrun(*words, cwd=in_tmp)
    assert second.returncode == 0
    assert "2 jobs, 2 of them finished" in second.stdout
    assert "train" not in second.stdout.replace("budget.train", "").split("experiment")[1]


def test_a_failure_is_named(in_tmp):
    words = ["reproduce", "budget=smoke", budget_of("recipe.nonsense=4"), "timing=false"]
    done = run_capsrun(*words, "targets=[table1_mnist_1]", "seeds=[0,1]", cwd=in_tmp)
    assert done.returncode == 1
    assert "failed: smoke/table1_mnist_1 seed 0, smoke/table1_mnist_1 seed 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_terminal_ends_and_saves_what_runs(in_tmp):
    """The training goes on from where it was when the same is asked again."""
    small = [w for w in TINY if not w.startswith(("dataset=", "model.decoder", "recipe.steps"))]
    words = ["reproduce", "budget=smoke", budget_of(*small, "recipe.steps=3000"), "timing=false"]
    command = [sys.executable, "-m", "capsrun", *words, "targets=table1_mnist_1", "seeds=0"]
    process = subprocess.Popen(command, cwd=in_tmp)
    run_dir = in_tmp / "runs/smoke/table1_mnist_1/seed0"
    deadline = time.monotonic() + 60
    while not has_logged(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert (run_dir / "checkpoint.pt").exists()
    assert not (run_dir / "result.json").exists()


def test_the_plan_of_the_gpu_queue_is_in_order_of_value(in_tmp):
    words = ["reproduce", "queue=gpu", "budget=full", "only_plan=true", "timing=false"]
    done = run_capsrun(*words, cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("full/")]
    assert names[0] == names[-1] == "full/table1_mnist_3_reconstruction"
    assert "0 1 2  " in done.stdout
    assert "3 4 5 6 7 8 9" in done.stdout
    assert not (in_tmp / "runs").exists()


def test_the_plan_of_the_cpu_queue_is_in_order_of_worth(in_tmp):
    """Each entry is as long as it says."""
    words = ["reproduce", "queue=cpu", "only_plan=true", "timing=false"]
    done = run_capsrun(*words, cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[1] == "sixty/table1_mnist_3_reconstruction 0 1 2 3 to run"
    assert lines[2] == "questions/table1_mnist_3_reconstruction 0 1 2 3 4 5 to run"
    assert "full/affnist_like_cnn_validation 2 1 to run" in lines
    assert "five_hours/table1_multimnist_baseline 0 1 to run" in lines
    assert lines[-3] == "sixty/table1_mnist_3_reconstruction 3 4 5 6 7 8 9 7 to run"


def test_every_run_of_the_cpu_queue_composes():
    queue = from_dict(ReproduceConfig, compose.compose("reproduce", ["queue=cpu"])).queue
    jobs = {job.folder: job for job in maker().queue(queue.entries)}
    trained = {path: EXPERIMENTS.training(j.arguments[1:]) for path, j in jobs.items() if j.trains}
    small = trained[Path("runs/questions/ablation_order/seed4")]
    assert (small.model.name, small.model.conv1_channels) == ("capsnet_small", 64)
    assert (small.recipe.name, small.recipe.epochs, small.recipe.order) == ("sixty", 30, "authors")
    whole = trained[Path("runs/sixty/table1_mnist_3_reconstruction/seed9")]
    assert (whole.model.conv1_channels, whole.recipe.epochs, whole.recipe.average) == (
        256,
        60,
        None,
    )
    pairs = trained[Path("runs/five_hours/table1_multimnist_baseline/seed0")]
    assert (pairs.recipe.name, pairs.recipe.steps) == ("quick", 2200)
    assert pairs.loss.name == "sigmoid_cross_entropy"
    # The baseline's rate and its end are those of the CapsNets that it is compared with.
    capsules = trained[Path("runs/five_hours/table1_multimnist_3_reconstruction/seed0")]
    for step in (0, 1500, 2199):
        rates = [learning_rate(run.recipe, step, 2200) for run in (pairs, capsules)]
        assert rates[0] == rates[1]
    assert trained[Path("runs/full/padded_capsnet/seed0")].stop.accuracy_percent == 99.23


def test_an_entry_with_a_length_has_nothing_of_the_budget():
    """Toy results would stand in its folder as if they were its own."""
    entry_of = QueueEntry(targets=["affnist_like_cnn"], seeds=[0], length="long", train=["seed=1"])
    training, testing = maker("smoke").queue([entry_of])
    assert not any("mnist5k" in word or word.startswith("recipe") for word in training.arguments)
    assert not any(word.startswith("images=") for word in testing.arguments)
    with pytest.raises(UserError, match="needs a `length`"):
        maker("smoke").queue([QueueEntry(targets=["padded_cnn"], seeds=[0], train=["seed=1"])])


def test_two_entries_do_not_ask_for_different_runs_in_one_folder():
    """The second one would silently be left out."""
    first, second = (
        QueueEntry(targets=["padded_cnn"], seeds=[0], length="long", train=[f"recipe.steps={k}"])
        for k in (1, 2)
    )
    assert len(maker().queue([first, first])) == 1
    with pytest.raises(UserError, match="needs another `length`"):
        maker().queue([first, second])


def die(*_: object) -> None:
    """Ends its process as the system does where there is no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_is_killed_while_it_is_timed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(estimate, "step_cost", die)
    with pytest.raises(UserError, match="timing=false goes without"):
        estimate.timed_apart(train_config(*TINY), torch.device("cpu"), 1)


def test_the_plan_says_when_what_will_be_finished(capsys):
    jobs = [Job(name, 0, Path(name), (), (), "short") for name in ("one", "two")]
    plan = from_dict(ReproduceConfig, compose.compose("reproduce", ["minutes=120"]))
    before = datetime.datetime.now()
    costs = {jobs[0]: Cost(3600, 1), jobs[1]: Cost(7200, 1)}
    reproduce.show_plan(jobs, costs, plan, deadline=time.monotonic() + 7200)
    said = capsys.readouterr().out
    assert "the rest takes about 3 h" in said
    for line, hours in zip(said.splitlines()[2:4], (1, 3)):
        at = datetime.datetime.strptime(line[-21:].strip(), "%a %d %b %Y %H:%M")
        assert abs(at - before - datetime.timedelta(hours=hours)).total_seconds() <= 61
    assert "expected to finish in 120 minutes: short/one seed 0" in said
    # Two at once are done when the longer one is; what needs the other's result waits for it.
    assert reproduce.when_done(jobs, costs, 2) == {jobs[0]: 3600, jobs[1]: 7200}
    third = Job("three", 0, Path("three"), (), (jobs[1],), "short")
    ends = reproduce.when_done([*jobs, third], {**costs, third: Cost(60, 1)}, 2)
    assert ends[third] == 7260
    # From a run that may stop early on, the times are bounds.
    late = {**costs, jobs[0]: Cost(3600, 1, may_stop_early=True)}
    reproduce.show_plan(jobs, late, plan, deadline=time.monotonic() + 3000)
    said = capsys.readouterr().out
    assert "in 120 minutes: nothing" in said, "timing the networks took what is missing"
    assert said.count("at the latest") == 2
    assert "at most 1 h" in said
    assert "the rest takes at most 3 h" in said


def test_together_jobs_get_no_more_memory_than_there_is(tmp_path, python_jobs, monkeypatch):
    """Two of three gigabytes do not run beside each other in five; small ones do."""
    monkeypatch.setattr(reproduce, "available_memory_gb", lambda: 5.0)
    alone = "import os; assert not os.path.exists('lock'); open('lock', 'w').close()\n"
    alone += "time.sleep(0.5); os.remove('lock'); done()"
    monkeypatch.chdir(tmp_path)
    large = [fake(tmp_path, f"large{k}", alone) for k in range(3)]
    needs = dict.fromkeys(large, 3.0)
    assert len(reproduce.run(large, 3, None, StopRequest(), needs).finished) == 3
    huge = fake(tmp_path, "huge", "done()")
    assert reproduce.run([huge], 3, None, StopRequest(), {huge: 99.0}).finished == [huge]
    assert set(python_jobs.values()) == {1}, "what runs alone has all cores"
    # What others have taken since the start is not there any more.
    left = itertools.chain([99.0], itertools.repeat(2.0))
    monkeypatch.setattr(reproduce, "available_memory_gb", lambda: next(left))
    later = [fake(tmp_path, f"later{k}", alone) for k in range(2)]
    needs = dict.fromkeys(later, 3.0)
    assert len(reproduce.run(later, 2, None, StopRequest(), needs).finished) == 2
    monkeypatch.setattr(reproduce, "available_memory_gb", lambda: 5.0)
    # Each of these waits until all are there.
    together = "open(str(os.getpid()) + '.here', 'w').close()\n"
    together += (
        "while len([f for f in os.listdir() if f.endswith('.here')]) < 3: time.sleep(0.05)\n"
    )
    small = [fake(tmp_path, f"small{k}", f"import os\n{together}done()") for k in range(3)]
    needs = dict.fromkeys(small, 1.0)
    assert len(reproduce.run(small, 3, None, StopRequest(), needs).finished) == 3
    assert [python_jobs[f"small{k}"] for k in range(3)] == [3, 3, 3]
    # What waits for another's result does not share its cores.
    first = fake(tmp_path, "first", "done()")
    after = fake(tmp_path, "after", "done()", (first,))
    reproduce.run([first, after], 2, None, StopRequest())
    assert (python_jobs["first"], python_jobs["after"]) == (1, 1)


def test_the_memory_there_is(monkeypatch, tmp_path):
    """What the machine has left, or a container of it."""
    here = reproduce.available_memory_gb()
    assert 0.1 < here < 1e5
    (tmp_path / "memory.max").write_text("3000000000\n")
    (tmp_path / "memory.current").write_text("1400000000\n")
    # What is kept of files read before makes room when it is needed.
    (tmp_path / "memory.stat").write_text("file 500000000\ninactive_file 400000000\n")
    path = Path
    monkeypatch.setattr(
        reproduce, "Path", lambda name: tmp_path if name == "/sys/fs/cgroup" else path(name)
    )
    assert reproduce.available_memory_gb() == min(here, 2.0) or here < 2.0
    (tmp_path / "memory.max").write_text("max\n")
    assert reproduce.available_memory_gb() > 0.1


def test_jobs_beside_each_other_share_the_cores(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce.subprocess, "Popen", lambda *_, **words: seen.append(words))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    job = Job("a", 0, tmp_path / "a", ("train",))
    for beside in (1, 2, 8):
        reproduce.start(job, beside, quiet=True)
    assert "OMP_NUM_THREADS" not in seen[0]["env"]
    assert [words["env"]["OMP_NUM_THREADS"] for words in seen[1:]] == ["2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    reproduce.start(job, 2, quiet=True)
    assert seen[-1]["env"]["OMP_NUM_THREADS"] == "3", "who has said it is not overruled"
    # The plan counts with the same.
    assert threads_each(2) == 3
    for nothing in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads_each(2) == 2


@pytest.mark.parametrize(
    ("queue", "word"),
    [
        ("cpu", "targets=[table1]"),
        ("cpu", "seeds=[0]"),
        ("cpu", "budget=smoke"),
        ("gpu", "targets=[table1]"),
        ("gpu", "seeds=[0]"),
    ],
)
def test_what_a_queue_says_itself_is_not_taken_from_the_command_line(queue, word):
    words = [f"queue={queue}", word, "only_plan=true", "timing=false"]
    with pytest.raises(UserError, match=f"leave {word.partition('=')[0]}= away"):
        cli.run_reproduce(compose.compose("reproduce", words), words)


def test_a_queue_without_lengths_has_a_budget(in_tmp, capsys):
    words = ["queue=gpu", "budget=smoke", "only_plan=true", "timing=false"]
    cli.run_reproduce(compose.compose("reproduce", words), words)
    assert "smoke/table1_mnist_3_reconstruction" in capsys.readouterr().out


def test_many_jobs_are_not_all_named(tmp_path, capsys):
    jobs = [Job(f"j{k}", 0, tmp_path / str(k), (), (), "long") for k in range(7)]
    reproduce.show_outcome(Outcome(interrupted=jobs[:1], waiting=jobs[1:]))
    said = capsys.readouterr().out
    assert "interrupted, to go on next time: long/j0 seed 0\n" in said
    assert "not begun: long/j1 seed 0" in said
    assert "long/j5 seed 0 and 1 more" in said


def test_the_minutes_are_those_of_the_whole_command(in_tmp, monkeypatch):
    """The plan, which times each network, takes some of them."""
    seen = []
    monkeypatch.setattr(reproduce, "costs_of", lambda *_: time.sleep(1) or {})
    monkeypatch.setattr(reproduce, "run", lambda *words: seen.append(words) or Outcome())
    words = ["targets=[table1_mnist_3]", "seeds=[0]", "minutes=1"]
    began = time.monotonic()
    reproduce.reproduce(
        from_dict(ReproduceConfig, compose.compose("reproduce", words)), EXPERIMENTS
    )
    assert seen[0][2] - began == pytest.approx(60, abs=0.5)


@pytest.mark.parametrize("minutes", ["", "0", "0.5", "ten"])
def test_the_gpu_script_wants_whole_minutes(minutes):
    script = REPOSITORY / "scripts/gpu_reproduce.sh"
    done = subprocess.run([script, minutes], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "minutes" in done.stderr.lower()


STUB = """#!/bin/sh
# Stands for Python: notes its words, and leaves what `report` would.
echo "$@" >> words.txt
case "$*" in *report*)
  mkdir -p OUT/.packed/results OUT/.packed/report
  echo p > OUT/.packed/report/report.html
esac
"""


def test_the_gpu_script_plans_runs_and_packs(tmp_path):
    """With a stand-in for Python, as the experiments themselves take hours."""
    copy, out = tmp_path / "capsrun", tmp_path / "out"
    (copy / "scripts").mkdir(parents=True)
    shutil.copy(REPOSITORY / "scripts/gpu_reproduce.sh", copy / "scripts")
    stub = tmp_path / "python"
    stub.write_text(STUB.replace("OUT", str(out)))
    stub.chmod(0o755)
    began = time.monotonic()
    done = subprocess.run(
        [copy / "scripts/gpu_reproduce.sh", "3", out],
        env={**os.environ, "PYTHON": str(stub), "BUDGET": "smoke"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - began < 20  # it does not wait for its clock
    plan, bench, queue, report = (copy / "words.txt").read_text().splitlines()
    assert "reproduce queue=gpu budget=smoke" in plan
    assert "only_plan=true" in plan
    assert "bench" in bench
    assert 0.7 <= float(queue.partition("minutes=")[2]) <= 1  # two are kept to save and to pack
    assert f"keep={out}/.packed/results" in report
    assert {"report.html", "results.tar.gz", "log.txt"} <= {path.name for path in out.iterdir()}


@pytest.mark.skipif(not shutil.which("make"), reason="no make here")
def test_make_lists_every_experiment():
    done = subprocess.run(
        ["make", "-n", "reproduce", "BUDGET=smoke", "SEEDS=0 1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    listed = re.findall(r"reproduce targets=\[(\w+)\] seeds=\[(\d+)\]", done.stdout)
    expected = {(name, str(seed)) for name, seed in listed_jobs((0, 1))}
    assert set(listed) == expected
    assert len(listed) == len(expected)


def listed_jobs(seeds: tuple[int, ...]) -> set[tuple[str, int]]:
    """What a user asks for: not the further seeds that an ensemble needs."""
    found = set()
    for name in NAMES:
        about = EXPERIMENTS.about(name)
        for own in [name] if about.command else about.uses:
            found |= {(own, k) for k in (seeds if EXPERIMENTS.about(own).models == 1 else [0])}
    return found


def test_an_experiment_is_a_choice_of_train():
    config = train_config("experiment=table1_mnist_1", "recipe=quick", "loss=paper")
    overrides = ["experiment=table1_mnist_1", "recipe=quick", "loss=paper", "seed=3"]
    assert names.run_name(config, overrides) == "table1_mnist_1+loss-paper+recipe-quick"
    assert config.routing.iterations == 1
    assert not config.model.reconstruction


def test_a_misspelt_experiment_is_named(capsys):
    assert cli.main(["train", "experiment=table1_mnist_2"]) == 2
    assert "there is no experiment=table1_mnist_2, did you mean" in capsys.readouterr().err
