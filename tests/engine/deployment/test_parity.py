"""An export agrees within the bounds, or is told what it breaches."""

import dataclasses

import numpy as np
import pytest

from hpcai_cli.engine.deployment import parity
from hpcai_cli.errors import GateError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="made", summary="", input_shape=(4,), inputs="features", num_classes=3,
                class_names=("a", "b", "c"))
SOURCE = np.random.default_rng(0)
LABELS = SOURCE.integers(0, 3, 3000)
SCORES = (SOURCE.normal(size=(3000, 3)) + 3 * np.eye(3)[LABELS]).astype(np.float32)


def compared(after: np.ndarray, recipe: Recipe = RECIPE, before: np.ndarray = SCORES, labels: np.ndarray = LABELS,
             **asked) -> dict:
    return parity.compare(recipe, labels, before, after.astype(np.float32), threshold=None, **asked)


def test_the_same_scores_agree():
    report = compared(SCORES)
    assert report["agrees"] and not report["breaches"]
    assert (report["largest_difference"], report["agreement"], report["examples"]) == (0, 1, 3000)
    assert report["metrics"]["accuracy"]["change"] == 0
    parity.require(report, "tflite")


def test_logits_that_are_shifted_together_are_the_same_answer():
    assert compared(SCORES + 5)["agrees"]


def test_one_example_far_off_is_found_among_thousands():
    after = SCORES.copy()
    after[1234] += np.float32([0.2, 0, 0])
    report = compared(after)
    assert not report["agrees"] and 1e-3 < report["largest_difference"] < 0.1
    assert [breach.split(" ")[0] for breach in report["breaches"]] == ["largest_difference"]
    with pytest.raises(GateError, match=r"the onnx export does not answer as its model does, and is not delivered; "
                       r"expected on 3,000 examples .*; received: .*largest_difference .* is above 0.001"):
        parity.require(report, "onnx")


def test_other_answers_are_counted():
    after = SCORES.copy()
    after[:30] = np.roll(after[:30], 1, axis=1)
    report = compared(after)
    assert report["agreement"] == 0.99
    assert report["metrics"]["accuracy"]["change"] < 0
    assert any(breach.startswith("disagreement 0.01 is above") for breach in report["breaches"])
    assert any(breach.startswith("change of accuracy") for breach in report["breaches"])


def test_what_is_no_number_agrees_with_nothing():
    after = SCORES.copy()
    after[7] = np.nan
    report = compared(after, tolerance=10.0)
    assert not report["agrees"] and report["largest_difference"] == np.inf


def test_a_tolerance_is_held():
    after = SCORES + SOURCE.normal(0, 1e-4, SCORES.shape)
    assert compared(after)["agrees"]
    assert not compared(after, tolerance=1e-6)["agrees"]


def test_a_regression_is_measured_in_its_own_spread():
    recipe = dataclasses.replace(RECIPE, task="regression", num_classes=0, class_names=())
    labels = SOURCE.normal(1e6, 5e4, 500).astype(np.float32)
    before = labels[:, None] + 100
    assert compared(before + 5, recipe, before, labels)["agrees"]
    report = compared(before + 500, recipe, before, labels)
    assert not report["agrees"] and report["largest_difference"] == pytest.approx(0.01, rel=0.1)
    assert report["metrics"]["mean_absolute_error"]["change"] == pytest.approx(500, rel=0.01)
