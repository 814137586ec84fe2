"""Routing algorithms beside the paper's: against slow references, and as a choice of one's own."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import TINY, make_model, make_trainer, train_config, untrained
from torch.autograd import gradcheck

from capsrun import cli
from capsrun.compose import compose
from capsrun.config import EvalConfig, TrainConfig
from capsrun.data import load_dataset
from capsrun.data.splits import TrainingBatches
from capsrun.errors import UserError
from capsrun.experiments import settings_for
from capsrun.model_config import ROUTINGS, DynamicRoutingConfig, SpreadLossConfig
from capsrun.models.capsnet import layer_of
from capsrun.models.em import EMCapsuleLayer, coordinates, em_route
from capsrun.models.self_routing import SelfRoutingLayer, self_route
from capsrun.settings import from_dict
from capsrun.training.attacks import Attack, Network, attack_split
from capsrun.training.graph import CapturedSteps, GraphedTrainer
from capsrun.training.losses import negative_log_likelihood, spread_loss

CHOICES = ["dynamic", "uniform", *(name for name in ROUTINGS if name != "dynamic")]
EM = {"inverse_temperature": 0.3, "temperature_decay": 0.9, "minimum_variance": 0.02}


def random_inputs(batch=2, inputs=5, outputs=3, dimensions=4, seed=0):
    """Votes V, activations a, β_u and β_a."""
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randn(batch, inputs, outputs, dimensions, generator=generator).double()
    activations = torch.rand(batch, inputs, generator=generator).double()
    betas = torch.randn(2, outputs, generator=generator).double()
    return votes, activations, *betas


def slow_em(votes, activations, beta_u, beta_a, iterations):
    """Procedure 1 of the EM paper, as it stands, for one image, in plain numbers."""
    inputs, outputs, dimensions = votes.shape
    R = [[1 / outputs] * outputs for _ in range(inputs)]
    V, a = votes.tolist(), activations.tolist()
    for iteration in range(1, iterations + 1):
        inverse = EM["inverse_temperature"] * (1 - EM["temperature_decay"] ** iteration)
        means, variances, found = [], [], []
        for j in range(outputs):  # M-step
            r = [R[i][j] * a[i] for i in range(inputs)]
            mu = [sum(r[i] * V[i][j][h] for i in range(inputs)) / sum(r) for h in range(dimensions)]
            var = [
                sum(r[i] * (V[i][j][h] - mu[h]) ** 2 for i in range(inputs)) / sum(r)
                + EM["minimum_variance"]
                for h in range(dimensions)
            ]
            cost = sum((beta_u[j] + math.log(math.sqrt(v))) * sum(r) for v in var)
            found.append(1 / (1 + math.exp(-inverse * (beta_a[j] - cost))))
            means.append(mu)
            variances.append(var)
        for i in range(inputs):  # E-step
            p = []
            for j in range(outputs):
                exponent = sum(
                    (V[i][j][h] - means[j][h]) ** 2 / (2 * variances[j][h])
                    for h in range(dimensions)
                )
                density = math.prod(2 * math.pi * v for v in variances[j]) ** -0.5
                p.append(found[j] * density * math.exp(-exponent))
            R[i] = [x / sum(p) for x in p]
    return torch.tensor(means).double(), torch.tensor(found).double()


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
def test_em_is_procedure_1(iterations):
    votes, activations, beta_u, beta_a = random_inputs()
    means, logits = em_route(votes, activations, beta_u, beta_a, iterations, **EM)
    for n in range(len(votes)):
        given = votes[n], activations[n], beta_u.tolist(), beta_a.tolist()
        slow_means, slow_activations = slow_em(*given, iterations)
        torch.testing.assert_close(means[n], slow_means, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(logits[n].sigmoid(), slow_activations, rtol=1e-6, atol=1e-6)


def test_one_iteration_of_em_by_hand():
    """Two sure capsules vote 1 and 3: μ = 2, σ² = 1, and the cost is ½ + ½ shares of β_u."""
    votes = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 2, 1)
    how = {"inverse_temperature": 2.0, "temperature_decay": 0.5, "minimum_variance": 1e-12}
    beta_u, beta_a = torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0])
    means, logits = em_route(votes, torch.ones(1, 2), beta_u, beta_a, 1, **how)
    torch.testing.assert_close(means, torch.full((1, 2, 1), 2.0))
    # λ = 2 (1 − ½) = 1; cost = (β_u + log 1) · 1.
    torch.testing.assert_close(logits, torch.tensor([[1.0, -2.0]]))


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_gradient_of_em(iterations):
    given = [tensor.requires_grad_() for tensor in random_inputs(inputs=4, outputs=2, dimensions=3)]
    assert gradcheck(lambda *given: em_route(*given, iterations, **EM), given)


def test_what_em_does_not_depend_on():
    votes, activations, beta_u, beta_a = random_inputs()
    given = activations, beta_u, beta_a
    means, logits = em_route(votes, *given, 3, **EM)
    # The order of the capsules below, and that of the classes, which only moves with them.
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = em_route(votes[:, order], activations[:, order], beta_u, beta_a, 3, **EM)
    torch.testing.assert_close(moved, (means, logits))
    order = torch.tensor([2, 0, 1])
    moved = em_route(votes[:, :, order], activations, beta_u[order], beta_a[order], 3, **EM)
    torch.testing.assert_close(moved, (means[:, order], logits[:, order]))
    # What is added to all votes is added to the poses, however large.
    shift = torch.tensor([1e4, -3.0, 0.0, 7.0]).double()
    moved = em_route(votes + shift, *given, 3, **EM)
    torch.testing.assert_close(moved, (means + shift, logits))
    # A capsule that is not there has no say.
    more = torch.cat([votes, 9 * torch.ones_like(votes[:, :1])], dim=1)
    none = torch.cat([activations, torch.zeros_like(activations[:, :1])], dim=1)
    torch.testing.assert_close(em_route(more, none, beta_u, beta_a, 3, **EM), (means, logits))


@pytest.mark.parametrize("apart", [0, 40])
def test_em_in_single_precision_is_as_it_is_in_double(apart):
    """Also where the votes agree, so that their variance is the difference of two squares.

    And where they do so at two places as far apart as those of a trained network are.
    """
    votes, *given = random_inputs(inputs=200)
    votes = 5 + votes / 50
    votes[:, ::3] += apart
    singles = [tensor.float() for tensor in (votes, *given)]
    ours, exact = em_route(*singles, 3, **EM), em_route(votes, *given, 3, **EM)
    for our, other in zip(ours, exact):
        torch.testing.assert_close(our.double(), other, rtol=1e-4, atol=1e-4)


def em_layer(shared=True, inputs=8, types=2, outputs=3):
    routing = train_config("routing=em", f"routing.shared={str(shared).lower()}").routing
    return EMCapsuleLayer(inputs, 16, outputs, routing, types).double()


@pytest.mark.parametrize("shared", [True, False])
def test_votes_are_matrix_products_and_shared_ones_know_their_place(shared):
    layer = em_layer(shared)
    poses = torch.randn(2, 8, 16).double()
    votes = layer.votes(poses)
    places = coordinates(2).double()
    for i, j in ((0, 0), (3, 1), (6, 2)):
        matrix = layer.weight[i // 4 if shared else i, :, j]
        expected = poses[1, i].view(4, 4) @ matrix
        if shared:
            expected[0, 3] += places[i % 4, 0]
            expected[1, 3] += places[i % 4, 1]
        torch.testing.assert_close(votes[1, i, j].view(4, 4), expected)
    assert coordinates(2).tolist() == [[-0.25, -0.25], [-0.25, 0.25], [0.25, -0.25], [0.25, 0.25]]


def test_the_em_layer_routes_its_votes_with_its_own_settings():
    layer = em_layer()
    layer.routing.iterations, layer.routing.minimum_variance = 2, EM["minimum_variance"]
    layer.routing.inverse_temperature = EM["inverse_temperature"]
    layer.routing.temperature_decay = EM["temperature_decay"]
    with torch.no_grad():
        layer.beta_u.copy_(torch.tensor([0.3, -0.2, 0.1]))
        layer.beta_a.copy_(torch.tensor([-1.0, 2.0, 0.5]))
        capsules = torch.randn(1, 8, 17, generator=torch.Generator().manual_seed(0)).double()
        found = layer(capsules)[0]
        votes = layer.votes(capsules[:, :, :16])[0]
    given = votes, capsules[0, :, 16].sigmoid(), layer.beta_u.tolist(), layer.beta_a.tolist()
    means, activations = slow_em(*given, 2)
    torch.testing.assert_close(found.norm(dim=1), activations)
    torch.testing.assert_close(
        found, means / means.norm(dim=1, keepdim=True) * activations[:, None]
    )


def slow_self_routing(layer, capsules):
    """The equations of the paper, for one image."""
    J = layer.outputs
    poses, sure = capsules[:, :-1], capsules[:, -1].sigmoid()
    sums, total = torch.zeros(J).double(), sure.sum()
    pose = torch.zeros(J, layer.output_dim).double()
    for i in range(layer.inputs):
        logits = [
            sum(poses[i, k] * layer.routing_weight[i, k, j] for k in range(poses.shape[1]))
            + layer.routing_bias[i, j]
            for j in range(J)
        ]
        c = torch.stack(logits).softmax(0)
        for j in range(J):
            vote = poses[i] @ layer.weight[i, :, j]
            sums[j] += c[j] * sure[i]
            pose[j] += c[j] * sure[i] * vote
    return pose / sums[:, None], sums / total


def self_routing_layer():
    layer = SelfRoutingLayer(5, 4, 3, 6).double()
    with torch.no_grad():
        layer.routing_weight.normal_()
        layer.routing_bias.normal_()
    return layer


def test_self_routing_is_its_equations():
    layer, capsules = self_routing_layer(), torch.randn(2, 5, 5).double()
    found = layer(capsules)
    for n in range(2):
        pose, activation = slow_self_routing(layer, capsules[n])
        directions = pose / pose.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[n], directions * activation[:, None])
    torch.testing.assert_close(found.norm(dim=2).sum(1), torch.ones(2).double())


def test_what_self_routing_does_not_depend_on():
    layer, capsules = self_routing_layer(), torch.randn(2, 5, 5).double()
    found, order, classes = layer(capsules), torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 1])
    moved = self_routing_layer()
    with torch.no_grad():
        for name, weights in moved.named_parameters():
            theirs = layer.get_parameter(name)[order]
            weights.copy_(theirs[..., classes, :] if name == "weight" else theirs[..., classes])
    torch.testing.assert_close(moved(capsules[:, order]), found[:, classes])
    # A capsule that is not there has no say.
    absent = capsules.clone()
    absent[:, 0, -1] = -1e9
    other = absent.clone()
    other[:, 0, :-1] = 7
    torch.testing.assert_close(layer(absent), layer(other))


def test_the_gradient_of_self_routing():
    shapes = (2, 4, 3), (2, 4), (2, 4, 3), (4, 3, 3, 2)
    given = [torch.rand(*shape).double().requires_grad_() for shape in shapes]
    assert gradcheck(self_route, given)


@pytest.mark.parametrize("layer", [em_layer(False), self_routing_layer()], ids=["em", "self"])
def test_the_gradient_through_a_layer(layer):
    capsules = torch.randn(1, layer.inputs, layer.input_dim).double().requires_grad_()
    parameters = list(layer.parameters())
    with torch.no_grad():
        names = dict(layer.named_parameters())
        for name in ("beta_u", "beta_a"):
            if name in names:
                names[name].normal_()
    assert gradcheck(lambda x, *_: layer(x), (capsules, *parameters), fast_mode=True)


def test_the_spread_loss_by_hand():
    margins = {"margin_first": 0.2, "margin_last": 0.9}
    config = SpreadLossConfig(name="spread", reconstruction_weight=0.0, **margins)
    activations = torch.tensor([[0.8, 0.7, 0.1]])
    present = torch.tensor([[True, False, False]])
    assert spread_loss(activations, present, config, 0.0).item() == pytest.approx(0.1**2)
    half = 0.55  # of the way from 0.2 to 0.9
    assert spread_loss(activations, present, config, 0.5).item() == pytest.approx(0.45**2)
    assert spread_loss(activations, present, config, 1.0).item() == pytest.approx(0.8**2 + 0.2**2)
    # Two digits: each is to be ahead of what is not there, and not of the other.
    both = torch.tensor([[True, True, False]])
    expected = max(0, half - 0.7) ** 2 + max(0, half - 0.6) ** 2
    assert spread_loss(activations, both, config, 0.5).item() == pytest.approx(expected)


def test_the_likelihood_by_hand():
    activations = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]])
    present = torch.tensor([[True, False, False], [False, True, True]])
    expected = (math.log(2) + (math.log(1 / 0.8) + math.log(10)) / 2) / 2
    loss = negative_log_likelihood(activations, present)
    assert loss.item() == pytest.approx(expected)
    nothing = torch.zeros(1, 3).requires_grad_()
    negative_log_likelihood(nothing, present[:1]).backward()
    assert nothing.grad.isfinite().all()


def test_a_captured_graph_knows_how_far_the_run_is():
    """The margin of the spread loss is one of the step."""
    config = train_config(*TINY, "routing=em")
    dataset = load_dataset(config.dataset, torch.device("cpu"))
    batches = TrainingBatches(dataset.train, 0, config.recipe.batch_size)
    plain, graphed = make_trainer(config), make_trainer(config, GraphedTrainer)
    losses = [plain.advance(batches, step, 1).losses.total.item() for step in range(3)]
    again = CapturedSteps(graphed, batches, 3).replay(0).losses.total.item()
    assert again == pytest.approx(losses[-1], rel=1e-5)
    assert plain.progress.item() == graphed.progress.item() == pytest.approx(2 / 12)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_is_a_network_and_can_be_stored(choice):
    config = train_config(*TINY, f"routing={choice}")
    assert from_dict(TrainConfig, asdict(config)) == config
    model = make_model(config)
    assert isinstance(model.digitcaps, layer_of(config.routing))
    assert model.routing == config.routing
    lengths = model(torch.rand(3, 1, 28, 28)).lengths_BJ
    assert ((lengths >= 0) & (lengths <= 1 + 1e-6)).all()


def test_without_a_choice_it_is_routing_by_agreement():
    """What was stored before there was a choice has no algorithm."""
    assert train_config().routing == train_config("routing=dynamic").routing
    stored = asdict(train_config())
    assert stored["routing"] == {"iterations": 3, "leaky": False, "detach": False}
    assert isinstance(from_dict(TrainConfig, stored).routing, DynamicRoutingConfig)
    assert train_config("routing=uniform").routing == train_config("routing.iterations=1").routing


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["routing=em", "routing.pose_dimensions=15"], "15: it must be a square"),
        (["routing=em", "model.primary_dimensions=8"], "leave out model.primary_dimensions"),
        (["routing=em", "model.digit_dimensions=9"], "leave out model.primary_dimensions"),
        (["routing=self_routing", "routing.iterations=3"], "iterations"),
        (["routing=em", "model=cnn_baseline"], "has no capsules, so there is nothing for routing="),
        (["routing=em", "loss=cross_entropy"], "loss=cross_entropy is not for model=capsnet"),
        (["routing=emm"], "did you mean 'em'"),
        (["loss=log_likelihood"], "whose lengths add up to 1: routing=self_routing"),
        (["routing=em", "loss=log_likelihood"], "whose lengths add up to 1: routing=self_routing"),
        (["routing=em", "model.digit_bias=false"], "leave it out with other routings"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=said):
        make_model(train_config(*words))


@pytest.mark.parametrize("choice", ["em", "self_attention", "self_routing"])
def test_a_network_with_leaky_routing_takes_another_one(choice):
    assert train_config("model=capsnet_cifar10", "dataset=cifar10").routing.leaky
    config = train_config("model=capsnet_cifar10", "dataset=cifar10", f"routing={choice}")
    assert config.routing.algorithm == choice


@pytest.mark.parametrize("choice", CHOICES)
def test_short_trainings_learn_and_attacks_undo_it(choice):
    """On real digits, beginning with what is as good as a guess; more within a larger ε."""
    small = ["model.conv1_channels=16", "model.primary_types=4", "recipe.batch_size=32"]
    config = train_config("dataset=mnist5k", f"routing={choice}", *small, "recipe.steps=60")
    dataset = load_dataset(config.dataset, torch.device("cpu"))
    batches = TrainingBatches(dataset.train, 0, config.recipe.batch_size)
    trainer = make_trainer(config, fast=True)
    right = []
    for step in range(60):
        update = trainer.advance(batches, step, 1)
        found = update.output.lengths_BJ.argmax(1, keepdim=True)
        right.append((found == update.batch.labels_BT).float().mean().item())
    assert sum(right[:3]) / 3 < 0.3
    assert sum(right[-10:]) / 10 > 0.45
    words = ["dataset=mnist5k", "attack=bim", "attack.loss=difference", "attack.steps=3"]
    settings = settings_for(EvalConfig, compose("eval", [*words, "attack.epsilon=[0,0.05,0.2]"]))
    attack = Attack(Network(trainer.model, config.loss), dataset.test, settings.attack)
    outcomes = attack_split(attack, trainer.model, 60, iter, detect=False)
    none, small, large = (int(outcome.wrong_N.sum()) for outcome in outcomes)
    assert none <= small < large
    assert large > none + 15


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_done_with_a_network(choice, in_tmp, capsys):
    """It is tested, drawn, moved and put into a page, whatever routes it; the page says why not."""
    small = ["model.conv1_channels=8", "model.primary_types=2", "model.decoder_widths=[16]"]
    untrained(in_tmp / "model.pt", "dataset=mnist5k", f"routing={choice}", *small)
    words = ["dataset=mnist5k", "checkpoint=model.pt"]
    assert cli.main(["eval", *words, "images=20", "out_dir=tested"]) == 0
    assert (in_tmp / "tested" / "pictures" / "routing_0.png").is_file()
    assert cli.main(["perturb", *words, "out_dir=moved", "perturb.step=0.25"]) == 0
    search = ["explore.images=1", "explore.search=100", "explore.mistakes=1", "out=page.html"]
    assert cli.main(["explore", *words, *search]) == 0
    said = capsys.readouterr().out
    can = "digits can be drawn" in said
    assert can == (choice in ("dynamic", "uniform"))
    # Lengths of any routing are averaged with those of any other.
    untrained(in_tmp / "other.pt", "dataset=mnist5k", *small)
    ensemble = ["ensemble=[other.pt]", "images=20", "out_dir=both"]
    assert cli.main(["eval", *words, *ensemble]) == 0
    assert can or "the page computes CapsNet with routing by agreement" in said
