"""Squash, votes and routing by agreement, as pure functions.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RoutingIteration(NamedTuple):
    """What one routing iteration computed, for those who want to look at it."""

    couplings_BIJ: Tensor
    """c_ij: how much of its vote each input capsule gives to each output capsule."""
    capsules_BJD: Tensor
    """v_j after this iteration."""
    logit_changes_BIJ: Tensor | None = None
    """û_j|i · v_j: what this iteration adds to the routing logits b_ij, where there are such."""
    added_BIJ: Tensor | None = None
    """What each vote adds to the length of s_j, where that does not follow from the others."""


def squash(poses: Tensor) -> Tensor:
    """Shrink vectors to a length below 1: v = ‖s‖²/(1+‖s‖²) · s/‖s‖ (Eq. 1).

    Takes s of shape (..., D) and returns v of the same shape.

    Paper: Eq. 1 divides 0 by 0 at s = 0. Written as s · ‖s‖/(1+‖s‖²) it is 0 there, and so is its
    gradient (the true limit), with no epsilon that would change the values elsewhere. Numbers above
    2·10¹⁷ in float32, whose squares would be infinite, count as that: ‖v‖ is 1 there in any case.

    >>> import capsrun, torch
    >>> v = capsrun.squash(torch.tensor([3.0, 4.0]))  # ‖s‖ = 5, so ‖v‖ = 25/26
    >>> v * 26
    tensor([15., 20.])
    >>> capsrun.squash(torch.zeros(2))
    tensor([0., 0.])
    """
    most = torch.finfo(poses.dtype).max
    numbers = max(poses.shape[-1:], default=1)
    largest = min(most**0.45, (most / (2 * max(numbers, 1))) ** 0.5)
    poses = poses.clamp(-largest, largest)
    norm = torch.linalg.vector_norm(poses, dim=-1, keepdim=True)
    return poses * (norm / (1 + norm.square()))


def capsule_votes(inputs_BIK: Tensor, weights_IKJD: Tensor) -> Tensor:
    """Predict each output capsule from each input capsule: û_j|i = W_ij u_i (Eq. 2).

    Takes the input capsules u (B, I, K) and the weights W (I, K, J, D); returns votes (B, I, J, D).

    >>> import capsrun, torch
    >>> u = torch.tensor([[[1.0, 2.0]]])  # one image, one input capsule of dimension 2
    >>> W = torch.tensor([[[[1.0, 0.0]], [[0.0, 10.0]]]])  # one output capsule of dimension 2
    >>> capsrun.capsule_votes(u, W)
    tensor([[[[ 1., 20.]]]])
    """
    outputs, dimensions = weights_IKJD.shape[2:]
    votes_IBN = torch.bmm(inputs_BIK.transpose(0, 1), weights_IKJD.flatten(2))
    votes_IBJD = votes_IBN.unflatten(2, (outputs, dimensions))
    # Kept in memory as (B, J, I, D): both products of the routing loop then run over contiguous
    # (I, D) matrices, which is a quarter faster on a CPU than the order in which they were made.
    return votes_IBJD.permute(1, 2, 0, 3).contiguous().transpose(1, 2)


def coupling_coefficients(logits_BIJ: Tensor, leaky: bool = False) -> Tensor:
    """Share each input capsule among the output capsules: c_i = softmax over j of b_i (Eq. 3).

    Takes and returns (B, I, J). With `leaky`, a zero logit joins the softmax as a "none of these"
    output and is then dropped, so that the shares of an input capsule add up to less than 1.

    >>> import capsrun, torch
    >>> logits = torch.zeros(1, 1, 4)  # one image, one input and four output capsules
    >>> capsrun.coupling_coefficients(logits)
    tensor([[[0.2500, 0.2500, 0.2500, 0.2500]]])
    >>> capsrun.coupling_coefficients(logits, leaky=True)
    tensor([[[0.2000, 0.2000, 0.2000, 0.2000]]])
    """
    if not leaky:
        return logits_BIJ.softmax(dim=2)
    none_BI1 = torch.zeros_like(logits_BIJ[:, :, :1])
    return torch.cat([none_BI1, logits_BIJ], dim=2).softmax(dim=2)[:, :, 1:]


def route(
    votes_BIJD: Tensor,
    bias_JD: Tensor | None,
    iterations: int,
    leaky: bool = False,
    detach: bool = False,
    history: list[RoutingIteration] | None = None,
) -> Tensor:
    """Route votes to output capsules by agreement (Procedure 1); returns v of shape (B, J, D).

    In each of the r `iterations`: c = softmax(b), s_j = Σ_i c_ij û_j|i + bias_j, v_j = squash(s_j),
    b_ij += û_j|i · v_j, with b = 0 at first.

    votes_BIJD: û. bias_JD: added to s inside every iteration, or None (Paper: no bias is mentioned;
    the authors' code has one). leaky: see `coupling_coefficients`. detach: let the gradient flow
    through the last iteration only, as many re-implementations do (the authors' code does not).
    history: a list to which each iteration appends what it computed, without gradients; it changes
    no result.
    Raises ValueError unless iterations ≥ 1.

    Two input capsules that agree about the first output capsule and not about the second. With one
    iteration s₀ = ½·(3, 4) + ½·(3, 4) has length 5 and s₁ = 0; each further one gives more of both
    votes to the first:

    >>> import capsrun, torch
    >>> votes = torch.tensor([[[[3.0, 4.0], [3.0, 4.0]], [[3.0, 4.0], [-3.0, -4.0]]]])
    >>> v = capsrun.route(votes, bias_JD=None, iterations=1)
    >>> v * 26  # squashed from length 5 to 25/26
    tensor([[[15., 20.],
             [ 0.,  0.]]])
    >>> history = []
    >>> v = capsrun.route(votes, bias_JD=None, iterations=3, history=history)
    >>> [round(float(step.couplings_BIJ[0, 0, 0]), 4) for step in history]
    [0.5, 0.9919, 0.9999]
    >>> torch.linalg.vector_norm(v, dim=2)
    tensor([[0.9901, 0.0000]])
    """
    if iterations < 1:
        raise ValueError(f"routing needs at least 1 iteration, not {iterations}")
    agreeing_votes = votes_BIJD.detach() if detach else votes_BIJD
    logits_BIJ = votes_BIJD.new_zeros(votes_BIJD.shape[:3])
    for iteration in range(iterations):
        last = iteration == iterations - 1
        couplings_BIJ = coupling_coefficients(logits_BIJ, leaky)
        votes = votes_BIJD if last else agreeing_votes
        sums_BJD = torch.einsum("bij,bijd->bjd", couplings_BIJ, votes)
        if bias_JD is not None:
            sums_BJD = sums_BJD + (bias_JD if last or not detach else bias_JD.detach())
        capsules_BJD = squash(sums_BJD)
        if last and history is None:
            break
        changes_BIJ = torch.einsum("bijd,bjd->bij", agreeing_votes, capsules_BJD)
        if history is not None:
            seen = (couplings_BIJ.detach(), capsules_BJD.detach(), changes_BIJ.detach())
            history.append(RoutingIteration(*seen))
        logits_BIJ = logits_BIJ + changes_BIJ
    return capsules_BJD
