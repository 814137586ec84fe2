"""The order of the modules, and the sizes of files and functions."""

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

# The rooms from the bottom: a module imports from its own room and from those below it only.
ROOMS = [
    "errors terminal",
    "disk yaml_files",
    "fields",
    "attack_config data_config model_config",
    "config",
    "checks settings",
    "compose",
    "experiments",
    "data",
    "models",
    "names",
    "training",
    "runs",
    "report",
    "bench",
    "explorer",
    "commands sweep",
    "completion help library",
    "cli",
]
LEVELS = {name: level for level, names in enumerate(ROOMS) for name in names.split()}
# What the package itself offers comes from `library`, and runs it as a program.
ABOVE = {"__init__": len(ROOMS), "__main__": len(ROOMS)}
SOURCES = sorted((REPOSITORY / "capsrun").rglob("*.py"))
MOST_LINES, MOST_FUNCTION_LINES = 400, 50


def module_of(path: Path) -> str:
    """`data.mnist`; of a package, its name."""
    parts = path.relative_to(REPOSITORY / "capsrun").with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def imported(tree: ast.AST) -> set[str]:
    """The modules of the package that one imports: at its top, in functions, for types."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from capsrun.data import mnist` is of a module, `… import Dataset` of what is in one.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in (n.removeprefix("capsrun.") for n in names if n.startswith("capsrun.")):
            found |= {name if name in MODULES else name.rpartition(".")[0]} & MODULES.keys()
    return found


IMPORTS = {module: imported(tree) for module, tree in MODULES.items()}


def level(module: str) -> int:
    return {**LEVELS, **ABOVE}[module.partition(".")[0]]


def test_every_module_has_its_place():
    assert {module.partition(".")[0] for module in MODULES} == {*LEVELS, *ABOVE}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_below(module):
    upwards = {name for name in IMPORTS[module] if level(name) > level(module)}
    assert upwards == set()


def test_no_circle():
    left = {module: names - {module} for module, names in IMPORTS.items()}
    while free := [module for module, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert list(left) == [], "these import each other, or what does"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    functions = [n for n in ast.walk(MODULES[module_of(path)]) if isinstance(n, ast.FunctionDef)]
    docs = {node: len((ast.get_docstring(node) or "").splitlines()) for node in functions}
    # An example in a docstring does not make a function longer.
    lengths = {node.name: node.end_lineno - node.lineno + 1 - docs[node] for node in functions}
    assert {name: n for name, n in lengths.items() if n > MOST_FUNCTION_LINES} == {}


def asks_the_locale(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes text in an encoding that it does not say."""
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    name = ast.unparse(call.func).rpartition(".")[2]
    mode = "".join(ast.unparse(argument) for argument in call.args[1:2]) + keywords.get("mode", "")
    of_text = ast.unparse(call.func) in ("open", "os.fdopen") and "b" not in mode
    of_text |= name in ("read_text", "write_text", "getoutput") or keywords.get("text") == "True"
    return of_text and "encoding" not in keywords


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_text_is_utf8_whatever_the_locale(path):
    calls = [node for node in ast.walk(MODULES[module_of(path)]) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls if asks_the_locale(call)] == []
