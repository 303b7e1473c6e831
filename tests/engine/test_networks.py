"""The shared networks: their shapes, their sizes, and that they learn from what recipes give them."""

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine import networks


def test_the_tutorials_layers_are_theirs():
    model = keras.Sequential([keras.Input((150, 150, 3)), *networks.tutorial((32, 64, 128), 512, dropout=0.5)])
    kinds = [type(layer).__name__ for layer in model.layers]
    assert kinds == ["Rescaling", *["Conv2D", "MaxPooling2D"] * 3, "Flatten", "Dense", "Dropout"]
    # 150 -> 148 -> 74 -> 72 -> 36 -> 34 -> 17
    assert model.count_params() == sum((9 * before + 1) * after for before, after in ((3, 32), (32, 64), (64, 128))) + (
        17 * 17 * 128 + 1) * 512
    assert model.output_shape == (None, 512)


def test_the_tutorials_layers_without_dropout():
    model = keras.Sequential([keras.Input((8, 8, 1)), *networks.tutorial((4,), 5)])
    assert [type(layer).__name__ for layer in model.layers] == ["Rescaling", "Conv2D", "MaxPooling2D", "Flatten",
                                                                "Dense"]
    assert model.layers[2].output.shape == (None, 3, 3, 4)


@pytest.mark.parametrize(("build", "features"), [
    (lambda image: networks.residual(image, width=4), 32),
    (lambda image: networks.separable(image, width=4, stages=3), 16)])
@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 48, 1), (None, None, 3)])
def test_a_network_gives_pooled_features_for_any_size(build, features, shape):
    image = keras.Input(shape)
    model = keras.Model(image, build(image))
    assert model.output_shape == (None, features)
    black_and_white = np.array([0, 255], np.uint8)[:, None, None, None] * np.ones(
        (1, *(size or 40 for size in shape)), np.uint8)
    assert np.isfinite(model(black_and_white)).all()


@pytest.mark.parametrize("build", [
    lambda image: networks.residual(image, width=2), lambda image: networks.separable(image, width=4, stages=2)])
def test_every_weight_learns(build):
    image = keras.Input((16, 16, 3))
    model = keras.Model(image, layers.Dense(2)(build(image)))
    source = np.random.default_rng(0)
    labels = np.arange(32) % 2
    images = (source.integers(0, 60, (32, 16, 16, 3)) + labels[:, None, None, None] * 120).astype(np.uint8)
    before = [weight.numpy() for weight in model.trainable_weights]
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(images, labels, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for weight, old in zip(model.trainable_weights, before, strict=True):
        assert not np.array_equal(weight.numpy(), old), weight.path


def test_no_convolution_of_one_pixel_has_strides():
    """Its gradient writes beyond its memory where there are few channels, and the process dies, now or later."""
    image = keras.Input((112, 112, 3))
    model = keras.Model(image, networks.separable(image, width=8))
    assert not [layer.name for layer in model.layers
                if isinstance(layer, layers.Conv2D) and layer.kernel_size == (1, 1) and layer.strides != (1, 1)]
