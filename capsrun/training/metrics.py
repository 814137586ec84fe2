"""What a model gets right: predictions over a whole split, errors, the confusion matrix.

Shapes: N images, B batch, J classes, T digits in one image, C channels, H and W pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capsrun.data.batches import in_class_order
from capsrun.data.splits import Split
from capsrun.models import Model
from capsrun.models.fast.frequency_conv import weights_stay
from capsrun.training.device import autocast
from capsrun.training.losses import class_presence

Progress = Callable[[Iterable[Any]], Iterable[Any]]

# Images tested at once. It changes no answer; 250 of MNIST need about 1 GB for their votes.
BATCH_SIZE = 250


@dataclass(frozen=True)
class Score:
    """What a model said about every image of a split, and how often it was wrong."""

    labels_NT: Tensor
    """The classes of each image, in rising order."""
    predicted_NT: Tensor
    """The T classes with the longest capsules (or the most likely), in rising order."""
    confusion_JJ: Tensor
    """Row: the true class; column: the predicted one; entries: digits. See `confusion_matrix`."""
    squared_error: float | None
    """Squared pixel differences of the reconstructions, summed over an image, mean over images."""
    surplus_N: Tensor
    """By how much what was wrongly predicted outscored what is there; see `surplus`."""
    scores_NJ: Tensor
    """How much each class is seen in each of the first images, of as many as were to be kept."""

    @property
    def _wrong_N(self) -> Tensor:
        return (self.labels_NT != self.predicted_NT).any(1)

    @property
    def worst_first(self) -> Tensor:
        """The numbers of the misclassified images, those that the model was surest of first."""
        wrong = self._wrong_N.nonzero().squeeze(1)
        return wrong[self.surplus_N[wrong].argsort(descending=True, stable=True)]

    @property
    def errors(self) -> int:
        """Images of which at least one digit was missed."""
        return int(self._wrong_N.sum())

    @property
    def almost_correct(self) -> int:
        """Images of which at least one digit was found."""
        found_NT = (self.labels_NT[:, :, None] == self.predicted_NT[:, None]).any(2)
        return int(found_NT.any(1).sum())

    @property
    def digits_J(self) -> Tensor:
        return self.labels_NT.flatten().bincount(minlength=len(self.confusion_JJ))

    @property
    def count(self) -> int:
        return len(self.labels_NT)

    @property
    def error_percent(self) -> float:
        return 100 * self.errors / self.count


def predicted_classes(scores_BJ: Tensor, digits: int) -> Tensor:
    """The classes (B, T) with the highest scores, in rising order; of equals the lower one."""
    # Not by a stable sort, which ONNX does not have. Of equals argmax takes the first.
    found = []
    for _ in range(digits):
        found.append(scores_BJ.argmax(1, keepdim=True))
        scores_BJ = scores_BJ.scatter(1, found[-1], -torch.inf)
    return torch.cat(found, dim=1).sort(dim=1).values


@torch.inference_mode()
@weights_stay()
def score_split(
    models: Model | Sequence[Model],
    split: Split,
    precision: str,
    mask: str | None = None,
    progress: Progress = iter,
    most: int | None = None,
    kept: int = 0,
) -> Score:
    """Classify every image of a split, as it is tested, and compare with the labels.

    models: one, or several whose scores are averaged (§7); the first one reconstructs.
    mask: reconstruct the `label` or the `longest` capsules' classes too; None: do not reconstruct.
    progress: wraps the batches to show how far it is. most: use so many images only. kept: of how
    many images, from the first, all scores are kept.
    Raises FloatingPointError for scores that are not finite.
    """
    ensemble = [models] if isinstance(models, Model) else list(models)
    first = ensemble[0]
    for model in ensemble:
        model.eval()
    count = len(split) if most is None else min(most, len(split))
    labels, predicted, squared_errors, surpluses = [], [], [], []
    scores = [torch.empty(0, first.classes)]
    confusion_JJ = torch.zeros(first.classes, first.classes, dtype=torch.int64, device=split.device)
    for start in progress(range(0, count, BATCH_SIZE)):
        # Labels and predictions in the order of their classes, so that they correspond.
        indices_B = split.indices(start, min(start + BATCH_SIZE, count))
        batch = in_class_order(split.batch(indices_B))
        with autocast(split.device, precision):
            outputs = [model(batch.images_BCHW) for model in ensemble]
            scores_BJ = torch.stack([output.scores_BJ for output in outputs]).mean(0)
            if not bool(scores_BJ.isfinite().all()):
                raise FloatingPointError("the scores of the network are not finite")
            predicted_BT = predicted_classes(scores_BJ, split.digits)
            if mask is not None and first.decoder is not None:
                shown_BT = batch.labels_BT if mask == "label" else predicted_BT
                drawn_BTCHW = first.decode(outputs[0].capsules_BJD, shown_BT)
                difference = drawn_BTCHW - batch.targets_BTCHW
                squared_errors.append(difference.square().flatten(1).sum(1))
        labels.append(batch.labels_BT)
        predicted.append(predicted_BT)
        scores.append(scores_BJ[: max(kept - start, 0)].float().cpu())
        surpluses.append(surplus(scores_BJ, batch.labels_BT, predicted_BT))
        confusion_JJ += confusion_matrix(batch.labels_BT, predicted_BT, first.classes)
    return Score(
        torch.cat(labels).cpu(),
        torch.cat(predicted).cpu(),
        confusion_JJ.cpu(),
        torch.cat(squared_errors).mean().item() if squared_errors else None,
        torch.cat(surpluses).cpu(),
        torch.cat(scores),
    )


def surplus(scores_BJ: Tensor, labels_BT: Tensor, predicted_BT: Tensor) -> Tensor:
    """The highest score of a wrong prediction minus the lowest of a missed class, of each image.

    0 where nothing is wrong.
    """
    present_BJ = class_presence(labels_BT, scores_BJ.shape[1])
    claimed_BJ = class_presence(predicted_BT, scores_BJ.shape[1])
    invented_B = scores_BJ.masked_fill(~(claimed_BJ & ~present_BJ), -torch.inf).amax(1)
    missed_B = scores_BJ.masked_fill(~(present_BJ & ~claimed_BJ), torch.inf).amin(1)
    right_B = (claimed_BJ == present_BJ).all(1)
    return torch.where(right_B, 0.0, invented_B - missed_B)


def confusion_matrix(labels_NT: Tensor, predicted_NT: Tensor, classes: int) -> Tensor:
    """Count digits by true class (row) and predicted class (column).

    A digit that is found counts on the diagonal. Where one digit of an image is missed it was taken
    for the prediction that is not there. Where two are, nobody knows which was taken for which, so
    they are left out.
    """
    present_NJ = class_presence(labels_NT, classes)
    claimed_NJ = class_presence(predicted_NT, classes)
    found_NJ = present_NJ & claimed_NJ
    missed_NJ, invented_NJ = present_NJ & ~found_NJ, claimed_NJ & ~found_NJ
    one_missed_N = missed_NJ.sum(1) == 1
    taken_for = missed_NJ[one_missed_N].long().argmax(1), invented_NJ[one_missed_N].long().argmax(1)
    confusion_JJ = found_NJ.sum(0).diag()
    return confusion_JJ.index_put(taken_for, torch.ones_like(taken_for[0]), accumulate=True)
