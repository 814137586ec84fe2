"""The audit of the dependencies: what it finds, and that it says what it could not look at."""

import importlib.util
import json
import subprocess
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY

PROJECT = {"dependencies": ["torch>=2.8", "numpy"], "optional-dependencies": {"dev": ["ruff>=1"]}}


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / "scripts" / "audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answer(monkeypatch, stdout):
    done = SimpleNamespace(stdout=stdout, returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *words, **options: done)


def test_pins_that_are_missing_or_too_old_are_found(audit):
    found = audit.beyond_bounds(PROJECT, {"torch": "2.7", "numpy": "2.0"})
    assert found == [
        "torch is pinned to 2.7, but torch>=2.8 is asked for",
        "pyproject.toml names no oldest version of numpy",
        "constraints.txt lacks ruff",
    ]


def test_what_is_installed_is_what_is_pinned(audit):
    installed = {"torch": "2.8.0+cpu", "numpy": "1.9", "leftpad": "1", "pip": "23"}
    assert audit.not_as_pinned(installed, {"torch": "2.8.0", "numpy": "2.0"}) == [
        "leftpad 1 is installed, but constraints.txt does not pin it",
        "numpy 1.9 is installed, not 2.0",
    ]


def test_a_known_vulnerability_is_a_problem(audit, monkeypatch, capsys):
    hole = {"id": "CVE-1", "fix_versions": ["2.9"]}
    packages = [{"name": "torch", "vulns": [hole]}, {"name": "numpy", "skip_reason": "unknown"}]
    answer(monkeypatch, json.dumps({"dependencies": packages}))
    found = audit.vulnerable({"torch": "2.8", "numpy": "2.0"})
    assert found == ["torch 2.8: CVE-1, mended in 2.9"]
    shown = capsys.readouterr().out
    assert "1 of 2 packages were looked up" in shown
    assert "NOT CHECKED, as the index does not tell about that version: numpy" in shown


def test_without_a_network_it_says_so_and_finds_nothing(audit, monkeypatch, capsys):
    answer(monkeypatch, "")
    assert audit.vulnerable({"torch": "2.8"}) == []
    assert "NOT CHECKED" in capsys.readouterr().out


def test_our_own_constraints_are_pinned(audit):
    lines = audit.CONSTRAINTS.read_text().splitlines()[1:]
    assert all("==" in line for line in lines)
