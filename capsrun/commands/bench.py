"""`capsrun bench`: how fast training is here, beside a textbook and beside what the machine can."""

import dataclasses
from pathlib import Path
from typing import Any

from capsrun import errors
from capsrun.bench import tasks
from capsrun.bench.breakdown import breakdown_ms
from capsrun.bench.timing import Task, ratio, time_in_turns, warm_up
from capsrun.config import BenchConfig
from capsrun.errors import Noisy
from capsrun.runs import figures, record
from capsrun.runs.progress import bar
from capsrun.training.step import cpu_features, resolve_device, resolve_precision

# Features of a CPU that decide how fast its matrix products can be.
MATRIX_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PROFILED_STEPS = 3
TESTING_ROUNDS = 5  # on a CPU each takes seconds, and a step's spread is what matters


def bench(config: BenchConfig) -> dict[str, Any]:
    """Time training steps and what they consist of; returns what `bench.json` holds.

    Raises Noisy, and draws no chart, when the turns of a kind of step differed by more than
    `config.spread_percent`; `bench.json` then says so of each figure that is not to be quoted.
    """
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    out_dir = Path(config.out_dir or Path(config.runs_dir) / f"bench-{config.dataset.name}")
    record.make_folder(out_dir)
    variants = tasks.variant_names(precision)
    print(f"{config.rounds} turns each on {record.describe_device(device)}: {', '.join(variants)}")

    steps = {n: Task(tasks.training_steps(config, device, n, capture=True)) for n in variants}
    products = {
        name: tasks.matrix_product(device, tasks.DTYPES[name])
        for name in dict.fromkeys(("fp32", precision))
    }
    copying, copied_bytes = tasks.large_copy(device)
    others = {f"matrix product {name}": Task(run) for name, (run, _) in products.items()}
    others["copy"] = Task(copying)
    for kind in ("plain", "fast"):
        others[f"routing {kind}"] = Task(tasks.routing_alone(config, device, kind == "fast"))
    if device.type == "cuda":
        others["routing triton"] = Task(tasks.routing_alone(config, device, True, triton=True))
    everything = steps | others
    first_seconds = {n: warm_up(t, config.turn_seconds, device) for n, t in everything.items()}
    time_in_turns(everything, config.rounds, device, bar)
    others["testing"] = Task(tasks.testing(config, device, precision))
    warm_up(others["testing"], config.turn_seconds, device)
    time_in_turns({"testing": others["testing"]}, TESTING_ROUNDS, device, bar)

    flop = tasks.step_flop(tasks.make_model(config, device, fast=False), config.recipe.batch_size)
    gflops = {
        name: flops / others[f"matrix product {name}"].median_seconds / 1e9
        for name, (_, flops) in products.items()
    }
    result: dict[str, Any] = {
        "command": "bench",
        **record.provenance(device, precision),
        "cpu_features": [name for name in MATRIX_FEATURES if name in cpu_features()],
        "dataset": config.dataset.name,
        "batch_size": config.recipe.batch_size,
        "step_gflop": flop / 1e9,
        "matrix_gflops": gflops,
        "steps": {},
        "others": {name: timing(task, config) for name, task in others.items()},
        "notes": list(errors.notices),
    }
    gb_per_second = copied_bytes / others["copy"].median_seconds / 1e9
    result["others"]["copy"]["gb_per_second"] = gb_per_second
    for name in variants:
        result["steps"][name] = timing(steps[name], config) | {
            "times_textbook": ratio(steps[variants[0]], steps[name]),
            "images_per_second": config.recipe.batch_size / steps[name].median_seconds,
            "percent_of_matrix_rate": flop
            / steps[name].median_seconds
            / (1e7 * gflops[name.split()[1]]),
            "first_seconds": first_seconds[name],
            "memory_gb": tasks.memory_alone(config, name) if config.memory else None,
        }
    if config.profile:
        uncaptured = tasks.training_steps(config, device, variants[-1], capture=False)
        result["profile"] = breakdown_ms(uncaptured, PROFILED_STEPS, device)
    result["config"] = dataclasses.asdict(config)
    return finish(result, out_dir)


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
    noisy = [name for name, row in result["steps"].items() if row["noisy"]]
    print_table(result)
    if "profile" in result:
        print_profile(result)
    record.write_json(out_dir / "bench.json", result)
    if noisy:
        (out_dir / "bench.png").unlink(missing_ok=True)
        raise Noisy(
            f"too noisy to be quoted: {', '.join(noisy)} (turns differ by more than "
            f"{result['config']['spread_percent']:g} %); stop other programs and run it again, or "
            "with more rounds=… or a longer turn_seconds=…"
        )
    figures.save(figures.step_times(result), out_dir / "bench.png")
    print(f"written: {out_dir / 'bench.json'}, {out_dir / 'bench.png'}")
    return result


def quoted(row: dict[str, Any], key: str, form: str) -> str:
    """A figure of a row as text; `noisy` where it is not to be quoted, `–` where there is none."""
    if row["noisy"] and key != "spread_percent":
        return "noisy"
    return "–" if row[key] is None else format(row[key], form)


def print_table(result: dict[str, Any]) -> None:
    """Print the steps, then the rest, with their spreads."""
    rates = ", ".join(f"{rate:,.0f} GFLOP/s {p}" for p, rate in result["matrix_gflops"].items())
    print(f"\nthis machine: {rates} in large matrix products; ", end="")
    copying = quoted(result["others"]["copy"], "gb_per_second", ".0f")
    print(f"copies {copying} GB/s")
    print(f"a step of {result['batch_size']} images: {result['step_gflop']:.0f} GFLOP\n")
    heads = ("ms", "± %", "images/s", "× textbook", "% of matrix rate", "memory GB")
    print(f"{'training step':<24}" + "".join(f"{head:>17}" for head in heads))
    keys = (
        ("median_ms", ",.2f"),
        ("spread_percent", ".1f"),
        ("images_per_second", ",.0f"),
        ("times_textbook", ".1f"),
        ("percent_of_matrix_rate", ".0f"),
        ("memory_gb", ".2f"),
    )
    for name, row in result["steps"].items():
        print(f"{name:<24}" + "".join(f"{quoted(row, key, form):>17}" for key, form in keys))
    print()
    for name, row in result["others"].items():
        print(f"{name:<24}" + "".join(f"{quoted(row, key, form):>17}" for key, form in keys[:2]))
    print()


def print_profile(result: dict[str, Any]) -> None:
    """Print where the time of a step goes."""
    parts = result["profile"]["parts_ms"]
    total = sum(parts.values())
    print(f"where the {total:,.1f} ms of a step go, profiled ({list(result['steps'])[-1]}):")
    for part, milliseconds in parts.items():
        print(f"  {part:<32}{milliseconds:>10,.2f} ms{100 * milliseconds / total:>6.1f} %")
    print()
