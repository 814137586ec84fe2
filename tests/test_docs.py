"""What the documentation shows is what happens: the library, the tutorial, and how to extend it."""

import ast
import doctest
import importlib
import json
import re
import shlex
import shutil
import types
from pathlib import Path

import numpy
import pytest
import torch
from conftest import REPOSITORY, run_python

import capsrun
from capsrun import cli
from capsrun.data.own_image import read_image
from capsrun.errors import UserError
from capsrun.models.authors import to_authors_arrays

MODULES = [
    "capsrun.data.splits",
    "capsrun.library",
    "capsrun.models.authors",
    "capsrun.models.capsnet",
    "capsrun.models.layers",
    "capsrun.models.routing",
    "capsrun.names",
    "capsrun.runs.checkpoint",
    "capsrun.training.losses",
]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_reference(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)  # for results/capsnet-mnist.pt
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0


def test_public_names_are_what_their_modules_have_each_with_an_example():
    assert set(capsrun.__all__) == {*capsrun._MODULES, "__version__"}
    assert set(capsrun.__all__) <= set(dir(capsrun))
    for name, module in capsrun._MODULES.items():
        assert getattr(capsrun, name) is getattr(importlib.import_module(module), name)
        assert ">>> " in getattr(capsrun, name).__doc__, name
    with pytest.raises(AttributeError, match="'capsrun' has no attribute 'rout'"):
        capsrun.rout  # noqa: B018


def test_importing_capsrun_imports_no_torch():
    script = "import sys, capsrun; dir(capsrun); assert 'torch' not in sys.modules; capsrun.squash"
    done = run_python("-c", script + "; assert 'torch' in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("word", "message"),
    [("dataset=mnits", "did you mean 'mnist'"), ("routing.iterations=0", "at least 1")],
)
def test_mistakes_in_settings_are_one_sentence(word, message):
    with pytest.raises(UserError, match=message) as caught:
        capsrun.training_config(word)
    assert "\n" not in str(caught.value)


def test_data_sets_by_name_and_by_configuration():
    held_out = capsrun.load_dataset("mnist5k", "dataset.validation=500")
    assert (len(held_out.train), len(held_out.validation)) == (3500, 500)
    config = capsrun.training_config("dataset=mnist5k", "dataset.split_seed=1").dataset
    batches = [
        digits.test.batch(torch.arange(20)).images_BCHW
        for digits in (held_out, capsrun.load_dataset(config))
    ]
    assert not torch.equal(*batches)
    with pytest.raises(UserError, match="did you mean 'mnist5k'"):
        capsrun.load_dataset("mnist5")
    with pytest.raises(UserError, match="go with the name of a data set"):
        capsrun.load_dataset(config, "dataset.validation=500")


def test_settings_can_be_had_inside_a_program_that_uses_hydra(tmp_path):
    (tmp_path / "own.yaml").write_text("answer: 42\n")
    (tmp_path / "program.py").write_text("""
import capsrun, hydra
@hydra.main(version_base="1.3", config_path=".", config_name="own")
def main(cfg):
    assert capsrun.training_config("routing.iterations=2").routing.iterations == 2
    assert cfg == hydra.compose("own") == {"answer": 42}
    print("well")
main()
""")
    done = run_python("program.py", "hydra.run.dir=.", cwd=tmp_path)
    assert done.stdout == "well\n", done.stderr


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The language, the text and the first line of each block of code of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(match[1], match[2], text[: match.start(2)].count("\n")) for match in found]


def run_examples(text: str, names: dict, line: int) -> None:
    """Check that what follows each `>>>` is what it prints."""
    test = doctest.DocTestParser().get_doctest(text, names, TUTORIAL.name, str(TUTORIAL), line)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)
    names.update(test.globs)


def run_commands(text: str) -> None:
    """Run lines of a shell that are all capsrun's."""
    for line in text.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "capsrun"
        assert cli.main(arguments) == 0, line


@pytest.mark.parametrize("page", ["tutorial.md", "own.md"])
def test_pages_work_from_beginning_to_end(page, in_tmp):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="the tutorial ends with an ONNX file")
    # One module for all blocks, as the session is of somebody who types them.
    session = types.ModuleType("session")
    path, ran = REPOSITORY / "docs" / page, set()
    for language, text, line in blocks(path):
        ran.add(language)
        if language == "python":
            exec(compile("\n" * line + text, str(path), "exec"), session.__dict__)
        elif language == "pycon":
            run_examples(text, session.__dict__, line)
        else:
            run_commands(text)
    assert {"python", "sh"} <= ran <= {"python", "pycon", "sh"}, "a language that nobody runs"


def test_the_readme_in_python_works(in_tmp):
    (text,) = [text for kind, text, _ in blocks(REPOSITORY / "README.md") if kind == "python"]
    names: dict = {}
    exec(text, names)
    assert names["model"].routing.iterations == 1
    assert names["lengths"].shape == (100, 10)


def test_the_picture_of_the_quickstart_is_a_five():
    picture = REPOSITORY / "docs" / "five.jpg"
    assert f" predict docs/{picture.name} " in (REPOSITORY / "Makefile").read_text()
    assert picture.stat().st_size < 60_000
    trained = capsrun.load_checkpoint("small")
    digit_CHW, _ = read_image(picture, trained.config.dataset, "auto")
    lengths_J = trained.model(digit_CHW[None]).lengths_BJ[0]
    assert lengths_J.argmax() == 5
    assert lengths_J[5] > 0.8


def test_the_page_about_python_works(in_tmp):
    """Its weights of the authors' code are made here."""
    (in_tmp / "results").symlink_to(REPOSITORY / "results")
    numpy.savez("authors.npz", **to_authors_arrays(capsrun.CapsNet()))
    names: dict = {}
    for kind, text, _ in blocks(REPOSITORY / "docs" / "python.md"):
        assert kind == "python"
        exec(text, names)
    assert sum(names["losses"][-5:]) < 0.8 * sum(names["losses"][:5])
    assert capsrun.load_checkpoint("authors.pt").config == names["config"]


def test_types_are_those_of_the_public_names():
    """What a type checker sees is what is found when a name is asked for."""
    assert (REPOSITORY / "capsrun" / "py.typed").exists()
    tree = ast.parse((REPOSITORY / "capsrun" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: line.module for line in block.body for alias in line.names}
    assert seen == capsrun._MODULES


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def test_links_lead_somewhere_and_the_readme_is_short_and_leads_to_every_page():
    for page in PAGES:
        links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        assert [link for link in links if not (page.parent / link).exists()] == [], page
    readme = PAGES[0].read_text()
    assert len(readme.splitlines()) <= 220
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


# What a shell takes for something else where it is not in quotes: zsh ends with an error where a
# pattern fits no file, and a line that is typed into it has no comments.
QUOTED, SPECIAL = re.compile(r"'[^']*'|\"[^\"]*\""), re.compile(r"[][*?~#!(){}<>^]")
PROGRAMS = r"(\w+=\w+ )?(capsrun|make|pip|python|source|tensorboard|torchrun)( |$)"
TYPED = re.compile(rf"{PROGRAMS}|[\w.]+=[\[{{]")


def typed_lines(text: str) -> list[str]:
    """The lines of blocks, and what is in backticks, that somebody may type into a shell."""
    block = re.compile(r"^```(?:sh)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = "".join(block.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return [line for line in (*lines, *spans) if TYPED.match(line.removeprefix("$ "))]


def test_what_is_to_be_typed_works_in_every_shell():
    said = {file: file.read_text(encoding="utf-8") for file in PAGES}
    for file in (REPOSITORY / "capsrun").rglob("*.py"):  # without what f-strings put there
        said[file] = re.sub(r"\{[^}]*\}", "", file.read_text(encoding="utf-8"))
    lines = {file: typed_lines(text) for file, text in said.items()}
    wrong = {f: [w for w in ls if SPECIAL.search(QUOTED.sub("", w))] for f, ls in lines.items()}
    assert {file: words for file, words in wrong.items() if words} == {}
    assert len(lines[PAGES[0]]) > 20


# Extensions


EXTENDING = (REPOSITORY / "docs" / "extending.md").read_text()
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", EXTENDING, re.MULTILINE | re.DOTALL))


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


# Runs commands in each folder, with its own capsrun. What is slow to import is imported once.
RUN = """
import json, os, sys
import hydra, matplotlib.pyplot, tensorboard, torch._dynamo, torchvision
for folder, commands in json.loads(sys.argv[1]).items():
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, folder)
        from capsrun.cli import main
        for line in commands:
            assert main(line.split()) == 0, line
        sys.exit()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, folder
"""


def test_extensions_work_and_are_as_small_as_is_said(tmp_path):
    """Each diff is applied to a copy, and the commands beneath it are run there."""
    commands = {}
    for title, text in SECTIONS.items():
        place, changes = tmp_path / title, files_of(text)
        new = [path for path, lines in changes if " " not in {x[0] for x in lines.splitlines()}]
        assert sum(path.endswith(".py") for path in new) <= 1
        assert sum(path.endswith(".yaml") for path in new) == 1
        inserted = [lines for path, lines in changes if path not in new]
        assert len(inserted) <= 1
        assert all(lines.count("\n+") == 1 for lines in inserted)
        for folder in ("capsrun", "configs"):
            shutil.copytree(REPOSITORY / folder, place / folder)
        for path, lines in changes:
            apply(place, path, lines)
        # A format that is read has something to read.
        (place / "arrays").mkdir()
        numpy.save(
            place / "arrays/images.npy", numpy.random.randint(0, 256, (20, 1, 9, 9), "uint8")
        )
        (place / "arrays/labels.txt").write_text("cat\ndog\n" * 10)
        commands[str(place)] = re.findall(r"^capsrun (.+)$", text, re.MULTILINE)
        assert commands[str(place)]
    done = run_python("-c", RUN, json.dumps(commands))
    assert done.returncode == 0, done.stdout + done.stderr
