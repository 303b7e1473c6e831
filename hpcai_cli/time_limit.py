"""Ends a job ahead of its time limit, with a checkpoint: --max-time's, or the one that Slurm has for it."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpcai_cli import durations, slurm
from hpcai_cli.signals import StopRequest

ASKED_SECONDS = 300
"""How often Slurm is asked: limits can be changed while a job runs."""
_LOOK_SECONDS = 0.2


class TimeLimit:
    """What is left for a training.

    Args:
        seconds: of --max-time, from now on; None for none.

    Attributes:
        saving: how long the training takes to notice, save itself and end, s; the training keeps it up to date.
    """

    def __init__(self, seconds: float | None):
        self._ends: dict[str, float] = {}
        self._lengths: dict[str, float] = {}
        self.saving = 1.0
        if seconds is not None:
            self._set(f"--max-time {durations.words(seconds)}", seconds)
        self._asked = float("-inf")

    @contextmanager
    def watching(self, stop: StopRequest) -> Iterator[None]:
        """Ask for the end in time while the block lasts."""
        done = threading.Event()

        def watch() -> None:
            while not done.wait(_LOOK_SECONDS):
                self._ask_slurm()
                # The training may take over limits meanwhile.
                for name, end in tuple(self._ends.items()):
                    if end - time.monotonic() < self._margin(name):
                        stop.ask(f"the time limit ({name})")
                        return

        thread = threading.Thread(target=watch, daemon=True, name="time limit")
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def left(self) -> dict[str, float]:
        """Return how many seconds are left of each limit."""
        return {name: end - time.monotonic() for name, end in self._ends.items()}

    def take(self, left: dict[str, float]) -> None:
        """Take over what is left for a job that began before this process."""
        for name, seconds in left.items():
            self._set(name, seconds)

    def _set(self, name: str, seconds: float) -> None:
        self._ends[name] = time.monotonic() + seconds
        self._lengths.setdefault(name, seconds)

    def _margin(self, name: str) -> float:
        # A machine that others use too is now and then slower than it has been; half of a very short limit is its own.
        return min(self._lengths[name] / 2, 2 * self.saving + min(30.0, 0.02 * self._lengths[name]))

    def _ask_slurm(self) -> None:
        if "SLURM_JOB_ID" in os.environ and time.monotonic() - self._asked >= ASKED_SECONDS:
            self._asked = time.monotonic()
            left = slurm.seconds_left(os.environ["SLURM_JOB_ID"])
            if left is not None:
                self._set("Slurm's", left)
