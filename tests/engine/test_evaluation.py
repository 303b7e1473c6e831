"""The figures of a report, against plain computations and cases that can be done in the head."""

import json
import math

import keras
import numpy as np
import pytest
from PIL import Image
from sklearn import metrics

from hpcai_cli.engine import evaluation
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.pipeline import shard
from hpcai_cli.engine.store import Split
from hpcai_cli.recipe import Recipe

NAMES = ("a", "b", "c", "d")


def scores_and_labels(count: int = 500, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(5)
    labels = source.integers(0, classes, count)
    scores = source.normal(size=(count, classes)).astype(np.float32) * 2
    scores[np.arange(count), labels] += 1.5
    return scores, labels


def report(scores, labels, names=NAMES) -> dict:
    recipe = Recipe(name="r", summary="", num_classes=len(names), class_names=tuple(names))
    return evaluation.report(recipe, np.asarray(scores, np.float32), np.asarray(labels))


def test_everything_against_scikit_learn():
    scores, labels = scores_and_labels()
    exponentials = np.exp(scores.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    predicted = probabilities.argmax(axis=1)
    found = report(scores, labels)
    assert set(found["metrics"]) == set(evaluation.metric_names(Recipe(name="r", summary="", num_classes=4)))
    assert found["metrics"]["loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
    assert found["metrics"]["accuracy"] == metrics.accuracy_score(labels, predicted)
    for name, score in (("precision", metrics.precision_score), ("recall", metrics.recall_score),
                        ("f1", metrics.f1_score)):
        assert found["metrics"][f"macro_{name}"] == pytest.approx(score(labels, predicted, average="macro"))
        np.testing.assert_allclose([row[name] for row in found["classes"]], score(labels, predicted, average=None))
    assert [row["name"] for row in found["classes"]] == list(NAMES)
    assert [row["support"] for row in found["classes"]] == np.bincount(labels).tolist()
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    assert found["metrics"]["calibration_error"] == pytest.approx(plain_calibration(probabilities, labels))


def plain_calibration(probabilities, labels, bins: int = 15) -> float:
    total = 0.0
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    for number in range(bins):
        inside = (confidence >= number / bins) & ((confidence < (number + 1) / bins) | (number == bins - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


def test_perfect_answers():
    found = report(np.eye(4)[[0, 1, 2, 3, 3]] * 1000, [0, 1, 2, 3, 3])
    assert found["metrics"] == {"accuracy": 1, "loss": 0, "calibration_error": 0, "macro_precision": 1,
                                "macro_recall": 1, "macro_f1": 1}
    assert found["confusion"] == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 2]]


def test_answers_that_know_nothing():
    found = report(np.zeros((8, 4)), [0, 0, 1, 1, 2, 2, 3, 3])
    assert found["metrics"]["loss"] == pytest.approx(math.log(4))
    assert found["metrics"]["accuracy"] == 0.25
    assert found["metrics"]["calibration_error"] == pytest.approx(0)
    assert found["metrics"]["macro_recall"] == 0.25
    assert [row["precision"] for row in found["classes"]] == [0.25, 0, 0, 0]


def test_sure_and_wrong():
    found = report(np.eye(4)[[1, 2]] * 50, [0, 0])
    assert found["metrics"]["calibration_error"] == pytest.approx(1)
    assert found["metrics"]["loss"] == pytest.approx(50)
    assert found["metrics"]["accuracy"] == 0


def test_calibration_by_hand():
    """Four answers at 0.9, three of them right, and two at 0.6, both right."""
    probabilities = np.array([[0.9, 0.1]] * 4 + [[0.4, 0.6]] * 2)
    labels = np.array([0, 0, 0, 1, 1, 1])
    expected = 4 / 6 * abs(0.9 - 0.75) + 2 / 6 * abs(0.6 - 1)
    assert evaluation.calibration_error(probabilities, labels) == pytest.approx(expected)


def test_one_class_alone_and_one_example():
    found = report(np.eye(4)[[2, 2, 1]] * 5, [2, 2, 2])
    assert [row["support"] for row in found["classes"]] == [0, 0, 3, 0]
    assert found["classes"][2]["recall"] == pytest.approx(2 / 3)
    assert found["metrics"]["macro_recall"] == pytest.approx(2 / 3 / 4)
    assert np.array(found["confusion"]).shape == (4, 4)
    assert report([[3, 1, 1, 1]], [0])["metrics"]["accuracy"] == 1


def test_large_and_infinite_logits():
    loss, accuracy = evaluation.loss_and_accuracy(np.array([[3e38, -3e38], [0, 1]], np.float32), np.array([0, 1]))
    assert (loss, accuracy) == (pytest.approx(math.log(1 + math.exp(-1)) / 2), 1)
    assert math.isnan(evaluation.loss_and_accuracy(np.array([[np.inf, 0]], np.float32), np.array([0]))[0])


class OneOf:
    """A rank of several that gathers what the test has gathered for it."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def gather(self, rows):
        return rows


@pytest.mark.parametrize("count", [1, 2, 249, 251, 777])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_logits_of_all_ranks_are_those_of_one(count, size):
    source = np.random.default_rng(count)
    split = Split(source.normal(size=(count, 6)).astype(np.float32), source.integers(0, 3, count), None, 0)
    keras.utils.set_random_seed(1)
    run_forward = evaluation.forward(keras.Sequential([keras.Input((6,)), keras.layers.Dropout(0.9),
                                                       keras.layers.Dense(3)]),
                                     Recipe(name="r", summary="", num_classes=3))
    alone = evaluation.scores_of(run_forward, split, Serial(), columns=3)
    assert (alone.shape, alone.dtype) == ((count, 3), np.float32)
    done = []
    parts = [evaluation.scores_of(run_forward, split, OneOf(rank, size), columns=3, on_batch=done.append)
             for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), alone)
    shares = [last - first for first, last in (shard(count, rank=rank, size=size) for rank in range(size))]
    assert [len(part) for part in parts] == shares
    assert max(done) == max(shares)


@pytest.mark.parametrize("names", [("cat", "dog"), ("$\\nothing$", "costs $5 or $6"), ("ä" * 6000, ""), ("猫", "犬\n")])
def test_the_drawing_of_the_confusion_opens(tmp_path, names):
    evaluation.draw_confusion([[7, 1], [0, 1_234_567]], names, tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
        assert len(image.convert("L").getcolors()) > 10


def test_a_thousand_classes_can_be_drawn(tmp_path):
    evaluation.draw_confusion(np.eye(1000, dtype=int).tolist(), tuple(map(str, range(1000))), tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as image:
        assert max(image.size) <= 10_000


# ---- Two classes ---------------------------------------------------------------------------------------------------

TWO = Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes"))
NUMBER = Recipe(name="number", summary="", task="regression")


def two_classes(count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scores, labels and the probability of the second class; some probabilities are equal."""
    source = np.random.default_rng(8)
    labels = (source.random(count) < 0.2).astype(np.int64)
    logits = np.round(source.normal(size=count) + 1.2 * labels - 1.5, 1).astype(np.float32)
    return np.stack([np.zeros_like(logits), logits], axis=1), labels, 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.mark.parametrize("threshold", [None, 0.5, 0.2, 0.9])
def test_two_classes_against_scikit_learn(threshold):
    scores, labels, probabilities = two_classes()
    # Where both are equally likely the first class is the answer, unless a threshold says otherwise.
    predicted = (probabilities > 0.5 if threshold is None else probabilities >= threshold).astype(int)
    found = evaluation.report(TWO, scores, labels, threshold)
    assert set(found["metrics"]) == set(evaluation.metric_names(TWO))
    expected = {
        "loss": metrics.log_loss(labels, probabilities), "accuracy": metrics.accuracy_score(labels, predicted),
        "roc_auc": metrics.roc_auc_score(labels, probabilities), "f1": metrics.f1_score(labels, predicted),
        "average_precision": metrics.average_precision_score(labels, probabilities),
        "macro_f1": metrics.f1_score(labels, predicted, average="macro"),
        "calibration_error": plain_calibration(np.stack([1 - probabilities, probabilities], axis=1), labels)}
    for name, value in expected.items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-6), name
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    assert found["classes"][1]["f1"] == pytest.approx(found["metrics"]["f1"])
    few = evaluation.figures(TWO, scores, labels, threshold)
    assert few == {name: found["metrics"][name] for name in few}


def test_large_margins_keep_their_order():
    """As probabilities in float64 all of these would be 1."""
    scores = np.stack([np.zeros(4), [100, 200, 300, 400]], axis=1).astype(np.float32)
    found = evaluation.figures(TWO, scores, np.array([0, 0, 1, 1]))
    assert (found["roc_auc"], found["average_precision"]) == (1, 1)


@pytest.mark.parametrize("label", [0, 1])
def test_an_area_of_one_class_alone_has_no_value(label):
    scores, _, _ = two_classes(20)
    found = evaluation.report(TWO, scores, np.full(20, label))
    assert set(evaluation.metric_names(TWO)) - set(found["metrics"]) == {"roc_auc", "average_precision"}
    assert all(math.isfinite(value) for value in found["metrics"].values())


def test_scores_that_are_no_numbers_have_no_area():
    scores, labels, _ = two_classes(20)
    scores[3] = np.nan
    found = evaluation.figures(TWO, scores, labels)
    assert math.isnan(found["loss"])
    assert "roc_auc" not in found


# ---- Thresholds ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_has_a_better_f1_than_the_best(seed):
    source = np.random.default_rng(seed)
    labels = (source.random(60) < 0.3).astype(np.int64)
    logits = np.round(source.normal(size=60) + labels, 1).astype(np.float32)
    scores = np.stack([np.zeros_like(logits), logits], axis=1)
    threshold = evaluation.best_threshold(scores, labels)
    assert 0 < threshold < 1
    best = evaluation.figures(TWO, scores, labels, threshold)["f1"]
    candidates = [0.0, 0.5, 1.0, *np.exp(evaluation.log_probabilities(scores))[:, 1]]
    assert best == pytest.approx(max(metrics.f1_score(labels, evaluation.answers(scores, candidate), zero_division=0)
                                     for candidate in candidates))


def test_a_threshold_survives_json():
    """It is one of the probabilities itself, and that example must stay on its side of it."""
    scores, labels, _ = two_classes()
    threshold = evaluation.best_threshold(scores, labels)
    again = json.loads(json.dumps({"decision_threshold": threshold}))["decision_threshold"]
    np.testing.assert_array_equal(evaluation.answers(scores, again), evaluation.answers(scores, threshold))


def test_answers_without_a_threshold_are_the_likelier_class():
    scores, _, probabilities = two_classes()
    np.testing.assert_array_equal(evaluation.answers(scores), probabilities > 0.5)
    assert evaluation.answers(scores, 0.0).tolist() == [1] * 400
    assert evaluation.answers(scores, 1.1).tolist() == [0] * 400


# ---- Numbers -------------------------------------------------------------------------------------------------------

def test_the_errors_of_numbers_against_scikit_learn():
    source = np.random.default_rng(3)
    labels = source.normal(1e6, 30, 300).astype(np.float32)
    predicted = (labels + source.normal(0, 10, 300)).astype(np.float32)
    found = evaluation.report(NUMBER, predicted[:, None], labels)
    assert list(found) == ["metrics"]
    assert set(found["metrics"]) == set(evaluation.metric_names(NUMBER))
    wanted, given = labels.astype(np.float64), predicted.astype(np.float64)
    for name, value in (("loss", metrics.mean_squared_error(wanted, given)),
                        ("mean_absolute_error", metrics.mean_absolute_error(wanted, given)),
                        ("root_mean_squared_error", metrics.root_mean_squared_error(wanted, given)),
                        ("r2", metrics.r2_score(wanted, given))):
        assert found["metrics"][name] == pytest.approx(value), name


def test_labels_that_are_all_the_same_leave_nothing_to_explain():
    found = evaluation.figures(NUMBER, np.array([[1.0], [3.0]], np.float32), np.array([2, 2], np.float32))
    assert found == {"loss": 1, "mean_absolute_error": 1, "root_mean_squared_error": 1}


@pytest.mark.parametrize("recipe", [TWO, NUMBER, Recipe(name="r", summary="", num_classes=4)])
def test_what_is_judged_is_what_the_model_gives(recipe):
    """One logit becomes two scores, a number stays one."""
    units = {2: 1, 0: 1, 4: 4}[recipe.num_classes]
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(units)])
    inputs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    scores = evaluation.forward(model, recipe)(inputs).numpy()
    outputs = model(inputs).numpy()
    assert scores.shape == (5, {2: 2, 0: 1, 4: 4}[recipe.num_classes])
    np.testing.assert_allclose(scores[:, -1] - (scores[:, 0] if recipe is TWO else 0), outputs[:, -1], rtol=1e-6)
