"""Two digits in an image, and stopping at an accuracy: training, evaluation, pictures, commands."""

import dataclasses
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import TINY, train_config, untrained
from PIL import Image
from test_bench import InThisProcess

from capsrun import cli, compose, errors
from capsrun.bench import tasks
from capsrun.commands import writer as training
from capsrun.commands.train import train
from capsrun.config import DataConfig
from capsrun.data import load_dataset
from capsrun.errors import Stopped, UserError
from capsrun.models import build_model
from capsrun.report import figures, pictures
from capsrun.report.pictures import in_colours
from capsrun.runs.checkpoint import check_dataset, load_checkpoint, read_checkpoint
from capsrun.settings import from_dict
from capsrun.training import stopping
from capsrun.training.losses import capsnet_losses
from capsrun.training.metrics import score_split

CPU = torch.device("cpu")
PAIRS = [*TINY, "dataset=multimnist", "dataset.source=mnist5k", "record.evaluate_images=500"]
PADDED = [*TINY, "dataset=mnist_padded", "dataset.source=mnist5k"]
EVAL_PAIRS = ["eval", "dataset=multimnist", "dataset.source=mnist5k"]
EVAL_5K = ["eval", "dataset=mnist5k"]


@pytest.fixture(scope="module")
def pairs_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs") / "seed0"
    train(train_config(*PAIRS), folder)
    return folder


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# Two digits


def test_a_run_on_two_digits(pairs_run):
    result = json.loads((pairs_run / "result.json").read_text())
    assert result["count"] == 10_000
    assert result["almost_correct"] >= result["count"] - result["errors"]
    confusion = torch.tensor(result["confusion"])
    both = result["count"] - result["almost_correct"]
    assert confusion.sum() == 20_000 - 2 * both, "every other digit is counted once"
    assert sum(result["errors_by_class"].values()) == result["errors"] + both
    last = metrics(pairs_run)[-1]
    assert last["almost_correct_percent/test"] >= 100 - last["error_percent/test"]
    names = {path.stem for path in (pairs_run / "pictures").iterdir()}
    assert {"absent", "confusion", "failures"} <= names


def test_both_digits_are_in_the_loss():
    """Margin loss and reconstruction of each digit, by hand."""
    config = train_config(*PAIRS)
    train_split = load_dataset(config.dataset, CPU).train
    model = build_model(config.model, config.routing, config.dataset)
    batch = train_split.batch(torch.arange(5))
    output = model(batch.images_BCHW, batch.labels_BT)
    losses = capsnet_losses(output, batch.labels_BT, batch.targets_BTCHW, config.loss)
    margin = squares = 0.0
    for n in range(5):
        for k in range(10):
            length = output.lengths_BJ[n, k].item()
            if k in batch.labels_BT[n]:
                margin += max(0.0, 0.9 - length) ** 2
            else:
                margin += 0.5 * max(0.0, length - 0.1) ** 2
        for t in range(2):
            drawn = model.decode(output.capsules_BJD[n : n + 1], batch.labels_BT[n : n + 1, t])
            squares += (drawn[0] - batch.targets_BTCHW[n, t]).square().sum().item()
    assert losses.classification.item() == pytest.approx(0.5 * margin / 50, rel=1e-5)
    assert losses.reconstruction.item() == pytest.approx(0.0005 * squares / 5, rel=1e-5)


@pytest.mark.parametrize("mask", ["label", "longest"])
def test_reconstructions_are_compared_class_by_class(pairs_run, mask):
    model = load_checkpoint(pairs_run / "checkpoint.pt").model.eval()
    test = load_dataset(train_config(*PAIRS).dataset, CPU).test
    score = score_split(model, test, "fp32", mask, most=50)
    batch = test.batch(torch.arange(50))
    output = model(batch.images_BCHW)
    total = 0.0
    for n in range(50):
        labels = batch.labels_BT[n].tolist()
        order = sorted(range(2), key=lambda t: labels[t])
        shown = sorted(labels)
        if mask == "longest":
            shown = sorted(output.lengths_BJ[n].topk(2).indices.tolist())
        for t, label in zip(order, shown):
            drawn = model.decode(output.capsules_BJD[n : n + 1], torch.tensor([label]))[0]
            total += (drawn - batch.targets_BTCHW[n, t]).square().sum().item()
    assert score.squared_error == pytest.approx(total / 50, rel=1e-4)


def test_an_ensemble_averages_the_lengths(pairs_run, tmp_path, printed):
    other = tmp_path / "checkpoint.pt"
    untrained(other, *PAIRS, "model.primary_scale=one")
    models = [load_checkpoint(path).model for path in (pairs_run / "checkpoint.pt", other)]
    test = load_dataset(train_config(*PAIRS).dataset, CPU).test
    both, alone = (score_split(m, test, "fp32", most=500) for m in (models, models[:1]))
    images = test.batch(torch.arange(500)).images_BCHW
    lengths = sum(model.eval()(images).lengths_BJ for model in models) / 2
    assert torch.equal(both.predicted_NT, lengths.topk(2).indices.sort(1).values)
    members = [f"checkpoint={pairs_run}", f"ensemble=[{other}]", f"out_dir={tmp_path}"]
    how = ["images=500", "precision=fp32", "compile=false"]
    *_, last = printed(*EVAL_PAIRS, *members, *how)
    assert last.startswith("test error")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["ensemble"] == [str(other)]
    assert result["errors"] == both.errors
    assert result["confusion"] == both.confusion_JJ.tolist() != alone.confusion_JJ.tolist()


def test_ensembles_of_one_kind_each_in_its_own_folder(tiny_run, tmp_path, printed, refused):
    small = ["model=cnn_baseline", "model.channels=[4]", "model.kernels_px=[5]"]
    cnn = tmp_path / "cnn.pt"
    untrained(cnn, "dataset=mnist5k", *small, "model.pools_px=[4]", "model.hidden=[16]")
    message = refused(*EVAL_5K, f"checkpoint={tiny_run}", f"ensemble=[{cnn}]")
    assert "but not both: capsnet and cnn_baseline" in message
    assert "has no decoder" in refused(*EVAL_5K, f"checkpoint={cnn}", "mask=longest")

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_run / "checkpoint.pt", tmp_path / name)
    for other in ("b", "c"):
        members = [f"checkpoint={tmp_path / 'a'}", f"ensemble=[{tmp_path / other}]"]
        lines = printed(*EVAL_5K, *members, "images=50")
        assert any("means over 2 models" in line for line in lines)
    assert len(list((tmp_path / "a").glob("eval-mnist5k-test-first50-ensemble2-*"))) == 2


def test_two_digits_are_drawn_in_two_colours():
    digits = torch.zeros(1, 2, 1, 4, 4)
    digits[0, 0, 0, 0] = 1
    digits[0, 1, 0, :, 0] = 1
    (coloured,) = in_colours(digits)
    first, second = (torch.tensor(colour) for colour in figures.TWO_COLOURS)
    torch.testing.assert_close(coloured[:, 0, 3], first)
    torch.testing.assert_close(coloured[:, 3, 0], second)
    torch.testing.assert_close(coloured[:, 0, 0], torch.ones(3))
    assert coloured[:, 3, 3].sum() == 0


def watch_reconstructions(monkeypatch):
    """Gathers which classes are reconstructed."""
    asked, original = [], pictures.reconstruct

    def watch(model, images, labels):
        asked.append(labels)
        return original(model, images, labels)

    monkeypatch.setattr(pictures, "reconstruct", watch)
    return asked


def test_which_digits_are_drawn_in_which_colour(pairs_run, monkeypatch):
    model = load_checkpoint(pairs_run / "checkpoint.pt").model
    test = load_dataset(train_config(*PAIRS).dataset, CPU).test
    names = [str(digit) for digit in range(10)]
    # Where label and prediction share a class it is drawn in the same place.
    score = score_split(model, test, "fp32", most=300)
    asked = watch_reconstructions(monkeypatch)
    failures = (score.labels_NT != score.predicted_NT).any(1).nonzero().squeeze(1)[:100]
    pictures._examples(model, test, names, score, failures, "label")
    shared = 0
    for ours, theirs in zip(*map(torch.Tensor.tolist, asked)):
        for k in set(ours) & set(theirs):
            assert ours.index(k) == theirs.index(k)
            shared += 1
    assert shared > 5
    # A digit that is not there is neither label nor prediction.
    score = score_split(model, test, "fp32", most=16)
    drawn = pictures.score_figures(model, test, names, score)
    for (present, absent), labels, predicted in zip(
        asked[-1].tolist(), score.labels_NT.tolist(), score.predicted_NT.tolist()
    ):
        assert present in labels
        assert absent not in labels + predicted
    titles = [text.get_text() for text in drawn["absent"].axes[0].get_xticklabels()]
    assert all("*" in title for title in titles)


def test_bench_makes_pairs(tmp_path, monkeypatch, printed):
    monkeypatch.setattr(tasks, "TRAINING_IMAGES", 500)
    monkeypatch.setattr(tasks, "TEST_IMAGES", 16)
    monkeypatch.setattr(tasks, "OwnProcess", InThisProcess)
    small = ["model.conv1_channels=8", "model.primary_types=2", "recipe.batch_size=8"]
    short = ["rounds=3", "turn_seconds=0.001", "spread_percent=1000", "precision=fp32"]
    lines = printed("bench", "dataset=multimnist", *small, *short, f"out_dir={tmp_path}")
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["others"]["making a batch"]["percent_of_step"] > 0
    assert result["dataset"] == "multimnist"
    assert any("making a batch is" in line for line in lines)


# What does not fit together


def test_two_digit_evaluation_of_one_digit_models_and_the_reverse(pairs_run, tiny_run, refused):
    pairs = train_config(*PAIRS)
    padded = train_config(*TINY, "dataset.image_px=36")
    with pytest.raises(UserError, match=r"images of one digit.*have two digits.*capsrun train"):
        check_dataset(pairs.dataset, padded, "test")
    with pytest.raises(UserError, match=r"images of two digits.*have one digit"):
        check_dataset(padded.dataset, pairs, "test")
    message = refused(*EVAL_5K, "dataset.image_px=36", f"checkpoint={pairs_run}")
    assert "images of two digits (multimnist), but those of dataset=mnist5k have one" in message
    message = refused(*EVAL_5K, f"checkpoint={pairs_run}")
    assert "images of 1×36×36" in message
    assert "has 1×28×28" in message


def test_affnist_with_a_checkpoint_of_mnist_says_both_sizes_and_what_to_do(tiny_run, refused):
    for name in ("affnist", "affnist_like"):
        message = refused("eval", f"dataset={name}", f"checkpoint={tiny_run}")
        assert "1×28×28" in message
        assert "1×40×40" in message
        assert "`capsrun train dataset=mnist_padded recipe=affnist`" in message


def dataset(name, *settings):
    words = [f"dataset={name}", *settings]
    return from_dict(DataConfig, compose.compose("data", words)).dataset


def test_training_digits_are_no_test_in_any_disguise():
    """The test digits of mnist5k are picked by split_seed, whatever is made of them."""
    like = dataset("affnist_like", "dataset.source=mnist5k", "dataset.split_seed=1")
    with pytest.raises(UserError, match="training images of mnist"):
        check_dataset(like, train_config(*TINY, "dataset=mnist_padded"), "test")
    with pytest.raises(UserError, match="split_seed=0"):
        check_dataset(like, train_config(*PADDED), "test")
    # Of MNIST it picks only the places.
    of_mnist = train_config(*TINY, "dataset=mnist_padded")
    check_dataset(dataset("mnist_padded", "dataset.split_seed=1"), of_mnist, "test")
    # What was trained on is not validated on under another name.
    other = train_config(*TINY, "dataset=mnist", "dataset.image_px=40")
    held_out = dataset("mnist_padded", "dataset.validation=10000")
    with pytest.raises(UserError, match="validation=0"):
        check_dataset(held_out, other, "validation")


def test_a_model_of_other_images_is_said_to_be_one(monkeypatch, capsys):
    monkeypatch.setattr(errors, "notices", [])
    run = train_config(*TINY, "dataset.image_px=40")
    check_dataset(dataset("affnist_like", "dataset.source=mnist5k"), run, "test")
    assert "was trained on mnist5k, not on mnist_padded" in capsys.readouterr().err


def test_eval_and_perturb_two_digits(pairs_run, tmp_path, capsys, monkeypatch, printed):
    """Other test images have their own folder."""
    monkeypatch.setattr(errors, "notices", [])
    shutil.copy(pairs_run / "checkpoint.pt", tmp_path)
    tested = [*EVAL_PAIRS, f"checkpoint={tmp_path}"]
    assert cli.main([*tested, "dataset.shift_px=6", "images=500"]) == 0
    assert "trained with dataset.shift_px=4, tested with 6" in capsys.readouterr().err
    lines = printed(*tested)
    # It is also said how often at least one of the two was found.
    almost = next(line for line in lines if line.startswith("at least one"))
    assert re.fullmatch(r"at least one of the two digits found: .* % \(.* of 10,000\)", almost)
    assert re.fullmatch(r"test error .* % \(.* of 10,000\)", lines[-1])
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"eval-multimnist-test", "eval-multimnist-test-shift_px-6-first500"}
    result = json.loads((tmp_path / "eval-multimnist-test" / "result.json").read_text())
    assert result["almost_correct"] > 0
    lines = printed("perturb", *tested[1:], "perturb.digit=3")
    assert Image.open(lines[1]).width > 11 * 36 * 2


def test_both_digits_of_an_own_image_are_named(in_tmp, printed):
    """The two longest capsules, as eval counts them; the longest is perturbed."""
    untrained(in_tmp / "model.pt", *PAIRS)
    pixels = np.zeros((36, 36), np.uint8)
    pixels[8:20, 8:12], pixels[18:30, 10:30] = 255, 180
    Image.fromarray(pixels).save("pair.png")
    few = ["perturb.step=0.25", "out_dir=out"]
    lines = printed("perturb", "checkpoint=model.pt", "perturb.image=pair.png", *few)
    with torch.inference_mode():
        model = load_checkpoint("model.pt").model
        lengths = model(torch.from_numpy(pixels)[None, None] / 255).lengths_BJ[0]
    (first, second), seen = (values.tolist() for values in lengths.topk(2))
    assert lines[1] == (
        f"pair.png: looks most like class {seen[0]} (capsule length {first:.2f}) and "
        f"class {seen[1]} (capsule length {second:.2f})"
    )
    assert lines[2].endswith(f"_as_{seen[0]}.png")


# Stopping at an accuracy


def fixed_accuracy(monkeypatch, errors):
    """Each evaluation finds the next number of errors; returns the list of what was asked."""
    original, asked = training.score_split, []
    left = iter(errors)

    def score(model, split, *args, **kwargs):
        asked.append((len(split), kwargs.get("most")))
        found = original(model, split, *args, **kwargs)
        labels = found.labels_NT.clone()
        wrong = next(left)
        labels[:wrong] = (labels[:wrong] + 1) % 10
        return dataclasses.replace(found, predicted_NT=labels)

    monkeypatch.setattr(training, "score_split", score)
    return asked


STOP = ["stop.accuracy_percent=99", "stop.every_steps=3"]


def test_a_run_stops_at_the_first_evaluation_that_reaches_its_target(tmp_path, monkeypatch, capsys):
    asked = fixed_accuracy(monkeypatch, [11, 10, 0])
    result = train(train_config(*PADDED, *STOP, "record.evaluate_images=5"), tmp_path)
    assert asked == [(1000, None), (1000, None)], "on all test images, and not again at the end"
    assert (result["steps"], result["errors"]) == (6, 10)
    assert result["stopped"] == {
        "accuracy_percent": 99,
        "on": "test",
        "reached": True,
        "steps": 6,
        "epochs": 6 * 16 / 4000,
    }
    lines = capsys.readouterr().out.strip().splitlines()
    assert "test accuracy 99.00 % reached after 6 steps" in lines
    expected = "stopped after 6 steps (0.02 epochs), which reached 99 % on the test images"
    assert stopping.stopped_line(result["stopped"]) == expected
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


@pytest.mark.parametrize(("last", "reached"), [(20, False), (10, True)])
def test_whether_a_target_is_reached_by_the_last_step_is_said(tmp_path, monkeypatch, last, reached):
    fixed_accuracy(monkeypatch, [20, last])
    result = train(train_config(*PADDED, *STOP, "recipe.steps=6"), tmp_path)
    assert (result["steps"], result["errors"]) == (6, last)
    assert (result["stopped"]["reached"], result["stopped"]["steps"]) == (reached, 6)
    line = stopping.stopped_line(result["stopped"])
    assert line.startswith("99 % on the test images was not reached in 6 steps") is not reached


def test_ctrl_c_while_the_target_is_reached_only_delays_the_end(tmp_path, monkeypatch):
    """Neither does a checkpoint that is due then change anything."""
    asked = fixed_accuracy(monkeypatch, [0, 0])
    original = training.score_split

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    config = train_config(*PADDED, *STOP, "record.checkpoint_every_seconds=0")
    with monkeypatch.context() as patch:
        patch.setattr(training, "score_split", interrupted)
        with pytest.raises(Stopped, match="after step 3 of 12, which is saved"):
            train(config, tmp_path)
    result = train(config, tmp_path)
    assert (result["steps"], len(asked)) == (3, 2)
    assert (result["stopped"]["reached"], result["stopped"]["steps"]) == (True, 3)


def test_validation_images_can_decide(tmp_path, monkeypatch):
    # Test and validation by turns: the test images reach the target first, and that is ignored.
    asked = fixed_accuracy(monkeypatch, [0, 5, 500, 1, 400, 1])
    settings = [*STOP, "stop.on=validation", "dataset.validation=100", "record.evaluate_images=50"]
    result = train(train_config(*PADDED, *settings), tmp_path)
    assert asked[:2] == [(1000, 50), (100, None)]
    assert result["steps"] == 6
    assert (result["errors"], result["count"]) == (400, 1000)
    assert (result["stopped"]["reached"], result["stopped"]["on"]) == (True, "validation")


def test_a_run_that_was_killed_after_it_stopped_does_not_go_on(tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        fixed_accuracy(patch, [0, 0])
        patch.setattr(training.pictures, "score_figures", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(train_config(*PADDED, *STOP), tmp_path)
    result = train(train_config(*PADDED, *STOP), tmp_path)
    assert result["steps"] == 3
    assert (result["stopped"]["reached"], result["stopped"]["steps"]) == (True, 3)


def test_the_recipe_for_affnist_says_when_to_stop():
    config = train_config("dataset=mnist_padded", "recipe=affnist")
    assert (config.stop.accuracy_percent, config.stop.on) == (99.23, "test")
    assert (config.recipe.steps, config.recipe.learning_rate) == (300_000, 0.001)
    assert train_config("recipe=multimnist").recipe.decay_steps == 20_000


# capsrun data


def test_data_shows_how_much_digits_overlap(in_tmp, printed):
    few = ["dataset.source=mnist5k", "statistics_images=2000", "samples=4"]
    lines = printed("data", "dataset=multimnist", *few)
    text = "\n".join(lines)
    assert any(line.split() == ["images", "4,000,000", "10,000"] for line in lines)
    assert any(line.split() == ["7", "400,000", "1,000"] for line in lines)
    assert re.search(r"train: the frames \(28×28\) of the two digits overlap by (79|80|81)\.", text)
    folder = in_tmp / "runs" / "data-multimnist"
    found = json.loads((folder / "statistics.json").read_text())
    assert found["test"]["frame_overlap_percent"] == pytest.approx(80, abs=1)
    assert found["test"]["images"] == 2000
    # Two rows a class: as it is and in colours.
    assert Image.open(folder / "contact_sheet.png").height > 20 * 2 * 36


def test_data_keeps_how_each_transformed_image_was_made(in_tmp, printed):
    arguments = ["data", "dataset=affnist_like", "dataset.source=mnist5k", "samples=4"]
    lines = printed(*arguments, "statistics_images=2000")
    folder = in_tmp / "runs" / "data-affnist_like"
    kept = np.load(folder / "transforms.npz")
    test = load_dataset(dataset("affnist_like", "dataset.source=mnist5k"), CPU).test
    expected = test.transforms(torch.tensor([31_999]))
    for name, values in expected._asdict().items():
        assert kept[name].shape == (32_000,)
        assert kept[name][31_999] == pytest.approx(values.item(), abs=1e-5)
    assert any("rotation_degrees: -20.0" in line or "-19.9" in line for line in lines)
    found = json.loads((folder / "statistics.json").read_text())
    assert found["transforms"]["row_scale"]["mean"] == pytest.approx(1, abs=0.01)
    assert (folder / "contact_sheet.png").exists()
