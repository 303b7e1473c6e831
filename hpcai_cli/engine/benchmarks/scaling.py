"""Scaling: two processes on two cores against one process on one core, the same batch per process."""

import json
import os
import subprocess
import tempfile
from pathlib import Path

from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, Setting, interleaved, median, ratio
from hpcai_cli.errors import MissingError
from hpcai_cli.launch import missing_package

ROUNDS = 5
EPOCHS = 2
"""The last one is measured; the first holds the compilation."""


def measure(setting: Setting) -> list[Figure]:
    """Run whole trainings, pinned to as many cores as they have processes.

    Raises:
        MissingError: Horovod or a second core is missing.
    """
    if missing_package("horovod") or machine.cores() < 2:
        raise MissingError("the scaling benchmark needs Horovod and two cores",
                           mend="run `hpcai doctor --build-horovod`", received=machine.cores())
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(1_000))
        rates = interleaved(
            ROUNDS,
            one=lambda: _rate(setting.data, 1, Path(folder) / str(next(numbers))),
            two=lambda: _rate(setting.data, 2, Path(folder) / str(next(numbers))))
    return [median("scaling", "one process on one core", rates["one"], "images/s"),
            median("scaling", "two processes on two cores", rates["two"], "images/s"),
            ratio("scaling", "efficiency of two processes", rates["two"], [2 * rate for rate in rates["one"]],
                  limit=0.90)]


def _rate(data: Path, processes: int, output: Path) -> float:
    cores = sorted(os.sched_getaffinity(0))[:processes]
    subprocess.run([PROGRAM, "train", "mnist", "--data", str(data), "--np", str(processes), "--epochs", str(EPOCHS),
                    "--output", str(output)], capture_output=True, check=True,
                   preexec_fn=lambda: os.sched_setaffinity(0, cores))
    last = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    return [event for event in last if event["event"] == "epoch"][-1]["images_per_second"]
