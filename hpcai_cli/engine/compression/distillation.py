"""Distillation: a student, or what was pruned or rounded, learns from a trained teacher beside the labels.

Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.store import Split
from hpcai_cli.recipe import Recipe


class Teacher:
    """What a student learns from.

    Where a training changes its examples at random, the teacher sees what the student sees and answers in the step;
    else its scores are computed once, and go along with the labels.

    Args:
        recipe: the student's.
        scores: the teacher's inference within the step, inputs -> the task's scores; None where they are `cached`.
        cached: the scores of all training examples, float32 (n, columns).
        temperature: by which both's logits are divided, above 0; higher ones tell more of the wrong classes.
        alpha: the teacher's share in the loss, in [0, 1]; the labels have the rest.
    """

    def __init__(self, recipe: Recipe, *, scores: Callable | None = None, cached: np.ndarray | None = None,
                 temperature: float = 4.0, alpha: float = 0.7):
        assert (scores is None) != (cached is None)
        self._regression, self._scores, self._cached = recipe.task == "regression", scores, cached
        self._temperature, self._alpha = temperature, alpha

    def joined(self, split: Split) -> Split:
        """Return the training split with the cached scores behind the labels, float32 (n, 1 + columns)."""
        if self._cached is None:
            return split
        # Labels are whole numbers below 2**24, which float32 holds exactly.
        return split.with_labels(np.concatenate([split.labels[:, None].astype(np.float32), self._cached], axis=1))

    def taught(self, labels: tf.Tensor, inputs: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Return the labels alone and the teacher's scores, float32 (b, columns)."""
        if self._cached is None:
            return labels, tf.stop_gradient(self._scores(inputs))
        alone = labels[:, 0] if self._regression else tf.cast(tf.round(labels[:, 0]), tf.int64)
        return alone, labels[:, 1:]

    def losses(self, losses: tf.Tensor, scores: tf.Tensor, taught: tf.Tensor) -> tf.Tensor:
        """Return each example's loss with the teacher's part, float32 (b,).

        For classes that is the cross-entropy between both's softened answers, times the temperature's square so that
        its gradients keep their size (section 2 of the paper); for a number the squared difference.
        """
        if self._regression:
            soft = tf.square(scores[:, 0] - taught[:, 0])
        else:
            answers = tf.nn.softmax(taught / self._temperature)
            soft = self._temperature**2 * tf.nn.softmax_cross_entropy_with_logits(answers, scores / self._temperature)
        return (1 - self._alpha) * losses + self._alpha * soft
