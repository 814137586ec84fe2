"""Eval, perturb and data on real digits, as a user runs them."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, TINY, train_config, untrained
from PIL import Image, ImageDraw
from scipy import ndimage

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
    assert (in_tmp / lines[1]).exists()
    assert "images is 0" in refused("eval", "dataset=mnist5k", "images=0")


def test_an_ensemble_is_of_several_models(tiny_run, refused, in_tmp):
    words = ["eval", "dataset=mnist5k", f"checkpoint={tiny_run}"]
    assert "one of them is named twice" in refused(*words, f"ensemble=['{tiny_run}/checkpoint.pt']")


@pytest.mark.parametrize(
    ("overrides", "name", "said"),
    [
        ([], "eval-multimnist-test", None),
        (["mask=longest", "images=70"], "eval-multimnist-test-first70-longest", None),
        (["weights=averaged", "dataset.test=all"], "eval-multimnist-test-all-averaged", None),
        (["dataset.split_seed=7"], "eval-multimnist-test-split_seed-7", "split_seed=0, tested"),
        (["dataset=mnist", "dataset.shift_px=0"], "eval-mnist-test", None),
        # Whose test images are moved too, by more or less than is usual for them.
        (["dataset=mnist_padded"], "eval-mnist_padded-test", None),
        (
            ["dataset=mnist_padded", "dataset.shift_px=0"],
            "eval-mnist_padded-test-shift_px-0",
            None,
        ),
        (
            ["dataset=mnist", "split=validation", "dataset.validation=200"],
            "eval-mnist-validation-validation-200",
            None,
        ),
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
    assert "resized from 90×120 to 28×28 pixels: its ink, 20 pixels long" in said
    assert "inverted" in said
    assert "looks most like class" in said
    assert len(pictures) == 1
    perturb(printed, tiny_run, tmp_path / "as3", f"perturb.image={path}", "perturb.digit=3")
    assert len(list((tmp_path / "as3" / "pictures").glob("mine-*_as_3.png"))) == 1


# an image of one's own


def read(path, invert="auto", *overrides):
    return read_image(path, train_config(*overrides).dataset, invert)


def picture(path, size, background, ink, mode="L"):
    """A bar on a plain background."""
    width, height = size
    pixels = np.full((height, width), background, dtype=np.uint8)
    pixels[height // 4 : -height // 4, width * 2 // 5 : width * 3 // 5] = ink
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28), np.uint8)
    pixels[[0, -1]] = pixels[:, [0, -1]] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for invert in ("auto", "false"):
        read_in, remarks = read(tmp_path / "a.png", invert)
        assert torch.equal(read_in, torch.from_numpy(pixels)[None] / 255)
        assert remarks == []


@pytest.mark.parametrize("size", [(56, 56), (100, 60), (10, 20)])
@pytest.mark.parametrize("invert", ["auto", "false"])
def test_an_image_of_another_size_is_resized(tmp_path, size, invert):
    path = picture(tmp_path / "a.png", size, 0, 255)
    pixels, remarks = read(path, invert)
    assert pixels.shape == (1, 28, 28)
    assert pixels[0, 14, 14] == pytest.approx(1, abs=0.01)
    assert pixels[0, 0].max() == 0
    said = f"resized from {size[0]}×{size[1]} to 28×28 pixels"
    if invert == "auto":
        said += ": its ink, 20 pixels long, centred by its mass"
    elif size[0] != size[1]:
        said = f"padded to a square and {said}"
    assert remarks == [said]


def five(side, line):
    """A five (H, W), its ink 1, drawn with lines of this width in a field of this size."""
    canvas = Image.new("L", (side, side))
    draw = ImageDraw.Draw(canvas)
    points = [(0.7, 0.15), (0.35, 0.15), (0.3, 0.45)]
    draw.line([(x * side, y * side) for x, y in points], 255, line, joint="curve")
    box = [0.25 * side, 0.42 * side, 0.72 * side, 0.88 * side]
    draw.arc(box, 235, 150, 255, line)
    return np.array(canvas, np.float32) / 255


def on_paper(shape, place, ink, paper, noise=0.0):
    """A five of 120 pixels somewhere on paper. paper: its shade, one for all or of each pixel."""
    drawn = np.zeros(shape, np.float32)
    top, left = place
    drawn[top : top + 120, left : left + 120] = five(120, 12)
    drawn = ndimage.gaussian_filter(drawn, 1)
    noisy = np.random.default_rng(0).normal(0, noise, shape)
    return (drawn * ink + (1 - drawn) * paper + noisy).clip(0, 255).astype(np.uint8)


SLOPE = np.linspace(230, 130, 300, dtype=np.float32)
PHOTOS = {
    "white": on_paper((300, 300), (90, 90), 0, 255),
    "black": on_paper((300, 300), (90, 90), 255, 0),
    "wide, at the left": on_paper((150, 600), (10, 10), 0, 255),
    "small on a large page": on_paper((900, 700), (700, 40), 40, 240, 3),
    "grey": on_paper((300, 300), (90, 90), 40, 170, 4),
    "dark grey": on_paper((300, 300), (90, 90), 20, 110, 2),
    "a board": on_paper((300, 300), (90, 90), 210, 60, 4),
    "lit from one side": on_paper((300, 300), (150, 20), 30, SLOPE, 3),
    "lit from above": on_paper((300, 300), (150, 150), 30, SLOPE[:, None], 3),
    "on a dark table": np.pad(on_paper((300, 300), (90, 90), 40, 220, 3), 60, constant_values=50),
    "on a light table": np.pad(on_paper((300, 300), (90, 90), 230, 40, 3), 60, constant_values=220),
    "cut tightly": 255 - (255 * five(400, 40)[40:360, 90:300]).astype(np.uint8),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_a_digit_on_paper_is_made_as_mnist_was(tmp_path, name):
    """Cropped to the ink, 20 pixels long, its centre of mass in the middle, whatever is around."""
    Image.fromarray(PHOTOS[name]).save(tmp_path / "a.png")
    pixels, _ = read(tmp_path / "a.png")
    rows = (pixels[0] > 0.4).any(1).nonzero()
    assert 19 <= int(rows.max() - rows.min()) + 1 <= 20
    assert float(pixels.max()) > 0.9
    for centre in ndimage.center_of_mass(pixels[0].numpy()):
        assert centre == pytest.approx(13.5, abs=0.6)
    Image.fromarray(PHOTOS["white"]).save(tmp_path / "clean.png")
    clean, _ = read(tmp_path / "clean.png")
    assert float(pixels.sum()) == pytest.approx(float(clean.sum()), rel=0.1), "no haze, no shadow"


def test_two_digits_are_not_made_as_small_as_one(tmp_path):
    Image.fromarray(PHOTOS["white"]).save(tmp_path / "a.png")
    pixels, remarks = read(tmp_path / "a.png", "auto", "dataset=multimnist")
    assert pixels.shape == (1, 36, 36)
    assert "its ink, 24 pixels long" in remarks[-1]


def test_clothes_keep_their_shades_and_lose_their_background(tmp_path):
    pixels = np.full((60, 60), 200, np.uint8)
    pixels[20:40, 10:30], pixels[20:40, 30:50] = 0, 100
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown, remarks = read(tmp_path / "a.png", "auto", "dataset=fashion_mnist")
    assert shown[0, 14, 8] == pytest.approx(1)
    assert shown[0, 14, 19] == pytest.approx(0.5)
    assert shown[0, 2, 2] == 0
    assert any("background taken away" in remark for remark in remarks)


@pytest.mark.parametrize("dataset", ["cifar10", "svhn"])
def test_photographs_stay_as_they_are(tmp_path, dataset):
    pixels = np.full((50, 50, 3), (200, 220, 240), np.uint8)
    pixels[20:30, 20:30] = (90, 40, 30)
    Image.fromarray(pixels).save(tmp_path / "sky.png")
    shown, remarks = read(tmp_path / "sky.png", "auto", f"dataset={dataset}")
    side = shown.shape[-1]
    assert remarks == [f"resized from 50×50 to {side}×{side} pixels"]
    torch.testing.assert_close(255 * shown[:, 2, 2], torch.tensor([200.0, 220, 240]))
    inverted, remarks = read(tmp_path / "sky.png", "true", f"dataset={dataset}")
    torch.testing.assert_close(inverted, 1 - shown)
    assert "inverted" in remarks[0]


@pytest.mark.parametrize("size", [(28, 28), (200, 150), (1, 1)])
@pytest.mark.parametrize("colour", ["white", "black", "grey", (0, 0, 0, 0), (255, 255, 255, 0)])
@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_an_image_without_ink_is_refused(tmp_path, size, colour, dataset):
    Image.new("RGBA", size, colour).save(tmp_path / "a.png")
    for invert in ("auto", "true", "false"):
        with pytest.raises(UserError, match=r"there is no ink in .*a\.png"):
            read(tmp_path / "a.png", invert, f"dataset={dataset}")


def test_noise_is_no_ink_and_light_ink_is_not_dark(tmp_path):
    noise = np.random.default_rng(0).normal(200, 3, (150, 150)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.jpg")
    Image.fromarray(PHOTOS["black"]).save(tmp_path / "light.png")
    for name, invert in (("a.jpg", "auto"), ("light.png", "true")):
        with pytest.raises(UserError, match="there is no ink"):
            read(tmp_path / name, invert)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "I;16"])
def test_dark_ink_on_light_paper_is_inverted_and_said(tmp_path, mode):
    path = picture(tmp_path / "a.png", (28, 28), 255, 0, mode if mode != "I;16" else "L")
    if mode == "I;16":
        Image.fromarray(np.array(Image.open(path)).astype(np.uint16) * 257).save(path)
    pixels, remarks = read(path)
    assert any("inverted" in remark for remark in remarks)
    assert pixels[0, 14, 14] == 1
    assert pixels[0, 0, 0] == 0
    kept, remarks = read(path, "false")
    assert not any("inverted" in remark for remark in remarks)
    torch.testing.assert_close(kept, 1 - pixels)


@pytest.mark.parametrize("size", [28, 100])
@pytest.mark.parametrize(("ink", "paper"), [(0, "white"), (60, "white"), (255, "black")])
def test_transparent_paper_is_not_of_the_colour_of_the_ink(tmp_path, size, ink, paper):
    # What cannot be seen has a colour too.
    pixels = np.full((size, size, 4), (ink, ink, ink, 0), dtype=np.uint8)
    third = size // 3
    pixels[third:-third, third:-third, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    drawn, remarks = read(tmp_path / "a.png")
    assert remarks[0] == f"transparent parts taken as {paper} paper"
    assert drawn[0, 14, 14] > 0.7
    assert drawn[0, 2, 2] == 0


def test_an_opaque_image_has_no_transparent_parts(tmp_path):
    path = picture(tmp_path / "a.png", (28, 28), 0, 255, "RGBA")
    assert read(path)[1] == []


def test_coloured_and_turned_images(tmp_path):
    pixels = np.zeros((24, 24, 3), dtype=np.uint8)
    pixels[:, 2:] = [255, 0, 0]
    Image.fromarray(pixels).save(tmp_path / "a.png")
    drawn, _ = read(tmp_path / "a.png", "false", "dataset=cifar10")
    assert drawn[:, 5, 5].tolist() == [1, 0, 0]

    pixels = np.zeros((28, 28), dtype=np.uint8)
    pixels[2:6] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # a photo to be shown turned by 90° to the right
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    drawn, _ = read(tmp_path / "a.jpg", "false")
    assert drawn[0, 14, 22:26].min() > 0.9
    assert drawn[0, 4, :20].max() < 0.1


def test_images_that_cannot_be_used_are_refused(tmp_path):
    def refuses(path, message, dataset="mnist"):
        with pytest.raises(UserError, match=message):
            read(path, "auto", f"dataset={dataset}")

    path = tmp_path / "a.tiff"
    for content in (b"", b"\x89PNG\r\n\x1a\n" + b"\x00" * 50):
        path.write_bytes(content)
        refuses(path, "cannot be read as an image")
    Image.fromarray(np.ones((28, 28), dtype=np.float32)).save(path)
    refuses(path, "no known range")
    Image.new("1", (8193, 1)).save(path)
    refuses(path, "make it smaller")
    refuses(tmp_path, "is no image file")
    refuses(path, "not of images of 2 channels", "smallnorb")


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
