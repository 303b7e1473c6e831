"""What the ranks of a job measure for `hpcai benchmark scaling`: steps that average gradients, and the same without.

The recipe's own steps, of several sizes, fed as a training feeds them; and made-up steps, whose multiply-adds and
bytes can be chosen freely, for the model of a step's time.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf

from hpcai_cli.engine import hardware
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps, Kind, Measured
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.model import build, moving_statistics
from hpcai_cli.engine.pipeline import Block, Pipeline
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Dataset, check_fits
from hpcai_cli.recipe import Recipe

ROUNDS = 8
"""Times that each kind of step is measured."""
SIDE = 256
"""Rows of the square matrices that made-up steps multiply; they stay in a core's cache."""
NAME_BYTES, MOST_CORES = 64, 4096


def measure(recipe: Recipe, build_model: Callable, augment: Callable | None, data: Path, kinds: Sequence[Kind],
            ranks: Serial | Horovod, seconds: float) -> JobSteps:
    """Measure all kinds of steps in turn, with averaging and without; the same on every rank.

    Args:
        seconds: how long a kind is measured in each round.

    Raises:
        DataError: the data don't fit the recipe.
    """
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    policy, _ = ranks.broadcast_json(hardware.choose_precision(recipe.precision))
    hardware.set_precision(policy)
    dataset = Dataset(data)
    recipe = check_fits(dataset, recipe)
    names, own_cores = _names(ranks)
    # Made-up steps average as many tensors as the recipe's: each costs a little, whatever its size.
    tensors = len(_averaged_variables(build(recipe, build_model)))
    steps = [_RecipeSteps(recipe, build_model, augment, dataset, kind.units, ranks) if kind.of == "recipe" else
             _MadeUpSteps(kind, tensors, ranks) for kind in kinds]
    ways = (True, False) if ranks.size > 1 else (False,)
    counts = [_count(each, ways[0], ranks, seconds) for each in steps]
    found = {(number, averaged): [] for number in range(len(steps)) for averaged in ways}
    for _ in range(ROUNDS):
        for number, averaged in found:
            # All begin together: ranks that compute alone are to share the memory as those do that average.
            ranks.barrier()
            once = steps[number].seconds(averaged, counts[number])
            found[number, averaged].append(ranks.gather(np.array([once])).tolist())
    return JobSteps(names, own_cores, [Measured(steps[number].kind, averaged, rounds)
                                       for (number, averaged), rounds in found.items()])


def _count(steps, averaged: bool, ranks: Serial | Horovod, seconds: float) -> int:
    """Warm up, and return how many steps fill so many seconds, by rank 0's clock: all ranks must take as many."""
    for each in sorted({averaged, False}):
        steps.seconds(each, 1)
    return int(ranks.broadcast_json(max(1, round(seconds / steps.seconds(averaged, 2)))))


class _RecipeSteps:
    """The recipe's steps as `hpcai train` takes them, of so many images a rank."""

    def __init__(self, recipe: Recipe, build_model: Callable, augment: Callable | None, dataset: Dataset, images: int,
                 ranks: Serial | Horovod):
        parts = parts_of(images, recipe.batch_size)
        recipe = replace(recipe, batch_size=images // parts, accumulation_steps=parts)
        # Each rank its own order over all rows: with more ranks than the file has steps, there is still enough to read.
        pipeline = Pipeline(dataset.split("train"), batch_size=images, seed=recipe.seed + ranks.rank)
        self._model = build(recipe, build_model)
        self._optimizer = build_optimizer(recipe, steps_per_epoch=pipeline.steps_per_epoch, size=ranks.size)
        self._optimizer.build(self._model.trainable_variables)
        block = next(pipeline.blocks(0))
        compiled = partial(compile_steps, self._model, self._optimizer, recipe, block=block,
                           augment=augment and partial(augment, recipe=recipe))
        self._steps = {False: compiled(Serial())}
        if ranks.size > 1:
            self._steps[True] = compiled(ranks)
        self._blocks = _endless(pipeline)
        self.kind = Kind("recipe", images, _gradient_bytes(self._model))

    def seconds(self, averaged: bool, count: int) -> float:
        """Take at least so many steps and return the seconds of one."""
        steps, taken, started = self._steps[averaged], 0, time.perf_counter()
        for block in self._blocks:
            sums = steps(tf.constant(block.inputs), tf.constant(block.labels), tf.constant(block.weights),
                         tf.constant([0, taken], tf.int32), tf.constant(len(block.examples)))
            taken += len(block.examples)
            if taken >= count:
                break
        sums.numpy()
        return (time.perf_counter() - started) / taken


class _MadeUpSteps:
    """Steps that multiply matrices, average gradients of so many bytes, and add them to as many weights."""

    def __init__(self, kind: Kind, tensors: int, ranks: Serial | Horovod):
        self.kind = kind
        generator = np.random.default_rng(0)
        matrix = tf.constant(generator.normal(0, SIDE**-0.5, (SIDE, SIDE)), tf.float32)
        numbers = np.ones(kind.bytes // 4, np.float32)
        self._weights = [tf.Variable(part) for part in np.array_split(numbers, tensors)]
        self._steps = {False: self._compiled(matrix, Serial())}
        if ranks.size > 1:
            self._steps[True] = self._compiled(matrix, ranks)

    def _compiled(self, matrix: tf.Tensor, ranks: Serial | Horovod) -> Callable:
        def one(number):
            _, product = tf.while_loop(lambda done, _: done < self.kind.units,
                                       lambda done, product: (done + 1, product @ matrix), (tf.constant(0), matrix))
            # A gradient needs what was computed before.
            slope = tf.clip_by_value(product[0, 0], 0.0, 1e-6)
            gradients = [slope * weight for weight in self._weights]
            gradients, _, _ = ranks.reduce(gradients, [], tf.zeros([3]))
            for weight, gradient in zip(self._weights, gradients, strict=True):
                weight.assign_sub(gradient)
            return number + 1

        @tf.function
        def steps(count):
            return tf.while_loop(lambda number: number < count, one, (tf.constant(0),), parallel_iterations=1)[0]

        return steps.get_concrete_function(tf.TensorSpec((), tf.int32))

    def seconds(self, averaged: bool, count: int) -> float:
        """Take so many steps and return the seconds of one."""
        started = time.perf_counter()
        self._steps[averaged](tf.constant(count)).numpy()
        return (time.perf_counter() - started) / count


def parts_of(images: int, batch_size: int) -> int:
    """Return in how many parts a rank takes a step's images, none larger than the recipe's batch where it divides."""
    return next(parts for parts in range(-(-images // batch_size), images + 1) if images % parts == 0)


def _endless(pipeline: Pipeline) -> Iterator[Block]:
    epoch = 0
    while True:
        yield from pipeline.blocks(epoch)
        epoch += 1


def _averaged_variables(model) -> list:
    """Return the variables of which a step averages the gradients or the values."""
    return [*model.trainable_variables, *moving_statistics(model)]


def _gradient_bytes(model) -> int:
    """Return how many bytes a step averages, in float32, with the three sums that travel along."""
    return 4 * sum(int(np.prod(variable.shape)) for variable in _averaged_variables(model)) + 12


def _names(ranks: Serial | Horovod) -> tuple[list[str], bool]:
    """Return the ranks' names, and whether each has cores of its own."""
    host = socket.gethostname().encode()[:NAME_BYTES].ljust(NAME_BYTES)
    mine = np.zeros((1, MOST_CORES), np.uint8)
    mine[0, sorted(os.sched_getaffinity(0))] = 1
    hosts = [bytes(row).decode(errors="replace").strip() for row in
             ranks.gather(np.frombuffer(host, np.uint8).reshape(1, -1))]
    cores = [np.flatnonzero(row).tolist() for row in ranks.gather(mine)]
    taken = [(host, core) for host, numbers in zip(hosts, cores, strict=True) for core in numbers]
    names = [f"rank {rank} ({host}, {_cores(numbers)})"
             for rank, (host, numbers) in enumerate(zip(hosts, cores, strict=True))]
    return names, len(set(taken)) == len(taken)


def _cores(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"core {numbers[0]}"
    in_a_row = numbers[-1] - numbers[0] == len(numbers) - 1
    return f"cores {numbers[0]} to {numbers[-1]}" if in_a_row else f"{len(numbers)} cores from {numbers[0]} on"
