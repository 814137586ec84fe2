"""EM routing (Hinton, Sabour and Frosst, "Matrix capsules with EM routing", ICLR 2018), as a layer.

Shapes: B batch, I input capsules, J output capsules, T types of input capsules, P places of each
type, N rows and columns of a pose matrix, D = N² its numbers, H = 2D.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capsrun.errors import UserError
from capsrun.model_config import CapsuleModelConfig, EMRoutingConfig
from capsrun.models.inputs import check_sizes
from capsrun.models.layers import RoutedLayer, with_length
from capsrun.models.routing import RoutingIteration

TINY = 1e-8


def coordinates(side: int) -> Tensor:
    """The row and the column (P, 2) of each place of a square grid, from −½ to ½.

    Paper: "the scaled coordinate … of the center of the receptive field"; silent about the scale.
    """
    middles = (torch.arange(side) + 0.5) / side - 0.5
    return torch.cartesian_prod(middles, middles)


def em_route(
    votes_BIJD: Tensor,
    activations_BI: Tensor,
    beta_u_J: Tensor,
    beta_a_J: Tensor,
    iterations: int,
    inverse_temperature: float,
    temperature_decay: float,
    minimum_variance: float,
    history: list[RoutingIteration] | None = None,
) -> tuple[Tensor, Tensor]:
    """EM routing (Procedure 1 of its paper): poses μ (B, J, D) and logits of activations (B, J).

    M-step, with R_ij = 1/J at first: r_ij = R_ij a_i; μ_j and σ_j², a mean and a variance for each
    dimension h of the votes V_ij, weighted with r_ij; cost_j = Σ_h (β_u + log σ_jh) Σ_i r_ij;
    a_j = logistic(λ (β_a − cost_j)). E-step: R_ij is proportional to a_j p_j(V_ij), the normal
    density. In iteration t, from 1, λ = inverse_temperature · (1 − temperature_decay^t).

    Paper: silent about λ's schedule, which the authors gave later (final value 0.01, with 32 types
    and three layers), and about `minimum_variance`, of their code, which is added to each σ². Their
    code moves μ by nine tenths only, and takes log σ² where the paper has log σ; here both are as
    in the paper. history: see `route`.
    """
    # What is added to all votes for j is added to its pose and changes nothing else: around their
    # mean, numbers lose least where squares are subtracted. The sums over i, and those over h, are
    # of V and V² side by side, in the order in memory over which they run.
    votes_BJID = votes_BIJD.transpose(1, 2)
    centre_BJ1D = votes_BJID.mean(2, keepdim=True)
    votes_BJID = votes_BJID - centre_BJ1D
    powers_BJIH = torch.cat([votes_BJID, votes_BJID.square()], dim=3)
    assignments_BJI = torch.full_like(votes_BJID[..., 0], 1 / votes_BJID.shape[1])
    for iteration in range(1, iterations + 1):
        inverse = inverse_temperature * (1 - temperature_decay**iteration)
        shares_BJI = assignments_BJI * activations_BI[:, None]
        mass_BJ1 = shares_BJI.sum(2, keepdim=True)
        moments_BJH = (shares_BJI[:, :, None] @ powers_BJIH)[:, :, 0]
        means_BJD, squares_BJD = (moments_BJH / mass_BJ1.clamp(min=TINY)).chunk(2, dim=2)
        variances_BJD = (squares_BJD - means_BJD.square()).clamp(min=0) + minimum_variance
        log_sigmas_BJD = variances_BJD.log() / 2
        costs_BJD = (beta_u_J[:, None] + log_sigmas_BJD) * mass_BJ1
        logits_BJ = inverse * (beta_a_J - costs_BJD.sum(2))
        poses_BJD = means_BJD + centre_BJ1D[:, :, 0]
        if history is not None:
            capsules_BJD = with_length(poses_BJD, logits_BJ.sigmoid())
            assigned_BIJ = assignments_BJI.transpose(1, 2).detach()
            history.append(RoutingIteration(assigned_BIJ, capsules_BJD.detach()))
        if iteration < iterations:
            # log (a p), without log 2π, which is the same for all j.
            factors_BJH = torch.cat([means_BJD, torch.full_like(means_BJD, -0.5)], dim=2)
            factors_BJH = factors_BJH / variances_BJD.repeat(1, 1, 2)
            matches_BJI = (powers_BJIH @ factors_BJH[..., None])[..., 0]
            constants_BJD = log_sigmas_BJD + means_BJD.square() / (2 * variances_BJD)
            scores_BJ = F.logsigmoid(logits_BJ) - constants_BJD.sum(2)
            assignments_BJI = (scores_BJ[:, :, None] + matches_BJI).softmax(1)
    return poses_BJD, logits_BJ


class EMCapsuleLayer(RoutedLayer):
    """Capsules to which those of the layer below are routed by EM, their poses N×N matrices.

    Takes capsules (B, I, D + 1), the logit of an activation after a pose of D = N² numbers, and
    returns (B, J, D): in the direction of a capsule's pose, as long as its activation. Its
    parameters are `weight`, W (I, N, J, N), of T types (T, N, J, N), `beta_u` and `beta_a` (J).

    inputs: I, ordered (type, row, column). pose_dim: D. outputs: J. routing: its settings, of
    `training_config("routing=em").routing`. types: T, of which one each has a W, if that is
    `shared`.
    V_ij = M_i W_ij; a W that all places of a type share has the place added to its vote, the row
    and the column to the first two numbers of the last column of V ("Coordinate Addition"). Paper:
    silent about the first β, which are 0, and W, here the identity with noise.
    Raises ValueError for sizes below 1, poses that are no square matrices, and capsules of another
    shape or type.
    """

    takes_activations = True

    def __init__(
        self, inputs: int, pose_dim: int, outputs: int, routing: EMRoutingConfig, types: int
    ) -> None:
        check_sizes(types=types)
        super().__init__(inputs, pose_dim + 1, outputs, pose_dim)
        self.routing: EMRoutingConfig = routing
        self.side = math.isqrt(pose_dim)
        if self.side**2 != pose_dim:
            raise ValueError(f"pose_dim is {pose_dim}: it is to be a square, as of a 4×4 matrix")
        self.types = types if routing.shared else inputs
        places = inputs // self.types
        if places * self.types != inputs or math.isqrt(places) ** 2 != places:
            raise ValueError(f"{inputs} inputs are not {self.types} types on a square grid")
        self.weight = nn.Parameter(torch.empty(self.types, self.side, outputs, self.side))
        self.beta_u = nn.Parameter(torch.empty(outputs))
        self.beta_a = nn.Parameter(torch.empty(outputs))
        # What is added to the votes of each place: a buffer, so that it moves with the weights.
        shift_PN1N = torch.zeros(places, self.side, 1, self.side)
        shift_PN1N[:, :2, 0, -1] = coordinates(math.isqrt(places))[:, : self.side]
        self.shift_PN1N: Tensor
        self.register_buffer("shift_PN1N", shift_PN1N, persistent=False)
        self.reset_parameters()

    @classmethod
    def from_config(
        cls, routing: EMRoutingConfig, model: CapsuleModelConfig, inputs: int, classes: int
    ) -> "EMCapsuleLayer":
        """See `RoutedLayer`. Raises UserError for poses that are no square matrices."""
        numbers = routing.pose_dimensions
        if math.isqrt(numbers) ** 2 != numbers:
            raise UserError(
                f"routing.pose_dimensions is {numbers}: it must be a square, as of a 4×4 matrix"
            )
        if {model.primary_dimensions, model.digit_dimensions} != {numbers}:
            raise UserError(
                "with routing=em the numbers of all poses are routing.pose_dimensions: leave out "
                "model.primary_dimensions and model.digit_dimensions"
            )
        return cls(inputs, numbers, classes, routing, model.primary_types)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator."""
        self.weight.normal_(std=0.5)
        self.weight.add_(torch.eye(self.side, device=self.weight.device)[None, :, None])
        self.beta_u.zero_()
        self.beta_a.zero_()

    def extra_repr(self) -> str:
        """What PyTorch shows of it."""
        settings = dataclasses.asdict(self.routing)
        del settings["algorithm"]
        sizes = f"{self.inputs}, {self.output_dim}, {self.outputs}, types={self.types}"
        return ", ".join([sizes, *(f"{key}={value}" for key, value in settings.items())])

    def votes(self, poses_BID: Tensor) -> Tensor:
        """Votes V_ij = M_i W_ij (B, I, J, D) of poses (B, I, D)."""
        batch, side, places = poses_BID.shape[0], self.side, self.inputs // self.types
        rows_TMN = poses_BID.unflatten(1, (self.types, places)).transpose(0, 1)
        rows_TMN = rows_TMN.reshape(self.types, batch * places * side, side)
        votes = torch.bmm(rows_TMN, self.weight.flatten(2))
        votes = votes.view(self.types, batch, places, side, self.outputs, side)
        if self.routing.shared:
            votes = votes + self.shift_PN1N
        # In memory (B, J, I, D), over whose contiguous (I, D) the sums of routing run.
        votes_BJID = votes.permute(1, 4, 0, 2, 3, 5).reshape(batch, self.outputs, self.inputs, -1)
        return votes_BJID.transpose(1, 2)

    def route(self, capsules_BIK: Tensor, history: list[RoutingIteration] | None) -> Tensor:
        """See `em_route`."""
        said = self.routing
        how = said.inverse_temperature, said.temperature_decay, said.minimum_variance
        votes_BIJD = self.votes(capsules_BIK[:, :, :-1])
        given = votes_BIJD, self.activations(capsules_BIK), self.beta_u, self.beta_a
        poses_BJD, logits_BJ = em_route(*given, said.iterations, *how, history)
        return with_length(poses_BJD, logits_BJ.sigmoid())
