"""Whole trainings for `hpcai benchmark scaling`: ranks on cores of their own against one process on one core."""

import csv
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, interleaved, median, ratio
from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.errors import HpcaiError
from hpcai_cli.signals import sigterm_interrupts

ROUNDS = 3
EPOCHS = 2
"""The last one is measured; the first holds the compilation."""
LARGE = {"batch_size": "32", "accumulation_steps": "32"}
"""A step as large jobs have it. Parts of 32 images fit into a core's cache; Horovod's own work is the same for each
step, so that the size of a step decides how much of the time it takes."""
SETTINGS = (LARGE, {})
"""What is set; without anything, the recipe as it is."""


def measure(reference: str, data: Path, batch_size: int, cores: list[list[int]]) -> Iterator[Figure]:
    """Yield what whole trainings reach, of the recipe as it is and with steps of 1,024 images.

    Args:
        reference: what finds the recipe.
        batch_size: the recipe's.
        cores: of each rank, its own.
    """
    count, each = len(cores), len(cores[0])
    one = f"one process on {'one core' if each == 1 else f'{each} cores'}"
    many = f"{'two' if count == 2 else count} processes on {'two' if count * each == 2 else count * each} cores"
    for values in SETTINGS:
        images = int(values.get("batch_size", batch_size)) * int(values.get("accumulation_steps", 1))
        name = f"{images:,} images a step and process"
        console.note(f"whole trainings, {name}: {ROUNDS} rounds of three")
        with tempfile.TemporaryDirectory() as folder:
            trainings = _Trainings(reference, data, Path(folder), values, cores)
            rates = interleaved(ROUNDS, one=trainings.one, together=trainings.together, apart=trainings.apart)
        ideal = [count * rate for rate in rates["one"]]
        yield median("scaling", f"{name}: {one}", rates["one"], "images/s")
        yield median("scaling", f"{name}: {many}", rates["together"], "images/s")
        # The promise is for two cores.
        yield ratio("scaling", f"{name}: efficiency", rates["together"], ideal,
                    limit=0.93 if values and count == 2 else None)
        # What this machine gives to processes that don't know of each other: memory is shared, not multiplied.
        yield ratio("scaling", f"{name}: {'two' if count == 2 else count} unconnected processes", rates["apart"], ideal)
        yield ratio("scaling", f"{name}: against those", rates["together"], rates["apart"])


class _Trainings:
    """Starts trainings and reads the rate of their last epoch, in images per second of the whole job."""

    def __init__(self, reference: str, data: Path, folder: Path, values: dict[str, str], cores: list[list[int]]):
        self._folder, self._cores, self._number = folder, cores, 0
        self._words = [PROGRAM, "train", reference, "--data", str(data), "--epochs", str(EPOCHS),
                       *(f"--set={key}={value}" for key, value in values.items())]

    def one(self) -> float:
        """One process on the cores of one."""
        return self._rate([(1, self._cores[0])])

    def together(self) -> float:
        """Ranks that train one network."""
        return self._rate([(len(self._cores), [core for cores in self._cores for core in cores])])

    def apart(self) -> float:
        """As many processes that don't know of each other, each on cores of its own."""
        return self._rate([(1, cores) for cores in self._cores])

    def _rate(self, jobs: list[tuple[int, list[int]]]) -> float:
        """Run trainings of so many ranks on such cores side by side, and return the sum of their rates."""
        started = []
        with sigterm_interrupts():
            try:
                for processes, cores in jobs:
                    started.append(self._start(processes, cores))
                return sum(self._finish(process, output) for process, output in started)
            finally:
                for process, _ in started:
                    end_group(process)

    def _start(self, processes: int, cores: list[int]) -> tuple[subprocess.Popen, Path]:
        self._number += 1
        output = self._folder / str(self._number)
        return subprocess.Popen(
            [*self._words, "--np", str(processes), "--output", str(output)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            preexec_fn=lambda: os.sched_setaffinity(0, cores)), output

    def _finish(self, process: subprocess.Popen, output: Path) -> float:
        if process.wait() != 0:
            raise HpcaiError("a training of the scaling benchmark failed",
                             mend=f"run `hpcai train {self._words[2]} --np {len(self._cores)}`",
                             received=process.returncode)
        with (output / "history.csv").open() as stream:
            return float(list(csv.DictReader(stream))[-1]["images_per_second"])
