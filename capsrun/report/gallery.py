"""The pictures of the report: learning curves, and the paper's figures from what runs left."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from capsrun.report import figures, plots
from capsrun.report.rows import Group, grouped
from capsrun.report.tables import Row, differences, how_trained, length
from capsrun.runs.reader import Result

PERTURBED = 2  # how many pictures of figure 4 are shown


@dataclass(frozen=True)
class Pictures:
    """The pictures of the report: written to its folder, mentioned in its text."""

    out_dir: Path

    def draw(self, name: str, figure: Figure, what: str) -> str:
        figures.save(figure, self.out_dir / "pictures" / f"{name}.png")
        return f"![{what}](pictures/{name}.png)"

    def copy(self, name: str, path: Path, what: str) -> str:
        shutil.copyfile(path, self.out_dir / "pictures" / f"{name}.png")
        return f"![{what}](pictures/{name}.png)"


def curves(name: str, title: str, rows: Sequence[Row], pictures: Pictures) -> list[str]:
    """Learning curves of the rows that were trained alike: of the way that most seeds have.

    The accuracies at which training stops may differ, as those of the paper's networks do.
    """
    groups = [(row, g) for row in rows for g in row.groups if own_metrics(g)]
    alike: dict[str, dict[str, Group]] = {}
    for row, g in groups:
        alike.setdefault(how_trained(g, ("stop.accuracy_percent",)), {})[row.about.title] = g
    if not alike:
        return []
    most = max(alike.values(), key=seeds_and_steps)
    figure = plots.learning_curves({title: own_metrics(g) for title, g in most.items()})
    how = length(None, next(iter(most.values())))
    return [
        f"Learning curves, {how}; thin lines are seeds:",
        pictures.draw(f"curves_{name}", figure, f"learning curves: {title}"),
    ]


def seeds_and_steps(groups: Mapping[str, Group]) -> tuple[int, int]:
    """How much there is to draw: of as many seeds, the longest training comes first."""
    return sum(len(g.results) for g in groups.values()), max(max(g.steps) for g in groups.values())


def own_metrics(group: Group) -> list[list[dict[str, Any]]]:
    """What each seed recorded, where that is at hand and it was not only tested."""
    return [r.metrics for r in group.results if r.command == "train" and r.metrics]


def paper_figures(rows: Sequence[Row], results: Iterable[Result], pictures: Pictures) -> list[str]:
    """Figures 3, 4, 5, A.1 and B.1, from the longest run of each that there is.

    Where the paper's network was not run, another CapsNet stands in, and it is said that it does.
    """
    by_name = {row.name: row for row in rows}
    others = list(results)
    parts = []
    for row in (row for row in rows if row.about.group == "figures"):
        group = row.best or stand_in(row, others)
        parts.append(f"### {row.about.title}")
        parts += [f"Note: {row.about.note}."] if row.about.note else []
        if group is None:
            command = f"`capsrun reproduce targets=[{row.name}] budget=full`"
            parts.append(f"Not run yet: {command}.")
            continue
        if row.best is None:
            other = differences(row, group)
            parts.append(f"The paper's network was not run yet; this is one with {other}.")
        drawn = DRAWERS[row.name](row, group, by_name, pictures)
        parts += drawn or [f"The pictures of the run ({length(row, group)}) are not at hand."]
    return parts


def stand_in(row: Row, results: Iterable[Result]) -> Group | None:
    """The longest training of any CapsNet on the images of a figure."""
    dataset = row.wanted.settings["dataset.name"]
    groups = grouped(
        result
        for result in results
        if result.command == "train"
        and result.settings["dataset.name"] == dataset
        and "routing.iterations" in result.settings
    )
    return next(iter(groups), None)


def folder_pictures(row: Row, group: Group, by_name: Any, pictures: Pictures) -> list[str]:
    """Pictures that training leaves: reconstructions, failures, and what is not there."""
    for result in group.results:
        names = ("reconstructions", "failures", "absent")
        paths = {name: result.folder / "pictures" / f"{name}.png" for name in names}
        found = {name: path for name, path in paths.items() if path.exists()}
        if found:
            drawn = [
                pictures.copy(f"{row.name}_{name}", path, f"{row.about.title}: {name}")
                for name, path in found.items()
            ]
            return [of_run(row, group, result), *drawn]
    return []


def of_run(row: Row, group: Group, result: Result) -> str:
    """Which run a picture is of."""
    return f"CapsNet, {length(row, group)}, seed {result.seed}."


def perturbed(row: Row, group: Group, by_name: Any, pictures: Pictures) -> list[str]:
    """Pictures of `capsrun perturb`, beside the run or in the figure's own folder."""
    for result in group.results:
        run = result.folder
        own = sorted((run.parent.parent / row.name / run.name / "pictures").glob("digit_*.png"))
        kept = sorted(run.glob(f"{row.name}/pictures/digit_*.png"))
        paths = own or kept or sorted(run.glob("perturb-*/pictures/digit_*.png"))
        if paths:
            drawn = [
                pictures.copy(f"{row.name}_{path.stem}", path, f"{row.about.title}: {path.stem}")
                for path in paths[-PERTURBED:]
            ]
            return [of_run(row, group, result), *drawn]
    return []


def logit_changes(row: Row, group: Group, by_name: Any, pictures: Pictures) -> list[str]:
    """Figure A.1 from what was recorded in training."""
    seeds = own_metrics(group)
    if not seeds:
        return []
    drawn = pictures.draw(row.name, plots.routing_changes(seeds), row.about.title)
    mean = "one seed" if len(seeds) == 1 else f"mean over {len(seeds)} seeds"
    return [f"CapsNet, {length(row, group)}, {mean}.", drawn]


def losses(row: Row, group: Group, by_name: dict[str, Row], pictures: Pictures) -> list[str]:
    """Figure B.1: the runs with 1 and with 3 iterations that were trained alike."""
    one, three = (by_name[name] for name in row.about.uses)
    pairs = [
        (a, b)
        for a in one.groups
        for b in three.groups
        if how_trained(a) == how_trained(b) and own_metrics(a) and own_metrics(b)
    ]
    if not pairs:
        return ["There are no runs with 1 and with 3 iterations that were trained alike."]
    a, b = max(pairs, key=lambda pair: sum(len(group.results) for group in pair))
    figure = plots.training_losses({"1 iteration": own_metrics(a), "3 iterations": own_metrics(b)})
    return [f"Both {length(None, a)}.", pictures.draw(row.name, figure, row.about.title)]


DRAWERS = {
    "figure_3": folder_pictures,
    "figure_4": perturbed,
    "figure_5": folder_pictures,
    "figure_a1": logit_changes,
    "figure_b1": losses,
}
