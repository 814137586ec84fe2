"""Self-attention routing (Mazzia, Salvetti and Chiaberge, "Efficient-CapsNet", 2021), as a layer.

Shapes: B batch, I input capsules, J output capsules, K input dimension, D output dimension.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.models.initialisation import he_normal
from capsrun.models.layers import RoutedLayer
from capsrun.models.routing import RoutingIteration, capsule_votes

LARGEST = 1e15
"""Larger numbers of a vector count as that, as their squares might be infinite."""


def exponential_squash(poses: Tensor) -> Tensor:
    """Shrink vectors to a length below 1: v = (1 − e^−‖s‖) · s/‖s‖.

    Takes s of shape (..., D) and returns v of the same shape.

    Paper: 0 is divided by 0 at s = 0; here v is 0 there, and its gradient that of s, the true
    limits, with no epsilon.

    >>> import torch
    >>> exponential_squash(torch.tensor([3.0, 4.0]) * math.log(2) / 5)  # ‖s‖ = ln 2, so ‖v‖ = ½
    tensor([0.3000, 0.4000])
    """
    poses = poses.clamp(-LARGEST, LARGEST)
    norm = torch.linalg.vector_norm(poses, dim=-1, keepdim=True)
    is_short = norm <= torch.finfo(norm.dtype).eps
    safe = torch.where(is_short, torch.ones_like(norm), norm)
    return poses * torch.where(is_short, torch.ones_like(norm), -torch.expm1(-safe) / safe)


def attend(
    votes_BIJD: Tensor, bias_IJ: Tensor, history: list[RoutingIteration] | None = None
) -> Tensor:
    """Weigh votes by how much they agree with all votes for the same class; returns v (B, J, D).

    Of the self-attention A = Û_j Û_jᵀ / √D of each class only the sums of the rows are wanted,
    Σ_k û_j|i · û_j|k / √D, which are û_j|i · (Σ_k û_j|k) / √D, so that A is never made. c_ij is
    their softmax over the classes, s_j = Σ_i (c_ij + b_ij) û_j|i, and v_j the `exponential_squash`
    of it, all as in the authors' code.

    votes_BIJD: û. bias_IJ: b, which is learned, and added after the softmax. history: see
    `RoutedLayer.forward`; it is given c.
    """
    sums_BJD = votes_BIJD.sum(1)
    logits_BIJ = torch.einsum("bijd,bjd->bij", votes_BIJD, sums_BJD) / math.sqrt(sums_BJD.shape[2])
    shares_BIJ = logits_BIJ.softmax(2)
    weights_BIJ = shares_BIJ + bias_IJ
    summed_BJD = torch.einsum("bij,bijd->bjd", weights_BIJ, votes_BIJD)
    capsules_BJD = exponential_squash(summed_BJD)
    if history is not None:
        along_BIJ = torch.einsum("bijd,bjd->bij", votes_BIJD, F.normalize(summed_BJD, dim=2))
        added_BIJ = (weights_BIJ * along_BIJ).detach()
        done = shares_BIJ.detach(), capsules_BJD.detach()
        history.append(RoutingIteration(*done, added_BIJ=added_BIJ))
    return capsules_BJD


class SelfAttentionLayer(RoutedLayer):
    """Capsules to which those of the layer below are routed in one pass, by self-attention.

    Takes capsules u (B, I, K) and returns capsules v (B, J, D), of lengths in [0, 1). Its
    parameters are `weight`, W (I, K, J, D), and `bias`, b (I, J), a prior.

    inputs: I. input_dim: K. outputs: J. output_dim: D.
    Paper: silent about the first weights. The authors' are `he_normal` of J · I · K inputs (Keras
    takes the first axes of their W, (J, I, K, D), for those of a kernel), and 0 in b.
    Raises ValueError for sizes below 1, and capsules of another shape or type.
    """

    def __init__(self, inputs: int, input_dim: int, outputs: int, output_dim: int) -> None:
        super().__init__(inputs, input_dim, outputs, output_dim)
        self.weight = nn.Parameter(torch.empty(inputs, input_dim, outputs, output_dim))
        self.bias = nn.Parameter(torch.empty(inputs, outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator."""
        he_normal(self.weight, self.inputs * self.input_dim * self.outputs)
        self.bias.zero_()

    def extra_repr(self) -> str:
        """What PyTorch shows of it."""
        return f"{self.inputs}, {self.input_dim}, {self.outputs}, {self.output_dim}"

    def route(self, capsules_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """See `attend`."""
        return attend(capsule_votes(capsules_BIK, self.weight), self.bias, history)
