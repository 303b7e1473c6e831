"""Intervals by resampling: that they hold what they promise, and that their statistics are the report's."""

import numpy as np
import pytest
from scipy import stats

from hpcai_cli.engine import evaluation
from hpcai_cli.engine.reports import bootstrap, report
from hpcai_cli.recipe import Recipe


@pytest.mark.parametrize("recipe", [
    Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes")),
    Recipe(name="seven", summary="", num_classes=7, class_names=tuple("abcdefg")),
    Recipe(name="number", summary="", task="regression")], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_with_equal_weights_the_figures_are_the_reports_own(recipe, threshold):
    source = np.random.default_rng(1)
    labels = source.integers(0, recipe.num_classes or 9, 300)
    labels = labels.astype(np.float32) if recipe.task == "regression" else labels
    # Rounded, so that some scores are equal.
    scores = source.normal(size=(300, recipe.num_classes or 1)).round(1).astype(np.float32)
    threshold = threshold if recipe.num_classes == 2 else None
    found = bootstrap.weighted_figures(recipe, scores, labels, threshold)(np.ones(300))
    assert set(found) == set(bootstrap.names_with_intervals(recipe))
    wanted = report.report(recipe, scores, labels, threshold)
    assert found == pytest.approx({name: wanted["metrics"][name] for name in found})
    assert set(wanted["intervals"]) == set(found)
    for name, (low, high) in wanted["intervals"].items():
        assert low < wanted["metrics"][name] < high, name
    twice = bootstrap.weighted_figures(recipe, scores, labels, threshold)(np.repeat([2.0, 0.0], 150))
    half = evaluation.figures(recipe, scores[:150], labels[:150], threshold)
    assert twice == pytest.approx(twice | {name: value for name, value in half.items() if name in twice})


def test_the_interval_of_a_mean_is_the_textbooks():
    values = np.random.default_rng(2).normal(5, 2, 400)
    low, high = bootstrap.intervals(bootstrap.means({"mean": values}), 400)["mean"]
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert (low, high) == pytest.approx(expected, abs=0.03)
    assert bootstrap.intervals(bootstrap.means({"mean": values}), 400)["mean"] == [low, high]


def test_intervals_hold_the_true_accuracy_about_as_often_as_they_say():
    source = np.random.default_rng(3)
    held = 0
    for _ in range(60):
        right = source.random(200) < 0.8
        low, high = bootstrap.intervals(bootstrap.means({"accuracy": right}), 200)["accuracy"]
        held += low <= 0.8 <= high
    assert 50 <= held < 60


def test_a_figure_that_some_resamples_lack():
    """One example of the second class among ten: a third of the resamples miss it."""
    two = Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes"))
    labels = np.array([1] + [0] * 9)
    scores = np.stack([np.zeros(10), np.arange(10) % 4], axis=1).astype(np.float32)
    found = bootstrap.intervals(bootstrap.weighted_figures(two, scores, labels, None), 10)
    assert 0 <= found["roc_auc"][0] <= found["roc_auc"][1] <= 1
