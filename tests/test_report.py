"""What runs found, put beside the paper: what counts, what is averaged, what is said."""

import csv
import dataclasses
import json
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, REPOSITORY, TINY, train_config
from recorded import EXPERIMENTS, eval_result, train_result

from capsrun import cli
from capsrun.commands.report import ReportConfig, report, update_tables
from capsrun.data import load_dataset
from capsrun.errors import UserError
from capsrun.report import plots, questions
from capsrun.report.changed import Kind, Line, kinds, summary
from capsrun.report.keep import keep
from capsrun.report.page import to_html
from capsrun.report.rows import grouped, make_row, standard_error
from capsrun.report.tables import SUMMARY, mean_and_spread, summary_lines, table, verdict
from capsrun.runs.checkpoint import load_checkpoint, write_checkpoint
from capsrun.runs.reader import best_on_test, find_results
from capsrun.training.metrics import score_split

RESULTS = REPOSITORY / "results"
COMMITTED = RESULTS / "capsnet-mnist.pt"
ROW = "table1_mnist_3_reconstruction"
PADDED = "experiment=padded_capsnet"


def row(name: str, folder: Path):
    return make_row(name, EXPERIMENTS, find_results([folder]))


def build(source: Path, out: Path) -> str:
    """The report of the results in a folder, as Markdown."""
    words = {"sources": [str(source)], "runs_dir": "runs", "out_dir": str(out), "keep": None}
    report(ReportConfig(**words, update=[]), EXPERIMENTS)
    return (out / "report.md").read_text()


def test_seeds_are_averaged(tmp_path):
    for seed, errors in enumerate((24, 25, 29)):
        train_result(tmp_path / f"seed{seed}", errors, seed)
    found = row(ROW, tmp_path)
    (group,) = found.groups
    assert group.mean == pytest.approx(0.26)
    assert mean_and_spread(group.errors) == "0.26 ± 0.03"
    assert found.is_full(group)
    assert found.missing == 0


def test_the_same_runs_stand_for_every_row_of_their_network(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    for name in (ROW, "ablation_iterations_3", "figure_3"):
        assert row(name, tmp_path).groups
    assert not row("table1_mnist_1_reconstruction", tmp_path).groups


OTHER_NETWORKS = ["loss=paper", "routing.iterations=1", "routing.detach=true"]
OTHER_NETWORKS += ["model.digit_bias=false", "model.reconstruction=false"]
OTHER_NETWORKS += ["model.conv1_channels=64", "model.initialisation=pytorch"]
OTHER_IMAGES = ["dataset.shift_px=0", "dataset=fashion_mnist", "dataset.validation=10000"]
OTHER_IMAGES += ["recipe.order=authors"]
OTHER_LENGTHS = ["recipe=quick", "recipe.steps=30000", "recipe.learning_rate=0.002"]
OTHER_LENGTHS += ["recipe.adam_form=pytorch", "recipe.batch_size=64"]


@pytest.mark.parametrize("other", OTHER_NETWORKS + OTHER_IMAGES)
def test_another_network_or_other_images_are_not_in_the_row(tmp_path, other):
    train_result(tmp_path / "a", 25, 0, other)
    assert not row(ROW, tmp_path).groups


@pytest.mark.parametrize("other", OTHER_LENGTHS)
def test_another_length_or_recipe_is_never_averaged_with_it(tmp_path, other):
    train_result(tmp_path / "a", 25, 0)
    train_result(tmp_path / "b", 99, 1, other)
    found = row(ROW, tmp_path)
    assert sorted(group.mean for group in found.groups) == [0.25, 0.99]
    assert [found.is_full(group) for group in found.groups] == [True, False]
    assert (found.best.mean, found.missing) == (0.25, 2)
    assert "another length" in verdict(found, found.groups[1])


def test_precisions_are_not_averaged_but_devices_are(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    train_result(tmp_path / "b", 27, 1, precision="fp32")
    train_result(tmp_path / "c", 29, 2, device="Some GPU")
    assert sorted(len(group.results) for group in row(ROW, tmp_path).groups) == [1, 2]


def test_a_copy_counts_once_and_a_seed_once(tmp_path):
    train_result(tmp_path / "runs/a", 25, 0)
    train_result(tmp_path / "results/a", 25, 0)
    train_result(tmp_path / "runs/.packed/a", 26, 0)
    assert len(find_results([tmp_path])) == 1
    train_result(tmp_path / "runs/b", 31, 0, date="2026-11-24", train_seconds=7.0)
    (group,) = row(ROW, tmp_path).groups
    assert group.errors == [0.31]
    assert group.twice == [0]


def test_what_is_no_result_is_left_out_and_said(tmp_path, capsys):
    for number, text in enumerate(("", "{", "[]", "{}", '{"command": "train"}', '"train"', "null")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "result.json").write_text(text)
    for name, changes in {
        "type": {"steps": "many"},
        "setting": {"config": dataclasses.asdict(train_config()) | {"stop": {}}},
        "name": {"name": "../elsewhere"},
        "missing": {"error_percent": None},
        "truth": {"steps": True},
        "size": {"train_seconds": 1e300},
        "part": {"best_on_test": [1]},
        "sum": {"error_percent": 5.0},
        "none": {"count": 0},
        "dataset": {"config": dataclasses.asdict(train_config()) | {"dataset": []}},
        "setting2": {"config": dataclasses.asdict(train_config()) | {"precision": 1}},
    }.items():
        train_result(tmp_path / name, 25, 0, **changes)
    eval_result(tmp_path / "unfinished", "dataset=affnist", 100, PADDED, finished=False)
    assert find_results([tmp_path, tmp_path / "missing"]) == []
    said = capsys.readouterr().err
    left = [path for path in tmp_path.rglob("result.json") if path.parent.name != "unfinished"]
    assert left
    assert all(f"note: {path} is left out" in said for path in left)
    assert "no sound 'best_on_test'" in said
    assert re.search(r"stop lacks a setting, or has one too many: .*accuracy_percent", said)
    with pytest.raises(UserError, match="there is no finished run"):
        build(tmp_path, tmp_path / "out")


def test_the_summary_keeps_kinds_of_numbers_apart(tmp_path):
    """The lowest of each kind of published numbers; beside the last step the best on test."""
    for seed, best in enumerate((20, 22)):
        about = {"error_percent": best / 100, "step": 100, "evaluations": 640, "count": 10_000}
        train_result(tmp_path / str(seed), 30 + seed, seed, best_on_test=about)
    shown = dict(zip(SUMMARY, summary_lines([row(ROW, tmp_path)])[0]))
    assert shown["paper"] == "0.25 ± 0.005"
    assert shown["public, last step"] == "0.347 ± 0.021"
    assert shown["public, best on test"] == "0.26 (1 run)"
    assert shown["public, step not said"] == "0.27 (1 run)"
    assert shown["capsrun, last step"] == "0.30 ± 0.01"
    assert shown["best on test, not a result"] == "0.21 ± 0.01 (best of 640)"


def test_a_few_steps_are_no_number_in_the_summary(tmp_path):
    train_result(tmp_path / "a", 5_000, 0, "recipe=quick", "recipe.epochs=null", "recipe.steps=4")
    (line,) = summary_lines([row(ROW, tmp_path)])
    assert line[5:7] == ["only tried", ""]


def test_less_than_the_papers_length_is_short_in_the_summary(tmp_path):
    train_result(tmp_path / "a", 33, 0, "recipe=sixty")
    (line,) = summary_lines([row(ROW, tmp_path)])
    assert line[5] == "0.33, short"


def test_a_long_title_stays_within_its_picture():
    words = "capsnet_small, 2.1 M parameters, 14,063 steps (30 epochs), recipe sixty, rate 0.004"
    figure = plots.error_by_iterations({1: [0.5, 0.6], 3: [0.4]}, words)
    figure.draw_without_rendering()
    title = figure.axes[0].title.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert title.y1 <= figure.bbox.height


def test_paired_differences_with_their_intervals(tmp_path):
    """Of the runs of which most is asked: those of three seeds, not those of one."""
    for seed, errors in enumerate((40, 42, 44)):
        train_result(tmp_path / f"{seed}", errors, seed, *SMALL)
        train_result(tmp_path / f"{seed}b", 10 + errors + 10 * seed, seed, *SMALL, "loss=paper")
    train_result(tmp_path / "long", 30, 0)
    train_result(tmp_path / "longb", 20, 0, "loss=paper")
    rows = [make_row(n, EXPERIMENTS, []) for n in EXPERIMENTS.names()]
    _, found = questions.questions_and_answers(rows, grouped(find_results([tmp_path])))
    base, points = questions.most_asked(found)
    assert base.first.settings["model.primary_types"] == 8
    (paired,) = points.values()
    assert paired == pytest.approx([0.1, 0.2, 0.3])
    (axes,) = plots.differences(points, "capsnet_small").axes
    (label,) = axes.get_yticklabels()
    assert label.get_text().endswith("(n = 3)")
    ((low, high),) = axes.collections[0].get_segments()  # Student's t: 4.303 standard errors
    assert (low[0], high[0]) == pytest.approx((0.2 - 0.2484, 0.2 + 0.2484), abs=1e-3)
    assert questions.most_asked([]) is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("iterations", [3, 12, 300])
def test_plots_of_many_routing_iterations(iterations):
    """In their order, and with no more in the legend than it has room for."""
    names = [f"routing_logit_change/iteration_{number + 1}" for number in range(iterations)]
    # The change is the number of the iteration.
    rows = [{"step": s} | {name: n + 1.0 for n, name in enumerate(names)} for s in range(3)]
    (axes,) = plots.run_curves(rows).axes
    during, after = plots.routing_changes([rows]).axes
    assert after.lines[0].get_ydata() == pytest.approx(range(1, iterations + 1))
    for drawn in (axes, during):
        labels = [text.get_text() for text in drawn.get_legend().get_texts()]
        numbers = [int(label.split()[1]) for label in labels]
        assert numbers == sorted(numbers)
        assert (numbers[0], numbers[-1], len(numbers)) == (1, iterations, min(iterations, 10))
        assert [line.get_ydata()[-1] for line in drawn.lines] == pytest.approx(numbers)


def test_the_best_on_test_is_of_tests_on_the_same_images():
    """While it trains a run is tested on 10,000 of 100,000 pairs; not where a test stops it."""
    tests = [(100, 0.5), (200, 0.3), (300, 0.3), (400, 0.4)]
    rows = [{"step": step, "error_percent/test": error} for step, error in tests]
    training = dataclasses.asdict(train_config())
    found = best_on_test([{"step": 0, "total_steps": 400}, *rows], training, 10_000)
    assert found == {"error_percent": 0.3, "step": 200, "evaluations": 4, "count": 10_000}
    assert best_on_test([{"step": 20, "loss/total": 1.0}], training, 10_000) is None
    training = dataclasses.asdict(train_config("dataset=multimnist"))
    found = best_on_test(rows[:2], training, 100_000)
    assert found == {"error_percent": 0.5, "step": 100, "evaluations": 1, "count": 10_000}
    assert best_on_test(rows[1:2], training, 100_000) is None
    # A run that ended early was tested twice after its last step: on 10,000, then on all.
    assert best_on_test([*rows[:2], rows[1]], training, 100_000)["evaluations"] == 2
    training["stop"]["accuracy_percent"] = 94.0
    assert best_on_test(rows[:2], training, 100_000)["evaluations"] == 2


def questions_of(folder: Path) -> dict[str, list[str]]:
    """The lines of the table of what a number depends on, by the question."""
    rows = [make_row(n, EXPERIMENTS, []) for n in EXPERIMENTS.names()]
    asked, found = questions.questions_and_answers(rows, grouped(find_results([folder])))
    return {line[0]: line[1:] for line in questions.lines(asked, found)}


SMALL = ["model=capsnet_small", "recipe=quick", "recipe.epochs=30"]


def test_what_a_change_does_is_paired_by_seed(tmp_path):
    """Seeds differ by far more than the change does, which each of them shows the same."""
    for seed, errors in enumerate((40, 60, 80)):
        train_result(tmp_path / f"base{seed}", errors, seed, *SMALL, parameters=2_000_000)
        changed = [*SMALL, "recipe.order=authors"]
        train_result(tmp_path / f"order{seed}", errors + 5 + seed, seed, *changed)
    train_result(tmp_path / "lonely", 70, 0, *SMALL, "routing.iterations=1")
    train_result(tmp_path / "other", 9, 0, *SMALL, "routing.iterations=2", "recipe.epochs=20")
    table = questions_of(tmp_path)
    network, _, before, after, difference, _, seeds = table["the authors' order of training images"]
    assert network == "capsnet_small, 2.0 M parameters"
    assert (before, after, seeds) == ("0.60 ± 0.20", "0.66 ± 0.21", "0 1 2")
    assert difference == "+0.060 ± 0.006 (10.4 standard errors)"
    assert table["1 routing iteration"][4:6] == ["+0.300; one seed has no standard error", "+0.04"]
    assert table["2 routing iterations"][0] == "not run yet", "it was trained for another length"


def test_averaged_weights_are_compared_with_the_last_ones_of_the_same_runs(tmp_path):
    for seed, errors in enumerate((40, 60)):
        scores = {"test_averaged": {"error_percent": (errors - 2) / 100}}
        overrides = [*SMALL, "recipe.average=0.999"]
        train_result(tmp_path / str(seed), errors, seed, *overrides, scores=scores)
    assert questions_of(tmp_path)[questions.AVERAGED.title][4] == "-0.020 ± 0.000"
    (group,) = grouped(find_results([tmp_path]))
    assert group.averaged_errors == [0.38, 0.58]
    train_result(tmp_path / "1", 60, 1, *SMALL, "recipe.average=0.99", scores=scores)
    (group,) = grouped(find_results([tmp_path]))
    assert group.errors == [0.4, 0.6], "the last weights do not depend on it"
    assert group.averaged_errors == [], "what is averaged otherwise has no common mean"


def test_differences_that_are_all_alike_are_not_certain():
    """0.47 − 0.45 and 0.44 − 0.42 differ by rounding alone."""
    assert questions.difference([0.47 - 0.45, 0.44 - 0.42, 0.39 - 0.37]) == "+0.020 ± 0.000"
    assert "standard errors" not in questions.difference([0.03, 0.04])


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        # means 0.25 and 0.29 with s = 0.01, n = 3: √(0.01²/3 + 0.005²/3) = 0.00645
        ((24, 25, 26), "+0.00: within the standard error of 0.006"),
        ((28, 29, 30), "+0.04: worse than the paper by 6.2 standard errors"),
        ((20, 21, 22), "-0.04: better than the paper by 6.2 standard errors"),
        ((30,), "+0.05; one seed has no standard error"),
    ],
)
def test_the_verdict_is_in_standard_errors(tmp_path, errors, said):
    for seed, count in enumerate(errors):
        train_result(tmp_path / str(seed), count, seed)
    found = row(ROW, tmp_path)
    assert verdict(found, found.best) == said


def test_a_paper_without_a_spread(tmp_path):
    for seed, errors in enumerate((38, 40)):
        train_result(tmp_path / str(seed), errors, seed, "experiment=table1_mnist_baseline")
    found = row("table1_mnist_baseline", tmp_path)
    assert standard_error(found.best, found.about.paper) == pytest.approx(0.01)
    train_result(tmp_path / "0", 40, 0, "experiment=table1_mnist_baseline")
    found = row("table1_mnist_baseline", tmp_path)
    assert verdict(found, found.best) == "+0.01: worse than the paper"


def test_a_stop_that_was_not_reached_is_not_full_length(tmp_path):
    for seed, (steps, reached) in enumerate(((5_000, True), (300_000, False))):
        stopped = {"accuracy_percent": 99.23, "on": "test", "reached": reached}
        train_result(tmp_path / str(seed), 77, seed, PADDED, steps=steps, stopped=stopped)
    found = row("padded_capsnet", tmp_path)
    assert not found.is_full(found.groups[0])
    assert [result.reached_target for result in found.groups[0].results] == [True, False]


def ensemble_result(folder: Path, *members: str, seeds=range(1, 7)) -> Path:
    """An eval of several models together; members: overrides of the others' training."""
    one = "experiment=section7_cifar10"
    others = [dataclasses.asdict(train_config(one, f"seed={seed}", *members)) for seed in seeds]
    changes = {"ensemble": ["x"] * len(others), "others_trained": others}
    return eval_result(folder, "dataset=cifar10", 3_200, one, **changes)


def test_an_ensemble_of_seven_is_a_row_of_its_own(tmp_path):
    ensemble_result(tmp_path / "a")
    assert row("section7_cifar10_ensemble", tmp_path).groups
    assert row("section7_cifar10_ensemble", tmp_path).missing == 0
    assert not row("section7_cifar10", tmp_path).groups


@pytest.mark.parametrize(
    ("members", "seeds"),
    [
        ((), range(1, 3)),
        ((), range(6)),  # seed 0 twice
        (("recipe.steps=4",), range(1, 7)),
        (("model.primary_types=8",), range(1, 7)),
    ],
)
def test_no_other_ensemble_is_in_that_row(tmp_path, members, seeds):
    ensemble_result(tmp_path / "a", *members, seeds=seeds)
    assert not row("section7_cifar10_ensemble", tmp_path).groups


def test_affnist_like_is_never_shown_as_affnist(tmp_path):
    eval_result(tmp_path / "a", "dataset=affnist_like", 67_200, PADDED)
    eval_result(tmp_path / "b", "dataset=affnist", 96_000, PADDED)
    eval_result(tmp_path / "c", "dataset=affnist images=1000", 96_000, PADDED)
    assert row("affnist_like_capsnet", tmp_path).best.mean == pytest.approx(21)
    (group,) = row("affnist_capsnet", tmp_path).groups
    assert group.errors == [pytest.approx(30)], "not that of some of the images"
    assert not row("affnist_cnn", tmp_path).groups
    assert not row("affnist_like_capsnet_validation", tmp_path).groups
    assert row("affnist_like_capsnet", tmp_path).about.paper is None
    # A table of what networks do elsewhere says it above, and has nothing of the paper beside it.
    text = build(tmp_path, tmp_path / "out").partition("## On other and on changed images")[0]
    lines = [line for line in text.splitlines() if "| 21.00 |" in line]
    assert lines
    assert all("affnist_like" in line for line in lines)


def test_other_networks_images_and_tests_are_shown_apart(tmp_path):
    """None is under a row of the paper; each says in what it differs from the others."""
    pairs = "experiment=table1_multimnist_3_reconstruction"
    train_result(tmp_path / "narrow", 25, 0, "model.conv1_channels=64", "model.primary_types=8")
    for name, test, errors in (
        ("all", "dataset.test=all", 19_200),
        ("moved", "dataset.shift_px=6", 22_400),
        ("same", "dataset.trained_by=x", 25_600),
    ):
        eval_result(tmp_path / name, f"dataset=multimnist {test}", errors, pairs)
    other = "dataset=affnist_like dataset.source=mnist5k"
    eval_result(tmp_path / "source", other, 67_200, PADDED)
    # A change without its twin of the same seed says nothing yet.
    train_result(tmp_path / "base", 40, 0, *SMALL)
    train_result(tmp_path / "changed", 50, 1, *SMALL, "recipe.order=authors")
    em = "routing=em", "routing.shared=true", "dataset=fashion_mnist"
    train_result(tmp_path / "em", 60, 0, *SMALL, *em)
    assert questions_of(tmp_path)["the authors' order of training images"][0] == "not run yet"
    text = build(tmp_path, tmp_path / "out").split("## What is missing")[0]
    paper, own = text.split("## Other runs\n")
    assert "| 0.25 |" not in paper
    narrow = "model=capsnet, recipe=authors, model.primary_types=8, model.conv1_channels=64"
    assert f"| run | {narrow} | mnist (10,000 images) | 0.25 |" in own
    end = "multimnist (320,000 images)"
    assert f", tested with test=all | {end} | 6.00 |" in own
    assert f", tested with shift_px=6 | {end} | 7.00 |" in own
    assert "| 8.00 |" not in text, "training itself tested on the same images"
    assert "tested with source=mnist5k | affnist_like (320,000 images) | 21.00 |" in own
    assert all(f"| {error} |" in own for error in ("0.40", "0.50"))
    em = "recipe=quick, routing=em, routing.shared=true, recipe.epochs=30"
    assert f"| run | model=capsnet_small, {em} | fashion_mnist" in own


def test_missing_rows_say_the_command_that_makes_them(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    text = build(tmp_path, tmp_path / "out")
    for name in EXPERIMENTS.names():
        about = EXPERIMENTS.about(name)
        if about.command and about.group != "figures":
            assert f"`capsrun reproduce targets={name} budget=full`" in text
    assert "Not run yet: `capsrun reproduce targets=figure_5 budget=full`" in text
    assert "| 2 of 3 |" in text


def test_the_page_needs_nothing_beside_it_and_is_the_same_again(tmp_path):
    for seed, most in enumerate((5, 5, 9)):
        folder = train_result(tmp_path / "in" / str(seed), 25 + seed, seed, "recipe=quick")
        rows = [
            {"step": 20 * k, "loss/total": 1 / k, "loss/margin": 1 / k}
            | {f"routing_logit_change/iteration_{i}": i / k for i in (1, 2, 3)}
            for k in range(1, most)
        ]
        rows.append({"step": 80, "error_percent/test": 0.25})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = build(tmp_path / "in", tmp_path / "one")
    assert "mean over 2 seeds" in text, "the third one recorded other steps"
    (tmp_path / "one/pictures/mine.png").touch()
    first = (tmp_path / "one/report.html").read_text()
    for name in ("one", "two"):
        assert build(tmp_path / "in", tmp_path / name) == text
        assert (tmp_path / name / "report.html").read_text() == first
    sources = re.findall(r'(?:src|href)="([^"]*)"', first)
    assert len(sources) >= 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in first
    pictures = {path.name for path in (tmp_path / "one/pictures").iterdir()}
    assert {"curves_table1.png", "figure_a1.png", "mine.png"} <= pictures


def test_a_run_is_not_overwritten(tmp_path, tiny_run):
    before = sorted((tiny_run / "pictures").iterdir())
    assert before
    with pytest.raises(UserError, match="is the folder of a run"):
        build(tiny_run, tiny_run)
    assert sorted((tiny_run / "pictures").iterdir()) == before


def test_markup_in_names_stays_text(tmp_path):
    assert "<title>a &amp; b</title>" in to_html("# a & b", tmp_path)
    assert "<script" not in to_html("a <script>x</script> | `<b>`", tmp_path)
    assert "<script" not in to_html("a\n\n<script>x</script>\n\n[x](javascript:a)", tmp_path)
    assert table(["a"], [["x|y"]]).endswith("| x\\|y |")


MARKUP = "x\n    <meta http-equiv='refresh'> ![x](pictures/a.png) [y](https://z) `b` | \x1b[31m"


def test_markup_in_results_stays_text(tmp_path, capsys):
    """Somebody else's result is neither HTML nor Markdown nor what a terminal obeys."""
    words = {"device": MARKUP, "date": MARKUP, "name": MARKUP, "model": MARKUP}
    train_result(tmp_path / "own", 25, 0, "model.conv1_channels=64", **words)
    hostile = train_result(tmp_path / "row", 26, 1, **words, versions={"torch": MARKUP})
    rows = [{"step": 1, "loss/total": 1e38}, {"step": 2, "loss/total": -1e38, "loss/$x": 1}]
    rows += [{"step": 3, "error_percent/test": 1e300}]
    (hostile / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = build(tmp_path, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    printed = capsys.readouterr().out
    assert "http-equiv" in text
    assert "http-equiv" in printed
    assert "<meta http-equiv='refresh" not in page + text
    assert 'href="https://z"' not in page
    assert "pictures/a.png)" not in text.replace("&#93;(pictures/a.png)", "")
    assert "\x1b" not in text + page + printed


# What is committed.

needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="results/ is not here")


@needs_results
def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    """`make report` was run after the last change of results/, and the README shows its table."""
    # The report's links begin at its folder, so it is built in the same place among the results.
    copied = tmp_path / "results"
    shutil.copytree(RESULTS, copied, ignore=shutil.ignore_patterns("*.pt", "report"))
    built = build(copied, copied / "report")
    assert built == (RESULTS / "report/report.md").read_text()
    summary = next(part for part in built.split("\n\n") if part.startswith("| test error"))
    assert summary in (REPOSITORY / "README.md").read_text()


def half_precision(monkeypatch, *arguments: Path) -> None:
    """Run the script that stores a model in half precision."""
    monkeypatch.setattr(sys, "argv", ["half_precision.py", *map(str, arguments)])
    runpy.run_path(str(REPOSITORY / "scripts/half_precision.py"), run_name="__main__")


def test_half_precision(in_tmp, tiny_run, monkeypatch):
    """Half the bytes, nearly the same outputs, and eval and perturb take it."""
    target = in_tmp / "small.pt"
    half_precision(monkeypatch, tiny_run, target)
    assert target.stat().st_size < 0.6 * (tiny_run / "checkpoint.pt").stat().st_size
    images = torch.rand(4, 1, 28, 28)
    paths = (tiny_run / "checkpoint.pt", target)
    whole, half = (load_checkpoint(path).model.eval() for path in paths)
    assert next(half.parameters()).dtype == torch.float32
    torch.testing.assert_close(half.encode(images), whole.encode(images), rtol=0, atol=2e-3)
    words = ["dataset=mnist5k", f"checkpoint={target}"]
    assert cli.main(["eval", *words, "images=100"]) == 0
    assert cli.main(["perturb", *words, "perturb.digit=3"]) == 0
    for name in ("eval-mnist5k-test-first100", "perturb-mnist5k"):
        assert len(list(in_tmp.glob(f"runs/small-??????/{name}/result.json"))) == 1


def test_half_precision_of_an_unfinished_run_is_refused(tmp_path, monkeypatch):
    training = dataclasses.asdict(train_config(*TINY))
    write_checkpoint(
        tmp_path / "checkpoint.pt", training, 3, model={}, optimizer={}, train_seconds=1.0
    )
    with pytest.raises(SystemExit, match="not finished"):
        half_precision(monkeypatch, tmp_path, tmp_path / "o.pt")


@needs_results
def test_the_committed_model_knows_digits():
    assert COMMITTED.stat().st_size < 17e6
    trained = load_checkpoint(COMMITTED)
    assert trained.finished
    if not MNIST_DIR.is_dir():
        pytest.skip("needs MNIST")
    dataset = dataclasses.replace(trained.config.dataset, data_dir=str(MNIST_DIR))
    test = load_dataset(dataset, torch.device("cpu")).test
    score = score_split(trained.model.eval(), test, "fp32", most=500)
    assert score.count == 500
    assert score.errors <= 5


def test_tables_of_other_pages_are_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Ours\n\n<!-- summary -->\n| old |\n<!-- end -->\n\nThe end.\n")
    update_tables(page, {"summary": "| new |", "questions": "| not here |"})
    assert page.read_text() == "# Ours\n\n<!-- summary -->\n| new |\n<!-- end -->\n\nThe end.\n"
    page.write_text("<!-- summary -->\n| old |\n\nThe end.\n")
    with pytest.raises(UserError, match=r"no <!-- end --> after <!-- summary -->"):
        update_tables(page, {"summary": "| new |"})
    assert page.read_text() == "<!-- summary -->\n| old |\n\nThe end.\n"


def test_pages_that_cannot_be_updated_are_said_before_anything_is_written(in_tmp, refused):
    train_result(in_tmp / "runs/a", 25, 0)
    latin, pipe = in_tmp / "latin.md", in_tmp / "pipe.md"
    latin.write_bytes("Müller\n<!-- summary -->\n<!-- end -->\n".encode("latin-1"))
    os.mkfifo(pipe)
    (in_tmp / "good.md").write_text("<!-- summary -->\nold\n<!-- end -->\n")
    (in_tmp / "endless.md").write_text("<!-- summary -->\nx\n<!-- questions -->\n<!-- end -->\n")
    (in_tmp / "placeless.md").write_text("mine\n")
    for name, said in {
        **dict.fromkeys(("latin.md", "pipe.md", "missing.md", "runs"), "cannot be updated: "),
        "endless.md": "has no <!-- end --> after <!-- summary -->",
        "placeless.md": "has no place for a table: <!-- summary --> and <!-- end -->",
    }.items():
        message = refused("report", "keep=kept", f"update=[good.md,{name}]")
        assert f"{name} {said}" in message
    assert "old" in (in_tmp / "good.md").read_text()
    assert not (in_tmp / "runs/report").exists()
    assert not (in_tmp / "kept").exists()
    assert latin.read_bytes().startswith(b"M\xfcller")


def test_an_updated_page_keeps_its_line_ends_and_its_place(tmp_path):
    page, link = tmp_path / "page.md", tmp_path / "link.md"
    page.write_bytes(b"Ours\n<!-- summary -->\r\n| old |\r\n<!-- end -->\r\nThe end.\n")
    link.symlink_to(page)
    update_tables(link, {"summary": "| new |\n| 1 |"})
    assert link.is_symlink()
    new = b"Ours\n<!-- summary -->\r\n| new |\r\n| 1 |\r\n<!-- end -->\r\nThe end.\n"
    assert page.read_bytes() == new


def test_runs_that_are_alike_are_one_line_that_names_them(tmp_path, capsys):
    """Also where a name has what no terminal shows; and a network that is somebody else's."""
    words = ("dataset=mnist5k", "recipe=quick")
    for name in ("first", "p\u00a0q", "p\u3000q"):
        train_result(tmp_path / "runs" / name, 100, 0, *words, name=name)
    config = dataclasses.asdict(train_config(*words, "model=cnn_authors"))
    config["model"]["name"] = "my_cnn"
    train_result(tmp_path / "runs/cnn", 200, 0, name="cnn", model="my_cnn", config=config)
    text = build(tmp_path / "runs", tmp_path / "out")
    assert "| p q, first | model=capsnet, recipe=quick | mnist5k" in text
    assert "| cnn | recipe=quick, " in text
    keep(find_results([tmp_path / "runs"]), tmp_path / "kept")
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {"first", "p\u00a0q", "p\u3000q", "cnn"}


def test_a_folder_of_any_bytes_is_in_the_report(tmp_path):
    """As an archive of another system leaves it."""
    folder = train_result(tmp_path / os.fsdecode(b"bad\xe9"), 25, 0)
    (folder / "index.html").write_text("the page")
    assert "](../bad%E9/index.html)" in build(tmp_path, tmp_path / "out")


def test_own_runs_are_on_the_screen_and_in_tables_for_other_programs(tmp_path, capsys):
    for iterations in (1, 2):
        for seed in (0, 1):
            words = ("dataset=mnist5k", f"routing.iterations={iterations}", "recipe=quick")
            folder = train_result(
                tmp_path / f"runs/{iterations}/{seed}", 100 * iterations + seed, seed, *words
            )
            (folder / "metrics.jsonl").write_text(f'{{"step": 9, "error_percent/test": {seed}}}')
    text = build(tmp_path / "runs", tmp_path / "out")
    own = text.split("## Other runs")[1].split("## Figures")[0]
    words = "model=capsnet, recipe=quick, routing.iterations=2"
    line = f"| run | {words} | mnist5k (10,000 images) | 2.00 ± 0.01 | 0 1 |"
    assert line in own
    assert "(pictures/own_mnist5k.png)" in own
    assert re.search(
        r"recipe=quick, routing.iterations=1 +mnist5k \(10,000 images\) +1.00 ± 0.01",
        capsys.readouterr().out,
    )
    with open(tmp_path / "out/report.csv", newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [
        (line["routing.iterations"], line["seed"], line["error_percent"]) for line in lines
    ] == [("1", "0", "1.0"), ("1", "1", "1.01"), ("2", "0", "2.0"), ("2", "1", "2.01")]
    latex = (tmp_path / "out/report.tex").read_text()
    assert "routing.iterations=2 & mnist5k" in latex
    assert latex.count(r"\bottomrule") == 1


ROTATED = {"rotate": [{"value": 0, "error_percent": 0.5}, {"value": 30, "error_percent": 10.0}]}


def rotated(
    folder: Path, errors: float, seed: int, *overrides: str, words: str = "", **changes
) -> None:
    """Write what an evaluation of a rotated test set leaves."""
    rows = [dict(row) for row in ROTATED["rotate"]]
    rows[1]["error_percent"] = errors
    trained = dataclasses.asdict(train_config("model=capsnet_small", *overrides)) | {"seed": seed}
    facts = {"curves": {"rotate": rows}, "seed": seed, "trained": trained}
    facts |= {"model": "capsnet_small", "count": 10_000, "error_percent": 0.1}
    eval_result(folder, f"dataset=mnist {words}", 10, **{**facts, **changes})


def test_changed_images_are_a_table_of_networks_and_values(tmp_path):
    for seed, errors in enumerate((10.0, 12.0)):
        rotated(tmp_path / f"dynamic{seed}", errors, seed)
    rotated(tmp_path / "em", 20.0, 0, "routing=em")
    text = build(tmp_path, tmp_path / "out")
    section = text.partition("## On other and on changed images")[2].partition("\n## ")[0]
    assert "**mnist, 10,000 images, rotated, degrees: error %**" in section
    assert "| capsnet_small | dynamic, 3 iterations |" in section
    lines = {line.split(" | ")[1]: line for line in section.splitlines() if "capsnet_small" in line}
    assert lines["dynamic, 3 iterations"].endswith("| 0 1 | 0.50 ± 0.00 | 11.00 ± 1.41 |")
    assert lines["em"].endswith("| 0 | 0.50 | 20.00 |")


def test_a_routing_is_compared_with_dynamic_seed_by_seed(tmp_path):
    longer = ["recipe.epochs=20"]
    for seed, (dynamic, em) in enumerate([(10.0, 11.0), (12.0, 14.0), (8.0, 11.0)]):
        rotated(tmp_path / f"dynamic{seed}", dynamic, seed)
        rotated(tmp_path / f"em{seed}", em, seed, "routing=em")
        rotated(tmp_path / f"long{seed}", em, seed, "routing=em", *longer, steps=9_000)
        rotated(tmp_path / f"all{seed}", dynamic + 2 + seed / 10, seed, "routing=uniform")
        rotated(tmp_path / f"text{seed}", dynamic + 1 + seed / 10, seed, "loss=paper")
    rotated(tmp_path / "em3", 50.0, 3, "routing=em")
    # Other images and other weights are tables of their own.
    rotated(tmp_path / "held", 1.0, 0, words="split=validation dataset.validation=10000")
    rotated(tmp_path / "mean", 1.0, 0, words="weights=averaged")
    for name, errors, *recipe in (("like", 32_000), ("other", 64_000, "recipe=authors")):
        words = ["dataset=mnist_padded", "model=capsnet_small", *recipe]
        eval_result(tmp_path / name, "dataset=affnist_like", errors, *words)
    section = build(tmp_path, tmp_path / "out").partition("## On other and on changed")[2]
    paired = [line for line in section.splitlines() if "from dynamic, paired" in line]
    assert paired == [
        f"|  | difference from dynamic, paired |  | 0 1 2 | +0.00 ± 0.00 | {cell} |"
        for cell in ("+2.00 ± 0.58", "+2.10 ± 0.06", "+1.10 ± 0.06")
    ]
    assert "| capsnet_small | dynamic, 3 iterations, loss=paper | 0.50 ± 0.00 (3) |" in section
    # 3.5 standard errors of three pairs are not enough, 36 are.
    assert "| capsnet_small | em | 0.50 ± 0.00 (4) | 21.50 ± 19.05 (4) | – |" in section
    assert "| capsnet_small | uniform | 0.50 ± 0.00 (3) | 12.10 ± 1.95 (3)* | – |" in section
    # What another recipe gave is not in the line of this one.
    assert "| 0.50 ± 0.00 (3) | 10.00 ± 2.00 (3) | 10.00 (1) |" in section
    assert "**mnist, 10,000 validation images, rotated, degrees: error %**" in section
    assert "**mnist, 10,000 images, averaged weights, rotated, degrees: error %**" in section
    assert "(pictures/changed.png)" in section
    assert (tmp_path / "out/pictures/changed.png").is_file()


def test_one_value_is_no_curve():
    line = Line(None, {0: {"0.1": 3.0}, 1: {"0.1": 4.0}})  # a group gives only names
    assert Kind("attacked", [line]).curves == {}


def test_nothing_is_compared_where_two_might_be_meant(tmp_path):
    for seed in range(3):
        rotated(tmp_path / f"dynamic{seed}", 10.0, seed)
        rotated(tmp_path / f"detach{seed}", 11.0, seed, "routing.detach=true")
        rotated(tmp_path / f"em{seed}", 12.0, seed, "routing=em")
    text = build(tmp_path, tmp_path / "out")
    assert "difference from dynamic, paired" not in text
    assert "12.00 ± 0.00 (3) |" in text
    for detached in ("false", "true"):  # in the table of rotated digits, and in that of all
        name = f"| capsnet_small | dynamic, 3 iterations, routing.detach={detached} | "
        assert text.count(name) == 2


def test_networks_that_differ_in_their_training_only_have_names_and_curves_of_their_own(tmp_path):
    faster, authors = ["recipe.learning_rate=0.016"], ["recipe=authors"]
    for seed in range(2):
        rotated(tmp_path / f"slow{seed}", 10.0, seed)
        rotated(tmp_path / f"fast{seed}", 11.0, seed, *faster)
        rotated(tmp_path / f"slow_em{seed}", 12.0, seed, "routing=em")
        rotated(tmp_path / f"fast_em{seed}", 13.0, seed, "routing=em", *faster)
        rotated(tmp_path / f"authors_em{seed}", 14.0, seed, "routing=em", *authors)
    found = kinds(find_results([tmp_path]))
    rows = [line.split(" | ") for line in summary(found).splitlines()]
    errors = {
        "dynamic, 3 iterations, recipe.learning_rate=0.004": 10.0,
        "dynamic, 3 iterations, recipe.learning_rate=0.016": 11.0,
        "em, recipe.name=quick, recipe.learning_rate=0.004": 12.0,
        "em, recipe.name=quick, recipe.learning_rate=0.016": 13.0,
        "em, recipe.name=authors": 14.0,
    }
    assert {row[1]: row[3] for row in rows[2:]} == {
        name: f"{error:.2f} ± 0.00 (2) |" for name, error in errors.items()
    }
    (rotations,) = found
    assert {name: points[30] for name, points in rotations.curves.items()} == {
        f"capsnet_small, {name}": [error, error] for name, error in errors.items()
    }


def test_another_data_set_stands_beside_that_of_training(tmp_path):
    words = ["dataset=mnist_padded", "model=capsnet_small"]
    for seed, errors in enumerate((80, 90)):
        train_result(tmp_path / f"run{seed}", errors, seed, *words)
        trained = json.loads((tmp_path / f"run{seed}/result.json").read_text())["config"]
        facts = {"seed": seed, "model": "capsnet_small", "trained": trained}
        eval_result(
            tmp_path / f"like{seed}", "dataset=affnist_like", 64_000 + 3_200 * seed, **facts
        )
    section = build(tmp_path, tmp_path / "out").partition("## On other and on changed images")[2]
    title = "affnist_like, 320,000 images, trained on mnist_padded: error %"
    table = section.partition(f"**{title}**")[2].partition("**")[0]
    assert "| seeds | mnist_padded | affnist_like |" in table
    assert "| 0 1 | 0.85 ± 0.07 | 20.50 ± 0.71 |" in table


def test_attacks_and_detection_say_how(tmp_path):
    attack = {"name": "pgd", "targeted": True, "steps": 10, "restarts": 2, "loss": "difference"}
    attack |= {"random_start": True, "seed": 0, "step_size": None}
    config = dataclasses.asdict(EXPERIMENTS.tested(["eval"])) | {
        "attack": attack | {"source": None}
    }
    row = {"epsilon": 0.1, "error_percent": 30.0, "success_percent": 20.0}
    detection = {
        "real_flagged_percent": 5.0,
        "sets": {"noise": {"flagged_percent": 99.0, "roc_area": 0.99}},
        "attack": [{"epsilon": 0.1, "undetected_percent": 12.5}],
    }
    facts = {"curves": {}, "attack": [row], "detection": detection, "config": config}
    rotated(tmp_path / "a", 1.0, 0, **facts)
    text = build(tmp_path, tmp_path / "out")
    how = "pgd to a target, 10 steps, 2 starts, by the scores' difference"
    for title, cells in (
        (f"{how}: error % within ε", "| 30.00 |"),
        (f"{how}: taken for the target, %, within ε", "| 20.00 |"),
        (f"{how}: fooled and not flagged, %, within ε", "| 12.50 |"),
        ("not flagged by reconstruction, %", "| 95.00 | 1.00 |"),
        ("area under the ROC curve of reconstruction, %", "| 99.00 |"),
    ):
        table = text.partition(f"{title}**")[2].partition("**")[0]
        assert cells in table, title


def test_different_attacks_are_never_put_together(tmp_path):
    tested = EXPERIMENTS.tested(["eval", "attack=bim"])
    plain = dataclasses.asdict(tested)
    changes = [{}, {"step_size": 0.001}, {"seed": 3}, {"random_start": True}, {"name": "mine"}]
    changes += [{"source": f"runs/{name}/seed0"} for name in ("cnn", "em")]
    changes += [{"steps": 20}, {"loss": "difference"}, {"restarts": 5, "random_start": True}]
    for number, change in enumerate(changes):
        config = plain | {"attack": plain["attack"] | change}
        row = {"epsilon": 0.1, "error_percent": float(number)}
        rotated(tmp_path / f"{number}", 1.0, 0, curves={}, attack=[row], config=config)
    text = build(tmp_path, tmp_path / "out").partition("## On other and on changed images")[2]
    assert all(f"| 0 | {number}.00 |" in text for number in range(len(changes)))


@pytest.mark.parametrize(
    "damaged",
    [
        {"curves": {"rotate": [{"value": "0"}]}},
        {"attack": [{"epsilon": 0.1, "error_percent": 30.0}]},  # of no attack in the settings
        {"detection": {"real_flagged_percent": 5.0, "sets": {"noise": {}}, "attack": []}},
    ],
)
def test_a_damaged_evaluation_of_changed_images_is_left_out(tmp_path, damaged, capsys):
    rotated(tmp_path / "a", 1.0, 0, **damaged)
    assert find_results([tmp_path]) == []
    assert "is left out" in capsys.readouterr().err


def test_routings_are_questions_of_their_own(tmp_path, in_tmp):
    words = ["model=capsnet_small", "recipe=quick"]
    for name, errors in (("dynamic", 46), ("uniform", 72), ("em", 40), ("self_routing", 129)):
        for seed in range(3):
            folder = tmp_path / f"{name}{seed}"
            train_result(folder, errors + seed**2, seed, *words, f"routing={name}")
    page = in_tmp / "page.md"
    page.write_text("<!-- routings -->\n<!-- end -->\n<!-- changed -->\n<!-- end -->\n")
    words = {"sources": [str(tmp_path)], "runs_dir": "runs", "out_dir": "out", "keep": None}
    report(ReportConfig(**words, update=[str(page)]), EXPERIMENTS)
    text = page.read_text()
    assert "uniform coupling" in text or "1 routing iteration" in text
    assert "| -0.060 ± 0.000 |" in text
    assert "self-attention routing (Mazzia et al. 2021) | not run yet" in text
