"""Figures, intervals and comparisons: what counts as worse, and what as chance."""

import math

import numpy as np
import pytest

from hpcai_cli.engine.benchmarks import comparison, measure
from hpcai_cli.engine.benchmarks.measure import Figure
from hpcai_cli.errors import DataError, UsageError


@pytest.mark.parametrize("count", range(6, 40))
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    low, high = measure.interval(range(1, count + 1))
    outside = sum(math.comb(count, below) for below in range(low)) / 2**count
    assert low + high == count + 1 and 2 * outside <= 0.05
    # The next narrower one would not.
    assert 2 * sum(math.comb(count, below) for below in range(low + 1)) / 2**count > 0.05


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_of_few_rounds_it_is_all_of_them(count):
    assert measure.interval(range(count)) == (0, count - 1)


def test_intervals_of_medians_of_skewed_values_hold_the_truth():
    source, truth = np.random.default_rng(0), math.log(2)
    found = [measure.interval(source.exponential(size=9)) for _ in range(2000)]
    assert 0.94 < np.mean([low <= truth <= high for low, high in found]) < 0.985


@pytest.mark.parametrize(("unit", "limits", "less"), [
    ("s", {}, True), ("J/sample", {}, True), ("images/s", {}, False), ("GFLOP/s", {}, False), ("ranks", {}, None),
    ("modules", {"limit": 0, "at_most": True}, True), ("share", {"limit": 0.9}, False)])
def test_which_way_is_better(unit, limits, less):
    assert Figure("b", "n", 1.0, unit, **limits).less_is_better is less


def test_ratios_are_of_rounds_not_of_medians():
    found = measure.ratio("b", "n", [2.0, 30.0, 4.0], [1.0, 10.0, 1.0])
    assert found.rounds == (2.0, 3.0, 4.0) and found.value == 3.0 and found.interval == (2.0, 4.0)


def result(*rows: Figure, **machine) -> dict:
    return {"machine": {"host": "a", "cores": 2} | machine, "figures": [row.to_json() for row in rows]}


def figure(values, unit: str = "s", name: str = "time") -> Figure:
    return measure.median("b", name, list(values), unit)


def test_worse_by_more_than_chance_fails_and_what_may_be_chance_does_not():
    old = result(figure([1.0, 1.01, 1.02]))
    (slower,) = comparison.changes(old, result(figure([1.1, 1.12, 1.13])))
    assert slower.worse == pytest.approx(1.12 / 1.01 - 1) and not slower.is_noise
    assert slower.fails(0.05) and not slower.fails(0.2)
    (noisy,) = comparison.changes(old, result(figure([1.0, 1.5, 1.6])))
    assert noisy.worse > 0.4 and noisy.is_noise and not noisy.fails(0.05)
    (once,) = comparison.changes(old, result(Figure("b", "time", 9.0, "s")))
    assert once.is_noise


def test_a_rate_that_falls_is_worse_and_one_that_rises_is_not():
    old = result(figure([100, 101, 102], "1/s"))
    (fell,) = comparison.changes(old, result(figure([50, 51, 52], "1/s")))
    (rose,) = comparison.changes(old, result(figure([150, 151, 152], "1/s")))
    assert fell.worse == pytest.approx(101 / 51 - 1) and fell.fails(0.05)
    assert rose.worse < 0 and not rose.fails(0.0)


def test_only_figures_that_both_have_and_that_have_a_better_way_are_compared():
    old = result(figure([1, 1, 1]), figure([2, 2, 2], "ranks", "ranks"), figure([3, 3, 3], name="old"))
    new = result(figure([1, 1, 1]), figure([2, 2, 2], "ranks", "ranks"), figure([3, 3, 3], name="new"))
    assert [change.name for change in comparison.changes(old, new)] == ["time"]


def test_another_machine_is_said():
    with pytest.raises(DataError, match="another machine; expected cores 4; received: 'cores 2'"):
        comparison.check_comparable(result(), {"host": "a", "cores": 4})
    comparison.check_comparable(result(), {"host": "a", "cores": 2})


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0%", 0.0), ("12.5%", 0.125)])
def test_shares(text, share):
    assert comparison.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "five", "-1%", "nan", "inf%"])
def test_what_is_no_share(text):
    with pytest.raises(UsageError, match="--fail-on"):
        comparison.parse_share(text)
