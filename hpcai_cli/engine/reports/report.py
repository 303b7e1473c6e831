"""What is said of a model's answers on a split, as JSON values: figures, intervals, curves, the hardest examples."""

import numpy as np

from hpcai_cli.engine.evaluation import TOP, answers, figures, log_probabilities, metric_names, places_of_labels
from hpcai_cli.engine.reports import bootstrap
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

CALIBRATION_BINS = 15
"""As in Guo et al., arXiv 1706.04599."""
HARDEST = 25
"""Examples that are shown, those with the highest loss first."""
MOST_CURVES = 10
"""Classes whose curves are kept, those with the smallest area first; the areas are given for all."""
MOST_POINTS = 100
"""Points that are kept of a curve."""
HISTOGRAM_BINS = 40


def report(recipe: Recipe, scores: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> dict:
    """Return the whole report.

    Both tasks have `metrics`, `intervals` (of the metrics that have one) and `hardest`. A classification also has
    `classes`, `confusion` (rows are the true classes), `calibration` and `curves`; a regression `residuals`.

    Args:
        scores: the task's scores, float32 (n, columns).
        labels: int64 or float32 (n,).
        threshold: of two classes, the probability from which on the second is the answer; None for the likelier one.

    Raises:
        DataError: a score is no finite number.
    """
    check_finite(scores)
    found = _of_numbers(scores, labels) if recipe.task == "regression" else _of_classes(
        recipe, scores, labels, threshold)
    metrics = figures(recipe, scores, labels, threshold) | found.pop("metrics")
    intervals = bootstrap.intervals(bootstrap.weighted_figures(recipe, scores, labels, threshold), len(labels))
    return {"metrics": {name: metrics[name] for name in metric_names(recipe) if name in metrics},
            "intervals": {name: intervals[name] for name in bootstrap.names_with_intervals(recipe) if name in metrics},
            **found, "hardest": hardest(recipe, scores, labels, threshold)}


def check_finite(scores: np.ndarray) -> None:
    """Refuse scores (n, columns) of which some are no finite numbers; every figure made of them would be wrong.

    Raises:
        DataError: how many examples have such scores, and which is the first.
    """
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(broken):
        raise DataError(f"the model's scores are no finite numbers for {len(broken):,} of {len(scores):,} examples, "
                        f"first for row {broken[0]}", expected="finite numbers",
                        mend="train it again with a smaller learning rate, or look at the inputs of that row",
                        received=scores[broken[0]].tolist())


def _of_classes(recipe: Recipe, scores: np.ndarray, labels: np.ndarray, threshold: float | None) -> dict:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every, predicted = np.arange(recipe.num_classes), answers(scores, threshold)
    precision, recall, f1, support = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    found = calibration(np.exp(log_probabilities(scores)), labels)
    metrics = {"calibration_error": found["error"], "macro_precision": float(precision.mean()),
               "macro_recall": float(recall.mean()), "macro_f1": float(f1.mean())}
    if recipe.num_classes > TOP:
        metrics[f"top_{TOP}_accuracy"] = float((places_of_labels(scores, labels) < TOP).mean())
    classes = [{"name": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
               for name, p, r, f, n in zip(recipe.class_names, precision, recall, f1, support, strict=True)]
    curves = _curves(recipe, scores, labels)
    if recipe.num_classes > 2 and curves:
        for row, areas in zip(classes, curves.pop("areas"), strict=True):
            row |= areas
        for name in ("roc_auc", "average_precision"):
            # Of the classes that occur: the area of one that never does has no value.
            metrics[f"macro_{name}"] = float(np.mean([row[name] for row in classes if name in row]))
    return {"metrics": metrics, "classes": classes, "calibration": found, **({"curves": curves["kept"]} if curves else
            {}), "confusion": confusion_matrix(labels, predicted, labels=every).tolist()}


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict:
    """Return the expected calibration error, and the bins of the reliability diagram that hold an example.

    The error is |confidence - accuracy| averaged over bins of equal width. Source: Guo et al., "On Calibration of
    Modern Neural Networks", arXiv 1706.04599, equation 3.

    Args:
        probabilities: float64 (n, classes) in [0, 1].
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    counts, sure, hits = (np.bincount(places, weights, CALIBRATION_BINS) for weights in (None, confidence, right))
    bins = [{"low": place / CALIBRATION_BINS, "high": (place + 1) / CALIBRATION_BINS, "count": int(counts[place]),
             "confidence": float(sure[place] / counts[place]), "accuracy": float(hits[place] / counts[place])}
            for place in np.flatnonzero(counts)]
    return {"error": float(np.abs(sure - hits).sum() / len(labels)), "bins": bins}


def log_odds(scores: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) of each class's probability p, float64 (n, classes).

    Ranks examples as p does, but keeps apart those whose p is 1 in float64.
    """
    from scipy.special import logsumexp

    logs, rows = log_probabilities(scores), np.arange(len(scores))
    best = logs.argmax(axis=1)
    # 1 - p is small for the likeliest class only; there it is summed from the others.
    others = logs.copy()
    others[rows, best] = -np.inf
    rest = np.log1p(-np.minimum(np.exp(logs), 0.5))
    rest[rows, best] = logsumexp(others, axis=1)
    return logs - rest


def _curves(recipe: Recipe, scores: np.ndarray, labels: np.ndarray) -> dict:
    """Return the areas of each class against the rest, and the curves of those with the smallest; {} without any."""
    from sklearn.metrics import precision_recall_curve, roc_curve

    if len(np.unique(labels)) < 2:
        return {}
    odds, areas = log_odds(scores), [{} for _ in range(recipe.num_classes)]
    asked = [1] if recipe.num_classes == 2 else np.unique(labels).tolist()
    for number in asked:
        areas[number] = bootstrap.areas(odds[:, number], labels == number)(np.ones(len(labels)))
    kept = []
    for number in sorted(asked, key=lambda number: areas[number]["roc_auc"])[:MOST_CURVES]:
        false_rate, true_rate, _ = roc_curve(labels == number, odds[:, number])
        precision, recall, _ = precision_recall_curve(labels == number, odds[:, number])
        kept.append({"class": recipe.class_names[number], **areas[number], "roc": _thinned(false_rate, true_rate),
                     "precision_recall": _thinned(recall, precision)})
    return {"areas": areas, "kept": kept}


def _thinned(x: np.ndarray, y: np.ndarray) -> list[list[float]]:
    rows = np.unique(np.linspace(0, len(x) - 1, MOST_POINTS).round().astype(int))
    return np.stack([x, y], axis=1)[rows].round(6).tolist()


def _of_numbers(scores: np.ndarray, labels: np.ndarray) -> dict:
    predicted = scores[:, 0].astype(np.float64)
    errors = predicted - labels
    counts, edges = np.histogram(errors, bins=HISTOGRAM_BINS)
    return {"metrics": {"median_absolute_error": float(np.median(np.abs(errors))), "mean_error": float(errors.mean())},
            "residuals": {"quantiles": {f"{share:g}": float(np.quantile(errors, share))
                                        for share in (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)},
                          "histogram": {"edges": edges.tolist(), "counts": counts.tolist()}}}


def hardest(recipe: Recipe, scores: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> list[dict]:
    """Return the examples with the highest loss, the highest first: `row`, `label`, `predicted`, `loss` and, of
    classes, the `probability` of what was predicted."""
    if recipe.task == "regression":
        losses = np.square(scores[:, 0].astype(np.float64) - labels)
        return [{"row": int(row), "label": float(labels[row]), "predicted": float(scores[row, 0]),
                 "loss": float(losses[row])} for row in np.argsort(-losses, kind="stable")[:HARDEST]]
    logs, names = log_probabilities(scores), recipe.class_names
    losses, predicted = -logs[np.arange(len(labels)), labels], answers(scores, threshold)
    return [{"row": int(row), "label": names[labels[row]], "predicted": names[predicted[row]],
             "probability": float(np.exp(logs[row, predicted[row]])), "loss": float(losses[row])}
            for row in np.argsort(-losses, kind="stable")[:HARDEST]]
