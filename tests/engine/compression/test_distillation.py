"""Distillation: the loss against its formula, cached scores that go along with the labels, what a student learns."""

import numpy as np
import pytest
import tensorflow as tf
from scipy.special import log_softmax, softmax

from hpcai_cli.engine import store, training
from hpcai_cli.engine.compression.distillation import Teacher
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(4, 4, 1), num_classes=3)
SCORES = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]], np.float32)
TAUGHT = np.array([[1.0, 0.0, -2.0], [4.0, 2.0, 0.0]], np.float32)


@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 0.5), (4.0, 0.7), (2.0, 1.0), (3.0, 0.0)])
def test_the_loss_is_the_papers(temperature, alpha):
    teacher = Teacher(RECIPE, cached=TAUGHT, temperature=temperature, alpha=alpha)
    hard = np.array([0.3, 0.8], np.float32)
    soft = -(softmax(TAUGHT / temperature, axis=1) * log_softmax(SCORES / temperature, axis=1)).sum(axis=1)
    expected = (1 - alpha) * hard + alpha * temperature**2 * soft
    found = teacher.losses(tf.constant(hard), tf.constant(SCORES), tf.constant(TAUGHT))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_number_is_learned_by_its_square():
    recipe = Recipe(name="line", summary="", input_shape=(1,), task="regression")
    teacher = Teacher(recipe, cached=np.zeros((2, 1), np.float32), alpha=0.25)
    found = teacher.losses(tf.constant([1.0, 2.0]), tf.constant([[3.0], [1.0]]), tf.constant([[1.0], [1.0]]))
    np.testing.assert_allclose(found, [0.75 * 1 + 0.25 * 4, 0.75 * 2])


def test_cached_scores_go_along_with_their_examples(tiny):
    dataset = store.Dataset(tiny.data())
    split = dataset.split("train")
    scores = np.random.default_rng(0).normal(size=(len(split), 3)).astype(np.float32)
    teacher = Teacher(RECIPE, cached=scores)
    joined = teacher.joined(split)
    rows = np.array([7, 3, 190])
    inputs, labels = np.empty((3, 4, 4, 1), np.uint8), np.empty((3, 4), np.float32)
    joined.gather(rows, inputs, labels)
    alone, taught = teacher.taught(tf.constant(labels), tf.constant(inputs))
    np.testing.assert_array_equal(inputs, split.inputs[rows])
    np.testing.assert_array_equal(alone, split.labels[rows])
    assert alone.dtype == tf.int64
    np.testing.assert_array_equal(taught, scores[rows])


@pytest.mark.parametrize("cached", [True, False])
def test_a_student_learns_what_the_teacher_says_and_not_the_labels(tiny, cached):
    """A teacher that is sure of the wrong class is believed when its share is everything."""
    data = tiny.data(without=("validation",))
    split = store.Dataset(data).split("train")
    wrong = 20 * np.eye(3, dtype=np.float32)[(split.labels + 1) % 3]

    def answer(inputs):
        # The kind of an image is its brightest row.
        rows = tf.reduce_mean(tf.cast(inputs, tf.float32), axis=(2, 3))[:, :3]
        return 20.0 * tf.one_hot((tf.argmax(rows, axis=1) + 1) % 3, 3)

    teacher = Teacher(RECIPE, alpha=1.0, temperature=2.0, **({"cached": wrong} if cached else {"scores": answer}))
    job = tiny.job(data=data, epochs=6)
    job.teacher = teacher
    result = training.train(job, resume=False)
    assert result["metrics"]["train_accuracy"] < 0.1
