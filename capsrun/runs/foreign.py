"""What a file is that is no checkpoint of capsrun, by its content, of which nothing is run."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# As much of a file as is looked at.
HEAD_BYTES = 512
PACKED = "a packed archive; unpack it"
EXPORTED = "; of what `capsrun export` wrote, give the checkpoint that it was made from"
AUTHORS = "; weights of the authors' code, as NumPy arrays by name, go into a network by "
AUTHORS += "capsrun.load_authors_weights: see docs/python.md"
# How a file begins, and what it is then.
HEADS = {
    rb"\Z": "empty",
    rb"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` brings the file",
    rb"(?i)\s*<(!doctype|html|\?xml)": "a web page, which came in place of a download perhaps",
    rb"\x89PNG|\xff\xd8\xff|GIF8": "a picture",
    rb"\x89HDF\r\n": "an HDF5 file, of Keras say",
    rb".{5}\0{3}\{": "a file of safetensors",
    rb"\x08[\x01-\x20](\x12.[ -~]|:)": f"an ONNX file{EXPORTED}",
    rb"model_checkpoint_path:": f"a list of TensorFlow's checkpoints{AUTHORS}",
    rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19": "an old file of PyTorch with other objects",
    rb"\x80[\x02-\x05]": "a pickle of Python",
    rb"\x93NUMPY": f"an array of NumPy{AUTHORS}",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|.{257}ustar": PACKED,
    rb"[\s -~]{12}": "text; of a run, give its folder",
}
# What a line of a ZIP archive's table of contents is like, and what it is then.
MEMBERS = {
    r"(\w+/)?(archive_format|serialized_exported_program\.json)": (
        f"a program of torch.export{EXPORTED}"
    ),
    r".+/constants\.pkl": "a program of TorchScript",
    r".+/data\.pkl": "a file of PyTorch with other objects, a whole module say",
    r".+\.npy": f"a file of NumPy arrays{AUTHORS}",
    r"model\.weights\.h5": "a model of Keras",
    "": PACKED,
}
TENSORFLOW = r".+\.(index|meta|data-\d+-of-\d+)"


def kind_of_file(path: Path) -> str | None:
    """What a file is that cannot be read as a checkpoint, and what to do with it.

    None where nothing tells, and for an archive that is damaged. Raises OSError.
    """
    if not path.is_file():  # a pipe would be waited for
        return "a folder, a pipe or a device"
    if re.fullmatch(TENSORFLOW, path.name):
        return f"a checkpoint of TensorFlow{AUTHORS}"
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if not head.startswith(b"PK"):
        return next((HEADS[p] for p in HEADS if re.match(p, head, re.DOTALL)), None)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return None
            names = archive.namelist()
    except Exception:  # zipfile fails in many ways on a damaged file
        return None
    return next(MEMBERS[p] for p in MEMBERS if not p or any(re.fullmatch(p, n) for n in names))


def kind_of_content(content: Any) -> str:
    """What a file of PyTorch holds that has no mark of capsrun."""
    if isinstance(content, Mapping) and "pytorch-lightning_version" in content:
        return "a checkpoint of PyTorch Lightning"
    named = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    if isinstance(named, Mapping) and any(isinstance(v, torch.Tensor) for v in named.values()):
        return "a file of another program's weights (a state dict), without its network"
    return "a file of PyTorch of another program"
