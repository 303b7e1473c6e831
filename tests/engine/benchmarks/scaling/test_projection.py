"""The model of a step's time: what it finds in exact data, and what it says of more ranks."""

import math
from dataclasses import astuple, replace

import pytest

from hpcai_cli.engine.benchmarks.scaling import projection
from hpcai_cli.engine.benchmarks.scaling.projection import Costs, Observation

TRUTH = Costs(step=2e-3, unit=3e-4, byte=1e-10, crowding=2e-5, latency=8e-4, transfer=6e-10)
SIZES = (1, 2, 4, 8)


def observed(truth: Costs, sizes=SIZES) -> list[Observation]:
    return [Observation(ranks, units, size, averaged, truth.seconds(ranks, units, size, averaged=averaged))
            for ranks in sizes for units in (4, 64, 1024) for size in (10**4, 10**6, 10**7)
            for averaged in ((True, False) if ranks > 1 else (False,))]


def test_a_step_costs_what_the_formula_says():
    compute = 2e-3 + 64 * 3e-4 + 1e6 * 1e-10
    assert TRUTH.seconds(1, 64, 10**6) == pytest.approx(compute)
    crowded = compute + 64 * 2e-5
    assert TRUTH.seconds(8, 64, 10**6, averaged=False) == pytest.approx(crowded)
    assert TRUTH.seconds(8, 64, 10**6) == pytest.approx(crowded + 3 * 8e-4 + 2 * 7 / 8 * 1e6 * 6e-10)
    ring = TRUTH.with_algorithm("ring")
    assert ring.seconds(8, 64, 10**6) == pytest.approx(crowded + 7 * 8e-4 + 2 * 7 / 8 * 1e6 * 6e-10)
    assert ring.communication(8, 64, 10**6) == pytest.approx(1 - crowded / ring.seconds(8, 64, 10**6))


@pytest.mark.parametrize("algorithm", list(projection.GROWTH))
def test_the_fit_finds_costs_and_algorithm(algorithm):
    truth = TRUTH.with_algorithm(algorithm)
    found = projection.fit(observed(truth))
    assert found.algorithm == algorithm
    assert astuple(found)[:-1] == pytest.approx(astuple(truth)[:-1], rel=1e-6)


def test_one_and_two_ranks_are_enough_for_the_costs_and_cannot_tell_the_algorithms_apart():
    found = [projection.fit(observed(TRUTH.with_algorithm(name), (1, 2))) for name in projection.GROWTH]
    assert found[0] == found[1] and found[0].algorithm == "recursive doubling"
    assert astuple(found[0])[:-1] == pytest.approx(astuple(TRUTH)[:-1], rel=1e-6)


def test_no_cost_is_negative_where_averaging_seems_to_save_time():
    noisy = [replace(each, seconds=each.seconds * (0.9 if each.averaged else 1))
             for each in observed(Costs(2e-3, 3e-4, 1e-10, 0, 0, 0))]
    assert min(astuple(projection.fit(noisy))[:-1]) >= 0


def test_errors_are_shares_of_what_was_measured():
    twice = [Observation(2, 64, 10**6, True, TRUTH.seconds(2, 64, 10**6) * factor) for factor in (1, 2)]
    assert projection.errors(TRUTH, twice) == pytest.approx([0, -0.5])


def test_with_one_size_of_gradients_the_transfer_must_be_known():
    one_size = [each for each in observed(TRUTH) if each.bytes == 10**6]
    found = projection.fit(one_size, "recursive doubling", TRUTH.transfer)
    assert found.transfer == TRUTH.transfer and found.latency == pytest.approx(TRUTH.latency)
    assert max(map(abs, projection.errors(found, one_size))) < 1e-6


@pytest.mark.parametrize(("most", "measured", "sizes"), [
    (16, (1, 2), [1, 2, 4, 8, 16]), (20, (1, 3), [1, 3, 4, 8, 16, 20]), (2, (1, 2), [1, 2])])
def test_powers_of_two_are_projected_and_the_last(most, measured, sizes):
    assert projection.sizes_up_to(most, measured) == sizes


def test_many_ranks_of_a_ring_wait_longer_than_those_that_double():
    sizes, images = [1, 2, 1024], dict.fromkeys((1, 2, 1024), 64)
    doubling, ring = (projection.projected(TRUTH.with_algorithm(name), sizes, images, 10**6)
                      for name in projection.GROWTH)
    assert doubling[2] == ring[2] and ring[1024]["rate"] < doubling[1024]["rate"]
    assert doubling[1024]["rate"] == pytest.approx(1024 * 64 / TRUTH.seconds(1024, 64, 10**6))
    waited = TRUTH.seconds(1024, 64, 10**6) - TRUTH.seconds(1024, 64, 10**6, averaged=False)
    assert waited == pytest.approx(math.log2(1024) * 8e-4 + 2 * 1023 / 1024 * 1e6 * 6e-10)
