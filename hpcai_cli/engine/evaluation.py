"""Evaluation: every example exactly once over all ranks, so that 1, 2 or 4 processes give the same numbers."""

import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.pipeline import shard
from hpcai_cli.engine.store import Split

BATCH_SIZE = 250
"""Examples per forward pass; no result depends on it."""
METRICS = ("accuracy", "loss", "calibration_error", "macro_precision", "macro_recall", "macro_f1")
"""Names of the figures that a classification's report holds."""
CALIBRATION_BINS = 15
"""As in Guo et al., arXiv 1706.04599."""
MOST_DRAWN = 50
"""Classes up to which the drawing of the confusion matrix has names and numbers."""


def forward(model) -> Callable:
    """Compile the model's inference: inputs as stored -> float32 logits (b, num_classes)."""
    return tf.function(lambda inputs: tf.cast(model(inputs, training=False), tf.float32), reduce_retracing=True)


def logits(run_forward: Callable, split: Split, ranks: Serial | Horovod, *, num_classes: int,
           on_batch: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Return the logits of a whole split, float32 (n, num_classes), in the file's order, on every rank.

    Each rank computes a contiguous share; the shares are gathered, so that whatever is summed afterwards is summed in
    the same order for any number of ranks.
    """
    first, last = shard(len(split), rank=ranks.rank, size=ranks.size)
    size = min(BATCH_SIZE, max(1, len(split)))
    inputs = np.empty((size, *split.inputs.shape[1:]), split.inputs.dtype)
    labels = np.empty(size, np.int64)
    parts = []
    for start in range(first, last, size):
        rows = np.arange(start, min(start + size, last))
        # The last batch is filled up to the common shape, or TensorFlow would compile a second function for it.
        split.gather(np.resize(rows, size), inputs, labels)
        parts.append(run_forward(tf.constant(inputs)).numpy()[:len(rows)])
        on_batch(start + len(rows) - first)
    # A rank without a share still takes part in the gathering, with no rows.
    return ranks.gather(np.concatenate([np.zeros((0, num_classes), np.float32), *parts]))


def log_probabilities(scores: np.ndarray) -> np.ndarray:
    """Return the log-softmax of logits (n, c) in float64."""
    # Infinite logits give NaN, which whoever asked sees and names; numpy's own warning would only come before it.
    with np.errstate(invalid="ignore"):
        shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def loss_and_accuracy(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the mean cross-entropy (in nats) and the share of right answers, both in float64."""
    loss = -log_probabilities(scores)[np.arange(len(labels)), labels].mean()
    return float(loss), float((scores.argmax(axis=1) == labels).mean())


def classification_report(scores: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]) -> dict:
    """Return loss, accuracy, calibration error, per-class precision, recall and F1, and the confusion matrix.

    Args:
        scores: logits, float32 (n, c).
        labels: int64 (n,).
        class_names: c names.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(class_names))
    predicted = scores.argmax(axis=1)
    loss, accuracy = loss_and_accuracy(scores, labels)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    probabilities = np.exp(log_probabilities(scores))
    return {
        "metrics": {"accuracy": accuracy, "loss": loss, "calibration_error": calibration_error(probabilities, labels),
                    "macro_precision": float(precision.mean()), "macro_recall": float(recall.mean()),
                    "macro_f1": float(f1.mean())},
        "classes": [{"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                    for name, p, r, f, n in zip(class_names, precision, recall, f1, support, strict=True)],
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error: |confidence - accuracy| averaged over bins of equal width.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    gaps = [abs(confidence[bins == number].sum() - right[bins == number].sum()) for number in range(CALIBRATION_BINS)]
    return float(sum(gaps) / len(labels))


def draw_confusion(confusion: list[list[int]], class_names: tuple[str, ...], path) -> None:
    """Write the confusion matrix as a PNG: rows are the true classes, columns the predicted ones."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from sklearn.metrics import ConfusionMatrixDisplay

    # Beyond MOST_DRAWN the numbers would be too small to read, and take minutes.
    written = len(class_names) <= MOST_DRAWN
    side = max(4.0, 0.6 * min(len(class_names), MOST_DRAWN) + 1.5)
    figure, axes = pyplot.subplots(figsize=(side, side))
    # A dollar sign would begin a formula, and a long name leave no room for the matrix.
    names = [(name if len(name) <= 30 else name[:27] + "...").replace("$", r"\$") for name in class_names]
    ConfusionMatrixDisplay(np.array(confusion), display_labels=names if written else None).plot(
        ax=axes, colorbar=False, cmap="Blues", xticks_rotation="vertical", values_format="d", include_values=written)
    if not written:
        axes.set(xticks=[], yticks=[])
    with warnings.catch_warnings():
        # Names in a script that the font lacks are drawn as boxes; a line for each sign would be said otherwise.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
