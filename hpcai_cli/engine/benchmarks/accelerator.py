"""An accelerator that takes as long as one is told, so that a machine without one tells how many it could feed.

Its utilization is that of MLPerf Storage (https://github.com/mlcommons/storage): the time for which it computes over
all the time, the first step left out.
"""

import time
from collections.abc import Callable, Iterable

import tensorflow as tf

from hpcai_cli.engine.pipeline import Block, Pipeline

ENOUGH = 0.9
"""Utilization that counts as fed; MLPerf Storage asks the same of its image models."""


def utilization(blocks: Iterable[Block], step_seconds: float) -> float:
    """Return the share of the time for which an accelerator computes that takes so long for each step.

    Like a real one it takes one block while the host prepares the next, and what it is given are tensors.
    """
    computed = began = free_at = 0.0
    for number, block in enumerate(blocks):
        as_tensors([block])
        time.sleep(max(0.0, free_at - time.perf_counter()))
        now = time.perf_counter()
        if number == 0:
            began = free_at = now
            continue
        seconds = step_seconds * len(block.examples)
        computed, free_at = computed + seconds, now + seconds
    elapsed = free_at - began
    return computed / elapsed if elapsed > 0 else 0.0


def most_samples(pipeline: Pipeline, blocks: Callable[[], Iterable[Block]], rounds: int) -> tuple[float, float]:
    """Return the highest rate of samples, in 1/s, at which an accelerator stays fed, and its milliseconds a step."""
    fast, slow = 0.0, _host_seconds(pipeline, blocks())
    while utilization(blocks(), slow) < ENOUGH:
        fast, slow = slow, 2 * slow
    for _ in range(rounds):
        middle = (fast + slow) / 2
        if utilization(blocks(), middle) < ENOUGH:
            fast = middle
        else:
            slow = middle
    return pipeline.batch_size / slow, 1000 * slow


def as_tensors(blocks: Iterable[Block]) -> int:
    """Hand blocks to TensorFlow, as the training does, and return how many examples they hold."""
    count = 0
    for block in blocks:
        for array in (block.inputs, block.labels, block.weights):
            tf.constant(array)
        count += sum(block.examples)
    return count


def _host_seconds(pipeline: Pipeline, blocks: Iterable[Block]) -> float:
    """Return the seconds that this machine takes to prepare a step."""
    started = time.perf_counter()
    count = as_tensors(blocks)
    return (time.perf_counter() - started) * pipeline.batch_size / count
