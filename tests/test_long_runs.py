"""Long runs: what they write stays small, what logging costs, and that memory does not grow."""

import gc
import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, train_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from capsrun.commands import train as train_command
from capsrun.commands.writer import Writer
from capsrun.report import figures
from capsrun.runs.recorder import Recorder, is_shown

# Of a run of the authors' length, in bytes.
LARGEST_BOARD, LARGEST_METRICS = 4e6, 8e6


def fake_numbers(rng):
    """As many as a run with three routing iterations logs."""
    names = ["loss/total", "loss/margin", "loss/reconstruction", "learning_rate"]
    names += ["capsule_length/true_class", "capsule_length/other_classes", "images_per_second"]
    names += [f"routing_logit_change/iteration_{number}" for number in (1, 2, 3)] + ["memory_gb"]
    return dict(zip(names, rng.random(len(names)).tolist()))


def grid(rng, px):
    """A picture as large as that of an evaluation, of noise, which no PNG makes smaller."""
    images = [torch.from_numpy(rng.random((1, px, px))) for _ in range(16)]
    return figures.pixels(
        figures.image_grid([("image", images), ("reconstruction", images)], ["5"] * 16)
    )


def record_all(folder, config, rng, picture):
    """What a run of MNIST records in all its steps, without training."""
    record, steps = config.record, config.recipe.steps
    evaluate_every = config.evaluation_steps(60_000)
    recorder = Recorder(folder, steps)
    for step in range(1, steps + 1):
        if step % record.log_every_steps == 0 or step == steps:
            shown = is_shown(step, record.log_every_steps, steps, record.tensorboard_points)
            recorder.numbers(step, fake_numbers(rng), shown)
        if step % evaluate_every == 0 or step == steps:
            recorder.numbers(step, {"error_percent/test": rng.random()})
            if is_shown(step, evaluate_every, steps, record.tensorboard_pictures):
                recorder.picture(step, "reconstructions", picture)
    for name in ("confusion", "failures", "hits"):
        recorder.picture(steps, name, picture)
    recorder.close()


def board_of(folder):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    return board


def test_the_event_file_of_the_authors_run_is_small(tmp_path):
    """300,000 steps, logged every 20, with 640 evaluations."""
    rng = np.random.default_rng(0)
    config = train_config("dataset=mnist", "recipe=authors")
    assert config.recipe.steps == 300_000
    record_all(tmp_path, config, rng, grid(rng, 28))
    size = sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir())
    assert 1e5 < size < LARGEST_BOARD
    assert (tmp_path / "metrics.jsonl").stat().st_size < LARGEST_METRICS
    board = board_of(tmp_path)
    steps = [event.step for event in board.Scalars("loss/total")]
    assert 1000 <= len(steps) <= 2001
    assert set(np.diff(steps)) == {160}
    assert steps[-1] == 300_000
    drawn = [event.step for event in board.Images("reconstructions")]
    assert 15 <= len(drawn) <= 21
    assert drawn[-1] == 300_000
    # What is not on the board is not lost.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss/total" in line for line in lines) == 15_000


def test_short_runs_show_everything_and_longer_ones_so_many_at_most():
    """Up to 40,000 steps logged every 20, and the 10 evaluations of the quick recipe."""
    for steps in (12, 4_690, 40_000):
        logged = [*range(20, steps, 20), steps]
        assert all(is_shown(step, 20, steps, 2000) for step in logged)
    assert all(is_shown(step, 469, 4_690, 20) for step in range(469, 4_691, 469))
    for steps, every in itertools.product([40_001, 123_457, 10**6], [1, 20, 7]):
        shown = [s for s in range(every, steps, every) if is_shown(s, every, steps, 50)]
        assert 25 <= len(shown) <= 50
        assert len(set(np.diff(shown))) == 1
        assert is_shown(steps, every, steps, 50)


def resident_mb():
    """Memory of this process that is in use now, not at most, in 10⁶ bytes."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024 / 1e6


# What a run may grow by after its first quarter, in 10⁶ bytes. A picture that is never freed is
# about 1 of them, and there are many.
GROWTH_MB = 30


def one_thread():
    """A CPU of which a network gets as much as one so small can use."""
    torch.set_num_threads(1)
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def as_many_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        # A long run as it is …
        (20_000, ["record.log_every_steps=20", "record.evaluate_every_steps=500"]),
        # … and one that does hardly anything but test, draw and save.
        (600, ["record.log_every_steps=1", "record.evaluate_every_steps=2"]),
    ],
    ids=["steps", "evaluations"],
)
def test_memory_is_flat(tmp_path, monkeypatch, steps, settings):
    """With logs, evaluations, pictures and checkpoints all along."""
    samples, original = [], Writer.log
    monkeypatch.setattr(train_command, "resolve_device", lambda _: one_thread())

    def sample(writer, *arguments):
        original(writer, *arguments)
        if writer.run.step % (steps // 40) == 0:
            gc.collect()
            samples.append((writer.run.step, resident_mb()))

    monkeypatch.setattr(Writer, "log", sample)
    seconds = 10 if steps > 1000 else 0
    settings += [f"recipe.steps={steps}", f"record.checkpoint_every_seconds={seconds}"]
    drawn = ["record.evaluate_images=250", "record.tensorboard_pictures=100000"]
    drawn += ["recipe.batch_size=8", "model.primary_types=1", "precision=fp32"]
    start = time.monotonic()
    train_command.train(train_config(*TINY, *settings, *drawn), tmp_path)
    late = [mb for step, mb in samples if step >= steps / 4]
    print(f"{steps:,} steps in {time.monotonic() - start:.0f} s, MB after each 40th of them:")
    print(", ".join(f"{mb:.0f}" for _, mb in samples))
    assert len(samples) == 40
    # Medians, as what is in use at one moment depends on when the allocator gives back.
    assert np.median(late[-10:]) - np.median(late[:10]) < GROWTH_MB


@pytest.mark.slow
def test_logging_costs_little(tmp_path, monkeypatch):
    """Under 2 % of the processor's time, with a narrow network: a wide one makes slower steps.

    Not of the clock, which other programs move too.
    """
    spent = {"batch_numbers": [], "log": [], "training_loop": []}

    def timed(place, name):
        original = getattr(place, name)

        def called(*arguments):
            start = time.process_time()
            try:
                return original(*arguments)
            finally:
                spent[name].append(time.process_time() - start)

        monkeypatch.setattr(place, name, called)

    timed(train_command, "batch_numbers")
    timed(train_command, "training_loop")
    timed(Writer, "log")
    monkeypatch.setattr(train_command, "resolve_device", lambda _: one_thread())
    narrow = ["model.conv1_channels=32", "model.primary_types=4"]
    length = ["recipe.epochs=null", "recipe.steps=200", "record.evaluate_images=10"]
    config = train_config("dataset=mnist5k", "precision=fp32", *narrow, *length)
    train_command.train(config, tmp_path)
    assert len(spent["log"]) == 10  # of the settings as they are
    logging, whole = sum(spent["batch_numbers"]) + sum(spent["log"]), sum(spent["training_loop"])
    print(f"logging: {1e3 * logging / 10:.1f} ms each, of {whole:.2f} s in all")
    assert logging < 0.02 * whole
