"""The losses and the score, by hand."""

import dataclasses

import pytest
import torch
from conftest import make_model, stored, train_config

from capsrun.models.capsnet import CapsNetOutput
from capsrun.report.pictures import class_errors
from capsrun.training.losses import (
    capsnet_losses,
    class_presence,
    margin_loss,
    reconstruction_loss,
)
from capsrun.training.metrics import (
    Score,
    confusion_matrix,
    predicted_classes,
    score_split,
    surplus,
)

PAPER = train_config("loss=paper").loss
AUTHORS = train_config().loss


def test_margin_loss_by_hand():
    lengths = torch.tensor([[0.7, 0.3, 0.05]])
    present = torch.tensor([[True, False, False]])
    # (0.9 − 0.7)² + 0.5 · (0.3 − 0.1)² + 0
    assert margin_loss(lengths, present, PAPER).item() == pytest.approx(0.04 + 0.02)
    # That of the authors is a twentieth.
    lengths, present = torch.rand(5, 10), torch.eye(10)[:5].bool()
    ours, text = (margin_loss(lengths, present, config).item() for config in (AUTHORS, PAPER))
    assert ours == pytest.approx(text / 20)
    # Lengths go in as they are: beyond both margins they cost nothing, after a softmax they would.
    lengths = torch.full((1, 10), 0.1)
    lengths[0, 3] = 0.9
    assert margin_loss(lengths, class_presence(torch.tensor([[3]]), 10), PAPER).item() == 0


@pytest.mark.parametrize("labels", [[3, 1, 0], [[3], [1], [0]], [[3, 2], [1, 0], [0, 3]]])
def test_margin_loss_of_class_numbers_is_that_of_their_mask(labels):
    """With the constants of the text, where none are given."""
    lengths, labels = torch.rand(3, 4), torch.tensor(labels)
    mask = torch.zeros(3, 4).bool()
    mask[torch.arange(3)[:, None], labels.reshape(3, -1)] = True
    by_hand = torch.where(
        mask, (0.9 - lengths).clamp(min=0) ** 2, 0.5 * (lengths - 0.1).clamp(min=0) ** 2
    )
    for present in (labels, mask):
        torch.testing.assert_close(margin_loss(lengths, present), by_hand.sum(1).mean())
    assert torch.equal(margin_loss(lengths, mask), margin_loss(lengths, mask, PAPER))


def test_two_digits_are_both_present():
    present = class_presence(torch.tensor([[1, 3], [2, 2]]), 4)
    assert present.tolist() == [[False, True, False, True], [False, False, True, False]]


def test_reconstruction_is_a_sum_over_pixels_and_a_mean_over_images():
    """A mean over the pixels would be 784 times smaller."""
    drawn, target = torch.zeros(2, 1, 1, 28, 28), torch.zeros(2, 1, 1, 28, 28)
    drawn[0] = 0.5
    assert PAPER.reconstruction_weight == 0.0005
    assert reconstruction_loss(drawn, target).item() == pytest.approx(0.0005 * 784 * 0.25 / 2)
    other = dataclasses.replace(PAPER, reconstruction_weight=3.0)
    loss = reconstruction_loss(drawn[:, 0], target[:, 0], other)
    assert loss.item() == pytest.approx(3 * 784 * 0.25 / 2)


def test_total_is_margin_plus_weighted_reconstruction():
    lengths = torch.rand(2, 10)
    drawn, target = torch.rand(2, 1, 1, 28, 28), torch.rand(2, 1, 1, 28, 28)
    output = CapsNetOutput(torch.zeros(2, 10, 16), lengths, drawn)
    losses = capsnet_losses(output, torch.tensor([[1], [2]]), target, AUTHORS)
    squares = ((drawn - target) ** 2).sum().item() / 2
    assert losses.reconstruction.item() == pytest.approx(0.0005 * squares)
    assert losses.total.item() == pytest.approx(losses.classification.item() + 0.0005 * squares)


def score_of(labels_NT, predicted_NT, classes, surplus_N=None):
    counted = confusion_matrix(labels_NT, predicted_NT, classes)
    return Score(labels_NT, predicted_NT, counted, None, surplus_N, torch.zeros(0, classes))


def test_no_half_credit_for_one_of_two_digits():
    lengths = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.9, 0.1, 0.8, 0.2], [0.9, 0.1, 0.8, 0.2]])
    predicted = predicted_classes(lengths, 2)
    assert predicted.tolist() == [[0, 1], [0, 2], [0, 2]]
    score = score_of(torch.tensor([[0, 1], [0, 1], [1, 3]]), predicted, 4)
    assert (score.errors, score.almost_correct, score.count) == (2, 2, 3)


def test_the_worst_mistakes_are_those_that_the_model_was_surest_of():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.6, 0.1], [0.1, 0.2, 0.9], [0.3, 0.8, 0.2]])
    labels = torch.tensor([[0], [0], [0], [2]])
    predicted = predicted_classes(scores, 1)
    by_hand = torch.tensor([0.0, 0.1, 0.8, 0.6])
    torch.testing.assert_close(surplus(scores, labels, predicted), by_hand)
    score = score_of(labels, predicted, 3, by_hand)
    assert score.worst_first.tolist() == [2, 3, 1]
    # Of two digits, 0 was found; 3 was missed and 1 was seen instead.
    pair = torch.tensor([[0.9, 0.7, 0.1, 0.3], [0.9, 0.1, 0.2, 0.8]])
    labels = torch.tensor([[0, 3], [0, 3]])
    found = surplus(pair, labels, predicted_classes(pair, 2))
    torch.testing.assert_close(found, torch.tensor([0.4, 0.0]))


def test_confusion_by_hand():
    """Found digits are on the diagonal; a missed one was taken for what was not there."""
    labels, predicted = torch.tensor([[0], [0], [1], [2]]), torch.tensor([[0], [2], [1], [1]])
    counted = confusion_matrix(labels, predicted, 3)
    assert counted.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    labels = torch.tensor([[0, 1], [0, 1], [0, 3], [2, 3]])
    predicted = torch.tensor([[0, 1], [1, 2], [1, 2], [2, 3]])
    score = score_of(labels, predicted, 4)
    # Of the third image both were missed.
    assert score.confusion_JJ.tolist() == [[1, 0, 1, 0], [0, 2, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert score.digits_J.tolist() == [3, 2, 1, 2]
    assert class_errors(score) == [2, 0, 0, 1]


@pytest.mark.parametrize("mask", [None, "label", "longest"])
def test_score_counts_what_the_model_says_and_the_mask_chooses_what_is_drawn(mask):
    model = make_model(train_config("model.conv1_channels=8", "model.primary_types=2"))
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    pixels = images.float() / 255
    output = model(pixels)
    predicted = output.lengths_BJ.argmax(1)
    labels = predicted.clone()
    labels[2] = (labels[2] + 1) % 10
    result = score_split(model, stored(images, labels), "fp32", mask)
    assert (result.errors, result.count) == (1, 7)
    assert result.error_percent == pytest.approx(100 / 7)
    assert torch.equal(result.predicted_NT[:, 0], predicted)
    if mask is None:
        assert result.squared_error is None
        return
    drawn = model.decode(output.capsules_BJD, labels if mask == "label" else predicted)
    expected = (drawn - pixels).square().sum((1, 2, 3)).mean().item()
    assert result.squared_error == pytest.approx(expected, rel=1e-5)
