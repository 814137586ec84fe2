"""Routing made visible: which places of an image vote for which class, iteration by iteration.

Shapes: R routing iterations, I input capsules, J classes, G rows and columns of the PrimaryCaps
grid, H and W pixels.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from capsrun.data.batches import in_class_order
from capsrun.data.splits import Split
from capsrun.model_config import CapsNetConfig
from capsrun.models.capsnet import CapsNet
from capsrun.models.routing import RoutingIteration
from capsrun.report.figures import FONT_SIZE, TWO_COLOURS, new_figure
from capsrun.training.metrics import predicted_classes

CELL_INCHES, LEFT_INCHES = 1.1, 1.35
TINY = 1e-12
# A coupling that differs by less from its equal share is drawn as if it were equal.
LEAST_DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Routed:
    """What routing did with one image. A map has a value for each place of the PrimaryCaps grid."""

    ink_HW: Tensor
    labels: list[int]
    predicted: list[int]
    lengths_J: Tensor
    couplings_RJGG: Tensor
    """c_ij, mean over the capsules of a place, each weighted with its length ‖u_i‖."""
    entropy_RGG: Tensor
    """Of the couplings of an input capsule, in bits; mean as above."""
    entropy_R: Tensor
    """The same over all input capsules."""
    added_JGG: Tensor
    """What the votes of a place add to the length of s_j in the last iteration; where there is no
    such sum, how much of the activation below is assigned to j."""
    equal_share: float
    """The couplings before any agreement is known: 1/J, or 1/(J + 1) with leaky routing."""
    extent_px: tuple[float, float]
    """Where the grid begins and ends in the image, along both axes."""
    added_text: str
    """What `added_JGG` is, in words."""
    has_bias: bool
    """Whether something is added to s_j beside the votes."""

    @property
    def most_bits(self) -> float:
        """The entropy of equal shares."""
        return -math.log2(self.equal_share)

    def entropy_text(self) -> str:
        """The entropy after each iteration, in words."""
        bits = " ".join(f"{value:.3f}" for value in self.entropy_R.tolist())
        return f"entropy of the couplings {bits} of at most {self.most_bits:.3f} bits"

    def facts(self, index: int) -> dict[str, Any]:
        """The numbers, for `result.json`."""
        return {
            "image": index,
            "labels": self.labels,
            "predicted": self.predicted,
            "entropy_bits": [round(value, 4) for value in self.entropy_R.tolist()],
            "most_bits": round(self.most_bits, 4),
        }


@torch.inference_mode()
def routed(model: CapsNet, split: Split, index: int) -> Routed:
    """Route one image of a split and keep what happened."""
    batch = in_class_order(split.batch(torch.tensor([index], device=split.device)))
    history: list[RoutingIteration] = []
    poses_BIK = model.primary_poses(batch.images_BCHW)
    capsules_BJD = model.digitcaps(poses_BIK, history)
    lengths_BJ = capsules_BJD.norm(dim=2)
    # Where no capsule says anything all count the same, and nothing is divided by 0.
    weights_I = model.digitcaps.activations(poses_BIK)[0] + TINY
    couplings_RIJ = torch.stack([iteration.couplings_BIJ[0] for iteration in history])
    entropy_RI = entropy_bits(couplings_RIJ)
    # Along v_j the votes add to the length of s_j; û_j|i · v_j is what the logits change by.
    added_IJ, text = couplings_RIJ[-1] * weights_I[:, None], "assigned"
    changes_BIJ, added_BIJ = history[-1].logit_changes_BIJ, history[-1].added_BIJ
    if changes_BIJ is not None:
        added_BIJ = history[-1].couplings_BIJ * changes_BIJ / (lengths_BJ[:, None] + TINY)
    if added_BIJ is not None:
        added_IJ, text = added_BIJ[0], "adds to ‖s‖"
    types = model.config.primary_types
    return Routed(
        batch.targets_BTCHW[0].sum(0).clamp(max=1).mean(0).cpu(),
        batch.labels_BT[0].tolist(),
        predicted_classes(lengths_BJ, split.digits)[0].tolist(),
        lengths_BJ[0].cpu(),
        place_means(couplings_RIJ.transpose(1, 2), weights_I, types).cpu(),
        place_means(entropy_RI, weights_I, types).cpu(),
        ((entropy_RI * weights_I).sum(1) / weights_I.sum()).cpu(),
        on_grid(added_IJ.T, types).sum(1).cpu(),
        1 / (model.classes + getattr(model.routing, "leaky", False)),
        grid_extent(model),
        text,
        changes_BIJ is not None and getattr(model.digitcaps, "bias", None) is not None,
    )


def entropy_bits(couplings_IJ: Tensor) -> Tensor:
    """H_i = −Σ_j c_ij log₂ c_ij of shape (…, I); what is missing to 1 (leaky) counts as a share."""
    missing_I1 = (1 - couplings_IJ.sum(-1, keepdim=True)).clamp(min=0)
    shares = torch.cat([couplings_IJ, missing_I1], dim=-1).double()
    return -torch.special.xlogy(shares, shares).sum(-1).div(math.log(2)).float()


def on_grid(values_I: Tensor, types: int) -> Tensor:
    """Values of input capsules (…, I) by type and place: (…, types, G, G)."""
    side = math.isqrt(values_I.shape[-1] // types)
    return values_I.unflatten(-1, (types, side, side))


def place_means(values_I: Tensor, weights_I: Tensor, types: int) -> Tensor:
    """The mean over the capsules of each place, weighted: (…, I) to (…, G, G)."""
    weights = on_grid(weights_I, types)
    return (on_grid(values_I, types) * weights).sum(-3) / weights.sum(0)


def grid_extent(model: CapsNet) -> tuple[float, float]:
    """Where the cells of the grid lie in the image, in pixels from its edge.

    Each capsule sees 2 · kernel − 1 pixels along each axis; its cell, two pixels wide as the stride
    is, lies around their middle.
    """
    if not isinstance(model.config, CapsNetConfig):  # each sees all of the image
        return 0.0, float(model.image_px)
    side = math.isqrt(model.primary_capsules // model.config.primary_types)
    first = model.config.kernel_px - 0.5 - model.conv1_pads[0] - model.primary_pads[0]
    return first - 1, first - 1 + 2 * side


def routing_figure(routing: Routed, class_names: tuple[str, ...], title: str) -> Figure:
    """Heat maps over the image: a row for each iteration, a column for each class, the entropy.

    The last row is what each place adds to the length of each class capsule's s_j. With two digits
    it begins with the image, its ink in the colour of the digit that claims it.
    """
    rounds, classes = routing.couplings_RJGG.shape[:2]
    width, height = LEFT_INCHES + (classes + 3) * CELL_INCHES, 1.2 + (rounds + 1) * CELL_INCHES
    figure = new_figure(width, height)
    figure.text(0.1 / width, 1 - 0.25 / height, title, fontsize=FONT_SIZE + 1)
    note = (
        "A cell is the middle of what its input capsules see (grey: none is centred there), the "
        "line the edge of the ink. Mind the scales."
        + (" To ‖s‖ the bias adds its share too." if routing.has_bias else "")
    )
    figure.text(0.1 / width, 0.08 / height, note, fontsize=FONT_SIZE)
    grid = {"left": LEFT_INCHES / width, "right": 1 - CELL_INCHES / width, "wspace": 0.06}
    grid |= {"top": 1 - 0.8 / height, "bottom": 0.4 / height, "hspace": 0.06}
    cells = figure.subplots(rounds + 1, classes + 2, gridspec_kw=grid)
    couplings, entropies, added = scales(routing)
    for number, row in enumerate(cells[:-1]):
        show_image(row[0], routing, row_text(number, routing))
        for label, axes in enumerate(row[1:-1]):
            coupled = show_map(axes, routing, routing.couplings_RJGG[number, label], couplings)
        bits = show_map(row[-1], routing, routing.entropy_RGG[number], entropies, "viridis")
    for label in range(classes):
        cells[0, label + 1].set_title(column_text(label, routing, class_names), fontsize=FONT_SIZE)
        values_GG = routing.added_JGG[label]
        adds = show_map(cells[-1, label + 1], routing, values_GG, added, "RdBu_r")
    cells[0, -1].set_title("entropy\n(bits)", fontsize=FONT_SIZE)
    cells[-1, -1].set_axis_off()
    show_image(cells[-1, 0], routing, f"{routing.added_text} in\nthe last iteration")
    if len(routing.labels) == 2:
        show_claims(cells[-1, 0], routing, class_names)
    for shown, cell, name in (
        (coupled, cells[0, -1], "coupling"),
        (bits, cells[1, -1], "bits"),
        (adds, cells[-1, -2], "added"),
    ):
        place = cell.inset_axes((1.1, 0, 0.1, 1))
        bar = figure.colorbar(shown, cax=place)
        bar.ax.tick_params(labelsize=FONT_SIZE - 2)
        bar.ax.set_ylabel(name, fontsize=FONT_SIZE - 1)
    return figure


def scales(routing: Routed) -> tuple[Normalize, Normalize, Normalize]:
    """Which values the colours mean: of the couplings, their entropy, and what is added."""
    share = routing.equal_share
    difference = max((routing.couplings_RJGG - share).abs().max().item(), LEAST_DIFFERENCE)
    lowest = min(routing.entropy_RGG.min().item(), routing.most_bits - 1e-3)
    return (
        TwoSlopeNorm(share, max(share - difference, 0), share + difference),
        Normalize(lowest, routing.most_bits),
        CenteredNorm(0, max(routing.added_JGG.abs().max().item(), 1e-9)),
    )


def row_text(number: int, routing: Routed) -> str:
    """What stands at the left of an iteration."""
    bits = routing.entropy_R[number].item()
    return f"iteration {number + 1}\nentropy {bits:.3f} of\n{routing.most_bits:.3f} bits"


def column_text(label: int, routing: Routed, class_names: tuple[str, ...]) -> str:
    """What stands above a class: its name, marked where it is in the image, and its length."""
    found = {"label": routing.labels, "predicted": routing.predicted}
    marks = ", ".join(word for word, own in found.items() if label in own)
    return f"{class_names[label]}\n{marks}\n‖v‖ {routing.lengths_J[label].item():.2f}"


def show_image(axes: Axes, routing: Routed, text: str) -> None:
    """The image, with a text on its left."""
    side = len(routing.ink_HW)
    axes.imshow(routing.ink_HW.numpy(), cmap="gray", vmin=0, vmax=1, extent=(0, side, side, 0))
    axes.set(xticks=[], yticks=[])
    axes.set_ylabel(text, fontsize=FONT_SIZE, rotation=0, ha="right", va="center")


def show_map(
    axes: Axes, routing: Routed, values_GG: Tensor, norm: Normalize, colours: str = "PuOr_r"
) -> Any:
    """A map in its place, under the outline of the image's ink."""
    low, high = routing.extent_px
    shown = axes.imshow(values_GG.numpy(), cmap=colours, norm=norm, extent=(low, high, high, low))
    side = len(routing.ink_HW)
    middles = np.arange(side) + 0.5
    if (routing.ink_HW > 0.5).any():
        axes.contour(
            middles, middles, routing.ink_HW.numpy(), levels=[0.5], colors="black", linewidths=0.7
        )
    axes.set_facecolor("#e8e8e8")  # where no capsule is centred
    axes.set(xticks=[], yticks=[], xlim=(0, side), ylim=(side, 0))
    return shown


def show_claims(axes: Axes, routing: Routed, class_names: tuple[str, ...]) -> None:
    """Over the image, its ink in the colours of the digits that claim it."""
    side = len(routing.ink_HW)
    axes.imshow(claims_in_colour(routing), extent=(0, side, side, 0))
    names = " ".join(
        f"{class_names[label]} {colour}"
        for label, colour in zip(routing.predicted, ("orange", "blue"))
    )
    axes.set_xlabel(f"predicted: {names}", fontsize=FONT_SIZE - 2, labelpad=1)


def claims(routing: Routed) -> Tensor:
    """How far each of the two predicted digits claims each pixel: (2, H, W), together 1.

    A digit claims a place as far as the votes of that place add to the length of its s_j; between
    the places it is interpolated.
    """
    maps_2GG = routing.added_JGG[routing.predicted].clamp(min=0)
    low, high = routing.extent_px
    side = len(routing.ink_HW)
    # The middle of each pixel, from −1 at the beginning of the grid to 1 at its end.
    middles = ((torch.arange(side) + 0.5 - low) / (high - low)) * 2 - 1
    grid_1HW2 = torch.stack(torch.meshgrid(middles, middles, indexing="xy"), dim=-1)[None]
    spread_2HW = F.grid_sample(
        maps_2GG[None], grid_1HW2.float(), padding_mode="border", align_corners=False
    )[0]
    # Where neither does, both do equally.
    return (spread_2HW + 1e-9) / (spread_2HW + 1e-9).sum(0)


def claims_in_colour(routing: Routed) -> np.ndarray:
    """The ink (H, W, 3) in the colours of the digits that claim it."""
    colours = torch.tensor(TWO_COLOURS)
    mixed_HW3 = torch.einsum("thw,tc->hwc", claims(routing), colours)
    return (routing.ink_HW[..., None] * mixed_HW3).clamp(0, 1).numpy()
