"""The margin loss and the reconstruction loss (Eq. 4 and §4.1 of the paper), and cross-entropy.

Shapes: B batch, J classes, T digits in one image, C channels, H and W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.config import CrossEntropyConfig, LossConfig, MarginLossConfig
from capsrun.models import CNNOutput, Output
from capsrun.models.capsnet import CapsNetOutput


class Losses(NamedTuple):
    """The total and its parts, as scalars on the device."""

    total: Tensor
    classification: Tensor
    """Margin loss or cross-entropy."""
    reconstruction: Tensor


def class_presence(labels_BT: Tensor, classes: int) -> Tensor:
    """T_k of Eq. 4: a (B, J) mask that is true for each class in an image's `labels_BT`."""
    return F.one_hot(labels_BT, classes).any(dim=1)


def margin_loss(lengths_BJ: Tensor, present_BJ: Tensor, config: MarginLossConfig) -> Tensor:
    """L_k = T_k max(0, m⁺ − ‖v_k‖)² + λ (1 − T_k) max(0, ‖v_k‖ − m⁻)² (Eq. 4), mean over the batch.

    lengths_BJ: ‖v_k‖. present_BJ: T_k, boolean; more than one class may be present. Over classes
    the loss is summed (the text) or averaged (authors' code), times `config.margin_factor`.
    Raises ValueError for another shape or type of present_BJ.

    >>> import capsrun, torch
    >>> config = capsrun.training_config("loss=paper").loss  # m⁺ = 0.9, m⁻ = 0.1, λ = 0.5, summed
    >>> lengths = torch.tensor([[0.4, 0.0, 0.3]])
    >>> present = torch.tensor([[True, False, False]])
    >>> capsrun.margin_loss(lengths, present, config)  # (0.9 − 0.4)² + 0 + 0.5 · (0.3 − 0.1)²
    tensor(0.2700)
    """
    if present_BJ.dtype != torch.bool or present_BJ.shape != lengths_BJ.shape:
        raise ValueError(
            f"present_BJ is {present_BJ.dtype} of shape {tuple(present_BJ.shape)}: it is to be "
            f"bool, of the shape of lengths_BJ, {tuple(lengths_BJ.shape)}: one_hot(…).bool()"
        )
    missed = F.relu(config.margin_present - lengths_BJ).square()
    invented = F.relu(lengths_BJ - config.margin_absent).square()
    losses_BJ = torch.where(present_BJ, missed, config.absent_weight * invented)
    losses_B = losses_BJ.mean(1) if config.class_reduction == "mean" else losses_BJ.sum(1)
    return config.margin_factor * losses_B.mean()


def reconstruction_loss(reconstructions_BTCHW: Tensor, targets_BTCHW: Tensor) -> Tensor:
    """Sum of squared differences over an image's pixels and digits (§4.1), mean over the batch."""
    return (reconstructions_BTCHW - targets_BTCHW).square().flatten(1).sum(1).mean()


def capsnet_losses(
    output: CapsNetOutput, labels_BT: Tensor, targets_BTCHW: Tensor, config: MarginLossConfig
) -> Losses:
    """Margin loss plus the weighted reconstruction loss, the latter 0 without a decoder.

    targets_BTCHW: what the reconstruction of each label should look like, pixels in [0, 1].
    """
    present_BJ = class_presence(labels_BT, output.lengths_BJ.shape[1])
    margin = margin_loss(output.lengths_BJ, present_BJ, config)
    if output.reconstructions_BTCHW is None:
        return Losses(margin, margin, torch.zeros_like(margin))
    difference = reconstruction_loss(output.reconstructions_BTCHW, targets_BTCHW)
    reconstruction = config.reconstruction_weight * difference
    return Losses(margin + reconstruction, margin, reconstruction)


def cross_entropy(logits_BJ: Tensor, labels_BT: Tensor, config: CrossEntropyConfig) -> Tensor:
    """Cross-entropy with the softmax or the sigmoids of the logits, mean over the batch.

    Softmax: the T classes that are present share the target equally. Sigmoid: each that is present
    has the target `config.present_target`, the others 0, and the mean over classes is taken.
    """
    present_BJ = class_presence(labels_BT, logits_BJ.shape[1]).to(logits_BJ.dtype)
    if config.activation == "softmax":
        return F.cross_entropy(logits_BJ, present_BJ / labels_BT.shape[1])
    return F.binary_cross_entropy_with_logits(logits_BJ, config.present_target * present_BJ)


def model_losses(
    output: Output, labels_BT: Tensor, targets_BTCHW: Tensor, config: LossConfig
) -> Losses:
    """The losses of any network; see `capsnet_losses` and `cross_entropy`."""
    if isinstance(output, CNNOutput):
        assert isinstance(config, CrossEntropyConfig)  # checked in settings.py
        entropy = cross_entropy(output.logits_BJ, labels_BT, config)
        return Losses(entropy, entropy, torch.zeros_like(entropy))
    assert isinstance(config, MarginLossConfig)
    return capsnet_losses(output, labels_BT, targets_BTCHW, config)
