"""`capsrun explore`: the page, in a real browser, beside what the model computes in Python."""

import base64
import io
import json
import re
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, make_model, train_config
from PIL import Image
from torch.nn import functional as F

from capsrun import compose
from capsrun.commands import explore as exploring
from capsrun.commands.explore import chosen_numbers, page_within_limit
from capsrun.commands.perturb import perturbed
from capsrun.config import ExploreConfig, ExploreSettings
from capsrun.errors import UserError
from capsrun.explorer.page import Shown, build_page, part
from capsrun.models.capsnet import CapsNet
from capsrun.report.figures import TWO_COLOURS
from capsrun.runs.checkpoint import load_drawing_model
from capsrun.settings import from_dict

GREY = 1 / 255
IMAGES = 24


def capsnet(*overrides: str, px: int = 28, channels: int = 1) -> CapsNet:
    """A CapsNet with random weights that are large enough for its pictures to differ."""
    small = ["model.conv1_channels=12", "model.primary_types=3", "model.decoder_widths=[64,96]"]
    config = train_config(*small, *overrides)
    torch.manual_seed(0)
    model = CapsNet(config.model, config.routing, px, channels).eval()
    with torch.no_grad():
        for layer in (model.conv1, model.primarycaps, *model.decoder[::2]):
            layer.weight.mul_(3)
        for parameter in model.parameters():
            parameter.copy_(parameter.half())  # what the page computes with
    return model


@torch.inference_mode()
def shown_by(model: CapsNet, digits: int = 1) -> Shown:
    """Some images of noise."""
    shape = (IMAGES, digits, model.channels, model.image_px, model.image_px)
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    targets = ((noise > 0.7) * noise * 255).round() / 255
    capsules = model.encode(targets.sum(1).clamp(max=1))
    predicted = capsules.norm(dim=2).topk(digits).indices.sort(1).values
    labels = torch.stack([torch.arange(IMAGES) % 10, torch.arange(IMAGES) % 10 + 3], 1) % 10
    return Shown(
        torch.arange(100, 100 + IMAGES),
        labels.sort(1).values[:, :digits] if digits == 2 else labels[:, :1],
        predicted,
        targets,
        capsules,
    )


def write_page(
    model: CapsNet, folder: Path, digits: int = 1, title: str = "", note: str = ""
) -> tuple[Path, Shown]:
    shown = shown_by(model, digits)
    path = folder / "page with a space.html"
    names = (*(str(k) for k in range(9)), f"nine {title}")
    path.write_text(build_page(model, shown, names, title, note))
    return path, shown


@pytest.fixture(scope="module")
def one_digit(tmp_path_factory) -> tuple[CapsNet, Path, Shown]:
    model = capsnet()
    return model, *write_page(model, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_digits(tmp_path_factory) -> tuple[CapsNet, Path, Shown]:
    model = capsnet("dataset=multimnist", px=36)
    return model, *write_page(model, tmp_path_factory.mktemp("two"), digits=2)


@pytest.fixture
def page(browser, one_digit):
    """The page for images of one digit, open."""
    with browsers.opened(browser, one_digit[1]) as page:
        yield page


def read_canvas(page, canvas: str) -> torch.Tensor:
    """The red, green and blue (3, H, W) of a canvas, in [0, 1], and what is clear as 0."""
    data = page.evaluate(f"{canvas}.toDataURL('image/png')")
    image = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGBA")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[:3] / 255


def pixels(page, name: str) -> torch.Tensor:
    """A picture of the page; see `read_canvas`."""
    return read_canvas(page, f"pictures.{name}.canvas")


def assert_drawn(page, name: str, expected: torch.Tensor, most: float = GREY) -> None:
    """Fail where a picture of the page is not what is expected (C, H, W)."""
    assert (pixels(page, name) - expected).abs().max() <= most


def wait_until(page, condition: str) -> None:
    """Playwright's own waiting evaluates strings in the page, which its policy forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    pytest.fail(f"never true: {condition}")


def vector(page) -> torch.Tensor:
    return torch.tensor(page.evaluate("Array.from(capsule(label()))"))


@torch.inference_mode()
def decoded(model: CapsNet, capsule_D: torch.Tensor, label: int) -> torch.Tensor:
    """What the Python decoder draws (C, H, W) from a capsule."""
    capsules = torch.zeros(1, model.classes, len(capsule_D))
    capsules[0, label] = capsule_D
    return model.decode(capsules, torch.tensor([label]))[0]


def set_slider(page, dimension: int, value: float) -> None:
    """Drag a slider there and let go."""
    page.locator(".slider input").nth(dimension).fill(str(value))


def choose_image(page, shown: Shown, n: int) -> None:
    page.locator(f"#classes input[value='{int(shown.labels_NT[n, 0])}']").check(force=True)
    page.locator(f"#images input[value='{n}']").check(force=True)


# what the page computes


def test_pictures_are_the_python_decoders_and_bars_the_capsules_lengths(page, one_digit):
    model, _, shown = one_digit
    values = page.locator("#lengths label > :last-child")
    for n, dimension, change in ((0, 0, 0.5), (13, 15, -0.25)):
        choose_image(page, shown, n)
        label = int(shown.predicted_NT[n, 0])
        assert torch.equal(vector(page), shown.capsules_NJD[n, label])
        own_lengths = shown.capsules_NJD[n].norm(dim=1).tolist()
        lengths = [float(text) for text in values.all_inner_texts()]
        assert lengths == pytest.approx(own_lengths, abs=0.0051)
        before = pixels(page, "output")
        set_slider(page, dimension, change)
        moved = shown.capsules_NJD[n, label].clone()
        moved[dimension] += change
        torch.testing.assert_close(vector(page), moved)
        assert_drawn(page, "output", decoded(model, moved, label))
        assert (pixels(page, "output") - before).abs().max() > 0.02  # the slider did something
        assert_drawn(page, "input", shown.targets_NTCHW[n, 0])
        length = float(values.nth(label).inner_text())
        assert length == pytest.approx(moved.norm().item(), abs=0.0051)
        # What the network itself said stays marked.
        assert page.locator("#lengths .name").nth(label).inner_text() == f"{label} (drawn, moved)"
        tick = page.locator("#lengths .own").nth(label).evaluate("(tick) => tick.style.left")
        assert float(tick.rstrip("%")) == pytest.approx(100 * own_lengths[label], abs=0.01)


FRAME = """() => {
    const taken = [];
    for (let n = 0; n < 60; n++) {
        const began = performance.now();
        move(n % D, Math.sin(n) / 2);
        render();
        taken.push(performance.now() - began);
    }
    return taken.slice(20).sort((a, b) => a - b)[20];
}"""


def test_the_committed_page_draws_what_the_committed_model_draws(browser):
    """Though the page has its weights in half precision; a frame takes less than 16 ms."""
    _, model = load_drawing_model(REPOSITORY / "results" / "capsnet-mnist.pt")
    with browsers.opened(browser, REPOSITORY / "docs" / "explorer.html") as page:
        for n in (0, 200):
            page.evaluate("(n) => choose(storedImage(n))", n)
            set_slider(page, 11, 0.25)
            label = page.evaluate("label()")
            assert_drawn(page, "output", decoded(model, vector(page), label))
        assert page.evaluate(FRAME) < 16


@pytest.mark.parametrize(
    "name", ["explorer.html", "explorer-draw.html", "explorer-multimnist.html"]
)
def test_the_committed_pages_are_made_of_the_present_files(name):
    page = (REPOSITORY / "docs" / name).read_text()
    assert len(page.encode()) < 8e6
    assert all(part(file) in page for file in ("style.css", "network.js", "explorer.js"))


@pytest.mark.parametrize(
    ("overrides", "px"),
    [
        (["routing.iterations=1", "routing.leaky=true"], 28),
        (["model.primary_scale=one", "model.digit_bias=false", "routing.iterations=5"], 28),
        (["model.padding=same"], 28),
        ([], 31),  # a row that no capsule sees
    ],
)
def test_the_encoder_in_the_page_is_the_models(browser, overrides, px, tmp_path):
    path, shown = write_page(capsnet(*overrides, px=px), tmp_path)
    with browsers.opened(browser, path) as page:
        for n in (0, 9):
            capsules = page.evaluate(
                "(n) => Array.from(drawnImage(storedImage(n).pixels).capsules)", n
            )
            difference = torch.tensor(capsules) - shown.capsules_NJD[n].flatten()
            assert difference.abs().max() < 1e-4


# what can be done there


def pull(page, dimension: int, *places: float) -> None:
    """Drag a slider with the mouse to each of these places, as parts of its width."""
    box = page.locator(".slider input").nth(dimension).bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    for place in places:
        page.mouse.move(box["x"] + place * box["width"], middle, steps=3)
    page.mouse.up()


def test_undo_redo_reset_and_another_class(page, one_digit):
    model, _, shown = one_digit
    start = vector(page)
    assert page.locator("#undo").is_disabled()
    # Each pull is one step back.
    pull(page, 1, 0.9)
    pull(page, 0, 0.7, 0.5, 0.8)
    moved = vector(page) - start
    assert moved[0] > 0.2
    assert moved[1] > 0.3
    page.click("#undo")
    moved = vector(page) - start
    assert moved[0].item() == pytest.approx(0, abs=0.03)
    assert moved[1] > 0.3
    page.click("#undo")

    set_slider(page, 0, 0.3)
    set_slider(page, 1, -0.2)
    both = vector(page)
    page.click("#undo")
    assert vector(page)[1] == start[1]
    assert vector(page)[0] == both[0]
    page.click("#redo")
    assert torch.equal(vector(page), both)
    page.click("#reset")
    assert torch.equal(vector(page), start)
    page.keyboard.press("Control+z")
    assert torch.equal(vector(page), both)
    other = (int(shown.predicted_NT[0, 0]) + 4) % 10
    page.locator(f"#lengths input[value='{other}']").check(force=True)
    assert torch.equal(vector(page), shown.capsules_NJD[0, other])
    assert_drawn(page, "output", decoded(model, shown.capsules_NJD[0, other], other))
    page.click("#undo")
    assert torch.equal(vector(page), both)


def test_images_and_sliders_with_keys(page, one_digit):
    shown = one_digit[2]
    page.keyboard.press("Tab")  # to the chosen class
    chosen = page.evaluate("document.activeElement.value")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.value") == str((int(chosen) + 1) % 10)
    page.keyboard.press("4")
    assert 4 in shown.labels_NT[page.evaluate("state.image.number")]
    page.keyboard.press("7")
    page.keyboard.press("z")  # back to an image of the other class, with its list
    before = page.evaluate("state.image.number")
    assert page.locator("#images input:checked").get_attribute("value") == str(before)
    assert page.locator("#classes input:checked").get_attribute("value") == "4"
    page.keyboard.press("]")
    assert page.evaluate("state.image.number") > before
    page.keyboard.press("[")
    assert page.evaluate("state.image.number") == before
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id"))
        if page.evaluate("document.activeElement.type") == "range":
            break
    assert {"pad", "clear", "animate", "copy", "save"} <= reached
    start = vector(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert (vector(page) - start)[0].item() == pytest.approx(0.02, abs=1e-5)
    page.keyboard.press("r")
    assert torch.equal(vector(page), start)


def test_animation_moves_and_puts_back(page):
    start, before = vector(page), pixels(page, "output")
    play = page.locator(".slider button").nth(6)
    play.click()
    wait_until(page, "Math.abs(state.moves[label() * D + 6]) > 0.1")
    assert (pixels(page, "output") - before).abs().max() > 0.01
    assert play.get_attribute("aria-pressed") == "true"
    page.click("#animate")
    assert torch.equal(vector(page), start)
    # It is not in the way of undo and redo, which end it too.
    assert page.locator("#undo").is_disabled()
    set_slider(page, 1, 0.2)
    play.click()
    page.keyboard.press("z")
    assert torch.equal(vector(page), start)
    assert page.evaluate("[past.length, future.length]") == [0, 1]
    assert page.evaluate("animation") is None


def test_the_sweep_is_figure_4_and_can_be_taken(page, one_digit):
    model, _, shown = one_digit
    choose_image(page, shown, 3)
    page.wait_for_selector("#sweep[data-done=true]")
    label = int(shown.predicted_NT[3, 0])
    values = page.evaluate("SWEEP")
    assert values == pytest.approx([n / 20 for n in range(-5, 6)])
    expected = perturbed(model, shown.targets_NTCHW[3, 0], label, values)
    drawn = [read_canvas(page, f"blocks[{number}].canvas")[0] for number in (0, 1)]
    for d, n in ((0, 0), (5, 10), (8, 3), (15, 7)):
        left, top = n * (28 + 4) + 2, d % 8 * (28 + 4) + 2
        cell = drawn[d // 8][top : top + 28, left : left + 28]
        assert (cell - expected[d, n, 0]).abs().max() <= GREY
    canvas = page.locator("#sweep canvas").nth(1)
    box = canvas.bounding_box()
    canvas.click(position={"x": 9.5 * box["width"] / 11, "y": 2.5 * box["height"] / 8})
    moved = vector(page) - shown.capsules_NJD[3, label]
    assert moved[10].item() == pytest.approx(0.2, abs=1e-6)
    assert moved.abs().sum().item() == pytest.approx(0.2, abs=1e-5)


def test_copy_and_save(browser, one_digit):
    grants = {"permissions": ["clipboard-read", "clipboard-write"]}
    with browsers.opened(browser, one_digit[1], accept_downloads=True, **grants) as page:
        set_slider(page, 4, 0.37)
        page.click("#copy")
        wait_until(page, "element('said').textContent.startsWith('Copied')")
        copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
        assert copied == pytest.approx(vector(page).tolist(), rel=1e-5)
        with page.expect_download() as download:
            page.click("#save")
        saved = Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
        assert download.value.suggested_filename.endswith(".png")
        assert saved.size == (8 * 28, 8 * 28)
        small = torch.from_numpy(np.array(saved.convert("L").resize((28, 28), 0)))
        assert torch.equal(small.long(), (pixels(page, "output")[0] * 255).round().long())


def draw(page, touch: bool) -> None:
    """A stroke on the pad, with the mouse or a finger."""
    page.locator("#pad").scroll_into_view_if_needed()
    box = page.locator("#pad").bounding_box()
    places = ((0.3, 0.2), (0.7, 0.25), (0.5, 0.6), (0.4, 0.9))
    points = [(box["x"] + f * box["width"], box["y"] + g * box["height"]) for f, g in places]
    if touch:
        client = page.context.new_cdp_session(page)
        for kind, (x, y) in zip(["touchStart", "touchMove", "touchMove", "touchMove"], points):
            event = {"type": kind, "touchPoints": [{"x": x, "y": y}]}
            client.send("Input.dispatchTouchEvent", event)
        client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    else:
        page.mouse.move(*points[0])
        page.mouse.down()
        for point in points[1:]:
            page.mouse.move(*point)
        page.mouse.up()


@pytest.mark.parametrize("touch", [False, True], ids=["mouse", "finger"])
def test_a_drawn_digit_is_encoded(browser, one_digit, touch):
    model, path, _ = one_digit
    with browsers.opened(browser, path, has_touch=touch) as page:
        draw(page, touch)
        wait_until(page, "state.image.number === null")
        image = torch.tensor(page.evaluate("Array.from(state.image.pixels)")).reshape(28, 28)
        rows, columns = (image > 0.05).any(1).nonzero(), (image > 0.05).any(0).nonzero()
        extents = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
        assert 19 <= max(extents) <= 22  # fitted into 20 × 20 pixels
        centre = (image.sum(1) / image.sum()) @ (torch.arange(28) + 0.5)
        assert centre.item() == pytest.approx(14, abs=0.3)
        with torch.inference_mode():
            expected = model.encode(image[None, None])[0]
        capsules = torch.tensor(page.evaluate("Array.from(state.image.capsules)"))
        assert (capsules - expected.flatten()).abs().max() < 1e-4
        likeliest = int(expected.norm(dim=1).argmax())
        sure = expected.norm(dim=1).max() >= 0.5
        looks = "looks like" if sure else "not sure what it is, most like"
        assert page.inner_text("#subject") == f"Your drawing: {looks} {likeliest}."
        assert_drawn(page, "output", decoded(model, expected[likeliest], likeliest), 2 * GREY)
        ink = page.evaluate("element('pad').toDataURL()")
        page.click("#clear")
        assert page.evaluate("state.image.number") == 0  # the test image from before
        page.keyboard.press("z")  # brings the drawing back, and once more takes it away
        assert page.evaluate("state.image.number") is None
        assert page.evaluate("element('pad').toDataURL()") == ink
        page.keyboard.press("z")
        assert page.evaluate("state.image.number") == 0
        assert page.evaluate("element('pad').toDataURL()") != ink


def test_a_digit_is_drawn_with_keys(page):
    page.locator("#clear").focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowUp")
    assert page.evaluate("state.image.number") is not None  # the pen is not down yet
    page.keyboard.press("Space")
    assert page.locator("#pen.down").is_visible()
    for key in ("ArrowUp", "ArrowUp", "ArrowLeft", "ArrowDown", "ArrowDown", "Space"):
        page.keyboard.press(key)
    assert page.evaluate("state.image.number") is None
    assert page.evaluate("state.image.pixels.some((value) => value > 0.5)")
    assert page.locator("#classes input:checked").count() == 0
    page.keyboard.press("Tab")
    assert not page.locator("#pen").is_visible()


# other data sets and screens


def test_no_name_breaks_the_page_and_it_says_why_there_is_no_encoder(browser, one_digit, tmp_path):
    title = "a <b> <!--<script> </script> {{data}} {{facts}} \"\\u003c & '"
    path, _ = write_page(one_digit[0], tmp_path, title=title, note=title)
    with browsers.opened(browser, path) as page:
        assert page.inner_text("header p") == title
        assert page.locator("#classes label").nth(9).inner_text() == f"nine {title}"
        assert page.locator(".slider").count() == 16
        assert not page.locator("#pad").is_visible()
        assert page.inner_text("#no-draw") == f"Digits cannot be drawn here: {title}."


def test_nothing_in_the_page_comes_from_elsewhere(one_digit):
    text = one_digit[1].read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "connect-src" not in text  # so the policy's default holds: nothing
    assert "default-src 'none'" in text


def test_two_digits_in_two_colours(browser, two_digits):
    model, path, shown = two_digits
    with browsers.opened(browser, path) as page:
        choose_image(page, shown, 6)
        a, b = shown.predicted_NT[6].tolist()
        page.locator("#which label").nth(1).click()
        set_slider(page, 2, 0.4)
        moved = shown.capsules_NJD[6].clone()
        moved[b, 2] += 0.4
        first, second = decoded(model, moved[a], a), decoded(model, moved[b], b)
        assert_drawn(page, "part0", first)
        assert_drawn(page, "part1", second)
        targets = shown.targets_NTCHW[6]
        colours = torch.tensor(TWO_COLOURS)[..., None, None]
        for name, (one, other) in (("output", (first, second)), ("digits", targets)):
            mixed = (one * colours[0] + other * colours[1]).clamp(max=1)
            assert_drawn(page, name, mixed, 2 * GREY)

        ink = targets.sum(0)[0] >= 0.3
        has_first, has_second = first[0] >= 0.3, second[0] >= 0.3
        kinds = [has_first & ~has_second, has_second & ~has_first, has_first & has_second]
        kinds.append(ink & ~has_first & ~has_second)
        total = sum(int(kind.sum()) for kind in kinds)
        text = page.inner_text("#claims")
        for kind, word in zip(kinds, ("plain", "striped", "chequered", "dotted")):
            percent = float(text.split(f"{word}) ")[1].split(" %")[0])
            assert percent == pytest.approx(100 * int(kind.sum()) / total, abs=1)
        # The bars know two digits too.
        assert page.locator("#lengths .name").nth(a).inner_text() == f"{a} (orange)"
        other = next(k for k in range(10) if k not in (a, b))
        page.locator(f"#lengths input[value='{other}']").check(force=True)
        assert page.evaluate("state.shown") == [a, other]
        # Nothing is wider than the screen.
        for width in (320, 560, 720, 820, 1300):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("channels", [2, 3])
def test_colours_and_two_cameras(browser, channels, tmp_path):
    model = capsnet(channels=channels)
    path, shown = write_page(model, tmp_path, note="no encoder")
    with browsers.opened(browser, path) as page:
        choose_image(page, shown, 2)
        label = int(shown.predicted_NT[2, 0])
        expected = decoded(model, shown.capsules_NJD[2, label], label)
        if channels == 2:
            expected = torch.cat(list(expected), dim=1).expand(3, -1, -1)
        assert_drawn(page, "output", expected)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_are_readable_in_light_and_dark(page, scheme):
    page.emulate_media(color_scheme=scheme)

    def luminance(name: str) -> float:
        """Relative luminance (WCAG 2) of a colour of the style, #rgb or #rrggbb."""
        style = "getComputedStyle(document.documentElement)"
        colour = page.evaluate(f"{style}.getPropertyValue('--{name}').trim()")
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (luminance("paper") < 0.1) == (scheme == "dark")
    pairs = [(f, b) for f in ("ink", "faint", "first", "second") for b in ("paper", "soft")]
    for front, back in [*pairs, ("on-accent", "accent")]:
        low, high = sorted((luminance(front), luminance(back)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (front, back)


@pytest.mark.parametrize(("width", "height"), [(360, 740), (568, 320)])
@pytest.mark.parametrize("digits", [1, 2])
def test_a_phone(browser, one_digit, two_digits, digits, width, height):
    path = (one_digit if digits == 1 else two_digits)[1]
    phone = {"viewport": {"width": width, "height": height}, "is_mobile": True, "has_touch": True}
    with browsers.opened(browser, path, **phone) as page:
        slider = page.locator(".slider input").nth(10)
        slider.scroll_into_view_if_needed()
        before = vector(page)
        box = slider.bounding_box()
        page.touchscreen.tap(box["x"] + 0.9 * box["width"], box["y"] + box["height"] / 2)
        assert vector(page)[10] > before[10] + 0.2
        # What the slider changes is in sight.
        picture = page.locator("#picture-output canvas").bounding_box()
        assert picture["y"] >= 0
        assert picture["y"] + picture["height"] <= height


# the command


def settings(**changes) -> ExploreSettings:
    return ExploreSettings(
        **{"images": 24, "mistakes": 12, "search": 2000, "encoder": "auto", "limit_mb": 8} | changes
    )


def built(model: CapsNet, standardised: bool = False, **changes) -> tuple[str, str]:
    """The page of a model, and why it has no encoder."""
    shown, names = shown_by(model), tuple("0123456789")
    return page_within_limit(settings(**changes), model, shown, names, "title", standardised)


def test_when_a_page_has_no_encoder():
    grey = capsnet()
    other = make_model(train_config("model=capsnet_small", "routing=self_routing"))
    another = "the page computes CapsNet with routing by agreement, which this network has not"
    for (page, reason), expected in (
        (built(grey, encoder="false"), "explore.encoder=false"),
        (built(other), another),
        (built(grey, standardised=True), "the network sees standardised images"),
        (built(capsnet(channels=3)), "only grey images can be drawn"),
    ):
        assert reason == expected
        assert 'id="encoder"' not in page


def test_the_page_stays_within_the_limit():
    grey = capsnet()
    text, reason = built(grey)
    assert reason == ""
    assert 'id="encoder"' in text
    limit = len(text.encode()) / 1e6
    assert built(grey, limit_mb=limit) == (text, "")
    shorter, reason = built(grey, limit_mb=limit - 1e-6)
    assert 'id="encoder"' not in shorter
    assert re.fullmatch("the encoder would .*B, more than explore[.]limit_mb=[0-9.]+", reason)
    with pytest.raises(UserError, match=r"more than explore\.limit_mb=0\.001; set that higher, or"):
        built(grey, limit_mb=0.001)


def test_who_asks_for_the_encoder_has_it_at_any_size():
    page, reason = built(capsnet(), encoder="true", limit_mb=0.001)
    assert reason == ""
    assert 'id="encoder"' in page
    with pytest.raises(UserError, match=r"explore\.encoder=true cannot be done: only grey images"):
        built(capsnet(channels=3), encoder="true", limit_mb=0.001)


def test_images_and_mistakes_are_chosen():
    labels = torch.arange(100)[:, None] % 10
    predicted = labels.clone()
    predicted[[50, 61, 99]] += 1
    chosen = chosen_numbers(settings(images=2, mistakes=2), labels, predicted, 10)
    assert chosen.tolist() == [*range(20), 50, 61]
    pairs = F.pad(labels, (0, 1), value=9)[:9].sort(1).values
    assert chosen_numbers(settings(images=1, mistakes=0), pairs, pairs, 10).tolist() == [*range(9)]


def test_the_command_writes_the_page_of_a_run(tiny_run, in_tmp, capsys):
    words = ["dataset=mnist5k", "explore.images=3", "explore.search=200", "out=a/page.html"]
    config = from_dict(ExploreConfig, compose.compose("explore", words))
    path = exploring.explore(config, tiny_run / "checkpoint.pt")
    facts = json.loads(path.read_text().split('id="facts">')[1].split("</script>")[0])
    assert len(facts["numbers"]) == len(facts["labels"]) >= 30
    assert facts["encoder"]["iterations"] == 3
    said = capsys.readouterr().out
    assert "digits can be drawn" in said
    assert f"{path}: " in said
    assert "open it in any browser" in said


def test_mistakes_of_the_user_are_said(tiny_run, in_tmp, refused):
    explore, run = ["explore", "dataset=mnist5k"], f"checkpoint={tiny_run}"
    assert "there is no checkpoint" in refused(*explore)
    assert "is a folder; out= is the file" in refused(*explore, run, f"out={in_tmp}")
    assert "multimnist" in refused("explore", "dataset=multimnist", run)
    assert "explore.encoder" in refused(*explore, run, "explore.encoder=perhaps")
    assert not list(in_tmp.glob("*.html"))
