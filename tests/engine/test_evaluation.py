"""The figures of a report, against plain computations and cases that can be done in the head."""

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
