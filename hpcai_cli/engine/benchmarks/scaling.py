"""Scaling: two processes on two cores against one process on one core, the same batch per process."""

import csv
import os
import subprocess
import tempfile
from pathlib import Path

from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, Setting, interleaved, median, ratio
from hpcai_cli.errors import HpcaiError, MissingError
from hpcai_cli.launch import missing_package

ROUNDS = 3
EPOCHS = 3
"""The last one is measured; the first holds the compilation."""
SETTINGS = {"1,024 images a step and process": {"batch_size": "32", "accumulation_steps": "32"},
            "64 images a step and process": {}}
"""A step as large jobs have it, and the recipe as it is. Parts of 32 images fit into a core's cache; Horovod's own work
is the same for each step, so that the size of a step decides how much of the time it takes."""


def measure(setting: Setting) -> list[Figure]:
    """Run whole trainings, pinned to as many cores as they have processes.

    Raises:
        MissingError: Horovod or a second core is missing.
    """
    if missing_package("horovod") or machine.cores() < 2:
        raise MissingError("the scaling benchmark needs Horovod and two cores",
                           mend="run `hpcai doctor --build-horovod`", received=machine.cores())
    figures = []
    for number, (name, values) in enumerate(SETTINGS.items()):
        with tempfile.TemporaryDirectory() as folder:
            trainings = _Trainings(setting.data, Path(folder), values)
            rates = interleaved(ROUNDS, one=trainings.one, two=trainings.two, apart=trainings.two_apart)
        twice = [2 * rate for rate in rates["one"]]
        figures += [
            median("scaling", f"{name}: one process on one core", rates["one"], "images/s"),
            median("scaling", f"{name}: two processes on two cores", rates["two"], "images/s"),
            ratio("scaling", f"{name}: efficiency", rates["two"], twice, limit=0.90 if number == 0 else None),
            # What this machine gives to two processes that don't know of each other: memory is shared, not doubled.
            ratio("scaling", f"{name}: two unconnected processes", rates["apart"], twice),
            ratio("scaling", f"{name}: against those", rates["two"], rates["apart"])]
    return figures


class _Trainings:
    """Starts trainings and reads the rate of their last epoch, in images per second of the whole job."""

    def __init__(self, data: Path, folder: Path, values: dict[str, str]):
        self._data, self._folder, self._number = data, folder, 0
        self._words = ["--epochs", str(EPOCHS), *(f"--set={key}={value}" for key, value in values.items())]

    def one(self) -> float:
        """One process on one core."""
        return self._finish(self._start(1, [0]))

    def two(self) -> float:
        """Two ranks on two cores."""
        return self._finish(self._start(2, [0, 1]))

    def two_apart(self) -> float:
        """Two processes that don't know of each other, each on a core of its own."""
        return sum(self._finish(started) for started in [self._start(1, [0]), self._start(1, [1])])

    def _start(self, processes: int, cores: list[int]) -> tuple[subprocess.Popen, Path]:
        self._number += 1
        output = self._folder / str(self._number)
        mine = sorted(os.sched_getaffinity(0))
        return subprocess.Popen(
            [PROGRAM, "train", "mnist", "--data", str(self._data), "--np", str(processes), "--output", str(output),
             *self._words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            preexec_fn=lambda: os.sched_setaffinity(0, [mine[core] for core in cores])), output

    def _finish(self, started: tuple[subprocess.Popen, Path]) -> float:
        process, output = started
        if process.wait() != 0:
            raise HpcaiError("a training of the scaling benchmark failed", mend="run `hpcai train mnist --np 2`",
                             received=process.returncode)
        with (output / "history.csv").open() as stream:
            return float(list(csv.DictReader(stream))[-1]["images_per_second"])
