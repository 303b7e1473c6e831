"""Feeds an epoch's blocks to the compiled steps, and accounts for what was trained."""

import math
from collections.abc import Callable, Iterator
from enum import Enum, auto

import tensorflow as tf

from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.step import HALT
from hpcai_cli.engine.training_job import Job
from hpcai_cli.errors import DivergedError


class Pause(Enum):
    """Why the blocks of an epoch are not fed any further."""

    END = auto()
    """There are no more."""
    SAVE = auto()
    """A checkpoint is due; the blocks go on behind it."""
    COMMIT = auto()
    """The state of an elastic job is to be kept in memory; the blocks go on behind it."""
    STOP = auto()
    """A rank was asked to stop."""


def run_blocks(job: Job, at: Position, steps: Callable, blocks: Iterator[Block],
               after_block: Callable[[], bool | None]) -> Pause:
    """Feed the blocks to the compiled steps until they end, or there is something else to do.

    Args:
        after_block: tells whether a checkpoint is due.

    Raises:
        DivergedError: the loss is no number.
    """
    meter, whole, is_due = _Meter(at), (None, None), False
    for block in blocks:
        if job.stop.received:
            job.wishes.stop.assign(1.0)
        if block.weights is not whole[0]:
            # The pipeline gives the same array for all whole blocks.
            whole = block.weights, tf.constant(block.weights)
        # The seed depends on the run's seed, the step and the rank, and on nothing else.
        seed = tf.constant([job.recipe.seed % 2**31, at.step * job.replicas.size + job.replicas.rank], tf.int32)
        # tf.constant copies, so that the pipeline may fill its buffers again while an accelerator still computes.
        sums = steps(tf.constant(block.inputs), tf.constant(block.labels), whole[1], seed,
                     tf.constant(len(block.examples)))
        meter.add(sums, block.examples)
        job.pulse.mark(at.step)
        is_due = after_block()
        if meter.stop_asked or meter.save_asked or meter.commit_asked or is_due:
            break
    meter.flush()
    if meter.stop_asked:
        return Pause.STOP
    if meter.save_asked or is_due:
        return Pause.SAVE
    return Pause.COMMIT if meter.commit_asked else Pause.END


class _Meter:
    """Sums the epoch's loss and measure, one block behind, so that an accelerator never waits for Python.

    Attributes:
        is_halted: whether a step saw that a rank was asked to stop, or that others wait to take part; it was the last
            one that was taken.
        stop_asked: whether it was the former.
        save_asked: whether rank 0 wishes a checkpoint.
        commit_asked: whether it wishes a commit.
    """

    def __init__(self, at: Position):
        self._at, self._pending = at, None
        self.is_halted = self.stop_asked = self.save_asked = self.commit_asked = False

    def add(self, sums: tf.Tensor, examples: list[int]) -> None:
        """Take the next block's sums and account for the one before it."""
        self.flush()
        if self.is_halted:
            # Nothing of this one was trained.
            examples.clear()
            return
        self._pending = (sums, self._at.step, self._at.cursor, examples)
        self._at.step += len(examples)
        self._at.cursor += sum(examples)

    def flush(self) -> None:
        """Account for the block that is pending, as far as it was trained.

        Raises:
            DivergedError: a loss is no number. The loss is the mean over all ranks, so all ranks see it alike.
        """
        if self._pending is None:
            return
        sums, step, cursor, examples = self._pending
        self._pending = None
        for number, (count, row) in enumerate(zip(tuple(examples), sums.numpy().tolist(), strict=False), 1):
            loss, measure, stops, saves, commits = row
            if not math.isfinite(loss):
                raise DivergedError(f"the loss is {loss} at step {step + number}", expected="a finite number",
                                    mend="lower it with `--set learning_rate=...` or set clip_norm", received=loss)
            self._at.sums[0] += loss * count
            self._at.sums[1] += measure
            self._at.sums[2] += count
            self.save_asked = self.save_asked or saves > 0
            self.commit_asked = self.commit_asked or commits > 0
            self.stop_asked = stops > 0
            if self.stop_asked or commits >= HALT:
                self.is_halted = True
                del examples[number:]
                self._at.step, self._at.cursor = step + number, cursor + sum(examples)
                return
