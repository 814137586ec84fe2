"""Where the time of a training step goes."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

# Part of a step: what the names of its operations contain. The first part that matches the
# outermost operation counts, so that a convolution inside a backward pass is part of that.
PARTS = {
    "optimiser": ("Adam", "zero_grad"),
    "data": ("capsrun::batch",),
    "votes and routing, backward": ("_RouteBackward", "BmmBackward", "SoftmaxBackward"),
    "votes and routing, forward": ("_Route", "aten::bmm", "aten::einsum", "aten::softmax"),
    "convolutions, backward": (
        *("_ReluFrequencyConvBackward", "_SquashBackward", "_PatchConvBackward"),
        *("_ReluStridedConvBackward", "ConvolutionBackward"),
    ),
    "convolutions, forward": (
        *("_ReluFrequencyConv", "_Squash", "_PatchConv", "_ReluStridedConv", "aten::conv2d"),
    ),
    "decoder, backward": ("AddmmBackward", "SigmoidBackward"),
    "decoder, forward": ("aten::linear", "aten::sigmoid"),
}
REST = "the rest (losses, casts)"


def part_of(event: FunctionEvent) -> str:
    """The part of the step to which an operation belongs."""
    names = []
    outer: FunctionEvent | None = event
    while outer is not None:
        names.append(outer.name)
        outer = outer.cpu_parent
    for name in reversed(names):
        for part, words in PARTS.items():
            if any(word in name for word in words):
                return part
    return REST


def breakdown_ms(advance: Callable[[int], None], steps: int, device: torch.device) -> dict:
    """Milliseconds of each part of a step, and of the operations that took longest.

    advance: makes a number of steps; not one that replays a graph, whose kernels belong to no
    operation. On a GPU its own time is counted, not that of the host.
    """
    advance(2)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as recorded:
        advance(steps)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    parts: dict[str, float] = defaultdict(float)
    operations: dict[str, float] = defaultdict(float)
    for event in recorded.events():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, which the operation that launched it counts as its own
        on_gpu = device.type == "cuda"
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[part_of(event)] += spent / 1e3 / steps
        operations[event.name] += spent / 1e3 / steps
    longest = sorted(operations.items(), key=lambda item: -item[1])[:12]
    return {
        "parts_ms": dict(sorted(parts.items(), key=lambda item: -item[1])),
        "operations_ms": dict(longest),
    }
