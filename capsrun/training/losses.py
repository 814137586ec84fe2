"""The margin loss and the reconstruction loss (Eq. 4 and §4.1 of the paper), and other losses.

Shapes: B batch, J classes, T digits in one image, C channels, H and W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capsrun.experiments import defaults
from capsrun.model_config import (
    CapsuleLossConfig,
    CrossEntropyConfig,
    LossConfig,
    MarginLossConfig,
    SpreadLossConfig,
)
from capsrun.models import CNNOutput, Output
from capsrun.models.capsnet import CapsNetOutput
from capsrun.models.inputs import (
    check_labels,
    check_lengths,
    check_place,
    check_same_shape,
    one_or_several,
)


class Losses(NamedTuple):
    """The total and its parts, as scalars on the device."""

    total: Tensor
    classification: Tensor
    """Margin loss, spread loss, or a log-likelihood."""
    reconstruction: Tensor


def class_presence(labels_BT: Tensor, classes: int) -> Tensor:
    """T_k of Eq. 4: a (B, J) mask that is true for each class in an image's `labels_BT`."""
    return F.one_hot(labels_BT, classes).any(dim=1)


def margin_loss(
    lengths_BJ: Tensor, present: Tensor, config: MarginLossConfig | None = None
) -> Tensor:
    """L_k = T_k max(0, m⁺ − ‖v_k‖)² + λ (1 − T_k) max(0, ‖v_k‖ − m⁻)² (Eq. 4), mean over the batch.

    lengths_BJ: ‖v_k‖. present: which classes are in each image, as T_k itself, a boolean mask
    (B, J), or as class numbers, int64, (B,) or (B, T) for T digits in each image.
    config: m⁺, m⁻ and λ. Over classes the loss is summed (the text) or averaged (authors' code),
    times `config.margin_factor`. None: as the text has it, m⁺ = 0.9, m⁻ = 0.1, λ = 0.5, summed,
    which is `loss=paper`; `capsrun train` takes `loss=authors` unless it is told otherwise.
    Raises ValueError for another shape or type of `present` or the lengths.

    >>> import capsrun, torch
    >>> lengths = torch.tensor([[0.4, 0.0, 0.3]])
    >>> present = torch.tensor([[True, False, False]])
    >>> capsrun.margin_loss(lengths, present)  # (0.9 − 0.4)² + 0 + 0.5 · (0.3 − 0.1)²
    tensor(0.2700)
    >>> capsrun.margin_loss(lengths, torch.tensor([0]))
    tensor(0.2700)
    >>> config = capsrun.training_config("loss=authors").loss  # half of it, averaged over classes
    >>> capsrun.margin_loss(lengths, present, config)
    tensor(0.0450)
    """
    config = constants(config)
    check_lengths(lengths_BJ)
    present_BJ = _presence(present, lengths_BJ)
    missed = F.relu(config.margin_present - lengths_BJ).square()
    invented = F.relu(lengths_BJ - config.margin_absent).square()
    losses_BJ = torch.where(present_BJ, missed, config.absent_weight * invented)
    losses_B = losses_BJ.mean(1) if config.class_reduction == "mean" else losses_BJ.sum(1)
    return config.margin_factor * losses_B.mean()


def constants(config: MarginLossConfig | None) -> MarginLossConfig:
    """Those that are given, or of the paper's text: `configs/loss/paper.yaml`.

    Raises ValueError for others.
    """
    found = defaults("loss=paper").loss if config is None else config
    if not isinstance(found, MarginLossConfig):
        raise ValueError(
            f"config is {type(found).__name__}: it is to be the `loss` of a configuration with "
            "capsules, training_config(…).loss"
        )
    return found


def spread_loss(
    activations_BJ: Tensor, present_BJ: Tensor, config: SpreadLossConfig, progress: float | Tensor
) -> Tensor:
    """Σ_{i≠t} max(0, m − (a_t − a_i))², mean over the batch (Eq. 3 of Hinton et al. 2018).

    activations_BJ: a. present_BJ: which classes are in each image; of several the sum is taken for
    each. config, progress: the margin m grows in a straight line with the share of the run that is
    made, from 0 to 1. Paper: "we begin with 0.2 and linearly increase it … to 0.9"; the authors'
    code has a sigmoid of the step, 0.2 + 0.79 · σ(step / 50,000 − 4), for runs of 2,000,000 steps,
    and the mean over classes.

    >>> import torch
    >>> from capsrun.model_config import SpreadLossConfig
    >>> margins = {"margin_first": 0.2, "margin_last": 0.9}
    >>> config = SpreadLossConfig(name="spread", reconstruction_weight=0, **margins)
    >>> activations, present = torch.tensor([[0.8, 0.1, 0.5]]), torch.tensor([[True, False, False]])
    >>> spread_loss(activations, present, config, progress=1.0)  # (0.9 − 0.7)² + (0.9 − 0.3)²
    tensor(0.4000)
    """
    margin = config.margin_first + (config.margin_last - config.margin_first) * progress
    ahead_BTJ = activations_BJ[:, :, None] - activations_BJ[:, None, :]  # a_t − a_i
    pairs_BTJ = present_BJ[:, :, None] & ~present_BJ[:, None, :]
    losses_BTJ = F.relu(margin - ahead_BTJ).square()
    return torch.where(pairs_BTJ, losses_BTJ, 0).sum((1, 2)).mean()


TINY = 1e-12


def negative_log_likelihood(activations_BJ: Tensor, present_BJ: Tensor) -> Tensor:
    """−Σ_t log a_t, mean over the batch, of activations that add up to 1, as self-routing has them.

    Of several classes in one image each has an equal share of the target.
    """
    shares_BJ = present_BJ / present_BJ.sum(1, keepdim=True)
    return -(shares_BJ * activations_BJ.clamp(min=TINY).log()).sum(1).mean()


def _presence(present: Tensor, lengths_BJ: Tensor) -> Tensor:
    """The mask (B, J) that is given, or that of the classes which are."""
    batch, classes = lengths_BJ.shape
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        labels_BT = one_or_several(present)
        check_labels(labels_BT, batch, classes, lengths_BJ)
        if classes > 1 and labels_BT.shape[1] == classes:
            raise ValueError(
                f"as many labels as classes, {classes}, of each image: one flag a class is to be "
                "boolean, present.bool()"
            )
        return class_presence(labels_BT, classes)
    check_place("present", present, lengths_BJ)
    if present.shape != lengths_BJ.shape:
        raise ValueError(
            f"present is a mask of shape {tuple(present.shape)}: it is to have that of the lengths "
            f"(B, J), {tuple(lengths_BJ.shape)}"
        )
    return present


def reconstruction_loss(
    reconstructions: Tensor, targets: Tensor, config: MarginLossConfig | None = None
) -> Tensor:
    """0.0005 times the sum of squared differences over an image (§4.1), mean over the batch.

    reconstructions, targets: (B, C, H, W), or (B, T, C, H, W) of T digits, over which the sum goes
    too. config: whose `reconstruction_weight` is to be taken in place of the paper's 0.0005.
    Add it to `margin_loss` for the loss of the paper.
    Raises ValueError for tensors of different shapes.

    >>> import capsrun, torch
    >>> drawn, images = torch.full((2, 1, 28, 28), 0.5), torch.zeros(2, 1, 28, 28)
    >>> capsrun.reconstruction_loss(drawn, images)  # 0.0005 · 28 · 28 · 0.5²
    tensor(0.0980)
    """
    weight = constants(config).reconstruction_weight
    return weight * squared_difference(reconstructions, targets)


def squared_difference(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """Summed over an image, mean over the batch; see `reconstruction_loss`."""
    check_same_shape(reconstructions, targets)
    return (reconstructions - targets).square().flatten(1).sum(1).mean()


def capsnet_losses(
    output: CapsNetOutput,
    labels_BT: Tensor,
    targets_BTCHW: Tensor,
    config: CapsuleLossConfig,
    progress: float | Tensor = 1.0,
) -> Losses:
    """Of the classes, plus the weighted reconstruction loss, the latter 0 without a decoder.

    targets_BTCHW: what the reconstruction of each label should look like, pixels in [0, 1].
    progress: see `spread_loss`.
    """
    lengths_BJ = output.lengths_BJ
    present_BJ = class_presence(labels_BT, lengths_BJ.shape[1])
    if isinstance(config, MarginLossConfig):
        classes = margin_loss(lengths_BJ, present_BJ, config)
    elif isinstance(config, SpreadLossConfig):
        classes = spread_loss(lengths_BJ, present_BJ, config, progress)
    else:
        classes = negative_log_likelihood(lengths_BJ, present_BJ)
    if output.reconstructions_BTCHW is None:
        return Losses(classes, classes, torch.zeros_like(classes))
    squares = squared_difference(output.reconstructions_BTCHW, targets_BTCHW)
    reconstruction = config.reconstruction_weight * squares
    return Losses(classes + reconstruction, classes, reconstruction)


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
    output: Output,
    labels_BT: Tensor,
    targets_BTCHW: Tensor,
    config: LossConfig,
    progress: float | Tensor = 1.0,
) -> Losses:
    """The losses of any network; see `capsnet_losses` and `cross_entropy`."""
    if isinstance(output, CNNOutput):
        assert isinstance(config, CrossEntropyConfig)  # checked in settings.py
        entropy = cross_entropy(output.logits_BJ, labels_BT, config)
        return Losses(entropy, entropy, torch.zeros_like(entropy))
    assert isinstance(config, CapsuleLossConfig)
    return capsnet_losses(output, labels_BT, targets_BTCHW, config, progress)
