"""The lock of a study's journal: let go of by the system when its holder is killed, and mending what that one tore."""

import fcntl
import os
from pathlib import Path


class JournalLock:
    """Lets one process at a time write to a journal, in the place of Optuna's locks.

    Those are files that a killed process leaves, and of half a line that it leaves the next one makes a journal that
    nobody can read.

    Args:
        journal: whose lines end in a line feed.
    """

    def __init__(self, journal: Path):
        self._journal = journal
        self._descriptor = -1

    def acquire(self) -> bool:
        """Wait for the lock."""
        descriptor = os.open(self._journal, os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _cut(descriptor)
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Let the next one write."""
        os.close(self._descriptor)
        self._descriptor = -1


def _cut(descriptor: int) -> None:
    """Take away what stands behind the last line feed."""
    size = end = os.fstat(descriptor).st_size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(descriptor, end)
