"""`capsrun bench`: what it times, what it says, and when it refuses to say it."""

import json
import time

import pytest
import torch
from conftest import run_capsrun, train_config

from capsrun import cli, compose
from capsrun.bench import tasks
from capsrun.bench.breakdown import REST, breakdown_ms
from capsrun.bench.textbook import ShiftedImages, TextbookCapsNet
from capsrun.bench.timing import Task, ratio, spread_percent, time_in_turns, warm_up
from capsrun.commands import bench as bench_command
from capsrun.commands.bench import bench
from capsrun.config import BenchConfig
from capsrun.errors import Noisy
from capsrun.models import build_model
from capsrun.models.fast import frequency_conv, routing_cpu
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


def bench_config(*overrides: str) -> BenchConfig:
    return from_dict(BenchConfig, compose.compose("bench", [*SMALL, *overrides]))


def full_size():
    config = train_config()
    return build_model(config.model, config.routing, config.dataset)


class InThisProcess:
    """Steps that do not need a process of their own."""

    def __init__(self, config, name):
        self.advance = tasks.training_steps(config, CPU, name, capture=True)

    def __call__(self, count):
        self.advance(count)

    def finish(self):
        return {"memory_gb": 0.5, "ways_ms": {}}


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(tasks, "TRAINING_IMAGES", 100)
    monkeypatch.setattr(tasks, "TEST_IMAGES", 50)
    monkeypatch.setattr(tasks, "OwnProcess", InThisProcess)


def test_tasks_take_turns():
    order = []
    both = {name: Task(lambda count, name=name: order.append((name, count))) for name in "ab"}
    both["b"].repeats = 4
    time_in_turns(both, 3, CPU)
    assert order == [("a", 1), ("b", 4)] * 3
    assert all(len(task.seconds) == 3 for task in both.values())


def test_spread_by_hand():
    assert spread_percent([2.0]) == spread_percent([3.0, 3.0, 3.0]) == 0
    assert spread_percent([8.0, 9.0, 10.0, 11.0, 12.0]) == pytest.approx(20)
    assert spread_percent([9.0, 10.0, 10.0, 10.0, 99.0]) == 0, "one disturbed turn is no spread"


def test_the_ratio_compares_turns_of_one_round():
    """A machine that slows down to a third does not change it."""
    slow, fast = Task(print, seconds=[4.0, 4.0, 12.0]), Task(print, seconds=[1.0, 1.0, 3.0])
    assert ratio(slow, fast) == 4


def test_short_work_is_repeated():
    task = Task(lambda count: None)
    warm_up(task, 0.01, CPU)
    assert task.repeats > 100


def test_what_takes_long_is_not_done_again_before_it_is_timed():
    counts = []
    task = Task(lambda count: (counts.append(count), time.sleep(0.02)))
    assert warm_up(task, 0.001, CPU) >= 0.02
    assert counts == [1] == [task.repeats]


def test_the_arithmetic_of_a_step():
    """156 GFLOP with the last row and column of Conv1, which reach no capsule; 155 without."""
    model = full_size()
    unseen = 3 * 2 * 128 * (20**2 - 19**2) * 81 * 256
    assert tasks.step_flop(model, 128, 1) / 1e9 == pytest.approx(155.4, abs=0.1)
    assert (tasks.step_flop(model, 128, 1) + unseen) / 1e9 == pytest.approx(156, abs=0.1)


def test_the_textbook_network_has_the_papers_size():
    model = TextbookCapsNet(full_size())
    assert sum(p.numel() for p in model.parameters()) == 8_215_568
    lengths, drawn = model(torch.rand(2, 1, 28, 28), torch.tensor([[3], [4]]))
    assert lengths.shape == (2, 10)
    assert drawn.shape == (2, 1, 784)
    assert (lengths < 1).all()


def test_the_textbook_shifts_its_images():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[..., 4, 4] = 255
    images = ShiftedImages(
        image, torch.tensor([3]), bench_config("dataset.image_px=9", "dataset.shift_px=2").dataset
    )
    places = torch.stack([images[0][0][0] for _ in range(500)]).sum(0)
    assert places[2:7, 2:7].all()
    assert places.sum() == places[2:7, 2:7].sum() == 500


def test_the_textbook_learns(few_images):
    config = bench_config()
    model = tasks.make_model(config, CPU, fast=False)
    seen = []
    original = TextbookCapsNet.forward

    def watch(self, images, labels):
        lengths, drawn = original(self, images, labels)
        seen.append((lengths.gather(1, labels).mean() - lengths.mean()).item())
        return lengths, drawn

    raw = tasks.random_images(config.dataset, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextbookCapsNet, "forward", watch)
        still = bench_config("dataset.shift_px=0").dataset
        images, labels = raw.train
        tasks.textbook_steps(model, images, labels, still, 16, CPU)(40)
    assert seen[-1] > seen[0] + 0.1, "the capsule of the right class does not get longer"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_bench_writes(tmp_path, few_images, capsys, precision):
    result = bench(bench_config(f"out_dir={tmp_path}", f"precision={precision}", "profile=true"))
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    assert (tmp_path / "bench.png").stat().st_size > 5000
    names = ["textbook fp32", "plain fp32", "direct fp32", "fast fp32"]
    if precision == "bf16":
        names = names[:1] + [
            f"{k} {p}" for k in ("plain", "direct", "fast") for p in ("fp32", "bf16")
        ]
    assert list(result["steps"]) == names
    assert result["steps"]["textbook fp32"]["times_textbook"] == 1
    for name, row in result["steps"].items():
        assert row["images_per_second"] == pytest.approx(16e3 / row["median_ms"]), name
        rate = result["matrix_gflops"][name.split()[1]]
        share = 100 * result["step_gflop"] / (row["median_ms"] / 1e3) / rate
        assert row["percent_of_matrix_rate"] == pytest.approx(share)
        assert len(row["turns_ms"]) == 3
        assert (row["times_direct"] == 1) == name.startswith("direct")
        assert row["memory_gb"] == 0.5
    expected = {"routing plain", "routing fast", "testing", "testing, direct", "copy"}
    assert expected <= result["others"].keys()
    assert {"device", "versions", "date", "cpu_features", "config"} <= result.keys()
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)
    assert "where the" in printed


def test_noisy_figures_are_refused(tmp_path, few_images, monkeypatch, capsys):
    original = tasks.training_steps

    def unsteady(*args, **kwargs):
        run, calls = original(*args, **kwargs), [0]

        def advance(count):
            calls[0] += 1
            run(count * (20 if calls[0] % 2 else 1))

        return advance

    monkeypatch.setattr(bench_command.tasks, "training_steps", unsteady)
    (tmp_path / "bench.png").write_text("of an earlier, quieter time")
    with pytest.raises(Noisy, match=r"too noisy to be quoted: .*fast fp32.*run it again"):
        bench(bench_config(f"out_dir={tmp_path}", "precision=fp32", "spread_percent=20"))
    assert json.loads((tmp_path / "bench.json").read_text())["steps"]["fast fp32"]["noisy"]
    assert not (tmp_path / "bench.png").exists()
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("fast fp32")]
    assert "noisy" in line


def test_noise_is_a_fault_of_the_machine(monkeypatch, capsys):
    def noisy(config):
        raise Noisy("too noisy to be quoted: everything")

    monkeypatch.setattr(bench_command, "bench", noisy)
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == "capsrun bench: too noisy to be quoted: everything\n"


@pytest.mark.parametrize("kind", ["plain", "direct", "fast"])
def test_the_profile_names_what_takes_time(few_images, kind):
    config = bench_config("model.conv1_channels=64", "recipe.batch_size=64")
    steps = tasks.training_steps(config, CPU, f"{kind} fp32", capture=False)
    found = breakdown_ms(steps, 2, CPU)
    parts = found["parts_ms"]
    for part in (
        "convolutions, forward",
        "convolutions, backward",
        "votes and routing, forward",
        "votes and routing, backward",
        "decoder, forward",
        "decoder, backward",
        "optimiser",
        "data",
        REST,
    ):
        assert parts[part] > 0, part
    if kind != "fast":  # there the kernel's transform is part of the forward pass
        assert parts["convolutions, backward"] > parts["convolutions, forward"]
    assert sum(parts.values()) >= sum(found["operations_ms"].values())


def test_the_direct_variant_is_the_fast_one_without_the_frequency_domain(few_images, monkeypatch):
    seen = []
    monkeypatch.setattr(frequency_conv, "cpu_features", lambda: {"avx2"})
    for module, name in ((frequency_conv, "relu_frequency_conv2d"), (routing_cpu, "squash_fused")):
        original = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, o=original, n=name, **k: seen.append(n) or o(*a, **k)
        )
    for kind, used in (
        ("direct", set()),
        ("fast", {"relu_frequency_conv2d", "squash_fused"}),
        ("plain", set()),
    ):
        tasks.training_steps(bench_config(), CPU, f"{kind} fp32", capture=False)(1)
        assert set(seen) == used
        del seen[:]
    assert "direct fp32" not in tasks.variant_names("fp32", torch.device("cuda"))


def test_steps_in_a_process_of_their_own():
    """Whose memory is not that of a big process."""
    ballast = torch.ones(2**28)  # 1 GB
    steps = tasks.OwnProcess(bench_config("device=cpu"), "fast fp32")
    steps(1)
    began = time.perf_counter()
    steps(20)
    assert time.perf_counter() - began > 0.02, "it is waited for"
    found = steps.finish()
    assert 0.1 < found["memory_gb"] < 0.9
    assert found["ways_ms"] == {}, "nothing is captured on a CPU"
    assert ballast[0] == 1


def test_bench_as_a_user_runs_it(in_tmp):
    done = run_capsrun("bench", *SMALL, "--profile", "precision=fp32", cwd=in_tmp)
    assert done.returncode == 0, done.stderr
    assert (in_tmp / "runs" / "bench-mnist" / "bench.json").exists()
    assert "where the" in done.stdout
