"""(seed, epoch, cursor) -> batches for one rank.

The order of an epoch is a pure function of seed and epoch. The state of the data is therefore three integers, and
resuming is exact, with another number of ranks too: the cursor counts examples of the whole job, not of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hpcai_cli.engine.store import Split

BLOCK_BYTES = 512 << 10
"""How much is gathered at a time; it stays in the processor's second-level cache until it is used."""


@dataclass
class Batch:
    """One rank's share of one step; the arrays are buffers that the next batch overwrites.

    Attributes:
        inputs: the examples as stored, (b, ...).
        labels: int64 (b,).
        weights: float32 (b,): size / m for each of the m examples of the whole step, 0 for padding. The mean over the
            ranks of sum(weights * losses) is the mean loss of the step's examples, also when m doesn't divide.
        cursor: examples of the epoch that are done after this step, over all ranks.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    cursor: int


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Return the epoch's order, a permutation of 0 to count - 1, int64.

    Philox is counter-based: (seed, epoch) is its key, so that no epoch's order depends on another's
    (https://doi.org/10.1145/2063384.2063405).
    """
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


class Pipeline:
    """Shuffled training batches for one rank; each example once per epoch, over all ranks.

    Args:
        split: the training split.
        batch_size: examples per rank and step.
        seed: the recipe's seed.
        rank: this process.
        size: number of processes.
    """

    def __init__(self, split: Split, *, batch_size: int, seed: int, rank: int = 0, size: int = 1):
        self._split, self._seed, self._rank, self._size = split, seed, rank, size
        self.batch_size = batch_size
        self.global_batch_size = batch_size * size
        # Every rank runs this many steps, or the collective operations would wait for ever.
        self.steps_per_epoch = -(-len(split) // self.global_batch_size)
        # Small batches are gathered several at a time: one by one, Python would cost more than the copying.
        row_bytes = split.inputs.dtype.itemsize * int(np.prod(split.inputs.shape[1:], dtype=np.int64))
        self._block = max(1, BLOCK_BYTES // max(1, row_bytes * batch_size))

    def batches(self, epoch: int, cursor: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of the epoch from the cursor on; all have the same shape, the last is padded."""
        order = epoch_order(len(self._split), seed=self._seed, epoch=epoch)
        size, step = self.batch_size, self.global_batch_size
        inputs = np.empty((self._block * size, *self._split.inputs.shape[1:]), self._split.inputs.dtype)
        labels = np.empty(self._block * size, np.int64)
        weights = np.full(size, 1 / size, np.float32)
        for start in range(cursor, len(order) - step + 1, self._block * step):
            rows = self._rows(order, start)
            self._split.announce(self._rows(order, start + self._block * step))
            self._split.gather(rows, inputs[:len(rows)], labels[:len(rows)])
            for first in range(0, len(rows), size):
                cursor += step
                yield Batch(inputs[first:first + size], labels[first:first + size], weights, cursor)
        if cursor < len(order):
            yield self._last(order, cursor, inputs[:size], labels[:size])

    def _rows(self, order: np.ndarray, start: int) -> np.ndarray:
        """Return this rank's rows of the next block of whole steps."""
        steps = min(self._block, max(0, len(order) - start) // self.global_batch_size)
        block = order[start:start + steps * self.global_batch_size]
        return block.reshape(steps, self._size, self.batch_size)[:, self._rank].ravel()

    def _last(self, order: np.ndarray, cursor: int, inputs: np.ndarray, labels: np.ndarray) -> Batch:
        """Return the batch of the last step, which is not whole: some ranks have less to do, but none does nothing."""
        start = cursor + self._rank * self.batch_size
        rows = order[start:start + self.batch_size]
        weights = np.zeros(self.batch_size, np.float32)
        weights[:len(rows)] = self._size / (len(order) - cursor)
        # Padding repeats examples that exist, so that it disturbs no statistics; its weight is 0.
        self._split.gather(np.resize(rows if len(rows) else order[:1], self.batch_size), inputs, labels)
        return Batch(inputs, labels, weights, len(order))


def shard(count: int, *, rank: int, size: int) -> tuple[int, int]:
    """Return the first and last-plus-one row of a rank's share: contiguous, disjoint, together everything."""
    return count * rank // size, count * (rank + 1) // size
