"""`capsrun report keep=FOLDER`: nothing of what was found is lost, nothing of others is written."""

import os

import pytest
from recorded import eval_result, train_result

from capsrun.errors import UserError
from capsrun.report.keep import keep
from capsrun.runs.reader import RESULT, find_results, read_result

PADDED = "experiment=padded_capsnet"


def keep_all(folder):
    keep(find_results([folder / "runs"]), folder / "kept")
    return sorted(
        str(p.parent.relative_to(folder / "kept")) for p in folder.glob(f"kept/**/{RESULT}")
    )


def test_what_is_small_is_copied(tmp_path, tiny_run):
    """What was kept is a source like any other: keeping again changes nothing."""
    kept = tmp_path / "kept"
    for _ in range(2):
        (found,) = find_results([kept, tiny_run.parent])
        keep([found], kept)
    names = {p.name for p in (kept / "run/seed0").iterdir()}
    assert names == {"result.json", "config.yaml", "metrics.jsonl", "pictures"}


def test_evals_of_one_run_are_kept_apart(tmp_path):
    """Beside their run, of `capsrun reproduce`, or in folders that somebody named."""
    names = ["affnist_capsnet", "eval-affnist-test", "eval-affnist-test-first1000", "a", "b"]
    for number, name in enumerate(names):
        place = tmp_path / "runs/tests" / (name if number else f"{name}/seed0")
        eval_result(place, "dataset=affnist", number, PADDED)
    assert keep_all(tmp_path) == [f"run/seed0/{name}" for name in sorted(names)]


@pytest.mark.parametrize("before", [True, False], ids=["kept before", "found together"])
@pytest.mark.parametrize("made", [train_result, eval_result])
def test_two_results_of_one_place_are_refused(made, before, tmp_path):
    """Of one name and seed, and one's settings even: trained on two machines, say."""
    words = ["dataset=affnist"] if made is eval_result else []
    for number in range(2):
        rest = [] if words else [0]
        made(tmp_path / f"runs/{number}/a", *words, 25 + number, *rest)
        if before and not number:
            keep_all(tmp_path)
            (tmp_path / "runs/0").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="are different results that would both be kept in"):
        keep_all(tmp_path)
    kept = [read_result(path).values["errors"] for path in tmp_path.glob(f"kept/**/{RESULT}")]
    assert kept == ([25] if before else [])


def test_the_same_run_on_a_slower_day_is_no_other_one(tmp_path):
    for number in range(2):
        train_result(tmp_path / f"runs/{number}", 25, 0, train_seconds=9.0 + number)
    assert keep_all(tmp_path) == ["run/seed0"]


@pytest.mark.parametrize("link", ["run", "run/seed0", "run/seed0/pictures"])
def test_a_link_to_elsewhere_is_refused(link, tmp_path):
    place = train_result(tmp_path / "runs/a", 25, 0)
    (place / "pictures").mkdir()
    (place / "pictures/curves.png").write_bytes(b"new")
    elsewhere = tmp_path / "elsewhere"
    for folder in (elsewhere / "seed0/pictures", elsewhere / "pictures"):
        folder.mkdir(parents=True)
        (folder / "curves.png").write_bytes(b"precious")
    (tmp_path / "kept" / link).parent.mkdir(parents=True)
    (tmp_path / "kept" / link).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(UserError, match="is a link"):
        keep_all(tmp_path)
    assert sorted(elsewhere.rglob("*")) == before


def test_a_link_to_a_file_is_replaced_and_not_what_it_is_to(tmp_path):
    train_result(tmp_path / "runs/a", 25, 0)
    keep_all(tmp_path)
    (tmp_path / "runs/a/config.yaml").write_text("new")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "kept/run/seed0/config.yaml").symlink_to(tmp_path / "precious")
    keep_all(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "kept/run/seed0/config.yaml").read_text() == "new"


@pytest.mark.parametrize("content", ["", "{}", None], ids=["empty", "another's", "a dead link"])
def test_what_is_no_result_is_not_overwritten(content, tmp_path):
    train_result(tmp_path / "runs/a", 25, 0)
    file = tmp_path / "kept/run/seed0" / RESULT
    file.parent.mkdir(parents=True)
    if content is None:
        file.symlink_to(tmp_path / "nowhere")
    else:
        file.write_text(content)
    with pytest.raises(UserError, match="is damaged, or not of capsrun"):
        keep(find_results([tmp_path / "runs"]), tmp_path / "kept")
    assert os.path.lexists(file)
    assert content is None or file.read_text() == content


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl", "pictures/mine.png"])
def test_files_of_others_are_left_alone(file, tmp_path):
    train_result(tmp_path / "runs/a", 25, 0)
    mine = tmp_path / "kept/run/seed0" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(UserError, match="is there already, and capsrun did not make it"):
        keep_all(tmp_path)
    assert [path for path in (tmp_path / "kept").rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("file", ["checkpoint.pt", ".lock"])
def test_nothing_is_kept_in_a_run_that_goes_on(file, tmp_path):
    """Its settings would be lost, and nobody could go on with it."""
    train_result(tmp_path / "runs/a", 25, 0)
    place = tmp_path / "kept/run/seed0"
    place.mkdir(parents=True)
    (place / file).touch()
    (place / "config.yaml").write_text("precious")
    with pytest.raises(UserError, match="seed0 is the folder of a run; choose another keep="):
        keep_all(tmp_path)
    assert (place / "config.yaml").read_text() == "precious"
