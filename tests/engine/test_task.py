"""What a model answers: one logit is the softmax of two, a number has its errors, weights are those of scikit-learn."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.utils.class_weight import compute_sample_weight

from hpcai_cli.engine.task import class_weights, task_of
from hpcai_cli.recipe import Recipe

TWO = Recipe(name="two", summary="", num_classes=2)
NUMBER = Recipe(name="number", summary="", task="regression")


def logits_and_labels(count: int = 50) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(2)
    return source.normal(size=(count, 1)).astype(np.float32) * 4, source.integers(0, 2, count)


# ---- Two classes by one logit --------------------------------------------------------------------------------------

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_of_one_logit_is_the_binary_cross_entropy(smoothing):
    task = task_of(TWO.override({"label_smoothing": str(smoothing)}))
    logits, labels = logits_and_labels()
    plain = keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=smoothing, reduction=None)
    scores = task.scores(tf.constant(logits))
    assert scores.shape == (50, 2)
    np.testing.assert_allclose(task.losses(tf.constant(labels), scores),
                               plain(labels[:, None].astype(np.float32), logits), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_logit_equals_two_whose_difference_it_is(smoothing):
    task = task_of(TWO.override({"label_smoothing": str(smoothing)}))
    logits, labels = logits_and_labels()
    one = task.scores(tf.constant(logits))
    two = task.scores(tf.constant(np.concatenate([np.full_like(logits, 3), logits + 3], axis=1)))
    labels = tf.constant(labels)
    np.testing.assert_allclose(task.losses(labels, one), task.losses(labels, two), atol=1e-5)
    np.testing.assert_array_equal(task.measures(labels, one), task.measures(labels, two))


def test_a_class_is_right_where_the_logit_has_its_sign():
    task = task_of(TWO)
    logits, labels = logits_and_labels()
    measures = task.measures(tf.constant(labels), task.scores(tf.constant(logits)))
    np.testing.assert_array_equal(measures, (logits[:, 0] > 0) == labels)


def test_large_logits_overflow_nothing():
    task = task_of(TWO)
    losses = task.losses(tf.constant([1, 0, 1]), task.scores(tf.constant([[1e30], [1e4], [-1e4]])))
    np.testing.assert_allclose(losses, [0, 1e4, 1e4])


def test_half_precision_is_judged_in_float32():
    for recipe in (TWO, NUMBER):
        assert task_of(recipe).scores(tf.constant([[1.0]], tf.bfloat16)).dtype == tf.float32


@pytest.mark.parametrize(("recipe", "sizes"), [
    (TWO, (2, 1)), (Recipe(name="three", summary="", num_classes=3), (3,)), (NUMBER, (1,))])
def test_how_many_outputs_a_model_may_have(recipe, sizes):
    assert task_of(recipe).output_sizes() == sizes


def test_the_loss_of_several_classes_is_that_of_keras():
    source = np.random.default_rng(4)
    scores, labels = source.normal(size=(30, 5)).astype(np.float32), source.integers(0, 5, 30)
    found = task_of(Recipe(name="five", summary="", num_classes=5)).losses(tf.constant(labels), tf.constant(scores))
    np.testing.assert_allclose(found, keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True),
                               rtol=1e-5)


# ---- A number ------------------------------------------------------------------------------------------------------

def test_the_errors_of_a_number():
    task = task_of(NUMBER)
    outputs, labels = tf.constant([[1.5], [-2.0], [1000.0]]), tf.constant([1.0, 2.0, 1000.0])
    np.testing.assert_allclose(task.losses(labels, task.scores(outputs)), [0.25, 16, 0])
    np.testing.assert_allclose(task.measures(labels, task.scores(outputs)), [0.5, 4, 0])
    assert task.measure == "mean_absolute_error"


# ---- Weights of the classes ----------------------------------------------------------------------------------------

def test_balanced_weights_are_those_of_scikit_learn():
    recipe = Recipe(name="three", summary="", num_classes=3, class_weights="balanced")
    labels = np.array([0] * 70 + [1] * 25 + [2] * 5)
    weights = class_weights(recipe, labels)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[labels], compute_sample_weight("balanced", labels), rtol=1e-6)
    assert [weights[number] * (labels == number).sum() for number in range(3)] == pytest.approx([100 / 3] * 3)


def test_a_class_without_examples_changes_no_other_weight():
    recipe = Recipe(name="four", summary="", num_classes=4, class_weights="balanced")
    labels = np.array([0] * 6 + [3] * 2)
    weights = class_weights(recipe, labels)
    assert np.isfinite(weights).all()
    assert weights[labels].mean() == pytest.approx(1)
    assert weights[3] == pytest.approx(3 * weights[0])


def test_without_a_wish_there_are_no_weights():
    assert class_weights(TWO, np.array([0, 1, 1])) is None
    assert class_weights(NUMBER, np.array([0.5, 1.5])) is None
