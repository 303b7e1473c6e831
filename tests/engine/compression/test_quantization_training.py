"""Quantization-aware training: folding changes no answer, rounding is TFLite's, and training with it pays."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from hpcai_cli.engine import model_file, tflite_file
from hpcai_cli.engine.benchmarks.quantization import depthwise_network, make_sensitive
from hpcai_cli.engine.compression import quantization
from hpcai_cli.engine.compression import quantization_training as aware
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.model import moving_statistics
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe

SHAPE = (8, 8, 1)
RECIPE = Recipe(name="digits", summary="", input_shape=SHAPE, num_classes=10, batch_size=50, optimizer="adam",
                learning_rate=2e-3, schedule="constant", epochs=1)


@pytest.fixture(scope="module")
def digits():
    """Return scikit-learn's digits: images to train with, images held out, and the labels of both."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = source.images[..., None].astype(np.uint8)
    return images[:1300], images[1300:], source.target[:1300], source.target[1300:]


def train(model: keras.Model, images, labels, *, epochs: int, learning_rate: float = 2e-3) -> None:
    """Train by the engine's own step."""
    recipe = RECIPE.override({"learning_rate": str(learning_rate)})
    optimizer = build_optimizer(recipe, steps_per_epoch=26, size=1)
    optimizer.build(model.trainable_variables)
    images, labels = images.reshape(26, 50, *SHAPE), labels.reshape(26, 50)
    weights = np.full((26, 50), 1 / 50, np.float32)
    steps = compile_steps(model, optimizer, recipe, Serial(), block=Block(images, labels, weights, [50] * 26))
    for _ in range(epochs):
        steps(tf.constant(images), tf.constant(labels), tf.constant(weights), tf.constant([1, 1]),
              tf.constant(26))


def scramble(model: keras.Model) -> keras.Model:
    """Give every variable values of its own, so that a lost or swapped one shows."""
    source = np.random.default_rng(0)
    for variable in model.variables:
        if "seed" not in variable.name:
            low = 0.3 if "variance" in variable.name else -0.6
            variable.assign(source.uniform(low, 1.0, variable.shape))
    return model


def sequential() -> keras.Model:
    return keras.Sequential([
        keras.Input(SHAPE), layers.Rescaling(1 / 16), layers.Conv2D(6, 3, use_bias=False), layers.BatchNormalization(),
        layers.ReLU(), layers.DepthwiseConv2D(3, depth_multiplier=2), layers.BatchNormalization(scale=False),
        layers.Flatten(), layers.Dense(5), layers.BatchNormalization(center=False), layers.Dropout(0.5),
        layers.Dense(10)])


def residual() -> keras.Model:
    """Batch norm first, separable convolutions, and a convolution whose output goes two ways."""
    inputs = keras.Input((None, None, 1))
    x = shortcut = layers.Conv2D(4, 3, strides=2, padding="same", name="two_ways")(layers.Rescaling(1 / 16)(inputs))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.SeparableConv2D(6, 3, padding="same", depth_multiplier=2)(x)
    x = layers.BatchNormalization()(x)
    x = layers.SeparableConv2D(4, 3, padding="same", activation="relu")(x)
    x = layers.Add()([x, shortcut])
    return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def nested() -> keras.Model:
    """A network inside another, as a pretrained one is."""
    return keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 16), keras.Sequential([
        keras.Input((8, 8, 1)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()], name="body"),
        layers.Flatten(), layers.Dense(10)])


@pytest.mark.parametrize("network", [sequential, residual, nested])
def test_folding_changes_no_answer(network, digits):
    images = digits[1][:50].astype(np.float32)
    model = scramble(network())
    before = model.get_weights()
    expected = model.predict(images, verbose=0)
    folded = aware.folded(model)
    np.testing.assert_allclose(folded.predict(images, verbose=0), expected, rtol=1e-4, atol=1e-4)
    assert not [layer for layer in folded.layers if isinstance(layer, layers.BatchNormalization)
                and len(layer.input.shape) == 4]
    for array, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_what_is_no_graph_of_layers_is_refused():
    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    with pytest.raises(UsageError, match="cannot look into this model; expected a Sequential or Functional.*Own"):
        aware.folded(Own())


def test_rounded_weights_lie_on_the_grid_of_tflite():
    kernel = np.array([[0.5, -3.0], [1.27, 0.011], [-1.0, 2.0]], np.float32)
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="dense")])
    model.layers[0].set_weights([kernel, np.array([0.25, -1.0], np.float32)])
    rows = np.array([[0.0, 0.0, 0.0], [255.0, 255.0, 255.0], [1.0, 0.0, 7.0]], np.float32)
    rounded = aware.with_fake_quantization(model, rows)
    scale = np.abs(kernel).max(axis=0) / 127
    exact = rows @ (np.rint(kernel / scale) * scale) + [0.25, -1.0]
    step = (exact.max(axis=0).max() - exact.min()) / 255
    np.testing.assert_allclose(rounded.predict(rows, verbose=0), exact, atol=step / 2 + 1e-4)


def test_the_model_trains_the_folded_model_s_own_weights(digits):
    images, _, labels, _ = digits
    folded = aware.folded(scramble(residual()))
    rounded = aware.with_fake_quantization(folded, images[:64])
    assert [id(variable) for variable in rounded.trainable_variables] == [
        id(variable) for variable in folded.trainable_variables]
    ranges = moving_statistics(rounded)
    assert {variable.name for variable in ranges} == {"minimum", "maximum"}
    again = aware.with_fake_quantization(aware.folded(scramble(residual())), images[:64])
    assert [(variable.name, variable.shape) for variable in again.variables] == [
        (variable.name, variable.shape) for variable in rounded.variables]
    before = [variable.numpy() for variable in rounded.trainable_variables]
    learned = [variable.numpy() for variable in ranges]
    rounded.predict(images[:200].astype(np.float32), verbose=0)
    assert [variable.numpy() for variable in ranges] == learned
    train(rounded, images, labels, epochs=1)
    for variable, start in zip(rounded.trainable_variables, before, strict=True):
        assert np.abs(variable.numpy() - start).max() > 0, variable.path
    assert sum(variable.numpy() != start for variable, start in zip(ranges, learned, strict=True)) > len(ranges) / 2


def test_ranges_begin_with_the_calibration_data_and_then_move(digits):
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="ones")])
    rows = np.array([[-1.0, 0.0], [3.0, 1.0]], np.float32)
    rounded = aware.with_fake_quantization(model, rows)
    ranges = [float(variable.numpy()) for variable in moving_statistics(rounded)]
    np.testing.assert_allclose(ranges, [-1.0, 3.0, -1.0, 4.0], atol=1e-5)
    rounded(np.array([[0.0, 13.0]], np.float32), training=True)
    moved = [float(variable.numpy()) for variable in moving_statistics(rounded)]
    # One step takes one hundredth of what the batch has; zero belongs to every range.
    np.testing.assert_allclose(moved[:2], [-0.99, 3.1], atol=1e-5)


def test_the_float_model_can_be_saved_and_loaded_by_anyone(digits, tmp_path):
    images = digits[1][:20].astype(np.float32)
    folded = aware.folded(scramble(residual()))
    rounded = aware.with_fake_quantization(folded, digits[0][:64])
    plain = aware.without_fake_quantization(rounded)
    assert [id(variable) for variable in plain.variables] == [id(variable) for variable in folded.variables]
    plain.save(tmp_path / "model.keras")
    np.testing.assert_allclose(model_file.load(tmp_path / "model.keras").predict(images, verbose=0),
                               folded.predict(images, verbose=0), rtol=1e-5, atol=1e-5)


def test_training_saves_a_depthwise_network_that_plain_int8_spoils(digits):
    images, unseen, labels, truth = digits
    network = depthwise_network(seed=0)
    train(network, images, labels, epochs=12, learning_rate=0.01)
    model = aware.folded(network)
    expected = network.predict(unseen.astype(np.float32), verbose=0)
    make_sensitive(model, 400.0)
    np.testing.assert_allclose(model.predict(unseen.astype(np.float32), verbose=0), expected, atol=1e-3)

    def accuracy(scores) -> float:
        return float((scores.argmax(axis=1) == truth).mean())

    def int8(model, **calibration):
        content = quantization.convert(model, SHAPE, kind="int8", **calibration)
        assert quantization.left_in_float(content) == []
        return tflite_file.runner(content, threads=1)(unseen)

    plain = accuracy(int8(model, calibration=images[:300]))
    rounded = aware.with_fake_quantization(model, images[:300])
    train(rounded, images, labels, epochs=10)
    simulated = rounded.predict(unseen.astype(np.float32), verbose=0)
    trained = int8(rounded)
    assert accuracy(expected) > 0.9
    assert plain < accuracy(expected) - 0.1
    assert accuracy(trained) > plain + 0.08
    # What was simulated is what comes out.
    assert (trained.argmax(axis=1) == simulated.argmax(axis=1)).mean() > 0.95


def test_simulated_and_real_int8_agree_on_an_ordinary_network(digits):
    images, unseen, labels, _ = digits
    network = sequential()
    train(network, images, labels, epochs=4, learning_rate=0.01)
    rounded = aware.with_fake_quantization(aware.folded(network), images[:300])
    simulated = rounded.predict(unseen.astype(np.float32), verbose=0)
    content = quantization.convert(network, SHAPE, kind="int8", calibration=images[:300])
    real = tflite_file.runner(content, threads=1)(unseen)
    assert (real.argmax(axis=1) == simulated.argmax(axis=1)).mean() > 0.97
    assert np.abs(real - simulated).mean() < 0.02 * np.abs(simulated).max()


def test_layers_on_request_stay_in_float_in_training_and_conversion(digits):
    images = digits[0][:64]
    folded = aware.folded(scramble(sequential()))
    name = folded.layers[-1].name
    rounded = aware.with_fake_quantization(folded, images, keep_float=[name])
    assert not isinstance(rounded.layers[-1], (aware.QuantizedWeights, aware.FakeQuantization))
    content = quantization.convert(rounded, SHAPE, kind="int8", keep_float=[name])
    assert quantization.left_in_float(content) == [name]
