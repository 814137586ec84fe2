"""Schedule, Adam, one step, device, precision and memory."""

import copy
import math
import sys

import pytest
import torch
from conftest import TINY, make_trainer, run_python, train_config
from torch import nn

from capsrun.config import TrainConfig
from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.training import device
from capsrun.training.device import resolve_device, resolve_precision
from capsrun.training.schedule import adam_rate, learning_rate, total_steps
from capsrun.training.step import Trainer

CPU = torch.device("cpu")


def make_tiny(
    config: TrainConfig, kind=Trainer, device=CPU, precision: str = "fp32", fast: bool = False
) -> tuple[Trainer, TrainingBatches]:
    """A new trainer for a configuration, and its batches."""
    recipe, split = config.recipe, load_dataset(config.dataset, device).train
    batches = TrainingBatches(split, 0, recipe.batch_size, order=recipe.order)
    return make_trainer(config, kind, device, precision, fast), batches


HELD = ["recipe.hold_fraction=0.5", "recipe.decay_periods=100"]
LINEAR = ["recipe.decay_shape=linear", "recipe.decay_periods=null", "recipe.hold_fraction=0.2"]
LR = 0.001  # of every recipe here


@pytest.mark.parametrize(
    ("words", "images", "steps", "rates"),
    [
        (["recipe=authors"], 60_000, 300_000, {0: LR, 1000: LR * 0.96**0.5, 2000: LR * 0.96}),
        (["recipe=authors"], 60_000, 300_000, {10**6: 1e-6}),
        (HELD, 12_800, 1000, {0: LR, 500: LR, 510: LR * 0.96 ** (10 * 100 / 500)}),
        (LINEAR, 12_800, 1000, {200: LR, 600: LR / 2, 999: LR / 800, 1000: 1e-6}),
        (["recipe.epochs=0.5"], 60_000, 235, {}),
        (["recipe.epochs=0.5"], 10, 1, {}),
    ],
)
def test_a_schedule(words, images, steps, rates):
    recipe = train_config("recipe.learning_rate=0.001", *words).recipe
    assert total_steps(recipe, images) == steps
    for step, rate in rates.items():
        assert learning_rate(recipe, step, steps) == pytest.approx(rate, rel=1e-6)


def test_where_schedules_end():
    """The quick one where the long one does; the rate for CIFAR-10 is at its floor before."""
    quick, long = train_config().recipe, train_config("recipe=authors").recipe
    steps = total_steps(quick, 60_000)
    assert steps == math.ceil(10 * 60_000 / 128)
    last = learning_rate(long, 300_000, 300_000)
    assert learning_rate(quick, steps, steps) == pytest.approx(last, rel=0.01)
    recipe = train_config("dataset=cifar10", "model=capsnet_cifar10", "recipe=cifar10").recipe
    assert total_steps(recipe, 50_000) == 600_000
    before, after = (learning_rate(recipe, step, 600_000) for step in (338_433, 338_434))
    assert after == 1e-6 < before == pytest.approx(1e-6, rel=1e-6)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("recipe.decay_periods=null", r"set exactly one of recipe\.decay_steps"),
        ("recipe.decay_shape=linear", "decay_shape=linear ends with the run"),
    ],
)
def test_a_schedule_that_contradicts_itself_is_refused(word, message):
    with pytest.raises(UserError, match=message):
        train_config(word)


def test_tensorflows_adam_by_hand():
    """θ −= lr · sqrt(1 − β₂^t) / (1 − β₁^t) · m / (sqrt(v) + ε), as TensorFlow's manual has it."""
    recipe = train_config("recipe=authors", "recipe.adam_epsilon=0.001").recipe
    value, m, v = 1.0, 0.0, 0.0
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    trainer = Trainer(nn.ParameterList([weight]), None, recipe, 300_000, CPU, "fp32", False)
    for step in range(20):
        gradient = 2 * value - 0.3
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        t = step + 1
        rate = 0.001 * 0.96 ** (step / 2000) * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        value -= rate * m / (math.sqrt(v) + 0.001)
        weight.grad = 2 * weight.detach() - 0.3
        trainer.set_rate(adam_rate(recipe, step, 300_000))
        trainer.optimizer.step()
        assert weight.item() == pytest.approx(value, rel=1e-12)


def test_pytorchs_adam_is_pytorchs():
    recipe = train_config("recipe=authors", "recipe.adam_form=pytorch").recipe
    ours, theirs = (nn.Parameter(torch.tensor([1.0, -3.0])) for _ in range(2))
    trainer = Trainer(nn.ParameterList([ours]), None, recipe, 300_000, CPU, "fp32", False)
    optimizer = torch.optim.Adam([theirs], lr=0.001, betas=(0.9, 0.999), eps=1e-8)
    for step in range(5):
        ours.grad, theirs.grad = 2 * ours.detach(), 2 * theirs.detach()
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step, 300_000)
        trainer.set_rate(adam_rate(recipe, step, 300_000))
        trainer.optimizer.step(), optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_averaged_weights_by_hand():
    """a ← 0.75 a + 0.25 w after every update, from the initial weights on."""
    trainer, batches = make_tiny(train_config(*TINY, "recipe.average=0.75"))
    expected = [weight.detach().clone() for weight in trainer.model.parameters()]
    for step in range(3):
        trainer.advance(batches, step, 1)
        weights = [weight.detach() for weight in trainer.model.parameters()]
        expected = [0.75 * a + 0.25 * w for a, w in zip(expected, weights)]
    for ours, by_hand in zip(trainer.averaged.parameters(), expected):
        torch.testing.assert_close(ours, by_hand)


def test_the_optimisers_state_is_taken_over():
    """Also from a device whose optimiser has other settings, but not from another network."""
    trainer, batches = make_tiny(train_config(*TINY))
    trainer.advance(batches, 0, 3)
    state = copy.deepcopy(trainer.optimizer.state_dict())
    state["param_groups"][0] |= {"capturable": True, "lr": torch.tensor(7.0), "fused": None}
    other, _ = make_tiny(train_config(*TINY))
    settings = dict(other.optimizer.param_groups[0])
    assert other.fits_optimizer(state)
    other.load_optimizer(state)
    for key in ("capturable", "lr", "fused", "eps", "betas"):
        assert other.optimizer.param_groups[0][key] == settings[key]
    moments = other.optimizer.state.values(), trainer.optimizer.state.values()
    for ours, theirs in zip(*moments, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    wider, _ = make_tiny(train_config(*TINY, "model.primary_types=4"))
    assert not wider.fits_optimizer(state)
    assert not wider.fits_optimizer({})


def test_device_and_precision_of_a_machine_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="no CUDA GPU here; use device=cpu"):
        resolve_device("cuda")
    assert resolve_precision("bf16", CPU) == "bf16"
    for features, precision in (({"avx2", "avx512f"}, "fp32"), ({"avx512_bf16"}, "bf16")):
        monkeypatch.setattr(device, "cpu_features", lambda features=features: features)
        assert resolve_precision("auto", CPU) == precision


@pytest.mark.parametrize(
    ("quota", "threads"),
    [("250000 100000", 2), ("20000 100000", 1), ("max 100000", 4), ("900000 100000", 4), (None, 4)],
)
def test_threads_are_no_more_than_a_container_may_use(tmp_path, quota, threads):
    group = tmp_path / "cpu.max"
    if quota is not None:
        group.write_text(quota + "\n")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        device.heed_cpu_quota(group)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_the_gpu_is_used_and_computes_the_same():
    assert resolve_device("auto").type == "cuda"
    losses = []
    for place in (CPU, torch.device("cuda")):
        trainer, batches = make_tiny(train_config(*TINY), device=place)
        losses.append([trainer.advance(batches, s, 1).losses.total.item() for s in range(10)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux")
def test_the_memory_of_a_run_is_not_that_of_one_before_it():
    torch.ones(100_000_000)
    with_earlier = device.memory_gb(CPU)
    device.begin_memory_count(CPU)
    began = device.memory_gb(CPU)
    assert began < with_earlier - 0.3
    torch.ones(50_000_000)
    assert device.memory_gb(CPU) - began == pytest.approx(0.2, abs=0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    """Page faults of a large tensor that is made, filled and freed again and again.

    The heap may have to grow once more for it, where something small took a piece of its place.
    """
    script = """
import ctypes, resource, torch
from capsrun.training.device import keep_freed_memory
def faults():
    for turn in range(8):
        if turn == 4:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(25_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
if hasattr(ctypes.CDLL(None), "mallopt"):
    print(faults(), keep_freed_memory(), faults())
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("another C library than glibc")
    given_back, possible, kept = done.stdout.split()
    assert possible == "True"
    assert int(kept) < 100
    assert int(given_back) > 4 * 20_000
