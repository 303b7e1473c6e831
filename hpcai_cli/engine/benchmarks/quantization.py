"""Quantization: a depthwise network that plain int8 spoils, and what training under quantization saves of it."""

from collections.abc import Iterator

import keras
import numpy as np
from keras import layers

from hpcai_cli.engine import tflite_file
from hpcai_cli.engine.benchmarks.measure import Figure, median
from hpcai_cli.engine.compression import quantization, quantization_training

SHAPE = (8, 8, 1)
TRAINING_EXAMPLES = 1300
"""Of scikit-learn's 1,797 digits; the others are what the networks are judged by."""
SPREAD = 400.0
"""Largest factor between two channels of one layer."""
SEEDS = 5


def measure() -> Iterator[Figure]:
    """Train, spoil, convert plainly and after training under quantization, once for each seed."""
    floats, plain, aware = (list(column) for column in zip(*map(_accuracies, range(SEEDS)), strict=True))
    lost, still_lost = ([before - after for before, after in zip(floats, column, strict=True)]
                        for column in (plain, aware))
    yield median("quantization", "accuracy of the float network, depthwise, on handwritten digits", floats, "share")
    yield median("quantization", "what plain int8 loses of it", lost, "share")
    yield median("quantization", "what int8 after training under quantization loses", still_lost, "share",
                 limit=float(np.median(lost)), at_most=True)


def depthwise_network(seed: int) -> keras.Model:
    """Return an untrained network of depthwise and 1x1 convolutions for 8x8 digits."""
    def block() -> list:
        return [layers.DepthwiseConv2D(3, padding="same", use_bias=False), layers.BatchNormalization(momentum=0.9),
                layers.ReLU(), layers.Conv2D(16, 1, use_bias=False), layers.BatchNormalization(momentum=0.9),
                layers.ReLU()]

    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input(SHAPE), layers.Rescaling(1 / 16), layers.Conv2D(16, 3, use_bias=False),
                             layers.BatchNormalization(momentum=0.9), layers.ReLU(), *block(), *block(),
                             layers.GlobalAveragePooling2D(), layers.Dense(10)])


def make_sensitive(model: keras.Model, spread: float) -> None:
    """Make one scale for all channels of a layer a bad one, without changing the function.

    The outputs of each convolution are multiplied by factors from 1 to `spread` and the next one's weights divided by
    them, which ReLU lets pass. `model` is a chain of convolutions with biases, as `folded` gives it.
    """
    source = np.random.default_rng(0)
    convolutions = [layer for layer in model.layers if isinstance(layer, (layers.Conv2D, layers.DepthwiseConv2D))]
    for layer, following in zip(convolutions[:-1], convolutions[1:], strict=True):
        kernel, bias = layer.get_weights()
        factors = np.exp(source.uniform(0, np.log(spread), len(bias)))
        column = factors.reshape(1, 1, -1, 1)
        layer.set_weights([kernel * (column if isinstance(layer, layers.DepthwiseConv2D) else factors), bias * factors])
        kernel, bias = following.get_weights()
        following.set_weights([kernel / column, bias])


def _accuracies(seed: int) -> tuple[float, float, float]:
    """Return the accuracies of the float network, of its plain int8 form, and of the one trained for int8."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = digits.images[..., None].astype(np.uint8), digits.target
    train, truth = images[:TRAINING_EXAMPLES], labels[TRAINING_EXAMPLES:]

    def fit(model: keras.Model, epochs: int, learning_rate: float) -> None:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(learning_rate), loss, jit_compile=False)
        model.fit(train.astype(np.float32), labels[:TRAINING_EXAMPLES], batch_size=50, epochs=epochs, verbose=0)

    def accuracy(answer) -> float:
        scores = np.asarray(answer(images[TRAINING_EXAMPLES:]))
        return float((scores.argmax(axis=1) == truth).mean())

    def int8(model: keras.Model):
        content = quantization.convert(model, SHAPE, kind="int8", calibration=train[:quantization.CALIBRATION_EXAMPLES])
        return tflite_file.runner(content, threads=1)

    network = depthwise_network(seed)
    fit(network, epochs=12, learning_rate=0.01)
    model = quantization_training.folded(network)
    make_sensitive(model, SPREAD)
    before, plain = accuracy(lambda inputs: model(inputs, training=False)), accuracy(int8(model))
    rounded = quantization_training.with_fake_quantization(model, train[:quantization.CALIBRATION_EXAMPLES])
    fit(rounded, epochs=10, learning_rate=2e-3)
    return before, plain, accuracy(int8(rounded))
