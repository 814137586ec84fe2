"""How long a run is, and the learning rate of each of its steps."""

import math

from capsrun.config import RecipeConfig


def total_steps(recipe: RecipeConfig, training_images: int) -> int:
    """Length of the run in steps; a last batch that is begun is a whole one."""
    if recipe.steps is not None:
        return recipe.steps
    assert recipe.epochs is not None  # checked in settings.py
    return max(1, math.ceil(recipe.epochs * training_images / recipe.batch_size))


def learning_rate(recipe: RecipeConfig, step: int, steps: int) -> float:
    """The rate of a step, from 0: lr · decay_rate^(step / decay_steps), never below the floor.

    steps: length of the whole run. With `hold_fraction` h the decay begins after h · steps, and
    with `decay_periods` its period is what fits so often into the rest. A linear decay reaches 0
    at the end of the rest.
    """
    held = recipe.hold_fraction * steps
    decaying, rest = max(0.0, step - held), steps - held
    if recipe.decay_shape == "linear":
        share = 1 - decaying / rest
    else:
        # One of the two is set: settings.py.
        period = recipe.decay_steps or rest / (recipe.decay_periods or 1)
        share = recipe.decay_rate ** (decaying / period)
    return max(recipe.learning_rate * share, recipe.learning_rate_floor)


def adam_rate(recipe: RecipeConfig, step: int, steps: int) -> float:
    """The rate to give to PyTorch's Adam at a step, from 0, for the recipe's form of Adam.

    TensorFlow adds ε to sqrt(v) before the bias of v is corrected, PyTorch after it. TensorFlow's
    form is θ −= α_t m / (sqrt(v) + ε) with α_t = lr · sqrt(1 − β₂^t) / (1 − β₁^t), t from 1: this
    is α_t, for an Adam that corrects nothing itself (see `CORRECTED`).
    """
    rate = learning_rate(recipe, step, steps)
    if recipe.adam_form == "pytorch":
        return rate
    unbiased_variance = math.sqrt(1 - recipe.adam_beta2 ** (step + 1))
    return rate * unbiased_variance / (1 - recipe.adam_beta1 ** (step + 1))
