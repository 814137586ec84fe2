"""`capsrun explore`: one HTML page in which the capsules of a trained model are moved by hand.

Shapes: N images, T digits in one image, J classes.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from capsrun import disk
from capsrun.commands.models import find_or_packaged, load_test_images, say_network
from capsrun.config import ExploreConfig, ExploreSettings
from capsrun.data.batches import in_class_order
from capsrun.data.splits import Split
from capsrun.errors import UserError
from capsrun.explorer.page import Shown, build_page
from capsrun.model_config import DynamicRoutingConfig, RoutingConfig, algorithm_of
from capsrun.models.capsnet import CapsNet
from capsrun.models.dynamic import CapsuleLayer
from capsrun.names import model_words, suggest
from capsrun.report.run_page import refresh_run_page
from capsrun.runs.checkpoint import load_drawing_model, output_folder
from capsrun.runs.progress import bar
from capsrun.terminal import counted, size
from capsrun.training.device import resolve_device
from capsrun.training.metrics import score_split
from capsrun.training.step import to_device

# Capsules are computed for so many images at once.
BATCH_SIZE = 100


def main(config: ExploreConfig, overrides: Sequence[str]) -> None:
    """`capsrun explore`: make the page, and say what else can be done with the model."""
    checkpoint = find_or_packaged(config)
    explore(config, checkpoint)
    words = model_words(config, checkpoint)
    suggest(["perturb", *words, "perturb.format=gif"], ["export", *words])


def explore(config: ExploreConfig, checkpoint: Path) -> Path:
    """Write the page for the model of `checkpoint` and return its path.

    Raises UserError when checkpoint, data or settings cannot be used, or the page gets too large.
    """
    device = resolve_device(config.device)
    trained, model = load_drawing_model(checkpoint)
    say_network(checkpoint, trained)
    dataset = load_test_images(config, trained, device)
    folder = output_folder(checkpoint, config.runs_dir)
    path = Path(config.out or folder / f"explore-{dataset.name}.html")
    refuse_another_file(path)
    disk.make_folder(path.parent)
    to_device(model, device, fast=False)
    shown = choose(config.explore, model, dataset.test)
    run = trained.config
    title = (
        f"{run.name or 'CapsNet'}, seed {run.seed}: "
        f"{routing_text(model.routing)}, trained for {counted(trained.step, 'step')} "
        f"on {run.dataset.title}{'' if trained.finished else ', not finished'}; test images of "
        f"{dataset.name}"
    )
    text, reason = page_within_limit(
        config.explore, model, shown, dataset.class_names, title, run.dataset.standardise
    )
    disk.write_file(path, text)
    refresh_run_page(path.parent)  # which links to what was made of the run
    searched = min(config.explore.search, len(dataset.test))
    wrong = int((shown.labels_NT != shown.predicted_NT).any(1).sum())
    print(
        f"{len(shown.numbers_N)} of the first {searched:,} test images of {dataset.name}, {wrong} "
        "of them taken for others (for more: explore.images, explore.mistakes, explore.search)"
    )
    drawing = f"cannot be drawn: {reason}" if reason else "can be drawn: the encoder is in the page"
    print(f"digits {drawing}")
    print(f"{path}: {size(len(text.encode()))}; open it in any browser")
    return path


def routing_text(routing: RoutingConfig) -> str:
    """How capsules are routed, in words.

    >>> from capsrun import training_config
    >>> routing_text(training_config().routing), routing_text(training_config("routing=em").routing)
    ('3 routing iterations', 'routing em')
    """
    if isinstance(routing, DynamicRoutingConfig):
        return counted(routing.iterations, "routing iteration")
    return f"routing {algorithm_of(routing)}"


def refuse_another_file(path: Path) -> None:
    """Raise UserError where something is that capsrun did not write."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; out= is the file to write")
    if path.is_file():
        with open(path, "rb") as stream:
            head = stream.read(1_000)
        if head and b"<title>Inside a capsule: " not in head:
            raise UserError(f"{path} is no page of capsrun; choose another out=…")


@torch.inference_mode()
def choose(settings: ExploreSettings, model: CapsNet, test: Split) -> Shown:
    """The first images of each class and the first mistakes, with their capsules."""
    testing = partial(bar, doing="testing")
    score = score_split(model, test, "fp32", progress=testing, most=settings.search)
    model.eval()
    chosen_N = chosen_numbers(settings, score.labels_NT, score.predicted_NT, model.classes)
    batches = [
        in_class_order(test.batch(numbers_B.to(test.device)))
        for numbers_B in chosen_N.split(BATCH_SIZE)
    ]
    return Shown(
        chosen_N,
        score.labels_NT[chosen_N],
        score.predicted_NT[chosen_N],
        torch.cat([batch.targets_BTCHW for batch in batches]),
        torch.cat([model.encode(batch.images_BCHW) for batch in batches]),
    )


def chosen_numbers(
    settings: ExploreSettings, labels_NT: Tensor, predicted_NT: Tensor, classes: int
) -> Tensor:
    """Which images the page shows, in rising order."""
    of_classes = [
        (labels_NT == label).any(1).nonzero().squeeze(1)[: settings.images]
        for label in range(classes)
    ]
    wrong = (labels_NT != predicted_NT).any(1).nonzero().squeeze(1)[: settings.mistakes]
    return torch.cat([*of_classes, wrong]).unique()


def page_within_limit(
    settings: ExploreSettings,
    model: CapsNet,
    shown: Shown,
    class_names: tuple[str, ...],
    title: str,
    standardised: bool,
) -> tuple[str, str]:
    """The page, with the encoder if it may be there, and why it is not; empty when it is.

    standardised: whether the network sees images with mean 0 and deviation 1.
    Raises UserError for a page beyond the limit, unless the encoder is asked for, and where that
    cannot be in it.
    """
    reason = ""
    if settings.encoder == "false":
        reason = "explore.encoder=false"
    elif model.channels != 1:
        reason = "only grey images can be drawn"
    elif standardised:
        reason = "the network sees standardised images"
    elif type(model) is not CapsNet or not isinstance(model.digitcaps, CapsuleLayer):
        reason = "the page computes CapsNet with routing by agreement, which this network has not"
    asked = settings.encoder == "true"
    if reason and asked:
        raise UserError(f"explore.encoder=true cannot be done: {reason}")
    text = build_page(model, shown, class_names, title, reason)
    if asked or len(text.encode()) <= settings.limit_mb * 1e6:
        return text, reason
    beyond = f"more than explore.limit_mb={settings.limit_mb:g}"
    if not reason:
        reason = f"the encoder would make the page {size(len(text.encode()))}, {beyond}"
        text = build_page(model, shown, class_names, title, reason)
    if len(text.encode()) > settings.limit_mb * 1e6:
        raise UserError(
            f"the page would have {size(len(text.encode()))}, {beyond}; set that higher, or take "
            "fewer explore.images, or a model with a narrower decoder"
        )
    return text, reason
