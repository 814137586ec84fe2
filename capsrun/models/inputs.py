"""What a network takes, and one sentence for what it was not made for.

Shapes: B batch, C channels, H and W pixels, T digits in one image.
"""

import torch
from torch import Tensor

# What rounding may add to a pixel of 0 or 1.
TOLERANCE = 1e-3
# And to the mean and the standard deviation of an image.
MOMENT_TOLERANCE = 0.02


def check_images(
    images_BCHW: Tensor, channels: int, image_px: int, standardised: bool, weight: Tensor
) -> None:
    """Raise ValueError for images of another shape, type, place or range than a network takes.

    standardised: it was trained on images of mean 0 and deviation 1; else pixels are in [0, 1].
    weight: of its first layer.
    """
    _check_tensor("images", images_BCHW)
    shape = (channels, image_px, image_px)
    if images_BCHW.dim() != 4 or tuple(images_BCHW.shape[1:]) != shape:
        found, wanted = (", ".join(map(str, s)) for s in (images_BCHW.shape, ("B", *shape)))
        raise ValueError(f"images of shape ({found}), but this network takes ({wanted})")
    if not images_BCHW.is_floating_point():
        raise ValueError(f"images of {images_BCHW.dtype}: their pixels are to be floats in [0, 1]")
    _check_place_and_type("images", images_BCHW, "network", weight)
    if not images_BCHW.numel() or not _can_be_read(images_BCHW):
        return
    # A comparison with NaN does not hold either.
    if standardised:
        deviations_B, means_B = torch.std_mean(images_BCHW.detach().float().flatten(1), 1)
        mean, deviation = float(means_B.abs().max()), float(deviations_B.max())
        if not (mean <= MOMENT_TOLERANCE and deviation <= 1 + MOMENT_TOLERANCE):
            raise ValueError(
                f"images with mean {mean:g} and standard deviation {deviation:g}, but this network "
                "takes each with 0 and 1, as the splits of its data set give them"
            )
        return
    low, high = map(float, images_BCHW.detach().aminmax())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):
        hint = "; for such of mean 0 and deviation 1 it is made with standardised=True"
        raise ValueError(
            f"images with pixels from {low:g} to {high:g}, not in [0, 1]{hint if low < 0 else ''}"
        )


def check_maps(maps_BCHW: Tensor, channels: int, weight: Tensor) -> None:
    """Raise ValueError for maps of another shape, type or place than a layer takes.

    weight: of the layer.
    """
    _check_tensor("maps", maps_BCHW)
    if maps_BCHW.dim() != 4 or maps_BCHW.shape[1] != channels:
        found = ", ".join(map(str, maps_BCHW.shape))
        raise ValueError(f"maps of shape ({found}), but this layer takes (B, {channels}, H, W)")
    _check_floats("maps", maps_BCHW, weight)


def check_capsules(capsules_BIK: Tensor, count: int, dimensions: int, weight: Tensor) -> None:
    """Raise ValueError for capsules of another shape, type or place than a layer takes."""
    _check_tensor("capsules", capsules_BIK)
    if capsules_BIK.dim() != 3 or tuple(capsules_BIK.shape[1:]) != (count, dimensions):
        found = ", ".join(map(str, capsules_BIK.shape))
        wanted = f"(B, {count}, {dimensions}), {count} of dimension {dimensions}"
        raise ValueError(f"capsules of shape ({found}), but this layer takes {wanted}")
    _check_floats("capsules", capsules_BIK, weight)


def check_sizes(**sizes: object) -> None:
    """Raise ValueError for sizes that are no whole numbers of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}: it is to be a whole number of at least 1")


def check_positive(name: str, value: object) -> None:
    """Raise ValueError for what is no finite number above 0."""
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}: it is to be a finite number above 0")


def check_choice(name: str, value: object, *choices: str) -> None:
    """Raise ValueError for what is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it can be one of: {', '.join(choices)}")


def check_lengths(lengths_BJ: Tensor) -> None:
    """Raise ValueError for what are not the lengths (B, J) of capsules."""
    _check_tensor("lengths", lengths_BJ)
    if lengths_BJ.dim() != 2 or not lengths_BJ.is_floating_point():
        found = f"{lengths_BJ.dtype} of shape {tuple(lengths_BJ.shape)}"
        hint = "; of capsules they are capsules.norm(dim=2)" if lengths_BJ.dim() == 3 else ""
        raise ValueError(f"lengths of {found}: they are to be floats of shape (B, J){hint}")


def check_same_shape(reconstructions: Tensor, targets: Tensor) -> None:
    """Raise ValueError for images that cannot be compared pixel by pixel."""
    _check_tensor("reconstructions", reconstructions)
    _check_tensor("targets", targets)
    check_place("targets", targets, reconstructions)
    if reconstructions.shape != targets.shape or targets.dim() < 2:
        shapes = f"{tuple(reconstructions.shape)}, but targets of {tuple(targets.shape)}"
        raise ValueError(f"reconstructions of shape {shapes}: they are to have the same")
    if not (targets.is_floating_point() and reconstructions.is_floating_point()):
        raise ValueError(
            f"reconstructions of {reconstructions.dtype} and targets of {targets.dtype}: both are "
            "to be floats in [0, 1]"
        )


def one_or_several(labels: Tensor) -> Tensor:
    """Labels (B, T) of labels (B,) or (B, T); anything else as it is."""
    return labels[:, None] if isinstance(labels, Tensor) and labels.dim() == 1 else labels


def check_labels(labels_BT: Tensor, batch: int, classes: int, like: Tensor) -> None:
    """Raise ValueError for labels that are not the classes (B, T) of the digits in each image.

    like: what they belong to, on whose device they are to be.
    """
    _check_tensor("labels", labels_BT)
    check_place("labels", labels_BT, like)
    if labels_BT.dim() != 2 or labels_BT.shape[0] != batch or not labels_BT.shape[1]:
        hint = "; of one digit an image they are labels[:, None]" if labels_BT.dim() == 1 else ""
        raise ValueError(
            f"labels of shape {tuple(labels_BT.shape)} for {batch} images: they are to have shape "
            f"(B, T), T digits in each image{hint}"
        )
    if labels_BT.dtype != torch.int64:
        raise ValueError(f"labels of {labels_BT.dtype}: they are to be int64, a class each")
    if not labels_BT.numel() or not _can_be_read(labels_BT):
        return
    low, high = map(int, labels_BT.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(f"labels from {low} to {high}, but the classes are 0 to {classes - 1}")
    rising_BT = labels_BT.sort(dim=1).values
    if bool((rising_BT[:, 1:] == rising_BT[:, :-1]).any()):
        raise ValueError(
            "labels that name a class twice in one image: one-hot labels become classes by "
            "labels.argmax(1, keepdim=True)"
        )


def check_place(name: str, given: Tensor, like: Tensor) -> None:
    """Raise ValueError for a tensor that is on another device than what it belongs to."""
    if given.device != like.device:
        raise ValueError(f"{name} on {given.device}, and not on {like.device}: {name}.to(…)")


def _check_tensor(name: str, given: object) -> None:
    if not isinstance(given, Tensor):
        raise ValueError(
            f"{name} are a {type(given).__name__}: make a tensor of it, torch.as_tensor({name})"
        )
    if given.layout != torch.strided:
        raise ValueError(f"{name} of layout {given.layout}: make it dense, {name}.to_dense()")


def _check_floats(name: str, given: Tensor, weight: Tensor) -> None:
    if not given.is_floating_point():
        raise ValueError(f"{name} of {given.dtype}: they are to be floats, {name}.float()")
    _check_place_and_type(name, given, "layer", weight)


def _check_place_and_type(name: str, given: Tensor, taker: str, weight: Tensor) -> None:
    if given.device != weight.device:
        raise ValueError(
            f"{name} on {given.device}, but this {taker} is on {weight.device}: {name}.to(…)"
        )
    if given.dtype != weight.dtype and not torch.is_autocast_enabled(weight.device.type):
        raise ValueError(
            f"{name} of {given.dtype}, but this {taker} is of {weight.dtype}: "
            f"{name}.to({weight.dtype})"
        )


def is_traced() -> bool:
    """Whether PyTorch records or transforms what is computed, in place of computing it."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing():
        return True
    return torch._C._functorch.peek_interpreter_stack() is not None  # of `torch.func`


def _can_be_read(tensor: Tensor) -> bool:
    """Whether its numbers are at hand: not while a program is traced or a graph is captured."""
    captured = tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    return not (is_traced() or captured or tensor.device.type == "meta")
