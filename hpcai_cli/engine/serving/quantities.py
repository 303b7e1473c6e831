"""What is measured of inputs and answers, and the bins in which it is counted."""

from collections.abc import Sequence

import numpy as np

MOST_BINS = 20
MOST_QUANTITIES = 200
"""Features beyond the first 200 are not watched."""
MOST_CHANNELS = 16
CONFIDENCE_EDGES = (*(round(0.05 * step, 2) for step in range(1, 20)), 0.98, 0.99, 0.999)
"""Between the bins of the confidence: bounds on it are multiples of 0.05, and most answers are surer than 0.95."""


def names_of(inputs_kind: str, shape: Sequence[int], feature_names: Sequence[str] = ()) -> list[str]:
    """Return the names of what is measured of one example, in the order of `measured`.

    Args:
        inputs_kind: "images" or "features".
        shape: (height, width, channels), or (features,).
        feature_names: of a table's encoded columns; features without a name are numbered from 1.
    """
    if inputs_kind == "images":
        channels = min(shape[-1], MOST_CHANNELS)
        colours = {1: [], 3: ["red", "green", "blue"]}
        return ["brightness", "contrast", "sharpness", *colours.get(
            channels, [f"channel {number + 1}" for number in range(channels)])]
    return [str(feature_names[number]) if number < len(feature_names) else f"feature {number + 1}"
            for number in range(min(shape[0], MOST_QUANTITIES))]


def measured(inputs: np.ndarray, inputs_kind: str) -> np.ndarray:
    """Return the quantities of each example, float64 (n, quantities); a row's do not depend on the other rows.

    Of images the mean (brightness), the standard deviation (contrast), the mean absolute difference of neighbouring
    pixels (sharpness) and the mean of each channel, all in units of the pixels; of features the features.

    Args:
        inputs: uint8 (n, height, width, channels), or float32 (n, features).
    """
    if inputs_kind != "images":
        return inputs[:, :MOST_QUANTITIES].astype(np.float64)
    count, height, width, channels = inputs.shape
    rows = inputs.reshape(count, -1)
    # In float64 the sums of bytes are exact; in float32 those of their squares no longer are for MNIST's 784 pixels.
    wide = rows.astype(np.float64)
    size = wide.shape[1]
    found = np.empty((count, 3 + (min(channels, MOST_CHANNELS) if channels > 1 else 0)))
    means = found[:, 0] = np.add.reduce(wide, axis=1) / size
    found[:, 1] = np.sqrt(np.maximum(np.einsum("ij,ij->i", wide, wide) / size - means * means, 0))
    steps = _steps(inputs[:, 1:], inputs[:, :-1]) + _steps(inputs[:, :, 1:], inputs[:, :, :-1])
    found[:, 2] = steps / max(1, size * 2 - (height + width) * channels)
    for number in range(found.shape[1] - 3):
        found[:, 3 + number] = np.add.reduce(wide[:, number::channels], axis=1) / (height * width)
    return found


def _steps(ahead: np.ndarray, behind: np.ndarray) -> np.ndarray:
    # Larger minus smaller stays within a byte, which a plain difference would leave.
    apart = np.maximum(ahead, behind) - np.minimum(ahead, behind)
    return np.add.reduce(apart.reshape(len(apart), -1), axis=1, dtype=np.float64)


def answered(scores: np.ndarray, threshold: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the class that each row of finite scores (n, classes) answers, int64 (n,), and its probability, float64.

    The same as `answers` and `log_probabilities` of evaluation.py, which cannot be imported without TensorFlow.
    """
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    total = np.add.reduce(np.exp(shifted), axis=1)
    if threshold is None:
        return scores.argmax(axis=1), 1 / total
    second = np.exp(shifted[:, 1] - np.log(total))
    classes = (second >= threshold).astype(np.int64)
    return classes, np.where(classes == 1, second, 1 - second)


def edges_of(values: np.ndarray) -> list[float]:
    """Return the edges between at most MOST_BINS bins of values, float64 (n,); NaN and infinity have no say.

    A bin holds its lower edge. The first bin holds what is below the smallest value and the last what is above the
    largest one, so that both are empty here. Few different values have a bin each; others are cut at their quantiles,
    of which those that are equal become one edge.
    """
    known = np.sort(values[np.isfinite(values)])
    if not len(known):
        return []
    distinct, inner = np.unique(known), MOST_BINS - 2
    cuts = (distinct[:-1] / 2 + distinct[1:] / 2 if len(distinct) <= inner else
            known[np.arange(1, inner) * len(known) // inner])
    return np.unique([distinct[0], *cuts, np.nextafter(distinct[-1], np.inf)]).tolist()


class Bins:
    """The bins of several quantities, one after another in one array of counts.

    Args:
        edges: ascending, for each quantity; k edges have k + 1 bins and a last one for what is no number.
    """

    def __init__(self, edges: Sequence[Sequence[float]]):
        sizes = np.array([len(own) + 2 for own in edges], np.int64)
        self.starts = np.concatenate([[0], np.cumsum(sizes)])
        """Where each quantity's bins begin, int64 (quantities + 1,); the last is the number of all."""
        # No value is at or above NaN, so that short rows need no care.
        self._edges = np.full((len(edges), max(map(len, edges), default=0)), np.nan)
        for row, own in zip(self._edges, edges, strict=True):
            row[:len(own)] = own

    def places(self, values: np.ndarray) -> np.ndarray:
        """Return the bin that each of values, float64 (n, quantities), counts in; int64 of the same shape."""
        found = self.starts[:-1] + np.add.reduce(values[:, :, None] >= self._edges, axis=2)
        missing = np.isnan(values)
        return np.where(missing, self.starts[1:] - 1, found) if missing.any() else found

    def counts(self, values: np.ndarray) -> list[np.ndarray]:
        """Return how many of values, float64 (n, quantities), each bin holds; int64 (k + 2,) for each quantity."""
        whole = np.bincount(self.places(values).ravel(), minlength=int(self.starts[-1]))
        return np.split(whole, self.starts[1:-1])
