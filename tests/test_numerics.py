"""Numbers stay finite, whatever the images, and the same settings give the same bits twice."""

import copy
import dataclasses
import functools
import json
import os

import pytest
import torch
from conftest import TINY, make_model, needs_compiler, run_capsrun, train_config
from test_train import assert_same_run
from torch import Tensor

from capsrun.cli import main
from capsrun.data.batches import Batch
from capsrun.data.splits import standardise
from capsrun.models.fast.routing_cpu import load_kernels, route_fused
from capsrun.models.routing import capsule_votes, coupling_coefficients, route, squash
from capsrun.training.device import set_deterministic
from capsrun.training.step import Trainer

CPU = torch.device("cpu")
tiny_config = functools.cache(lambda: train_config(*TINY))


@pytest.fixture(autouse=True)
def one_thread():
    """So small a network gains nothing from a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def grey(value: float) -> Tensor:
    return torch.full((3, 1, 28, 28), value, dtype=torch.float32)


PHOTOS = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
ONE_PIXEL = grey(0)
ONE_PIXEL[:, :, 14, 14] = 1
IMAGES = {
    "black": grey(0),
    "white": grey(1),
    "grey": grey(0.5),
    "one pixel": ONE_PIXEL,
    "denormal": grey(1e-40),
    "standardised grey": standardise(grey(0.3)),
    # Pixels of the data sets are in [0, 1]; who calls the network may give it others.
    **{f"{factor:g}": factor * PHOTOS for factor in (1e4, -1e4, 1e10, 1e20, 1e30)},
}


def assert_finite(value: Tensor | None, what: str) -> None:
    assert value is None or value.isfinite().all(), what


def train_on(
    images_BCHW: Tensor,
    fast: bool,
    precision: str = "fp32",
    steps: int = 1,
    digits: int = 1,
    reconstruction: bool = True,
    weights_times: float = 1.0,
    **routing: object,
) -> None:
    """Make some updates, and look at all that is computed."""
    config = copy.deepcopy(tiny_config())
    config.routing = dataclasses.replace(config.routing, **routing)
    config.model.reconstruction = reconstruction
    model = make_model(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(weights_times)
    if fast:
        assert load_kernels(*model.digitcaps.weight.shape[1:]) is not None
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


MIXED = torch.cat([IMAGES[name][:1] for name in ("black", "grey", "one pixel", "10000")])
CASES = {
    **{name: (images, {"steps": 2}) for name, images in IMAGES.items()},
    "1 iteration": (MIXED, {"iterations": 1}),
    "10 iterations": (MIXED, {"iterations": 10}),
    "leaky, 10 iterations": (MIXED, {"leaky": True, "iterations": 10}),
    "detached": (MIXED, {"detach": True}),
    "leaky, detached": (MIXED, {"leaky": True, "detach": True}),
    "no decoder": (MIXED, {"reconstruction": False}),
    "two digits": (MIXED, {"digits": 2}),
    # Of every layer: of five in a row, so that numbers grow to this power.
    **{f"weights times {n:g}": (PHOTOS, {"weights_times": n}) for n in (0.0, 1e-20, 1e3, 1e6)},
    # Three more layers, without a squash, would be infinite.
    "huge weights": (PHOTOS, {"weights_times": 1e10, "reconstruction": False}),
}


@pytest.mark.parametrize(
    "fast", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "fast"]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CASES)
def test_nothing_breaks_the_numbers(name, precision, fast, monkeypatch):
    # Pixels that a network refuses make numbers that others could make on the way.
    monkeypatch.setattr("capsrun.models.capsnet.check_images", lambda *_: None)
    images_BCHW, settings = CASES[name]
    train_on(images_BCHW, fast, precision, **settings)


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
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e5, 1e15, 1e30])
def test_the_fast_way_agrees_about_huge_votes(scale):
    """Where a formula overflows that is fine for usual numbers."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 4, 8, generator=generator).requires_grad_()
    weights = (scale * torch.randn(4, 8, 3, 6, generator=generator)).requires_grad_()
    factors = torch.randn(5, 3, 6, generator=generator)
    fused = route_fused(inputs, weights, None, 1, False)
    plain = route(capsule_votes(inputs, weights), None, 1)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-30)
    for routed in (fused, plain):
        assert_finite(routed, "capsules")
        for value in torch.autograd.grad((routed * factors).sum(), [inputs, weights]):
            assert_finite(value, "gradient")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_two_processes_give_the_same_bits(in_tmp, device):
    """On a CPU, with the same number of threads: with another they are added in another order."""
    words = ["train", *TINY, "recipe.steps=6", "name=run", "deterministic=true"]
    words += [f"device={device}", "precision=bf16"]
    (in_tmp / "other").mkdir()
    done = run_capsrun(*words, cwd=in_tmp / "other", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    if device == "cpu":
        assert main(words) == 0
        set_deterministic(False)
    else:  # cuBLAS must know before it is first used
        assert run_capsrun(*words, cwd=in_tmp).returncode == 0
    here, other = (folder / "runs" / "run" / "seed0" for folder in (in_tmp, in_tmp / "other"))
    assert json.loads((here / "result.json").read_text())["config"]["deterministic"] is True
    assert_same_run(here, other)


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
