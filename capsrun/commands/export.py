"""`capsrun export`: write a trained model as files that work without capsrun, and check them.

Shapes: B batch, C channels, H and W pixels, J classes, D dimensions of a class capsule, T digits in
one image.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from capsrun import disk
from capsrun.config import ExportConfig
from capsrun.data.splits import standardise
from capsrun.disk import replacing
from capsrun.errors import UserError
from capsrun.models import Model
from capsrun.models.capsnet import CapsNet
from capsrun.runs.checkpoint import Trained, find_model, load_checkpoint, output_folder
from capsrun.terminal import size
from capsrun.training.device import provenance
from capsrun.training.metrics import predicted_classes

# A batch of one would be taken for a constant.
EXAMPLE_BATCH = 2
# 9 are more than a CapsNet on a CPU routes at once.
CHECKED_BATCHES = (1, 3, 9)
# Between float32 results that were added up in another order; usually it is about 10⁻⁶.
MOST_DIFFERENCE = 1e-4
# What one ONNX file may hold; beyond it the weights would have to be in files of their own.
MOST_ONNX_BYTES = 2_000_000_000

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
        return self.model.decode_all(capsules_BJD, predicted_classes(lengths_BJ, self.digits))

    def example(self, batch: int) -> Tensor:
        """Images that are always the same: random pixels, most of them dark, as those of ink."""
        size = self.model.image_px
        generator = torch.Generator().manual_seed(batch)
        return torch.rand(batch, self.model.channels, size, size, generator=generator) ** 4

    def output_shapes(self) -> dict[str, list[str | int]]:
        """The name and the shape of each output, for any batch."""
        with torch.inference_mode():
            outputs = self(self.example(1))
        return {name: ["batch", *tensor.shape[1:]] for name, tensor in outputs.items()}


@dataclass(frozen=True)
class Format:
    """A kind of file."""

    file_name: str
    write: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Run]
    snippet: str
    """How the file `{path}` is used, with `{names}` of its outputs."""
    packages: tuple[str, ...] = ()
    """What has to be installed to write and check it, beside what capsrun itself needs."""


def main(config: ExportConfig, overrides: Sequence[str]) -> None:
    """`capsrun export`: write the chosen or the default model."""
    export(config, find_model(config))


def export(config: ExportConfig, checkpoint: Path) -> dict[str, Any]:
    """Write the model of `checkpoint` in the chosen formats; returns what `export.json` holds.

    Raises UserError when the checkpoint cannot be used, a package is missing, or a file does not
    compute what the checkpoint does; such a file is not kept.
    """
    names = list(FORMATS) if config.format == "all" else [config.format]
    check_packages(config.format, names)
    trained = load_checkpoint(checkpoint)
    dataset = trained.config.dataset
    model = Exportable(trained.model, dataset.digits, dataset.standardise).requires_grad_(False)
    out_dir = Path(config.out_dir or output_folder(checkpoint, config.runs_dir) / "export")
    disk.make_folder(out_dir)

    print(f"{checkpoint}: {trained.config.model.name}, trained on {dataset.name}")
    if not trained.finished:
        print(f"this run is not finished: its model after {trained.step:,} steps is exported")
    with quiet():
        program = export_program(model)
    files = {}
    for name in names:
        path = out_dir / FORMATS[name].file_name
        difference = write_checked(FORMATS[name], program, model, path)
        count = path.stat().st_size
        files[path.name] = {"bytes": count, "largest_difference": difference}
        print(f"{path}: {size(count)}, gives what the checkpoint gives to {difference:.1e}")
    result = {**description(model, trained, checkpoint, names), "files": files}
    disk.write_json(out_dir / "export.json", result)
    print_usage(result, [out_dir / FORMATS[name].file_name for name in names], names)
    return result


def check_packages(chosen: str, names: list[str]) -> None:
    """Raise UserError, before any work is done, when a format's packages are not installed."""
    needed = [package for name in names for package in FORMATS[name].packages]
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"format={chosen} needs the packages that are missing here ({', '.join(missing)}): "
            "pip install 'capsrun[export]', or take format=torch"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters say about their own insides from the user."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def export_program(model: Exportable) -> ExportedProgram:
    """Trace the model, on the CPU, for batches of any size."""
    batch = Dim("batch", min=1)
    example = (model.example(EXAMPLE_BATCH),)
    program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else []:
            node.meta.pop("stack_trace", None)  # it names the folders of this machine
    return program


def write_checked(kind: Format, program: ExportedProgram, model: Exportable, path: Path) -> float:
    """Write a file, and keep it if it computes what the model does; returns by how much it differs.

    Raises UserError when it does not.
    """
    with replacing(path) as temporary:
        with quiet():
            kind.write(program, temporary)
            run = kind.load(temporary)
            differences = [
                largest_difference(model, run, model.example(batch)) for batch in CHECKED_BATCHES
            ]
        difference = float(torch.tensor(differences).max())  # which is NaN if one of them is
        if not difference <= MOST_DIFFERENCE:
            raise UserError(
                f"{path} was not kept: what it computes differs from the checkpoint by "
                f"{difference:.1e}; try another version of PyTorch, or another format=…"
            )
    return difference


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


def write_torch(program: ExportedProgram, path: Path) -> None:
    """Write what `torch.export.load` reads."""
    with open(path, "wb") as stream:  # to a stream, as it wants a path that ends in .pt2
        torch.export.save(program, stream)


def load_torch(path: Path) -> Run:
    """The function that a file of `torch.export.save` holds."""
    with open(path, "rb") as stream:
        return torch.export.load(stream).module()


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Write one ONNX file with all weights in it. Raises UserError when they are too many."""
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    if weights > MOST_ONNX_BYTES:
        raise UserError(
            f"the weights have {weights / 1e9:.1f} GB, and an ONNX file holds 2; take format=torch"
        )
    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=["pixels"],
        output_names=outputs_of(program),
        dynamic_shapes=({0: "batch"},),  # only names what is dynamic already
    )
    assert converted is not None  # as it is with dynamo=True
    converted.save(path, external_data=False)


def outputs_of(program: ExportedProgram) -> list[str]:
    """The names of a program's outputs, in order."""
    spec = program.call_spec.out_spec
    assert spec is not None
    return list(spec.context)


def load_onnx(path: Path) -> Run:
    """The function that an ONNX file holds, computed by ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(pixels_BCHW: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {"pixels": pixels_BCHW.numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays)}

    return run


FORMATS = {
    "onnx": Format(
        "model.onnx",
        write_onnx,
        load_onnx,
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession({path!r})\n"
        "[{names}] = session.run(None, {{'pixels': pixels}})",
        ("onnx", "onnxscript", "onnxruntime"),
    ),
    "torch": Format(
        "model.pt2",
        write_torch,
        load_torch,
        "import torch\n"
        "model = torch.export.load({path!r}).module()\n"
        "outputs = model(pixels)  # a dict: {names}",
    ),
}


def description(
    model: Exportable, trained: Trained, checkpoint: Path, names: list[str]
) -> dict[str, Any]:
    """What somebody who has only the files needs to know of them."""
    size = model.model.image_px
    computed = provenance(torch.device("cpu"), "fp32")
    for package in (package for name in names for package in FORMATS[name].packages):
        computed["versions"][package] = importlib.metadata.version(package)
    return {
        "command": "export",
        "name": trained.config.name,
        "dataset": trained.config.dataset.name,
        "model": trained.config.model.name,
        "seed": trained.config.seed,
        "steps": trained.step,
        "finished": trained.finished,
        "input": {
            "name": "pixels",
            "shape": ["batch", model.model.channels, size, size],
            "type": "float32",
            "meaning": "pixels in [0, 1]"
            + (", which the model standardises itself" if model.standardised else ""),
        },
        "outputs": {
            name: {"shape": shape, "type": "float32", "meaning": MEANINGS[name]}
            for name, shape in model.output_shapes().items()
        },
        "checked_batches": list(CHECKED_BATCHES),
        **computed,
        "checkpoint": str(checkpoint),
        "trained": dataclasses.asdict(trained.config),
    }


def print_usage(result: dict[str, Any], paths: list[Path], names: list[str]) -> None:
    """Say what goes in, what comes out, and the few lines of Python that use each file."""

    def described(name: str, tensor: dict[str, Any]) -> str:
        return f"{name} ({', '.join(map(str, tensor['shape']))})"

    outputs = result["outputs"]
    print(f"takes: {described('pixels', result['input'])}, float32, in [0, 1]")
    print(f"gives: {', '.join(described(name, outputs[name]) for name in outputs)}")
    print(f"more about them: {paths[0].parent / 'export.json'}")
    for number, (name, path) in enumerate(zip(names, paths)):
        print(f"{'or' if number else 'next'}: {path.name} in Python, without capsrun:")
        text = FORMATS[name].snippet.format(path=str(path), names=", ".join(outputs))
        print("\n".join(f"    {line}" for line in text.split("\n")))
