"""Puts a trained CapsNet and some test images into one HTML page that needs nothing beside it.

Shapes: N images, T digits in one image, J classes, D dimensions of a class capsule, C channels,
H and W pixels.
"""

import base64
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capsrun.model_config import DynamicRoutingConfig
from capsrun.models.capsnet import CapsNet
from capsrun.models.dynamic import CapsuleLayer
from capsrun.report.figures import TWO_COLOURS


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
    model: CapsNet, shown: Shown, class_names: tuple[str, ...], title: str, note: str
) -> str:
    """The page as text. note: why it cannot classify what is drawn; empty: it can."""
    assert model.decoder is not None
    layers = [layer for layer in model.decoder if isinstance(layer, nn.Linear)]
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
        "decoder": [[layer.in_features, layer.out_features] for layer in layers],
        "encoder": None if note else encoder_facts(model),
        "note": note,
    }
    blobs = {
        "pixels": (shown.targets_NTCHW * 255).round().to(torch.uint8),
        "capsules": shown.capsules_NJD.float(),
        # Weights as (in, out), which the page adds up input by input.
        "decoder": in_half([part for layer in layers for part in (layer.weight.T, layer.bias)]),
    }
    if not note:
        blobs["encoder"] = in_half(encoder_weights(model))
    parts = {name: part(name) for name in ("style.css", "network.js", "explorer.js")}
    # No "<" in the facts: to HTML it could be the end of the script, or the beginning of another.
    parts["facts"] = json.dumps(facts, ensure_ascii=False).replace("<", "\\u003c")
    parts["title"] = html.escape(title)
    base64_of = {  # of the bytes, the lowest of each number first
        name: base64.b64encode(tensor.contiguous().cpu().numpy().tobytes()).decode()
        for name, tensor in blobs.items()
    }
    parts["data"] = "\n".join(
        f'<script type="text/plain" id="{name}">{text}</script>' for name, text in base64_of.items()
    )
    return re.sub(r"\{\{([\w.]+)\}\}", lambda found: parts[found[1]], part("page.html"))


def part(name: str) -> str:
    """The text of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def in_half(tensors: list[Tensor]) -> Tensor:
    """Weights one after the other, in half precision."""
    return torch.cat([tensor.detach().float().flatten() for tensor in tensors]).half()


def encoder_weights(model: CapsNet) -> list[Tensor]:
    """Both convolutions (out, in, row, column), W (I, K, J, D), each followed by its biases."""
    digitcaps = model.digitcaps
    assert isinstance(digitcaps, CapsuleLayer)  # else there is a reason why it cannot be here
    no_bias = torch.zeros(model.classes, model.config.digit_dimensions)
    digit_bias = no_bias if digitcaps.bias is None else digitcaps.bias
    convolutions = [*model.conv1.parameters(), *model.primarycaps.parameters()]
    return [*convolutions, digitcaps.weight, digit_bias]


def encoder_facts(model: CapsNet) -> dict[str, Any]:
    """What the page needs to know to compute the encoder."""
    assert isinstance(model.routing, DynamicRoutingConfig)
    return {
        "kernel": model.config.kernel_px,
        "seen": model.seen_px,
        "conv1Pads": model.conv1_pads,
        "primaryPads": model.primary_pads,
        "conv1Channels": model.config.conv1_channels,
        "types": model.config.primary_types,
        "inputs": model.primary_capsules,
        "primaryDimensions": model.config.primary_dimensions,
        "scale": model.primarycaps.scale,
        "iterations": model.routing.iterations,
        "leaky": model.routing.leaky,
    }
