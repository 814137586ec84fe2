"""What a model gets right: predictions over a whole split, errors, the confusion matrix.

Shapes: N images, B batch, J classes, T digits in one image.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from capsrun.data import Split
from capsrun.data.batches import to_pixels
from capsrun.models.capsnet import CapsNet
from capsrun.training.losses import class_presence
from capsrun.training.step import Progress, autocast

# Images tested at once. It changes no answer; 250 need about 1 GB for their votes.
BATCH_SIZE = 250


@dataclass(frozen=True)
class Score:
    """What a model said about every image of a split, and how often it was wrong."""

    labels_N: Tensor
    predicted_N: Tensor
    """The class with the longest capsule."""
    confusion_JJ: Tensor
    """Row: the true class; column: the predicted one; entries: images."""
    squared_error: float | None
    """Squared pixel differences of the reconstruction, summed over an image, mean over images."""

    @property
    def errors(self) -> int:
        return int((self.labels_N != self.predicted_N).sum())

    @property
    def count(self) -> int:
        return len(self.labels_N)

    @property
    def error_percent(self) -> float:
        return 100 * self.errors / self.count


def count_correct(lengths_BJ: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Count images whose T longest capsules are all the true ones, and those with at least one.

    Returns (correct, almost correct) as integer scalars, as in the authors' evaluation; with one
    digit an image the two are the same. Ties go to the lower class.
    """
    digits = labels_BT.shape[1]
    predicted_BT = lengths_BJ.argsort(dim=1, descending=True, stable=True)[:, :digits]
    classes = lengths_BJ.shape[1]
    found_BJ = class_presence(predicted_BT, classes) & class_presence(labels_BT, classes)
    found_B = found_BJ.sum(1)
    return (found_B == digits).sum(), (found_B > 0).sum()


@torch.inference_mode()
def score_split(
    model: CapsNet,
    split: Split,
    precision: str,
    mask: str | None = None,
    progress: Progress = iter,
) -> Score:
    """Classify every image of a split, unshifted, and compare with the labels.

    mask: reconstruct the `label` or the `longest` capsule's class too; None: do not reconstruct.
    progress: wraps the batches to show how far it is.
    """
    model.eval()
    batches = list(
        zip(split.images_NCHW.split(BATCH_SIZE), split.labels_N.split(BATCH_SIZE), strict=True)
    )
    predicted, squared_errors = [], []
    for images_BCHW, labels_B in progress(batches):
        pixels_BCHW = to_pixels(images_BCHW)
        with autocast(pixels_BCHW.device, precision):
            output = model(pixels_BCHW)
            predicted.append(output.lengths_BJ.argmax(1))
            if mask is not None and model.decoder is not None:
                shown_B = labels_B if mask == "label" else predicted[-1]
                difference = model.decode(output.capsules_BJD, shown_B) - pixels_BCHW
                squared_errors.append(difference.square().flatten(1).sum(1))
    model.train()
    labels_N, predicted_N = split.labels_N.cpu(), torch.cat(predicted).cpu()
    squared_error = torch.cat(squared_errors).mean().item() if squared_errors else None
    confusion_JJ = confusion_matrix(labels_N, predicted_N, model.classes)
    return Score(labels_N, predicted_N, confusion_JJ, squared_error)


def confusion_matrix(labels_N: Tensor, predicted_N: Tensor, classes: int) -> Tensor:
    """Count images by true class (row) and predicted class (column)."""
    pairs_N = labels_N * classes + predicted_N
    return pairs_N.bincount(minlength=classes**2).reshape(classes, classes)
