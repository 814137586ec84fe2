"""The pictures of the report: learning curves, and the paper's figures from what runs left."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure

from capsrun.disk import is_plain
from capsrun.report import figures, plots
from capsrun.report.rows import Group, Row, grouped, of_group, of_network
from capsrun.report.tables import differences, length
from capsrun.runs.reader import Result

PERTURBED = 2  # how many pictures of figure 4 are shown
LOSS = {"loss/total": ("training loss (running mean)", True)}
CURVES = LOSS | {"error_percent/test": ("test error %", False)}
LOSSES = LOSS | {"loss/margin": ("margin loss alone (running mean)", True)}


@dataclass(frozen=True)
class Pictures:
    """The pictures of the report: written to its folder, mentioned in its text."""

    out_dir: Path

    def draw(self, name: str, figure: Figure, what: str) -> str:
        figures.save(figure, self.out_dir / "pictures" / f"{name}.png")
        return f"![{what}](pictures/{name}.png)"

    def copy(self, row: Row, group: Group, result: Result, paths: Sequence[Path]) -> list[str]:
        """Pictures that lie in the folder of a run, after which run it is."""
        parts = [f"CapsNet, {length(row, group)}, seed {result.seed}."]
        for path in paths:
            name = f"{row.name}_{path.stem}.png"
            shutil.copyfile(path, self.out_dir / "pictures" / name)
            parts.append(f"![{row.about.title}: {path.stem}](pictures/{name})")
        return parts


def how_trained(group: Group, but: str = "") -> str:
    """The same for groups that were trained as long and with the same recipe.

    but: a setting that may differ.
    """
    settings = group.first.settings
    network = of_network(settings)
    return repr(sorted((k, v) for k, v in settings.items() if k not in network and k != but))


def curves(name: str, title: str, rows: Sequence[Row], pictures: Pictures) -> list[str]:
    """Learning curves of the rows that were trained alike: of the way that most seeds have.

    The accuracies at which training stops may differ, as those of the paper's networks do.
    """
    alike: dict[str, dict[str, Group]] = {}
    for row in rows:
        for group in (group for group in row.groups if group.metrics):
            way = alike.setdefault(how_trained(group, "stop.accuracy_percent"), {})
            way[row.about.title] = group
    if not alike:
        return []
    most = max(alike.values(), key=seeds_and_steps)
    figure = plots.comparison({title: group.metrics for title, group in most.items()}, CURVES)
    how = length(None, next(iter(most.values())))
    return [
        f"Learning curves, {how}; thin lines are seeds:",
        pictures.draw(f"curves_{name}", figure, f"learning curves: {title}"),
    ]


def seeds_and_steps(groups: Mapping[str, Group]) -> tuple[int, int]:
    """How much there is to draw: of as many seeds, the longest training comes first."""
    return sum(len(g.results) for g in groups.values()), max(max(g.steps) for g in groups.values())


def paper_figures(rows: Sequence[Row], results: Sequence[Result], pictures: Pictures) -> list[str]:
    """Figures 3, 4, 5, A.1 and B.1, from the longest run of each that there is.

    Where the paper's network was not run, another CapsNet stands in, and it is said that it does.
    """
    parts = []
    for row in of_group("figures", rows):
        group = row.best or stand_in(row, results)
        parts.append(f"### {row.about.title}")
        parts += [f"Note: {row.about.note}."] if row.about.note else []
        if group is None:
            command = f"`capsrun reproduce targets={row.name} budget=full`"
            parts.append(f"Not run yet: {command}.")
            continue
        if row.best is None:
            other = differences(row, group)
            parts.append(f"The paper's network was not run yet; this is one with {other}.")
        used = [other for name in row.about.uses for other in rows if other.name == name]
        drawn = DRAWERS[row.name](row, group, used, pictures)
        parts += drawn or [f"The pictures of the run ({length(row, group)}) are not at hand."]
    return parts


def stand_in(row: Row, results: Iterable[Result]) -> Group | None:
    """The longest training of any CapsNet on the images of a figure."""
    dataset = row.settings["dataset.name"]
    groups = grouped(
        result
        for result in results
        if result.command == "train"
        and result.settings["dataset.name"] == dataset
        and "routing.iterations" in result.settings
    )
    return next(iter(groups), None)


def folder_pictures(row: Row, group: Group, used: Sequence[Row], pictures: Pictures) -> list[str]:
    """Pictures that training leaves: reconstructions, failures, and what is not there."""
    for result in group.results:
        names = ("reconstructions", "failures", "absent")
        paths = [result.folder / "pictures" / f"{name}.png" for name in names]
        if found := [path for path in paths if is_plain(path)]:
            return pictures.copy(row, group, result, found)
    return []


def perturbed(row: Row, group: Group, used: Sequence[Row], pictures: Pictures) -> list[str]:
    """Pictures of `capsrun perturb`, beside the run or in the figure's own folder."""
    for result in group.results:
        run = result.folder
        own = (run.parent.parent / row.name / run.name / "pictures").glob("digit_*.png")
        kept = run.glob(f"{row.name}/pictures/digit_*.png")
        beside = run.glob("perturb-*/pictures/digit_*.png")
        found = (sorted(filter(is_plain, paths)) for paths in (own, kept, beside))
        if paths := next(filter(None, found), []):
            return pictures.copy(row, group, result, paths[-PERTURBED:])
    return []


def logit_changes(row: Row, group: Group, used: Sequence[Row], pictures: Pictures) -> list[str]:
    """Figure A.1 from what was recorded in training, of the seeds as long as the first."""
    recorded = [[row.keys() for row in metrics] for metrics in group.metrics]
    seeds = [metrics for metrics, rows in zip(group.metrics, recorded) if rows == recorded[0]]
    if not any("routing_logit_change/iteration_1" in row for row in chain(*seeds)):
        return []
    drawn = pictures.draw(row.name, plots.routing_changes(seeds), row.about.title)
    mean = "one seed" if len(seeds) == 1 else f"mean over {len(seeds)} seeds"
    return [f"CapsNet, {length(row, group)}, {mean}.", drawn]


def losses(row: Row, group: Group, used: Sequence[Row], pictures: Pictures) -> list[str]:
    """Figure B.1: the runs with 1 and with 3 iterations that were trained alike."""
    one, three = used
    pairs = [
        (a, b)
        for a in one.groups
        for b in three.groups
        if how_trained(a) == how_trained(b) and a.metrics and b.metrics
    ]
    if not pairs:
        return ["There are no runs with 1 and with 3 iterations that were trained alike."]
    a, b = max(pairs, key=lambda pair: sum(len(group.results) for group in pair))
    figure = plots.comparison({"1 iteration": a.metrics, "3 iterations": b.metrics}, LOSSES)
    return [f"Both {length(None, a)}.", pictures.draw(row.name, figure, row.about.title)]


DRAWERS: Mapping[str, Callable[[Row, Group, Sequence[Row], Pictures], list[str]]] = {
    "figure_3": folder_pictures,
    "figure_4": perturbed,
    "figure_5": folder_pictures,
    "figure_a1": logit_changes,
    "figure_b1": losses,
}
