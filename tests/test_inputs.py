"""What a network was not made for is refused, in one sentence, instead of giving wrong numbers."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import train_config
from hydra.core.global_hydra import GlobalHydra

import capsrun
from capsrun.data.splits import standardise
from capsrun.errors import UserError
from capsrun.models import build_model
from capsrun.models.capsnet import CapsNet
from capsrun.models.cnn import CNN
from capsrun.training.losses import margin_loss

MODELS = ["capsnet_small", "cnn_authors"]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    config = train_config(f"model={request.param}")
    return build_model(config.model, config.routing, config.dataset).eval()


IMAGES = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        (torch.nn.functional.pad(IMAGES, (6, 6, 6, 6)), r"\(3, 1, 40, 40\).* \(B, 1, 28, 28\)"),
        (torch.nn.functional.pad(IMAGES, (0, 2)), r"\(3, 1, 28, 30\)"),
        (IMAGES[..., :27, :27], r"\(3, 1, 27, 27\)"),
        (IMAGES.expand(3, 3, 28, 28), r"\(3, 3, 28, 28\)"),
        (IMAGES[:, 0], r"\(3, 28, 28\)"),
        (IMAGES[0, 0], r"\(28, 28\)"),
        ((255 * IMAGES).byte(), "images of torch.uint8: their pixels are to be floats"),
        (255 * IMAGES, r"pixels from 0\.\d+ to 25\d\.\d+, not in \[0, 1\]"),
        (2 * IMAGES - 1, r"pixels from -0\.99"),
        ((IMAGES - 0.1307) / 0.3081, r"not in \[0, 1\]"),
        (torch.full_like(IMAGES, float("nan")), "from nan to nan"),
        (torch.where(IMAGES > 0.9, float("nan"), IMAGES), "from nan to nan"),
        (IMAGES > 0.5, "images of torch.bool"),
        (IMAGES.permute(0, 2, 3, 1), r"\(3, 28, 28, 1\)"),
        (IMAGES.double(), r"float64, but this network is of torch\.float32: images\.to\("),
        (IMAGES.half(), r"float16, but this network is of torch\.float32"),
        (IMAGES.numpy(), r"images are a ndarray: .*torch\.as_tensor\(images\)"),
        (IMAGES.tolist(), "images are a list"),
        (None, "images are a NoneType"),
        (IMAGES.to_sparse(), r"images\.to_dense\(\)"),
        (IMAGES.to("meta"), "images on meta, but this network is on cpu"),
        (torch.where(IMAGES > 0.5, float("inf"), IMAGES), "to inf"),
    ],
)
@torch.inference_mode()
def test_images_that_a_network_does_not_take(model, images, reason):
    with pytest.raises(ValueError, match=reason):
        model(images)


@torch.inference_mode()
def test_images_that_it_takes(model):
    model(IMAGES)
    model(IMAGES[:0])
    model(IMAGES.clamp(0, 1) + 1e-6)
    model(torch.zeros(1, 1, 28, 28))
    model(IMAGES.to(memory_format=torch.channels_last))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES.bfloat16())


@torch.inference_mode()
def test_a_network_of_another_precision_takes_its_own():
    config = train_config("model=cnn_authors")
    model = build_model(config.model, config.routing, config.dataset).double()
    model(IMAGES.double())
    with pytest.raises(ValueError, match=r"images\.to\(torch\.float64\)"):
        model(IMAGES)


@torch.inference_mode()
def test_a_network_of_standardised_images_takes_those(model):
    config = train_config("dataset.standardise=true", "model=capsnet_small")
    other = build_model(config.model, config.routing, config.dataset)
    other(standardise(IMAGES))
    dot = torch.zeros(1, 1, 28, 28)
    dot[0, 0, 5, 5] = 1
    other(standardise(dot))
    for wrong in (255 * IMAGES, IMAGES, 30 * standardise(IMAGES)):
        with pytest.raises(ValueError, match=r"images with mean .* but this network takes each"):
            other(wrong)
    with pytest.raises(ValueError, match="it is made with standardised=True"):
        model(standardise(IMAGES))


@torch.inference_mode()
def test_networks_that_are_made_by_hand_take_standardised_images_too():
    for name, made in (("capsnet_small", CapsNet), ("cnn_authors", CNN)):
        config = train_config(f"model={name}")
        settings = [config.model] + [config.routing] * (made is CapsNet)
        made(*settings, image_px=28, standardised=True)(standardise(IMAGES))
    with pytest.raises(ValueError, match="settings of a CapsNet are wanted, not CNNConfig"):
        CapsNet(config.model, config.routing, image_px=28)


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        (torch.ones(3, 1, dtype=torch.bool), r"mask of shape \(3, 1\): .* \(B, J\), \(3, 10\)"),
        (torch.zeros(1, 10).bool(), r"mask of shape \(1, 10\)"),
        (torch.eye(10).long()[:3], "one-hot labels become classes"),
        (torch.arange(10).expand(3, 10), r"as many labels as classes, .* present\.bool\(\)"),
        (torch.tensor([0, 1, 10]), "labels from 0 to 10, but the classes are 0 to 9"),
        (torch.tensor([0, 1]), r"labels of shape \(2, 1\) for 3 images"),
        (torch.rand(3, 10), "labels of torch.float32"),
        (torch.tensor([0, 1, 2]).int(), "labels of torch.int32"),
        ([0, 1, 2], "labels are a list"),
    ],
)
def test_margin_loss_wants_classes_or_one_flag_a_capsule(present, reason):
    with pytest.raises(ValueError, match=reason):
        margin_loss(torch.rand(3, 10), present)


def test_losses_of_what_cannot_be_compared():
    for lengths, reason in (
        (torch.rand(3, 10, 16), r"of capsules they are capsules\.norm\(dim=2\)"),
        (torch.ones(3, 10).long(), "lengths of torch.int64"),
        ([[0.5]], "lengths are a list"),
    ):
        with pytest.raises(ValueError, match=reason):
            margin_loss(lengths, torch.tensor([0, 1, 2]))
    for drawn, target, reason in (
        (IMAGES[:, None], IMAGES, r"shape \(3, 1, 1, 28, 28\), but targets of \(3, 1, 28, 28\)"),
        (IMAGES, (255 * IMAGES).byte(), "targets of torch.uint8: both are to be floats"),
        (IMAGES, None, "targets are a NoneType"),
    ):
        with pytest.raises(ValueError, match=reason):
            capsrun.reconstruction_loss(drawn, target)


def test_a_gradient_for_each_image(model):
    """`torch.func` computes many at once, whose numbers are not at hand."""
    weights = dict(model.named_parameters())

    def loss(weights, image):
        output = torch.func.functional_call(model, weights, (image[None],))
        return output.scores_BJ.square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, IMAGES)
    assert all(gradient.shape[0] == 3 for gradient in found.values())


def test_configurations_in_several_threads():
    """Hydra has one state for all of them."""
    with ThreadPoolExecutor(6) as pool:
        words = [f"seed={seed}" for seed in range(24)]
        found = list(pool.map(capsrun.training_config, words))
    assert [config.seed for config in found] == list(range(24))
    assert not GlobalHydra.instance().is_initialized()


def test_what_else_is_not_taken_from_python():
    for given in (capsrun.training_config, partial(capsrun.load_dataset, "mnist5k")):
        with pytest.raises(UserError, match=r"f\(\*overrides\)"):
            given(["dataset=mnist5k"])
    for wrong in (train_config(), None, 5):
        with pytest.raises(UserError, match="give the name of a data set"):
            capsrun.load_dataset(wrong)
    with pytest.raises(ValueError, match="arrays are wanted by name"):
        capsrun.load_authors_weights(None, "x.npz")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (torch.tensor([1, 2, 3]), r"labels of shape \(3,\) for 3 images: .* labels\[:, None\]"),
        (torch.eye(10).long()[:3], r"one-hot .* labels\.argmax\(1, keepdim=True\)"),
        (torch.eye(10)[:3], r"labels of torch\.float32"),
        (torch.tensor([[1], [2]]), r"labels of shape \(2, 1\) for 3 images"),
        (torch.tensor([[1], [2], [10]]), "labels from 1 to 10, but the classes are 0 to 9"),
        (torch.tensor([[1], [-1], [3]]), "labels from -1"),
        (torch.tensor([[1], [2], [3]]).byte(), "labels of torch.uint8"),
        (torch.tensor([[True], [False], [True]]), "labels of torch.bool"),
        (torch.zeros(3, 0).long(), r"labels of shape \(3, 0\)"),
        (torch.tensor(1), r"labels of shape \(\)"),
        (np.array([[1], [2], [3]]), r"labels are a ndarray: .*torch\.as_tensor\(labels\)"),
        ([[1], [2], [3]], "labels are a list"),
    ],
)
@torch.inference_mode()
def test_labels_that_a_capsnet_does_not_take(labels, reason):
    config = train_config("model=capsnet_small")
    model = build_model(config.model, config.routing, config.dataset)
    with pytest.raises(ValueError, match=reason):
        model(IMAGES, labels)
