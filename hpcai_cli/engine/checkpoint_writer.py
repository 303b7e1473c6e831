"""Writes checkpoints beside the training: the snapshot is taken at once, the disk is another thread's wait."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import checkpoint
from hpcai_cli.engine.checkpoint import State
from hpcai_cli.errors import HpcaiError

LONG_SECONDS = 5
"""A training that has waited so long for its disk says so."""


class Writer:
    """Writes the checkpoints of one run, one after the other; on rank 0.

    A checkpoint that cannot be written is told, and the training goes on: the ones before it are unchanged. That of the
    best epoch stays in memory then, since its weights are wanted in the end, and is tried again with the next one.

    Args:
        folder: the run's checkpoints.
        keep: newest ones that stay, besides the best.
        written: called in the other thread with each one that is on the disk.
        failed: called there with each one that is not, and why.

    Attributes:
        seconds: what one has taken at most.
    """

    def __init__(self, folder: Path, keep: int, *, written: Callable[[State], None],
                 failed: Callable[[State, str], None]):
        self._folder, self._keep, self._written, self._failed = folder, keep, written, failed
        self._thread: threading.Thread | None = None
        self._best: State | None = None
        self._error: HpcaiError | None = None
        self.seconds = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether one is still being written."""
        return bool(self._thread and self._thread.is_alive())

    def has(self, step: int) -> bool:
        """Tell whether a step's checkpoint is on the disk, or kept for it as that of the best epoch."""
        self._wait()
        return bool(self._best and self._best.step == step) or checkpoint.path_of(self._folder, step).is_dir()

    def write(self, state: State) -> None:
        """Begin to write a checkpoint, when the one before it is done."""
        self._wait()
        # A process that ends waits for it, whatever ends it short of a kill.
        self._thread = threading.Thread(target=self._work, args=(state,), name="checkpoint")
        self._thread.start()

    def finish(self) -> HpcaiError | None:
        """Wait until everything is on the disk; return why the last one is not."""
        self._wait()
        return self._error

    def arrays_of_best(self, step: int) -> dict[str, np.ndarray]:
        """Return the variables after that step, which was the best.

        Raises:
            DataError: its checkpoint does not verify.
        """
        self._wait()
        if self._best and self._best.step == step:
            return self._best.arrays
        return checkpoint.at_step(self._folder, step).arrays

    def _wait(self) -> None:
        if self._thread:
            started = time.monotonic()
            self._thread.join()
            if time.monotonic() - started > LONG_SECONDS:
                console.note(f"waited {time.monotonic() - started:.0f} s for the disk to take a checkpoint")
            self._thread = None

    def _work(self, state: State) -> None:
        if self._best and self._best.step == state.best.get("step"):
            self._try(self._best)
        self._error = self._try(state)

    def _try(self, state: State) -> HpcaiError | None:
        is_best, started = state.best.get("step") == state.step, time.monotonic()
        try:
            checkpoint.save(self._folder, state, keep=self._keep)
            self._written(state)
        except Exception as error:
            self._best = state if is_best else self._best
            self._failed(state, str(error))
            return error if isinstance(error, HpcaiError) else HpcaiError(f"cannot write a checkpoint: {error}")
        self.seconds = max(self.seconds, time.monotonic() - started)
        if is_best:
            self._best = None
        return None
