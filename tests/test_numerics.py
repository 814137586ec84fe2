"""Numbers stay finite, whatever the images, and the same settings give the same bits twice."""

import copy
import dataclasses
import functools
import json
import os

import pytest
import torch
from conftest import TINY, needs_compiler, run_capsrun, train_config
from test_train import StopAfter, metrics
from torch import Tensor

from capsrun import errors
from capsrun.commands.train import train
from capsrun.config import TrainConfig
from capsrun.data.batches import Batch
from capsrun.data.splits import standardise
from capsrun.errors import Stopped
from capsrun.models import build_model
from capsrun.models.fast.routing_cpu import load_kernels
from capsrun.models.routing import coupling_coefficients, squash
from capsrun.runs import segments
from capsrun.runs.checkpoint import read_checkpoint
from capsrun.training import device, graph
from capsrun.training.device import set_deterministic
from capsrun.training.step import Trainer

CPU = torch.device("cpu")
torch_version = str(torch.__version__)
WAYS = pytest.mark.parametrize(
    "fast", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "fast"]
)
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "bf16"])


@pytest.fixture(autouse=True)
def one_thread():
    """So small a network gains nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def tiny_config() -> TrainConfig:
    """Of a network with the layers of CapsNet, but few channels."""
    narrow = ["model.conv1_channels=8", "model.primary_types=2", "model.decoder_widths=[16,16]"]
    return train_config(*narrow, "recipe=authors")


def photos(count: int = 3) -> Tensor:
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def one_pixel() -> Tensor:
    image = torch.zeros(3, 1, 28, 28)
    image[:, :, 14, 14] = 1
    return image


IMAGES = {
    "black": torch.zeros(3, 1, 28, 28),
    "white": torch.ones(3, 1, 28, 28),
    "grey": torch.full((3, 1, 28, 28), 0.5),
    "one pixel": one_pixel(),
    "denormal": torch.full((3, 1, 28, 28), 1e-40),
    "standardised grey": standardise(torch.full((3, 1, 28, 28), 0.3)),
    # Pixels of the data sets are in [0, 1]; who calls the network may give it others.
    "1e4": 1e4 * photos(),
    "-1e4": -1e4 * photos(),
    "1e10": 1e10 * photos(),
    "1e20": 1e20 * photos(),
    "1e30": 1e30 * photos(),
}


def assert_finite(value: Tensor | None, what: str) -> None:
    assert value is None or value.isfinite().all(), what


def train_on(
    images_BCHW: Tensor,
    fast: bool,
    precision: str = "fp32",
    steps: int = 2,
    digits: int = 1,
    reconstruction: bool = True,
    weights_times: float = 1.0,
    **routing: object,
) -> None:
    """Make some updates, and look at all that is computed."""
    config = copy.deepcopy(tiny_config())
    config.routing = dataclasses.replace(config.routing, **routing)
    config.model.reconstruction = reconstruction
    model = build_model(config.model, config.routing, config.dataset)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(weights_times)
    if fast:
        assert load_kernels(*model.digitcaps_weight.shape[1:]) is not None
    trainer = Trainer(model, config.loss, config.recipe, 100, CPU, precision, fast)
    labels_BT = torch.arange(len(images_BCHW))[:, None] + torch.arange(digits)
    targets = images_BCHW.clamp(0, 1)[:, None].expand(-1, digits, -1, -1, -1)
    for step in range(steps):
        update = trainer.step(Batch(images_BCHW, labels_BT, targets), step)
        for name, value in update.output._asdict().items():
            assert_finite(value, f"{name} in step {step}")
        assert update.output.lengths_BJ.max() <= 1.00001
        for name, value in update.losses._asdict().items():
            assert_finite(value, f"{name} loss in step {step}")
        for name, weight in model.named_parameters():
            assert_finite(weight.grad, f"gradient of {name} in step {step}")
            assert_finite(weight, f"{name} after step {step}")


@WAYS
@PRECISIONS
@pytest.mark.parametrize("name", IMAGES)
def test_no_image_breaks_the_numbers(name, precision, fast):
    train_on(IMAGES[name], fast, precision)


@WAYS
@PRECISIONS
@pytest.mark.parametrize("iterations", range(1, 11))
def test_nor_does_any_number_of_iterations(iterations, precision, fast):
    mixed = torch.cat([IMAGES[name][:1] for name in ("black", "one pixel", "1e4")] + [photos(1)])
    train_on(mixed, fast, precision, steps=1, iterations=iterations)


@WAYS
@PRECISIONS
@pytest.mark.parametrize(
    "settings",
    [
        {"leaky": True},
        {"detach": True},
        {"leaky": True, "detach": True},
        {"reconstruction": False},
        {"digits": 2},
        {"leaky": True, "iterations": 10},
    ],
    ids=str,
)
def test_nor_does_any_setting(settings, precision, fast):
    mixed = torch.cat([IMAGES[name][:1] for name in ("black", "grey", "1e4")] + [photos(1)])
    train_on(mixed, fast, precision, steps=1, **settings)


@WAYS
@pytest.mark.parametrize("times", [0.0, 1e-20, 1e3, 1e6, 1e10])
def test_nor_do_tiny_or_huge_weights(times, fast):
    """Of every layer: of five in a row, so that numbers grow to this power."""
    reconstruction = times < 1e10  # three more layers, without a squash, would be infinite
    train_on(photos(), fast, weights_times=times, reconstruction=reconstruction)


LENGTHS = [0.0, 1e-45, 1e-30, 1e-10, 1.0, 1e4, 1e10, 1e17, 1e19, 1e30, 1e38]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squash_of_any_length(length, dtype):
    pose = torch.tensor([0.6 * length, 0.8 * length], dtype=dtype, requires_grad=True)
    squashed = squash(pose)
    (squashed * torch.tensor([1.0, -2.0], dtype=dtype)).sum().backward()
    assert_finite(squashed, "squash")
    assert_finite(pose.grad, "gradient")
    expected = length**2 / (1 + length**2)
    assert squashed.norm().item() == pytest.approx(expected, rel=1e-5, abs=1e-37)


def test_bounds_change_no_bit_below_them():
    poses = torch.randn(1000, 8) * torch.logspace(-20, 16, 1000)[:, None]
    norm = torch.linalg.vector_norm(poses, dim=-1, keepdim=True)
    assert torch.equal(squash(poses), poses * (norm / (1 + norm.square())))


@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("logit", [0.0, 1e4, 1e30, 3e38])
def test_couplings_of_huge_logits(logit, leaky):
    logits = torch.tensor([[[logit, -logit, 0.0]]], requires_grad=True)
    couplings = coupling_coefficients(logits, leaky)
    couplings[..., 0].sum().backward()
    assert_finite(couplings, "couplings")
    assert_finite(logits.grad, "gradient")
    assert couplings.sum() <= 1.00001
    if logit:
        assert couplings[0, 0].tolist() == [1.0, 0.0, 0.0]


@needs_compiler
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e5, 1e10, 1e15, 1e25, 1e30])
def test_the_fast_way_agrees_about_huge_votes(scale):
    """Where a formula overflows that is fine for usual numbers."""
    from capsrun.models.fast.routing_cpu import route_fused
    from capsrun.models.routing import capsule_votes, route

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 8, generator=generator).requires_grad_()
    weights = (scale * torch.randn(4, 8, 3, 6, generator=generator)).requires_grad_()
    asked = torch.randn(5, 3, 6, generator=generator)
    fused = route_fused(inputs, weights, None, 1, False)
    plain = route(capsule_votes(inputs, weights), None, 1)
    assert_finite(fused, "fast")
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-30)
    for value in torch.autograd.grad((fused * asked).sum(), [inputs, weights]):
        assert_finite(value, "gradient of the fast way")
    for value in torch.autograd.grad((plain * asked).sum(), [inputs, weights]):
        assert_finite(value, "gradient")


def results_of(folder):
    """What a run found, apart from the clock; its weights; and every logged number."""
    result = json.loads((folder / "result.json").read_text())
    weights = read_checkpoint(folder / "checkpoint.pt")["model"]
    for key in OF_THE_CLOCK:
        del result[key]
    return result, weights, metrics(folder)


OF_THE_CLOCK = ("train_seconds", "images_per_second", "memory_gb", "date")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_give_the_same_bits(tmp_path, precision):
    """On a CPU, with the same number of threads: with another they are added in another order."""
    words = ["train", *TINY, "recipe.steps=6", "name=run", "deterministic=true", "device=cpu"]
    found = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        done = run_capsrun(*words, f"precision={precision}", cwd=tmp_path / place)
        assert done.returncode == 0, done.stderr
        found.append(results_of(tmp_path / place / "runs" / "run" / "seed0"))
    (result, weights, lines), (other, others, other_lines) = found
    assert result["config"]["deterministic"] is True
    assert result == other
    assert lines == other_lines
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_processes_give_the_same_bits_on_a_gpu(tmp_path, precision):
    words = ["train", "dataset=mnist5k", "recipe.epochs=1", "name=run", "deterministic=true"]
    found = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        done = run_capsrun(*words, "device=cuda", f"precision={precision}", cwd=tmp_path / place)
        assert done.returncode == 0, done.stderr
        found.append(results_of(tmp_path / place / "runs" / "run" / "seed0"))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(weight, found[1][1][name]) for name, weight in found[0][1].items())


def test_pytorch_is_told(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    before = (torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark)
    try:
        cudnn.benchmark = True
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not cudnn.deterministic
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.deterministic, cudnn.benchmark = before[1:]


@pytest.mark.parametrize("broken", [(), (graph.Way(False, True),)], ids=["all work", "no Triton"])
def test_the_way_on_a_gpu_is_not_measured_then(monkeypatch, broken):
    """Though the compiled one would be the fastest, and plain operations before Triton's."""
    took = {way: 1.0 + 3 * way.triton - way.compiled for way in graph.WAYS}
    tried = []

    class Steps:
        def __init__(self, trainer, *_):
            self.way = graph.Way(
                trainer.compute != trainer.forward, trainer.model.triton, trainer.model.frequency
            )
            self.pool = None
            tried.append(self.way)
            if self.way in broken:
                raise RuntimeError("broken")

        def seconds(self):
            return took[self.way]

    monkeypatch.setattr(graph, "CapturedSteps", Steps)
    monkeypatch.setattr(errors, "notices", [])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    config = tiny_config()
    model = build_model(config.model, config.routing, config.dataset)
    trainer = Trainer(model, config.loss, config.recipe, 12, CPU, "fp32", False)
    steps = graph.GraphedSteps(trainer, torch.zeros(12))
    monkeypatch.setattr(steps, "_outcome", lambda way, _: steps._use(way) or torch.ones(1))
    steps._choose_way(None)
    assert not torch.backends.cudnn.benchmark
    assert not any(way.compiled for way in tried)
    chosen = graph.Way(False, not broken)
    assert {s.way for s in steps._captured.values()} == {chosen}


def interrupted(monkeypatch, folder, config, steps):
    with monkeypatch.context() as patch:
        StopAfter(patch, steps)
        with pytest.raises(Stopped):
            train(config, folder)


def test_an_interruption_alone_makes_no_new_part(tmp_path, monkeypatch, capsys):
    config = train_config(*TINY)
    interrupted(monkeypatch, tmp_path, config, 5)
    result = train(config, tmp_path)
    assert "went on with" not in capsys.readouterr().err
    (part,) = result["parts"]
    assert (part["first_step"], part["last_step"]) == (1, 12)
    assert part["versions"] == result["versions"]
    assert part["device"] == result["device"]


def test_another_machine_or_torch_is_said(tmp_path, monkeypatch, capsys):
    """Also when the process that was told of it was not the last one."""
    config = train_config(*TINY)
    interrupted(monkeypatch, tmp_path, config, 5)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "99.1")
        patch.setattr(device, "describe_device", lambda _: "abacus, 1 threads")
        interrupted(patch, tmp_path, config, 2)
        said = capsys.readouterr().err
        assert "after step 5 the run went on with device abacus, 1 threads (before: " in said
        assert f"torch 99.1 (before: {torch_version})" in said
    result = train(config, tmp_path)
    assert "after step 7 the run went on with" in capsys.readouterr().err
    spans = [(part["first_step"], part["last_step"]) for part in result["parts"]]
    assert spans == [(1, 5), (6, 7), (8, 12)]
    assert [part["versions"]["torch"] for part in result["parts"]] == [
        torch_version,
        "99.1",
        torch_version,
    ]
    changed = [note for note in result["notes"] if "went on with" in note]
    assert len(changed) == 2
    assert not any("went on with" in note for note in errors.notices)  # they are of this run alone


def test_what_is_a_change():
    now = {"device": "a", "precision": "fp32", "processes": 1, "git_commit": None}
    now["versions"] = {"python": "3.12.1", "torch": "2.8.0"}
    repaired = {**now, "versions": {"python": "3.12.9", "torch": "2.8.0"}}
    newer = {**now, "versions": {"python": "3.13.0", "torch": "2.8.0"}}
    assert segments.differences(now, repaired) == []
    assert segments.differences(now, newer) == ["python 3.13 (before: 3.12)"]
    assert segments.differences(now, {**now, "git_commit": "abc"}) == [
        "commit abc (before: unknown)"
    ]
    on_gpu = {**now, "versions": now["versions"] | {"cuda": "13.0"}}
    assert segments.differences(now, on_gpu) == ["cuda 13.0 (before: unknown)"]
    assert segments.differences(now, {**now, "processes": 2}) == ["processes 2 (before: 1)"]
    one = segments.extended([], 5, now)
    assert segments.extended(one, 5, newer) == one  # no step was made there
