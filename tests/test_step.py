"""Schedule, Adam, device and precision."""

import math
import subprocess
import sys

import pytest
import torch
from conftest import TINY, train_config
from torch import nn

from capsrun.data import load_dataset
from capsrun.data.batches import Batch
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.models import build_model
from capsrun.training import step as training_step
from capsrun.training.device import resolve_device, resolve_precision
from capsrun.training.schedule import adam_rate, learning_rate, total_steps
from capsrun.training.step import Trainer

CPU = torch.device("cpu")


def test_authors_schedule():
    recipe = train_config("recipe=authors").recipe
    assert total_steps(recipe, 60_000) == 300_000
    assert learning_rate(recipe, 0, 300_000) == 0.001
    assert learning_rate(recipe, 2000, 300_000) == pytest.approx(0.00096)
    assert learning_rate(recipe, 1000, 300_000) == pytest.approx(0.001 * 0.96**0.5)
    assert learning_rate(recipe, 10**6, 300_000) == 1e-6


def test_the_rate_for_cifar10_reaches_its_floor_on_the_way():
    recipe = train_config("dataset=cifar10", "model=capsnet_cifar10", "recipe=cifar10").recipe
    assert total_steps(recipe, 50_000) == 600_000
    assert learning_rate(recipe, 338_433, 600_000) == pytest.approx(1e-6, rel=1e-6)
    assert learning_rate(recipe, 338_433, 600_000) > 1e-6 == learning_rate(recipe, 338_434, 600_000)


def test_the_quick_schedule_ends_where_the_long_one_ends():
    quick, long = train_config().recipe, train_config("recipe=authors").recipe
    steps = total_steps(quick, 60_000)
    assert steps == math.ceil(10 * 60_000 / 128)
    assert learning_rate(quick, steps, steps) == pytest.approx(
        learning_rate(long, 300_000, 300_000), rel=0.01
    )


def test_the_quick_schedule_holds_the_rate_before_it_decays():
    recipe = train_config("recipe.hold_fraction=0.5", "recipe.decay_periods=100").recipe
    rate = recipe.learning_rate
    assert learning_rate(recipe, 0, 1000) == learning_rate(recipe, 500, 1000) == rate
    assert learning_rate(recipe, 510, 1000) == pytest.approx(rate * 0.96 ** (10 * 100 / 500))


def test_a_linear_schedule_ends_at_nothing():
    words = ["recipe.decay_shape=linear", "recipe.decay_periods=null", "recipe.hold_fraction=0.2"]
    recipe = train_config(*words).recipe
    assert learning_rate(recipe, 200, 1000) == recipe.learning_rate
    assert learning_rate(recipe, 600, 1000) == pytest.approx(recipe.learning_rate / 2)
    assert learning_rate(recipe, 999, 1000) == pytest.approx(recipe.learning_rate / 800)
    assert learning_rate(recipe, 1000, 1000) == recipe.learning_rate_floor


def test_a_schedule_that_contradicts_itself_is_refused():
    with pytest.raises(UserError, match=r"set exactly one of recipe\.decay_steps"):
        train_config("recipe.decay_periods=null")
    with pytest.raises(UserError, match="decay_shape=linear ends with the run"):
        train_config("recipe.decay_shape=linear")


@torch.no_grad()
def test_averaged_weights_by_hand():
    """a ← 0.75 a + 0.25 w after every update, from the initial weights on."""
    config = train_config(*TINY, "recipe.average=0.75")
    model = build_model(config.model, config.routing, config.dataset)
    trainer = Trainer(model, config.loss, config.recipe, 12, CPU, "fp32", False)
    batches = TrainingBatches(load_dataset(config.dataset, CPU).train, 0, 16)
    expected = [weight.clone() for weight in model.parameters()]
    for step in range(3):
        with torch.enable_grad():
            trainer.advance(batches, step, 1)
        expected = [0.75 * a + 0.25 * w for a, w in zip(expected, model.parameters())]
    for ours, by_hand in zip(trainer.averaged.parameters(), expected):
        torch.testing.assert_close(ours, by_hand)


def test_epochs_may_be_fractions():
    recipe = train_config("recipe.epochs=0.5").recipe
    assert total_steps(recipe, 60_000) == 235
    assert total_steps(recipe, 10) == 1


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


def test_steps_lower_the_loss():
    config = train_config(*TINY, "recipe.learning_rate=0.01")
    model = build_model(config.model, config.routing, config.dataset)
    trainer = Trainer(model, config.loss, config.recipe, 100, CPU, "fp32", False)
    images = torch.rand(8, 1, 28, 28)
    batch = Batch(images, torch.arange(8)[:, None], images[:, None])
    losses = [trainer.step(batch, step).losses.total.item() for step in range(20)]
    assert losses[-1] < 0.8 * losses[0]


def test_device_and_precision_of_a_machine_without_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU
    with pytest.raises(UserError, match="no CUDA GPU here; use device=cpu"):
        resolve_device("cuda")
    assert resolve_precision("bf16", CPU) == "bf16"
    monkeypatch.setattr(training_step, "cpu_features", lambda: {"avx2", "avx512f"})
    assert resolve_precision("auto", CPU) == "fp32"
    monkeypatch.setattr(training_step, "cpu_features", lambda: {"avx512f", "avx512_bf16"})
    assert resolve_precision("auto", CPU) == "bf16"


@pytest.mark.parametrize(
    ("said", "threads"),
    [("250000 100000", 2), ("20000 100000", 1), ("max 100000", 4), ("900000 100000", 4), (None, 4)],
)
def test_threads_are_no_more_than_a_container_may_use(tmp_path, said, threads):
    group = tmp_path / "cpu.max"
    if said is not None:
        group.write_text(said + "\n")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        training_step.heed_cpu_quota(group)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_the_gpu_is_used_and_computes_the_same():
    assert resolve_device("auto").type == "cuda"
    config = train_config(*TINY)
    images = torch.rand(8, 1, 28, 28)
    losses = []
    for device in (CPU, torch.device("cuda")):
        model = build_model(config.model, config.routing, config.dataset)
        trainer = Trainer(model, config.loss, config.recipe, 100, device, "fp32", False)
        batch = Batch(*(t.to(device) for t in (images, torch.arange(8)[:, None], images[:, None])))
        losses.append([trainer.step(batch, step).losses.total.item() for step in range(10)])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept():
    """Page faults of a large tensor that is made, filled and freed again and again.

    The heap may have to grow once more for it, where something small took a piece of its place.
    """
    script = """
import ctypes, resource, sys, torch
from capsrun.training.device import keep_freed_memory
if not hasattr(ctypes.CDLL(None), "mallopt"):
    sys.exit("no glibc")
if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = []
for _ in range(8):
    torch.ones(25_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[7] - faults[3])
"""
    counts = {}
    for kind in ("kept", "given back"):
        command = [sys.executable, "-c", script, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.stderr == "no glibc\n":
            pytest.skip("another C library than glibc")
        counts[kind] = int(done.stdout)
    assert counts["kept"] < 100
    assert counts["given back"] > 4 * 20_000
