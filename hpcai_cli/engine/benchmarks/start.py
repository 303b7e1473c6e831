"""Start: how long a person waits for --help, and that no framework is loaded for it."""

import subprocess
import sys
import time
from collections.abc import Iterator

from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, interleaved, median

ROUNDS = 9
HEAVY = ("tensorflow", "keras", "numpy", "h5py", "horovod")


def measure() -> Iterator[Figure]:
    """Time whole processes, interleaved with a Python that does nothing."""
    seconds = interleaved(ROUNDS, bare=lambda: _seconds([sys.executable, "-c", "pass"]),
                          help=lambda: _seconds([PROGRAM, "--help"]),
                          train_help=lambda: _seconds([PROGRAM, "train", "--help"]))
    listing = subprocess.run([sys.executable, "-X", "importtime", PROGRAM, "train", "--help"], capture_output=True,
                             text=True, check=True).stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in listing.splitlines()}
    yield median("start", "python -c pass", seconds["bare"], "s")
    yield median("start", "hpcai --help", seconds["help"], "s", limit=0.25, at_most=True)
    yield median("start", "hpcai train --help", seconds["train_help"], "s", limit=0.35, at_most=True)
    yield Figure("start", "frameworks loaded by train --help", len(loaded & set(HEAVY)), "modules", 0, True)


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    return time.perf_counter() - started
