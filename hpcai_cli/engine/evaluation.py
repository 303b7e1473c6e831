"""Evaluation: every example exactly once over all ranks, so that 1, 2 or 4 processes give the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.pipeline import shard
from hpcai_cli.engine.store import Split
from hpcai_cli.engine.task import task_of
from hpcai_cli.recipe import Recipe

BATCH_SIZE = 250
"""Examples per forward pass; no result depends on it."""
TOP = 5
"""How many answers top_5_accuracy allows; it is a figure only where there are more classes than that."""


AGREED = 8
"""Batches after which ranks ask each other whether one was asked to stop; each looks for itself before every one."""


@dataclass(frozen=True)
class Stop:
    """How an evaluation learns that it is to end."""

    is_agreed: Callable[[], bool]
    """Whether any rank was asked; all ranks call it at the same points."""
    is_asked: Callable[[], bool]
    """Whether this rank was, and can leave out what the others would not wait for."""


class AbandonedError(Exception):
    """An evaluation was given up, on all ranks at the same point, since one of them was asked to stop."""


def metric_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the figures that a report holds."""
    if recipe.task == "regression":
        return ("loss", "mean_absolute_error", "root_mean_squared_error", "median_absolute_error", "mean_error", "r2")
    names = ("accuracy", "loss", "calibration_error", "macro_precision", "macro_recall", "macro_f1")
    if recipe.num_classes == 2:
        return (*names, "roc_auc", "average_precision", "f1")
    top = (f"top_{TOP}_accuracy",) if recipe.num_classes > TOP else ()
    return (*names, *top, "macro_roc_auc", "macro_average_precision")


def main_metric(recipe: Recipe) -> str:
    """Return the name of the figure by which two models, or two kinds of examples, are compared."""
    return "mean_absolute_error" if recipe.task == "regression" else "accuracy"


def forward(model, recipe: Recipe) -> Callable:
    """Compile the model's inference, NumPy in and out: inputs as stored -> the task's scores, float32 (b, columns)."""
    task = task_of(recipe)
    compiled = tf.function(lambda inputs: task.scores(model(inputs, training=False)), autograph=False,
                           reduce_retracing=True)
    return lambda inputs: compiled(tf.constant(inputs)).numpy()


def scores_of(run_forward: Callable, split: Split, ranks: Serial | Horovod, *, columns: int,
              on_batch: Callable[[int], None] = lambda done: None,
              stop: Stop | None = None) -> np.ndarray:
    """Return the scores of a whole split, float32 (n, columns), in the file's order, on every rank.

    Each rank computes a contiguous share; the shares are gathered, so that whatever is summed afterwards is summed in
    the same order for any number of ranks.

    Args:
        on_batch: called after each batch with the examples that this rank has done.
        stop: whether to give up.

    Raises:
        AbandonedError: it was given up.
    """
    first, last = shard(len(split), rank=ranks.rank, size=ranks.size)
    size = min(BATCH_SIZE, max(1, len(split)))
    inputs = np.empty((size, *split.inputs.shape[1:]), split.inputs.dtype)
    labels = np.empty(size, split.labels.dtype)
    parts = []
    # All ranks look as often, also one whose share is a batch shorter.
    for number, start in enumerate(range(first, first + -(-len(split) // ranks.size), size)):
        if stop and number % AGREED == 0 and stop.is_agreed():
            raise AbandonedError
        rows = np.arange(start, min(start + size, last))
        if not len(rows) or stop and stop.is_asked():
            continue
        # The last batch is filled up to the common shape, or TensorFlow would compile a second function for it.
        split.gather(np.resize(rows, size), inputs, labels)
        parts.append(run_forward(inputs)[:len(rows)])
        on_batch(start + len(rows) - first)
    if stop and stop.is_agreed():
        raise AbandonedError
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


def places_of_labels(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return how many classes are answered before the right one, int64 (n,); of equal scores the first comes first."""
    own = scores[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | (scores == own) & earlier).sum(axis=1)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability from which on answering the second of two classes gives the best F1."""
    from sklearn.metrics import precision_recall_curve

    probabilities = np.exp(log_probabilities(scores))[:, 1]
    precision, recall, thresholds = precision_recall_curve(labels, probabilities)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return float(thresholds[f1[:-1].argmax()])
