"""Finds the layers that int8 harms most, which a mixed model keeps in float."""

import math

import keras
import numpy as np

from hpcai_cli.engine.compression.quantization import in_float32
from hpcai_cli.engine.compression.quantization_training import folded, weighted_layers, with_one_rounded

EXAMPLES = 64
"""Calibration examples that a layer is judged by."""


def most_sensitive(model: keras.Model, calibration: np.ndarray, share: float) -> list[str]:
    """Return the names of the layers with weights whose rounding to int8 moves the model's outputs most.

    Each layer is rounded alone, weights and activations, and judged by the mean squared change of the outputs.

    Args:
        calibration: examples as stored, (n, ...).
        share: of the layers with weights, in (0, 1]; at least one is returned, where there are any.

    Raises:
        UnsuitableError: the model is neither Sequential nor Functional.
    """
    network, own = folded(in_float32(model)), {layer.name for layer in model._flatten_layers()}
    weighted, examples = weighted_layers(network), calibration[:EXAMPLES]
    expected = _outputs(network, examples)
    harm = dict.fromkeys(weighted, 0.0)
    for name in weighted:
        rounded = with_one_rounded(network, examples, name)
        harm[name] = float(np.mean((_outputs(rounded, examples) - expected) ** 2))
    order = sorted(weighted, key=harm.get, reverse=True)[:math.ceil(share * len(weighted))]
    # Of a SeparableConv2D, which `folded` takes apart, each half has a name, and the model knows the layer.
    return list(dict.fromkeys(name if name in own else name.removesuffix("_depthwise") for name in order))


def _outputs(model: keras.Model, examples: np.ndarray) -> np.ndarray:
    return np.asarray(model(examples, training=False), np.float64)
