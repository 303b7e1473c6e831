"""Piecewise linear encoding of numbers (Gorishniy et al., arXiv 2203.05556), as layers that any Keras can load.

A number becomes one value per bin between two quantiles of the training split: 0 below the bin, 1 above it, and its
place within. What a network sees thereby depends on ranks more than on size: skewed numbers and outliers do no harm.
"""

import keras
import numpy as np
from keras import layers

EMPTY_WIDTH = 1e9
"""Width of bins that a feature has no quantiles for: whatever the number, it lies at about 0."""


def encoding(bins: int) -> list[keras.Layer]:
    """Return the layers from (batch, features) to (batch, bins * features) in [0, 1]; `fit` gives them their bins."""
    # float32: in bfloat16 the numbers of a bin that is narrow against its place would all be the same.
    return [layers.RepeatVector(bins, dtype="float32"),
            layers.Normalization(axis=(1, 2), name="bins", dtype="float32"),
            layers.ReLU(max_value=1.0, dtype="float32"),
            layers.Flatten(dtype="float32")]


def fit(model: keras.Model, inputs: np.ndarray) -> None:
    """Set the bins of a model's encoding to quantiles of the inputs, float32 (n, features)."""
    layer = model.get_layer("bins")
    bins, features = layer.adapt_mean.shape[-2:]
    lowest, widths = np.zeros((bins, features)), np.full((bins, features), EMPTY_WIDTH)
    for feature in range(features):
        edges = _edges(inputs[:, feature].astype(np.float64), bins)
        lowest[:len(edges) - 1, feature], widths[:len(edges) - 1, feature] = edges[:-1], np.diff(edges)
    layer.adapt_mean.assign(lowest.reshape(layer.adapt_mean.shape))
    # The layer divides by the root of what it takes for a variance.
    layer.adapt_variance.assign(np.square(widths).reshape(layer.adapt_variance.shape))
    layer.finalize_state()


def _edges(numbers: np.ndarray, bins: int) -> np.ndarray:
    """Return where the bins of a feature begin and end, float64 (at most bins + 1), ascending.

    Quantiles coincide at a value that many examples have, such as a zero for nothing. There a bin of its own, up to the
    next value, tells these from all others, however the quantiles fall.
    """
    edges, counts = np.unique(np.quantile(numbers, np.linspace(0, 1, bins + 1)), return_counts=True)
    return np.union1d(edges, [numbers[numbers > edge].min() for edge in edges[counts > 1] if edge < edges[-1]])
