"""Optimizers and learning rates: at chosen steps what the formula of the recipe's fields says."""

import math

import keras
import numpy as np
import pytest

from hpcai_cli.engine.step import build_optimizer
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(6,), num_classes=3, epochs=5, learning_rate=0.04, momentum=0.9)
STEPS = 20
TOTAL = 5 * STEPS
KINDS = {"adam": keras.optimizers.Adam, "adamw": keras.optimizers.AdamW, "sgd": keras.optimizers.SGD,
         "lamb": keras.optimizers.Lamb}


def rate(optimizer, step: int) -> float:
    optimizer.iterations.assign(step)
    return float(optimizer.learning_rate)


def expected(step: int, *, peak: float, warmup: int, cosine: bool) -> float:
    """Linear from peak / warmup to the peak, then half a cosine to zero, or flat."""
    if step < warmup:
        first = peak / warmup
        return first + (peak - first) * step / warmup
    part = min(1.0, (step - warmup) / (TOTAL - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * part)) if cosine else peak


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 2.0])
def test_the_learning_rate_follows_the_schedule(kind, schedule, warmup_epochs):
    recipe = RECIPE.override({"optimizer": kind, "schedule": schedule, "warmup_epochs": str(warmup_epochs)})
    optimizer = build_optimizer(recipe, steps_per_epoch=STEPS, size=1)
    assert type(optimizer) is KINDS[kind]
    warmup = int(warmup_epochs * STEPS)
    for step in {0, 1, warmup // 2, warmup, warmup + 1, 50, 99, 100, 150}:
        assert rate(optimizer, step) == pytest.approx(
            expected(step, peak=0.04, warmup=warmup, cosine=schedule == "cosine"), rel=1e-4, abs=1e-7), step


@pytest.mark.parametrize(("scaling", "growth"), [("linear", 4.0), ("sqrt", 2.0), ("none", 1.0)])
def test_the_peak_grows_with_the_number_of_processes(scaling, growth):
    recipe = RECIPE.override({"learning_rate_scaling": scaling, "schedule": "constant", "warmup_epochs": "1"})
    optimizer = build_optimizer(recipe, steps_per_epoch=STEPS, size=4)
    assert rate(optimizer, 0) == pytest.approx(0.04 * growth / STEPS)
    assert rate(optimizer, STEPS) == pytest.approx(0.04 * growth)


def test_a_warm_up_longer_than_the_training_and_a_single_step():
    recipe = RECIPE.override({"warmup_epochs": "9"})
    assert rate(build_optimizer(recipe, steps_per_epoch=STEPS, size=1), TOTAL - 1) == pytest.approx(0.04)
    single = build_optimizer(recipe.override({"epochs": "1"}), steps_per_epoch=1, size=1)
    assert rate(single, 0) == pytest.approx(0.04)


def updated(changes: dict, gradients: list[float]) -> tuple[float, float]:
    """Return a variable that began at 2 after the gradients, and the second one, whose gradients are 3 times those."""
    recipe = RECIPE.override({"learning_rate": "0.1", "schedule": "constant", **changes})
    optimizer = build_optimizer(recipe, steps_per_epoch=STEPS, size=1)
    variables = [keras.Variable(np.array([[2.0]], np.float32)) for _ in range(2)]
    optimizer.build(variables)
    for gradient in gradients:
        optimizer.apply([np.array([[gradient]], np.float32), np.array([[3 * gradient]], np.float32)], variables)
    return tuple(float(variable.numpy()[0, 0]) for variable in variables)


def test_sgd_is_nesterov_s():
    velocity, value = 0.0, 2.0
    for gradient in (0.5, -0.25):
        velocity = 0.9 * velocity - 0.1 * gradient
        value += 0.9 * velocity - 0.1 * gradient
    assert updated({"optimizer": "sgd"}, [0.5, -0.25])[0] == pytest.approx(value)
    assert updated({"optimizer": "sgd", "momentum": "0"}, [0.5])[0] == pytest.approx(2 - 0.1 * 0.5)


def test_adam_s_first_step_is_the_learning_rate():
    assert updated({"optimizer": "adam"}, [0.5]) == pytest.approx((1.9, 1.9), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_decay_is_decoupled(kind):
    """Without a gradient, only the decay is left: learning rate times decay times the value."""
    assert updated({"optimizer": kind, "weight_decay": "0.25"}, [0.0])[0] == pytest.approx(2 - 0.1 * 0.25 * 2, rel=1e-5)
    assert updated({"optimizer": kind}, [0.0])[0] == 2


def test_lamb_s_step_is_in_proportion_to_the_weight():
    assert updated({"optimizer": "lamb"}, [0.5]) == pytest.approx((2 - 0.1 * 2, 2 - 0.1 * 2), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_of_the_whole_gradient_is_clipped(kind):
    """Gradients 3 and 9 have the norm sqrt(90); clipped to 0.1 they are those of 3 / sqrt(9000)."""
    clipped = updated({"optimizer": kind, "clip_norm": "0.1"}, [3.0])
    assert clipped == pytest.approx(updated({"optimizer": kind}, [3 / math.sqrt(9000)]), rel=1e-4)
