"""The figures against those of scipy and numpy on the values themselves, and chance against many draws."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import rel_entr

from hpcai_cli.engine.deployment import divergence
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES, Bins, edges_of
from hpcai_cli.engine.serving.statistics_layout import LATENCY_EDGES


def counted(values: np.ndarray, edges: list[float]) -> list[int]:
    return Bins([edges]).counts(values.reshape(-1, 1))[0][:-1].tolist()


def test_the_index_is_the_symmetrized_divergence_of_the_shares():
    source = np.random.default_rng(0)
    p, q = source.dirichlet(np.full(12, 5), 2)
    reference, live = source.multinomial(2_000_000, p).tolist(), source.multinomial(1_000_000, q).tolist()
    p, q = np.divide(reference, sum(reference)), np.divide(live, sum(live))
    plain = rel_entr(p, q).sum() + rel_entr(q, p).sum()
    assert divergence.population_stability_index(reference, live) == pytest.approx(plain, rel=1e-3)
    assert divergence.population_stability_index(reference, reference) == pytest.approx(0, abs=1e-9)


def test_empty_bins_give_finite_figures():
    # Half an example more in each of four bins; and two live ones more, spread as the reference is.
    p = np.array([0.5, 10.5, 10.5, 0.5]) / 22
    q = (np.array([0, 0, 20, 20]) + 2 * p) / 42
    assert divergence.population_stability_index([0, 10, 10, 0], [0, 0, 20, 20]) == pytest.approx(
        ((q - p) * np.log(q / p)).sum(), rel=1e-12)
    assert divergence.population_stability_index([1], [5]) == 0
    for reference, live in (([0, 0], [1, 2]), ([1, 2], [0, 0])):
        assert divergence.population_stability_index(reference, live) is None
        assert divergence.kolmogorov_smirnov(reference, live) == (None, None)
        assert divergence.total_variation(reference, live) is None
        assert divergence.kolmogorov_smirnov_by_chance(reference, live, 0.01) is None
        assert divergence.population_stability_index_by_chance(reference, live, 0.01) is None


def test_kolmogorov_smirnov_is_scipys_on_discrete_values():
    source = np.random.default_rng(1)
    first, second = source.poisson(4, 3000), source.poisson(4.3, 500)
    edges = edges_of(np.unique(np.concatenate([first, second])).astype(float))
    distance, p_value = divergence.kolmogorov_smirnov(counted(first, edges), counted(second, edges))
    theirs = stats.ks_2samp(first, second, method="asymp")
    assert distance == pytest.approx(theirs.statistic, rel=1e-12)
    assert p_value == pytest.approx(theirs.pvalue, rel=0.05)


@pytest.mark.parametrize("shift", [0.0, 0.2, 1.0])
def test_kolmogorov_smirnov_in_bins_is_below_that_of_the_values_and_near_it(shift):
    source = np.random.default_rng(2)
    first, second = source.normal(0, 1, 20_000), source.normal(shift, 1, 4000)
    edges = edges_of(first)
    distance, p_value = divergence.kolmogorov_smirnov(counted(first, edges), counted(second, edges))
    theirs = stats.ks_2samp(first, second)
    assert theirs.statistic - 0.03 < distance <= theirs.statistic + 1e-12
    assert p_value >= theirs.pvalue * 0.9
    beyond = distance > divergence.kolmogorov_smirnov_by_chance(counted(first, edges), counted(second, edges), 0.001)
    assert beyond == (shift > 0) == (theirs.pvalue < 0.001)


def test_total_variation_is_half_the_absolute_difference():
    assert divergence.total_variation([50, 50, 0], [10, 10, 80]) == pytest.approx(0.8)
    assert divergence.total_variation([5, 5], [500, 500]) == 0


@pytest.mark.parametrize(("n", "m", "bins"), [(20_000, 100, 20), (20_000, 3000, 20), (500, 500, 5)])
def test_chance_gives_more_as_rarely_as_it_says(n, m, bins):
    source, level = np.random.default_rng(3), 0.02
    shares = source.dirichlet(np.full(bins, 3))
    pairs = list(zip(source.multinomial(n, shares, 2000).tolist(), source.multinomial(m, shares, 2000).tolist(),
                     strict=True))

    def share(figure, chance) -> float:
        return np.mean([figure(*pair) > chance(*pair, level) for pair in pairs])

    index = share(divergence.population_stability_index,
                  lambda *pair: divergence.population_stability_index_by_chance(*pair)[1])
    assert index < 2 * level
    means = [divergence.population_stability_index(*pair) for pair in pairs]
    expected = divergence.population_stability_index_by_chance(*pairs[0], level)[0]
    assert np.mean(means) == pytest.approx(expected, rel=0.05 if m > 100 else 0.3)
    # With 100 examples many bins hold a few, and what makes them finite also makes them milder.
    assert index > level / 4 or m == 100
    assert share(lambda *pair: divergence.kolmogorov_smirnov(*pair)[0],
                 divergence.kolmogorov_smirnov_by_chance) < 1.5 * level
    assert share(divergence.total_variation, divergence.total_variation_by_chance) < level
    grown = [abs(pair[0][0] / n - pair[1][0] / m) > divergence.share_by_chance((pair[0][0] / n, n), (pair[1][0] / m, m))
             for pair in pairs]
    assert np.mean(grown) < 10 * divergence.LEVEL


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantiles_of_a_histogram_are_those_of_the_values(share):
    seconds = np.random.default_rng(4).lognormal(-6, 0.8, 50_000)
    counts = np.histogram(seconds, [0, *LATENCY_EDGES, np.inf])[0].tolist()
    assert divergence.quantile(LATENCY_EDGES, counts, share) == pytest.approx(np.quantile(seconds, share), rel=0.02)


def test_quantiles_at_the_ends():
    empty = [0] * (len(LATENCY_EDGES) + 1)
    assert divergence.quantile(LATENCY_EDGES, empty, 0.5) is None
    assert divergence.quantile(LATENCY_EDGES, [3, *empty[1:]], 0.5) == LATENCY_EDGES[0]
    assert divergence.quantile(LATENCY_EDGES, [*empty[1:], 3], 0.5) == LATENCY_EDGES[-1]


def test_the_share_below_a_bound_is_exact_at_an_edge():
    confidence = np.array([0.3, 0.49999, 0.5, 0.5, 0.7, 0.9999])
    counts = np.histogram(confidence, [0, *CONFIDENCE_EDGES, 1.0001])[0].tolist()
    assert divergence.share_below(CONFIDENCE_EDGES, counts, 0.5) == pytest.approx(2 / 6)
    assert divergence.share_below(CONFIDENCE_EDGES, [0] * len(counts), 0.5) is None
