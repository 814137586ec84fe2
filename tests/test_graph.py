"""Training steps as CUDA graphs: the same updates, in the fastest way that works."""

import pytest
import torch
from conftest import TINY, train_config
from test_step import make_tiny

from capsrun import errors
from capsrun.models.dynamic import CapsuleLayer
from capsrun.training import graph
from capsrun.training.graph import PLAIN, WAYS, CapturedSteps, GraphedTrainer, Way, trainer_class
from capsrun.training.step import Trainer

SMALL_CNN = ["model.channels=[8]", "model.kernels_px=[5]", "model.pools_px=[4]"]
EFFICIENT = ["model=efficient_capsnet", "model.channels=[4,4,4]", "model.primary_types=2"]
# What is captured: images moved, pairs made, dropout drawn and batches normalised, on the device.
KINDS = {
    "mnist5k": [],
    "mnist_padded": ["dataset=mnist_padded", "dataset.source=mnist5k"],
    "multimnist": ["dataset=multimnist", "dataset.source=mnist5k"],
    "cnn": ["model=cnn_baseline", *SMALL_CNN],
    "efficient": [*EFFICIENT, "dataset.augment=efficient_capsnet", "dataset.shift_px=0"],
    "averaged, in the authors' order": ["recipe.average=0.8", "recipe.order=authors"],
}


OTHER_LAYERS = ("cnn", "efficient")


def config_of(kind):
    of_capsnet = ("model.", "routing.") if kind in OTHER_LAYERS else ()
    tiny = [word for word in TINY if not word.startswith(of_capsnet)]
    return train_config(*tiny, *KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_from_buffers_are_the_steps(kind):
    """What a GPU captures, run on the CPU: several steps that read buffers on the device."""
    reference, batches = make_tiny(config_of(kind))
    losses = [reference.advance(batches, step, 1).losses.total.item() for step in range(12)]
    trainer, _ = make_tiny(config_of(kind), GraphedTrainer)
    several, single = (CapturedSteps(trainer, batches, count) for count in (5, 1))
    replays = [(several, 0), (several, 5), (single, 10), (single, 11)]
    ours = [steps.replay(step).losses.total.item() for steps, step in replays]
    assert ours == pytest.approx([losses[n] for n in (4, 9, 10, 11)], rel=1e-6)
    pairs = zip(trainer.changing_tensors(), reference.changing_tensors(), strict=True)
    for our, their in pairs:
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("device", "fast", "processes", "kind"),
    [
        ("cuda", True, 1, GraphedTrainer),
        ("cuda", False, 1, Trainer),
        ("cuda", True, 2, Trainer),
        ("cpu", True, 1, Trainer),
    ],
)
def test_who_is_given_graphs(device, fast, processes, kind):
    assert trainer_class(torch.device(device), fast, processes) is kind


@pytest.fixture
def choose(monkeypatch):
    """Have a trainer choose its way, where each takes so many seconds, or does not work."""
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: lambda batch: function(batch))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def way_of(trainer):
        compiled = trainer.compute != trainer.forward
        return Way(compiled, trainer.model.digitcaps.triton, trainer.model.primarycaps.frequency)

    def choose(took):
        tried, resets = [], []

        class FakeSteps:
            def __init__(self, trainer, batches, count, pool=None):
                self.way, self.pool = way_of(trainer), pool or "pool"
                tried.append(self.way)
                if self.way not in took:
                    raise RuntimeError("no compiler\nand more about it")

            def seconds(self):
                return took[self.way]

        monkeypatch.setattr(graph, "CapturedSteps", FakeSteps)
        monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
        trainer, batches = make_tiny(train_config(*TINY), GraphedTrainer)
        captured = trainer._capture(batches)
        assert len(resets) == 1
        assert len({steps.way for steps in captured.values()}) <= 1
        return way_of(trainer), list(captured), tried, trainer

    return choose


@pytest.mark.parametrize(
    ("took", "chosen", "notes"),
    [
        ({Way(True, True): 1.0, Way(True): 2.0}, Way(True, True), 0),
        ({Way(True, True): 2.0, Way(True): 1.0}, Way(True), 0),
        ({Way(True, True): 2.0, Way(True, True, True): 1.0, Way(True): 3.0}, (True,) * 3, 0),
        ({Way(True): 3.0}, Way(True), 1),
        ({Way(False, True): 3.0, PLAIN: 2.0}, PLAIN, 2),
    ],
)
def test_a_gpu_takes_the_fastest_way_that_works(choose, capsys, took, chosen, notes):
    way, counts, tried, trainer = choose(took)
    assert way == chosen
    assert counts == [1, 10]
    assert trainer.steps_at_once == 10
    assert trainer.ways_ms == {str(way): 1e3 * seconds for way, seconds in took.items()}
    assert capsys.readouterr().err.count("(no compiler)") == notes
    assert PLAIN not in tried or not any(way.compiled for way in took)
    assert torch.backends.cudnn.benchmark


def test_a_way_that_computes_something_else_is_not_taken(choose, monkeypatch, capsys):
    """Even if it is the fastest: here Triton routing gives a tenth more."""
    original = CapsuleLayer.forward

    def wrong_with_triton(self, poses, history=None):
        return original(self, poses, history) * (1.1 if self.triton else 1.0)

    monkeypatch.setattr(CapsuleLayer, "forward", wrong_with_triton)
    way, _, _, trainer = choose({way: 2.0 - way.triton for way in WAYS})
    assert way == Way(True)
    assert list(trainer.ways_ms) == ["compiled"]
    assert "compiled, Triton routing (" in capsys.readouterr().err


@pytest.mark.parametrize("broken", [(), (Way(False, True),)], ids=["all work", "no Triton"])
def test_a_deterministic_way_is_not_measured(choose, monkeypatch, broken):
    """Though the compiled one would be the fastest, and plain operations before Triton's."""
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    took = {way: 1.0 + 3 * way.triton - way.compiled for way in WAYS if way not in broken}
    way, _, tried, _ = choose(took)
    assert way == Way(False, not broken)
    assert not any(way.compiled for way in tried)
    assert not torch.backends.cudnn.benchmark


def test_where_nothing_can_be_captured_steps_are_made_one_by_one(choose):
    way, counts, _, trainer = choose({})
    assert (way, counts, trainer.steps_at_once, trainer.ways_ms) == (PLAIN, [], 1, {})
    reference, batches = make_tiny(train_config(*TINY))
    update, expected = (t.advance(batches, 0, 10) for t in (trainer, reference))
    assert update.losses.total.item() == expected.losses.total.item()


def gpu_losses(config, counts, precision="fp32", kind=Trainer, fast=False):
    """The losses after so many steps each, and the lengths of what they changed; the trainer."""
    gpu = torch.device("cuda")
    trainer, batches = make_tiny(config, kind, gpu, precision, fast)
    firsts = [sum(counts[:n]) for n in range(len(counts))]
    values = [trainer.advance(batches, *span).losses.total.item() for span in zip(firsts, counts)]
    if trainer.averaged is not None:
        values += [tensor.norm().item() for tensor in trainer.averaged.parameters()]
    return torch.tensor(values), trainer


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_captured_training_is_plain_training(kind, monkeypatch):
    """Every way in which a GPU may compute an update, 30 steps in turns of 10 and of 1."""
    config = config_of(kind)
    config.recipe.steps = 30
    plain, _ = gpu_losses(config, [10, 1, 9, 10])
    for way in WAYS:
        if kind in OTHER_LAYERS and (way.triton or way.frequency):
            continue  # only CapsNet has layers that compute in these ways
        monkeypatch.setattr(graph, "WAYS", (way,))
        ours, trainer = gpu_losses(config, [10, 1, 9, 10], kind=GraphedTrainer, fast=True)
        assert list(trainer.ways_ms) == [str(way)]
        torch.testing.assert_close(ours, plain, rtol=2e-3, atol=0)


@pytest.mark.gpu
def test_fast_training_on_a_gpu_in_bf16():
    config = train_config("dataset=mnist5k", "recipe.epochs=null", "recipe.steps=100")
    plain, _ = gpu_losses(config, [10] * 10, "bf16")
    ours, _ = gpu_losses(config, [10] * 10, "bf16", GraphedTrainer, True)
    torch.testing.assert_close(ours, plain, rtol=0.05, atol=0)
