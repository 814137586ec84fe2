"""What docs/extending.md shows works: each diff is applied to a copy, and its commands are run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def files_of(section: str) -> list[tuple[str, str]]:
    """The path of each file that a section changes, and the lines of its diff."""
    (diff,) = re.findall(r"^```diff\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return re.findall(r"^\+\+\+ b/(\S+)\n@@.*?\n(.*?)(?=^--- |\Z)", diff, re.MULTILINE | re.DOTALL)


def apply(root: Path, path: str, lines: str) -> None:
    """Make a new file, or insert one line after the one that is shown before it."""
    added = "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] == "+")
    before = "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] == " ")
    file = root / path
    if not before:
        assert not file.exists()
        file.write_text(added)
        return
    text = file.read_text()
    assert text.count(before) == 1, f"{before!r} is not in {path}"
    file.write_text(text.replace(before, before + added))


@pytest.mark.parametrize("title", SECTIONS)
def test_what_is_shown_works_and_is_as_small_as_is_said(title, tmp_path):
    changes = files_of(SECTIONS[title])
    new = [path for path, lines in changes if " " not in {line[0] for line in lines.splitlines()}]
    assert sum(path.endswith(".py") for path in new) <= 1
    assert sum(path.endswith(".yaml") for path in new) == 1
    inserted = [lines for path, lines in changes if path not in new]
    assert len(inserted) <= 1
    assert all(lines.count("\n+") == 1 for lines in inserted)
    for folder in ("capsrun", "configs"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder)
    for path, lines in changes:
        apply(tmp_path, path, lines)
    commands = re.findall(r"^capsrun (.+)$", SECTIONS[title], re.MULTILINE)
    assert commands
    script = f"from capsrun.cli import main\nfor line in {commands}: assert main(line.split()) == 0"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
