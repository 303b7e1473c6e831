"""The report of a split, against scikit-learn, plain computations and cases that can be done in the head."""

import json
import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn import metrics

from hpcai_cli.engine import evaluation
from hpcai_cli.engine.reports import report
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

FOUR = Recipe(name="four", summary="", num_classes=4, class_names=("a", "b", "c", "d"))
SIX = Recipe(name="six", summary="", num_classes=6, class_names=tuple("abcdef"))
TWO = Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes"))
NUMBER = Recipe(name="number", summary="", task="regression")


def scores_and_labels(count: int = 500, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(5)
    labels = source.integers(0, classes, count)
    scores = source.normal(size=(count, classes)).astype(np.float32) * 2
    scores[np.arange(count), labels] += 1.5
    return scores, labels


def of(recipe: Recipe, scores, labels, threshold: float | None = None) -> dict:
    found = report.report(recipe, np.asarray(scores, np.float32), np.asarray(labels), threshold)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_everything_against_scikit_learn():
    scores, labels = scores_and_labels()
    probabilities = softmax(scores.astype(np.float64), axis=1)
    predicted = probabilities.argmax(axis=1)
    found = of(FOUR, scores, labels)
    assert tuple(found["metrics"]) == evaluation.metric_names(FOUR)
    expected = {
        "loss": metrics.log_loss(labels, probabilities), "accuracy": metrics.accuracy_score(labels, predicted),
        "calibration_error": plain_calibration(probabilities, labels),
        "macro_roc_auc": metrics.roc_auc_score(labels, probabilities, multi_class="ovr"),
        "macro_average_precision": metrics.average_precision_score(np.eye(4)[labels], probabilities)}
    for name, score in (("precision", metrics.precision_score), ("recall", metrics.recall_score),
                        ("f1", metrics.f1_score)):
        expected[f"macro_{name}"] = score(labels, predicted, average="macro")
        np.testing.assert_allclose([row[name] for row in found["classes"]], score(labels, predicted, average=None))
    assert found["metrics"] == pytest.approx(expected)
    assert [row["name"] for row in found["classes"]] == list("abcd")
    assert [row["support"] for row in found["classes"]] == np.bincount(labels).tolist()
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()


def plain_calibration(probabilities, labels, bins: int = 15) -> float:
    total = 0.0
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    for number in range(bins):
        inside = (confidence >= number / bins) & ((confidence < (number + 1) / bins) | (number == bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


def test_five_answers_are_a_figure_from_six_classes_on():
    scores, labels = scores_and_labels(classes=6)
    found = of(SIX, scores, labels)["metrics"]
    assert found["top_5_accuracy"] == metrics.top_k_accuracy_score(labels, scores, k=5)
    assert found["accuracy"] < found["top_5_accuracy"] < 1
    assert "top_5_accuracy" not in of(FOUR, *scores_and_labels())["metrics"]


def test_perfect_answers():
    found = of(FOUR, np.eye(4)[[0, 1, 2, 3, 3]] * 1000, [0, 1, 2, 3, 3])
    assert found["metrics"] == {"accuracy": 1, "loss": 0, "calibration_error": 0, "macro_precision": 1,
                                "macro_recall": 1, "macro_f1": 1, "macro_roc_auc": 1, "macro_average_precision": 1}
    assert found["confusion"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]]
    assert found["intervals"]["accuracy"] == [1, 1]


def test_answers_that_know_nothing():
    found = of(FOUR, np.zeros((8, 4)), [0, 0, 1, 1, 2, 2, 3, 3])
    assert found["metrics"]["loss"] == pytest.approx(math.log(4))
    assert found["metrics"]["accuracy"] == found["metrics"]["macro_recall"] == 0.25
    assert found["metrics"]["calibration_error"] == pytest.approx(0)
    assert found["metrics"]["macro_roc_auc"] == 0.5
    assert [row["precision"] for row in found["classes"]] == [0.25, 0, 0, 0]


def test_sure_and_wrong():
    found = of(FOUR, np.eye(4)[[1, 2]] * 50, [0, 0])["metrics"]
    assert found["calibration_error"] == pytest.approx(1)
    assert (found["loss"], found["accuracy"]) == (pytest.approx(50), 0)


def test_calibration_by_hand():
    """Four answers at 0.9, three of them right, and two at 0.6, both right."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    found = report.calibration(probabilities, np.array([0, 0, 0, 1, 1, 1]))
    assert found["error"] == pytest.approx(4 / 6 * abs(0.9 - 0.75) + 2 / 6 * abs(0.6 - 1))
    assert [(row["count"], row["accuracy"]) for row in found["bins"]] == [(2, 1), (4, 0.75)]
    assert [row["confidence"] for row in found["bins"]] == pytest.approx([0.6, 0.9])


def test_one_class_alone_and_one_example():
    found = of(FOUR, np.eye(4)[[2, 2, 1]] * 5, [2, 2, 2])
    assert [row["support"] for row in found["classes"]] == [0, 0, 3, 0]
    assert found["metrics"]["macro_recall"] == pytest.approx(2 / 3 / 4)
    assert set(evaluation.metric_names(FOUR)) - set(found["metrics"]) == {"macro_roc_auc", "macro_average_precision"}
    assert "curves" not in found
    assert of(FOUR, [[3, 1, 1, 1]], [0])["intervals"]["accuracy"] == [1, 1]


@pytest.mark.parametrize("label", [0, 1])
def test_of_two_classes_one_alone_has_no_areas(label):
    found = of(TWO, scores_and_labels(20, 2)[0], np.full(20, label))
    absent = {"roc_auc", "average_precision"}
    assert set(evaluation.metric_names(TWO)) - set(found["metrics"]) == absent
    assert not absent & set(found["intervals"])


def test_a_class_that_never_occurs_has_no_area_and_spoils_no_mean():
    scores, labels = scores_and_labels()
    kept = labels != 3
    found = of(FOUR, scores[kept], labels[kept])
    assert "roc_auc" not in found["classes"][3]
    assert found["metrics"]["macro_roc_auc"] == np.mean([row["roc_auc"] for row in found["classes"][:3]])


def test_the_curves_lead_to_their_areas():
    scores, labels = scores_and_labels(3000, 2)
    curve, = of(TWO, scores, labels)["curves"]
    assert curve["class"] == "yes"
    for points in (curve["roc"], curve["precision_recall"]):
        assert 2 < len(points) <= report.MOST_POINTS
    false_rate, true_rate = np.transpose(curve["roc"])
    assert metrics.auc(false_rate, true_rate) == pytest.approx(curve["roc_auc"], abs=0.005)
    assert curve["roc_auc"] == pytest.approx(metrics.roc_auc_score(labels, scores[:, 1] - scores[:, 0]))
    recall, precision = np.transpose(curve["precision_recall"])
    assert metrics.auc(recall, precision) == pytest.approx(curve["average_precision"], abs=0.01)


def test_the_worst_classes_have_curves_where_there_are_many():
    many = Recipe(name="many", summary="", num_classes=30, class_names=tuple(map(str, range(30))))
    found = of(many, *scores_and_labels(900, 30))
    areas = sorted(row["roc_auc"] for row in found["classes"])
    assert [curve["roc_auc"] for curve in found["curves"]] == areas[:report.MOST_CURVES]


def test_probabilities_of_one_keep_their_order():
    """As probabilities in float64 the first class of these is 1 each time, or 0."""
    scores = np.array([[100, 0, 0], [200, 0, 0], [-100, 0, 0], [-900, 0, 0]], np.float32)
    assert np.argsort(report.log_odds(scores)[:, 0]).tolist() == [3, 2, 0, 1]
    probabilities = softmax(scores_and_labels()[0].astype(np.float64), axis=1)
    np.testing.assert_allclose(report.log_odds(scores_and_labels()[0]), np.log(probabilities / (1 - probabilities)))


def test_the_hardest_examples_come_first():
    scores = np.zeros((40, 4), np.float32)
    scores[:, 1] = 3
    scores[7] = [0, 0, 9, 0]
    scores[11] = [5, 0, 0, 0]
    found = of(FOUR, scores, np.ones(40, int))["hardest"]
    assert len(found) == report.HARDEST
    assert [(row["row"], row["label"], row["predicted"]) for row in found[:3]] == [
        (7, "b", "c"), (11, "b", "a"), (0, "b", "b")]
    odds = math.exp(9) / (math.exp(9) + 3)
    assert (found[0]["probability"], found[0]["loss"]) == pytest.approx((odds, 9 - math.log(odds)))


def test_a_threshold_decides_what_was_predicted():
    found = of(TWO, [[0, -1], [0, -1], [0, 1]], [0, 1, 1], threshold=0.2)
    assert found["metrics"]["accuracy"] == pytest.approx(2 / 3)
    assert {row["predicted"] for row in found["hardest"]} == {"yes"}
    assert found["confusion"] == [[0, 1], [0, 2]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("recipe", [FOUR, NUMBER])
def test_scores_that_are_no_numbers_are_named(recipe, value):
    scores = np.zeros((9, recipe.num_classes or 1), np.float32)
    scores[[4, 6], 0] = value
    with pytest.raises(DataError, match="no finite numbers for 2 of 9 examples, first for row 4"):
        report.report(recipe, scores, np.zeros(9, np.int64))


def test_the_errors_of_numbers():
    labels = np.array([1, 2, 3, 4], np.float32)
    found = of(NUMBER, (labels + [0, 1, -2, 0])[:, None], labels)
    assert tuple(found["metrics"]) == evaluation.metric_names(NUMBER)
    assert found["metrics"] == pytest.approx({
        "loss": 1.25, "mean_absolute_error": 0.75, "root_mean_squared_error": 1.25**0.5, "median_absolute_error": 0.5,
        "mean_error": -0.25, "r2": 0.0})
    assert found["hardest"][0] == {"row": 2, "label": 3, "predicted": 1, "loss": 4}
    assert sum(found["residuals"]["histogram"]["counts"]) == 4
    assert found["residuals"]["quantiles"]["0"] == -2 and found["residuals"]["quantiles"]["1"] == 1
    same = of(NUMBER, labels[:, None], np.ones(4, np.float32))
    assert "r2" not in same["metrics"] and "r2" not in same["intervals"]
