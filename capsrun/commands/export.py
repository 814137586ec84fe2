"""`capsrun export`: write a trained model as files that work without capsrun, and check them.

Shapes: B batch, C channels, H and W pixels, J classes, D dimensions of a class capsule, T digits in
one image.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from capsrun import disk
from capsrun.commands.models import announce, model_facts
from capsrun.config import ExportConfig
from capsrun.data.sets import class_names
from capsrun.data.splits import standardise
from capsrun.errors import UserError
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.models.layers import take
from capsrun.runs.checkpoint import Trained, find_model, load_checkpoint, output_folder
from capsrun.terminal import size
from capsrun.training.device import provenance
from capsrun.training.metrics import predicted_classes

# Of each format the file, and how it is used: its `{path}`, and the `{names}` of its outputs.
FILES = {"onnx": "model.onnx", "torch": "model.pt2"}
RECORD = "export.json"
SNIPPETS = {
    "onnx": """\
import onnxruntime
session = onnxruntime.InferenceSession({path!r})
[{names}] = session.run(None, {{'pixels': pixels}})""",
    "torch": """\
import torch
model = torch.export.load({path!r}).module()
outputs = model(pixels)  # a dict: {names}""",
}
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# What one ONNX file may hold; beyond it the weights would have to be in files of their own.
MOST_ONNX_BYTES = 2_000_000_000
# A batch of one would be taken for a constant.
EXAMPLE_BATCH = 2
# 9 are more than a CapsNet on a CPU routes at once.
CHECKED_BATCHES = (1, 3, 9)
# Between float32 results that were added up in another order; usually it is about 10⁻⁶.
MOST_DIFFERENCE = 1e-4

MEANINGS = {
    "lengths": "length of each class capsule, in [0, 1): how sure it is that the class is present",
    "capsules": "the class capsules",
    "reconstructions": "what the decoder draws of the longest capsules, classes in rising order, "
    "pixels in [0, 1]",
    "probabilities": "softmax over the classes",
}

Run = Callable[[Tensor], dict[str, Tensor]]
"""Pixels (B, C, H, W) to named outputs."""


class Exportable(nn.Module):
    """A trained network from pixels to everything that it says about them, by name.

    CapsNet: `lengths` (B, J), `capsules` (B, J, D) and, with a decoder, `reconstructions`
    (B, T, C, H, W) of the T longest capsules. A CNN: `probabilities` (B, J).
    """

    def __init__(self, model: Model, digits: int, standardised: bool) -> None:
        """digits: T. standardised: whether the network sees images with mean 0 and deviation 1."""
        super().__init__()
        self.model, self.digits, self.standardised = model, digits, standardised

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """pixels: (B, C, H, W) in [0, 1], float32."""
        output = self.model(standardise(pixels) if self.standardised else pixels)
        if not isinstance(self.model, CapsNet):
            return {"probabilities": output.scores_BJ}
        named = {"lengths": output.lengths_BJ, "capsules": output.capsules_BJD}
        if self.model.decoder is not None:
            named["reconstructions"] = self.reconstruct(output.capsules_BJD, output.lengths_BJ)
        return named

    def reconstruct(self, capsules_BJD: Tensor, lengths_BJ: Tensor) -> Tensor:
        """Draw the T classes of the greatest lengths, each from its capsule: (B, T, C, H, W)."""
        assert isinstance(self.model, CapsNet)
        return self.model.decode(capsules_BJD, predicted_classes(lengths_BJ, self.digits))

    def example(self, batch: int) -> Tensor:
        """Images (B, C, H, W), always the same: random pixels, most of them dark, as in ink."""
        size = self.model.image_px
        generator = torch.Generator().manual_seed(batch)
        return torch.rand(batch, self.model.channels, size, size, generator=generator) ** 4


def main(config: ExportConfig, overrides: Sequence[str]) -> None:
    """`capsrun export`: write the model in the chosen formats, with a description.

    Raises UserError when the checkpoint cannot be used, a package is missing, or a file does not
    compute what the checkpoint does; such a file is not kept.
    """
    checkpoint = find_model(config)
    formats = list(FILES) if config.format == "all" else [config.format]
    packages = ONNX_PACKAGES if "onnx" in formats else ()
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={config.format} needs the packages that are missing here "
            f"({', '.join(missing)}): pip install 'capsrun[export]', or take format=torch"
        )
    trained = load_checkpoint(checkpoint)
    dataset = trained.config.dataset
    take(trained.model, fast=False)  # a file is compared with what it consists of
    model = Exportable(trained.model, dataset.digits, dataset.standardise).requires_grad_(False)
    folder = Path(config.out_dir or output_folder(checkpoint, config.runs_dir) / "export")
    text = f"{trained.config.model.name}, trained on {dataset.title}"
    with disk.own_folder(folder, RECORD, *FILES.values(), command="export"):
        announce(checkpoint, trained, text, "exported")
        files = write_formats(formats, model, folder)
        result = {**describe(model, trained, checkpoint), "files": files}
        result["versions"] |= {package: importlib.metadata.version(package) for package in packages}
        disk.write_json(folder / RECORD, result)
    print_usage(result, folder, formats)


def write_formats(formats: Iterable[str], model: Exportable, folder: Path) -> dict[str, Any]:
    """Write the files, and say of each how large it is and how far it is from the checkpoint."""
    program = export_program(model)
    files = {}
    for name in formats:
        path = folder / FILES[name]
        difference = write_checked(name, program, model, path)
        length = path.stat().st_size
        files[path.name] = {"bytes": length, "largest_difference": difference}
        print(f"{path}: {size(length)}, gives what the checkpoint gives to {difference:.1e}")
    return files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters say about their own insides from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)


@quiet()
def export_program(model: Exportable) -> ExportedProgram:
    """Trace the model, on the CPU, for batches of any size."""
    batch = Dim("batch", min=1)
    example = (model.example(EXAMPLE_BATCH),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else []:
            node.meta.pop("stack_trace", None)  # it names the folders of this machine
    return program


@quiet()
def write_checked(name: str, program: ExportedProgram, model: Exportable, path: Path) -> float:
    """Write a file, and keep it if it computes what the model does; returns by how much it differs.

    Raises UserError when it does not.
    """
    with disk.replacing(path) as temporary:
        write_file(name, program, temporary)
        run = load_file(name, temporary)
        examples = [model.example(batch) for batch in CHECKED_BATCHES]
        differences = [largest_difference(model, run, pixels_BCHW) for pixels_BCHW in examples]
        difference = float(torch.tensor(differences).max())  # which is NaN if one of them is
        if not difference <= MOST_DIFFERENCE:
            raise UserError(
                f"{path} was not kept: what it computes differs from the checkpoint by "
                f"{difference:.1e}; try another version of PyTorch, or another format=…"
            )
    return difference


def write_file(name: str, program: ExportedProgram, path: Path) -> None:
    """Write a program with all its weights. Raises UserError for what no ONNX file holds."""
    if name == "torch":
        # To memory first: where the disk is full, PyTorch's own writer ends the program.
        content = io.BytesIO()
        torch.export.save(program, content)
        path.write_bytes(content.getbuffer())
        return
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    if weights > MOST_ONNX_BYTES:
        raise UserError(
            f"the weights have {weights / 1e9:.1f} GB, and an ONNX file holds 2; take format=torch"
        )
    assert program.call_spec.out_spec is not None
    torch.onnx.export(
        program,
        f=path,
        dynamo=True,
        verbose=False,
        external_data=False,
        input_names=["pixels"],
        output_names=list(program.call_spec.out_spec.context),
        dynamic_shapes=({0: "batch"},),  # only names what is dynamic already
    )


def load_file(name: str, path: Path) -> Run:
    """The function that a file of `write_file` holds; ONNX Runtime computes that of ONNX."""
    if name == "torch":
        with open(path, "rb") as stream:
            return torch.export.load(stream).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels_BCHW: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {"pixels": pixels_BCHW.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}

    return run


@torch.inference_mode()
def largest_difference(model: Exportable, run: Run, pixels_BCHW: Tensor) -> float:
    """By how much what an exported file gives differs from what the model itself does, at most.

    Infinite for outputs of other names or shapes.
    """
    ours, theirs = model(pixels_BCHW), run(pixels_BCHW)
    if {n: t.shape for n, t in ours.items()} != {n: t.shape for n, t in theirs.items()}:
        return float("inf")
    if "reconstructions" in ours:
        # Which of two equally long capsules is drawn is a matter of rounding.
        ours["reconstructions"] = model.reconstruct(ours["capsules"], theirs["lengths"])
    return float(torch.stack([(ours[name] - theirs[name]).abs().max() for name in ours]).max())


@torch.inference_mode()
def describe(model: Exportable, trained: Trained, checkpoint: Path) -> dict[str, Any]:
    """What somebody who has only the files needs to know of them."""

    def tensor_facts(tensor: Tensor, meaning: str) -> dict[str, Any]:
        return {"shape": ["batch", *tensor.shape[1:]], "type": "float32", "meaning": meaning}

    pixels_BCHW = model.example(1)
    standardised = ", which the model standardises itself" if model.standardised else ""
    return {
        "command": "export",
        **model_facts(trained, checkpoint),
        "dataset": trained.config.dataset.title,
        "classes": class_names(trained.config.dataset),
        "finished": trained.finished,
        "input": {
            "name": "pixels",
            **tensor_facts(pixels_BCHW, f"pixels in [0, 1]{standardised}"),
        },
        "outputs": {
            name: tensor_facts(tensor, MEANINGS[name])
            for name, tensor in model(pixels_BCHW).items()
        },
        "checked_batches": list(CHECKED_BATCHES),
        **provenance(torch.device("cpu"), "fp32"),
    }


def print_usage(result: dict[str, Any], folder: Path, formats: list[str]) -> None:
    """Say what goes in, what comes out, and the few lines of Python that use each file."""
    tensors = {"pixels": result["input"], **result["outputs"]}
    pixels, *outputs = [f"{n} ({', '.join(map(str, t['shape']))})" for n, t in tensors.items()]
    print(f"takes: {pixels}, float32, in [0, 1]")
    print(f"gives: {', '.join(outputs)}")
    print(f"more about them: {folder / 'export.json'}")
    for number, name in enumerate(formats):
        print(f"{'or' if number else 'next'}: {FILES[name]} in Python, without capsrun:")
        names = ", ".join(result["outputs"])
        text = SNIPPETS[name].format(path=str(folder / FILES[name]), names=names)
        print(textwrap.indent(text, "    "))
