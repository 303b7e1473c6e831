"""How the benchmarks measure: interleaved rounds, medians, ratios round by round, limits beside the figures."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hpcai_cli.errors import HpcaiError
from hpcai_cli.recipe import Recipe

PROGRAM = str(Path(sys.executable).parent / "hpcai")
"""The console script of this environment, for benchmarks of whole commands."""


@dataclass(frozen=True)
class Setting:
    """What the benchmarks measure with."""

    data: Path
    """MNIST's dataset file."""
    recipes: Mapping[str, tuple[Recipe, Callable]]
    """Recipe and build_model by name: `mnist`, `mnist-mlp` and `dogs-vs-cats`."""
    augment: Callable
    """The augmentation of dogs-vs-cats: augment(images, seed, recipe) -> images."""
    photographs: Path | None = None
    """The user's photographs of dogs and cats, a folder or an archive; None where the benchmarks make their own."""
    epochs: int = 15
    """Epochs of the whole tutorial."""
    peers: Mapping[str, str] = field(default_factory=dict)
    """For serve, the Python that has each of the other servers, by name."""


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
    spread: tuple[float, float] | None = None
    """Smallest and largest value of the rounds."""

    @property
    def holds(self) -> bool | None:
        """Tell whether the limit holds, None without a limit."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict:
        """Return the figure as JSON values, with whether its limit holds."""
        return {**asdict(self), "holds": self.holds}


def interleaved(rounds: int, **candidates: Callable[[], float]) -> dict[str, list[float]]:
    """Call the candidates in turn, A B A B, so that a machine whose speed drifts drifts for all of them."""
    values = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, candidate in candidates.items():
            values[name].append(candidate())
    return values


def ratio(benchmark: str, name: str, over: list[float], under: list[float], **limits) -> Figure:
    """Return the median of the ratios round by round, with their spread."""
    ratios = [above / below for above, below in zip(over, under, strict=True)]
    return Figure(benchmark, name, statistics.median(ratios), "ratio", spread=(min(ratios), max(ratios)), **limits)


def median(benchmark: str, name: str, values: list[float], unit: str, **limits) -> Figure:
    """Return the median of the values, with their spread."""
    return Figure(benchmark, name, statistics.median(values), unit, spread=(min(values), max(values)), **limits)


def rate(work: Callable[[], int]) -> float:
    """Return how many units the work does in a second; it returns how many it did."""
    started = time.perf_counter()
    units = work()
    return units / (time.perf_counter() - started)


def run_json(command: list[str]) -> dict:
    """Run a program and return the JSON document on the last line of its output.

    Raises:
        HpcaiError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        raise HpcaiError(f"a program of the benchmark failed with exit code {done.returncode}",
                         mend=f"run `{' '.join(command)}`", received=said[0])
    return json.loads(done.stdout.splitlines()[-1])
