"""What runs found, put beside the paper: what counts, what is averaged, what is said."""

import dataclasses
import json
import re
import runpy
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import MNIST_DIR, REPOSITORY, TINY, train_config

from capsrun import compose, experiments
from capsrun.commands import report as report_module
from capsrun.commands.eval import evaluate
from capsrun.commands.perturb import perturb
from capsrun.commands.report import ReportConfig
from capsrun.config import EvalConfig, PerturbConfig
from capsrun.data import load_dataset
from capsrun.errors import UserError
from capsrun.report import questions
from capsrun.report.page import to_html
from capsrun.report.plots import error_by_iterations
from capsrun.report.rows import grouped, standard_error
from capsrun.report.tables import SUMMARY, measured, summary_lines, table, verdict
from capsrun.runs.checkpoint import load_checkpoint
from capsrun.runs.reader import best_on_test, find_results
from capsrun.settings import from_dict
from capsrun.training.metrics import score_split

EXPERIMENTS = experiments.Experiments()
RESULTS = REPOSITORY / "results"
COMMITTED = RESULTS / "capsnet-mnist.pt"
ROW = "table1_mnist_3_reconstruction"


def train_result(folder: Path, errors: int, seed: int, *overrides: str, **changes) -> Path:
    """Write what a finished training run leaves, with so many errors."""
    training = train_config(f"experiment={ROW}", *overrides)
    training.seed = seed
    values = {
        "command": "train",
        "name": "run",
        "dataset": training.dataset.name,
        "model": training.model.name,
        "seed": seed,
        "steps": training.recipe.steps or 469,
        "error_percent": errors / 100,
        "errors": errors,
        "count": 10_000,
        "train_seconds": 100.0 + seed,
        "device": "Some CPU, 2 threads",
        "precision": "bf16",
        "date": "2026-11-23",
        "versions": {"torch": "2.11"},
        "git_commit": "0123456789abcdef",
        "stopped": None,
        "config": dataclasses.asdict(training),
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def eval_result(folder: Path, dataset: str, errors: int, seed: int, *overrides: str) -> Path:
    """Write what an eval of a run leaves."""
    training = train_config(*overrides)
    training.seed = seed
    tested = EXPERIMENTS.tested(["eval", f"dataset={dataset}"]).dataset
    values = {
        "command": "eval",
        "name": "run",
        "dataset": dataset,
        "model": training.model.name,
        "seed": seed,
        "steps": 5_000,
        "finished": True,
        "error_percent": errors / 3200,
        "errors": errors,
        "count": 320_000,
        "train_seconds": 100.0,
        "eval_seconds": 3.0,
        "device": "Some CPU, 2 threads",
        "precision": "bf16",
        "date": "2026-11-23",
        "versions": {"torch": "2.11"},
        "git_commit": None,
        "ensemble": [],
        "config": {"dataset": dataclasses.asdict(tested), "split": "test"},
        "trained": dataclasses.asdict(training),
    }
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(values))
    return folder


def row(name: str, folder: Path):
    return report_module.make_row(name, EXPERIMENTS, find_results([folder]))


def config(folder: Path, out: Path, keep: Path | None = None) -> ReportConfig:
    return ReportConfig(
        sources=[str(folder)],
        runs_dir="runs",
        out_dir=str(out),
        keep=None if keep is None else str(keep),
    )


def test_seeds_are_averaged(tmp_path):
    for seed, errors in enumerate((24, 25, 29)):
        train_result(tmp_path / f"seed{seed}", errors, seed)
    found = row(ROW, tmp_path)
    (group,) = found.groups
    assert group.mean == pytest.approx(0.26)
    assert group.spread == pytest.approx(statistics.stdev([0.24, 0.25, 0.29]))
    assert measured(group) == "0.26 ± 0.03"
    assert found.is_full(group)
    assert found.missing == 0


def test_the_same_runs_stand_for_every_row_of_their_network(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    assert row(ROW, tmp_path).groups
    assert row("ablation_iterations_3", tmp_path).groups
    assert row("figure_3", tmp_path).groups
    assert not row("table1_mnist_1_reconstruction", tmp_path).groups


@pytest.mark.parametrize(
    "other",
    [
        "loss=paper",
        "routing.iterations=1",
        "routing.detach=true",
        "model.digit_bias=false",
        "model.reconstruction=false",
        "model.conv1_channels=64",
        "model.initialisation=pytorch",
        "dataset.shift_px=0",
        "dataset=fashion_mnist",
        "dataset.validation=10000",
    ],
)
def test_another_network_or_other_images_are_not_in_the_row(tmp_path, other):
    train_result(tmp_path / "a", 25, 0, other)
    assert not row(ROW, tmp_path).groups


@pytest.mark.parametrize(
    "other",
    [
        "recipe=quick",
        "recipe.steps=30000",
        "recipe.learning_rate=0.002",
        "recipe.adam_form=pytorch",
        "recipe.batch_size=64",
    ],
)
def test_another_length_or_recipe_is_never_averaged_with_it(tmp_path, other):
    train_result(tmp_path / "a", 25, 0)
    train_result(tmp_path / "b", 99, 1, other)
    found = row(ROW, tmp_path)
    assert sorted(group.mean for group in found.groups) == [0.25, 0.99]
    assert [found.is_full(group) for group in found.groups].count(True) == 1
    assert found.best.mean == 0.25


def test_precisions_are_not_averaged_but_devices_are(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    train_result(tmp_path / "b", 27, 1, precision="fp32")
    train_result(tmp_path / "c", 29, 2, device="Some GPU")
    assert sorted(len(group.results) for group in row(ROW, tmp_path).groups) == [1, 2]


def test_a_copy_counts_once_and_a_seed_once(tmp_path):
    train_result(tmp_path / "runs/a", 25, 0)
    train_result(tmp_path / "results/a", 25, 0)
    assert len(find_results([tmp_path])) == 1
    train_result(tmp_path / "runs/b", 31, 0, date="2026-11-24", train_seconds=7.0)
    (group,) = row(ROW, tmp_path).groups
    assert group.errors == [0.31]
    assert group.twice == [0]


def test_what_is_no_result_is_left_out(tmp_path):
    (tmp_path / "a").mkdir()
    for number, text in enumerate(("", "{", "[]", "{}", '{"command": "train"}', '"train"', "null")):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "result.json").write_text(text)
    assert find_results([tmp_path, tmp_path / "missing"]) == []
    with pytest.raises(UserError, match="there is no finished run"):
        report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)


def test_an_unfinished_run_that_was_tested_is_left_out(tmp_path):
    folder = eval_result(tmp_path / "a", "affnist", 100, 0, "experiment=padded_capsnet")
    values = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(values | {"finished": False}))
    assert find_results([tmp_path]) == []


def test_kinds_of_published_numbers_are_kept_apart():
    """Of the row with most of them: the lowest of each kind, in a column of its own."""
    (line,) = [
        line for line in summary_lines([row(ROW, Path("nowhere"))]) if "3 routing" in line[0]
    ]
    shown = dict(zip(SUMMARY, line))
    assert shown["paper"] == "0.25 ± 0.005"
    assert shown["public, last step"] == "0.347 ± 0.021"
    assert shown["public, best on test"] == "0.26 (1 run)"
    assert shown["public, step not said"] == "0.27 (1 run)"


def test_a_long_title_stays_within_its_picture():
    words = "capsnet_small, 2.1 M parameters, 14,063 steps (30 epochs), recipe sixty, rate 0.004"
    figure = error_by_iterations({1: [0.5, 0.6], 3: [0.4]}, words)
    figure.draw_without_rendering()
    title = figure.axes[0].title.get_window_extent()
    assert 0 <= title.x0 < title.x1 <= figure.bbox.width
    assert title.y1 <= figure.bbox.height


def test_the_last_step_counts_and_the_best_on_test_stands_beside_it(tmp_path):
    for seed, best in enumerate((20, 22)):
        about = {"error_percent": best / 100, "step": 100, "evaluations": 640, "count": 10_000}
        train_result(tmp_path / str(seed), 30 + seed, seed, best_on_test=about)
    shown = dict(zip(SUMMARY, summary_lines([row(ROW, tmp_path)])[0]))
    assert shown["capsrun, last step"] == "0.30 ± 0.01"
    assert shown["best on test, not a result"] == "0.21 ± 0.01 (best of 640)"


def test_the_best_on_test_is_found_in_what_was_recorded():
    tests = [(100, 0.5), (200, 0.3), (300, 0.3), (400, 0.4)]
    rows = [{"step": step, "error_percent/test": error} for step, error in tests]
    training = dataclasses.asdict(train_config())
    found = best_on_test([{"step": 0, "total_steps": 400}, *rows], training, 10_000)
    assert found == {"error_percent": 0.3, "step": 200, "evaluations": 4, "count": 10_000}
    assert best_on_test([{"step": 20, "loss/total": 1.0}], training, 10_000) is None


def test_the_best_on_test_is_of_tests_on_the_same_images():
    """While it trains a run is tested on 10,000 of 100,000 pairs; not where a test stops it."""
    rows = [{"step": step, "error_percent/test": error} for step, error in ((100, 7.0), (200, 6.0))]
    training = dataclasses.asdict(train_config("dataset=multimnist"))
    found = best_on_test(rows, training, 100_000)
    assert found == {"error_percent": 7.0, "step": 100, "evaluations": 1, "count": 10_000}
    assert best_on_test(rows[1:], training, 100_000) is None
    # A run that ended early was tested twice after its last step: on 10,000, then on all.
    assert best_on_test([*rows, rows[-1]], training, 100_000)["evaluations"] == 2
    training["stop"]["accuracy_percent"] = 94.0
    assert best_on_test(rows, training, 100_000)["evaluations"] == 2


def questions_of(folder: Path) -> dict[str, list[str]]:
    """The lines of the table of what a number depends on, by the question."""
    rows = [report_module.make_row(n, EXPERIMENTS, []) for n in EXPERIMENTS.names()]
    reference = next(row for row in rows if row.name == report_module.REFERENCE)
    asked = questions.questions([r for r in rows if r.about.group == "ablations"], reference)
    found = questions.answers(asked, reference, grouped(find_results([folder])))
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
    changed = json.loads((tmp_path / "1" / "result.json").read_text())
    changed["config"]["recipe"]["average"] = 0.99
    (tmp_path / "1" / "result.json").write_text(json.dumps(changed))
    (group,) = grouped(find_results([tmp_path]))
    assert group.errors == [0.4, 0.6], "the last weights do not depend on it"
    assert group.averaged_errors == [], "what is averaged otherwise has no common mean"


def test_differences_that_are_all_alike_are_not_certain(tmp_path):
    """0.47 − 0.45 and 0.44 − 0.42 differ by rounding alone."""
    assert questions.difference([0.47 - 0.45, 0.44 - 0.42, 0.39 - 0.37]) == "+0.020 ± 0.000"
    assert "standard errors" not in questions.difference([0.03, 0.04])


def test_a_change_without_its_twin_is_shown_apart(tmp_path):
    """Nothing can be said about it yet, but it is there, and so are pairs of other seeds."""
    train_result(tmp_path / "base", 40, 0, *SMALL)
    train_result(tmp_path / "changed", 50, 1, *SMALL, "recipe.order=authors")
    train_result(tmp_path / "alone", 60, 0, "recipe.order=authors", "recipe.steps=500")
    assert questions_of(tmp_path)["the authors' order of training images"][0] == "not run yet"
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    others = (tmp_path / "out/report.md").read_text().split("## Every result")[0]
    assert all(f"| {error} |" in others for error in ("0.40", "0.50", "0.60"))


def test_the_order_is_not_taken_for_a_length(tmp_path):
    """Runs in the authors' order are of other images than a row that asks for the usual one."""
    train_result(tmp_path / "a", 30, 0, "recipe.order=authors")
    train_result(tmp_path / "b", 31, 0, "recipe.average=0.9")
    assert [group.errors for group in row(ROW, tmp_path).groups] == [[0.31]]


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


def test_a_shorter_run_gets_no_verdict(tmp_path):
    for seed in range(3):
        train_result(tmp_path / str(seed), 25, seed, "recipe.steps=30000")
    found = row(ROW, tmp_path)
    assert "another length" in verdict(found, found.best)
    assert found.missing == 3


def test_the_standard_error_without_a_spread_of_the_paper(tmp_path):
    for seed, errors in enumerate((38, 40)):
        train_result(tmp_path / str(seed), errors, seed, "experiment=table1_mnist_baseline")
    found = row("table1_mnist_baseline", tmp_path)
    assert standard_error(found.best, found.about.paper) == pytest.approx(0.01)


def test_a_stop_that_was_not_reached_is_not_full_length(tmp_path):
    padded = "experiment=padded_capsnet"
    for seed, (steps, reached) in enumerate(((5_000, True), (300_000, False))):
        stopped = {"accuracy_percent": 99.23, "on": "test", "reached": reached}
        train_result(tmp_path / str(seed), 77, seed, padded, steps=steps, stopped=stopped)
    found = row("padded_capsnet", tmp_path)
    assert not found.is_full(found.groups[0])
    assert [result.reached_target for result in found.groups[0].results] == [True, False]


def test_affnist_like_is_never_shown_as_affnist(tmp_path):
    eval_result(tmp_path / "a", "affnist_like", 67_200, 0, "experiment=padded_capsnet")
    eval_result(tmp_path / "b", "affnist", 96_000, 0, "experiment=padded_capsnet")
    assert row("affnist_like_capsnet", tmp_path).best.mean == pytest.approx(21)
    assert row("affnist_capsnet", tmp_path).best.mean == pytest.approx(30)
    assert not row("affnist_cnn", tmp_path).groups
    assert not row("affnist_like_capsnet_validation", tmp_path).groups
    assert row("affnist_like_capsnet", tmp_path).about.paper is None
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    text = (tmp_path / "out/report.md").read_text()
    lines = [line for line in text.splitlines() if "| 21.00 |" in line]
    assert lines
    assert all("affnist_like" in line for line in lines)


def test_a_test_on_some_of_the_images_is_not_in_the_row(tmp_path):
    folder = eval_result(tmp_path / "a", "affnist", 100, 0, "experiment=padded_capsnet")
    values = json.loads((folder / "result.json").read_text())
    values["config"]["images"] = 1000
    (folder / "result.json").write_text(json.dumps(values))
    assert not row("affnist_capsnet", tmp_path).groups


def ensemble_result(folder: Path, *members: str, seeds=range(1, 7)) -> Path:
    """An eval of several models together; members: overrides of the others' training."""
    one = "experiment=section7_cifar10"
    eval_result(folder, "cifar10", 3_200, 0, one)
    values = json.loads((folder / "result.json").read_text())
    others = [dataclasses.asdict(train_config(one, f"seed={seed}", *members)) for seed in seeds]
    values |= {"ensemble": ["x"] * len(others), "others_trained": others}
    (folder / "result.json").write_text(json.dumps(values))
    return folder


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


def test_missing_rows_say_the_command_that_makes_them(tmp_path):
    train_result(tmp_path / "a", 25, 0)
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    text = (tmp_path / "out/report.md").read_text()
    for name in EXPERIMENTS.names():
        about = EXPERIMENTS.about(name)
        if about.command and about.group != "figures":
            assert f"`capsrun reproduce targets=[{name}] budget=full`" in text
    assert "Not run yet: `capsrun reproduce targets=[figure_5] budget=full`" in text
    assert "| 2 of 3 |" in text


def test_other_networks_are_shown_apart(tmp_path):
    train_result(tmp_path / "a", 25, 0, "model.conv1_channels=64", "model.primary_types=8")
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    text = (tmp_path / "out/report.md").read_text()
    other = text[text.index("Not the paper's") : text.index("## Table 1: MultiMNIST")]
    assert "but model.conv1_channels 64, model.primary_types 8" in other
    assert "| 0.25 |" in other


def test_the_page_needs_nothing_beside_it_and_is_the_same_again(tmp_path):
    for seed in range(2):
        folder = train_result(tmp_path / "in" / str(seed), 25 + seed, seed, "recipe=quick")
        rows = [
            {"step": 20 * k, "loss/total": 1 / k, "loss/margin": 1 / k}
            | {f"routing_logit_change/iteration_{i}": i / k for i in (1, 2, 3)}
            for k in range(1, 5)
        ]
        rows.append({"step": 80, "error_percent/test": 0.25})
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first = report_module.report(config(tmp_path / "in", tmp_path / "one"), EXPERIMENTS).read_text()
    second = report_module.report(
        config(tmp_path / "in", tmp_path / "two"), EXPERIMENTS
    ).read_text()
    assert first == second
    sources = re.findall(r'(?:src|href)="([^"]*)"', first)
    assert len(sources) >= 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in first
    pictures = {path.name for path in (tmp_path / "one/pictures").iterdir()}
    assert {"curves_table1.png", "figure_a1.png"} <= pictures


def test_markup_in_names_stays_text(tmp_path):
    assert "<title>a &amp; b</title>" in to_html("# a & b", tmp_path)
    assert "<script" not in to_html("a <script>x</script> | `<b>`", tmp_path)
    assert table(["a"], [["x|y"]]).endswith("| x\\|y |")


def test_keep_copies_what_is_small(tmp_path, tiny_run):
    found = report_module.find_results([tiny_run.parent])
    assert found
    report_module.keep(found, tmp_path / "kept")
    kept = {p.name for p in (tmp_path / "kept/run/seed0").iterdir()}
    assert kept == {"result.json", "config.yaml", "metrics.jsonl", "pictures"}
    assert report_module.find_results([tmp_path / "kept"])[0].values == found[0].values


def test_groups_begin_with_the_longest(tmp_path):
    for name, steps in (("a", 469), ("b", 30_000), ("c", 4_690)):
        train_result(tmp_path / name, 25, 0, f"recipe.steps={steps}")
    assert [group.steps for group in grouped(find_results([tmp_path]))] == [
        [30_000],
        [4_690],
        [469],
    ]


def test_seeds_without_any_spread_get_a_verdict(tmp_path):
    for seed in range(3):
        train_result(tmp_path / str(seed), 43, seed, "experiment=table1_mnist_baseline")
    found = row("table1_mnist_baseline", tmp_path)
    assert verdict(found, found.best) == "+0.04: worse than the paper"


def test_what_is_most_like_affnist_like_is_shown_as_that(tmp_path):
    folder = eval_result(tmp_path / "a", "affnist_like", 67_200, 0, "experiment=padded_capsnet")
    values = json.loads((folder / "result.json").read_text())
    values["config"]["dataset"]["source"] = "mnist5k"
    (folder / "result.json").write_text(json.dumps(values))
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    text = (tmp_path / "out/report.md").read_text()
    (line,) = [line for line in text.splitlines() if "| 21.00 | 0 |" in line]
    assert line.startswith("| CapsNet, affnist_like, but tested with source mnist5k | affnist_like")


def test_a_test_on_all_pairs_is_shown(tmp_path):
    one = "experiment=table1_multimnist_3_reconstruction"
    folder = eval_result(tmp_path / "a", "multimnist", 19_200, 0, one)
    assert len(find_results([tmp_path])) == 1
    values = json.loads((folder / "result.json").read_text())
    values["config"]["dataset"]["test"] = "all"
    (folder / "result.json").write_text(json.dumps(values))
    report_module.report(config(tmp_path, tmp_path / "out"), EXPERIMENTS)
    text = (tmp_path / "out/report.md").read_text()
    assert "but tested with test all" in text.split("## What is missing")[0]


def test_a_few_steps_are_no_number_in_the_summary(tmp_path):
    train_result(tmp_path / "a", 5_000, 0, "recipe=quick", "recipe.epochs=null", "recipe.steps=4")
    (line,) = summary_lines([row(ROW, tmp_path)])
    assert line[5:7] == ["only tried", ""]


def test_what_was_kept_is_a_source_like_any_other(tmp_path, tiny_run):
    """Keeping again, from the runs and from what was kept, changes nothing."""
    kept = tmp_path / "kept"
    for _ in range(2):
        found = find_results([kept, tiny_run.parent])
        assert len(found) == 1
        report_module.keep(found, kept)
    hidden = tmp_path / "runs/.packed/a"
    hidden.parent.mkdir(parents=True)
    shutil.copytree(kept, hidden)
    assert find_results([tmp_path / "runs"]) == []


def test_evals_of_one_run_are_kept_apart(tmp_path):
    one = "experiment=padded_capsnet"
    for name in ("eval-affnist-test", "eval-affnist-test-first1000", "affnist_capsnet/seed0"):
        eval_result(tmp_path / "runs/a" / name, "affnist", 100, 0, one)
    for number, folder in enumerate(sorted((tmp_path / "runs").rglob("result.json"))):
        values = json.loads(folder.read_text())
        folder.write_text(json.dumps(values | {"errors": number}))
    report_module.keep(find_results([tmp_path / "runs"]), tmp_path / "kept")
    assert {path.parent.name for path in (tmp_path / "kept").rglob("result.json")} == {
        "eval-affnist-test",
        "eval-affnist-test-first1000",
        "affnist_capsnet",
    }


# What is committed.

needs_results = pytest.mark.skipif(not RESULTS.is_dir(), reason="results/ is not here")


@needs_results
def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    """`make report` was run after the last change of results/."""
    # The report's links begin at its folder, so it is built in the same place among the results.
    copied = tmp_path / "results"
    shutil.copytree(RESULTS, copied, ignore=shutil.ignore_patterns("*.pt", "report"))
    report_module.report(config(copied, copied / "report"), EXPERIMENTS)
    built = (copied / "report/report.md").read_text()
    assert built == (RESULTS / "report/report.md").read_text()


@needs_results
def test_the_readme_shows_the_table_of_the_report():
    rows = [
        report_module.make_row(n, EXPERIMENTS, find_results([RESULTS])) for n in EXPERIMENTS.names()
    ]
    readme = (REPOSITORY / "README.md").read_text()
    assert table(SUMMARY, summary_lines(rows)) in readme


def test_half_precision(tmp_path, tiny_run, monkeypatch, capsys):
    """Half the bytes, nearly the same outputs, and eval and perturb take it."""
    target = tmp_path / "small.pt"
    monkeypatch.setattr(sys, "argv", ["half_precision.py", str(tiny_run), str(target)])
    runpy.run_path(str(REPOSITORY / "scripts/half_precision.py"), run_name="__main__")
    assert target.stat().st_size < 0.6 * (tiny_run / "checkpoint.pt").stat().st_size
    images = torch.rand(4, 1, 28, 28)
    whole, half = (
        load_checkpoint(path).model.eval() for path in (tiny_run / "checkpoint.pt", target)
    )
    assert next(half.parameters()).dtype == torch.float32
    torch.testing.assert_close(half.encode(images), whole.encode(images), rtol=0, atol=2e-3)
    monkeypatch.chdir(tmp_path)
    words = ["dataset=mnist5k", f"checkpoint={target}"]
    evaluate(from_dict(EvalConfig, compose.compose("eval", words)), target)
    assert (tmp_path / "runs/small/eval-mnist5k-test/result.json").exists()
    words.append("perturb.digit=3")
    perturb(from_dict(PerturbConfig, compose.compose("perturb", words)), target)
    assert json.loads((tmp_path / "runs/small/perturb-mnist5k/result.json").read_text())


def test_half_precision_of_an_unfinished_run_is_refused(tmp_path, monkeypatch):
    from capsrun.runs.checkpoint import save_checkpoint

    training = dataclasses.asdict(train_config(*TINY))
    save_checkpoint(
        tmp_path / "checkpoint.pt", training, 3, model={}, optimizer={}, train_seconds=1.0
    )
    monkeypatch.setattr(sys, "argv", ["half_precision.py", str(tmp_path), str(tmp_path / "o.pt")])
    with pytest.raises(SystemExit, match="not finished"):
        runpy.run_path(str(REPOSITORY / "scripts/half_precision.py"), run_name="__main__")


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
