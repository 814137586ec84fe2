"""`capsrun explore`: one HTML page in which the capsules of a trained model are moved by hand.

Shapes: N images, T digits in one image, J classes.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from capsrun import disk
from capsrun.config import ExploreConfig, ExploreSettings
from capsrun.data import Dataset, Split, load_dataset
from capsrun.data.batches import in_class_order
from capsrun.disk import replacing
from capsrun.errors import UserError
from capsrun.explorer.page import LIMIT_BYTES, Shown, build_page
from capsrun.models.capsnet import CapsNet
from capsrun.names import model_words, suggest
from capsrun.report.run_page import refresh_run_page
from capsrun.runs.checkpoint import (
    Trained,
    check_dataset,
    find_model,
    load_drawing_model,
    output_folder,
)
from capsrun.runs.progress import bar
from capsrun.terminal import size
from capsrun.training.device import resolve_device
from capsrun.training.metrics import score_split
from capsrun.training.step import to_device

# Capsules are computed for so many images at once.
BATCH_SIZE = 100


def main(config: ExploreConfig, overrides: Sequence[str]) -> None:
    """`capsrun explore`: make the page, and say what else can be done with the model."""
    checkpoint = find_model(config)
    explore(config, checkpoint)
    words = model_words(config, checkpoint)
    suggest(["perturb", *words, "perturb.format=gif"], ["export", *words])


def explore(config: ExploreConfig, checkpoint: Path) -> Path:
    """Write the page for the model of `checkpoint` and return its path.

    Raises UserError when checkpoint, data or settings cannot be used, or the page gets too large.
    """
    device = resolve_device(config.device)
    trained, model = load_drawing_model(checkpoint)
    check_dataset(config.dataset, trained.config, "test")
    dataset = load_dataset(config.dataset, device)
    path = Path(config.out or output_folder(checkpoint, config.runs_dir) / file_name(dataset))
    if path.is_dir():
        raise UserError(f"{path} is a folder; out= is the file to write")
    disk.make_folder(path.parent)
    to_device(model, device, fast=False)
    shown = choose(config.explore, model, dataset.test)
    reason = why_no_encoder(config.explore, model, trained.config.dataset.standardise)
    names, title = dataset.class_names, about(trained, dataset)
    text, said = page_within_limit(model, shown, names, title, reason, config.explore.encoder)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    refresh_run_page(path.parent)  # which links to what was made of the run
    searched = min(config.explore.search, len(dataset.test))
    wrong = int((shown.labels_NT != shown.predicted_NT).any(1).sum())
    print(
        f"{len(shown.numbers_N)} of the first {searched:,} test images of {dataset.name}, {wrong} "
        "of them taken for others (for more: explore.images, explore.mistakes, explore.search)"
    )
    print(said)
    print(f"{path}: {size(len(text.encode()))}; open it in any browser")
    return path


def file_name(dataset: Dataset) -> str:
    """The page's name in the folder of a run."""
    return f"explore-{dataset.name}.html"


def about(trained: Trained, dataset: Dataset) -> str:
    """One line on what the page is of."""
    config = trained.config
    iterations = config.routing.iterations if config.routing else 0
    plural = "s" if iterations > 1 else ""
    return (
        f"{config.name or 'CapsNet'}, seed {config.seed}: {iterations} routing iteration{plural}, "
        f"trained for {trained.step:,} steps on {config.dataset.name}"
        f"{'' if trained.finished else ', not finished'}; test images of {dataset.name}"
    )


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
    model: CapsNet,
    shown: Shown,
    class_names: tuple[str, ...],
    title: str,
    reason: str,
    encoder: str,
) -> tuple[str, str]:
    """The page, with the encoder if it may be there, and what is to be said about that.

    reason: why the encoder is left out, if it is. encoder: see `ExploreSettings`.
    Raises UserError for a page beyond the limit.
    """
    limit = size(LIMIT_BYTES)
    if not reason:
        text = build_page(model, shown, class_names, title, True, "")
        if len(text.encode()) <= LIMIT_BYTES:
            return text, "digits can be drawn: the encoder is in the page"
        reason = f"the encoder would make the page {size(len(text.encode()))}, more than {limit}"
    if encoder == "yes":
        raise UserError(f"explore.encoder=yes cannot be done: {reason}")
    text = build_page(model, shown, class_names, title, False, reason)
    if len(text.encode()) > LIMIT_BYTES:
        raise UserError(
            f"the page would have {size(len(text.encode()))}, more than {limit}; take "
            "fewer explore.images, or a model with a narrower decoder"
        )
    return text, f"digits cannot be drawn: {reason}"


def why_no_encoder(settings: ExploreSettings, model: CapsNet, standardised: bool) -> str:
    """Why the encoder is left out, whatever its size; empty when it is not."""
    if settings.encoder == "no":
        return "explore.encoder=no"
    if model.channels != 1:
        return "only grey images can be drawn"
    if standardised:
        return "the network sees standardised images"
    return ""
