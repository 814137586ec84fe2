"""Puts a trained CapsNet and some test images into one HTML page that needs nothing beside it.

Shapes: N images, T digits in one image, J classes, D dimensions of a class capsule, C channels,
H and W pixels.
"""

import base64
import html
import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

from capsrun.models.capsnet import CapsNet
from capsrun.report.figures import TWO_COLOURS

LIMIT_BYTES = 8_000_000


@dataclass(frozen=True)
class Shown:
    """The test images of the page, and what the model makes of them."""

    numbers_N: Tensor
    """Which test images they are."""
    labels_NT: Tensor
    predicted_NT: Tensor
    targets_NTCHW: Tensor
    """The digits that each image consists of, pixels in [0, 1]."""
    capsules_NJD: Tensor


def build_page(
    model: CapsNet, shown: Shown, class_names: tuple[str, ...], title: str, encoder: bool, note: str
) -> str:
    """The page as text. encoder: whether it can classify what is drawn; note: why not, if not."""
    facts = {
        "title": title,
        "classNames": class_names,
        "digits": shown.labels_NT.shape[1],
        "dimensions": model.config.digit_dimensions,
        "channels": model.channels,
        "px": model.image_px,
        "colours": TWO_COLOURS,
        "numbers": shown.numbers_N.tolist(),
        "labels": shown.labels_NT.tolist(),
        "predicted": shown.predicted_NT.tolist(),
        "decoder": [[layer.in_features, layer.out_features] for layer in linear_layers(model)],
        "encoder": encoder_facts(model) if encoder else None,
        "note": note,
    }
    blobs = {
        "pixels": (shown.targets_NTCHW * 255).round().to(torch.uint8),
        "capsules": shown.capsules_NJD.float(),
        "decoder": in_half(decoder_weights(model)),
    }
    if encoder:
        blobs["encoder"] = in_half(encoder_weights(model))
    data = "\n".join(
        f'<script type="text/plain" id="{name}">{encoded(tensor)}</script>'
        for name, tensor in blobs.items()
    )
    parts = {name: part(name) for name in ("style.css", "network.js", "explorer.js")}
    # No "<" in the facts: to HTML it could be the end of the script, or the beginning of another.
    parts["facts"] = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    parts |= {"title": html.escape(title), "data": data}
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: parts[found[1]], part("page.html"))


def part(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def encoded(tensor: Tensor) -> str:
    """The bytes of a tensor, lowest byte first, in base64."""
    return base64.b64encode(tensor.contiguous().cpu().numpy().tobytes()).decode()


def in_half(tensors: list[Tensor]) -> Tensor:
    """Weights one after the other, in half precision."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors]).half()


def linear_layers(model: CapsNet) -> list[nn.Linear]:
    """The layers of the decoder that have weights."""
    assert model.decoder is not None
    return [layer for layer in model.decoder if isinstance(layer, nn.Linear)]


def decoder_weights(model: CapsNet) -> list[Tensor]:
    """For each layer its weights (in, out), which the page adds up input by input, and its bias."""
    return [part for layer in linear_layers(model) for part in (layer.weight.T, layer.bias)]


def encoder_weights(model: CapsNet) -> list[Tensor]:
    """Both convolutions (out, in, row, column), W (I, K, J, D), and their biases."""
    no_bias = torch.zeros(model.classes, model.config.digit_dimensions)
    digit_bias = no_bias if model.digitcaps_bias is None else model.digitcaps_bias
    assert model.conv1.bias is not None
    assert model.primarycaps.bias is not None
    return [
        model.conv1.weight,
        model.conv1.bias,
        model.primarycaps.weight,
        model.primarycaps.bias,
        model.digitcaps_weight,
        digit_bias,
    ]


def encoder_facts(model: CapsNet) -> dict[str, Any]:
    """What the page needs to know to compute the encoder."""
    return {
        "kernel": model.config.kernel_px,
        "seen": model.seen_px,
        "conv1Pads": model.conv1_pads,
        "primaryPads": model.primary_pads,
        "conv1Channels": model.config.conv1_channels,
        "types": model.config.primary_types,
        "inputs": model.primary_capsules,
        "primaryDimensions": model.config.primary_dimensions,
        "scale": model.primary_scale,
        "iterations": model.routing.iterations,
        "leaky": model.routing.leaky,
    }
