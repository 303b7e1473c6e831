"""The layer that int8 harms is found, also where it is one half of a separable convolution."""

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine.compression import quantization
from hpcai_cli.engine.compression.sensitivity import most_sensitive
from hpcai_cli.errors import UnsuitableError


def examples() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)


def network() -> keras.Model:
    """Return a network in whose second layer one channel is larger by far, so that one scale rounds the others away."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([
        keras.Input((8, 8, 3)), layers.Rescaling(1 / 255), layers.Conv2D(8, 3, activation="relu", name="first"),
        layers.SeparableConv2D(8, 3, name="second"), layers.GlobalAveragePooling2D(name="mean"),
        layers.Dense(2, name="answer")])
    depthwise, pointwise, bias = model.get_layer("second").get_weights()
    depthwise[:, :, 0] *= 3000
    pointwise[:, :, 0] /= 3000
    model.get_layer("second").set_weights([depthwise, pointwise, bias])
    return model


def test_the_layer_that_int8_harms_is_the_first():
    assert most_sensitive(network(), examples(), 0.1) == ["second"]


def test_a_share_of_the_layers_is_named_once_each():
    found = most_sensitive(network(), examples(), 1.0)
    assert sorted(found) == ["answer", "first", "second"]
    assert found[0] == "second"


def test_a_converted_model_leaves_them_in_float():
    model, images = network(), examples()
    content = quantization.convert(model, (8, 8, 3), kind="int8", calibration=images,
                                   keep_float=most_sensitive(model, images, 0.1))
    left = quantization.left_in_float(content)
    assert {"second", "second_depthwise"} & set(left)
    assert "first" not in left


def test_a_model_that_cannot_be_looked_into_is_refused():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    model(np.zeros((1, 3), np.float32))
    with pytest.raises(UnsuitableError, match="Sequential or Functional"):
        most_sensitive(model, np.zeros((4, 3), np.float32), 0.5)
