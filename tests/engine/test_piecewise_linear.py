"""The encoding of numbers by quantiles, as layers of a model."""

import keras
import numpy as np
import pytest

from hpcai_cli.engine import model_file
from hpcai_cli.engine.piecewise_linear import encoding, fit


def fitted(inputs: np.ndarray, bins: int) -> keras.Model:
    model = keras.Sequential([keras.Input(inputs.shape[1:]), *encoding(bins)])
    fit(model, inputs)
    return model


def test_a_number_fills_the_bins_below_it():
    inputs = np.array([[0], [1], [2], [10], [100]], np.float32)
    model = fitted(inputs, bins=4)
    answers = model(np.array([[-5], [0], [1], [6], [55], [1e6]], np.float32)).numpy()
    np.testing.assert_allclose(answers, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0.5, 0], [1, 1, 1, 0.5],
                                         [1, 1, 1, 1]], atol=1e-6)


def test_values_that_repeat_leave_bins_empty():
    inputs = np.array([[0, 7]] * 9 + [[1, 7]], np.float32)
    answers = fitted(inputs, bins=4)(np.array([[0, 7], [1, 7], [0.5, 1000]], np.float32)).numpy()
    # The first bin of the first feature runs from 0 to 1; all others have nothing between their ends.
    np.testing.assert_allclose(answers.reshape(3, 4, 2)[:, :, 0].sum(axis=1), [0, 1, 0.5], atol=1e-6)
    np.testing.assert_allclose(answers.reshape(3, 4, 2)[:, :, 1], 0, atol=1e-5)


def test_a_saved_model_is_loaded_without_trust_and_answers_alike(tmp_path):
    inputs = np.random.default_rng(0).lognormal(size=(500, 3)).astype(np.float32)
    model = fitted(inputs, bins=8)
    model.save(tmp_path / "model.keras")
    loaded = model_file.load(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs).numpy(), model(inputs).numpy())


@pytest.mark.parametrize("bins", [2, 4, 5, 7])
def test_a_value_that_most_examples_have_is_told_from_the_next(bins):
    rest = np.arange(1, 26)
    inputs = np.concatenate([np.zeros(75), rest])[:, None].astype(np.float32)
    model = fitted(inputs, bins)
    zero, one = model(np.array([[0], [1]], np.float32)).numpy()
    # A bin of its own is full at the next value already.
    assert zero.sum() == 0 and one.max() == 1
