"""Two models on the same examples: by how much they differ, whether that can be chance, and where they differ."""

import numpy as np

from hpcai_cli.engine.evaluation import answers, log_probabilities
from hpcai_cli.engine.reports import bootstrap
from hpcai_cli.recipe import Recipe

FEW_DISCORDANT = 25
"""Pairs below which McNemar's test is computed exactly."""
MOST_CHANGED = 1_000
"""Changed examples that are listed; all of them are counted."""


def compare(recipe: Recipe, labels: np.ndarray, ours: tuple[np.ndarray, float | None],
            theirs: tuple[np.ndarray, float | None]) -> dict:
    """Return how two models' answers to the same examples differ, as JSON values.

    `difference` is our `metric` (accuracy, or the mean absolute error of a regression) minus theirs, `interval` its
    paired bootstrap interval, `differences` the same of each figure that is a mean over the examples. A classification
    also has `mcnemar`, and in `changed` the examples with another answer; a regression those whose predictions lie
    farthest apart.

    Args:
        labels: int64 or float32 (n,).
        ours: the scores, float32 (n, columns), and the decision threshold.
        theirs: the same of the other model.
    """
    if recipe.task == "regression":
        return _of_numbers(labels, ours[0][:, 0].astype(np.float64), theirs[0][:, 0].astype(np.float64))
    rows = np.arange(len(labels))
    (our_answer, our_loss), (their_answer, their_loss) = (
        (answers(scores, threshold), -log_probabilities(scores)[rows, labels]) for scores, threshold in (ours, theirs))
    our_right, their_right = our_answer == labels, their_answer == labels
    changed, names = np.flatnonzero(our_answer != their_answer), recipe.class_names
    return _differences("accuracy", {"accuracy": (our_right, their_right), "loss": (our_loss, their_loss)}) | {
        "mcnemar": mcnemar(int((our_right & ~their_right).sum()), int((their_right & ~our_right).sum())),
        "changed_examples": len(changed),
        "changed": [{"row": int(row), "label": names[labels[row]], "answer": names[our_answer[row]],
                     "other_answer": names[their_answer[row]]} for row in changed[:MOST_CHANGED]]}


def _of_numbers(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> dict:
    apart = np.abs(ours - theirs)
    changed = np.argsort(-apart, kind="stable")[:MOST_CHANGED]
    return _differences("mean_absolute_error", {
        "mean_absolute_error": (np.abs(ours - labels), np.abs(theirs - labels)),
        "loss": (np.square(ours - labels), np.square(theirs - labels))}) | {
        "changed_examples": int((apart > 0).sum()),
        "changed": [{"row": int(row), "label": float(labels[row]), "answer": float(ours[row]),
                     "other_answer": float(theirs[row])} for row in changed if apart[row] > 0]}


def _differences(metric: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict:
    """Return the differences of means; each example is drawn with both of its values, since they belong together."""
    gaps = {name: np.asarray(ours, np.float64) - theirs for name, (ours, theirs) in pairs.items()}
    intervals = bootstrap.intervals(bootstrap.means(gaps), len(gaps[metric]))
    differences = {name: {"ours": float(ours.mean()), "theirs": float(theirs.mean()),
                          "difference": float(gaps[name].mean()), "interval": intervals[name]}
                   for name, (ours, theirs) in pairs.items()}
    return {"metric": metric, "difference": differences[metric]["difference"],
            "interval": differences[metric]["interval"], "differences": differences}


def mcnemar(only_ours: int, only_theirs: int) -> dict:
    """Return McNemar's test of whether two models err equally often: `p_value`, `test` and the discordant counts.

    Exact (binomial, two-sided) for fewer than FEW_DISCORDANT discordant pairs, else chi-square with Edwards' continuity
    correction. Sources: McNemar, Psychometrika 12, 1947; Edwards, Psychometrika 13, 1948.

    Args:
        only_ours: examples that only our model has right.
        only_theirs: examples that only the other one has right.
    """
    from scipy.stats import binomtest, chi2

    discordant = only_ours + only_theirs
    exact = discordant < FEW_DISCORDANT
    if exact:
        p_value = binomtest(only_ours, discordant).pvalue if discordant else 1.0
    else:
        p_value = chi2.sf((abs(only_ours - only_theirs) - 1) ** 2 / discordant, 1)
    return {"p_value": float(p_value), "test": "exact binomial" if exact else "chi-square, continuity corrected",
            "only_ours_right": only_ours, "only_theirs_right": only_theirs}
