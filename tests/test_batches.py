"""Batches: random numbers, order, shifts; all pure functions of (seed, step)."""

import pytest
import torch
from conftest import stored

from capsrun.data.batches import (
    SHIFT,
    batch_indices,
    epoch_order,
    place,
    queue_order,
    random_bits,
    random_integers,
)
from capsrun.data.splits import TrainingBatches

CPU = torch.device("cpu")


def test_random_bits_are_splitmix64():
    """The first outputs for seed 1234567, as published with many implementations."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [int(n) % 2**64 for n in random_bits(torch.arange(5), 1234567)] == expected


def test_streams_differ_by_every_key():
    counters = torch.arange(100)
    streams = [random_bits(counters, *keys) for keys in [(1,), (1, 0), (1, 1), (0, 1), (1, 1, 2)]]
    for a in range(len(streams)):
        for b in range(a):
            assert not (streams[a] == streams[b]).any()


def test_random_integers_are_uniform_and_in_range():
    drawn = random_integers(torch.arange(100_000), -2, 2, 7, SHIFT)
    counts = (drawn + 2).bincount(minlength=5)
    assert drawn.min() == -2
    assert drawn.max() == 2
    # Chi-squared with 4 degrees of freedom; 23.5 is passed by chance once in 10,000 times.
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 23.5


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    orders = [epoch_order(*key, 1000, CPU) for key in ((0, 0), (0, 1), (1, 0))]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(1000))
    assert not any(torch.equal(orders[0], other) for other in orders[1:])


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (3, 8), (128, 1)])
def test_batches_follow_the_epochs_without_a_gap(count, batch_size):
    steps = 12
    indices, positions = zip(*(batch_indices(5, s, batch_size, count, CPU) for s in range(steps)))
    seen = torch.cat(indices)
    assert torch.equal(torch.cat(positions), torch.arange(steps * batch_size))
    assert all(len(batch) == batch_size for batch in indices)
    for epoch in range(len(seen) // count):
        part = seen[epoch * count : (epoch + 1) * count]
        assert torch.equal(part, epoch_order(5, epoch, count, CPU))


@pytest.mark.parametrize(("shift_px", "digits_in_window"), [(2, 200), (6, 30)])
def test_the_authors_order_comes_from_neighbouring_digits(shift_px, digits_in_window):
    """5,000 records of a queue hold 200 digits with 25 shifts each, or 30 with 169."""
    labels = torch.arange(10_000)  # of each digit its number
    split = stored(torch.zeros(10_000, 1, 16, 16, dtype=torch.uint8), labels, shift_px)
    batches = TrainingBatches(split, 0, 128, order="authors")
    expected = digits_in_window * (1 - (1 - 1 / digits_in_window) ** 128)
    different = []
    for step in range(0, 100, 5):
        digits = batches.batch(step).labels_BT[:, 0]
        different.append(len(digits.unique()))
        assert digits.max() - digits.min() <= digits_in_window + 128 // (2 * shift_px + 1) ** 2 + 1
    assert torch.tensor(different).float().mean() == pytest.approx(expected, abs=3)


def test_a_pass_of_the_authors_order_has_every_shift_of_every_digit_once():
    """1.5 million records of MNIST last 11,718.75 steps: 300,000 are 25.6 passes."""
    images, labels = one_pixel_images(300)
    split = stored(images, labels)
    assert split.records == 7500
    batches = TrainingBatches(split, 4, 75, order="authors")
    for first in (0, 100):
        records, _ = batches.draw(first, 100)
        assert torch.equal(records.sort().values, torch.arange(7500))
    seen = sum(batches.batch(step).images_BCHW.sum((0, 1)) for step in range(100))
    assert torch.equal(seen[2:7, 2:7], torch.full((5, 5), 300.0))


def test_place_moves_every_image_by_its_own_offset():
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    offsets = torch.tensor([[-1, 0], [2, 1], [0, 6], [9, 9]])
    placed = place(images, offsets, 8)
    assert placed.dtype == torch.uint8
    for image, (row, column), got in zip(images, offsets.tolist(), placed):
        expected = torch.zeros(3, 8, 8, dtype=torch.uint8)
        for y in range(5):
            for x in range(5):
                if 0 <= y + row < 8 and 0 <= x + column < 8:
                    expected[:, y + row, x + column] = image[:, y, x]
        assert torch.equal(got, expected)


def one_pixel_images(count):
    images = torch.zeros(count, 1, 9, 9, dtype=torch.uint8)
    images[:, 0, 4, 4] = 255
    return images, torch.arange(count) % 10


def test_all_25_shifts_are_equally_likely():
    images, labels = one_pixel_images(5000)
    places = torch.zeros(9, 9)
    for step in range(4):
        batch = TrainingBatches(stored(images, labels), 0, 5000).batch(step)
        places += batch.images_BCHW.sum((0, 1))
    shifts = places[2:7, 2:7]
    assert places.sum() == shifts.sum() == 20_000
    # Chi-squared with 24 degrees of freedom; 60 is passed by chance once in 20,000 times.
    assert ((shifts - 800) ** 2 / 800).sum() < 60


def random_images(count):
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8)
    return images, torch.arange(count) % 10


@pytest.mark.parametrize("order", ["uniform", "authors"])
def test_batches_are_a_pure_function_of_seed_and_step(order):
    """Also where several steps are drawn at once."""
    split = stored(*random_images(50))

    def batch(seed, step):
        return TrainingBatches(split, seed, 16, order=order).batch(step)

    first = batch(3, 7)
    batch(3, 500)
    assert all(torch.equal(a, b) for a, b in zip(first, batch(3, 7)))
    for other in [(4, 7), (3, 8)]:
        assert not torch.equal(first.images_BCHW, batch(*other).images_BCHW)
    assert not torch.equal(queue_order(0, 0, 7500, CPU), queue_order(0, 1, 7500, CPU))
    batches = TrainingBatches(split, 1, 16, order=order)
    one_by_one = zip(*(batches.draw(step) for step in range(3, 8)))
    for ours, single in zip(batches.draw(3, 5), one_by_one):
        assert torch.equal(ours, torch.cat(single))


def test_without_shift_images_are_as_they_were():
    images, labels = random_images(20)[0], torch.arange(20)
    batch = TrainingBatches(stored(images, labels, 0), 0, 20).batch(0)
    torch.testing.assert_close(batch.images_BCHW * 255, images[batch.labels_BT[:, 0]].float())
    assert torch.equal(batch.targets_BTCHW[:, 0], batch.images_BCHW)


@pytest.mark.gpu
def test_batches_are_the_same_on_a_gpu():
    images, labels = random_images(50)
    for step in range(5):
        here = TrainingBatches(stored(images, labels), 3, 16).batch(step)
        there = TrainingBatches(stored(images.cuda(), labels.cuda()), 3, 16).batch(step)
        assert torch.equal(here.labels_BT, there.labels_BT.cpu())
        torch.testing.assert_close(here.images_BCHW, there.images_BCHW.cpu())
