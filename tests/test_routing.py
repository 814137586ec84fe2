"""Squash and routing: by hand, against a slow reference, and against the errors of the field."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from capsrun.models.routing import capsule_votes, coupling_coefficients, route, squash


def random_votes(batch=2, inputs=5, outputs=3, dimensions=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    votes = torch.randn(batch, inputs, outputs, dimensions, generator=generator).double()
    bias = torch.randn(outputs, dimensions, generator=generator).double()
    return votes, bias


def slow_route(votes, bias, iterations, leaky=False):
    """Procedure 1 with loops and plain numbers."""
    batch, inputs, outputs, dimensions = votes.shape
    result = torch.zeros(batch, outputs, dimensions, dtype=torch.float64)
    for n in range(batch):
        logits = [[0.0] * outputs for _ in range(inputs)]
        for _ in range(iterations):
            capsules = []
            shares = []
            for i in range(inputs):
                powers = [math.exp(b) for b in logits[i]]
                total = sum(powers) + (1.0 if leaky else 0.0)
                shares.append([p / total for p in powers])
            for j in range(outputs):
                s = [
                    float(bias[j, d])
                    + sum(shares[i][j] * float(votes[n, i, j, d]) for i in range(inputs))
                    for d in range(dimensions)
                ]
                square = sum(x * x for x in s)
                capsules.append([square / (1 + square) * x / math.sqrt(square) for x in s])
            for i in range(inputs):
                for j in range(outputs):
                    logits[i][j] += sum(
                        float(votes[n, i, j, d]) * capsules[j][d] for d in range(dimensions)
                    )
        result[n] = torch.tensor(capsules)
    return result


def test_squash_in_half_precision_is_as_long_as_it_is():
    """Where the square of a length is more than such a number can be."""
    long = torch.full((1, 8), 100.0)
    assert squash(long.half()).norm() == pytest.approx(1, abs=2e-3)
    assert squash(long.half() / 100).norm() == pytest.approx(8 / 9, abs=2e-3)
    assert squash(torch.tensor(3.0)) == pytest.approx(0.9)
    assert squash(torch.zeros(3, 0)).shape == (3, 0)


def test_squash_by_hand():
    squashed = squash(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(squashed, torch.tensor([3.0, 4.0]) / 5 * 25 / 26)
    assert squashed.norm().item() == pytest.approx(25 / 26)
    assert squash(torch.tensor([0.01, 0.0])).norm().item() == pytest.approx(1e-4, rel=1e-3)
    assert 0.9999 < squash(torch.tensor([1e4, 0.0])).norm().item() <= 1


def test_gradients_of_squash():
    """At zero they are finite, those of the length too."""
    assert gradcheck(squash, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    poses = torch.zeros(3, 4, requires_grad=True)
    torch.linalg.vector_norm(squash(poses), dim=1).sum().backward()
    assert torch.equal(poses.grad, torch.zeros(3, 4))


@pytest.mark.parametrize("iterations", [1, 2, 3])
@pytest.mark.parametrize("leaky", [False, True])
def test_gradients_of_routing(iterations, leaky):
    votes, bias = (t.requires_grad_() for t in random_votes())
    assert gradcheck(lambda v, b: route(v, b, iterations, leaky), (votes, bias))


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("leaky", [False, True])
def test_routing_equals_slow_reference(iterations, leaky):
    votes, bias = random_votes()
    torch.testing.assert_close(
        route(votes, bias, iterations, leaky), slow_route(votes, bias, iterations, leaky)
    )


def test_routing_without_bias_is_routing_with_a_bias_of_zero():
    votes, bias = random_votes()
    torch.testing.assert_close(route(votes, None, 3), route(votes, torch.zeros_like(bias), 3))


def test_votes_by_loops():
    inputs = torch.randn(2, 5, 3).double()
    weights = torch.randn(5, 3, 4, 6).double()
    votes = capsule_votes(inputs, weights)
    for n, i, j in [(0, 0, 0), (1, 4, 3), (0, 2, 1)]:
        torch.testing.assert_close(votes[n, i, j], inputs[n, i] @ weights[i, :, j])


def test_softmax_is_over_the_parents():
    """Each input capsule shares itself out; a softmax over the inputs would sum to 1 over them."""
    shares = coupling_coefficients(torch.randn(2, 7, 3))
    torch.testing.assert_close(shares.sum(2), torch.ones(2, 7))
    assert not torch.allclose(shares.sum(1), torch.ones(2, 3), atol=0.01)
    with_none = coupling_coefficients(torch.zeros(1, 1, 3), leaky=True)
    torch.testing.assert_close(with_none, torch.full((1, 1, 3), 1 / 4))


def test_agreement_moves_the_coupling():
    """Two inputs agree on parent 0 and disagree on parent 1: routing prefers parent 0."""
    votes = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [-1.0, 0.0]]]])
    history = []
    watched = route(votes, None, 3, history=history)
    assert torch.equal(watched, route(votes, None, 3)), "watching changes nothing"
    assert len(history) == 3
    assert torch.equal(history[0].couplings_BIJ, torch.full((1, 2, 2), 0.5))
    assert (history[2].couplings_BIJ[0, :, 0] > 0.55).all()


def test_detach_is_the_gradient_with_couplings_held_fixed():
    """It changes no value."""
    history = []
    route(*random_votes(), 3, history=history)
    fixed = history[-1].couplings_BIJ
    found = []
    for routed in (
        lambda votes, bias: route(votes, bias, 3),
        lambda votes, bias: route(votes, bias, 3, detach=True),
        lambda votes, bias: squash(torch.einsum("bij,bijd->bjd", fixed, votes) + bias),
    ):
        votes, bias = (t.requires_grad_() for t in random_votes())
        capsules = routed(votes, bias)
        capsules.square().sum().backward()
        found.append((capsules.detach(), votes.grad, bias.grad))
    full, cut, held = found
    assert torch.equal(full[0], cut[0])
    torch.testing.assert_close(cut, held)
    for gradient in (1, 2):
        assert not torch.allclose(full[gradient], cut[gradient], rtol=1e-3)


def test_routing_needs_an_iteration():
    with pytest.raises(ValueError, match="at least 1"):
        route(*random_votes(), iterations=0)
