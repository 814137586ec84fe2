"""`capsrun bench`: what it times, what it says, and when it refuses to say it."""

import functools
import json
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

from capsrun import cli, compose
from capsrun.bench import tasks
from capsrun.bench.textbook import ShiftedImages, TextbookCapsNet
from capsrun.bench.timing import Task, ratio, time_in_turns
from capsrun.config import BenchConfig
from capsrun.errors import UserError
from capsrun.settings import from_dict

CPU = torch.device("cpu")
SMALL = [
    "model.conv1_channels=8",
    "model.primary_types=2",
    "model.decoder_widths=[16,16]",
    "recipe.batch_size=16",
    "rounds=3",
    "turn_seconds=0.001",
    "spread_percent=1000",
]


@functools.cache
def bench_config(*overrides: str) -> BenchConfig:
    return from_dict(BenchConfig, compose.compose("bench", [*SMALL, *overrides]))


class InThisProcess:
    """Steps that do not need a process of their own."""

    def __init__(self, config, name):
        self.run, _ = tasks.training_steps(config, CPU, name)
        self.found = {"memory_gb": 0.5, "ways_ms": {}}

    def __call__(self, count):
        self.run(count)


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(tasks, "TRAINING_IMAGES", 100)
    monkeypatch.setattr(tasks, "TEST_IMAGES", 50)
    monkeypatch.setattr(tasks, "OwnProcess", InThisProcess)


def test_a_process_that_is_killed_is_one_sentence(monkeypatch):
    def killed(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(tasks.ProcessPoolExecutor, "submit", killed)
    steps = tasks.OwnProcess(bench_config(), "plain fp32")
    with pytest.raises(UserError, match="the process of plain fp32 was ended from outside"):
        steps(1)


def test_ctrl_c_ends_a_process_without_a_word():
    with tasks.own_process() as process:
        assert process.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_DFL


def test_tasks_take_turns():
    order = []
    both = {name: Task(lambda count, name=name: order.append((name, count))) for name in "ab"}
    both["b"].repeats = 4
    time_in_turns(both, 3)
    assert order == [("a", 1), ("b", 4)] * 3
    assert all(len(task.turns_seconds) == 3 for task in both.values())


@pytest.mark.parametrize(
    ("turns", "median", "spread"),
    [
        ([3.0, 3.0, 3.0], 3, 0),
        ([8.0, 9.0, 10.0, 11.0, 12.0], 10, 20),
        ([9.0, 10.0, 10.0, 10.0, 99.0], 10, 0),  # one disturbed turn is no spread
    ],
)
def test_median_spread_and_rate_by_hand(turns, median, spread):
    task = Task(print, amount=6e9, turns_seconds=turns)
    assert (task.median_seconds, task.spread_percent) == (median, pytest.approx(spread))
    assert task.rate == 6 / median


def test_the_ratio_compares_turns_of_one_round():
    """A machine that slows down to a third does not change it."""
    slow, fast = Task(print), Task(print)
    slow.turns_seconds, fast.turns_seconds = [4.0, 4.0, 12.0], [1.0, 1.0, 3.0]
    assert ratio(slow, fast) == 4


def test_short_work_is_repeated_and_long_work_is_not_done_again_before_it_is_timed():
    task = Task(lambda count: None)
    task.warm_up(0.01)
    assert task.repeats > 100
    counts = []
    task = Task(lambda count: (counts.append(count), time.sleep(0.02)))
    task.warm_up(0.001)
    assert task.first_seconds >= 0.02
    assert counts == [1] == [task.repeats]


def test_the_size_of_the_papers_network_and_the_arithmetic_of_a_step():
    """By hand; the last row and column of Conv1 are not computed, as they reach no capsule."""
    votes = 1152 * 10 * 16 * 8
    convolutions = 19**2 * 81 * 256 + 36 * 256 * 81 * 256
    decoder = 160 * 512 + 512 * 1024 + 1024 * 784
    routing = 5 * votes // 8  # three weighted sums, two agreements
    config = from_dict(BenchConfig, compose.compose("bench"))
    forward = 2 * (convolutions + votes + routing + decoder)
    assert tasks.step_flop(config) == 3 * 128 * forward == pytest.approx(155.4e9, rel=1e-3)
    model = TextbookCapsNet(tasks.make_model(config, CPU, fast=False))
    assert sum(p.numel() for p in model.parameters()) == 8_215_568
    lengths, drawn = model(torch.rand(2, 1, 28, 28), torch.tensor([[3], [4]]))
    assert lengths.shape == (2, 10)
    assert drawn.shape == (2, 1, 784)
    assert (lengths < 1).all()


def test_the_textbook_shifts_its_images():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 4] = 255
    dataset = bench_config("dataset.image_px=9", "dataset.shift_px=2").dataset
    images = ShiftedImages(image, torch.tensor([3]), dataset)
    places = torch.stack([images[0][0][0] for _ in range(500)]).sum(0)
    assert places[2:7, 2:7].all()
    assert places.sum() == places[2:7, 2:7].sum() == 500


def test_the_textbook_learns(few_images, monkeypatch):
    config = bench_config("dataset.shift_px=0")
    model = tasks.make_model(config, CPU, fast=False)
    seen = []
    original = TextbookCapsNet.forward

    def watch(self, images, labels):
        lengths, drawn = original(self, images, labels)
        seen.append((lengths.gather(1, labels).mean() - lengths.mean()).item())
        return lengths, drawn

    monkeypatch.setattr(TextbookCapsNet, "forward", watch)
    train = tasks.random_images(config.dataset, 16).train
    tasks.textbook_steps(model, *train, config.dataset, 16, CPU)(40)
    assert seen[-1] > seen[0] + 0.1, "the capsule of the right class does not get longer"


def test_what_bench_writes(in_tmp, few_images, capsys):
    assert cli.main(["bench", *SMALL, "--profile", "precision=bf16"]) == 0
    folder = in_tmp / "runs" / "bench-mnist"
    result = json.loads((folder / "bench.json").read_text())
    assert (folder / "bench.png").stat().st_size > 5000
    names = ["textbook fp32", "plain fp32", "plain bf16", "fast fp32", "fast bf16"]
    assert list(result["steps"]) == names
    assert result["steps"]["textbook fp32"]["times_textbook"] == 1
    for name, row in result["steps"].items():
        assert row["images_per_second"] == pytest.approx(16e3 / row["median_ms"]), name
        rate = result["matrix_gflops"][name.split()[1]]
        share = 100 * result["step_gflop"] / (row["median_ms"] / 1e3) / rate
        assert row["percent_of_matrix_rate"] == pytest.approx(share)
        assert len(row["turns_ms"]) == 3
        assert row["memory_gb"] == 0.5
    expected = {"routing plain", "routing fast", "making a batch", "testing", "copy"}
    assert expected <= result["others"].keys()
    assert {"device", "versions", "date", "cpu_features", "config"} <= result.keys()
    assert result["profile"]["of"] == "fast bf16"
    assert sum(result["profile"]["operations_ms"].values()) > 0
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)
    assert "where the" in printed


def test_noisy_figures_are_refused(in_tmp, few_images, monkeypatch, capsys):
    """As a fault of the machine; a recipe that stops early is timed as any other."""
    original = tasks.training_steps
    short = (lambda count: time.sleep(count / 1000), 1_000_000)
    monkeypatch.setattr(tasks, "matrix_product", lambda device, dtype: short)
    monkeypatch.setattr(tasks, "large_copy", lambda device: short)

    def unsteady(config, device, name):
        (run, trainer), calls = original(config, device, name), [0]

        def advance(count):
            calls[0] += 1
            run(count * (9 if calls[0] % 2 else 1))

        return advance, trainer

    monkeypatch.setattr(tasks, "training_steps", unsteady)
    chart = in_tmp / "runs" / "bench-mnist" / "bench.png"
    chart.parent.mkdir(parents=True)
    chart.write_text("of an earlier, quieter time")
    chart.with_name(".lock").touch()  # so it is capsrun's own
    words = ["precision=fp32", "recipe=affnist", "spread_percent=20"]
    assert cli.main(["bench", *SMALL, *words]) == 1
    printed = capsys.readouterr()
    assert "capsrun bench: too noisy to be quoted: " in printed.err
    result = json.loads((chart.parent / "bench.json").read_text())
    assert result["steps"]["fast fp32"]["noisy"]
    assert "fast fp32" in result["refused"]
    assert not chart.exists()
    (line,) = [s for s in printed.out.splitlines() if s.startswith("fast fp32")]
    assert "noisy" in line


@pytest.mark.parametrize("kind", ["plain", "fast"])
def test_the_profile_names_what_takes_time(few_images, kind):
    run, _ = tasks.training_steps(bench_config(), CPU, f"{kind} fp32")
    found = tasks.operations_ms(run, CPU)
    assert {"capsrun::batch", "aten::_fused_adam_"} <= found.keys()
    assert ("aten::convolution_backward" if kind == "plain" else "_RouteBackward") in found
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_steps_in_a_process_of_their_own():
    steps = tasks.OwnProcess(bench_config("device=cpu"), "fast fp32")
    steps(1)
    began = time.perf_counter()
    steps(20)
    assert time.perf_counter() - began > 0.02, "it is waited for"
    assert 0.1 < steps.found["memory_gb"] < 2
    assert steps.found["ways_ms"] == {}, "nothing is captured on a CPU"


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("loss=cross_entropy", "loss=cross_entropy is not for model=capsnet"),
        ("recipe.decay_steps=null", "exactly one of recipe.decay_steps and recipe.decay_periods"),
        ("model=cnn_baseline", "bench times CapsNets, which model=cnn_baseline is not"),
        ("dataset=affnist_like", "bench times training, and affnist_like is for testing"),
    ],
)
def test_what_cannot_be_timed_is_one_sentence(word, sentence, in_tmp, capsys):
    assert cli.main(["bench", word]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert list(in_tmp.iterdir()) == []
