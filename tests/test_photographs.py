"""Photographs of handwritten digits, made of MNIST's test digits, and what is read in them."""

import numpy as np
import pytest
import torch
from conftest import MNIST_DIR, load_data, train_config
from PIL import Image, features
from scipy import ndimage

from capsrun.data.own_image import read_image
from capsrun.errors import UserError
from capsrun.names import packaged
from capsrun.runs.checkpoint import load_checkpoint

MODEL = packaged()
KINDS = (
    *("grain", "shade", "turned", "ruled", "squared"),
    *("corner", "table", "pencil", "marker", "ballpoint"),
)
# How the pixels lie in a file of each EXIF orientation, of a picture that is upright when shown.
TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
needs_mnist = pytest.mark.skipif(not MNIST_DIR.is_dir(), reason=f"no MNIST in {MNIST_DIR}")

Field = np.ndarray
"""Of a photograph: (H, W), or (H, W, 3) for colours, from 0 to 255 or a share from 0 to 1."""

BLACK, GREY, BLUE, RED = (35, 35, 40), (105, 105, 108), (40, 55, 140), (165, 40, 50)
WHITE, CREAM, GREY_PAPER = (235, 235, 232), (240, 228, 196), (150, 150, 150)


def stroke_of(digit: Field, px: int, widened: float = 0.0, pen_px: float | None = None) -> Field:
    """The ink (H, W) of a digit of MNIST, px long, its edges smooth, as a pen leaves it.

    widened: by what share of its own width. pen_px: how wide its lines are instead.
    """
    scale = px / 20
    large = ndimage.zoom(np.pad(digit.astype(np.float32), 4) / 255, scale, order=3)
    inside = ndimage.gaussian_filter(large, 0.45 * scale) > 0.42
    depth = ndimage.distance_transform_edt(inside)
    half = ndimage.maximum_filter(depth, size=round(3 * scale))  # of the width there
    if pen_px is not None:
        middle = ndimage.gaussian_filter(depth, 0.2 * scale) > 0.65 * half
        edge = pen_px / 2 - ndimage.distance_transform_edt(~(middle & inside))
    else:
        outside = ndimage.distance_transform_edt(~inside)
        edge = depth - outside + widened * np.minimum(half, np.median(half[inside]))
    ink = (0.5 + edge).clip(0, 1)
    rows, columns = ndimage.find_objects((ink > 0.5).astype(int))[0]
    return ink[rows, columns]


def placed(ink: Field, shape: tuple[int, int], rng: np.random.Generator, margin: int = 25) -> Field:
    """The ink anywhere in a field of this shape."""
    field = np.zeros(shape, np.float32)
    top, left = (
        int(rng.integers(margin, max(margin + 1, whole - part - margin)))
        for whole, part in zip(shape, ink.shape)
    )
    field[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return field


def grained(shape: tuple[int, int], rng: np.random.Generator, sigma: float, px: float) -> Field:
    """Noise of this standard deviation, its grains px wide."""
    noise = ndimage.gaussian_filter(rng.normal(0, 1, shape), px)
    return (noise * (sigma / noise.std())).astype(np.float32)


def light(shape: tuple[int, int], rng: np.random.Generator, darkest: float) -> Field:
    """What share of the light falls where: a gradient, and the soft edge of a shadow."""
    y, x = np.mgrid[: shape[0], : shape[1]] / max(shape)
    angle, shadow_angle = rng.uniform(0, 2 * np.pi, 2)
    slope = np.cos(angle) * x + np.sin(angle) * y
    slope = (slope - slope.min()) / np.ptp(slope)
    distance = np.cos(shadow_angle) * (x - 0.4) + np.sin(shadow_angle) * (y - 0.4)
    shadow = 1 / (1 + np.exp(-distance / rng.uniform(0.01, 0.08)))
    return (darkest + (1 - darkest) * slope) * (1 - rng.uniform(0, 0.4) * shadow)


def lines(shape: tuple[int, int], rng: np.random.Generator, squared: bool) -> Field:
    """The lines of a notebook, a little askew."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    tilt, spacing = np.deg2rad(rng.uniform(-3, 3)), rng.uniform(24, 60)
    ruled = np.zeros(shape, np.float32)
    for along, across in ((y, x), (x, -y))[: 1 + squared]:
        where = along * np.cos(tilt) + across * np.sin(tilt) + rng.uniform(0, spacing)
        distance = np.abs((where + spacing / 2) % spacing - spacing / 2)
        ruled = np.maximum(ruled, (rng.uniform(1.2, 1.9) - distance).clip(0, 1))
    return ruled * rng.uniform(0.5, 1)


def inked(paper: Field, ink: Field, colour: tuple[int, int, int]) -> Field:
    """Paper (H, W, 3) with ink of this colour."""
    return paper + ink[..., None] * (np.array(colour) - paper)


def sheet_on_table(sheet: Field, rng: np.random.Generator) -> Field:
    """A sheet (H, W, 3), turned a little, on a dark table with a grain."""
    angle = rng.uniform(-12, 12)
    cover = ndimage.rotate(np.ones(sheet.shape[:2], np.float32), angle, order=1)
    turned = ndimage.rotate(sheet, angle, axes=(0, 1), order=1)
    margins = [tuple(rng.integers(5, 120, 2)) for _ in "yx"]
    cover = np.pad(cover, margins)[..., None].clip(0, 1)
    turned = np.pad(turned, [*margins, (0, 0)])
    grain = ndimage.uniform_filter1d(grained(cover.shape[:2], rng, 1, 1.5), 25, axis=1)
    grain *= rng.uniform(3, 12) / grain.std()
    colour = np.array(((45, 42, 40), (70, 48, 32), (100, 74, 50))[rng.integers(3)])
    return turned * (cover > 0) + (1 - cover) * (colour + grain[..., None])


def photograph(kind: str, digit: Field, rng: np.random.Generator) -> Image.Image:
    """A photograph of a digit of MNIST (28, 28), as it is upright."""
    shape = (int(rng.integers(380, 620)), int(rng.integers(380, 620)))
    px = int(rng.integers(120, 260))
    paper_colour, colour, strength = WHITE, (BLACK, BLUE)[rng.integers(2)], 0.9
    widened, pen_px, noise, darkest = rng.uniform(-0.3, 0.2), None, 3.0, 0.9
    if "corner" in kind:
        shape, px = (900, 1200), int(rng.integers(55, 75))
    if "grain" in kind:
        noise = rng.uniform(7, 14)
    if "shade" in kind:
        paper_colour = (WHITE, GREY_PAPER)[rng.integers(2)]
        darkest = rng.uniform(0.4, 0.6)
    if "pencil" in kind:
        colour, strength, pen_px = GREY, rng.uniform(0.65, 1), px * rng.uniform(0.015, 0.035)
    if "marker" in kind:
        colour, widened = (BLACK, BLUE, RED)[rng.integers(3)], rng.uniform(0.4, 0.9)
    if "ballpoint" in kind:
        colour, pen_px = (BLUE, RED)[rng.integers(2)], px * rng.uniform(0.02, 0.05)
        paper_colour = CREAM
    pen_px = None if pen_px is None else max(2.0, pen_px)
    paper = np.array(paper_colour) + grained(shape, rng, 2 + noise / 3, 1.2)[..., None]
    if "ruled" in kind or "squared" in kind:
        line_colour = ((110, 140, 205), (150, 150, 155), (110, 175, 190))[rng.integers(3)]
        paper = inked(paper, lines(shape, rng, "squared" in kind), line_colour)
    ink = stroke_of(digit, px, widened, pen_px)
    if "corner" in kind:
        ink = placed(ink, (180, 200), rng)
        corner = [((0, n - m), (n - m, 0))[rng.integers(2)] for n, m in zip(shape, ink.shape)]
        ink = np.pad(ink, corner)
    else:
        ink = placed(ink, shape, rng)
    uneven = 1 - (0.3 if "pencil" in kind else 0.08) * np.abs(grained(shape, rng, 1, 1.0))
    picture = inked(paper, (ink * strength * uneven).clip(0, 1), colour)
    if "table" in kind:
        picture = sheet_on_table(picture, rng)
    picture = picture * light(picture.shape[:2], rng, darkest)[..., None]
    picture = ndimage.gaussian_filter(picture, (*2 * (rng.uniform(0.6, 1.4),), 0))
    picture += rng.normal(0, noise, picture.shape[:2])[..., None]
    picture += rng.normal(0, noise / 2, picture.shape)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def saved(picture: Image.Image, path, orientation: int = 1, **options):
    """Write a picture as a camera held like this does, its pixels turned and a tag that says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture if orientation == 1 else picture.transpose(TURNED[orientation])
    stored.save(path, exif=exif, **options)
    return path


def read(path, invert: str = "auto") -> torch.Tensor:
    """The pixels (1, 28, 28) that a network for MNIST is given."""
    return read_image(path, train_config("dataset=mnist").dataset, invert)[0]


@pytest.fixture(scope="module")
def classify():
    """What the small network sees in pixels (1, 28, 28)."""
    model = load_checkpoint(MODEL).model

    @torch.inference_mode()
    def run(pixels: torch.Tensor) -> int:
        return int(model(pixels[None]).scores_BJ.argmax())

    return run


@pytest.fixture(scope="module")
def digits():
    """MNIST's test digits (N, 28, 28) and their labels."""
    test = load_data("mnist", f"dataset.data_dir={MNIST_DIR}").test
    return test.images_NCHW[:, 0].numpy(), test.labels_N.tolist()


def five(shape: tuple[int, int] = (300, 240)) -> Image.Image:
    """A five in dark blue on grey paper."""
    ink = np.zeros(shape, np.float32)
    ink[60:72, 100:170], ink[60:140, 100:112] = 1, 1
    y, x = np.mgrid[: shape[0], : shape[1]]
    radius = np.hypot(y - 170, x - 115)
    ink[(radius > 38) & (radius < 50) & ((x > 110) | (y > 195))] = 1
    paper = np.full((*shape, 3), 190.0)
    return Image.fromarray(inked(paper, ndimage.gaussian_filter(ink, 1), BLUE).astype(np.uint8))


@needs_mnist
def test_digits_in_photographs_are_read(tmp_path, digits, classify):
    """Of ten kinds of photographs five each: what the network sees in them."""
    images, labels = digits
    wrong = []
    for kind in KINDS:
        for number in range(5):
            rng = np.random.default_rng([2, KINDS.index(kind), number])
            index = int(rng.integers(len(images)))
            orientation = int(rng.choice((3, 5, 6, 7, 8))) if kind == "turned" else 1
            picture = photograph(kind, images[index], rng)
            path = tmp_path / f"{kind}{number}.jpg"
            saved(picture, path, orientation, quality=int(rng.integers(70, 91)))
            seen = classify(read(path))
            if seen != labels[index]:
                wrong.append(f"{path.name}: {labels[index]} as {seen}")
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("orientation", TURNED)
def test_a_picture_is_read_as_it_is_shown(tmp_path, orientation):
    five().save(tmp_path / "upright.png")
    path = saved(five(), tmp_path / "a.jpg", orientation, quality=95)
    torch.testing.assert_close(read(path), read(tmp_path / "upright.png"), atol=0.1, rtol=0)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tiff", "gif", "avif"])
def test_the_format_of_a_file_makes_no_difference(tmp_path, classify, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("Pillow reads no AVIF here")
    rng = np.random.default_rng(0)
    pixels = np.asarray(five(), np.float32) + grained((300, 240), rng, 4, 1)[..., None]
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    for name in ("a.png", f"a.{suffix}"):
        picture.save(tmp_path / name)
    plain, other = (read(tmp_path / name) for name in ("a.png", f"a.{suffix}"))
    assert classify(plain) == classify(other) == 5
    assert (plain - other).abs().mean() < 0.01


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "RGBA", "1", "I;16", "12 bits"])
def test_pixels_of_any_kind_are_read(tmp_path, classify, mode):
    picture, path = five(), tmp_path / "a.tiff"
    if mode in ("I;16", "12 bits"):
        scale = 257 if mode == "I;16" else 16
        Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * scale).save(path)
    elif mode == "1":
        picture.convert("L").point(lambda value: 255 * (value > 128)).convert("1").save(path)
    else:
        picture.convert(mode).save(path if mode != "P" else tmp_path / "a.png")
        path = path if mode != "P" else tmp_path / "a.png"
    picture.save(tmp_path / "plain.png")
    assert classify(read(path)) == 5
    assert (read(path) - read(tmp_path / "plain.png")).abs().mean() < 0.02


@pytest.mark.parametrize("ink", [(250, 220, 60), (120, 235, 240), (255, 170, 190), (240, 120, 20)])
def test_ink_that_is_as_light_as_paper_is_seen_by_its_colour(tmp_path, classify, ink):
    share = 1 - (np.asarray(five(), np.float32)[..., :1] - BLUE[0]) / (190 - BLUE[0])
    pixels = (1 - share) * 245.0 + share * np.array(ink)
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    assert classify(read(tmp_path / "a.png")) == 5


@needs_mnist
@pytest.mark.parametrize("side", [56, 112, 280])
@pytest.mark.parametrize("inverted", [False, True])
def test_enlarged_digits_stay_what_they_are(tmp_path, digits, classify, side, inverted):
    images, labels = digits
    for index in range(6):
        digit = 255 - images[index] if inverted else images[index]
        Image.fromarray(digit).resize((side, side), Image.Resampling.BILINEAR).save(
            tmp_path / "a.png"
        )
        assert classify(read(tmp_path / "a.png")) == labels[index]


def test_what_else_is_in_a_picture_is_no_part_of_the_digit(tmp_path, classify):
    """A frame, specks, a table at one side: the five alone is made as MNIST's are."""
    five().save(tmp_path / "a.png")
    alone = read(tmp_path / "a.png")
    pixels = np.array(five())
    framed, specked, beside = pixels.copy(), pixels.copy(), pixels.copy()
    framed[:4] = framed[-4:] = framed[:, :4] = framed[:, -4:] = 0
    specked[20:23, 30:33] = specked[250:253, 200:203] = 30
    beside[:, :40] = 40
    for other in (framed, specked, beside):
        Image.fromarray(other).save(tmp_path / "a.png")
        torch.testing.assert_close(read(tmp_path / "a.png"), alone, atol=0.15, rtol=0)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("kind", ["grain", "shade", "table", "ballpoint", "grain shade", "corner"])
def test_paper_without_ink_is_refused(tmp_path, monkeypatch, kind, number):
    """With grain, a gradient of light and a shadow, on a table: whatever is there is no ink."""
    monkeypatch.setitem(globals(), "stroke_of", lambda *_: np.zeros((60, 40), np.float32))
    rng = np.random.default_rng(number)
    picture = photograph(kind, np.zeros((28, 28), np.uint8), rng)
    path = saved(picture, tmp_path / "a.jpg", quality=80)
    with pytest.raises(UserError, match=r"there is no ink in .*a\.jpg: nothing in it"):
        read(path)


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("number", range(3))
def test_blank_paper_with_lines_is_refused(tmp_path, number, squared):
    rng = np.random.default_rng(number)
    paper = np.full((480, 560, 3), 235.0) + grained((480, 560), rng, 3, 1)[..., None]
    ruled = inked(paper, lines((480, 560), rng, squared), (130, 155, 205))
    path = saved(Image.fromarray(ruled.clip(0, 255).astype(np.uint8)), tmp_path / "a.jpg")
    with pytest.raises(UserError, match="there is no ink"):
        read(path)


@pytest.mark.parametrize("size", [(8193, 8), (8, 8193), (12_000, 9_000), (20_000, 20_000)])
def test_huge_pictures_are_refused(tmp_path, recwarn, size):
    """The largest would be a decompression bomb: a few kilobytes that become 400 megabytes."""
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="more than 8,192 pixels on a side; make it smaller"):
        read(tmp_path / "a.png")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("brand", "advice"),
    [(b"heic", "save it as JPEG or PNG, or pip install pillow-heif"), (b"avif", "Pillow 11.3")],
)
def test_formats_of_phones_that_cannot_be_read_say_what_to_do(tmp_path, monkeypatch, brand, advice):
    monkeypatch.setattr("capsrun.data.own_image.FORMATS", ("PNG", "JPEG"))
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(UserError, match=f"cannot be read as an image.*{advice}"):
        read(tmp_path / "a.heic")
