"""The figures of a report, against plain computations and cases that can be done in the head."""

import json
import math

import keras
import numpy as np
import pytest
from sklearn import metrics

from hpcai_cli.engine import evaluation
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.pipeline import shard
from hpcai_cli.engine.store import Split
from hpcai_cli.recipe import Recipe


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
    expected = {
        "loss": metrics.log_loss(labels, probabilities), "accuracy": metrics.accuracy_score(labels, predicted),
        "roc_auc": metrics.roc_auc_score(labels, probabilities), "f1": metrics.f1_score(labels, predicted),
        "average_precision": metrics.average_precision_score(labels, probabilities)}
    assert evaluation.figures(TWO, scores, labels, threshold) == pytest.approx(expected, rel=1e-6)


def test_large_margins_keep_their_order():
    """As probabilities in float64 all of these would be 1."""
    scores = np.stack([np.zeros(4), [100, 200, 300, 400]], axis=1).astype(np.float32)
    found = evaluation.figures(TWO, scores, np.array([0, 0, 1, 1]))
    assert (found["roc_auc"], found["average_precision"]) == (1, 1)


@pytest.mark.parametrize("label", [0, 1])
def test_an_area_of_one_class_alone_has_no_value(label):
    found = evaluation.figures(TWO, two_classes(20)[0], np.full(20, label))
    assert set(found) == {"loss", "accuracy", "f1"}


def test_scores_that_are_no_numbers_have_no_area():
    scores, labels, _ = two_classes(20)
    scores[3] = np.nan
    found = evaluation.figures(TWO, scores, labels)
    assert math.isnan(found["loss"])
    assert "roc_auc" not in found


def test_the_place_of_the_right_class_among_the_answers():
    scores = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [1, 1, 1], [1, 1, 1]], np.float32)
    assert evaluation.places_of_labels(scores, np.array([0, 1, 2, 0, 2])).tolist() == [0, 2, 1, 0, 2]


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
    found = evaluation.figures(NUMBER, predicted[:, None], labels)
    wanted, given = labels.astype(np.float64), predicted.astype(np.float64)
    for name, value in (("loss", metrics.mean_squared_error(wanted, given)),
                        ("mean_absolute_error", metrics.mean_absolute_error(wanted, given)),
                        ("root_mean_squared_error", metrics.root_mean_squared_error(wanted, given)),
                        ("r2", metrics.r2_score(wanted, given))):
        assert found[name] == pytest.approx(value), name


def test_labels_that_are_all_the_same_leave_nothing_to_explain():
    found = evaluation.figures(NUMBER, np.array([[1.0], [3.0]], np.float32), np.array([2, 2], np.float32))
    assert found == {"loss": 1, "mean_absolute_error": 1, "root_mean_squared_error": 1}


@pytest.mark.parametrize("recipe", [TWO, NUMBER, Recipe(name="r", summary="", num_classes=4)])
def test_what_is_judged_is_what_the_model_gives(recipe):
    """One logit becomes two scores, a number stays one."""
    units = {2: 1, 0: 1, 4: 4}[recipe.num_classes]
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(units)])
    inputs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    scores = evaluation.forward(model, recipe)(inputs)
    outputs = model(inputs).numpy()
    assert scores.shape == (5, {2: 2, 0: 1, 4: 4}[recipe.num_classes])
    np.testing.assert_allclose(scores[:, -1] - (scores[:, 0] if recipe is TWO else 0), outputs[:, -1], rtol=1e-6)
