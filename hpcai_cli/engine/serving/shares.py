"""How many connections each worker has, in memory that all of them see: the next ones go where there are few."""

import mmap

_NOT_THERE = 2**31 - 1


class Shares:
    """A number for each worker; made by their parent."""

    def __init__(self, workers: int):
        self._counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("i")
        for slot in range(workers):
            self.leave(slot)

    def put(self, slot: int, count: int) -> None:
        """Say how many connections a worker has."""
        self._counts[slot] = count

    def leave(self, slot: int) -> None:
        """Say that a worker takes none."""
        self._counts[slot] = _NOT_THERE

    def others(self, slot: int) -> list[int]:
        """Return the numbers of the other workers that take connections."""
        return [count for place, count in enumerate(self._counts) if place != slot and count != _NOT_THERE]
