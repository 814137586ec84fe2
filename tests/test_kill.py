"""Killed at any moment: what is lost is time, and nothing else."""

import json
from pathlib import Path

import pytest
from conftest import run_python
from test_train import assert_same_run, curves

LIVES = Path(__file__).with_name("lives.py")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if "events.out" not in path.name}


@pytest.mark.parametrize(("kills", "seed"), [(15, 0), pytest.param(300, 1, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_never_was(tmp_path, kills, seed):
    """Bit for bit, with no file half-written and no curve doubled."""
    done = run_python(str(LIVES), str(tmp_path / "lives"), str(kills), str(seed))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert sum(report["killed"].values()) == kills
    ways = ("at_random_moment", "at_file_operation", "in_checkpoint", "in_flush", "in_test")
    assert set(report["killed"]) == set(ways), "some way to die was not tried"
    straight = tmp_path / "lives" / "straight" / "runs" / "run" / "seed0"
    for number in range(1, report["runs"] + 1):
        folder = tmp_path / "lives" / f"killed{number}" / "runs" / "run" / "seed0"
        assert_same_run(folder, straight)
        assert curves(folder) == curves(straight), "something is lost, or there twice"
        assert names(folder) == names(straight)
        for picture in (straight / "pictures").iterdir():
            if picture.name != "curves.png":  # which shows the speed
                assert (folder / "pictures" / picture.name).read_bytes() == picture.read_bytes()
