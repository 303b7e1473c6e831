"""Confidence intervals by the bootstrap: how far a figure would move on other examples of the same kind."""

from collections.abc import Callable

import numpy as np

from hpcai_cli.engine.evaluation import TOP, answers, log_probabilities, metric_names, places_of_labels
from hpcai_cli.recipe import Recipe

RESAMPLES = 1_000
LEVEL = 0.95
SEED = 0
"""Always the same, so that two models are judged on the same resamples and a report can be repeated."""


def intervals(statistic: Callable[[np.ndarray], dict[str, float]], count: int) -> dict[str, list[float]]:
    """Return for each figure of a statistic its percentile interval, [low, high], at LEVEL.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3. A figure that a resample does
    not have (an area where one class was never drawn) is left out of that resample.

    Args:
        statistic: from how often each example counts, float64 (count,), to figures by name.
        count: number of examples, at least 1.
    """
    source = np.random.default_rng(SEED)
    drawn: dict[str, list[float]] = {}
    for _ in range(RESAMPLES):
        # One resample at a time: memory stays at a few values per example.
        weights = np.bincount(source.integers(0, count, count), minlength=count).astype(np.float64)
        for name, value in statistic(weights).items():
            drawn.setdefault(name, []).append(value)
    tail = (1 - LEVEL) / 2
    return {name: [float(end) for end in np.quantile(values, [tail, 1 - tail])] for name, values in drawn.items()}


def names_with_intervals(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the metrics that have an interval.

    The macro areas of more than two classes have none: they would take a sort per class and resample. Nor has the
    calibration error, which resampling makes larger than it is, nor the median.
    """
    without = ("macro_roc_auc", "macro_average_precision", "calibration_error", "median_absolute_error")
    return tuple(name for name in metric_names(recipe) if name not in without)


def means(columns: dict[str, np.ndarray]) -> Callable[[np.ndarray], dict[str, float]]:
    """Return the statistic that is the mean of each column, (n,), over the examples."""
    table = np.stack([np.asarray(column, np.float64) for column in columns.values()])
    return lambda weights: dict(zip(columns, (table @ weights / weights.sum()).tolist(), strict=True))


def weighted_figures(recipe: Recipe, scores: np.ndarray, labels: np.ndarray,
                     threshold: float | None) -> Callable[[np.ndarray], dict[str, float]]:
    """Return the statistic that gives all `names_with_intervals`; with weights of 1 they are the report's own.

    Args:
        scores: the task's scores, float32 (n, columns), finite.
        labels: int64 or float32 (n,).
        threshold: as in `evaluation.figures`.
    """
    if recipe.task == "regression":
        return _errors(scores[:, 0].astype(np.float64), labels.astype(np.float64))
    predicted, classes = answers(scores, threshold), recipe.num_classes
    right = predicted == labels
    columns = {"accuracy": right, "loss": -log_probabilities(scores)[np.arange(len(labels)), labels]}
    if classes > TOP:
        columns[f"top_{TOP}_accuracy"] = places_of_labels(scores, labels) < TOP
    averaged = means(columns)
    of_ranking = areas(scores[:, 1].astype(np.float64) - scores[:, 0], labels == 1) if classes == 2 else (
        lambda weights: {})

    def statistic(weights: np.ndarray) -> dict[str, float]:
        hits = np.bincount(labels, weights * right, classes)
        support, given = np.bincount(labels, weights, classes), np.bincount(predicted, weights, classes)
        # As scikit-learn's zero_division=0: a class that never occurs, or is never answered, counts as 0.
        precision, recall = hits / np.maximum(given, 1), hits / np.maximum(support, 1)
        f1 = 2 * hits / np.maximum(support + given, 1)
        found = {"macro_precision": precision.mean(), "macro_recall": recall.mean(), "macro_f1": f1.mean()}
        return averaged(weights) | found | ({"f1": f1[1]} if classes == 2 else {}) | of_ranking(weights)

    return statistic


def _errors(predicted: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    errors, centred = predicted - labels, labels - labels.mean()
    # Labels that are all the same leave rounding only, by which nothing can be divided.
    least = 1e-12 * np.square(centred).mean()
    averaged = means({"loss": np.square(errors), "mean_absolute_error": np.abs(errors), "mean_error": errors,
                      "label": centred, "square": np.square(centred)})

    def statistic(weights: np.ndarray) -> dict[str, float]:
        found = averaged(weights)
        spread = found.pop("square") - found.pop("label") ** 2
        found["root_mean_squared_error"] = found["loss"] ** 0.5
        return found | ({"r2": 1 - found["loss"] / spread} if spread > least else {})

    return statistic


def areas(margins: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], dict[str, float]]:
    """Return the statistic of `roc_auc` and `average_precision`, as scikit-learn defines them.

    Sorts once, where scikit-learn's own functions would sort and check for each resample.

    Args:
        margins: what ranks the examples, float64 (n,), higher for those that are likelier positive.
        positive: bool (n,).
    """
    # Equal margins are one point of either curve; the highest come first.
    points, groups = np.unique(-margins, return_inverse=True)
    second = positive.astype(np.float64)

    def statistic(weights: np.ndarray) -> dict[str, float]:
        hits = np.bincount(groups, weights * second, len(points))
        misses = np.bincount(groups, weights * (1 - second), len(points))
        all_hits, all_misses = hits.sum(), misses.sum()
        if not (all_hits and all_misses):
            return {}
        hits_so_far, misses_so_far = np.cumsum(hits), np.cumsum(misses)
        above = hits_so_far - hits / 2
        precision = hits_so_far / np.maximum(hits_so_far + misses_so_far, 1)
        return {"roc_auc": float(misses @ above / (all_hits * all_misses)),
                "average_precision": float(hits @ precision / all_hits)}

    return statistic
