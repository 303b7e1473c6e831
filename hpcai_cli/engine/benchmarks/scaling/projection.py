"""A model of the time that a step takes, fitted to what was measured, and what it says of more ranks.

A step costs a fixed time, a time for each unit of work, and a time for each byte of the weights, which the optimizer
reads and writes. Averaging over n ranks adds latency x growth(n) + 2 (n - 1) / n x bytes x transfer: the alpha-beta
model of an allreduce (Thakur, Rabenseifner, Gropp, 2005, Optimization of Collective Communication Operations in MPICH,
https://doi.org/10.1177/1094342005051521; the ring: Patarasuk, Yuan, 2009,
https://doi.org/10.1016/j.jpdc.2008.09.002). Both algorithms move the same bytes; the latency grows with log2(n) where
distances double, and with n - 1 around a ring. Between two ranks they are the same. The latency holds what Horovod adds
before it sends anything: ranks agree on what is ready. Gloo goes around a ring; Open MPI and NCCL choose by the size.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

GROWTH = {"recursive doubling": math.log2, "ring": lambda ranks: ranks - 1.0}
"""By the algorithm, how many times the latency between two ranks comes in a step of n ranks."""


@dataclass(frozen=True)
class Observation:
    """How long a step took."""

    ranks: int
    """How many ranks took it at the same time, on one host."""
    units: float
    """The work of one rank in a step: images, or multiply-adds."""
    bytes: int
    """Size of the gradients."""
    averaged: bool
    """Whether they were averaged over the ranks."""
    seconds: float


@dataclass(frozen=True)
class Costs:
    """What a step costs, in seconds."""

    step: float
    """Once."""
    unit: float
    """For each unit of work."""
    byte: float
    """For each byte of the weights."""
    crowding: float
    """For each unit of work, more, where other ranks compute on the same host."""
    latency: float
    """For averaging nothing between two ranks."""
    transfer: float
    """For each byte that a rank sends."""
    algorithm: str = "recursive doubling"
    """How the latency grows: one of GROWTH."""

    def seconds(self, ranks: int, units: float, bytes: int, *, averaged: bool = True) -> float:
        """Return what a step takes."""
        one = Observation(ranks, units, bytes, averaged and ranks > 1, 1.0)
        costs = (self.step, self.unit, self.byte, self.crowding, self.latency, self.transfer)
        return float(np.dot(_terms(one, self.algorithm), costs))

    def communication(self, ranks: int, units: float, bytes: int) -> float:
        """Return the share of averaging in a step."""
        return 1 - self.seconds(ranks, units, bytes, averaged=False) / self.seconds(ranks, units, bytes)

    def with_algorithm(self, algorithm: str) -> "Costs":
        """Return the same costs for another algorithm."""
        return replace(self, algorithm=algorithm)


def fit(observations: Sequence[Observation], algorithm: str | None = None, transfer: float | None = None) -> Costs:
    """Find the costs, none of them negative, that explain the observations best, by least squares of relative errors.

    Args:
        algorithm: one of GROWTH; by default the one that explains them better, the first of those that do it alike.
        transfer: where it is known already, as for steps that were observed with one size of gradients.
    """
    if algorithm is None:
        fitted = [fit(observations, name, transfer) for name in GROWTH]
        return min(fitted, key=lambda costs: round(sum(error**2 for error in errors(costs, observations)), 9))
    seconds = np.array([each.seconds for each in observations])
    terms = np.array([_terms(each, algorithm) for each in observations]) / seconds[:, None]
    rest = np.ones(len(seconds))
    if transfer is not None:
        rest, terms = rest - transfer * terms[:, -1], terms[:, :-1]
    # Bytes come in millions and steps by one: brought to one scale, or rounding would decide.
    scale = np.maximum(terms.max(axis=0), np.finfo(float).tiny)
    found, _ = nnls(terms / scale, rest)
    return Costs(*(found / scale).tolist(), *([] if transfer is None else [transfer]), algorithm)


def errors(costs: Costs, observations: Sequence[Observation]) -> list[float]:
    """Return by which share of what was measured the model is off, more than 0 where it says too much."""
    return [costs.seconds(each.ranks, each.units, each.bytes, averaged=each.averaged) / each.seconds - 1
            for each in observations]


def sizes_up_to(most: int, measured: Sequence[int]) -> list[int]:
    """Return the numbers of ranks that are projected: those that were measured, then powers of two, then the last."""
    powers = [2**power for power in range(1, most.bit_length())]
    return sorted({*measured, *(size for size in powers if size > max(measured)), most})


def projected(costs: Costs, sizes: Sequence[int], images_of: Mapping[int, float], bytes: int) -> dict[int, dict]:
    """Return for each number of ranks the images per second of the job and the share of averaging in a step.

    Args:
        images_of: images of one rank in a step, by the number of ranks.
    """
    return {ranks: {"rate": ranks * images_of[ranks] / costs.seconds(ranks, images_of[ranks], bytes),
                    "communication": costs.communication(ranks, images_of[ranks], bytes)} for ranks in sizes}


def _terms(each: Observation, algorithm: str) -> list[float]:
    ranks, averaged = each.ranks, float(each.averaged)
    return [1.0, each.units, each.bytes, each.units * (ranks > 1), averaged * GROWTH[algorithm](ranks),
            averaged * 2 * (ranks - 1) / ranks * each.bytes]
