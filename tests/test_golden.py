"""The network, loss and optimiser against values that the authors' own code computed."""

import functools

import numpy as np
import pytest
import torch
from conftest import GOLDEN, make_model, make_trainer, needs_compiler, train_config

from capsrun.data.batches import Batch
from capsrun.models.authors import load_authors_weights, to_authors_arrays
from capsrun.models.fast import frequency_conv
from capsrun.models.fast.frequency_conv import relu_frequency_conv2d
from capsrun.models.fast.routing_cpu import load_kernels
from capsrun.training.losses import capsnet_losses
from capsrun.training.metrics import Score, predicted_classes
from capsrun.training.step import to_device

CASES = ["mnist_r3_small", "mnist_r1_small", "multi_r3_small", "leaky_r3_small"]
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden values in {GOLDEN}")


@functools.cache
def authors_arrays(seed: int, types: int, image_px: int) -> dict[str, np.ndarray]:
    """The weights of a golden case, drawn as its README says."""
    rng = np.random.RandomState(seed)
    capsules = types * ((image_px - 16) // 2 + image_px % 2) ** 2
    pixels = image_px**2
    shapes = {
        "conv1.weights": (9, 9, 1, 256),
        "conv1.biases": (256,),
        "conv_capsule1.weights": (9, 9, 256, types * 8),
        "conv_capsule1.biases": (types, 8, 1, 1),
        "capsule2.weights": (capsules, 8, 160),
        "capsule2.biases": (10, 16),
        "recons.recons_1.weights": (160, 512),
        "recons.recons_1.biases": (512,),
        "recons.recons_2.weights": (512, 1024),
        "recons.recons_2.biases": (1024,),
        "recons.recons_3.weights": (1024, pixels),
        "recons.recons_3.biases": (pixels,),
    }
    arrays = {}
    for name, shape in shapes.items():
        if name.endswith("weights"):
            std = 0.05 if name.startswith("conv1.") else 0.1
            value = (rng.standard_normal(shape) * std).clip(-2 * std, 2 * std)
        else:
            value = 0.1 + 0.02 * rng.standard_normal(shape)
        arrays[name] = value.astype(np.float32)
    return arrays


class Case:
    """A golden case: what the authors computed, and its configuration and weights."""

    def __init__(self, name: str) -> None:
        self.golden = dict(np.load(GOLDEN / f"{name}.npz"))
        self.targets = int(self.golden["cfg.targets"])
        self.batch_size = int(self.golden["cfg.batch"])
        self.steps = int(self.golden["cfg.steps"])
        types, image_px = (
            int(self.golden[f"cfg.{k}"]) for k in ("num_prime_capsules", "image_size")
        )
        self.config = train_config(
            f"model.primary_types={types}",
            f"dataset.image_px={image_px}",
            f"routing.iterations={int(self.golden['cfg.routing'])}",
            f"routing.leaky={bool(self.golden['cfg.leaky'])}",
            "recipe=authors",
        )
        self.weights = authors_arrays(int(self.golden["seed"]), types, image_px)

    def batch(self, step: int) -> Batch:
        def take(*keys: str) -> torch.Tensor:
            part = slice(step * self.batch_size, (step + 1) * self.batch_size)
            return torch.from_numpy(np.stack([self.golden[key][part] for key in keys], axis=1))

        labels, images = ["labels", "labels_2"], ["image_1", "image_2"]
        labels, images = take(*labels[: self.targets]), take(*images[: self.targets])
        return Batch(take("images"), labels.long(), images[:, :, None])


def assert_close(ours, theirs, tolerance: float, what: str) -> None:
    """Compare relative to the largest value of the authors' tensor."""
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else np.asarray(ours)
    assert ours.shape == theirs.shape, what
    worst = np.abs(ours - theirs).max() / np.abs(theirs).max()
    assert worst <= tolerance, f"{what}: {worst:.1e} relative"


FAST = pytest.mark.parametrize(
    "fast", [False, pytest.param(True, marks=needs_compiler)], ids=["plain", "fast"]
)


@pytest.fixture(autouse=True)
def frequency_domain_everywhere(monkeypatch):
    """The fast way is what it is on a processor with AVX2."""
    monkeypatch.setattr(frequency_conv, "cpu_features", lambda: {"avx2"})


@FAST
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, fast):
    case = Case(name)
    golden, batch = case.golden, case.batch(0)
    model = to_device(make_model(case.config), torch.device("cpu"), fast)
    load_authors_weights(model, case.weights)
    if fast:
        assert load_kernels(*model.digitcaps.weight.shape[1:]) is not None
        maps, weight = model.conv1(batch.images_BCHW), model.primarycaps.weight
        assert relu_frequency_conv2d(maps, weight, stride=2) is not None
        assert frequency_conv.is_faster(maps, weight, stride=2)
    poses = model.primary_poses(batch.images_BCHW)
    votes_first = torch.einsum("ik,ikjd->ijd", poses[0], model.digitcaps.weight)
    output = model(batch.images_BCHW, batch.labels_BT)
    losses = capsnet_losses(output, batch.labels_BT, batch.targets_BTCHW, case.config.loss)
    losses.total.backward()

    types, grid = golden["primary_capsules"].shape[1], golden["primary_capsules"].shape[-1]
    primary = poses.unflatten(1, (types, grid, grid)).permute(0, 1, 4, 2, 3)
    drawn = output.reconstructions_BTCHW.transpose(0, 1).flatten(2)
    for what, ours, theirs in (
        ("primary capsules", primary, golden["primary_capsules"]),
        ("votes", votes_first, golden["votes_first"]),
        ("class capsules", output.capsules_BJD, golden["class_capsules"]),
        ("lengths", output.lengths_BJ, golden["lengths"]),
        ("reconstructions", drawn, golden["reconstructions"]),
        ("margin loss", losses.classification, golden["loss_parts"][-1]),
        ("reconstruction loss", losses.reconstruction, golden["loss_parts"][:-1].sum()),
        ("total loss", losses.total, golden["loss_total"]),
    ):
        assert_close(ours, theirs, 2e-5, what)
    predicted = predicted_classes(output.lengths_BJ, case.targets)
    score = Score(batch.labels_BT.sort(1).values, predicted, None, None, None, None)
    correct = score.count - score.errors
    assert (correct, score.almost_correct) == (golden["correct"], golden["almost_correct"])

    gradients = {key: value.grad for key, value in model.named_parameters()}
    for key, gradient in to_authors_arrays(model, gradients).items():
        norm = np.linalg.norm(gradient.astype(np.float64))
        assert_close(norm, golden[f"grad_norm.{key}"], 2e-5, f"norm of the gradient of {key}")
        head = gradient.flatten()[:64]
        worst = np.abs(head - golden[f"grad_head.{key}"]).max()
        assert worst <= 2e-5 * np.abs(gradient).max(), f"gradient of {key}"
        direction = np.random.RandomState(123).standard_normal(gradient.size).astype(np.float32)
        projection = gradient.flatten().astype(np.float64) @ direction
        # A sum with cancellation: its scale is the norm of the gradient, not its own size.
        assert abs(projection - golden[f"grad_proj.{key}"]) <= 2e-5 * norm, f"gradient of {key}"


def losses_of_steps(case: Case, fast: bool) -> list[float]:
    trainer = make_trainer(case.config, fast=fast)
    load_authors_weights(trainer.model, case.weights)
    return [trainer.step(case.batch(n), n).losses.total.item() for n in range(case.steps)]


@FAST
@pytest.mark.parametrize("name", CASES)
def test_adam_steps(name, fast):
    case = Case(name)
    np.testing.assert_allclose(losses_of_steps(case, fast), case.golden["train_losses"], rtol=1e-4)


def test_pytorchs_adam_does_not_pass():
    """The tolerance above tells the two forms of Adam apart."""
    case = Case("mnist_r3_small")
    case.config.recipe.adam_form = "pytorch"
    losses = losses_of_steps(case, fast=True)
    assert np.abs(losses / case.golden["train_losses"] - 1).max() > 1e-3
