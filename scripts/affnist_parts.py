"""Which of affnist_like's changes a network errs on: `affnist_parts.py OUT.json CHECKPOINT...`.

Each network, trained on padded MNIST, is tested on 10,000 of the images: made with all changes,
with none, with each alone, and with all but the place. The errors of those with all are also
counted by how much there is of a change, which OUT.png draws.
"""

import itertools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import capsrun
from capsrun import disk
from capsrun.data.affnist_like import TransformedDigits, Transforms, ink_extent
from capsrun.data.batches import random_offsets
from capsrun.errors import UserError
from capsrun.report import figures, plots
from capsrun.runs.checkpoint import Trained
from capsrun.training.device import provenance
from capsrun.training.metrics import score_split

IMAGES = 10_000
"""The first version of each test digit."""
PADDED_SHIFT_PX = 6
"""How far padded MNIST moves a digit from the middle."""
CHANGES = ("rotation", "shear", "scale", "place")
BINS = {
    "rotation, degrees": (0, 5, 10, 15, 20),
    "shear": (0, 0.05, 0.1, 0.15, 0.2),
    "size": (0.8, 0.9, 1, 1.1, 1.2),
    "height to width": (0.66, 0.8, 0.95, 1.05, 1.25, 1.5),
    "outermost ink, px from the middle": (8, 14, 16, 17, 18, 19, 20.5),
}

DRAWN = ("rotation, degrees", "size", "outermost ink, px from the middle")


@dataclass(frozen=True, repr=False)
class SomeChanges(TransformedDigits):
    """affnist_like with some of its changes. What is left out is as padded MNIST has it."""

    changes: tuple[str, ...]

    def __len__(self) -> int:
        return IMAGES

    def transforms(self, indices_B: Tensor) -> Transforms:
        whole = super().transforms(indices_B)
        rotation_B, shear_B, rows_B, columns_B = whole[:4]
        linear = Transforms(
            rotation_B * ("rotation" in self.changes),
            shear_B * ("shear" in self.changes),
            rows_B if "scale" in self.changes else torch.ones_like(rows_B),
            columns_B if "scale" in self.changes else torch.ones_like(columns_B),
            *torch.zeros(2, len(indices_B)),
        )
        if "place" not in self.changes:
            moved_B2 = random_offsets(indices_B, PADDED_SHIFT_PX, self.config.split_seed)
            return linear._replace(row_shift_px_B=moved_B2[:, 0], column_shift_px_B=moved_B2[:, 1])
        # As far between the first and the last place that it may have as with all changes.
        low_B2, room_B2 = self.places(indices_B, whole)
        part_B2 = (torch.stack(whole[4:], 1) - low_B2) / room_B2
        low_B2, room_B2 = self.places(indices_B, linear)
        moved_B2 = low_B2 + part_B2 * room_B2
        return linear._replace(row_shift_px_B=moved_B2[:, 0], column_shift_px_B=moved_B2[:, 1])

    def amounts(self) -> dict[str, Tensor]:
        """How much of each change (N,) there is, in the order of `BINS`."""
        indices_N = self.indices(0, len(self))
        how = self.transforms(indices_N)
        first_N2, last_N2 = ink_extent(self.digits_NCHW[self.numbers(indices_N)[0]], how.matrices())
        shift_N2 = torch.stack(how[4:], 1)
        outermost_N2 = torch.maximum(-(first_N2 + shift_N2), last_N2 + shift_N2)
        values = (
            how.rotation_degrees_B.abs(),
            how.shear_B.abs(),
            (how.row_scale_B * how.column_scale_B).sqrt(),
            how.row_scale_B / how.column_scale_B,
            outermost_N2.amax(1),
        )
        return dict(zip(BINS, values, strict=True))


COMBINATIONS = (CHANGES, (), *((change,) for change in CHANGES), CHANGES[:3])
"""All changes, none, each alone, and all but the place."""


def tested(trained: Trained, digits: TransformedDigits) -> dict[str, Any]:
    """The errors in percent of a network with each combination of changes, and in each bin."""
    errors, binned = {}, {}
    for changes in COMBINATIONS:
        images = SomeChanges(digits.digits_NCHW, digits.labels_N, digits.config, changes)
        score = score_split(trained.model, images, "fp32")
        errors[" ".join(changes) or "none"] = score.error_percent
        if changes == CHANGES:
            wrong_N = (score.labels_NT != score.predicted_NT).any(1)
            binned = {
                name: in_bins(amount_N, wrong_N, BINS[name])
                for name, amount_N in images.amounts().items()
            }
    return {"errors_percent": errors, "by_amount": binned}


def in_bins(amount_N: Tensor, wrong_N: Tensor, edges: tuple[float, ...]) -> list[dict[str, float]]:
    """How many images there are between two edges each, and how many of them are wrong."""
    bins = []
    for low, high in itertools.pairwise(edges):
        inside_N = (amount_N >= low) & (amount_N < high)
        count, errors = int(inside_N.sum()), int(wrong_N[inside_N].sum())
        bins.append({"from": low, "to": high, "count": count, "errors": errors})
    return bins


def by_amount(networks: Mapping[str, Any]) -> Figure:
    """The error of each network, means of its seeds, by how much there is of three changes."""
    panels: dict[str, dict[str, dict[float, list[float]]]] = {}
    for name, network in itertools.product(DRAWN, networks.values()):
        line = panels.setdefault(f"{name}: test error %", {}).setdefault(network["name"], {})
        for one in network["by_amount"][name]:
            middle = (one["from"] + one["to"]) / 2
            line.setdefault(middle, []).append(100 * one["errors"] / one["count"])
    return plots.by_value(panels)


def main(out: str, *checkpoints: str) -> None:
    """Test each network and write the file."""
    digits = capsrun.load_dataset("affnist_like").test
    assert isinstance(digits, TransformedDigits)
    networks = {}
    for path in checkpoints:
        trained = capsrun.load_checkpoint(path)
        config = trained.config
        facts = {"name": config.name, "seed": config.seed, "steps": trained.step}
        networks[f"{config.name}/seed{config.seed}"] = facts | tested(trained, digits)
        print(path, networks[f"{config.name}/seed{config.seed}"]["errors_percent"], flush=True)
    where = provenance(torch.device("cpu"), "fp32")
    disk.write_json(Path(out), {"images": IMAGES, "networks": networks, **where})
    figures.save(by_amount(networks), Path(out).with_suffix(".png"))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
