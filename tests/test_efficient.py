"""Efficient-CapsNet: self-attention routing, the network, and batch normalisation in training."""

import copy
import math

import pytest
import torch
from conftest import TINY, make_model, make_trainer, train_config, untrained
from test_graph import EFFICIENT as NARROW
from test_report import half_precision
from test_step import make_tiny
from test_train import straight_and_resumed
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from capsrun.commands.writer import routing_changes
from capsrun.data import load_dataset
from capsrun.errors import UserError
from capsrun.library import save_checkpoint
from capsrun.models.initialisation import he_normal
from capsrun.models.routing import RoutingIteration, capsule_votes
from capsrun.models.self_attention import SelfAttentionLayer, attend, exponential_squash
from capsrun.report.routing_maps import routed
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.runs.initial import begin_with_weights
from capsrun.training.graph import PLAIN, CapturedSteps, GraphedTrainer, unchanged
from capsrun.training.metrics import score_split
from capsrun.training.step import Trainer, tensors_of

EFFICIENT = [*NARROW]
EFFICIENT += [word for word in TINY if not word.startswith(("model.conv1", "model.primary"))]
AUGMENTED = ["dataset.augment=efficient_capsnet", "dataset.shift_px=0"]


def by_loops(votes: Tensor, prior: Tensor) -> Tensor:
    """The equations as they stand, with the attention of all votes to all others."""
    batch, inputs, classes, dimensions = votes.shape
    capsules = torch.zeros(batch, classes, dimensions, dtype=votes.dtype)
    for b in range(batch):
        summed = torch.zeros(inputs, classes, dtype=votes.dtype)
        for j in range(classes):
            attention = votes[b, :, j] @ votes[b, :, j].T / math.sqrt(dimensions)
            summed[:, j] = attention.sum(1)
        for j in range(classes):
            total = torch.zeros(dimensions, dtype=votes.dtype)
            for i in range(inputs):
                coupling = summed[i, j].exp() / summed[i].exp().sum()
                total += (coupling + prior[i, j]) * votes[b, i, j]
            length = total.norm()
            capsules[b, j] = (1 - 1 / length.exp()) * total / length
    return capsules


def some_votes(batch=2, inputs=5, classes=3, dimensions=4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    options = {"dtype": torch.float64, "generator": generator}
    votes = torch.randn(batch, inputs, classes, dimensions, **options)
    return votes, torch.randn(inputs, classes, **options)


# The squash


def test_the_squash_by_hand():
    """A vector of length ln 4 gets length 3/4; a tiny one stays, a huge one gets length 1."""
    direction = torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)
    torch.testing.assert_close(exponential_squash(math.log(4) * direction), 0.75 * direction)
    small = direction.float() * 1e-30
    assert torch.equal(exponential_squash(small), small)
    for size in (50.0, 1e20, 1e38):
        assert exponential_squash(direction.float() * size).norm() == pytest.approx(1)
    assert exponential_squash(torch.tensor([math.nan, 1.0])).isnan().all()


@pytest.mark.parametrize("size", [0.0, 1e-40, 1e-20, 1e-8, 1e-7, 1e-4, 1.0, 30.0, 1e20])
def test_the_gradient_of_the_squash(size):
    pose = torch.full((3,), size, requires_grad=True)
    (gradient,) = torch.autograd.grad(exponential_squash(pose)[0], pose)
    assert gradient.isfinite().all()
    if size < 1e-6:  # v = s there
        torch.testing.assert_close(gradient, torch.tensor([1.0, 0, 0]), atol=1e-3, rtol=0)


def test_gradients_of_squash_and_routing_are_right():
    votes, prior = some_votes()
    given = votes.requires_grad_(), prior.requires_grad_()
    assert torch.autograd.gradcheck(exponential_squash, (votes[0, 0].detach().requires_grad_(),))
    assert torch.autograd.gradcheck(attend, given)


# The routing


def test_routing_is_that_of_the_equations():
    votes, prior = some_votes()
    torch.testing.assert_close(attend(votes, prior), by_loops(votes, prior))


def test_routing_by_hand():
    """Two votes of one number for two classes; D = 1, and no prior.

    Rows of A summed: 1 · (1 + 2) and 2 · (1 + 2) for the first class, 0 for the second; the shares
    of the first are 1 / (1 + e⁻³) and 1 / (1 + e⁻⁶).
    """
    votes = torch.tensor([[[[1.0], [0.0]], [[2.0], [0.0]]]])
    history: list[RoutingIteration] = []
    capsules = attend(votes, torch.zeros(2, 2), history)
    shares = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-6))]
    assert history[0].couplings_BIJ[0, :, 0].tolist() == pytest.approx(shares)
    expected = 1 - math.exp(-(shares[0] + 2 * shares[1]))
    assert capsules.flatten().tolist() == pytest.approx([expected, 0])
    with_prior = attend(votes, torch.tensor([[0.5, 0.0], [-1.0, 0.0]]))
    total = shares[0] + 0.5 + 2 * (shares[1] - 1)
    assert with_prior.flatten().tolist() == pytest.approx([1 - math.exp(-total), 0])


def test_neither_the_order_of_capsules_nor_of_classes_matters():
    votes, prior = some_votes()
    inputs, classes = torch.randperm(5), torch.randperm(3)
    moved = attend(votes[:, inputs][:, :, classes], prior[inputs][:, classes])
    torch.testing.assert_close(moved, attend(votes, prior)[:, classes])


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = made if isinstance(made, tuple | list) else [made]
        sizes = [tensor.numel() for tensor in tensors if isinstance(tensor, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return made


def test_the_attention_of_all_to_all_is_never_made():
    votes = torch.randn(1, 500, 3, 4, requires_grad=True)
    with LargestTensor() as largest:
        attend(votes, torch.zeros(500, 3)).sum().backward()
    assert largest.numbers == votes.numel() < 500**2


def test_the_layer_routes_its_votes():
    layer = SelfAttentionLayer(6, 3, outputs=4, output_dim=5)
    with torch.no_grad():
        layer.bias.normal_()
    capsules = torch.rand(9, 6, 3)
    expected = by_loops(capsule_votes(capsules, layer.weight).double(), layer.bias.double())
    torch.testing.assert_close(layer(capsules).double(), expected, rtol=1e-5, atol=1e-6)
    history: list[RoutingIteration] = []
    assert torch.equal(layer(capsules, history), layer(capsules))
    torch.testing.assert_close(history[0].couplings_BIJ.sum(2), torch.ones(9, 6))


def test_the_first_weights_are_kerass():
    """He's variance is that after truncation, at twice the σ before it; the prior is 0."""
    weights = torch.empty(400, 500)
    he_normal(weights, 50)
    sigma = math.sqrt(2 / 50)
    assert weights.std() == pytest.approx(sigma, rel=0.01)
    assert weights.abs().max() == pytest.approx(2 * sigma / 0.8796, rel=1e-3)
    layer = make_model(train_config("model=efficient_capsnet")).requires_grad_(False).digitcaps
    assert layer.weight.std() == pytest.approx(math.sqrt(2 / (10 * 16 * 8)), rel=0.03)
    assert not layer.bias.any()


# The network


@pytest.fixture(scope="module")
def model():
    return make_model(train_config("model=efficient_capsnet")).eval().requires_grad_(False)


def test_the_number_of_parameters_is_the_papers(model):
    counts = {name: part.numel() for name, part in model.named_parameters()}
    assert sum(count for name, count in counts.items() if not name.startswith("decoder")) == 161_824
    assert sum(counts.values()) == 161_824 + 160 * 512 + 512 + 513 * 1024 + 1025 * 784


def test_the_layers_are_the_papers(model):
    """Each ReLU before its normalisation; capsule i has channels 8·i to 8·i + 7."""
    weights = {
        name: torch.randn_like(value)
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }
    weights |= {name: value.abs() + 0.1 for name, value in weights.items() if "running_var" in name}
    network = copy.deepcopy(model)
    network.load_state_dict(weights, strict=False)
    images = torch.rand(3, 1, 28, 28)
    maps = images
    for number, stride in zip((0, 3, 6, 9), (1, 1, 1, 2)):
        convolution, norm = f"convolutions.{number}", f"convolutions.{number + 2}"
        given = weights[f"{convolution}.weight"], weights[f"{convolution}.bias"], stride
        maps = F.conv2d(maps, *given).clamp(min=0)
        mean, variance = (weights[f"{norm}.running_{k}"][:, None, None] for k in ("mean", "var"))
        maps = (maps - mean) / (variance + 0.001).sqrt()
        maps = (
            maps * weights[f"{norm}.weight"][:, None, None] + weights[f"{norm}.bias"][:, None, None]
        )
    assert maps.shape == (3, 128, 9, 9)
    poses = (maps * weights["primarycaps.weight"][:, 0]).sum((2, 3)) + weights["primarycaps.bias"]
    expected = exponential_squash(torch.stack([poses[:, 8 * i : 8 * i + 8] for i in range(16)], 1))
    torch.testing.assert_close(network.primary_poses(images), expected, rtol=1e-3, atol=1e-4)


def test_first_weights_of_the_network(model):
    bound = math.sqrt(6 / (81 + 81 * 128))
    primary = model.primarycaps.weight
    assert bound * 0.99 < primary.abs().max() <= bound
    assert model.convolutions[3].weight.std() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.03)
    last = model.decoder[-2].weight
    assert last.std() == pytest.approx(math.sqrt(2 / (1024 + 784)), rel=0.01)
    assert model.decoder[0].weight.std() == pytest.approx(math.sqrt(2 / 160), rel=0.01)
    biases = [part for name, part in model.named_parameters() if name.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_training_settings_are_the_authors():
    config = train_config("model=efficient_capsnet", "recipe=efficient", *AUGMENTED)
    recipe, loss = config.recipe, config.loss
    assert (recipe.batch_size, recipe.epochs, recipe.learning_rate) == (16, 150, 0.0005)
    assert (recipe.learning_rate_floor, recipe.decay_rate, recipe.decay_periods) == (
        5e-5,
        0.97,
        150,
    )
    assert (loss.class_reduction, loss.margin_factor) == ("sum", 1)
    assert 784 * loss.reconstruction_weight == pytest.approx(0.392)


@pytest.mark.parametrize(
    "words",
    [
        ["model=efficient_capsnet", "dataset.image_px=40"],
        ["model=efficient_capsnet", "routing=dynamic"],
        ["model=efficient_capsnet", "routing=em"],
        ["model=efficient_capsnet", "routing=self_routing"],
        ["model=capsnet_small", "routing=self_attention", "model.primary_types=2"],
    ],
)
def test_networks_and_routings_go_together(words):
    config = train_config(*words)
    own = {"routing=em": "spread", "routing=self_routing": "log_likelihood"}
    assert config.loss.name == own.get(words[1], "authors")
    network = make_model(config).eval()
    px = config.dataset.image_px
    output = network(torch.rand(3, 1, px, px), torch.tensor([[1], [2], [3]]))
    assert output.capsules_BJD.shape == (3, 10, 16)
    assert 0 < output.lengths_BJ.min() <= output.lengths_BJ.max() < 1
    assert output.reconstructions_BTCHW.shape == (3, 1, 1, px, px)
    mnist = load_dataset(train_config("dataset=mnist5k").dataset, torch.device("cpu"))
    if px == 28:
        drawn = routed(network, mnist.test, 0)
        assert all(
            part.isfinite().all() for part in vars(drawn).values() if isinstance(part, Tensor)
        )


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset.image_px=10", "too small for the layers of efficient_capsnet"),
        ("model.strides=[1,1]", "there are 4, 2 and 3"),
        ("loss=cross_entropy", "which has capsules"),
    ],
)
def test_settings_that_make_no_network_are_refused(word, message):
    with pytest.raises(UserError, match=message):
        make_model(train_config("model=efficient_capsnet", word))


# Batch normalisation in training


def statistics(network: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in network.buffers()]


def test_training_normalises_by_the_batch_and_testing_by_what_was_seen():
    """And neither testing, nor what is logged, changes what was seen."""
    config = train_config(*EFFICIENT)
    trainer, batches = make_tiny(config)
    network = trainer.model
    before = statistics(network)
    update = trainer.advance(batches, 0, 1)
    first = statistics(network)
    assert not any(torch.equal(*pair) for pair in zip(before, first))
    maps = F.relu(make_model(config).convolutions[0](update.batch.images_BCHW))
    torch.testing.assert_close(first[0], 0.01 * maps.mean((0, 2, 3)))
    torch.testing.assert_close(first[1], 0.99 + 0.01 * maps.transpose(0, 1).flatten(1).var(1))
    split = load_dataset(config.dataset, torch.device("cpu")).test
    score_split(network, split, "fp32", "label", most=40)
    assert routing_changes(trainer, update.batch.images_BCHW) == {}
    assert all(torch.equal(*pair) for pair in zip(first, statistics(network)))
    trainer.advance(batches, 1, 1)
    assert not any(torch.equal(*pair) for pair in zip(first, statistics(network)))


def test_what_is_tried_changes_nothing():
    trainer, batches = make_tiny(train_config(*EFFICIENT, "recipe.average=0.5"), GraphedTrainer)
    Trainer.advance(trainer, batches, 0, 1)
    tensors = tensors_of(trainer.model) + tensors_of(trainer.averaged)
    before = [tensor.clone() for tensor in tensors]
    trainer.model.eval()
    with unchanged(trainer):
        CapturedSteps(trainer, batches, 3).replay(1)
        assert not torch.equal(before[-2], tensors[-2])
    trainer._outcome(PLAIN, batches)
    assert all(torch.equal(*pair) for pair in zip(before, tensors))
    assert trainer.model.training, "it is tried as it is trained"


def test_the_statistics_are_averaged_with_the_weights():
    trainer, batches = make_tiny(train_config(*EFFICIENT, "recipe.average=0.75"))
    expected = [
        tensor.double() for tensor in tensors_of(make_trainer(train_config(*EFFICIENT)).model)
    ]
    for step in range(3):
        trainer.advance(batches, step, 1)
        values = tensors_of(trainer.model)
        expected = [0.75 * a + 0.25 * v for a, v in zip(expected, values)]
    for ours, by_hand in zip(tensors_of(trainer.averaged), expected):
        if ours.is_floating_point():
            torch.testing.assert_close(ours.double(), by_hand, rtol=1e-5, atol=1e-7)
        else:
            assert ours == 3, "a counter"


def test_it_is_resumed_bit_for_bit(tmp_path, monkeypatch):
    words = [*AUGMENTED, "recipe.average=0.8", "record.evaluate_images=200"]
    config = train_config(*EFFICIENT, *words, "name=run")
    result = straight_and_resumed(config, tmp_path, monkeypatch, [5, 4])
    checkpoint = read_checkpoint(tmp_path / "resumed" / "checkpoint.pt")
    straight = read_checkpoint(tmp_path / "straight" / "checkpoint.pt")
    for weights in ("model", "averaged"):
        assert any("running_var" in name for name in checkpoint[weights])
        pairs = zip(checkpoint[weights].items(), straight[weights].items(), strict=True)
        assert all(
            ours[0] == theirs[0] and torch.equal(ours[1], theirs[1]) for ours, theirs in pairs
        )
    assert result["model"] == "efficient_capsnet"
    trained = load_checkpoint(tmp_path / "resumed").model
    assert not trained.training
    half_precision(monkeypatch, tmp_path / "resumed", tmp_path / "small.pt")
    small, images = load_checkpoint(tmp_path / "small.pt").model, torch.rand(4, 1, 28, 28)
    torch.testing.assert_close(
        small(images).lengths_BJ, trained(images).lengths_BJ, atol=5e-3, rtol=0
    )
    assert small.convolutions[2].num_batches_tracked == 12, "what is counted is no half"


def test_what_was_seen_belongs_to_its_layer(tmp_path, capsys):
    """A run that begins with other weights takes the statistics of a layer with its weights."""
    untrained(tmp_path / "given.pt", *EFFICIENT)
    config = train_config(*EFFICIENT, "model.channels=[4,4,5]", f"init={tmp_path / 'given.pt'}")
    begin_with_weights(make_model(config), config, [], tmp_path / "none")
    said = capsys.readouterr().out
    below = "convolutions.0, convolutions.2, convolutions.3, convolutions.5, convolutions.11"
    assert f"after 1 step: {below}, primarycaps, digitcaps, decoder.0, " in said
    assert "begun anew: convolutions.6, convolutions.8, convolutions.9\n" in said


def test_the_library_keeps_what_was_seen(tmp_path):
    network = make_model(train_config(*EFFICIENT))
    network(torch.rand(20, 1, 28, 28))
    save_checkpoint(network, tmp_path / "mine.pt")
    images = torch.rand(4, 1, 28, 28)
    kept = load_checkpoint(tmp_path / "mine.pt").model
    assert torch.equal(kept(images).lengths_BJ, network.eval()(images).lengths_BJ)
