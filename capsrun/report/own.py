"""Runs that are none of the paper's: in what they differ, and what came out."""

from collections.abc import Iterable, Sequence

from capsrun.report import plots
from capsrun.report.gallery import CURVES, Pictures
from capsrun.report.rows import Group, Row, grouped, whole_test
from capsrun.report.tables import HOW, how, mean_and_spread, shown, table
from capsrun.runs.reader import Result
from capsrun.terminal import counted

HEADER = ("run", "in what they differ", "tested on", "test error %", *HOW)
MOST_CURVES = 7  # as many colours as can be told apart


def own_groups(
    rows: Sequence[Row], results: Iterable[Result], compared: Iterable[Group]
) -> list[Group]:
    """What belongs to no row of the paper and answers none of its questions (`compared`).

    Where a data set is tested as training did it, that says nothing new and is left out.
    """
    answered = {id(result) for group in compared for result in group.results}
    return grouped(
        result
        for result in results
        if result.command != "perturb"
        and result.tested != whole_test(result.training["dataset"])
        and id(result) not in answered
        and not any(row.fits(result) for row in rows if row.about.group != "ablations")
    )


def by_images(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of each data set that was trained on, in the order of their names."""
    found: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.first.values["name"]):
        found.setdefault(group.first.training["dataset"]["name"], []).append(group)
    return dict(sorted(found.items()))


def everything(group: Group) -> dict[str, str]:
    """All that decides a result: settings of training, and of a test of its own."""
    result = group.first
    found = {key: shown(value) for key, value in result.settings.items()}
    return found | {f"tested with {key}": shown(value) for key, value in result.tested.items()}


def differences_between(groups: Sequence[Group]) -> list[str]:
    """Of each group the settings in which not all are alike."""
    all_settings = [everything(group) for group in groups]
    keys = sorted({key for settings in all_settings for key in settings})
    differing = [key for key in keys if len({settings.get(key) for settings in all_settings}) > 1]
    return [
        ", ".join(f"{key} {settings[key]}" for key in differing if key in settings)
        for settings in all_settings
    ]


def lines(groups: Sequence[Group]) -> list[list[str]]:
    """The table of `HEADER` of runs on one data set."""
    return [
        [
            group.first.values["name"],
            difference,
            f"{group.first.tested_on} ({counted(group.first.values['count'], 'image')})",
            mean_and_spread(group.errors),
            *how(None, group),
        ]
        for group, difference in zip(groups, differences_between(groups))
    ]


def section(groups: Iterable[Group], pictures: Pictures) -> list[str]:
    """The tables of one's own runs, one for each data set, with their learning curves."""
    parts = []
    for name, own in by_images(groups).items():
        parts += [f"Trained on {name}:", table(HEADER, lines(own))]
        trained = [group for group in own if group.metrics]
        if 1 < len(trained) <= MOST_CURVES:
            titles = differences_between(trained)
            curves = {title: group.metrics for title, group in zip(titles, trained)}
            figure = plots.comparison(curves, CURVES)
            parts.append(pictures.draw(f"own_{name}", figure, f"learning curves: {name}"))
    return parts
