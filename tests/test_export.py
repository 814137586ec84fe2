"""capsrun export: the files compute what the model does, and others are not kept."""

import importlib.util
import json
import logging
import resource
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_model, train_config

from capsrun import cli
from capsrun.commands import export as exporting
from capsrun.commands.export import FILES, Exportable, export_program, load_file, write_checked
from capsrun.data.splits import standardise
from capsrun.errors import UserError
from capsrun.training.step import to_device

HAS_ONNX = all(importlib.util.find_spec(package) for package in exporting.ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="no onnx, onnxscript and onnxruntime here")

NARROW = TINY[1:4]
PAIR = {"lengths": (10,), "capsules": (10, 16)}
# The settings of a network and the shapes of its outputs.
KINDS = {
    "leaky": (
        [*TINY, "routing.leaky=true", "model.padding=same", "model.reconstruction=false"],
        PAIR,
    ),
    "two-digits": (
        [*NARROW, "dataset=multimnist", "model.digit_bias=false"],
        {**PAIR, "reconstructions": (2, 1, 36, 36)},
    ),
    "photos": (
        [*NARROW, "dataset=cifar10", "model=capsnet_cifar10", "model.reconstruction=true"],
        {**PAIR, "reconstructions": (1, 3, 24, 24)},
    ),
    "em": ([*TINY, "routing=em"], {**PAIR, "reconstructions": (1, 1, 28, 28)}),
    "em-shared": (
        [*TINY, "routing=em", "routing.shared=true"],
        {**PAIR, "reconstructions": (1, 1, 28, 28)},
    ),
    "self-routing": (
        [*TINY, "routing=self_routing"],
        {**PAIR, "reconstructions": (1, 1, 28, 28)},
    ),
    "efficient": (
        ["dataset=mnist5k", "model=efficient_capsnet", "model.channels=[4,4,4]"],
        {**PAIR, "reconstructions": (1, 1, 28, 28)},
    ),
    "cnn": (
        ["dataset=mnist5k", "model=cnn_affnist", "model.channels=[4,4,4]", "model.hidden=[16]"],
        {"probabilities": (10,)},
    ),
}


def exportable(kind: str, seed: int = 0) -> Exportable:
    """A network with weights so large that its outputs differ from image to image."""
    config = train_config(*KINDS[kind][0])
    model = make_model(config, seed)
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 1.5 if kind == "cnn" else 3
        if kind == "self-routing":  # which begins with equal shares for all
            model.digitcaps.routing_weight.normal_(generator=torch.Generator().manual_seed(0))
    dataset = config.dataset
    return Exportable(model.eval(), dataset.digits, dataset.standardise).requires_grad_(False)


@pytest.fixture(scope="module")
def exported():
    """A network of each kind and its program, traced once."""
    made = {}

    def make(kind: str):
        if kind not in made:
            model = exportable(kind)
            made[kind] = model, export_program(model)
        return made[kind]

    return make


@pytest.mark.parametrize("name", ["torch", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("kind", KINDS)
def test_files_give_what_the_model_gives_for_batches_of_any_size(exported, kind, name, tmp_path):
    model, program = exported(kind)
    path = tmp_path / FILES[name]
    assert write_checked(name, program, model, path) < 1e-5
    assert list(tmp_path.iterdir()) == [path]
    run = load_file(name, path)
    for batch in (1, 17):
        generator = torch.Generator().manual_seed(100 + batch)
        pixels = torch.rand(model.example(batch).shape, generator=generator)
        ours, theirs = model(pixels), run(pixels)
        shapes = {name: (batch, *shape) for name, shape in KINDS[kind][1].items()}
        assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == shapes
        for name in shapes:
            torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=1e-5)
            # Equal outputs of different images would say little.
            assert batch == 1 or (ours[name][0] - ours[name][1]).abs().max() > 1e-3, name


def test_the_exported_model_standardises_pixels_itself():
    model = exportable("photos")
    pixels = model.example(3)
    lengths = model(pixels)["lengths"]
    torch.testing.assert_close(model(pixels / 2)["lengths"], lengths)
    torch.testing.assert_close(model.model(standardise(pixels)).lengths_BJ, lengths)


def test_a_model_that_computes_in_the_fastest_way_is_exported_plainly():
    """And draws the longest capsules."""
    model = exportable("two-digits")
    plain = model(model.example(9))
    longest = plain["lengths"].topk(2).indices.sort(1).values
    drawn = model.model.decode(plain["capsules"], longest)
    assert torch.equal(plain["reconstructions"], drawn)
    to_device(model.model, torch.device("cpu"), fast=True)
    assert model.model.fast
    outputs = export_program(model).module()(model.example(9))
    for name, tensor in plain.items():
        assert torch.allclose(outputs[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", pytest.param("onnx", marks=needs_onnx)])
def test_a_disk_that_takes_no_more_ends_in_an_error(exported, name, tmp_path):
    """And not the whole program, as in PyTorch's own writer."""
    model, program = exported("cnn")
    kind = resource.RLIMIT_FSIZE
    soft, hard = resource.getrlimit(kind)
    try:
        resource.setrlimit(kind, (1_000, hard))
        with pytest.raises(OSError, match=f"File too large: .*{FILES[name]}"):
            write_checked(name, program, model, tmp_path / FILES[name])
    finally:
        resource.setrlimit(kind, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_files_that_are_wrong_or_too_large_are_not_kept(exported, tmp_path, monkeypatch):
    model, program = exported("two-digits")
    path = tmp_path / "model"
    path.write_text("the one before")
    with pytest.raises(UserError, match="was not kept"):
        write_checked("torch", program, exportable("two-digits", seed=1), path)
    monkeypatch.setattr(exporting, "MOST_ONNX_BYTES", 1000)
    with pytest.raises(UserError, match="format=torch"):
        write_checked("onnx", program, model, path)
    assert path.read_text() == "the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_small_difference_and_a_nan_are_found():
    model = exportable("two-digits")
    pixels = model.example(3)

    def changed(name, change):
        def run(pixels):
            outputs = model(pixels)
            outputs[name] = change(outputs[name])
            return outputs

        return exporting.largest_difference(model, run, pixels)

    assert changed("lengths", lambda tensor: tensor) == 0
    assert changed("capsules", lambda tensor: tensor + 1e-3) == pytest.approx(1e-3, rel=1e-3)
    assert changed("reconstructions", lambda tensor: tensor[:1]) == float("inf")
    difference = changed("capsules", lambda tensor: tensor * torch.nan)
    assert not difference <= exporting.MOST_DIFFERENCE


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["checkpoint={run}"], "(onnxscript): pip install 'capsrun[export]'"),
        (["checkpoint={run}", "format=onnx"], "(onnxscript): pip install 'capsrun[export]'"),
        (["format=tensorflow"], "one of: onnx, torch, all"),
        (["format=torch", "checkpoint=nowhere"], "there is no checkpoint nowhere"),
        (["format=torch", "dataset=multimnist"], "`capsrun train dataset=multimnist"),
        (["format=torch", "routing.iterations=1"], "no setting"),
    ],
)
def test_mistakes(tiny_run, in_tmp, monkeypatch, capsys, arguments, part):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    words = [word.format(run=tiny_run) for word in arguments]
    assert cli.main(["export", "out_dir=out", *words]) == 2
    message = capsys.readouterr().err
    assert part in message
    assert message.count("\n") == 1
    assert not list(in_tmp.iterdir())


def in_python(lines: list[str], file_name: str) -> str:
    """The lines of Python that export prints for a file."""
    said = (f"{word}: {file_name} in Python, without capsrun:" for word in ("next", "or"))
    start = next(lines.index(line) for line in said if line in lines) + 1
    indented = [line.startswith("    ") for line in lines[start:]] + [False]
    return "\n".join(line.strip() for line in lines[start : start + indented.index(False)])


@needs_onnx
def test_the_command_leaves_files_and_says_how_to_use_them(tiny_run, tmp_path, capfd):
    import onnx

    out = tmp_path / "out"
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main(["export", f"checkpoint={tiny_run}", f"out_dir={out}"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert logging.root.manager.disable == level
    files = {"model.onnx", "model.pt2", "export.json", ".lock"}
    assert {path.name for path in out.iterdir()} == files
    package = str(Path(exporting.__file__).parent.parent).encode()
    for path in out.glob("model.*"):
        assert package not in path.read_bytes()  # files to be shared name no folder of this machine

    facts = json.loads((out / "export.json").read_text())
    assert facts["input"]["shape"] == ["batch", 1, 28, 28]
    assert facts["outputs"]["reconstructions"]["shape"] == ["batch", 1, 1, 28, 28]
    assert facts["versions"]["onnx"]
    for name, file in facts["files"].items():
        assert file["bytes"] == (out / name).stat().st_size
        assert file["largest_difference"] < 1e-5

    graph = onnx.load(out / "model.onnx").graph
    assert [tensor.name for tensor in graph.input] == ["pixels"]
    assert [tensor.name for tensor in graph.output] == list(facts["outputs"])
    for tensor in [*graph.input, *graph.output]:
        assert tensor.type.tensor_type.shape.dim[0].dim_param == "batch"

    lines = captured.out.splitlines()
    pixels = torch.rand(4, 1, 28, 28)
    by_onnx, by_torch = {"pixels": pixels.numpy()}, {"pixels": pixels}
    exec(in_python(lines, "model.onnx"), by_onnx)
    exec(in_python(lines, "model.pt2"), by_torch)
    for name in ("lengths", "capsules", "reconstructions"):
        ours, theirs = torch.from_numpy(by_onnx[name]), by_torch["outputs"][name]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_the_program_works_without_capsrun_from_the_folder_of_the_run(
    tiny_run, in_tmp, monkeypatch, capsys
):
    run = in_tmp / "runs" / "mnist5k-capsnet-quick" / "seed0"
    run.mkdir(parents=True)
    shutil.copy(tiny_run / "checkpoint.pt", run)
    assert cli.main(["export", "dataset=mnist5k", "format=torch"]) == 0
    code = in_python(capsys.readouterr().out.splitlines(), "model.pt2")
    assert [path.name for path in (run / "export").glob("model.*")] == ["model.pt2"]
    for name in [name for name in sys.modules if name.split(".")[0] == "capsrun"]:
        monkeypatch.setitem(sys.modules, name, None)
    names = {"pixels": torch.zeros(5, 1, 28, 28)}
    exec(code, names)
    assert names["outputs"]["lengths"].shape == (5, 10)
    assert not names["outputs"]["lengths"].requires_grad
