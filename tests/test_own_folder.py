"""Folders that commands write to: what somebody else has there stays as it is."""

import json
import shutil

import pytest
from conftest import REPOSITORY, TINY

from capsrun import disk
from capsrun.errors import UserError

FILES = {
    "eval": ["result.json", "index.html", "predictions.csv", "pictures/holiday.png"],
    "perturb": ["result.json", "index.html", "pictures/digit_5.gif"],
    "data": ["statistics.json", "contact_sheet.png"],
    "export": ["export.json", "model.onnx", "model.pt2"],
    "bench": ["bench.json", "bench.png"],
    "report": ["report.md", "report.html", "report.csv", "report.tex", "pictures/holiday.png"],
}
CASES = [(command, file) for command, files in FILES.items() for file in files]


def words(command, run):
    if command == "report":
        return [command, f"sources={run}"]
    return [
        command,
        "dataset=mnist5k",
        *([] if command in ("data", "bench") else [f"checkpoint={run}"]),
    ]


@pytest.mark.parametrize(("command", "file"), CASES)
def test_files_of_others_are_left_alone(command, file, in_tmp, tiny_run, refused):
    mine = in_tmp / "mine" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    message = refused(*words(command, tiny_run), "out_dir=mine")
    assert f"mine/{file} is there already, and capsrun did not make it; choose another" in message
    assert [path for path in (in_tmp / "mine").rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "{}"


@pytest.mark.parametrize("command", ["eval", "perturb", "data", "export", "report"])
def test_what_capsrun_made_is_made_again(command, in_tmp, tiny_run, printed):
    """Also where it was copied or committed without its lock; and other files may be there."""
    quick = {"eval": ["images=50"], "export": ["format=torch"], "perturb": ["perturb.digit=5"]}
    line = [*words(command, tiny_run), "out_dir=out", *quick.get(command, [])]
    committed = REPOSITORY / "results/report"
    if command == "report" and committed.is_dir():  # as in a fresh clone
        shutil.copytree(committed, in_tmp / "out", ignore=shutil.ignore_patterns(".lock*"))
    else:
        printed(*line)
        (in_tmp / "out/.lock").unlink()
    (in_tmp / "out/notes.txt").write_text("mine")
    printed(*line)
    assert (in_tmp / "out/notes.txt").read_text() == "mine"


def test_a_committed_benchmark_is_made_again(in_tmp):
    """As of all, its record says which command made it."""
    committed = next((REPOSITORY / "benchmarks").glob("*/bench.json"))
    shutil.copy(committed, in_tmp)
    with disk.own_folder(in_tmp, "bench.json", "bench.png", command="bench"):
        pass
    (in_tmp / ".lock").unlink()
    (in_tmp / "bench.json").write_text(json.dumps({"command": "sing"}))
    with (
        pytest.raises(UserError, match="capsrun did not make it"),
        disk.own_folder(in_tmp, "bench.json", command="bench"),
    ):
        pass


@pytest.mark.parametrize(
    "file",
    ["index.html", "metrics.jsonl", "pictures/curves.png", "tensorboard/events.out.tfevents.1.x"],
)
def test_train_does_not_take_a_folder_with_files_of_others(file, in_tmp, refused):
    mine = in_tmp / "runs/mine/seed0" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    message = refused("train", *TINY, "recipe.steps=1", "name=mine")
    assert f"{mine.relative_to(in_tmp)} is there already, and capsrun did not make it" in message
    assert "choose another name=" in message
    assert mine.read_text() == "precious"


def test_a_page_that_only_begins_like_a_report_is_somebodys(in_tmp, tiny_run, refused):
    (in_tmp / "mine/pictures").mkdir(parents=True)
    (in_tmp / "mine/pictures/mine.png").write_text("precious")
    (in_tmp / "mine/report.md").write_text("# capsrun: my notes\n![](pictures/mine.png)\n")
    assert "capsrun did not make it" in refused("report", f"sources={tiny_run}", "out_dir=mine")
    assert (in_tmp / "mine/pictures/mine.png").read_text() == "precious"


def test_who_may_read_a_file_stays_as_it_is(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("mine")
    path.chmod(0o600)
    disk.write_file(path, "ours")
    assert path.read_text() == "ours"
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_run_whose_settings_are_gone_is_no_place_for_a_test(in_tmp, tiny_run, refused):
    shutil.copytree(tiny_run, in_tmp / "run")
    (in_tmp / "run/config.yaml").unlink()
    line = ["eval", "dataset=mnist5k", f"checkpoint={tiny_run}", "out_dir=run"]
    assert "run is the folder of a training run" in refused(*line)


def test_explore_replaces_its_own_pages_only(in_tmp, tiny_run, refused, printed):
    line = ["explore", "dataset=mnist5k", f"checkpoint={tiny_run}", "out=page.html"]
    line += ["explore.images=1", "explore.search=100"]
    page = in_tmp / "page.html"
    page.write_text("<h1>My page of capsrun</h1>")
    assert "page.html is no page of capsrun; choose another out=" in refused(*line)
    assert page.read_text() == "<h1>My page of capsrun</h1>"
    page.write_text("")  # as mktemp leaves it
    for _ in range(2):
        printed(*line)
    assert "Inside a capsule" in page.read_text()
