"""What a model answers, a class or a number: its scores, its loss, and the figures that judge it."""

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli.recipe import Recipe


class Classification:
    """One of num_classes classes.

    Attributes:
        columns: columns of the scores.
        label_dtype: type of the labels.
        measure: name of what `measures` gives.
    """

    label_dtype, measure = np.int64, "accuracy"

    def __init__(self, recipe: Recipe):
        self.columns = recipe.num_classes
        self._label_smoothing = recipe.label_smoothing

    def output_sizes(self) -> tuple[int, ...]:
        """Return how many outputs a model may have: a logit per class, or of two classes that of the second."""
        return (self.columns, 1) if self.columns == 2 else (self.columns,)

    def scores(self, outputs: tf.Tensor) -> tf.Tensor:
        """Return logits, float32 (b, num_classes), from the model's outputs; float64 stays."""
        outputs = _at_least_float32(outputs)
        if outputs.shape[-1] == self.columns:
            return outputs
        # The softmax over (0, z) is the sigmoid of z: one form for whatever comes after.
        return tf.concat([tf.zeros_like(outputs), outputs], axis=1)

    def losses(self, labels: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Return each example's cross-entropy in nats, float32 (b,)."""
        return keras.losses.categorical_crossentropy(tf.one_hot(labels, self.columns), scores, from_logits=True,
                                                     label_smoothing=self._label_smoothing)

    def measures(self, labels: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Return 1 for each example whose highest score is the right one, else 0, float32 (b,)."""
        return tf.cast(tf.equal(tf.argmax(scores, axis=1), labels), tf.float32)


class Regression:
    """A number; the same attributes and functions as Classification."""

    columns, label_dtype, measure = 1, np.float32, "mean_absolute_error"

    def __init__(self, recipe: Recipe):
        pass

    def output_sizes(self) -> tuple[int, ...]:
        """Return how many outputs a model may have."""
        return (1,)

    def scores(self, outputs: tf.Tensor) -> tf.Tensor:
        """Return the predicted numbers, float32 (b, 1); float64 stays."""
        return _at_least_float32(outputs)

    def losses(self, labels: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Return each example's squared error, float32 (b,)."""
        return tf.square(scores[:, 0] - tf.cast(labels, scores.dtype))

    def measures(self, labels: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
        """Return each example's absolute error, float32 (b,)."""
        return tf.abs(scores[:, 0] - tf.cast(labels, scores.dtype))


def _at_least_float32(outputs: tf.Tensor) -> tf.Tensor:
    return tf.cast(outputs, tf.float64 if outputs.dtype == tf.float64 else tf.float32)


def task_of(recipe: Recipe) -> Classification | Regression:
    """Return what the recipe's model answers."""
    return Regression(recipe) if recipe.task == "regression" else Classification(recipe)


def class_weights(recipe: Recipe, labels: np.ndarray) -> np.ndarray | None:
    """Return each class's weight in the loss, float32 (num_classes,), their mean over the examples 1; None for equal.

    "balanced" is n / (num_classes * count), as in scikit-learn.
    """
    if recipe.class_weights == "none" or recipe.task == "regression":
        return None
    from sklearn.utils.class_weight import compute_class_weight

    weights = np.ones(recipe.num_classes, np.float32)
    present = np.unique(labels)
    weights[present] = compute_class_weight("balanced", classes=present, y=labels)
    return weights
