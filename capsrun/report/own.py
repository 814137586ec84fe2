"""Runs that are none of the paper's: what was changed, and what came out."""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from capsrun.compose import group_choices
from capsrun.data_config import title_of
from capsrun.errors import UserError
from capsrun.experiments import Experiments
from capsrun.names import FOUND
from capsrun.report import plots
from capsrun.report.gallery import CURVES, Pictures
from capsrun.report.rows import Group, Row, grouped, whole_test
from capsrun.report.tables import HOW, how, mean_and_spread, shown, table
from capsrun.runs.reader import Result
from capsrun.settings import deciding
from capsrun.terminal import counted

HEADER = ("run", "settings", "tested on", "test error %", *HOW)
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
        found.setdefault(title_of(group.first.training["dataset"]), []).append(group)
    return dict(sorted(found.items()))


def words(group: Group, experiments: Experiments) -> str:
    """What makes a group on the command line, beside its data set; and how it was tested."""
    result = group.first
    training = result.training
    # What somebody else calls a file of his own says nothing here.
    chosen = {
        choice: f"{choice}={training[choice]['name']}"
        for choice in ("dataset", "model", "recipe", "loss")
        if training[choice]["name"] in group_choices("train")[choice]
    }
    algorithm = (training["routing"] or {}).get("algorithm")
    if algorithm in group_choices("train")["routing"]:
        chosen["routing"] = f"routing={algorithm}"
    own_loss = chosen.pop("loss", None)
    where = path_words(training["dataset"])
    usual = experiments.training([*chosen.values(), *where])
    if own_loss is not None and usual.loss.name != training["loss"]["name"]:
        with contextlib.suppress(UserError):  # which somebody else's model may have, and no other
            usual = experiments.training([*chosen.values(), *where, own_loss])
            chosen["loss"] = own_loss
    chosen.pop("dataset", None)
    found = [*chosen.values(), *changed(result.settings, deciding(asdict(usual)))]
    if result.tested:
        kind = result.tested["name"]
        known = [f"dataset={kind}"] if kind in group_choices("eval")["dataset"] else []
        test = experiments.tested(["eval", *known, *path_words(result.tested)])
        assert test is not None
        differing = changed(result.tested, whole_test(asdict(test.dataset)))
        found += [f"tested with {word}" for word in differing]
    return ", ".join(found)


def path_words(dataset: Mapping[str, Any]) -> list[str]:
    """What says where images of one's own are, as Hydra reads it."""
    return [f"dataset.path={dataset['path']}"] if "path" in dataset else []


def changed(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> list[str]:
    """The settings that are not as usual, as they are written on the command line."""
    return [
        f"{key}={shown(value)}"
        for key, value in settings.items()
        if key != "precision"
        and value != usual.get(key)
        # What was found out about images of one's own was not changed by anybody.
        and not (key.removeprefix("dataset.") in FOUND and usual.get(key) in (0, "[]", []))
    ]


def lines(groups: Sequence[Group], experiments: Experiments) -> list[list[str]]:
    """The table of `HEADER` of runs on one data set."""
    return [
        [
            ", ".join(group.names),
            words(group, experiments),
            f"{group.first.tested_on} ({counted(group.first.values['count'], 'image')})",
            mean_and_spread(group.errors),
            *how(None, group),
        ]
        for group in groups
    ]


def section(groups: Iterable[Group], experiments: Experiments, pictures: Pictures) -> list[str]:
    """The tables of one's own runs, one for each data set, with their learning curves."""
    parts = []
    for name, own in by_images(groups).items():
        parts += [f"Trained on {name}:", table(HEADER, lines(own, experiments))]
        parts += [f"{remark}." for group in own for remark in group.remarks]
        trained = [group for group in own if group.metrics]
        if 1 < len(trained) <= MOST_CURVES:
            names = [group.first.values["name"] for group in trained]
            curves = {
                name if names.count(name) == 1 else words(group, experiments): group.metrics
                for name, group in zip(names, trained)
            }
            figure = plots.comparison(curves, CURVES)
            picture = "own_" + re.sub(r"\W", "_", name)  # a name may lead out of the folder
            parts.append(pictures.draw(picture, figure, f"learning curves: {name}"))
    return parts
