"""Telling images that a network was not made for by their reconstructions: DARCCC.

Frosst, Sabour and Hinton 2018, "DARCCC: Detecting Adversaries by Reconstruction from Class
Conditional Capsules": the decoder draws an image from the capsule of the class that the network
takes it for. Where that is further from the image than for 95 % of real ones, it is flagged.

Shapes: N images, B batch, T digits in one image, C channels, H and W pixels.
"""

import torch
from torch import Tensor

from capsrun.data.splits import Split
from capsrun.data.warped import as_seen, pixels_of
from capsrun.data_config import DatasetConfig
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.models.fast.frequency_conv import weights_stay
from capsrun.training.metrics import BATCH_SIZE, Progress, predicted_classes

PERCENTILE = 95
POINTS = 100  # of a ROC curve, between its ends


def distances(
    model: Model, pixels_BCHW: Tensor, config: DatasetConfig, draw: bool = True
) -> tuple[Tensor, Tensor]:
    """The classes (B, T) that images are taken for, and how far these are drawn from them (B,).

    The squared difference, summed over the pixels, of an image and what the decoder draws from the
    predicted classes' capsules; of two digits the sum, clipped at 1 as the image is.
    draw: without it, there are no distances (0,). pixels_BCHW: in [0, 1].
    """
    output = model(as_seen(pixels_BCHW, config))
    predicted_BT = predicted_classes(output.scores_BJ, config.digits)
    if not draw:
        return predicted_BT, pixels_BCHW.new_empty(0)
    assert isinstance(model, CapsNet)
    drawn_BCHW = model.decode(output.capsules_BJD, predicted_BT).sum(1).clamp(max=1)
    return predicted_BT, (drawn_BCHW - pixels_BCHW).square().flatten(1).sum(1)


@torch.inference_mode()
@weights_stay()
def split_distances(
    model: Model, split: Split, config: DatasetConfig, most: int | None, progress: Progress
) -> Tensor:
    """The distances (N,) of the images of a split, in float32; see `distances`.

    config: of the images that the model is for. most: of so many images, from the first.
    """
    model.eval()
    count = len(split) if most is None else min(most, len(split))
    found = []
    for start in progress(range(0, count, BATCH_SIZE)):
        batch = split.batch(split.indices(start, min(start + BATCH_SIZE, count)))
        found.append(distances(model, pixels_of(batch, split.config), config)[1].cpu())
    return torch.cat(found)


def threshold_of(held_out_N: Tensor) -> float:
    """The distance that 95 % of the held-out images do not exceed."""
    return float(held_out_N.double().quantile(PERCENTILE / 100))


def flagged_percent(distances_N: Tensor, threshold: float) -> float:
    """How many images are further from their reconstructions than the threshold."""
    return 100 * float((distances_N > threshold).double().mean())


def roc_area(real_N: Tensor, other_N: Tensor) -> float:
    """The area under the ROC curve: how often another image is further away than a real one.

    Of equals half. 0.5: they are not told apart; 1: always.
    """
    sorted_N = real_N.sort().values
    nearer = torch.searchsorted(sorted_N, other_N, right=False).double()
    not_further = torch.searchsorted(sorted_N, other_N, right=True).double()
    return float((nearer + not_further).mean() / (2 * len(real_N)))


def roc_curve(real_N: Tensor, other_N: Tensor) -> list[list[float]]:
    """Points of the curve, [real images flagged %, others flagged %], from [0, 0] to [100, 100].

    At thresholds that are percentiles of the real images.
    """
    shares = torch.arange(POINTS, dtype=torch.float64) / POINTS
    thresholds = real_N.double().quantile(1 - shares).tolist()
    points = [[flagged_percent(images_N, t) for images_N in (real_N, other_N)] for t in thresholds]
    return [[0.0, 0.0], *points, [100.0, 100.0]]
