"""Every format answers like the model that it was written from."""

import sys

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine.deployment import formats
from hpcai_cli.engine.serving import runners
from hpcai_cli.errors import MissingError, UnsuitableError


def photographs() -> tuple[keras.Model, np.ndarray]:
    """A network of everything that the recipes for images have, and pictures."""
    inputs = keras.Input((12, 12, 3))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(layers.Rescaling(1 / 64, offset=-2.0)(inputs))
    shortcut = x
    x = layers.SeparableConv2D(8, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.MaxPooling2D()(layers.Add()([x, shortcut]))
    x = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, layers.Dense(1, dtype="float32")(x))
    return model, np.random.default_rng(1).integers(0, 256, (9, 12, 12, 3), dtype=np.uint8)


def rows() -> tuple[keras.Model, np.ndarray]:
    given = np.random.default_rng(2).normal(3, 5, (9, 4)).astype(np.float32)
    scaling = layers.Normalization()
    scaling.adapt(given)
    return keras.Sequential([keras.Input((4,)), scaling, layers.Dense(6, activation="relu"), layers.Dense(3)]), given


@pytest.mark.parametrize("made", [photographs, rows])
@pytest.mark.parametrize("kind", formats.FILES)
def test_it_answers_alike(tmp_path, kind, made):
    keras.utils.set_random_seed(0)
    model, given = made()
    file = formats.write(model, kind, tmp_path, input_shape=given.shape[1:], dtype=given.dtype)
    assert file.name == formats.FILES[kind]
    columns = max(2, model.output_shape[-1])
    # Neither of them is trusted: what this program writes passes its own checks.
    scores = runners.scores_of(kind, file, input_shape=given.shape[1:], columns=columns, owner="made", threads=1)
    for count in (1, 9):
        wanted = model(given[:count].astype(np.float32), training=False).numpy()
        np.testing.assert_allclose(scores(given[:count])[:, -wanted.shape[1]:], wanted, atol=1e-5)


def test_half_precision_is_exported_in_float32(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, dtype="mixed_bfloat16"),
                              layers.Dense(3, dtype="float32")])
    file = formats.write(model, "onnx", tmp_path, input_shape=(4,), dtype=np.float32)
    given = np.ones((2, 4), np.float32)
    scores = runners.scores_of("onnx", file, input_shape=(4,), columns=3, owner="made", threads=1)(given)
    np.testing.assert_allclose(scores, model(given).numpy(), atol=0.05)


def test_a_layer_that_a_format_lacks(tmp_path):
    class Strange(layers.Layer):
        def call(self, inputs):
            import tensorflow as tf
            return tf.numpy_function(lambda values: values, [inputs], tf.float32)

        def compute_output_shape(self, shape):
            return shape

    model = keras.Sequential([keras.Input((4,)), Strange()])
    with pytest.raises(UnsuitableError, match="the model cannot be written as onnx"):
        formats.write(model, "onnx", tmp_path, input_shape=(4,), dtype=np.float32)
    assert not list(tmp_path.iterdir())


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2onnx", None)
    model, given = rows()
    with pytest.raises(MissingError, match=r"pip install 'hpcai\[onnx\]'"):
        formats.write(model, "onnx", tmp_path, input_shape=(4,), dtype=given.dtype)
