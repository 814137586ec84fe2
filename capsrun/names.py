"""What a run is called, which run a command takes by default, and which command makes it."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from capsrun.compose import EITHER, compose, group_choices, quoted
from capsrun.config import TrainConfig
from capsrun.data import found
from capsrun.data.sets import DATASETS, known
from capsrun.data_config import DatasetConfig, OwnDataConfig
from capsrun.disk import read_json
from capsrun.errors import UserError
from capsrun.model_config import CapsuleModelConfig, ModelConfig
from capsrun.settings import differing_keys, from_dict, role
from capsrun.yaml_files import chosen_files, keys_of, own_option

# These choices make the first part of a run's name.
FIRST_IN_NAME = ("dataset", "model", "recipe")
# The network that comes with capsrun, beside what it was tested with.
WEIGHTS = Path(__file__).parent / "weights"
SMALL = "small"
# What is found out about images of one's own, where nothing is said about it.
FOUND = (
    *("class_names", "classes", "channels", "image_px"),
    *("train_images", "test_images", "test_percent"),
)
MOST_BYTES = 200  # file systems take 255, and something may be put before or after it


def run_name(config: TrainConfig, overrides: Iterable[str]) -> str:
    """Name a run's folder after what was chosen: `mnist-capsnet-quick+loss-paper`.

    Only characters that neither a shell, make nor Hydra takes for something else.
    """
    overrides = list(overrides)
    words = (word.lstrip("+").partition("=") for word in overrides)
    chosen = {group: choice.strip("'\"").removesuffix(".yaml") for group, _, choice in words}
    if "experiment" in chosen:
        return with_choices(chosen["experiment"], overrides)
    # A file of one's own may have the name that is in the one it inherits.
    dataset = config.dataset
    names = {group: chosen.get(group) or getattr(config, group).name for group in FIRST_IN_NAME}
    if names["dataset"] == dataset.name:
        names["dataset"] = dataset.title
    base = "-".join(names.values())
    return with_choices(base, (w for w in overrides if w.partition("=")[0] not in FIRST_IN_NAME))


def with_choices(base: str, overrides: Iterable[str]) -> str:
    """A name with those of some overrides that belong into it; see `settings.ROLES`."""
    chosen = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        other_says_it = value == "null" and any(key in pair for pair in EITHER)
        if role(key).name and not other_says_it:
            value = run_of(value) if key == "init" else value
            chosen.append(re.sub(r"[^\w.-]+", "_", f"{key}-{value}").strip("_"))
    return shortened("+".join([base, *sorted(chosen)]))


def run_of(path: str) -> str:
    """What a run's folder, or a file, is called in the names of runs that begin with its weights.

    >>> run_of("runs/mnist-capsnet-quick/seed1/checkpoint.pt"), run_of("results/capsnet-mnist.pt")
    ('mnist-capsnet-quick-seed1', 'capsnet-mnist')
    """
    parts = PurePath(path.strip("'\"")).parts
    parts = parts[:-1] if parts[-1:] == ("checkpoint.pt",) else parts
    run, last = parts[-2:] if len(parts) > 1 else ("", "".join(parts))
    if not re.fullmatch("seed[0-9]+", last):
        return last.removesuffix(".pt")
    return run if run and last == "seed0" else "-".join(filter(None, (run, last)))


def shortened(name: str) -> str:
    """A name that every file system takes: the end of a long one is told by its hash."""
    if len(name.encode()) <= MOST_BYTES:
        return name
    start = name.encode()[: MOST_BYTES - 9].decode(errors="ignore").rpartition("+")[0]
    return f"{start}+{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def must_match(dataset: DatasetConfig, split: str) -> list[str]:
    """The settings that these images share with those of a model that is tested on them."""
    keys = ["image_px", "channels", "classes", "standardise"]
    if isinstance(dataset, OwnDataConfig):
        keys += ["transposed", "split_seed", "test_percent"]  # which choose the images
    # The seed decides about test images only where they are picked by it.
    if split != "test":
        return [*keys, "split_seed", "validation"]
    return [*keys, "split_seed"] if known(dataset.source or dataset.name).picked_from else keys


def changed_words(dataset: DatasetConfig, split: str) -> list[str]:
    """The overrides without which the default model would not fit these images, or lack them."""
    usual = usual_dataset(dataset.trained_on, dataset)
    keys = [*must_match(dataset, split), *(["source"] if dataset.source else []), "data_dir"]
    differing = differing_keys(vars(dataset), vars(usual))
    return [word(f"dataset.{key}", ours) for key, ours, _ in differing if key in keys]


def default_run(dataset: DatasetConfig, split: str, seed: int) -> str:
    """The folder, below runs_dir, of the model that is tested on these images by default."""
    own = dataset.trained_on == dataset.name
    base = f"{dataset.title if own else dataset.trained_on}-{dataset.trained_by}"
    return f"{with_choices(base, changed_words(dataset, split))}/seed{seed}"


def train_command(
    dataset: DatasetConfig, split: str = "test", seed: int = 0, runs_dir: str = "runs"
) -> str:
    """The command that makes the model of `default_run`, in `runs_dir`."""
    model, _, recipe = dataset.trained_by.partition("-")
    words = [f"dataset={dataset.trained_on}", *path_words(dataset), *changed_words(dataset, split)]
    words += [f"model={model}"] if model != "capsnet" else []
    words += [f"recipe={recipe}"] if recipe != "quick" else []
    words += [] if runs_dir == "runs" else [word("runs_dir", runs_dir)]
    return command("train", *words, *seed_words(seed))


def usual_dataset(name: str, like: DatasetConfig | None = None) -> DatasetConfig:
    """The settings of a data set where nothing is said about it.

    like: says where images of one's own are.
    """
    values = compose("data", [f"dataset={name}"]).dataset
    if isinstance(like, OwnDataConfig) and "path" in [*values]:  # maybe without a value
        values.path = like.path
    usual = from_dict(DatasetConfig, values)
    try:
        return found(usual)
    except UserError:
        if like is None:
            raise
        # Images of one's own that are not there any more are as they were.
        return dataclasses.replace(usual, **{key: getattr(like, key) for key in FOUND})


def as_chosen(dataset: DatasetConfig, overrides: Iterable[str]) -> DatasetConfig:
    """The settings with what is found out about images of one's own.

    And where a file of one's own is chosen that does not say which model is tested on its images by
    default, with this: one that was trained with the same file.
    """
    chosen = [word.partition("=")[2] for word in overrides if word.startswith("dataset=")]
    files = [path for path in chosen_files(overrides) if path.parent.name == "dataset"]
    if files and not any("trained_on" in dict(keys_of(path)) for path in files):
        dataset = dataclasses.replace(dataset, trained_on=chosen[-1].removesuffix(".yaml"))
    return found(dataset)


def path_words(dataset: DatasetConfig) -> list[str]:
    """What says on the command line where images of one's own are."""
    return [word("dataset.path", dataset.path)] if isinstance(dataset, OwnDataConfig) else []


def packaged() -> Path:
    """The checkpoint of the network that comes with capsrun."""
    return WEIGHTS / f"{SMALL}.pt"


def about_packaged() -> str:
    """What it is, and how good."""
    tested = read_json(packaged().with_suffix(".json"))
    return (
        f"that which comes with capsrun (checkpoint={SMALL}): {tested['model']}, "
        f"{tested['error_percent']:.2f} % test error on MNIST ({tested['errors']} of "
        f"{tested['count']:,})"
    )


def model_words(config: Any, checkpoint: Path) -> list[str]:
    """What eval, perturb and explore are to be told to use a model; no more than they need.

    config: of a training run, or of a command that uses its model. checkpoint: a run's folder, or a
    file.
    """
    words = dataset_words(config.dataset)
    folder = checkpoint.parent if checkpoint.name == "checkpoint.pt" else checkpoint
    usual = default_run(config.dataset, getattr(config, "split", "test"), config.seed)
    # It is looked for there if nothing is said, but for what a file of one's own says.
    if folder == Path(config.runs_dir) / usual and config.dataset.trained_on in DATASETS:
        return [*words, *seed_words(config.seed), *folder_words(config)]
    return [*words, word("checkpoint", folder.stem if folder.parent == WEIGHTS else folder)]


def dataset_words(dataset: DatasetConfig) -> list[str]:
    """What makes the settings of a data set on the command line."""
    words = [] if dataset.name == "mnist" else [f"dataset={dataset.name}"]
    if dataset.name not in group_choices("eval")["dataset"]:  # which will be said elsewhere
        return words
    words += path_words(dataset)
    changed = differing_keys(vars(dataset), vars(usual_dataset(dataset.name, dataset)))
    unsaid = ("trained_on", "trained_by", "train_images", "test_images")
    return words + [word(f"dataset.{key}", ours) for key, ours, _ in changed if key not in unsaid]


def seed_words(seed: int) -> list[str]:
    """What tells another command of a seed that is not the usual one."""
    return [f"seed={seed}"] if seed else []


def folder_words(config: Any) -> list[str]:
    """What tells another command where the runs are, if it does not know."""
    return [] if config.runs_dir == "runs" else [word("runs_dir", config.runs_dir)]


def word(key: str, value: Any) -> str:
    """An override that Hydra understands, whatever characters the value has."""
    return f"{key}={quoted(value)}"


def command(*words: str) -> str:
    """A command of capsrun as it is typed into a shell, for the same YAML files as this one."""
    return shlex.join(["capsrun", *words, *own_option()])


def uses_of_model(model: ModelConfig, words: Sequence[str]) -> list[list[str]]:
    """The commands that look into a trained model, if it has capsules and a decoder to show them.

    words: see `model_words`.
    """
    if not (isinstance(model, CapsuleModelConfig) and model.reconstruction):
        return []
    return [["perturb", *words], ["explore", *words]]


def suggest(*commands: Sequence[str]) -> None:
    """Say what to do next: a command on each line, to be copied."""
    print("next: " + "\n      ".join(command(*words) for words in commands))
