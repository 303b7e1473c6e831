"""Figures of how far two histograms with the same bins lie apart, and how far chance alone puts them."""

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.001
"""In which share of cases a figure exceeds its `by_chance` where both histograms come from the same distribution."""


def population_stability_index(reference: Sequence[int], live: Sequence[int]) -> float | None:
    """Return the population stability index, sum of (q - p) ln(q / p) over the bins' shares; None without examples.

    So that an empty bin gives no infinity, each bin of the reference gets half an example more, and the live counts
    get half an example per bin, spread as the reference is, which moves them towards each other.

    Source: Siddiqi, "Credit Risk Scorecards" (2006), "System stability report"; the symmetrized divergence of
    Kullback and Leibler, "On Information and Sufficiency" (1951), equation 2.6.
    """
    if not sum(reference) or not sum(live):
        return None
    p, q = _smoothed(reference, live)
    return float(((q - p) * np.log(q / p)).sum())


def population_stability_index_by_chance(reference: Sequence[int], live: Sequence[int],
                                         level: float) -> tuple[float, float] | None:
    """Return the index's mean where nothing changed, and what it exceeds in a share of `level` of such cases.

    It is (1/n + 1/m) times chi-square with one degree of freedom less than bins. Source: Yurdakul and Naranjo,
    "Statistical properties of the population stability index", Journal of Risk Model Validation 14(4), 2020.
    """
    from scipy.stats import chi2

    used = np.count_nonzero(np.add(reference, live))
    if used < 2 or not sum(reference) or not sum(live):
        return None
    scale = 1 / sum(reference) + 1 / sum(live)
    return float((used - 1) * scale), float(chi2.isf(level, used - 1) * scale)


def kolmogorov_smirnov(reference: Sequence[int], live: Sequence[int]) -> tuple[float | None, float | None]:
    """Return the largest difference of the cumulative shares, and its p-value; None both without examples.

    Differences inside of a bin are not seen: the distance is at most that of the values themselves, and the p-value
    at least theirs. Source: Smirnov, "Table for Estimating the Goodness of Fit of Empirical Distributions" (1948).
    """
    from scipy.special import kolmogorov

    n, m = sum(reference), sum(live)
    if not n or not m:
        return None, None
    distance = float(np.abs(np.cumsum(reference) / n - np.cumsum(live) / m).max())
    return distance, float(kolmogorov(distance * math.sqrt(n * m / (n + m))))


def kolmogorov_smirnov_by_chance(reference: Sequence[int], live: Sequence[int], level: float) -> float | None:
    """Return what that distance exceeds in at most a share of `level` of cases where nothing changed."""
    from scipy.special import kolmogi

    n, m = sum(reference), sum(live)
    return float(kolmogi(level)) * math.sqrt((n + m) / (n * m)) if n and m else None


def total_variation(reference: Sequence[int], live: Sequence[int]) -> float | None:
    """Return half the sum of the absolute differences of the shares, in [0, 1]; None without examples."""
    n, m = sum(reference), sum(live)
    return float(np.abs(np.divide(reference, n) - np.divide(live, m)).sum() / 2) if n and m else None


def total_variation_by_chance(reference: Sequence[int], live: Sequence[int], level: float) -> float | None:
    """Return a bound that the distance exceeds in at most a share of `level` of cases where nothing changed.

    Its mean is at most half the sum of the shares' standard deviations, and one example of n moves it by 1/n at most,
    so that it stays near its mean. Source: McDiarmid, "On the method of bounded differences" (1989), lemma 1.2.
    """
    n, m = sum(reference), sum(live)
    if not n or not m:
        return None
    shares = np.add(reference, live) / (n + m)
    mean = np.sqrt(shares * (1 - shares) * (1 / n + 1 / m)).sum() / 2
    return float(mean + math.sqrt(-math.log(level) / 2 * (1 / n + 1 / m)))


def share_below(edges: Sequence[float], counts: Sequence[int], bound: float) -> float | None:
    """Return the share in the bins that end at `bound` or below; None without examples."""
    below = int(np.searchsorted(edges, bound, side="right"))
    return sum(counts[:below]) / sum(counts) if sum(counts) else None


def share_by_chance(reference: tuple[float, int], live: tuple[float, int]) -> float:
    """Return what the difference of two shares, each with its count, exceeds in LEVEL of cases where nothing changed.

    The pooled standard error of the test of two proportions. Source: Agresti, "Categorical Data Analysis" (2013), 3.2.
    """
    from scipy.special import ndtri

    (p, n), (q, m) = reference, live
    pooled = (p * n + q * m) / (n + m)
    return float(-ndtri(LEVEL)) * math.sqrt(pooled * (1 - pooled) * (1 / n + 1 / m))


def quantile(edges: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return a quantile of positive values from their histogram, None without any.

    Within its bin it is taken as spread evenly by ratio; below the first edge or above the last one it is that edge.

    Args:
        edges: k, ascending and positive; k + 1 counts.
    """
    total = np.cumsum(counts)
    if not total[-1]:
        return None
    sought = share * total[-1]
    place = int(np.searchsorted(total, sought, side="left"))
    if place == 0 or place == len(edges):
        return float(edges[0 if place == 0 else -1])
    part = (sought - total[place - 1]) / counts[place]
    return float(edges[place - 1] * (edges[place] / edges[place - 1]) ** part)


def _smoothed(reference: Sequence[int], live: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    p = np.asarray(reference, np.float64) + 0.5
    p /= p.sum()
    weight = len(p) / 2
    return p, (np.asarray(live, np.float64) + weight * p) / (sum(live) + weight)
