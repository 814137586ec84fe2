"""Audit the dependencies in `constraints.txt`, beside `pyproject.toml` and what is installed.

    python scripts/audit.py

Without a network it is checked that every version in `constraints.txt` is pinned and is one that
`pyproject.toml` allows, that nothing installed is missing there or is of another version, and that
what is installed fits together (`pip check`). Then pip-audit asks the Python Package Index which
of the versions have known vulnerabilities. Where that cannot be reached, or does not know a
version, it is said so, and nothing fails because of it. Ends with 1 for anything that was found.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"
# Of the environment itself, or of the machine: PyTorch brings the libraries of its GPU.
NOT_PINNED = re.compile(r"capsrun|pip|setuptools|wheel|nvidia-.*|cuda-.*|triton")
TIMEOUT_SECONDS = 300


def main() -> int:
    """Print what was found, and whether all could be looked at."""
    lines = [line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines()]
    lines = [line for line in lines if line]
    loose = [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)]
    pinned = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines)}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    problems = [f"constraints.txt does not pin {line}" for line in loose]
    problems += beyond_bounds(project, pinned) + not_as_pinned(installed(), pinned)
    problems += unfit()
    print(f"{len(pinned)} versions are pinned; {len(installed())} packages are installed")
    problems += vulnerable(pinned)
    for problem in problems:
        print(f"PROBLEM: {problem}")
    return int(bool(problems))


def beyond_bounds(project: Mapping, pinned: Mapping[str, str]) -> list[str]:
    """What `pyproject.toml` asks for and `constraints.txt` lacks, or pins to another version."""
    asked = [*project["dependencies"]]
    for extra in project["optional-dependencies"].values():
        asked += extra
    found = []
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name == "capsrun":
            continue
        if name not in pinned:
            found.append(f"constraints.txt lacks {name}")
        elif pinned[name] not in requirement.specifier:
            found.append(f"{name} is pinned to {pinned[name]}, but {requirement} is asked for")
        elif not requirement.specifier:
            found.append(f"pyproject.toml names no oldest version of {name}")
    return found


def installed() -> dict[str, str]:
    """Version of each package of this environment."""
    found = importlib.metadata.distributions()
    return {canonicalize_name(d.metadata["Name"]): d.version for d in found}


def not_as_pinned(versions: Mapping[str, str], pinned: Mapping[str, str]) -> list[str]:
    """What is installed in another version, or that nothing pins."""
    found = []
    for name, version in sorted(versions.items()):
        # 2.8.0+cpu is a build of 2.8.0.
        if name in pinned and version.partition("+")[0] != pinned[name].partition("+")[0]:
            found.append(f"{name} {version} is installed, not {pinned[name]}")
        elif name not in pinned and not NOT_PINNED.fullmatch(name):
            found.append(f"{name} {version} is installed, but constraints.txt does not pin it")
    return found


def unfit() -> list[str]:
    """What pip finds about packages that do not fit together."""
    words = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines() if done.returncode else []
    # It asks for what only its part for AWS uses, and is installed without (see the Makefile).
    return [line for line in lines if not line.startswith("hydra-ray-launcher ")]


def vulnerable(pinned: Mapping[str, str]) -> list[str]:
    """Known vulnerabilities; says so where that could not be found out."""
    words = [sys.executable, "-m", "pip_audit", "--requirement", str(CONSTRAINTS), "--no-deps"]
    words += ["--disable-pip", "--format=json", "--progress-spinner=off"]
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        print("NOT CHECKED: known vulnerabilities; the advisories could not be reached")
        return []
    known = {canonicalize_name(p["name"]): p["vulns"] for p in packages if "vulns" in p}
    unknown = sorted(pinned.keys() - known.keys())
    print(f"known vulnerabilities: {len(known)} of {len(pinned)} packages were looked up")
    if unknown:
        print(f"NOT CHECKED, as the index does not tell about that version: {', '.join(unknown)}")
    return [
        f"{name} {pinned.get(name)}: {one['id']}, mended in {', '.join(one['fix_versions']) or '–'}"
        for name, found in known.items()
        for one in found
    ]


if __name__ == "__main__":
    sys.exit(main())
