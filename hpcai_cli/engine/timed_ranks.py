"""Ranks that are timed where they wait for each other, and which of them the others wait for."""

import socket
import time

import numpy as np
import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine.distributed import Horovod, Serial

LAG = 1.25
"""A rank whose own part of a step takes so many times the others' median lags; less is noise of a shared machine."""
LONG_SECONDS = 10
"""For so long, or twice in a row, or it is nothing to tell."""
_NAME_BYTES = 64


class TimedRanks:
    """The ranks of a job, whose reduction of gradients is timed within the compiled step.

    Attributes:
        seconds: float64 (), how long this rank has waited for the others and for what they sent, since it was set to 0.
        gradient_bytes: what a step sends.
    """

    def __init__(self, ranks: Serial | Horovod):
        self._ranks, self.parts, self.gradient_bytes = ranks, ranks.parts, 0
        with tf.device("CPU:0"):
            self.seconds = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def size_in_step(self) -> int | tf.Tensor:
        """Return the number of ranks, for a step that is being compiled."""
        return self._ranks.size_in_step()

    def reduce(self, gradients, averages, sums, **how):
        """Reduce as the ranks do."""
        tensors = [tf.convert_to_tensor(gradient) for gradient in gradients]
        self.gradient_bytes = sum(tensor.shape.num_elements() * tensor.dtype.size for tensor in (*tensors, *averages))
        # Copied from where it was computed: on a GPU an operation counts as done when it is queued, a copy when it is
        # there. The gradients of the first layer are the last ones.
        with tf.device("CPU:0"):
            last = tf.identity(tf.reshape(tensors[0], [-1])[:1])
        with tf.control_dependencies([*tensors, *averages, sums, last]):
            started = tf.timestamp()
        with tf.control_dependencies([started]):
            reduced = self._ranks.reduce(tensors, averages, sums, **how)
        with tf.control_dependencies([*reduced[0], *reduced[1], reduced[2]]):
            self.seconds.assign_add(tf.timestamp() - started)
        return reduced


class LagWatch:
    """Tells how long a step takes each rank by itself, and which rank the others wait for.

    Args:
        ranks: the job's.
        step_ranks: those that the step would be compiled with.

    Attributes:
        step_ranks: those that it is to be compiled with.
    """

    def __init__(self, ranks: Serial | Horovod, step_ranks: "Serial | Horovod | TimedRanks"):
        self._ranks = ranks
        self._timed = TimedRanks(step_ranks) if ranks.size > 1 or ranks.is_elastic else None
        self.step_ranks = self._timed or step_ranks
        self._named: set[int] = set()
        self._suspect = -1
        self._started, self._step = 0.0, 0

    def restart(self, step: int) -> None:
        """Count from after this step on."""
        if self._timed:
            self._timed.seconds.assign(0.0)
        self._started, self._step = time.monotonic(), step

    def forget(self) -> None:
        """Begin anew with ranks that have met again, since all need to know the same."""
        self._named.clear()
        self._suspect = -1

    def own_ms(self, step: int) -> list[float]:
        """Return how long each of the steps up to this one took each rank without waiting, ms; on one rank nothing.

        A rank that goes on lagging is named on stderr, once.
        """
        if not self._timed or step == self._step or self._ranks.size == 1:
            return []
        own = (time.monotonic() - self._started - float(self._timed.seconds.numpy())) / (step - self._step)
        found = [round(1000 * each, 3) for each in self._ranks.gather(np.array([own])).tolist()]
        slowest = int(np.argmax(found))
        usual = float(np.median(found[:slowest] + found[slowest + 1:]))
        suspect = slowest if found[slowest] > LAG * usual else -1
        # From numbers that all ranks have alike, since they gather the name together.
        is_long = suspect == self._suspect or found[slowest] * (step - self._step) > 1000 * LONG_SECONDS
        self._suspect = suspect
        if suspect >= 0 and is_long and suspect not in self._named:
            self._named.add(suspect)
            console.note(f"rank {suspect} on {self._host_of(suspect)} lags: a step takes it {found[suspect]:.1f} ms by "
                         f"itself, and the others {usual:.1f} ms, who wait for it")
        return found

    def _host_of(self, rank: int) -> str:
        name = np.frombuffer(socket.gethostname().encode()[:_NAME_BYTES].ljust(_NAME_BYTES), np.uint8)
        return self._ranks.gather(name[None])[rank].tobytes().decode(errors="replace").strip()
