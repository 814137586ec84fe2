"""The page beside each `result.json`, and the pictures of perturb that it shows."""

import html
import json
import re
import shutil
from pathlib import Path

import browser as browsers
import numpy as np
import pytest
from conftest import TINY, train_config
from PIL import Image, ImageSequence
from recorded import EXPERIMENTS

from capsrun import cli
from capsrun.commands.report import ReportConfig, report
from capsrun.commands.train import train
from capsrun.report.run_page import write_run_page


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Path:
    """A run with everything that can be made of it."""
    folder = tmp_path_factory.mktemp("pages") / "seed0"
    shutil.copytree(tiny_run, folder)
    here = ["dataset=mnist5k", f"checkpoint={folder}"]
    assert cli.main(["eval", *here, "images=100", "routing_images=[4]"]) == 0
    assert cli.main(["perturb", *here]) == 0
    assert cli.main(["explore", *here, "explore.images=2", "explore.search=100"]) == 0
    return folder


def embedded(page: Path) -> list[str]:
    return re.findall(r'src="data:image/(png|gif);base64,', page.read_text(encoding="utf-8"))


def links(page: Path) -> list[str]:
    return re.findall(r'href="([^#"]+)"', page.read_text(encoding="utf-8"))


def test_training_ends_with_a_page(run):
    result = json.loads((run / "result.json").read_text())
    text = (run / "index.html").read_text()
    assert f"test error {result['error_percent']:.2f} %" in text
    assert f"{result['errors']:,} of 1,000" in text
    assert "the best of 2 tests: not a result" in text
    assert text.count("<h2") >= 5
    # Curves, confusion matrix, hits and failures are in the page itself.
    assert len(embedded(run / "index.html")) == 4
    assert 'src="pictures' not in text
    for name in ("mnist5k", "capsnet", result["device"].split(",")[0], "conv1_channels: 8"):
        assert name in html.unescape(text)
    counts = np.array(result["confusion"]) * (1 - np.eye(10, dtype=int))
    most = [f"{t} taken for {g}: {counts.max()}" for t, g in np.argwhere(counts == counts.max())]
    assert any(f"Most often {words}" in text for words in most)


def test_a_folder_whose_name_is_no_text_has_a_page_all_the_same(tiny_run, tmp_path):
    folder = tmp_path / "f\udcfcr" / "seed0"
    shutil.copytree(tiny_run, folder)
    assert "f?r/seed0" in write_run_page(folder).read_text(encoding="utf-8")


def test_pages_of_eval_and_perturb_and_that_every_link_leads_somewhere(run):
    pages = [run / "index.html", *run.glob("*/index.html")]
    assert len(pages) == 3
    for page in pages:
        assert links(page)
        for link in links(page):
            assert (page.parent / link).exists(), (page, link)
    tests = {"eval-mnist5k-test-first100/index.html", "perturb-mnist5k/index.html"}
    assert tests | {"explore-mnist5k.html"} <= set(links(run / "index.html"))
    text = (run / "eval-mnist5k-test-first100" / "index.html").read_text()
    assert "tested on mnist5k (test)" in text
    assert "of 100)" in text
    assert "Entropy of the couplings" in text
    perturb = run / "perturb-mnist5k" / "index.html"
    assert len(embedded(perturb)) == 1  # the sheet of all; the others are linked
    assert "pictures/digit_7.png" in links(perturb)
    with Image.open(perturb.parent / "pictures" / "all_classes.png") as sheet:
        # Five classes beside each other, each of eleven values; two below, each of 16 dimensions.
        assert sheet.width > 5 * 11 * 2 * 28
        assert sheet.height > 2 * 16 * 2 * 28


def test_a_page_is_made_again_for_a_run_that_has_none(tmp_path, tiny_run, capsys):
    folder = tmp_path / "seed0"
    shutil.copytree(tiny_run, folder)
    (folder / "index.html").unlink()
    (folder / "metrics.jsonl").unlink()  # as of results that were kept without it
    (folder / "pictures" / "curves.png").unlink()
    train(train_config(*TINY, "name=run"), folder)
    assert "finished already" in capsys.readouterr().out
    assert "Learning curves" not in (folder / "index.html").read_text()
    assert len(embedded(folder / "index.html")) == 3


def test_names_are_not_markup(tmp_path, tiny_run):
    name = "<script>alert(1)</script> & co <img src=http:foo.example>"
    folder = tmp_path / "seed0"
    shutil.copytree(tiny_run, folder)
    before = write_run_page(folder).read_text()
    result = json.loads((folder / "result.json").read_text())
    result["name"] = result["config"]["name"] = name
    (folder / "result.json").write_text(json.dumps(result))
    text = write_run_page(folder).read_text()
    for tag in ("<script", "<img", "<a ", 'src="http', 'href="java'):
        assert text.count(tag) == before.count(tag), tag
    assert html.unescape(text).count(name) >= 3  # the title, the heading, the configuration


def test_results_of_others_are_left_alone(tmp_path, tiny_run):
    """Beside a result of another program, and beside a run that is not finished."""
    (tmp_path / "result.json").write_text('{"a": 1}')
    shutil.copy(tiny_run / "checkpoint.pt", tmp_path)
    assert cli.main(["eval", "dataset=mnist5k", f"checkpoint={tmp_path}", "images=20"]) == 0
    assert not (tmp_path / "index.html").exists()
    (page,) = tmp_path.glob("*/index.html")
    assert "../index.html" not in links(page)


@pytest.mark.browser
def test_pages_open_without_a_network(browser, run):
    for page in (run / "index.html", run / "eval-mnist5k-test-first100" / "index.html"):
        with browsers.opened(browser, page) as shown:
            broken = "[...document.images].filter((i) => !i.complete || !i.naturalWidth).length"
            assert shown.evaluate("document.images.length") >= 4
            assert shown.evaluate(broken) == 0
    phone = {"viewport": {"width": 360, "height": 700}}
    with browsers.opened(browser, run / "index.html", **phone) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= 360


def test_the_report_links_the_pages(run, tmp_path):
    out = tmp_path / "report"
    words = {"sources": [str(run.parent)], "runs_dir": "runs", "out_dir": str(out), "keep": None}
    report(ReportConfig(**words, update=[]), EXPERIMENTS)
    found = [link for link in links(out / "report.html") if link.endswith("index.html")]
    assert len(found) >= 2
    assert all((out / link).resolve().exists() for link in found)
    assert (run / "index.html").resolve() in [(out / link).resolve() for link in found]


def test_perturb_animates_and_the_page_shows_the_latest_pictures(tiny_run, tmp_path):
    pictures, page = tmp_path / "pictures", tmp_path / "index.html"
    words = ["perturb", "dataset=mnist5k", f"checkpoint={tiny_run}", f"out_dir={tmp_path}"]
    words.append("perturb.step=0.25")
    assert cli.main([*words, "perturb.digit=5"]) == 0
    # One class needs no sheet.
    assert [path.name for path in pictures.iterdir()] == ["digit_5.png"]
    assert embedded(page) == ["png"]
    for suffix, kind in (("gif", "GIF"), ("apng", "PNG")):
        before = set(pictures.iterdir())
        assert cli.main([*words, f"perturb.format={suffix}"]) == 0
        made = set(pictures.iterdir()) - before
        assert {path.suffix for path in made} == {f".{suffix}"}
        assert len(made) == 11  # ten classes, and all of them
        for name in ("digit_3", "all_classes"):
            with Image.open(pictures / f"{name}.{suffix}") as animation:
                assert animation.format == kind
                assert animation.n_frames == 4  # three values up, and one of them down again
                assert animation.info["loop"] == 0  # for ever
                shown = ImageSequence.Iterator(animation)
                frames = [frame.convert("RGB").tobytes() for frame in shown]
            assert frames[0] != frames[2]
            assert frames[1] == frames[3]
        assert embedded(page) == [kind.lower()]
