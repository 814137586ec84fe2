"""White-box attacks: images perturbed within ±ε a pixel (L∞) so that a network errs, in float32.

Each step goes along the sign of the gradient of what is climbed, and back into [x − ε, x + ε] and
[0, 1]: x' ← clip(x' + α · sign ∇). One step without a random start is FGSM (Goodfellow, Shlens,
Szegedy 2015), several are BIM (Kurakin, Goodfellow, Bengio 2017), and from a random start PGD
(Madry et al. 2018). Reconstructive ones (after Qin et al. 2020) deceive the detector, too: in each
step, an image that fools the network is moved towards its reconstruction. The gradient flows
through all routing iterations, also of a network that was trained with `routing.detach=true`.

Shapes: B batch, N images, J classes, T digits in one image, C channels, H and W pixels.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from capsrun.attack_config import AttackConfig
from capsrun.data.batches import START, TARGET, in_class_order, random_integers
from capsrun.data.splits import Split
from capsrun.data.warped import as_seen, pixels_of, uniform_pixels
from capsrun.model_config import LossConfig
from capsrun.models import CNNOutput, Model, Output
from capsrun.models.dynamic import CapsuleLayer
from capsrun.models.fast.frequency_conv import weights_stay
from capsrun.training.detection import distances
from capsrun.training.losses import class_presence, model_losses
from capsrun.training.metrics import Progress, predicted_classes

ATTACKED_AT_ONCE = 100
SHOWN = 8  # images, from the first, that are kept for a picture


class Network(NamedTuple):
    """A network, and the loss that it was trained with."""

    model: Model
    loss: LossConfig


@dataclass(frozen=True)
class Outcome:
    """What an attack within one ε came to."""

    epsilon: float
    predicted_NT: Tensor
    wrong_N: Tensor
    """Which images are not taken for what they show."""
    fooled_N: Tensor
    """Those that are taken for their target; of an attack without targets, those that are wrong.

    Those that were so before are left as they are.
    """
    flat_N: Tensor
    """Where the gradient at the first start was exactly 0, so that it showed no way."""
    distances_N: Tensor
    """See `distances`; empty where they were not asked for."""
    shown_SCHW: Tensor
    """The first images, perturbed."""


@contextlib.contextmanager
def attacked(model: Model) -> Iterator[None]:
    """Have gradients with respect to the images, through all of routing, and not to the weights."""
    layers = [module for module in model.modules() if isinstance(module, CapsuleLayer)]
    routings = [layer.routing for layer in layers]
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in weights:
        parameter.requires_grad_(False)
    for layer in layers:
        layer.routing = dataclasses.replace(layer.routing, detach=False)
    try:
        yield
    finally:
        for parameter in weights:
            parameter.requires_grad_(True)
        for layer, routing in zip(layers, routings):
            layer.routing = routing


def step_size(config: AttackConfig, epsilon: float) -> float:
    """α: as is said, or 2.5 ε / steps (Madry et al.), but at most ε."""
    if config.step_size is not None:
        return config.step_size
    return min(1.0, 2.5 / config.steps) * epsilon


def targets(labels_BT: Tensor, numbers_B: Tensor, classes: int, seed: int) -> Tensor:
    """A class (B, 1) for each image, drawn among the others by the seed and the image's number."""
    drawn_B = random_integers(numbers_B, 1, classes - 1, seed, TARGET)
    return (labels_BT + drawn_B[:, None]) % classes


def each(values_B: Tensor) -> Tensor:
    """A value for each image, as (B, 1, 1, 1)."""
    return values_B[:, None, None, None]


def climbed(output: Output, labels_BT: Tensor, network: Network, config: AttackConfig) -> Tensor:
    """What grows as some classes are seen less, summed over images; see `AttackConfig.loss`.

    The margin loss is exactly flat where all margins are kept. The difference of scores, of a CNN's
    logits, is not flat there.
    """
    if config.loss == "trained":
        nothing = labels_BT  # there are no reconstructions to be compared with anything
        losses = model_losses(output, labels_BT, nothing, network.loss)
        return losses.classification * len(labels_BT)
    scores_BJ = output.logits_BJ if isinstance(output, CNNOutput) else output.scores_BJ
    present_BJ = class_presence(labels_BT, scores_BJ.shape[1])
    wrong_B = scores_BJ.masked_fill(present_BJ, -torch.inf).amax(1)
    right_B = scores_BJ.masked_fill(~present_BJ, torch.inf).amin(1)
    return (wrong_B - right_B).sum()


@dataclass(frozen=True)
class Attack:
    """How the images of a split are perturbed, on which network."""

    network: Network
    split: Split
    config: AttackConfig

    def aims(self, labels_BT: Tensor, numbers_B: Tensor) -> Tensor:
        """The classes that are to be seen more (targets), or less (what the images show)."""
        if not self.config.targeted:
            return labels_BT
        return targets(labels_BT, numbers_B, self.network.model.classes, self.config.seed)

    def fools(self, predicted_BT: Tensor, aims_BT: Tensor) -> Tensor:
        """Which images (B,) are taken for what is wanted."""
        taken_B = (predicted_BT == aims_BT).all(1)
        return taken_B if self.config.targeted else ~taken_B

    def gradient(self, pixels_BCHW: Tensor, aims_BT: Tensor) -> Tensor:
        """Of what is climbed, with respect to the pixels."""
        pixels_BCHW = pixels_BCHW.detach().requires_grad_()
        output = self.network.model(as_seen(pixels_BCHW, self.split.config))
        height = climbed(output, aims_BT, self.network, self.config)
        (gradient,) = torch.autograd.grad(-height if self.config.targeted else height, pixels_BCHW)
        return gradient

    def disguise(self, pixels_BCHW: Tensor, aims_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient towards reconstructions, and the `distances` of images that fool.

        Of others the distance is ∞.
        """
        pixels_BCHW = pixels_BCHW.detach().requires_grad_()
        model, config = self.network.model, self.split.config
        predicted_BT, distances_B = distances(model, pixels_BCHW, config)
        (gradient,) = torch.autograd.grad(-distances_B.sum(), pixels_BCHW)
        return gradient, distances_B.where(self.fools(predicted_BT, aims_BT), torch.inf).detach()

    def perturb(
        self, pixels_BCHW: Tensor, aims_BT: Tensor, numbers_B: Tensor, epsilon: float, restart: int
    ) -> tuple[Tensor, Tensor]:
        """The images moved by up to ε a pixel, and where the gradient at the start is all 0.

        With ε = 0 they are what they were, bit for bit. A reconstructive attack returns, of the
        images on the way, those that fool with the best reconstruction.
        """
        low, high = (pixels_BCHW - epsilon).clamp(min=0), (pixels_BCHW + epsilon).clamp(max=1)
        moved = pixels_BCHW
        if self.config.random_start:
            keys = self.config.seed, START, restart
            unit = uniform_pixels(numbers_B, tuple(pixels_BCHW.shape[1:]), *keys)
            moved = (pixels_BCHW + epsilon * (2 * unit - 1)).clamp(low, high)
        size, flat_B = step_size(self.config, epsilon), None
        best, least_B = moved, moved.new_full((len(moved),), torch.inf)
        for _ in range(self.config.steps if epsilon else 1):
            gradient = self.gradient(moved, aims_BT)
            if flat_B is None:
                flat_B = gradient.flatten(1).count_nonzero(1) == 0
            if self.config.reconstructive:
                nearer, distances_B = self.disguise(moved, aims_BT)
                best = torch.where(each(distances_B < least_B), moved, best)
                least_B = least_B.minimum(distances_B)
                gradient = torch.where(each(distances_B.isfinite()), nearer, gradient)
            moved = (moved + size * gradient.sign()).clamp(low, high)
        assert flat_B is not None
        return torch.where(each(least_B.isfinite()), best, moved), flat_B


def attack_split(
    attack: Attack, model: Model, most: int | None, progress: Progress, detect: bool
) -> list[Outcome]:
    """Perturb the images of a split within each ε, and see what a network takes them for.

    model: the one that is tested, maybe another than that on which they are perturbed.
    most: use so many images only. progress: wraps the batches. detect: find the `distances`, too.
    An image that the model gets wrong as it is, or with targets takes for its own, is left alone.
    """
    count = len(attack.split) if most is None else min(most, len(attack.split))
    found: list[list[Outcome]] = [[] for _ in attack.config.epsilon]
    with attacked(model), attacked(attack.network.model), weights_stay():
        for start in progress(range(0, count, ATTACKED_AT_ONCE)):
            numbers_B = attack.split.indices(start, min(start + ATTACKED_AT_ONCE, count))
            for epsilon, outcomes in zip(attack.config.epsilon, found):
                outcomes.append(attack_batch(attack, model, numbers_B, epsilon, detect))
    return [together(outcomes) for outcomes in found]


def attack_batch(
    attack: Attack, model: Model, numbers_B: Tensor, epsilon: float, detect: bool
) -> Outcome:
    """Perturb some images of a split within ε, from all starts; see `attack_split`."""
    config = attack.split.config
    batch = in_class_order(attack.split.batch(numbers_B))
    labels_BT, aims_BT = batch.labels_BT, attack.aims(batch.labels_BT, numbers_B)

    @torch.no_grad()
    def fooled(pixels_BCHW: Tensor, aims_BT: Tensor) -> Tensor:
        scores_BJ = model(as_seen(pixels_BCHW, config)).scores_BJ
        return attack.fools(predicted_classes(scores_BJ, config.digits), aims_BT)

    pixels_BCHW = pixels_of(batch, config)
    fooled_B, kept_BCHW = fooled(pixels_BCHW, aims_BT), pixels_BCHW.clone()
    flat_B = torch.zeros_like(fooled_B)
    for restart in range(attack.config.restarts):
        left = (~fooled_B).nonzero().squeeze(1)
        if not len(left):
            break
        given = pixels_BCHW[left], aims_BT[left], numbers_B[left]
        kept_BCHW[left], flat = attack.perturb(*given, epsilon, restart)
        if restart == 0:
            flat_B[left] = flat
        fooled_B[left] = fooled(kept_BCHW[left], aims_BT[left])
    with torch.no_grad():
        predicted_BT, distances_B = distances(model, kept_BCHW, config, detect)
    wrong_B = (predicted_BT != labels_BT).any(1)
    few = max(SHOWN - int(numbers_B[0]), 0)
    found = predicted_BT, wrong_B, fooled_B, flat_B, distances_B, kept_BCHW[:few]
    return Outcome(epsilon, *(tensor.cpu() for tensor in found))


def together(outcomes: Sequence[Outcome]) -> Outcome:
    """What was found of several batches, as one."""
    names = [field.name for field in dataclasses.fields(Outcome)][1:]
    columns = ([getattr(outcome, name) for outcome in outcomes] for name in names)
    return Outcome(outcomes[0].epsilon, *map(torch.cat, columns))
