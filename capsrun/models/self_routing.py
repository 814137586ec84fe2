"""Self-routing (Hahn, Pyeon and Kim, "Self-Routing Capsule Networks", NeurIPS 2019), as a layer.

Shapes: B batch, I input capsules, J output capsules, K numbers of an input capsule's pose,
D output dimension.
"""

import math

import torch
from torch import Tensor, nn

from capsrun.models.layers import RoutedLayer, with_length
from capsrun.models.routing import RoutingIteration

TINY = 1e-12


def self_route(
    poses_BIK: Tensor, activations_BI: Tensor, logits_BIJ: Tensor, weights_IKJD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: poses (B, J, D), activations (B, J), which add up to 1, and couplings (B, I, J).

    c_ij = softmax over j of the logits, a_j = Σ_i c_ij a_i / Σ_i a_i, and the pose of j is
    Σ_i c_ij a_i û_j|i / Σ_i c_ij a_i, with the votes û_j|i = W_ij u_i, which are not made one by
    one: their sum is one of c_ij a_i u_i.
    """
    couplings_BIJ = logits_BIJ.softmax(2)
    shares_BIJ = couplings_BIJ * activations_BI[:, :, None]
    sums_BJ = shares_BIJ.sum(1)
    activations_BJ = sums_BJ / activations_BI.sum(1, keepdim=True).clamp(min=TINY)
    given_JBN = (shares_BIJ.permute(2, 0, 1)[..., None] * poses_BIK).flatten(2)
    summed_JBD = torch.bmm(given_JBN, weights_IKJD.permute(2, 0, 1, 3).flatten(1, 2))
    poses_BJD = summed_JBD.transpose(0, 1) / sums_BJ[:, :, None].clamp(min=TINY)
    return poses_BJD, activations_BJ, couplings_BIJ


class SelfRoutingLayer(RoutedLayer):
    """Capsules to which each capsule below gives itself as a layer of its own says.

    Takes capsules (B, I, K + 1), the logit of an activation after a pose of K numbers, and returns
    (B, J, D): in the direction of a class's pose, as long as its activation, which add up to 1.
    Its parameters are `weight`, W^pose (I, K, J, D), `routing_weight`, W^route (I, K, J), and
    `routing_bias` (I, J).

    inputs: I. pose_dim: K. outputs: J. output_dim: D.
    Paper: silent about a bias and the first weights of the routing; the authors' code has a bias,
    and begins with zeros, which is equal shares. Paper: the last layer has no poses; here they are
    what the decoder draws from.
    Raises ValueError for sizes below 1, and capsules of another shape or type.
    """

    takes_activations = True

    def __init__(self, inputs: int, pose_dim: int, outputs: int, output_dim: int) -> None:
        super().__init__(inputs, pose_dim + 1, outputs, output_dim)
        self.weight = nn.Parameter(torch.empty(inputs, pose_dim, outputs, output_dim))
        self.routing_weight = nn.Parameter(torch.empty(inputs, pose_dim, outputs))
        self.routing_bias = nn.Parameter(torch.empty(inputs, outputs))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        self.weight.uniform_(-bound, bound)
        self.routing_weight.zero_()
        self.routing_bias.zero_()

    def route(self, capsules_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """See `self_route`."""
        poses_BIK, activations_BI = capsules_BIK[:, :, :-1], self.activations(capsules_BIK)
        logits_BIJ = torch.einsum("bik,ikj->bij", poses_BIK, self.routing_weight)
        given = poses_BIK, activations_BI, logits_BIJ + self.routing_bias, self.weight
        poses_BJD, activations_BJ, couplings_BIJ = self_route(*given)
        capsules_BJD = with_length(poses_BJD, activations_BJ)
        if history is not None:
            history.append(RoutingIteration(couplings_BIJ.detach(), capsules_BJD.detach()))
        return capsules_BJD
