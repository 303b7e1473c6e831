"""How the benchmarks measure: interleaved rounds, medians, ratios round by round, limits beside the figures.

Each benchmark is a module with a function `measure`, which returns or yields what it finds: figures, tables, curves.
"""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcai_cli.errors import HpcaiError

PROGRAM = str(Path(sys.executable).parent / "hpcai")
"""The console script of this environment, for benchmarks of whole commands."""


@dataclass(frozen=True)
class Figure:
    """One measured figure and the limit that it is held against."""

    benchmark: str
    name: str
    value: float
    unit: str
    limit: float | None = None
    """What the project promises; None for figures that are there to explain the others."""
    at_most: bool = False
    """Whether the limit is an upper bound."""
    rounds: tuple[float, ...] = ()
    """The values of which this is the median; empty for what was measured once."""

    @property
    def holds(self) -> bool | None:
        """Tell whether the limit holds, None without a limit."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def less_is_better(self) -> bool | None:
        """Tell which way is better; None where neither is."""
        if self.at_most or self.unit in _LESS_IS_BETTER:
            return True
        return False if self.limit is not None or "/" in self.unit or self.unit in _MORE_IS_BETTER else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return where the median lies with 95 % confidence; None for what was measured once."""
        return interval(self.rounds) if self.rounds else None

    def to_json(self) -> dict:
        """Return the figure as JSON values, with its interval and whether its limit holds."""
        return {**asdict(self), "interval": self.interval, "holds": self.holds, "less_is_better": self.less_is_better}


@dataclass(frozen=True)
class Table:
    """Rows that belong together, such as one for each size."""

    benchmark: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple, ...]


@dataclass(frozen=True)
class Work:
    """Samples that were worked on: with --energy, what the joules of a sample are measured of.

    Attributes:
        samples: of each round.
        spans: when each round began and ended, unix times.
    """

    benchmark: str
    name: str
    samples: tuple[int, ...]
    spans: tuple[tuple[float, float], ...]


class Rounds(dict):
    """The values of each candidate, a list by name.

    Attributes:
        spans: when each of them was measured, from begin to end in unix time, a list by name.
    """

    def __init__(self, names: Iterable[str]):
        names = list(names)
        super().__init__({name: [] for name in names})
        self.spans: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def work(self, benchmark: str, candidate: str, name: str, samples: int) -> Work:
        """Return a candidate's rounds as work on so many samples each."""
        spans = tuple(self.spans[candidate])
        return Work(benchmark, name, (samples,) * len(spans), spans)


@dataclass(frozen=True)
class Curves:
    """Lines of points (x, y), to be drawn."""

    benchmark: str
    title: str
    x: str
    """What the x axis shows, with its unit; such as `bytes`."""
    y: str
    lines: Mapping[str, tuple[tuple[float, float], ...]]
    """By name; one whose name begins with `ideal` or `projected` is drawn dashed."""
    logarithmic: str = ""
    """Axes with a logarithmic scale: `x`, `y` or `xy`."""


_LESS_IS_BETTER = {"s", "ms", "us", "MiB", "MB", "J", "J/sample"}
_MORE_IS_BETTER = {"ratio", "GFLOP/s"}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return where the median of such values lies with 95 % confidence, whatever their distribution.

    Between two of the values in their order, by the binomial distribution; of fewer than six the smallest and the
    largest, which is less than 95 % (five: 94 %, three: 75 %).
    """
    ordered, count = sorted(values), len(values)
    place, below = 0, 0.5**count
    while below <= 0.025 and place < count // 2:
        place += 1
        below += math.comb(count, place) * 0.5**count
    place = max(place - 1, 0)
    return ordered[place], ordered[-1 - place]


def interleaved(rounds: int, **candidates: Callable[[], float]) -> Rounds:
    """Call the candidates in turn, A B A B, so that a machine whose speed drifts drifts for all of them."""
    found = Rounds(candidates)
    for _ in range(rounds):
        for name, candidate in candidates.items():
            started = mark()
            found[name].append(candidate())
            found.spans[name].append((started, mark()))
    return found


def mark() -> float:
    """Return the present moment as unix time; where energy is measured, its counters are read then."""
    return _clock()


def mark_by(clock: Callable[[], float]) -> None:
    """Have `mark` ask an energy meter, or `time.time` again."""
    global _clock
    _clock = clock


_clock: Callable[[], float] = time.time


def ratio(benchmark: str, name: str, over: list[float], under: list[float], **limits) -> Figure:
    """Return the median of the ratios round by round, with all of them."""
    ratios = [above / below for above, below in zip(over, under, strict=True)]
    return Figure(benchmark, name, statistics.median(ratios), "ratio", rounds=tuple(ratios), **limits)


def median(benchmark: str, name: str, values: list[float], unit: str, **limits) -> Figure:
    """Return the median of the values, with all of them."""
    return Figure(benchmark, name, statistics.median(values), unit, rounds=tuple(values), **limits)


def rate(work: Callable[[], int]) -> float:
    """Return how many units the work does in a second; it returns how many it did."""
    started = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - started)


def run_json(command: list[str]):
    """Run a program and return the JSON value on the last line of its output.

    Raises:
        HpcaiError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise HpcaiError(f"a program of the benchmark failed with exit code {done.returncode}",
                         mend=f"run `{' '.join(command)}`", received=said[0])
    return json.loads(done.stdout.splitlines()[-1])
