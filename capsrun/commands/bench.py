"""`capsrun bench`: how fast training is here, beside a textbook and beside what the machine can."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from capsrun import disk, errors
from capsrun.bench import tasks
from capsrun.bench.timing import Task, ratio, time_in_turns
from capsrun.config import BenchConfig
from capsrun.data.sets import known
from capsrun.errors import Noisy, UserError
from capsrun.model_config import CapsNetConfig
from capsrun.models.fast.native import cpu_features
from capsrun.names import suggest
from capsrun.report import figures
from capsrun.runs.progress import bar
from capsrun.terminal import counted
from capsrun.training.device import describe_device, provenance, resolve_device, resolve_precision

# Features of a CPU that decide how fast its matrix products can be.
MATRIX_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
MOST_OPERATIONS = 12
TEXTBOOK = "textbook fp32"
FILES = RESULT, CHART = "bench.json", "bench.png"
# Columns: heading, key of a row, form.
COLUMNS = (
    ("ms", "median_ms", ",.2f"),
    ("spread %", "spread_percent", ".1f"),
    ("images/s", "images_per_second", ",.0f"),
    ("× textbook", "times_textbook", ".1f"),
    ("% of matrix", "percent_of_matrix_rate", ".3g"),
    ("memory GB", "memory_gb", ".2f"),
)


def main(config: BenchConfig, overrides: Sequence[str]) -> None:
    """`capsrun bench`: time training, and say how to train."""
    bench(config)
    suggest(["train", f"dataset={config.dataset.name}"])


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time training steps and what they consist of; returns what `bench.json` holds.

    Raises Noisy, and draws no chart, when the turns of a kind of step, or of the matrix products
    that it is compared with, differed by more than `config.spread_percent`; `bench.json` says so of
    each figure that is not to be quoted. Raises UserError as `refuse_untimed` does.
    """
    refuse_untimed(config)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    out_dir = Path(config.out_dir or Path(config.runs_dir) / f"bench-{config.dataset.name}")
    with disk.own_folder(out_dir, *FILES, command="bench"):
        return finish(measure(config, device, precision), out_dir)


def measure(config: BenchConfig, device: torch.device, precision: str) -> dict[str, Any]:
    """Time everything in turns; returns what `bench.json` holds."""
    load_before = os.getloadavg()[0]
    variants = tasks.variant_names(precision)
    print(f"{config.rounds} turns each on {describe_device(device)}: {', '.join(variants)}")

    flop = tasks.step_flop(config)
    processes = {name: tasks.OwnProcess(config, name) for name in variants}
    steps = {name: Task(process, flop) for name, process in processes.items()}
    others = other_tasks(config, device, precision)
    for task in bar([*steps.values(), *others.values()], "task", "building"):
        task.warm_up(config.turn_seconds)
    time_in_turns(steps | others, config.rounds, bar)
    rows = {name: figures_of(task, config) for name, task in (steps | others).items()}
    rows["copy"]["gb_per_second"] = others["copy"].rate
    share = others["making a batch"].median_seconds / steps[variants[-1]].median_seconds
    rows["making a batch"]["percent_of_step"] = 100 * share
    for name, task in steps.items():
        compared = step_figures(task, steps[TEXTBOOK], others[product_of(name)], config)
        rows[name] |= compared | processes[name].found
    result: dict[str, Any] = {
        "command": "bench",
        **provenance(device, precision),
        "cpu_features": [name for name in MATRIX_FEATURES if name in cpu_features()],
        "dataset": config.dataset.name,
        "batch_size": config.recipe.batch_size,
        "step_gflop": flop / 1e9,
        "load_before": load_before,
        "matrix_gflops": {
            p: others[f"matrix product {p}"].rate for p in tasks.precisions(precision)
        },
        "steps": {name: rows[name] for name in steps},
        "others": {name: rows[name] for name in others},
        "notes": list(errors.notices),
    }
    if config.profile:
        result["profile"] = profile(config, device, precision)
    result["config"] = dataclasses.asdict(config)
    return result


def refuse_untimed(config: BenchConfig) -> None:
    """Raise UserError for a network without capsules or a data set without training images."""
    if not isinstance(config.model, CapsNetConfig):
        raise UserError(f"bench times CapsNets, which model={config.model.name} is not")
    if known(config.dataset.name).for_testing:
        raise UserError(f"bench times training, and {config.dataset.name} is for testing")


def other_tasks(config: BenchConfig, device: torch.device, precision: str) -> dict[str, Task]:
    """What is timed beside training steps; routing in each of the ways that work here."""
    found = {}
    for name in tasks.precisions(precision):
        found[f"matrix product {name}"] = Task(*tasks.matrix_product(device, tasks.DTYPES[name]))
    found["copy"] = Task(*tasks.large_copy(device))
    kinds = {"plain": (False, False), "fast": (True, False)}
    if device.type == "cuda":
        kinds["triton"] = (True, True)
    for kind, (fast, triton) in kinds.items():
        try:
            found[f"routing {kind}"] = Task(tasks.routing_alone(config, device, fast, triton))
        except Exception as error:  # whatever a compiler or a driver finds wrong
            errors.notice(f"routing {kind} does not work here: {str(error).splitlines()[0]}")
    found["making a batch"] = Task(tasks.batches_alone(config, device))
    found["testing"] = Task(tasks.testing(config, device, precision))
    return found


def product_of(step: str) -> str:
    """The matrix product with which a kind of step is compared: that of its precision."""
    return f"matrix product {step.split()[-1]}"


def figures_of(task: Task, config: BenchConfig) -> dict[str, Any]:
    """The figures of a task; `noisy` when they are not to be quoted."""
    return {
        "median_ms": 1e3 * task.median_seconds,
        "spread_percent": task.spread_percent,
        "noisy": task.spread_percent > config.spread_percent,
        "turns_ms": [1e3 * seconds for seconds in task.turns_seconds],
        "repeats": task.repeats,
    }


def step_figures(
    task: Task, textbook: Task, product: Task, config: BenchConfig
) -> dict[str, float]:
    """The figures that only a training step has, beside the textbook's and a matrix product."""
    return {
        "times_textbook": ratio(textbook, task),
        "images_per_second": config.recipe.batch_size / task.median_seconds,
        "percent_of_matrix_rate": 100 * task.rate / product.rate,
        "first_seconds": task.first_seconds,
    }


def profile(config: BenchConfig, device: torch.device, precision: str) -> dict[str, Any]:
    """Where the time of the fastest kind of step goes.

    The kernels of a captured graph belong to no operation, so on a GPU it is the plain step.
    """
    name = f"{'fast' if device.type == 'cpu' else 'plain'} {precision}"
    run, _ = tasks.training_steps(config, device, name)
    return {"of": name, "operations_ms": tasks.operations_ms(run, device)}


def finish(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Show and write the figures. Raises Noisy for those that cannot be trusted."""
    decisive = [*result["steps"], *(f"matrix product {p}" for p in result["matrix_gflops"])]
    noisy = [name for name in decisive if is_noisy(result, name)]
    result["refused"] = noisy
    print_figures(result)
    disk.write_json(out_dir / RESULT, result)
    if noisy:
        (out_dir / CHART).unlink(missing_ok=True)
        limit = result["config"]["spread_percent"]
        raise Noisy(
            f"too noisy to be quoted: {', '.join(noisy)} (the middle half of the turns spans more "
            f"than {limit:g} %); stop other programs and run it again, or with a longer "
            f"turn_seconds=…; all turns are in {out_dir / RESULT}, and no chart is drawn"
        )
    figures.save(figures.step_times(result), out_dir / CHART)
    print(f"written: {out_dir / RESULT}, {out_dir / CHART}")
    return result


def is_noisy(result: Mapping[str, Any], name: str) -> bool:
    """Whether the figures of a step, or of what else was timed, are not to be quoted."""
    return (result["steps"] | result["others"])[name]["noisy"]


def quoted(result: Mapping[str, Any], name: str, key: str, form: str) -> str:
    """A figure as text; `noisy` where it, or what it is compared with, is not to be quoted."""
    compared = {"times_textbook": TEXTBOOK, "percent_of_matrix_rate": product_of(name)}
    noisy = is_noisy(result, name) or is_noisy(result, compared.get(key, name))
    if noisy and key not in ("spread_percent", "memory_gb"):
        return "noisy"
    return format((result["steps"] | result["others"])[name][key], form)


def print_figures(result: Mapping[str, Any]) -> None:
    """Print the steps, then the rest, with their spreads, and where the time of a step goes."""
    rates = [
        f"{'noisy' if is_noisy(result, f'matrix product {p}') else f'{rate:,.0f}'} GFLOP/s {p}"
        for p, rate in result["matrix_gflops"].items()
    ]
    copies = quoted(result, "copy", "gb_per_second", ",.0f")
    print(f"\nthis machine: {', '.join(rates)} in large matrix products; copies {copies} GB/s")
    print(f"a step of {counted(result['batch_size'], 'image')}: {result['step_gflop']:.3g} GFLOP\n")
    for part, head, columns in (("steps", "training step", COLUMNS), ("others", "", COLUMNS[:2])):
        rows = [
            [name, *(quoted(result, name, key, form) for _, key, form in columns)]
            for name in result[part]
        ]
        heads = [head, *(column[0] for column in columns)]
        aligned = ["left", *["right"] * len(columns)]
        print(tabulate(rows, heads, "plain", colalign=aligned, disable_numparse=True), "\n")
    for name, row in result["steps"].items():
        if row["ways_ms"]:
            ways = (f"{way} {ms:.2f} ms" for way, ms in row["ways_ms"].items())
            print(f"{name}, captured: {', '.join(ways)}")
    last = list(result["steps"])[-1]
    if not is_noisy(result, last):
        share = result["others"]["making a batch"]["percent_of_step"]
        print(f"making a batch is {share:.2g} % of a step ({last})")
    print(
        "\nms: median of the turns; spread: of their middle half; × textbook: median over rounds,\n"
        "each of which compares its own turns. % of matrix: of the rate of large matrix products,\n"
        f"if the convolutions were direct. testing: {tasks.TEST_IMAGES:,} images.\n"
    )
    if "profile" in result:
        spent = result["profile"]["operations_ms"]
        total, of = sum(spent.values()), result["profile"]["of"]
        print(f"where the {total:,.1f} ms of a step ({of}) go, watched, which slows it a little:")
        for name, ms in list(spent.items())[:MOST_OPERATIONS]:
            print(f"  {name[:48]:<48}{ms:>10,.2f} ms{100 * ms / total:>6.1f} %")
        print()
