"""The paper's experiments as data, as jobs, and run."""

import copy
import dataclasses
import datetime
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
from conftest import REPOSITORY, TINY, has_logged, train_config
from recorded import EXPERIMENTS, train_result

from capsrun import cli, compose, names, yaml_files
from capsrun.bench import estimate
from capsrun.commands import report, reproduce, train
from capsrun.commands.reproduce import Outcome
from capsrun.data import load_dataset, sizes
from capsrun.errors import UserError
from capsrun.runs.jobs import Cost, Job, ReproduceConfig, chosen, make_jobs, threads_each
from capsrun.runs.progress import StopRequest
from capsrun.settings import from_dict
from capsrun.training.schedule import learning_rate

NAMES = EXPERIMENTS.names()


@pytest.fixture(autouse=True)
def composed_once(monkeypatch):
    monkeypatch.setattr(reproduce, "Experiments", lambda: EXPERIMENTS)


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


def config_of(*words: str) -> ReproduceConfig:
    return from_dict(ReproduceConfig, compose.compose("reproduce", words))


def jobs_of(*words: str) -> list[Job]:
    return make_jobs(config_of(*words), EXPERIMENTS)


def train_words(*words: str) -> str:
    """Overrides of train, in place of the budget's, as Hydra takes them from a command line."""
    return "budget.train=[" + ",".join(f"'{word}'" for word in words) + "]"


SMALL = [word for word in TINY if not word.startswith(("dataset=", "model.decoder"))]


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_is_complete(name):
    about = EXPERIMENTS.about(name)
    assert set(about.uses) <= set(NAMES)
    assert bool(about.uses) == (about.command != "train")
    assert all(number is None or number.source for number in (about.paper, *about.public))
    training = EXPERIMENTS.training([f"experiment={name}"])
    assert training.recipe.steps == (600_000 if "cifar10" in name else 300_000)
    if about.uses:  # it is of the network that it names
        assert training == EXPERIMENTS.training([f"experiment={about.uses[-1]}"])
    paper = None if about.paper is None else (about.paper.error_percent, about.paper.spread)
    assert paper == PAPER.get(name)


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


SOME = "targets=[table1_mnist_baseline,affnist_capsnet,section7_cifar10]"


@pytest.mark.parametrize(
    ("name", "targets"), [("smoke", "targets=all"), ("short", SOME), ("full", SOME)]
)
def test_every_command_of_a_budget_composes(name, targets):
    jobs = jobs_of(f"budget={name}", targets, "seeds=[0]")
    for place, job in enumerate(jobs):
        assert set(job.needs) <= set(jobs[:place])
        command, *words = job.arguments
        if job.trains:
            config = EXPERIMENTS.training(words)
            folder = Path(config.runs_dir) / config.name / f"seed{config.seed}"
            longest = 600_000 if config.dataset.name == "cifar10" else 300_000
            assert config.recipe.steps == {"smoke": 4, "short": 30_000, "full": longest}[name]
            if config.name.endswith("/padded_capsnet"):  # where the paper stopped, in any budget
                assert config.stop.accuracy_percent == 99.23
            if name == "smoke":
                assert "mnist5k" in (config.dataset.name, config.dataset.source) or (
                    config.dataset.name in ("cifar10", "svhn", "smallnorb")
                )
        else:
            config = from_dict(compose.schema_of(command), compose.compose(command, words))
            folder = Path(config.out_dir)
            if command == "eval":
                assert config.images == (1000 if name == "smoke" else None)
            assert Path(config.checkpoint) == job.needs[0].folder
        assert folder == job.folder


def test_every_experiment_is_run_or_stands_for_others():
    run = {job.folder.parent.name for job in jobs_of("budget=full", "seeds=[0]")}
    for name in NAMES:
        about = EXPERIMENTS.about(name)
        assert name in run if about.command else set(about.uses) <= run


def test_an_ensemble_is_of_the_first_seeds_and_made_once():
    jobs = jobs_of("budget=full", "targets=section7_cifar10_ensemble", "seeds=[0,1]")
    assert [str(job) for job in jobs] == [
        *(f"full/section7_cifar10 seed {seed}" for seed in range(7)),
        "full/section7_cifar10_ensemble seed 0",
    ]
    assert len(jobs[-1].needs) == 7
    assert jobs[-1].arguments[-2].count("section7_cifar10/seed") == 6


def test_targets_are_experiments_and_groups(in_tmp, printed):
    assert chosen(["table1"], EXPERIMENTS)[0] == "table1_mnist_1"
    assert chosen(["figure_4", "table1", "figure_4"], EXPERIMENTS)[0] == "figure_4"
    assert set(chosen(["all"], EXPERIMENTS)) == set(NAMES)
    words = ["reproduce", "budget=smoke", "only_plan=true", "timing=false"]

    assert "1 job, 0 of them finished" in printed(*words, "targets=table1_mnist_1", "seeds=4")

    # Smoke has one seed of its own accord.
    assert "2 jobs, 0 of them finished" in printed(*words, "targets=figure_4")


def test_folder_and_device_reach_the_commands():
    folder = "my runs, (1)'s"
    words = ["budget=smoke", names.word("runs_dir", folder), "device=cpu"]
    training, drawing = jobs_of(*words, "targets=figure_4", "seeds=[3]")
    composed = compose.compose(drawing.arguments[0], drawing.arguments[1:])
    assert Path(composed.checkpoint) == training.folder
    assert Path(composed.out_dir) == drawing.folder == Path(folder, "smoke/figure_4/seed3")
    config = EXPERIMENTS.training(training.arguments[1:])
    assert (config.device, config.runs_dir, config.seed) == ("cpu", folder, 3)


@pytest.mark.parametrize("dataset", ["mnist5k", "mnist_padded", "multimnist", "affnist_like"])
def test_sizes_are_those_of_the_data_sets(dataset):
    words = [] if dataset == "mnist5k" else ["dataset.source=mnist5k"]
    config = train_config(f"dataset={dataset}", *words).dataset
    loaded = load_dataset(config, torch.device("cpu"))
    in_epoch = loaded.train.epoch_images if len(loaded.train) else 0
    expected = sizes(config)
    assert expected[1] == len(loaded.test)
    assert in_epoch in (0, expected[0])


def test_estimates():
    length = ["recipe.epochs=2", "recipe.steps=null", "recipe.batch_size=100"]
    config = train_config(*TINY, *length, "record.evaluate_every_steps=40")

    def tested(steps: int, images: int) -> float:
        return pytest.approx(8 + 0.5 * (steps + images / 300))

    assert estimate.training_seconds(config, 0.5, 0) == tested(80, 3000)
    assert estimate.training_seconds(config, 0.5, 40) == tested(40, 2000)
    assert estimate.training_seconds(config, 0.5, 0, ended=40) == tested(40, 2000)
    config.recipe.average = 0.9  # whose weights are tested, too
    assert estimate.training_seconds(config, 0.5, 0) == tested(80, 6000)


def test_jobs_are_timed(capfd):
    words = ["budget=smoke", train_words(*SMALL), "device=cpu", "seeds=[0]"]
    jobs = jobs_of(*words, "targets=figure_4")
    costs = estimate.job_costs(jobs, EXPERIMENTS, "cpu")
    assert list(costs) == jobs
    assert all(8 <= cost.seconds < 60 for cost in costs.values())
    assert all(0.1 < cost.memory_gb < 50 for cost in costs.values())
    assert capfd.readouterr().err.count("timing") == 1  # one network, two jobs


def test_a_network_that_was_trained_here_is_not_timed(in_tmp, monkeypatch, capfd):
    monkeypatch.setattr(estimate, "timed_apart", lambda *_: (1.0, 1.0))
    words = ["budget=smoke", train_words("recipe.steps=1000000"), "device=cpu", "seeds=[0]"]
    (job,) = jobs_of(*words, "targets=table1_mnist_3_reconstruction")
    here = estimate.describe_device(torch.device("cpu"))
    precision = estimate.resolve_precision("auto", torch.device("cpu"))
    values = {"device": here, "precision": precision, "processes": 1}
    values |= {"images_per_second": 1280.0, "memory_gb": 2.5, "train_seconds": 60.0}

    def cost(folder: str, *settings: str, **changes: object) -> Cost:
        train_result(Path("runs", folder, "a", "seed0"), 77, 0, *settings, **values | changes)
        return estimate.job_costs([job], EXPERIMENTS, "cpu")[job]

    others = [
        cost("other", "dataset=mnist5k", "routing.iterations=1"),
        cost("batch", "dataset=mnist5k", "recipe.batch_size=64"),
        cost("short", "dataset=mnist5k", train_seconds=2.0),
        cost("elsewhere", "dataset=mnist5k", device="Some CPU, 2 threads"),
        cost("precision", "dataset=mnist5k", precision="fp8"),
    ]
    assert len(set(others)) == 1
    assert others[0].memory_gb == 1.5
    assert "timing the network" in capfd.readouterr().err
    # The length and the recipe may be any; a step of 128 images takes a tenth of a second.
    same = cost("same", "dataset=mnist5k", "recipe=quick")
    assert same.memory_gb == 2.5
    assert same.seconds - 8 == pytest.approx(0.1 * (others[0].seconds - 8))
    assert "as fast as runs/same/a/seed0" in capfd.readouterr().err


def test_a_run_that_stops_early_is_expected_to_end_where_other_seeds_did(in_tmp, monkeypatch):
    """Until one has, its time is an upper bound."""
    monkeypatch.setattr(estimate, "timed_apart", lambda *_: (0.01, 1.0))
    words = ["budget=smoke", train_words("recipe.steps=1000000"), "device=cpu"]
    *others, job = jobs_of(*words, "targets=padded_capsnet", "seeds=[0,1,2]")

    def cost() -> Cost:
        return estimate.job_costs([job], EXPERIMENTS, "cpu")[job]

    longest = cost()
    assert longest.may_stop_early
    for other, steps in zip(others, (100, 300)):
        train_result(other.folder, 77, other.seed, steps=steps)
    assert job.others_ended() == 200
    shorter = cost()
    assert not shorter.may_stop_early
    assert shorter.seconds < longest.seconds / 100
    # One that went on further than they did may go on for long.
    job.folder.mkdir()
    (job.folder / "checkpoint.pt").touch()
    (job.folder / "metrics.jsonl").write_text('{"step": 250}\n')
    assert cost().may_stop_early
    assert cost().seconds > 100 * shorter.seconds


# Running.


def fake(folder: Path, code: str, *needs: Job) -> Job:
    """A job that runs some Python instead of a command; `done()` in it makes the result."""
    folder.mkdir()
    return Job(folder.name, 0, folder, (code,), needs)


def run(*jobs: Job, parallel: int = 1, seconds: float | None = None) -> Outcome:
    """Run jobs, to an end after so many seconds."""
    deadline = None if seconds is None else time.monotonic() + seconds
    return reproduce.run(jobs, parallel, deadline, StopRequest())


@pytest.fixture
def python_jobs(monkeypatch):
    """Jobs whose arguments are Python; with how many each was begun to share the cores."""
    shares = {}

    def start(job: Job, beside: int, quiet: bool) -> subprocess.Popen:
        shares[job.name] = beside
        head = f"import time, sys\ndef done(): open({str(job.result)!r}, 'w').close()\n"
        return subprocess.Popen([sys.executable, "-c", head + job.arguments[0]])

    monkeypatch.setattr(reproduce, "start", start)
    return shares


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_failed_job_does_not_stop_the_others(tmp_path, python_jobs, parallel):
    good = fake(tmp_path / "good", "done()")
    bad = fake(tmp_path / "bad", "sys.exit(2)")
    empty = fake(tmp_path / "empty", "")  # ends well, but makes nothing
    needs_bad = fake(tmp_path / "needs_bad", "done()", bad)
    needs_good = fake(tmp_path / "needs_good", "done()", good)
    outcome = run(bad, good, empty, needs_bad, needs_good, parallel=parallel)
    assert set(outcome.finished) == {good, needs_good}
    assert set(outcome.failed) == {bad, empty}
    assert outcome.waiting == [needs_bad]


def test_when_the_time_is_over_jobs_save_or_are_killed(tmp_path, python_jobs, monkeypatch):
    monkeypatch.setattr(reproduce, "GRACE_SECONDS", 1.0)
    code = (
        "import signal, os\n"
        f"def save(*a):\n    open({str(tmp_path / 'saved')!r}, 'w').close(); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, {}); time.sleep(60)"
    )
    slow = fake(tmp_path / "slow", code.format("save"))
    deaf = fake(tmp_path / "deaf", code.format("signal.SIG_IGN"))
    later = fake(tmp_path / "later", "done()")
    began = time.monotonic()
    outcome = run(slow, deaf, later, parallel=2, seconds=1.5)
    assert time.monotonic() - began < 10
    assert (outcome.interrupted, outcome.waiting) == ([slow, deaf], [later])
    assert (tmp_path / "saved").exists()


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
        run(fake(tmp_path / "a", "time.sleep(60)"))
    assert started[0].wait(10) == -signal.SIGKILL


@pytest.fixture
def in_process(monkeypatch):
    """Jobs in this process, one after the other."""

    def start(job: Job, beside: int, quiet: bool) -> types.SimpleNamespace:
        code = cli.main([*job.arguments, *yaml_files.own_option()])
        return types.SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(reproduce, "start", start)


def test_reproduce_runs_what_is_needed_and_only_once(in_tmp, in_process, printed):
    # A run that may stop is tested as `stop` says.
    small = [word for word in SMALL if not word.startswith("record.evaluate_every_steps")]
    words = ["reproduce", "budget=smoke", train_words(*small), "timing=false", "seeds=[0]"]
    words += ["targets=affnist_like_capsnet"]
    assert "2 finished" in printed(*words)
    for name in ("padded_capsnet", "affnist_like_capsnet"):
        assert (in_tmp / f"runs/smoke/{name}/seed0/result.json").exists()
    said = printed(*words)
    assert "2 jobs, 2 of them finished" in said
    assert "2 finished" not in said, "nothing is run"


def test_a_failure_is_named(in_tmp, in_process, capsys):
    words = ["reproduce", "budget=smoke", train_words("recipe.nonsense=4"), "timing=false"]
    assert cli.main([*words, "targets=[table1_mnist_1]", "seeds=[0,1]"]) == 1
    said = capsys.readouterr().err
    assert "failed: smoke/table1_mnist_1 seed 0, smoke/table1_mnist_1 seed 1" in said


def test_a_closed_terminal_ends_and_saves_what_runs(in_tmp):
    """The training goes on from where it was when the same is asked again."""
    small = [word for word in SMALL if not word.startswith("recipe.steps")]
    words = ["reproduce", "budget=smoke", train_words(*small, "recipe.steps=3000"), "timing=false"]
    command = [sys.executable, "-m", "capsrun", *words, "targets=table1_mnist_1", "seeds=0"]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as it is under nohup
    process = subprocess.Popen(command, cwd=in_tmp)
    signal.signal(signal.SIGHUP, ignored)
    run_dir = in_tmp / "runs/smoke/table1_mnist_1/seed0"
    deadline = time.monotonic() + 200
    while not has_logged(run_dir) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(200) == 128 + signal.SIGHUP
    assert (run_dir / "checkpoint.pt").exists()
    assert not (run_dir / "result.json").exists()


THREE = "table1_mnist_3_reconstruction"
OTHER_SEEDS = f"{THREE} 3 4 5 6 7 8 9 7"  # seven of them


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["queue=gpu", "budget=full"], {0: f"full/{THREE} 0 1 2 3", -1: f"full/{OTHER_SEEDS}"}),
        (["queue=gpu", "budget=smoke"], {0: f"smoke/{THREE} 0 1 2 3"}),
        (  # each entry is as long as it says
            ["queue=cpu"],
            {
                0: f"sixty/{THREE} 0 1 2 3",
                1: f"questions/{THREE} 0 1 2 3 4 5",
                -1: f"sixty/{OTHER_SEEDS}",
            },
        ),
    ],
)
def test_the_plan_of_a_queue_is_in_order_of_value(words, expected, in_tmp, printed):
    said = printed("reproduce", *words, "only_plan=true", "timing=false")
    lines = [" ".join(line.split()) for line in said]
    lines = [line.removesuffix(" to run") for line in lines if line.endswith(" to run")]
    assert {place: lines[place] for place in expected} == expected
    assert not (in_tmp / "runs").exists()


def test_every_run_of_the_cpu_queue_composes():
    jobs = {job.name: job for job in jobs_of("queue=cpu")}  # one seed of each
    trained = {n: EXPERIMENTS.training(j.arguments[1:]) for n, j in jobs.items() if j.trains}
    small = trained["questions/ablation_order"]
    assert (small.model.name, small.model.conv1_channels) == ("capsnet_small", 64)
    assert (small.recipe.name, small.recipe.epochs, small.recipe.order) == ("sixty", 30, "authors")
    whole = trained["sixty/table1_mnist_3_reconstruction"]
    sizes = (whole.model.conv1_channels, whole.recipe.epochs, whole.recipe.average)
    assert sizes == (256, 60, None)
    pairs = trained["five_hours/table1_multimnist_baseline"]
    assert (pairs.recipe.name, pairs.recipe.steps) == ("quick", 2200)
    assert pairs.loss.name == "sigmoid_cross_entropy"
    # The baseline's rate and its end are those of the CapsNets that it is compared with.
    capsules = trained["five_hours/table1_multimnist_3_reconstruction"]
    for step in (0, 1500, 2199):
        rates = [learning_rate(run.recipe, step, 2200) for run in (pairs, capsules)]
        assert rates[0] == rates[1]
    assert trained["full/padded_capsnet"].stop.accuracy_percent == 99.23


def entries(*words: str) -> str:
    """A queue whose entries have the same target, and what else these words say."""
    target = "targets:[affnist_like_cnn],seeds:[0]"
    return f"queue.entries=[{','.join(f'{{{target},{word}}}' for word in words)}]"


def test_an_entry_with_a_length_has_nothing_of_the_budget():
    """Toy results would stand in its folder as if they were its own."""
    long = "length:long,train:['recipe.steps={}']"
    training, testing = jobs_of("budget=smoke", entries(long.format(1), long.format(1)))
    assert training.arguments[2] == "recipe.steps=1"
    assert not any("mnist5k" in word or word == "recipe=quick" for word in training.arguments)
    assert not any(word.startswith("images=") for word in testing.arguments)
    with pytest.raises(UserError, match="needs a `length`"):
        jobs_of(entries("train:['seed=1']"))
    # The second one would silently be left out.
    with pytest.raises(UserError, match="needs another `length`"):
        jobs_of(entries(long.format(1), long.format(2)))


def die(*_: object) -> None:
    """Ends its process as the system does where there is no memory left."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_step_that_is_killed_while_it_is_timed_is_one_sentence(monkeypatch):
    monkeypatch.setattr(estimate, "step_cost", die)
    with pytest.raises(UserError, match="timing=false goes without"):
        estimate.timed_apart(train_config(*TINY), torch.device("cpu"), 1)


def test_the_plan_says_when_what_will_be_finished(capsys):
    one, two = (Job(f"short/{name}", 0, Path(name), ()) for name in ("one", "two"))
    plan = config_of("minutes=120")
    now = datetime.datetime.now()
    costs = {one: Cost(3600, 1), two: Cost(7200, 1)}
    reproduce.show_plan([one, two], costs, plan, deadline=time.monotonic() + 7200)
    said = capsys.readouterr().out
    assert "the rest takes about 3 h" in said
    for line, hours in zip(said.splitlines()[2:4], (1, 3)):
        at = datetime.datetime.strptime(line[-21:].strip(), "%a %d %b %Y %H:%M")
        assert abs(at - now - datetime.timedelta(hours=hours)).total_seconds() <= 61
    assert "expected to finish in 120 minutes: short/one seed 0\n" in said
    # Two at once are done when the longer one is; what needs the other's result waits for it.
    assert reproduce.when_done([one, two], costs, 2) == {one: 3600, two: 7200}
    needs_two = Job("short/three", 0, Path("three"), (), (two,))
    costs[needs_two] = Cost(60, 1)
    assert reproduce.when_done([one, two, needs_two], costs, 2)[needs_two] == 7260
    # From a run that may stop early on, the times are bounds.
    late = {one: Cost(3600, 1, may_stop_early=True), two: Cost(7200, 1)}
    reproduce.show_plan([one, two], late, plan, deadline=time.monotonic() + 3000)
    said = capsys.readouterr().out
    assert "in 120 minutes: nothing" in said, "timing the networks took what is missing"
    assert said.count("at the latest") == 2
    assert "at most 1 h" in said
    assert "the rest takes at most 3 h" in said


def test_together_jobs_get_no_more_memory_than_there_is(tmp_path, monkeypatch):
    jobs = [Job(name, 0, tmp_path / name, ()) for name in "abc"]
    monkeypatch.setattr(reproduce, "available_memory_gb", lambda: 5.0)

    def together(needs: float, free_gb: float, running: int) -> int:
        needs_gb = dict.fromkeys(jobs, needs)
        return len(reproduce.with_ready(jobs[:running], jobs[running:], needs_gb, free_gb))

    assert together(3.0, 5.0, running=0) == 1
    assert together(3.0, 5.0, running=1) == 1
    assert together(99.0, 5.0, running=0) == 1, "what is too large runs alone"
    assert together(1.0, 5.0, running=1) == 3
    # What others have taken since the start is not there any more.
    monkeypatch.setattr(reproduce, "available_memory_gb", lambda: 2.0)
    assert together(3.0, 99.0, running=1) == 1


def test_jobs_run_beside_each_other_and_share_the_cores(tmp_path, python_jobs):
    """What waits for another's result does not share its cores."""
    first = fake(tmp_path / "first", "done()")
    run(first, fake(tmp_path / "after", "done()", first), parallel=2)
    assert python_jobs == {"first": 1, "after": 1}
    # Each of these waits until the other is there.
    meet = "open({!r}, 'w').close()\nimport os\nwhile not os.path.exists({!r}): time.sleep(0.1)\n"
    meet += "time.sleep(0.5); done()"
    here = [str(tmp_path / "left.here"), str(tmp_path / "right.here")]
    left = fake(tmp_path / "left", meet.format(*here))
    right = fake(tmp_path / "right", meet.format(*here[::-1]))
    assert len(run(left, right, parallel=2).finished) == 2
    assert python_jobs["left"] == python_jobs["right"] == 2


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


def test_the_minutes_are_those_of_the_whole_command(in_tmp, monkeypatch):
    """The plan, which times each network, takes some of them."""
    seen = []
    monkeypatch.setattr(estimate, "job_costs", lambda *_: time.sleep(1) or {})
    monkeypatch.setattr(reproduce, "run", lambda *words: seen.append(words) or Outcome())
    words = ["targets=[table1_mnist_3]", "seeds=[0]", "minutes=1"]
    config = config_of(*words)
    began = time.monotonic()
    reproduce.reproduce(config, EXPERIMENTS)
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
@pytest.mark.parametrize(("code", "reported"), [(0, True), (1, True), (2, False)])
def test_make_runs_a_group_and_reports(tmp_path, code, reported):
    """Also where some jobs failed, but not after a mistake."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    stub = tmp_path / ".venv" / "bin" / "capsrun"
    stub.parent.mkdir(parents=True)
    stub.write_text(f"#!/bin/sh\necho $@ >> words.txt\n[ $1 = report ] || exit {code}\n")
    stub.chmod(0o755)
    (tmp_path / ".venv" / ".installed").touch()
    words = ["make", "table1", "BUDGET=smoke", "SEEDS=0 1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode != 0) == (code != 0), done.stderr
    said = (tmp_path / "words.txt").read_text().splitlines()
    expected = ["reproduce targets=[table1] budget=smoke seeds=[0,1]", *["report"] * reported]
    assert said == expected


def test_an_experiment_is_a_choice_of_train():
    config = train_config("experiment=table1_mnist_1", "recipe=quick", "loss=paper")
    overrides = ["experiment=table1_mnist_1", "recipe=quick", "loss=paper", "seed=3"]
    assert names.run_name(config, overrides) == "table1_mnist_1+loss-paper+recipe-quick"
    assert config.routing.iterations == 1
    assert not config.model.reconstruction


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("table1_mnist_1", []),
        (
            "figure_4",
            [
                "trained is table1_mnist_3_reconstruction, the model for `capsrun perturb "
                "dataset=mnist`; all that it needs: capsrun reproduce targets=figure_4"
            ],
        ),
        (
            "figure_a1",
            [
                "trained is table1_mnist_3_reconstruction; all that it needs: capsrun reproduce "
                "targets=figure_a1"
            ],
        ),
    ],
)
def test_train_says_what_an_experiment_trains(name, said, capsys):
    train.say_experiment(["seed=1", f"experiment={name}"])
    head, *rest = capsys.readouterr().out.splitlines()
    assert head == f"experiment {name}: {EXPERIMENTS.about(name).title}"
    assert rest == said
    train.say_experiment(["seed=1"])
    assert capsys.readouterr().out == ""


@pytest.fixture
def own(in_tmp, monkeypatch):
    """Experiments of one's own, one with and one without anything said about it."""
    for command in (reproduce, report):  # most of it is composed already
        monkeypatch.setattr(command, "Experiments", lambda: copy.deepcopy(EXPERIMENTS))
    folder = in_tmp / "own" / "experiment"
    folder.mkdir(parents=True)
    defaults = "# @package _global_\ndefaults: [override /dataset: mnist5k]\n"
    small = "model: {conv1_channels: 8, primary_types: 2, decoder_widths: [16, 16]}\n"
    steps = "recipe: {epochs: null, steps: 2, batch_size: 16}\n"
    about = "experiment: {group: ablations, title: my own digits, public: null}\n"
    (folder / "mine.yaml").write_text(f"{defaults}{small}{steps}")
    (folder / "titled.yaml").write_text(
        f"{defaults}{small}{steps}routing: {{leaky: true}}\n{about}"
    )
    yield folder
    yaml_files.use_own_dir(None)


def test_experiments_of_ones_own_are_run_and_stand_in_the_report(own, in_process, printed):
    words = ["reproduce", "--config-dir", "own", "budget=full", "timing=false", "seeds=[0]"]
    plan = printed(*words, "targets=[own]", "only_plan=true")
    assert [line.split()[0] for line in plan[2:4]] == ["full/mine", "full/titled"]
    assert plan[-1].endswith("--config-dir own")
    assert "1 finished" in printed(*words, "targets=[titled]")
    shown = printed("report", "--config-dir", "own")
    begin = shown.index("Experiments of your own:")
    header, line, *rest = shown[begin + 1 : begin + 5]
    assert header.split("  ")[0] == "experiment"
    assert line.startswith("my own digits  model=capsnet, ")
    assert re.search(r" mnist5k \(1,000 images\) +\d+\.\d\d +0$", line)
    assert rest[0] == ""
    assert re.fullmatch(r"\d+ of the paper's numbers: not run yet", rest[1])
    tex = Path("runs/report/report.tex").read_text()
    assert "the paper's numbers" not in tex
    assert "% Experiments of your own" in tex
    text = Path("runs/report/report.md").read_text()
    section = text.partition("\n## Experiments of your own\n")[2].partition("\n## ")[0]
    assert "| my own digits | – |" in section
    assert "| mine | – | – | – | – | not run yet |" in section
    assert "`capsrun reproduce targets=mine budget=full --config-dir own`" in text


def test_other_files_of_a_project_are_none_of_its_settings(own, printed):
    """Its folder may be that of `--config-dir`, and a name may begin with a number."""
    for name in (".github/2024-01.yaml", "docs/a b.yaml"):
        (own.parent / name).parent.mkdir()
        (own.parent / name).write_text("#" * 10**6)
    (own / "16_types.yaml").write_text((own / "mine.yaml").read_text())
    words = ["train", "--config-dir", "own", "experiment=16_types", "--cfg", "job"]
    assert "  conv1_channels: 8" in printed(*words)


def test_a_run_of_ones_own_stands_under_the_experiment_that_it_is(own, in_tmp, printed):
    """They may differ in nothing but their length; one that is shorter is told by its name."""
    text = (own / "mine.yaml").read_text()
    (own / "longer.yaml").write_text(text.replace("steps: 2", "steps: 20"))
    yaml_files.use_own_dir(own.parent)
    config, longer = (
        dataclasses.asdict(train_config(f"experiment={name}")) for name in ("mine", "longer")
    )
    train_result(in_tmp / "runs/a", 25, 0, config=config, name="by hand")
    train_result(in_tmp / "runs/b", 26, 0, config=longer, name="by hand too")
    short = longer | {"recipe": longer["recipe"] | {"steps": 1}}
    train_result(in_tmp / "runs/c", 27, 1, config=short, name="smoke/longer")
    shown = printed("report", "--config-dir", "own")
    begin = shown.index("Experiments of your own:") + 2
    lines = [line.split() for line in shown[begin : shown.index("", begin)]]
    assert sorted((line[0], *line[-2:]) for line in lines) == [
        ("longer", "0.26", "0"),
        ("longer", "0.27", "1"),
        ("mine", "0.25", "0"),
    ]


@pytest.mark.parametrize("name", ["1e5", "1_0", "é", "a b", "true", "nan"])
def test_names_that_cannot_be_chosen_are_refused(own, name, refused):
    (own / f"{name}.yaml").touch()
    message = refused("train", "--config-dir", "own")
    assert f"own/experiment/{name}.yaml: such a name cannot be chosen" in message


def test_without_experiments_of_ones_own_it_is_said_where_they_go(refused, in_tmp):
    assert "--config-dir FOLDER says in which folder" in refused("reproduce", "targets=own")


def test_a_mistake_in_one_of_them_is_in_the_way_of_no_other(own, in_process, printed, capsys):
    (own / "mine.yaml").write_text("# @package _global_\nexperiment: {titel: mine}\n")
    words = ["reproduce", "--config-dir", "own", "budget=full", "timing=false", "seeds=[0]"]
    assert "1 finished" in printed(*words, "targets=[titled]")
    assert printed(*words, "targets=[table1]", "only_plan=true")
    assert cli.main(["report", "--config-dir", "own"]) == 0
    said = capsys.readouterr()
    assert "the experiment mine is left out: own/experiment/mine.yaml, line 2: " in said.err
    assert "my own digits" in said.out


@pytest.mark.parametrize("command", ["train", "reproduce", "list"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "dead link", "large"])
def test_what_is_no_file_of_settings_is_refused(own, command, kind, refused):
    path = own / "other.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "large":
        path.write_text("#" * 10**6)
    else:
        path.symlink_to("nowhere")
    assert "own/experiment/other.yaml is no file of settings" in refused(
        command, "--config-dir", "own"
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("experiment: {titel: mine}", ", line 3: there is no setting 'titel'"),
        ("experiment: {title: mine, order: first}", ", line 3: setting order"),
        ("experiment: {uses: [tabel1_mnist_1]}", "did you mean 'table1_mnist_1'"),
        ("experiment: {paper: 0.25}", ", line 3: setting paper is 0.25, where settings of its own"),
        ("experiment: {command: null}", "experiment.uses names no run"),
        ("routing: {itrations: 2}", ", line 3: there is no setting 'routing.itrations'"),
        ("dataset: {shift_px: -2}", ", line 3: dataset.shift_px is -2"),
    ],
)
def test_a_mistake_in_an_experiment_of_ones_own(own, refused, line, said):
    (own / "mine.yaml").write_text(
        f"# @package _global_\ndefaults: [override /loss: paper]\n{line}\n"
    )
    is_about = line.startswith("experiment")
    words = ["reproduce", "only_plan=true", "timing=false"] if is_about else ["train"]
    message = refused(*words, *([] if is_about else ["experiment=mine"]), "--config-dir", "own")
    assert "own/experiment/mine.yaml" in message
    assert said in message
