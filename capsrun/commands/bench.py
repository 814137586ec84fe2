"""`capsrun bench`: how fast training is here, beside a textbook and beside what the machine can."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from capsrun import disk, errors
from capsrun.bench import tasks
from capsrun.bench.breakdown import breakdown_ms
from capsrun.bench.timing import Task, ratio, time_in_turns, warm_up
from capsrun.config import BenchConfig, CapsNetConfig
from capsrun.data import known
from capsrun.errors import Noisy, UserError
from capsrun.models.fast.native import cpu_features
from capsrun.names import suggest
from capsrun.report import figures
from capsrun.runs.progress import bar
from capsrun.training.device import describe_device, provenance, resolve_device, resolve_precision

# Features of a CPU that decide how fast its matrix products can be.
MATRIX_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PROFILED_STEPS = 3
TESTING_ROUNDS = 5  # on a CPU each takes seconds, and a step's spread is what matters


def main(config: BenchConfig, overrides: Sequence[str]) -> None:
    """`capsrun bench`: time training, and say how to train."""
    bench(config)
    suggest(["train", f"dataset={config.dataset.name}"])


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time training steps and what they consist of; returns what `bench.json` holds.

    Raises Noisy, and draws no chart, when the turns of a kind of step, or of the matrix products
    that it is compared with, differed by more than `config.spread_percent`; `bench.json` says so of
    each figure that is not to be quoted. Raises UserError for a network without capsules or a data
    set without training images.
    """
    if not isinstance(config.model, CapsNetConfig):
        raise UserError(f"bench times CapsNets, which model={config.model.name} is not")
    if known(config.dataset.name).for_testing:
        raise UserError(f"bench times training, and {config.dataset.name} is for testing")
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    out_dir = Path(config.out_dir or Path(config.runs_dir) / f"bench-{config.dataset.name}")
    disk.make_folder(out_dir)
    load_before = os.getloadavg()[0]
    variants = tasks.variant_names(precision, device)
    print(f"{config.rounds} turns each on {describe_device(device)}: {', '.join(variants)}")

    processes = {name: tasks.OwnProcess(config, name) for name in variants}
    steps = {name: Task(run) for name, run in processes.items()}
    precisions = dict.fromkeys(("fp32", precision))
    products = {name: tasks.matrix_product(device, tasks.DTYPES[name]) for name in precisions}
    copying, copied_bytes = tasks.large_copy(device)
    others = {f"matrix product {name}": Task(run) for name, (run, _) in products.items()}
    others["copy"] = Task(copying)
    others |= routing_tasks(config, device)
    others["making a batch"] = Task(tasks.batches_alone(config, device))
    everything = steps | others
    first_seconds = {
        name: warm_up(task, config.turn_seconds, device)
        for name, task in bar(everything.items(), "task", "building")
    }
    time_in_turns(everything, config.rounds, device, bar)
    found = {name: process.finish() for name, process in processes.items()}
    others |= time_testing(config, device, precision)

    flop = tasks.step_flop(
        tasks.make_model(config, device, fast=False),
        config.recipe.batch_size,
        config.dataset.digits,
    )
    gflops = {
        name: flops / others[f"matrix product {name}"].median_seconds / 1e9
        for name, (_, flops) in products.items()
    }
    step_seconds = steps[variants[-1]].median_seconds
    result: dict[str, Any] = {
        "command": "bench",
        **provenance(device, precision),
        "cpu_features": [name for name in MATRIX_FEATURES if name in cpu_features()],
        "dataset": config.dataset.name,
        "batch_size": config.recipe.batch_size,
        "step_gflop": flop / 1e9,
        "load_before": load_before,
        "matrix_gflops": gflops,
        "steps": step_rows(config, steps, flop, gflops, first_seconds, found),
        "others": other_rows(config, others, gflops, copied_bytes, step_seconds),
        "notes": list(errors.notices),
    }
    if config.profile:
        # The kernels of a captured graph belong to no operation, so on a GPU it is the plain step.
        name = variants[-1] if device.type == "cpu" else f"plain {precision}"
        profiled = tasks.training_steps(config, device, name, capture=False)
        result["profile"] = {"of": name} | breakdown_ms(profiled, PROFILED_STEPS, device)
    result["config"] = dataclasses.asdict(config)
    return finish(result, out_dir)


def time_testing(config: BenchConfig, device: torch.device, precision: str) -> dict[str, Task]:
    """Testing in turns, on a CPU beside testing with a direct convolution."""
    kinds = {"testing": False} | ({"testing, direct": True} if device.type == "cpu" else {})
    timed = {
        name: Task(tasks.testing(config, device, precision, direct))
        for name, direct in kinds.items()
    }
    for task in timed.values():
        warm_up(task, config.turn_seconds, device)
    time_in_turns(timed, TESTING_ROUNDS, device, bar)
    return timed


def other_rows(
    config: BenchConfig,
    others: dict[str, Task],
    gflops: dict[str, float],
    copied_bytes: int,
    step_seconds: float,
) -> dict[str, dict[str, Any]]:
    """The figures of what is timed beside training steps.

    gflops: 10⁹ a second of a large matrix product, by precision. step_seconds: of the fastest step.
    """
    rows = {name: timing(task, config) for name, task in others.items()}
    for name, rate in gflops.items():
        rows[f"matrix product {name}"]["gflops"] = rate
    rows["copy"]["gb_per_second"] = copied_bytes / others["copy"].median_seconds / 1e9
    share = others["making a batch"].median_seconds / step_seconds
    rows["making a batch"]["percent_of_step"] = 100 * share
    return rows


def step_rows(
    config: BenchConfig,
    steps: dict[str, Task],
    flop: float,
    gflops: dict[str, float],
    first_seconds: dict[str, float],
    found: dict[str, dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    """The figures of each kind of training step.

    flop: of one step. gflops: 10⁹ a second of a large matrix product, by precision. found: what
    each kind's `OwnProcess` returned.
    """
    textbook, rows = next(iter(steps.values())), {}
    for name, task in steps.items():
        direct = f"direct {name.split()[1]}"
        arithmetic_seconds = flop / (1e9 * gflops[name.split()[1]])
        rows[name] = timing(task, config) | {
            "times_textbook": ratio(textbook, task),
            "times_direct": ratio(steps[direct], task) if direct in steps else None,
            "images_per_second": config.recipe.batch_size / task.median_seconds,
            "percent_of_matrix_rate": 100 * arithmetic_seconds / task.median_seconds,
            "first_seconds": first_seconds[name],
            **found[name],
        }
    return rows


def routing_tasks(config: BenchConfig, device: torch.device) -> dict[str, Task]:
    """Votes and routing alone, in each of the ways that work here."""
    kinds = {"plain": (False, False), "fast": (True, False)}
    if device.type == "cuda":
        kinds["triton"] = (True, True)
    found = {}
    for kind, (fast, triton) in kinds.items():
        try:
            found[f"routing {kind}"] = Task(tasks.routing_alone(config, device, fast, triton))
        except Exception as error:  # whatever a compiler or a driver finds wrong
            errors.notice(f"routing {kind} does not work here: {str(error).splitlines()[0]}")
    return found


def timing(task: Task, config: BenchConfig) -> dict[str, Any]:
    """The figures of a task; `noisy` when they are not to be quoted."""
    return {
        "median_ms": 1e3 * task.median_seconds,
        "spread_percent": task.spread_percent,
        "noisy": task.spread_percent > config.spread_percent,
        "turns_ms": [1e3 * seconds for seconds in task.seconds],
        "repeats": task.repeats,
    }


def finish(result: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Show and write the figures. Raises Noisy for those that cannot be trusted."""
    decisive = result["steps"] | {
        name: row for name, row in result["others"].items() if name.startswith("matrix product")
    }
    noisy = [name for name, row in decisive.items() if row["noisy"]]
    result["refused"] = noisy
    print_table(result)
    if "profile" in result:
        print_profile(result)
    disk.write_json(out_dir / "bench.json", result)
    if noisy:
        (out_dir / "bench.png").unlink(missing_ok=True)
        limit = result["config"]["spread_percent"]
        raise Noisy(
            f"too noisy to be quoted: {', '.join(noisy)} (the middle half of the turns spans more "
            f"than {limit:g} %); stop other programs and run it again, or with a longer "
            f"turn_seconds=…; all turns are in {out_dir / 'bench.json'}, and no chart is drawn"
        )
    figures.save(figures.step_times(result), out_dir / "bench.png")
    print(f"written: {out_dir / 'bench.json'}, {out_dir / 'bench.png'}")
    return result


# Columns: heading, key of a row, form.
COLUMNS = (
    ("ms", "median_ms", ",.2f"),
    ("spread %", "spread_percent", ".1f"),
    ("images/s", "images_per_second", ",.0f"),
    ("× textbook", "times_textbook", ".1f"),
    ("× direct", "times_direct", ".2f"),
    ("% of matrix", "percent_of_matrix_rate", ".3g"),
    ("memory GB", "memory_gb", ".2f"),
)


def quoted(result: dict[str, Any], name: str, key: str, form: str) -> str:
    """A figure as text; `noisy` where it, or what it is compared with, is not to be quoted."""
    row = (result["steps"] | result["others"])[name]
    if row.get(key) is None:
        return "–"
    noisy = row["noisy"] and key not in ("spread_percent", "memory_gb")
    if key == "times_textbook":
        noisy = noisy or next(iter(result["steps"].values()))["noisy"]
    if key == "times_direct":
        noisy = noisy or result["steps"][f"direct {name.split()[1]}"]["noisy"]
    if key == "percent_of_matrix_rate":
        noisy = noisy or result["others"][f"matrix product {name.split()[1]}"]["noisy"]
    return "noisy" if noisy else format(row[key], form)


def print_table(result: dict[str, Any]) -> None:
    """Print the steps, then the rest, with their spreads."""
    rates = [
        f"{quoted(result, f'matrix product {p}', 'gflops', ',.0f')} GFLOP/s {p}"
        for p in result["matrix_gflops"]
    ]
    copies = quoted(result, "copy", "gb_per_second", ",.0f")
    print(f"\nthis machine: {', '.join(rates)} in large matrix products; copies {copies} GB/s")
    print(f"a step of {result['batch_size']} images: {result['step_gflop']:.3g} GFLOP\n")
    print(f"{'training step':<24}" + "".join(f"{head:>13}" for head, _, _ in COLUMNS))
    for name in result["steps"]:
        cells = (quoted(result, name, key, form) for _, key, form in COLUMNS)
        print(f"{name:<24}" + "".join(f"{cell:>13}" for cell in cells))
    for name, row in result["steps"].items():
        if row["ways_ms"]:
            ways = (f"{way} {ms:.2f} ms" for way, ms in row["ways_ms"].items())
            print(f"{name}, captured: {', '.join(ways)}")
    print()
    for name in result["others"]:
        cells = (quoted(result, name, key, form) for _, key, form in COLUMNS[:2])
        print(f"{name:<24}" + "".join(f"{cell:>13}" for cell in cells))
    last = list(result["steps"])[-1]
    if not result["steps"][last]["noisy"]:
        share = result["others"]["making a batch"]["percent_of_step"]
        print(f"\nmaking a batch is {share:.2g} % of a step ({last})")
    print(
        "\nms: median of the turns; spread: of their middle half; × textbook, × direct: "
        "medians over\nrounds, each of which compares its own turns. % of matrix: of the rate of "
        "large matrix products,\nif the convolutions were direct. testing: "
        f"{tasks.TEST_IMAGES:,} images.\n"
    )


def print_profile(result: dict[str, Any]) -> None:
    """Print where the time of a step goes."""
    parts = result["profile"]["parts_ms"]
    total = sum(parts.values())
    of = result["profile"]["of"]
    print(f"where the {total:,.1f} ms of a step ({of}) go, watched, which slows it a little:")
    for part, milliseconds in parts.items():
        print(f"  {part:<32}{milliseconds:>10,.2f} ms{100 * milliseconds / total:>6.1f} %")
    print()
