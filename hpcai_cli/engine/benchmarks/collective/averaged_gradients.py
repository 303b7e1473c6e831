"""How long it takes to average gradients, by our adapter and by Horovod's bare call."""

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.benchmarks.collective.collectives import (
    calls_of_a_round,
    seconds_of_a_call,
    slowest_of,
    transport_of,
)
from hpcai_cli.engine.benchmarks.measure import interleaved
from hpcai_cli.engine.distributed import Horovod
from hpcai_cli.errors import HpcaiError

CNN = ((3, 3, 3, 32), (32,), (3, 3, 32, 64), (64,), (3, 3, 64, 128), (128,), (3, 3, 128, 128), (128,), (6272, 512),
       (512,), (512, 1), (1,))
"""The variables of the tutorials' CNN for dogs and cats: 3.5 million parameters, most of them in one matrix."""
ROUND_SECONDS = 0.05
ADAPTER_ROUNDS, ADAPTER_SECONDS = 10, 0.02
"""The adapter's own cost is a few percent at most: it takes so many times the rounds, and short ones, to be told from
the machine's moods."""
SIDE, PRODUCTS = 512, 8
"""What stands for a step's own work: so many products of two matrices of 512 x 512, some 10 to 20 ms."""


def measure_adapter(ranks: Horovod, rounds: int) -> dict:
    """Return in seconds a call what averaging a CNN's gradients takes by `Horovod.reduce` and by `grouped_allreduce`.

    Raises:
        HpcaiError: the mean is wrong.
    """
    hvd = ranks.operations
    gradients, sums = _gradients(CNN, ranks.rank), tf.zeros(3)

    # Horovod names what it reduces by the tensors' names, which only a function's own tensors have.
    @tf.function
    def ours(gradients, sums):
        return ranks.reduce(gradients, [], sums)

    @tf.function
    def raw(gradients, sums):
        return hvd.grouped_allreduce([*gradients, sums], op=hvd.Average)

    rounds *= ADAPTER_ROUNDS
    _verify(ranks, ours(gradients, sums)[0])
    raw(gradients, sums)
    calls = calls_of_a_round(ranks, lambda: raw(gradients, sums), ADAPTER_SECONDS)
    seconds = interleaved(rounds, ours=lambda: seconds_of_a_call(ranks, lambda: ours(gradients, sums), calls),
                          raw=lambda: seconds_of_a_call(ranks, lambda: raw(gradients, sums), calls))
    slowest = slowest_of(ranks, [*seconds["ours"], *seconds["raw"]])
    return {"ranks": ranks.size, "transport": transport_of(ranks), "bytes": 4 * sum(map(math.prod, CNN)),
            "ours": slowest[:rounds], "raw": slowest[rounds:]}


def measure_step(ranks: Horovod, shapes: Sequence[Sequence[int]], rounds: int) -> dict:
    """Return in seconds what a step takes that computes for a while, and then averages tensors of these shapes.

    It computes because a rank that only waits has cores to spare: a Horovod that looks for work often looks cheap then.
    """
    gradients, sums = _gradients(shapes, ranks.rank), tf.zeros(3)
    matrix = tf.fill((SIDE, SIDE), 1 / SIDE)

    @tf.function
    def compute(product):
        for _ in range(PRODUCTS):
            product = tf.linalg.matmul(product, matrix)
        return product

    @tf.function
    def average(gradients, sums):
        return ranks.reduce(gradients, [], sums)

    def step():
        compute(matrix)
        return average(gradients, sums)

    _verify(ranks, step()[0])
    calls = calls_of_a_round(ranks, step, ROUND_SECONDS)
    seconds = [seconds_of_a_call(ranks, step, calls) for _ in range(rounds)]
    return {"ranks": ranks.size, "transport": transport_of(ranks), "seconds": slowest_of(ranks, seconds)}


def _gradients(shapes: Sequence[Sequence[int]], rank: int) -> list[tf.Tensor]:
    return [tf.fill(tuple(shape), float(rank)) for shape in shapes]


def _verify(ranks: Horovod, averaged: Sequence[tf.Tensor]) -> None:
    mean = (ranks.size - 1) / 2
    is_right = all(np.allclose(tensor.numpy(), mean, rtol=1e-6) for tensor in averaged)
    # All ranks end together: one that went on would wait for the others for ever.
    if ranks.gather(np.array([0 if is_right else 1])).any():
        error = HpcaiError(f"averaged gradients over {transport_of(ranks)} are wrong", expected=f"the mean {mean}")
        error.collective = True
        raise error
