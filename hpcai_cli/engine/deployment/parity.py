"""Proves that an export answers as the model that it was made of: on real examples, figure by figure."""

from collections.abc import Mapping

import numpy as np

from hpcai_cli.engine import evaluation
from hpcai_cli.errors import GateError
from hpcai_cli.recipe import Recipe

TOLERANCE = 1e-3
"""Largest difference of a probability that agrees; of a regression, of the spread of the labels."""
LEAST_AGREEMENT = 0.999
"""Least share of examples with the same answer."""
LARGEST_CHANGE = 0.001
"""Largest change of the accuracy, or of the mean absolute error as a share of the labels' spread."""


def compare(recipe: Recipe, labels: np.ndarray, before: np.ndarray, after: np.ndarray, *, threshold: float | None,
            tolerance: float = TOLERANCE) -> dict:
    """Return the parity report of scores before and after an export, float32 (n, columns), on the same examples.

    `largest_difference` is that of a probability, or of a regression's number in units of the labels' standard
    deviation; `agreement` the share of examples with the same answer; `metrics` each figure before, after, and its
    change; `agrees` whether all bounds hold, and `breaches` those that do not, in words.
    """
    if recipe.task == "regression":
        spread = float(labels.astype(np.float64).std()) or 1.0
        first, second = before.astype(np.float64) / spread, after.astype(np.float64) / spread
        agreement = float((np.abs(first - second) <= tolerance).all(axis=1).mean())
        measure, unit = "mean_absolute_error", spread
    else:
        first, second = (np.exp(evaluation.log_probabilities(scores)) for scores in (before, after))
        agreement = float((evaluation.answers(before, threshold) == evaluation.answers(after, threshold)).mean())
        measure, unit = "accuracy", 1.0
    difference = np.abs(first - second)
    metrics = _metrics(evaluation.figures(recipe, before, labels, threshold),
                       evaluation.figures(recipe, after, labels, threshold))
    # What is no number agrees with nothing.
    largest = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    bounds = {"largest_difference": (largest, tolerance), "disagreement": (1 - agreement, 1 - LEAST_AGREEMENT),
              f"change of {measure}": (abs(metrics[measure]["change"]) / unit, LARGEST_CHANGE)}
    breaches = [f"{name} {value:.3g} is above {bound:.3g}" for name, (value, bound) in bounds.items()
                if not value <= bound + 1e-12]
    return {"examples": len(labels), "largest_difference": largest, "mean_difference": float(difference.mean()),
            "agreement": agreement, "tolerance": tolerance, "metrics": metrics, "agrees": not breaches,
            "breaches": breaches}


def _metrics(before: Mapping, after: Mapping) -> dict:
    return {name: {"before": value, "after": after[name], "change": after[name] - value}
            for name, value in before.items() if name in after}


def require(report: Mapping, kind: str) -> None:
    """Raise GateError unless the export agrees."""
    if not report["agrees"]:
        raise GateError(f"the {kind} export does not answer as its model does, and is not delivered",
                        expected=f"on {report['examples']:,} examples a largest difference of at most "
                        f"{report['tolerance']:g} and the same answers", received="; ".join(report["breaches"]))
