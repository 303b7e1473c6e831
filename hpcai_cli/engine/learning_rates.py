"""The learning rate of each step: a warm-up, then constant or along a cosine."""

import keras
import tensorflow as tf

from hpcai_cli.recipe import Recipe


def learning_rates(recipe: Recipe, *, steps_per_epoch: int, size: int) -> keras.optimizers.schedules.CosineDecay:
    """Return the recipe's learning-rate schedule for a job of `size` ranks."""
    peak = recipe.peak_learning_rate(size)
    total = steps_per_epoch * recipe.epochs
    warmup = min(int(recipe.warmup_epochs * steps_per_epoch), total - 1)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=peak / warmup if warmup else peak, decay_steps=max(1, total - warmup),
        # With alpha 1 the cosine stays at its peak: the constant schedule, with the same warm-up.
        alpha=1.0 if recipe.schedule == "constant" else 0.0,
        warmup_target=peak if warmup else None, warmup_steps=warmup)


class ChangingRates(keras.optimizers.schedules.LearningRateSchedule):
    """The recipe's schedule where the number of ranks changes, without another compilation of the step."""

    _FIGURES = ("initial_learning_rate", "decay_steps", "warmup_target", "warmup_steps")

    def __init__(self, recipe: Recipe, *, steps_per_epoch: int, size: int):
        self._recipe = recipe
        self._rates = learning_rates(recipe, steps_per_epoch=steps_per_epoch, size=size)
        with tf.device("CPU:0"):
            for name in self._FIGURES:
                setattr(self._rates, name, tf.Variable(0.0, trainable=False))
        self.follow(steps_per_epoch=steps_per_epoch, size=size)

    def follow(self, *, steps_per_epoch: int, size: int) -> None:
        """Take the figures of so many ranks."""
        now = learning_rates(self._recipe, steps_per_epoch=steps_per_epoch, size=size)
        for name in self._FIGURES:
            value = getattr(now, name)
            # Without a warm-up it begins at its target.
            getattr(self._rates, name).assign(now.initial_learning_rate if value is None else value)

    def __call__(self, step):
        """Return the learning rate of a step."""
        return self._rates(step)

    def get_config(self) -> dict:
        """Return nothing: it is never saved."""
        return {}
