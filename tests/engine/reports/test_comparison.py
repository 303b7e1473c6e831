"""Two models on the same examples: McNemar's test by hand, paired intervals, what changed."""

import numpy as np
import pytest
from scipy.stats import binom

from hpcai_cli.engine.reports import comparison
from hpcai_cli.recipe import Recipe

THREE = Recipe(name="three", summary="", num_classes=3, class_names=("a", "b", "c"))
NUMBER = Recipe(name="number", summary="", task="regression")


def answering(classes) -> np.ndarray:
    return np.eye(3, dtype=np.float32)[classes] * 4


@pytest.mark.parametrize(("ours", "theirs", "p_value"), [
    (0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 2**5), (8, 1, 2 * binom.cdf(1, 9, 0.5)), (24, 0, 2 / 2**24)])
def test_few_discordant_pairs_are_counted_exactly(ours, theirs, p_value):
    found = comparison.mcnemar(ours, theirs)
    assert found["p_value"] == pytest.approx(p_value)
    assert found["test"] == "exact binomial"
    assert comparison.mcnemar(theirs, ours)["p_value"] == found["p_value"]


def test_many_discordant_pairs_by_the_books_example():
    """From Agresti, Categorical Data Analysis, table 10.1 (86 and 150 discordant): z squared with the correction."""
    found = comparison.mcnemar(86, 150)
    assert found["test"].startswith("chi-square")
    assert found["p_value"] == pytest.approx(4.115e-5, rel=1e-3)
    assert comparison.mcnemar(13, 12)["p_value"] == 1.0


def test_what_changed_and_by_how_much():
    labels = np.tile([0, 1, 2], 100)
    ours, theirs = labels.copy(), labels.copy()
    ours[:6] = (labels[:6] + 1) % 3
    theirs[290:] = (labels[290:] + 1) % 3
    found = comparison.compare(THREE, labels, (answering(ours), None), (answering(theirs), None))
    assert found["metric"] == "accuracy"
    assert found["difference"] == pytest.approx(4 / 300)
    low, high = found["interval"]
    assert low < 4 / 300 < high
    assert (found["mcnemar"]["only_ours_right"], found["mcnemar"]["only_theirs_right"]) == (10, 6)
    assert found["changed_examples"] == len(found["changed"]) == 16
    assert found["changed"][0] == {"row": 0, "label": "a", "answer": "b", "other_answer": "a"}
    assert found["changed"][-1] == {"row": 299, "label": "c", "answer": "c", "other_answer": "a"}
    assert found["differences"]["loss"]["difference"] < 0


def test_pairing_makes_the_interval_of_like_models_narrow():
    source = np.random.default_rng(4)
    labels = source.integers(0, 3, 500)
    ours = np.where(source.random(500) < 0.7, labels, (labels + 1) % 3)
    theirs = ours.copy()
    theirs[0] = (labels[0] + 1 + (ours[0] == (labels[0] + 1) % 3)) % 3
    low, high = comparison.compare(THREE, labels, (answering(ours), None), (answering(theirs), None))["interval"]
    assert high - low < 0.02


def test_a_model_against_itself():
    labels = np.array([0, 1, 2, 2])
    found = comparison.compare(THREE, labels, (answering(labels), None), (answering(labels), None))
    assert (found["difference"], found["interval"], found["changed"]) == (0, [0, 0], [])
    assert found["mcnemar"]["p_value"] == 1


def test_each_model_answers_by_its_own_threshold():
    two = Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes"))
    scores = np.array([[0, -1], [0, 1]], np.float32)
    found = comparison.compare(two, np.array([1, 1]), (scores, 0.2), (scores, None))
    assert found["difference"] == 0.5
    assert found["changed"] == [{"row": 0, "label": "yes", "answer": "yes", "other_answer": "no"}]


def test_numbers_are_compared_by_their_errors():
    labels = np.arange(5, dtype=np.float32)
    ours, theirs = labels + [0, 0, 1, 0, 0], labels + [0, 0, 0, 0, -3]
    found = comparison.compare(NUMBER, labels, (ours[:, None].astype(np.float32), None),
                               (theirs[:, None].astype(np.float32), None))
    assert found["metric"] == "mean_absolute_error"
    assert found["difference"] == pytest.approx(1 / 5 - 3 / 5)
    assert "mcnemar" not in found
    assert [row["row"] for row in found["changed"]] == [4, 2]
    assert found["changed"][0] == {"row": 4, "label": 4, "answer": 4, "other_answer": 1}
