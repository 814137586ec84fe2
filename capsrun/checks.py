"""Settings that are each allowed, but contradict each other."""

import os
from pathlib import PurePath
from typing import Any

from capsrun.config import RecipeConfig, TrainConfig
from capsrun.errors import UserError
from capsrun.model_config import (
    ROUTINGS,
    CapsNetConfig,
    CapsuleLossConfig,
    CapsuleModelConfig,
    CNNConfig,
    CrossEntropyConfig,
    DynamicRoutingConfig,
    LogLikelihoodConfig,
    LossConfig,
    ModelConfig,
    RoutingConfig,
    algorithm_of,
)


def check_together(config: Any) -> None:
    """Raise UserError for settings that are each allowed but contradict each other."""
    if hasattr(config, "recipe"):
        _check_recipe(config.recipe)
    if hasattr(config, "model") and hasattr(config, "loss"):
        _check_kinds(config.model, config.routing, config.loss)
    if isinstance(config, TrainConfig):
        _check_stop(config)
        if config.name is not None and not is_name(config.name):
            raise UserError(f"name={config.name} does not name a folder below runs_dir")
        if any(len(os.fsencode(part)) > 255 for part in PurePath(config.name or "").parts):
            raise UserError(f"name={str(config.name)[:40]}… is longer than a file system takes")


def _check_recipe(recipe: RecipeConfig) -> None:
    if (recipe.steps is None) == (recipe.epochs is None):
        raise UserError("set exactly one of recipe.steps and recipe.epochs (the other to null)")
    decays = [recipe.decay_steps, recipe.decay_periods].count(None)
    if recipe.decay_shape == "exponential" and decays != 1:
        raise UserError("set exactly one of recipe.decay_steps and recipe.decay_periods")
    if recipe.decay_shape == "linear" and decays != 2:
        raise UserError(
            "recipe.decay_shape=linear ends with the run: set recipe.decay_steps and "
            "recipe.decay_periods to null"
        )


def _check_kinds(model: ModelConfig, routing: RoutingConfig | None, loss: LossConfig) -> None:
    """Refuse a loss that is not for the outputs of the model, and layers that do not match."""
    has_capsules = isinstance(model, CapsuleModelConfig)
    if has_capsules and routing is None:
        raise UserError(f"model={model.name} has capsules, so routing= cannot be null")
    if has_capsules and isinstance(loss, CrossEntropyConfig):
        raise UserError(
            f"loss={loss.name} is not for model={model.name}, which has capsules: leave out loss=, "
            "or say loss=authors or loss=paper"
        )
    found = None if routing is None else ROUTINGS.get(algorithm_of(routing))
    if isinstance(loss, LogLikelihoodConfig) and not (found and found.shares):
        fitting = " or ".join(f"routing={name}" for name, each in ROUTINGS.items() if each.shares)
        raise UserError(
            f"loss={loss.name} is for capsules whose lengths add up to 1: {fitting}, or another "
            "loss, as loss=authors"
        )
    if not has_capsules and routing is not None:
        raise UserError(f"model={model.name} has no capsules, so there is nothing for routing=")
    if not has_capsules and isinstance(loss, CapsuleLossConfig):
        raise UserError(
            f"loss={loss.name} is for capsules, which model={model.name} has not: "
            "loss=cross_entropy or loss=sigmoid_cross_entropy"
        )
    is_other = routing is not None and not isinstance(routing, DynamicRoutingConfig)
    if is_other and isinstance(model, CapsNetConfig) and not model.digit_bias:
        raise UserError(
            "model.digit_bias=false takes out the bias of routing by agreement: leave it out with "
            "other routings"
        )
    if isinstance(model, CNNConfig):
        counts = [len(model.channels), len(model.kernels_px), len(model.pools_px)]
        if len(set(counts)) > 1 or not counts[0]:
            raise UserError(
                "model.channels, model.kernels_px and model.pools_px have a value for each layer, "
                f"but there are {counts[0]}, {counts[1]} and {counts[2]}"
            )


def _check_stop(config: TrainConfig) -> None:
    stop = config.stop
    if stop.accuracy_percent is None and stop.on != "test":
        raise UserError(
            "stop.on needs stop.accuracy_percent=…; stop.patience is always of held-out images"
        )
    if not stop.asked and stop.every_steps is not None:
        raise UserError("stop.every_steps needs stop.accuracy_percent=… or stop.patience=…")
    if stop.asked and stop.every_steps is None and config.record.evaluate_every_steps is not None:
        raise UserError(
            "where a run may stop, how often it is tested decides when: say stop.every_steps=… in "
            "place of record.evaluate_every_steps"
        )
    if stop.accuracy_percent is not None and stop.patience is not None:
        raise UserError("set one of stop.accuracy_percent and stop.patience: either ends the run")
    on_validation = stop.accuracy_percent is not None and stop.on == "validation"
    if (on_validation or stop.patience is not None) and not config.dataset.validation:
        setting = "stop.on=validation" if on_validation else "stop.patience"
        raise UserError(
            f"{setting} needs held-out training images: dataset.validation=10000 (of MNIST)"
        )


def is_name(name: str) -> bool:
    """Whether this can be the name of a run: a folder below another one."""
    path = PurePath(name)
    is_below = bool(path.parts) and not path.is_absolute() and ".." not in path.parts
    return is_below and "\0" not in name
