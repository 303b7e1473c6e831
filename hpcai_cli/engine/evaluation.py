"""Evaluation: every example exactly once over all ranks, so that 1, 2 or 4 processes give the same numbers."""

import warnings
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.pipeline import shard
from hpcai_cli.engine.store import Split
from hpcai_cli.engine.task import task_of
from hpcai_cli.recipe import Recipe

BATCH_SIZE = 250
"""Examples per forward pass; no result depends on it."""
CALIBRATION_BINS = 15
"""As in Guo et al., arXiv 1706.04599."""
MOST_DRAWN = 50
"""Classes up to which the drawing of the confusion matrix has names and numbers."""


def metric_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the figures that a report holds."""
    if recipe.task == "regression":
        return ("loss", "mean_absolute_error", "root_mean_squared_error", "r2")
    names = ("accuracy", "loss", "calibration_error", "macro_precision", "macro_recall", "macro_f1")
    return (*names, "roc_auc", "average_precision", "f1") if recipe.num_classes == 2 else names


def forward(model, recipe: Recipe) -> Callable:
    """Compile the model's inference: inputs as stored -> the task's scores, float32 (b, columns)."""
    task = task_of(recipe)
    return tf.function(lambda inputs: task.scores(model(inputs, training=False)), reduce_retracing=True)


def scores_of(run_forward: Callable, split: Split, ranks: Serial | Horovod, *, columns: int,
              on_batch: Callable[[int], None] = lambda done: None) -> np.ndarray:
    """Return the scores of a whole split, float32 (n, columns), in the file's order, on every rank.

    Each rank computes a contiguous share; the shares are gathered, so that whatever is summed afterwards is summed in
    the same order for any number of ranks.
    """
    first, last = shard(len(split), rank=ranks.rank, size=ranks.size)
    size = min(BATCH_SIZE, max(1, len(split)))
    inputs = np.empty((size, *split.inputs.shape[1:]), split.inputs.dtype)
    labels = np.empty(size, split.labels.dtype)
    parts = []
    for start in range(first, last, size):
        rows = np.arange(start, min(start + size, last))
        # The last batch is filled up to the common shape, or TensorFlow would compile a second function for it.
        split.gather(np.resize(rows, size), inputs, labels)
        parts.append(run_forward(tf.constant(inputs)).numpy()[:len(rows)])
        on_batch(start + len(rows) - first)
    # A rank without a share still takes part in the gathering, with no rows.
    return ranks.gather(np.concatenate([np.zeros((0, columns), np.float32), *parts]))


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


def figures(recipe: Recipe, scores: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> dict:
    """Return the figures that cost little, by name, in float64: loss and accuracy, or the errors of a regression.

    Args:
        scores: the task's scores, float32 (n, columns).
        labels: int64 or float32 (n,).
        threshold: of two classes, the probability from which on the second is the answer; None for the likelier one.
    """
    if recipe.task == "regression":
        return _errors(scores[:, 0].astype(np.float64), labels.astype(np.float64))
    loss, accuracy = loss_and_accuracy(scores, labels)
    if recipe.num_classes != 2:
        return {"loss": loss, "accuracy": accuracy}
    from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

    predicted = answers(scores, threshold)
    found = {"loss": loss, "accuracy": float((predicted == labels).mean()),
             "f1": float(f1_score(labels, predicted, zero_division=0))}
    # The areas are of a ranking: they have no value where one of the classes is missing, or a score is no number.
    if len(np.unique(labels)) == 2 and np.isfinite(scores).all():
        margin = scores[:, 1].astype(np.float64) - scores[:, 0]
        found |= {"roc_auc": float(roc_auc_score(labels, margin)),
                  "average_precision": float(average_precision_score(labels, margin))}
    return found


def _errors(predicted: np.ndarray, labels: np.ndarray) -> dict:
    errors = predicted - labels
    spread = np.square(labels - labels.mean()).sum()
    squares = float(np.square(errors).mean())
    found = {"loss": squares, "mean_absolute_error": float(np.abs(errors).mean()),
             "root_mean_squared_error": squares**0.5}
    return found | ({"r2": float(1 - np.square(errors).sum() / spread)} if spread else {})


def answers(scores: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Return the class that each row of scores answers, int64 (n,)."""
    if threshold is None:
        return scores.argmax(axis=1)
    return (np.exp(log_probabilities(scores))[:, 1] >= threshold).astype(np.int64)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability from which on answering the second of two classes gives the best F1."""
    from sklearn.metrics import precision_recall_curve

    probabilities = np.exp(log_probabilities(scores))[:, 1]
    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])


def report(recipe: Recipe, scores: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> dict:
    """Return everything that is said of a split: all metrics; for classes also per-class figures and the confusion."""
    metrics = figures(recipe, scores, labels, threshold)
    if recipe.task == "regression":
        return {"metrics": metrics}
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(recipe.num_classes)
    predicted = answers(scores, threshold)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    probabilities = np.exp(log_probabilities(scores))
    return {
        "metrics": {**metrics, "calibration_error": calibration_error(probabilities, labels),
                    "macro_precision": float(precision.mean()), "macro_recall": float(recall.mean()),
                    "macro_f1": float(f1.mean())},
        "classes": [{"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
                    for name, p, r, f, n in zip(recipe.class_names, precision, recall, f1, support, strict=True)],
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
