"""The training step alone, on one constant block: what the loop around it can reach at most."""

import statistics
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.compression.model_cost import cost_of
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.model import build
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.recipe import Recipe

PRODUCT_SIZE = 1536
"""Rows and columns of the matrices whose product tells what the machine can do."""
PRODUCT_SECONDS = 0.4
_PASSES = 3
"""The backward pass multiplies twice as much as the forward pass: for the weights and for the inputs."""


class Trainer:
    """A model, its optimizer and its compiled steps; the steps alone would lose the optimizer's variables."""

    def __init__(self, recipe: Recipe, build_model: Callable, block: Block, ranks: Serial | Horovod | None = None):
        self.model = build(recipe, build_model)
        self.optimizer = build_optimizer(recipe, steps_per_epoch=1000, size=1)
        self.optimizer.build(self.model.trainable_variables)
        self.steps = compile_steps(self.model, self.optimizer, recipe, ranks or Serial(), block=block)
        self._constant = [tf.constant(array) for array in (block.inputs, block.labels, block.weights)]
        self._constant += [tf.constant([0, 0], tf.int32), tf.constant(len(block.examples))]
        self._count = len(block.examples)

    def constant_seconds(self, blocks: int) -> float:
        """Return the seconds of a step, over so many blocks of the same batch."""
        started = time.perf_counter()
        for _ in range(blocks):
            sums = self.steps(*self._constant)
        sums.numpy()
        return (time.perf_counter() - started) / (blocks * self._count)

    def flops(self, input_shape: tuple[int, ...], batch_size: int) -> float:
        """Return the floating-point operations of a step.

        Two for each multiply-accumulate of the forward pass, and as many again twice for the backward pass; the usual
        count of model FLOPs (https://arxiv.org/abs/2204.02311, appendix B).
        """
        return 2.0 * _PASSES * cost_of(self.model, input_shape).macs * batch_size


def step_milliseconds(recipe: Recipe, build_model: Callable, block: Block) -> float:
    """Return how long a step of a recipe takes on this machine."""
    trainer = Trainer(recipe, build_model, block)
    trainer.constant_seconds(2)
    return 1000 * statistics.median(trainer.constant_seconds(3) for _ in range(5))


def product_rate(dtype: tf.DType) -> float:
    """Return the rate of a product of two matrices, in floating-point operations per second."""
    source = np.random.default_rng(0)
    left, right = (tf.cast(tf.constant(source.normal(size=(PRODUCT_SIZE, PRODUCT_SIZE)), tf.float32), dtype)
                   for _ in range(2))
    product = tf.function(tf.matmul)
    product(left, right)
    calls, started = 0, time.perf_counter()
    while time.perf_counter() - started < PRODUCT_SECONDS:
        result = product(left, right)
        calls += 1
    # An accelerator has only been told so far; its last answer has to be here.
    result[0, 0].numpy()
    return 2 * PRODUCT_SIZE**3 * calls / (time.perf_counter() - started)
