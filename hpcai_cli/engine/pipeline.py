"""(seed, epoch, cursor) -> blocks of batches for one rank.

The order of an epoch is a pure function of seed and epoch. The state of the data is therefore three integers, and
resuming is exact, with another number of ranks too: the cursor counts examples of the whole job, not of a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hpcai_cli.engine.store import Split

BLOCK_BYTES = 512 << 10
"""How much is gathered and trained at a time; it stays in the processor's second-level cache until it is used."""
ELASTIC_STEPS = 32
"""Steps in a block at most where ranks may be lost, since commits are made between blocks."""


@dataclass
class Block:
    """One rank's share of some steps in a row; the arrays are buffers that the next block overwrites.

    Small batches come several at a time, because copying them one by one and calling TensorFlow for each would cost
    more than a small network's training.

    Attributes:
        inputs: the examples as stored, (g, b, ...); g is the same for all blocks.
        labels: int64 (g, b); float32 where the task is a regression; with further columns where a teacher's scores go
            along.
        weights: float32 (g, b): size / m for each of the m examples of a whole step, 0 for padding. The mean over the
            ranks of sum(weights * losses) is the mean loss of the step's examples, also when m doesn't divide.
        examples: examples of each step, over all ranks; as many as there are steps, at most g.
    """

    inputs: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    examples: list[int]


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
        is_elastic: their number will change, and blocks keep their shape.
    """

    def __init__(self, split: Split, *, batch_size: int, seed: int, rank: int = 0, size: int = 1,
                 is_elastic: bool = False):
        self._split, self._seed, self._rank, self._size = split, seed, rank, size
        self.batch_size = batch_size
        self.global_batch_size = batch_size * size
        # Every rank runs this many steps, or the collective operations would wait for ever.
        self.steps_per_epoch = -(-len(split) // self.global_batch_size)
        row_bytes = split.inputs.dtype.itemsize * int(np.prod(split.inputs.shape[1:], dtype=np.int64))
        self.steps_per_block = min(ELASTIC_STEPS if is_elastic else self.steps_per_epoch,
                                   max(1, BLOCK_BYTES // max(1, row_bytes * batch_size)))

    def blocks(self, epoch: int, cursor: int = 0, *, single_first: bool = False) -> Iterator[Block]:
        """Yield this rank's blocks of the epoch from the cursor on; all have the same shape, the last step is padded.

        Args:
            single_first: begin with a block of one step.
        """
        order = epoch_order(len(self._split), seed=self._seed, epoch=epoch)
        size, step = self.batch_size, self.global_batch_size
        inputs = np.zeros((self.steps_per_block, size, *self._split.inputs.shape[1:]), self._split.inputs.dtype)
        labels = np.zeros((self.steps_per_block, size, *self._split.labels.shape[1:]), self._split.labels.dtype)
        weights = np.full((self.steps_per_block, size), 1 / size, np.float32)
        steps = 1 if single_first else self.steps_per_block
        while len(order) - cursor >= step:
            rows = self._rows(order, cursor, steps)
            steps = len(rows)
            self._split.announce(self._rows(order, cursor + steps * step, self.steps_per_block).ravel())
            self._split.gather(rows.ravel(), inputs[:steps].reshape(-1, *inputs.shape[2:]),
                               labels[:steps].reshape(-1, *labels.shape[2:]))
            yield Block(inputs, labels, weights, [step] * steps)
            cursor, steps = cursor + steps * step, self.steps_per_block
        if cursor < len(order):
            yield self._last(order, cursor, inputs, labels)

    def _rows(self, order: np.ndarray, start: int, steps: int) -> np.ndarray:
        """Return this rank's rows of the next whole steps, int64 (steps, b); fewer steps at the epoch's end."""
        steps = min(steps, max(0, len(order) - start) // self.global_batch_size)
        block = order[start:start + steps * self.global_batch_size]
        return block.reshape(steps, self._size, self.batch_size)[:, self._rank]

    def _last(self, order: np.ndarray, cursor: int, inputs: np.ndarray, labels: np.ndarray) -> Block:
        """Return the last step, which is not whole: some ranks have less to do, but none does nothing."""
        start = cursor + self._rank * self.batch_size
        rows = order[start:start + self.batch_size]
        weights = np.zeros(labels.shape[:2], np.float32)
        weights[0, :len(rows)] = self._size / (len(order) - cursor)
        # Padding has weight 0, but batch normalization sees it: different examples, or their variance would be none.
        padding = np.resize(np.roll(order, -self._rank * self.batch_size), self.batch_size - len(rows))
        self._split.gather(np.concatenate([rows, padding]), inputs[0], labels[0])
        return Block(inputs, labels, weights, [len(order) - cursor])


def shard(count: int, *, rank: int, size: int) -> tuple[int, int]:
    """Return the first and last-plus-one row of a rank's share: contiguous, disjoint, together everything."""
    return count * rank // size, count * (rank + 1) // size
