"""The network: its size, its shapes, its initialisation, and that every option does something."""

import functools
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, make_model, make_trainer, train_config
from torch.nn import functional as F

from capsrun.config import TrainConfig
from capsrun.data.batches import Batch
from capsrun.errors import UserError
from capsrun.model_config import ROUTINGS, Routing
from capsrun.models import fast, plan_model
from capsrun.models.layers import RoutedLayer
from capsrun.models.routing import capsule_votes, route, squash
from capsrun.settings import deciding, from_dict


def make(*overrides, seed=0):
    return make_model(train_config(*overrides), seed)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 8_215_728),
        (["model.reconstruction=false"], 6_804_384),
        (["model.digit_bias=false"], 8_215_568),
        (["model.digit_bias=false", "model.reconstruction=false"], 6_804_224),
        (["dataset=multimnist"], 11_361_968),  # §6: 11.36 million
        (["dataset=mnist_padded"], 13_475_808),
        (["model=capsnet_small"], 2_117_232),
    ],
)
def test_parameter_counts(overrides, count):
    config = train_config(*overrides)
    plan = plan_model(config.model, config.routing, config.dataset)
    assert sum(parameter.numel() for parameter in plan.parameters()) == count


@pytest.mark.parametrize(
    ("image_px", "channels", "classes", "capsules"),
    [(28, 1, 10, 32 * 36), (36, 1, 10, 3200), (40, 1, 10, 4608), (17, 3, 2, 32), (33, 2, 5, 2592)],
)
def test_any_square_image_and_number_of_classes(image_px, channels, classes, capsules):
    sizes = {"image_px": image_px, "channels": channels, "classes": classes}
    small = ["model.conv1_channels=8", "model.decoder_widths=[16]"]
    model = make(*small, *(f"dataset.{name}={size}" for name, size in sizes.items()))
    assert model.primary_capsules == capsules
    output = model(torch.rand(2, channels, image_px, image_px), torch.tensor([[0], [1]]))
    assert output.capsules_BJD.shape == (2, classes, 16)
    assert output.lengths_BJ.shape == (2, classes)
    assert output.reconstructions_BTCHW.shape == (2, 1, channels, image_px, image_px)


def test_too_small_images_are_refused():
    with pytest.raises(UserError, match="at least 17 px"):
        make("dataset.image_px=16")


def test_a_capsule_is_eight_channels_at_one_place():
    """A plain view of the convolution's output would mix eight neighbouring pixels instead."""
    model = make(*TINY)
    images = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        maps = F.conv2d(F.relu(model.conv1(images)), model.primarycaps.weight, stride=2) / 2
        maps = maps + model.primarycaps.bias[:, None, None]
        poses = model.primary_poses(images)
    for kind, row, column in [(0, 0, 0), (1, 5, 2), (0, 3, 4)]:
        capsule = squash(maps[:, 8 * kind : 8 * kind + 8, row, column])
        torch.testing.assert_close(poses[:, 36 * kind + 6 * row + column], capsule)


def test_authors_initialisation():
    model = make()
    conv1, primary = model.conv1.weight, model.primarycaps.weight
    # A normal cut at ±2σ has a standard deviation of 0.8796 σ.
    assert conv1.std().item() == pytest.approx(0.8796 * 0.05, rel=0.02)
    assert primary.std().item() == pytest.approx(0.8796 * 0.1, rel=0.01)
    assert conv1.abs().max() <= 0.1
    assert primary.abs().max() <= 0.2
    assert model.digitcaps.weight.std().item() == pytest.approx(0.8796 * 0.1, rel=0.01)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            assert torch.equal(value, torch.full_like(value, 0.1)), name
    assert model.digitcaps.bias.shape == (10, 16)


def test_pytorch_initialisation_is_each_layers_default():
    model = make("model.initialisation=pytorch")
    assert model.conv1.weight.abs().max().item() == pytest.approx(1 / 9, rel=0.01)
    assert model.digitcaps.weight.abs().max().item() == pytest.approx(8**-0.5, rel=0.01)
    assert not model.digitcaps.bias.any()


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(123)
    first, state = make(*TINY, seed=1), torch.random.get_rng_state()
    torch.manual_seed(456)
    again, other = make(*TINY, seed=1), make(*TINY, seed=2)
    assert torch.equal(first.conv1.weight, again.conv1.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    torch.manual_seed(123)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator was touched"


def test_answers_do_not_depend_on_batch_mates():
    model = make(*TINY)
    images = torch.rand(6, 1, 28, 28)
    with torch.no_grad():
        together = model(images).lengths_BJ
        alone = torch.cat([model(image[None]).lengths_BJ for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_black_images_have_finite_gradients_without_biases():
    """Without biases a black image gives capsules of length 0, where Eq. 1 divides by 0."""
    words = ["model.digit_bias=false", "model.initialisation=pytorch"]
    trainer = make_trainer(train_config(*TINY, *words))
    model = trainer.model
    with torch.no_grad():
        model.conv1.bias.zero_()
        model.primarycaps.bias.zero_()
    black = torch.zeros(4, 1, 28, 28)
    _, output, losses = trainer.step(Batch(black, torch.zeros(4, 1).long(), black[:, None]), 0)
    assert not output.lengths_BJ.any()
    assert losses.total.isfinite()
    assert all(value.isfinite().all() for value in model.parameters())


def test_only_the_capsule_of_the_given_class_is_decoded():
    model = make(*TINY)
    capsules = model.encode(torch.rand(8, 1, 28, 28)).detach().requires_grad_()
    labels = torch.arange(8)
    model.decode(capsules, labels).sum().backward()
    used = capsules.grad.abs().sum(2) > 0
    assert torch.equal(used, F.one_hot(labels, 10).bool())


def test_the_true_label_masks_in_training():
    """Where the prediction is wrong, a training step still reconstructs from the true class."""
    trainer = make_trainer(train_config(*TINY))
    model = trainer.model
    images = torch.rand(8, 1, 28, 28)
    with torch.no_grad():
        capsules = model.encode(images)
        predicted = capsules.norm(dim=2).argmax(1)
        labels = (predicted + 3) % 10
        as_label, as_predicted = (
            0.0005 * (model.decode(capsules, classes) - images).square().sum().item() / 8
            for classes in (labels, predicted)
        )
    losses = trainer.step(Batch(images, labels[:, None], images[:, None]), 0).losses
    assert losses.reconstruction.item() == pytest.approx(as_label, rel=1e-5)
    assert losses.reconstruction.item() != pytest.approx(as_predicted, rel=1e-5)


def test_forward_reconstructs_each_given_label():
    model = make(*TINY)
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([[1, 7], [2, 3], [9, 0]])
    output = model(images, labels)
    for digit in range(2):
        torch.testing.assert_close(
            output.reconstructions_BTCHW[:, digit],
            model.decode(output.capsules_BJD, labels[:, digit]),
        )


def test_without_decoder_nothing_is_reconstructed():
    model = make(*TINY, "model.reconstruction=false")
    images, labels = torch.rand(3, 1, 28, 28), torch.zeros(3, 1).long()
    assert model(images, labels).reconstructions_BTCHW is None
    with pytest.raises(ValueError, match="without a decoder"):
        model.decode(model.encode(images), labels[:, 0])


def test_capsules_are_float32_in_bf16():
    model = make(*TINY)
    images = torch.rand(3, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(images, torch.zeros(3, 1).long())
    assert output.capsules_BJD.dtype == output.lengths_BJ.dtype == torch.float32
    assert output.reconstructions_BTCHW.dtype == torch.float32
    exact = model(images)
    assert not torch.equal(output.lengths_BJ, exact.lengths_BJ), "bf16 changed nothing"
    torch.testing.assert_close(output.lengths_BJ, exact.lengths_BJ, rtol=0.02, atol=0.002)


@functools.cache
def fingerprint(*overrides):
    """Losses on fixed images, before any step, after the first and after the last."""
    trainer = make_trainer(train_config(*TINY, *overrides))
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    batch = Batch(images, torch.arange(4)[:, None], images[:, None])
    return [trainer.step(batch, step).losses.total.item() for step in (0, 11, 0)]


# Another value of each, by group.
OPTIONS = {
    "model": "conv1_channels=16 kernel_px=7 primary_types=4 primary_dimensions=4 primary_scale=one "
    "digit_dimensions=8 digit_bias=false initialisation=pytorch reconstruction=false "
    "decoder_widths=[16]",
    "routing": "iterations=1 leaky=true detach=true",
    "loss": "margin_present=0.8 margin_absent=0.05 absent_weight=0.4 margin_factor=1 "
    "class_reduction=sum reconstruction_weight=0.1",
    "recipe": "learning_rate=0.003 learning_rate_floor=0.1 decay_rate=0.5 decay_periods=15 "
    "hold_fraction=0 adam_form=pytorch adam_beta1=0.5 adam_beta2=0.9 adam_epsilon=0.01",
}
OVERRIDES = [f"{group}.{word}" for group, words in OPTIONS.items() for word in words.split()]


@pytest.mark.parametrize(
    "override",
    [*OVERRIDES, "loss=paper", "recipe.decay_shape=linear recipe.decay_periods=null"],
)
def test_every_option_changes_the_numbers(override):
    assert fingerprint(*override.split()) != fingerprint()


def test_routing_in_pieces_changes_nothing(monkeypatch):
    """On a CPU a batch is routed a few images at a time."""
    model = make(*TINY)
    monkeypatch.setattr(fast, "ROUTED_AT_ONCE_ON_CPU", 8 * model.digitcaps.inputs)
    images = torch.rand(2 * 8 + 3, 1, 28, 28)
    history, whole = [], []
    capsules = model.encode(images, history)
    votes = capsule_votes(model.primary_poses(images), model.digitcaps.weight)
    torch.testing.assert_close(capsules, route(votes, model.digitcaps.bias, 3, history=whole))
    assert len(history) == 3
    for ours, theirs in zip(history, whole):
        torch.testing.assert_close(tuple(ours), tuple(theirs))


class Mean(RoutedLayer):
    """No agreement: each capsule is the squashed mean of its votes."""

    def __init__(self, inputs: int, input_dim: int, outputs: int, output_dim: int) -> None:
        super().__init__(inputs, input_dim, outputs, output_dim)
        self.weight = torch.nn.Parameter(torch.rand(inputs, input_dim, outputs, output_dim))

    def route(self, capsules_BIK, history):
        return squash(capsule_votes(capsules_BIK, self.weight).mean(1))


def test_another_routing_algorithm(monkeypatch):
    """A layer, a line of the table, and a setting, which only other algorithms have."""
    monkeypatch.setattr("capsrun.models.routing.Mean", Mean, raising=False)
    monkeypatch.setitem(ROUTINGS, "mean", Routing("routing.Mean"))
    words = (*TINY, "~routing", "+routing.algorithm=mean")
    config = train_config(*words)
    assert from_dict(TrainConfig, asdict(config)) == config
    assert deciding(asdict(config)) != deciding(asdict(train_config(*TINY)))
    model = make_model(config)
    images = torch.rand(3, 1, 28, 28)
    votes = capsule_votes(model.primary_poses(images), model.digitcaps.weight)
    torch.testing.assert_close(model.encode(images), squash(votes.mean(1)))
    assert model.routing == config.routing
    with pytest.raises(UserError, match=r"'maen', did you mean 'mean'.*one of: dynamic, .*, mean"):
        make(*TINY, "~routing", "+routing.algorithm=maen")
