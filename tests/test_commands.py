"""Eval, perturb and data on real digits, as a user runs them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, TINY, train_config, untrained
from PIL import Image

from capsrun import compose
from capsrun.commands.eval import folder_name
from capsrun.commands.perturb import perturbed, sweep_values
from capsrun.commands.train import train
from capsrun.config import EvalConfig, PerturbConfig
from capsrun.data.own_image import read_image
from capsrun.errors import UserError, notices
from capsrun.report import figures
from capsrun.runs.checkpoint import load_checkpoint, read_checkpoint
from capsrun.settings import from_dict


def evaluate(printed, run, out, *overrides):
    common = ["eval", "dataset=mnist5k", f"checkpoint={run}", f"out_dir={out}"]
    return printed(*common, *overrides), json.loads((out / "result.json").read_text())


# eval


def test_eval_gives_the_error_that_training_reported(tiny_run, tmp_path, printed):
    lines, result = evaluate(printed, tiny_run, tmp_path)
    trained = json.loads((tiny_run / "result.json").read_text())
    for key in ("errors", "count", "error_percent", "confusion", "reconstruction_squared_error"):
        assert result[key] == trained[key], key
    assert lines[-1] == (
        f"test error {result['error_percent']:.2f} % ({result['errors']:,} of 1,000)"
    )
    table = [line.split() for line in lines if line.split()[:1] == ["3"]]
    assert table[0][1] == "100"
    assert int(table[0][2]) == result["errors_by_class"]["3"]
    assert (result["command"], result["split"], result["mask"]) == ("eval", "test", "label")
    assert result["trained"]["routing"]["iterations"] == 3
    pictures = tmp_path / "pictures"
    names = {path.stem for path in pictures.glob("*.png")}
    assert names == {"confusion", "reconstructions", "failures", "routing_0"}

    # Another evaluation there replaces the pictures, those of TensorBoard too.
    width = Image.open(pictures / "failures.png").width
    (pictures / "absent.png").write_bytes(b"of another data set")
    _, again = evaluate(printed, tiny_run, tmp_path, "mask=longest", "pictures=5")
    assert again["errors"] == result["errors"]
    assert again["reconstruction_squared_error"] != result["reconstruction_squared_error"]
    assert {path.stem for path in pictures.glob("*.png")} == names
    assert Image.open(pictures / "failures.png").width < width
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.fixture(scope="module")
def held_out_run(tmp_path_factory):
    """A run with validation images and averaged weights; returns its folder and scores."""
    run = tmp_path_factory.mktemp("held") / "seed0"
    config = train_config(*TINY, "recipe.average=0.8", "dataset.validation=200")
    return run, train(config, run)["scores"]


def test_splits_and_averaged_weights(held_out_run, tmp_path, printed, refused):
    """Averaged weights are tested apart, with the numbers that training found for them."""
    run, scores = held_out_run
    held = ["dataset.validation=200", "routing_images=[]"]
    for weights, name in (("last", "test"), ("averaged", "test_averaged")):
        _, result = evaluate(printed, run, tmp_path / name, *held, f"weights={weights}")
        assert result["errors"] == scores[name]["errors"]
    last, averaged = (load_checkpoint(run, averaged=a).model.state_dict() for a in (False, True))
    assert not torch.equal(last["conv1.weight"], averaged["conv1.weight"])
    for split, count in (("validation", 200), ("train", 3800)):
        _, result = evaluate(printed, run, tmp_path / split, f"split={split}", *held)
        assert result["count"] == count
    common = ["eval", "dataset=mnist5k", f"checkpoint={run}"]
    assert "dataset.validation=200" in refused(*common, "split=validation")
    assert "dataset.split_seed=0" in refused(*common, "dataset.split_seed=1")


def test_commands_write_beside_the_default_checkpoint(tiny_run, in_tmp, printed, refused):
    run = in_tmp / "runs" / "mnist5k-capsnet-quick" / "seed0"
    shutil.copytree(tiny_run, run)
    lines = printed("eval", "dataset=mnist5k", "images=70")
    folder = run / "eval-mnist5k-test-first70"
    assert json.loads((folder / "result.json").read_text())["count"] == 70
    assert f"page: {folder.relative_to(in_tmp) / 'index.html'}" in lines
    assert lines[-1].endswith(" of 70)")
    lines = printed("perturb", "dataset=mnist5k", "perturb.digit=5")
    assert (in_tmp / lines[0]).exists()
    assert "images is 0" in refused("eval", "dataset=mnist5k", "images=0")


@pytest.mark.parametrize(
    ("overrides", "name", "said"),
    [
        ([], "eval-multimnist-test", None),
        (["mask=longest", "images=70"], "eval-multimnist-test-first70-longest", None),
        (["weights=averaged", "dataset.test=all"], "eval-multimnist-test-all-averaged", None),
        (["dataset.split_seed=7"], "eval-multimnist-test-split_seed-7", "split_seed=0, tested"),
        (["dataset=mnist", "dataset.shift_px=0"], "eval-mnist-test", None),
    ],
)
def test_what_is_tested_otherwise_has_its_own_folder(overrides, name, said):
    notices.clear()
    trained = train_config("dataset=multimnist")
    config = from_dict(EvalConfig, compose.compose("eval", ["dataset=multimnist", *overrides]))
    assert folder_name(config, trained, []) == name
    assert bool(notices) == bool(said)
    assert said is None or said in notices[0]
    ensemble = {folder_name(config, trained, [tiny]) for tiny in (MNIST_DIR, MNIST_DIR / "other")}
    assert len(ensemble) == 2
    assert all(folder.startswith(f"{name}-ensemble2-") for folder in ensemble)


def test_eval_says_when_a_run_is_not_finished(tiny_run, tmp_path, printed):
    checkpoint = read_checkpoint(tiny_run / "checkpoint.pt")
    checkpoint["optimizer"] = {}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    lines, result = evaluate(printed, tmp_path, tmp_path / "out", "images=50")
    assert any("not finished" in line for line in lines)
    assert (result["finished"], result["steps"]) == (False, 12)


@pytest.mark.slow
@pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")
def test_mnist_in_one_epoch(in_tmp, monkeypatch, printed):
    """The first milestone on the way to the paper's error: under 2 % after one epoch."""
    monkeypatch.setenv("CAPSRUN_DATA", str(MNIST_DIR))
    printed("train", "dataset=mnist", "recipe.epochs=1", "name=one")
    result = json.loads((in_tmp / "runs" / "one" / "seed0" / "result.json").read_text())
    assert result["error_percent"] < 2
    assert result["count"] == 10_000


# what cannot be used


def test_checkpoints_that_do_not_fit_are_refused(tiny_run, tmp_path, refused):
    message = refused("eval", f"checkpoint={tiny_run}", "dataset.image_px=40")
    assert "1×28×28" in message
    assert "40×40" in message
    path = tmp_path / "checkpoint.pt"
    path.write_bytes((tiny_run / "checkpoint.pt").read_bytes()[:-5000])
    for command in ("eval", "perturb"):
        assert "cut short" in refused(command, f"checkpoint={path}")
    assert list(tmp_path.iterdir()) == [path]
    # The digits of mnist5k are training digits of MNIST.
    untrained(path, *TINY, "dataset=mnist")
    message = refused("eval", "dataset=mnist5k", f"checkpoint={path}")
    assert "training images of mnist" in message
    cnn = ["model=cnn_affnist", "model.channels=[4,4,4]", "model.hidden=[8]"]
    for overrides, part in (
        (["model.reconstruction=false"], "has no decoder"),
        (cnn, "no capsules to look into"),
    ):
        untrained(path, "dataset=mnist5k", *overrides)
        for command in ("perturb", "explore"):
            assert part in refused(command, "dataset=mnist5k", f"checkpoint={path}")


def test_folders_that_cannot_be_written_to(tiny_run, in_tmp, refused):
    (in_tmp / "file").write_text("")
    before = (tiny_run / "result.json").read_bytes()
    for command, *source in (
        ("eval", f"checkpoint={tiny_run}"),
        ("perturb", f"checkpoint={tiny_run}"),
        ("data",),
        ("train", "runs_dir=file/out"),
    ):
        common = [command, "dataset=mnist5k", *source]
        message = refused(*common, *["out_dir=file/out"] * (command != "train"))
        assert "file/out" in message
        assert "cannot be written" in message
        if command in ("eval", "perturb"):
            assert "training run" in refused(*common, f"out_dir={tiny_run}")
    assert (tiny_run / "result.json").read_bytes() == before
    assert (in_tmp / "file").read_text() == ""


# perturb


def perturb(printed, run, out, *overrides):
    common = ["perturb", "dataset=mnist5k", f"checkpoint={run}", f"out_dir={out}"]
    return printed(*common, *overrides), sorted((out / "pictures").glob("*.png"))


def test_perturb_draws_every_class_or_one_image(tiny_run, tmp_path, printed):
    _, pictures = perturb(printed, tiny_run, tmp_path / "all", "perturb.step=0.25")
    digits = [f"digit_{digit}" for digit in range(10)]
    assert [path.stem for path in pictures] == ["all_classes", *digits]
    assert len(list((tmp_path / "all" / "tensorboard").iterdir())) == 10
    few = ["perturb.digit=5", "perturb.index=42"]
    _, pictures = perturb(printed, tiny_run, tmp_path / "one", *few)
    assert [path.stem for path in pictures] == ["digit_5_index_42"]
    # 16 dimensions and a row for the input, 11 values, 28 pixels drawn twice as large.
    width, height = Image.open(pictures[0]).size
    assert width > 11 * 56
    assert height > 17 * 56


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["perturb.digit=10"], "classes are 0 to 9"),
        (["perturb.digit=5", "perturb.index=100"], "only 100 test images"),
        (["perturb.low=0.3"], "low may not be above high"),
        (["perturb.step=0"], "perturb.step is 0"),
        (["perturb.step=0.0001"], "more than 101 values"),
        (["perturb.image=none.png"], "no image none.png"),
        (["perturb.image=text.png"], "cannot be read as an image"),
        (["perturb.image=text.png", "perturb.index=1"], "leave it out"),
    ],
)
def test_perturb_refuses_what_it_cannot_draw(tiny_run, in_tmp, overrides, message, refused):
    (in_tmp / "text.png").write_text("this is no image")
    common = ["perturb", "dataset=mnist5k", f"checkpoint={tiny_run}", "out_dir=out"]
    assert message in refused(*common, *overrides)
    assert not (in_tmp / "out").exists()


def test_values_of_the_paper():
    def values(*overrides: str) -> list[float]:
        return sweep_values(from_dict(PerturbConfig, compose.compose("perturb", overrides)).perturb)

    expected = [-0.25, -0.2, -0.15, -0.1, -0.05, 0, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert values() == pytest.approx(expected)
    assert values("perturb.low=0.0", "perturb.high=0.0") == [0.0]
    assert values("perturb.low=0.0", "perturb.step=0.1") == pytest.approx([0, 0.1, 0.2])


def test_one_dimension_of_one_capsule_is_moved(tiny_run):
    model = load_checkpoint(tiny_run / "checkpoint.pt").model
    image = torch.rand(1, 28, 28)
    drawn = perturbed(model, image, 7, [-0.1, 0.0, 0.2])
    assert drawn.shape == (16, 3, 1, 28, 28)
    with torch.inference_mode():
        capsules = model.encode(image[None])
        label = torch.tensor([7])
        plain = model.decode(capsules, label)[0]
        moved = capsules.clone()
        moved[0, 7, 4] += 0.2
        torch.testing.assert_close(drawn[4, 2], model.decode(moved, label)[0])
        for dimension in range(16):
            torch.testing.assert_close(drawn[dimension, 1], plain)
    assert not torch.allclose(drawn[4, 2], plain)


def test_perturb_ones_own_image(tiny_run, tmp_path, printed):
    path = picture(tmp_path / "mine.png", (90, 120), 250, 10)
    lines, pictures = perturb(printed, tiny_run, tmp_path / "out", f"perturb.image={path}")
    said = "\n".join(lines)
    assert "padded to a square and resized from 90×120 to 28×28" in said
    assert "inverted" in said
    assert "looks most like class" in said
    assert len(pictures) == 1
    perturb(printed, tiny_run, tmp_path / "as3", f"perturb.image={path}", "perturb.digit=3")
    assert len(list((tmp_path / "as3" / "pictures").glob("mine-*_as_3.png"))) == 1


# an image of one's own


def picture(path, size, background, ink, mode="L"):
    """A bar on a plain background."""
    width, height = size
    pixels = np.full((height, width), background, dtype=np.uint8)
    pixels[height // 4 : -height // 4, width * 2 // 5 : width * 3 // 5] = ink
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.mark.parametrize("size", [(28, 28), (56, 56), (100, 60), (10, 20)])
def test_an_image_is_taken_as_it_is_or_resized(tmp_path, size):
    path = picture(tmp_path / "a.png", size, 0, 255)
    pixels, remarks = read_image(path, 28, 1, "auto")
    assert pixels.shape == (1, 28, 28)
    assert pixels[0, 14, 14] == pytest.approx(1, abs=0.01)
    assert pixels[0, 0].max() == 0
    same = size == (28, 28)
    pad = "padded to a square and " if size[0] != size[1] else ""
    assert remarks == ([] if same else [f"{pad}resized from {size[0]}×{size[1]} to 28×28 pixels"])
    if same:
        assert torch.equal(pixels[0] * 255, torch.from_numpy(np.array(Image.open(path))).float())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_dark_ink_on_light_paper_is_inverted_and_said(tmp_path, mode):
    path = picture(tmp_path / "a.png", (28, 28), 255, 0, mode if mode != "I;16" else "L")
    if mode == "I;16":
        Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 257).save(path)
    pixels, remarks = read_image(path, 28, 1, "auto")
    assert any("inverted" in remark for remark in remarks)
    assert pixels[0, 14, 14] == 1
    assert pixels[0, 0, 0] == 0
    kept, remarks = read_image(path, 28, 1, "false")
    assert not any("inverted" in remark for remark in remarks)
    torch.testing.assert_close(kept, 1 - pixels)


def test_transparent_colour_and_turned_images(tmp_path):
    pixels = np.zeros((28, 28, 4), dtype=np.uint8)
    pixels[10:18, 10:18] = [0, 0, 0, 255]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    drawn, remarks = read_image(tmp_path / "a.png", 28, 1, "auto")
    assert "transparent" in remarks[0]
    assert drawn[0, 14, 14] == 1
    assert drawn[0, 2, 2] == 0

    Image.new("RGB", (28, 28), (255, 0, 0)).save(tmp_path / "a.png")
    drawn, _ = read_image(tmp_path / "a.png", 28, 3, "false")
    assert drawn[:, 5, 5].tolist() == [1, 0, 0]

    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[2:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a photo to be shown turned by 90° to the right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    drawn, _ = read_image(tmp_path / "a.jpg", 28, 1, "false")
    assert drawn[0, 14, 22:26].min() > 0.9
    assert drawn[0, 4, :20].max() < 0.1


def test_images_that_cannot_be_used_are_refused(tmp_path):
    def refuses(path, message, channels=1):
        with pytest.raises(UserError, match=message):
            read_image(path, 28, channels, "auto")

    path = tmp_path / "a.tiff"
    for content in (b"", b"\x89PNG\r\n\x1a\n" + b"\x00" * 50):
        path.write_bytes(content)
        refuses(path, "cannot be read as an image")
    Image.fromarray(np.ones((28, 28), dtype=np.float32)).save(path)
    refuses(path, "no known range")
    Image.new("1", (8193, 1)).save(path)
    refuses(path, "make it smaller")
    refuses(tmp_path, "is no image file")
    refuses(path, "not of images of 2 channels", channels=2)


# data


def test_data_prints_counts_and_checksums_and_draws_a_sheet(in_tmp, printed):
    lines = printed("data", "dataset=mnist5k")
    assert any(line.split() == ["7", "400", "100"] for line in lines)
    assert any(line.split() == ["images", "4,000", "1,000"] for line in lines)
    assert "MD5 d333f117366df9ee9442b60573c29a69 (verified)" in lines[0]
    sheet = in_tmp / "runs" / "data-mnist5k" / "contact_sheet.png"
    assert lines[-2] == f"contact sheet: {sheet.relative_to(in_tmp)}"
    assert Image.open(sheet).width > 20 * 56


def test_image_grid_puts_every_image_in_its_place():
    """Each image has its own grey; the picture shows them in rows and columns."""
    images = [[torch.full((1, 8, 8), (3 * r + c) / 10) for c in range(3)] for r in range(2)]
    figure = figures.image_grid([("a", images[0]), ("b", images[1][:2])], ["x", "y", "z"])
    canvas = figure.axes[0].images[0].get_array()
    assert canvas.shape == (18, 28, 3)
    assert canvas[4, 24, 0] == pytest.approx(0.2)
    assert canvas[14, 4, 0] == pytest.approx(0.3)
    assert canvas[14, 24, 0] == 1, "a row that is shorter ends in white"
