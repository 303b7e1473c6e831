"""A power meter's file: a line for each reading, written while the job runs."""

import math
from pathlib import Path

import numpy as np

from hpcai_cli.errors import DataError, printable

LOOK_BACK = 8192
"""Bytes before the end of the file, as it was at the start, that are read too: the reading just before the start."""
LONGEST_GAP = 5.0
"""Median distances that two readings may lie apart."""
LONGEST_EDGE = 1.5
"""The same for the first reading and the start, the last and the end, where the reading is taken to hold."""
SMALL_GAP = 0.05
"""Share of the time that is always short enough to do without a reading."""
FEWEST = 2
"""Readings from which on there is a distance between them."""


class PowerFile:
    """Readings of a power meter.

    A line is `unix_seconds watts`, or `watts` alone where the readings stand at equal distances. Empty lines and lines
    that begin with # are left out.

    Raises:
        DataError: it is no file that can be read.
    """

    def __init__(self, path: Path):
        self.path, self._begun = path, 0
        try:
            if not path.is_file():
                raise OSError("there is no such file")
            path.open("rb").close()
        except OSError as error:
            raise DataError(f"the power meter's file cannot be read: {error.strerror or error}", received=str(path),
                            expected="a file to which the meter appends lines of `unix_seconds watts` or `watts`"
                            ) from None

    def begin(self) -> None:
        """Remember how long the file is when the measurement begins.

        Raises:
            OSError: the file cannot be read any more.
        """
        self._begun = self.path.stat().st_size

    def joules(self, started: float, ended: float, *, part: bool = False) -> float:
        """Return the energy between two unix times, from `begin` to now.

        Args:
            part: they are those of a part of this time, of which readings without times say nothing.

        Raises:
            OSError: the file cannot be read any more, or its readings don't tell.
        """
        lines = self._lines()
        readings = [self._reading(line) for _, line in lines]
        if len({len(reading) for reading in readings}) > 1:
            raise OSError(f"{self.path} mixes lines of `watts` and of `unix_seconds watts`")
        if readings and len(readings[0]) == 1:
            if part:
                raise OSError(f"the readings in {self.path} have no times, so that nothing can be said of a part")
            # Without times only the place tells which were written meanwhile.
            return self._mean([watts for (start, _), (watts,) in zip(lines, readings, strict=True)
                               if start >= self._begun]) * (ended - started)
        return self._trapezoids(np.array(readings).reshape(-1, 2), started, ended)

    def _lines(self) -> list[tuple[int, str]]:
        """Return the whole lines from a little before the beginning on, each with its place in the file."""
        if self.path.stat().st_size < self._begun:
            raise OSError(f"{self.path} has become shorter")
        first = max(0, self._begun - LOOK_BACK)
        with self.path.open("rb") as stream:
            stream.seek(first)
            content = stream.read()
        start, found = first, []
        for line in content.splitlines(keepends=True):
            # The first may begin before what was read, and the last is not yet written to its end.
            if (start > first or first == 0) and line.endswith(b"\n"):
                found.append((start, line.decode(errors="replace").strip()))
            start += len(line)
        return [(place, line) for place, line in found if line and not line.startswith("#")]

    def _reading(self, line: str) -> tuple[float, ...]:
        try:
            numbers = tuple(float(word) for word in line.split())
        except ValueError:
            numbers = ()
        if len(numbers) not in (1, 2) or not all(math.isfinite(number) and number >= 0 for number in numbers):
            raise OSError(f"a line of {self.path} is neither `watts` nor `unix_seconds watts`: {printable(line)!r}")
        return numbers

    def _mean(self, watts: list[float]) -> float:
        if len(watts) < FEWEST:
            raise OSError(f"{self.path} got {len(watts)} readings meanwhile, and {FEWEST} are needed")
        return float(np.mean(watts))

    def _trapezoids(self, readings: np.ndarray, started: float, ended: float) -> float:
        """Return the area below the readings, float64 (n, 2) of seconds and watts, between two times."""
        times, watts = readings.T
        if len(times) < FEWEST:
            raise OSError(f"{self.path} holds {len(times)} readings of this time, and {FEWEST} are needed")
        distances = np.diff(times)
        if (distances <= 0).any():
            raise OSError(f"the times in {self.path} go back or stand still")
        gap = _missing(times, distances, started, ended)
        if gap > SMALL_GAP * (ended - started):
            raise OSError(f"{self.path} has no reading for {gap:.1f} of {ended - started:.1f} seconds")
        knots = np.concatenate([[started], times[(times > started) & (times < ended)], [ended]])
        values = np.interp(knots, times, watts)
        return float(np.sum(np.diff(knots) * (values[1:] + values[:-1]) / 2))


def _missing(times: np.ndarray, distances: np.ndarray, started: float, ended: float) -> float:
    """Return the longest time, in seconds, between two times that lies too far from any reading."""
    usual = float(np.median(distances))
    gaps = [(one, other) for one, other, distance in zip(times, times[1:], distances, strict=False)
            if distance > LONGEST_GAP * usual]
    gaps += [(-math.inf, times[0] - LONGEST_EDGE * usual), (times[-1] + LONGEST_EDGE * usual, math.inf)]
    return float(max(min(other, ended) - max(one, started) for one, other in gaps))
