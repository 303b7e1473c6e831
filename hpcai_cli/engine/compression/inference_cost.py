"""What a model costs in use: bytes, plain and packed; latency; peak memory. Candidates are timed in turn."""

import gzip
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hpcai_cli.errors import HpcaiError

BATCH_SIZES = (1, 32)
ROUNDS = 7
SECONDS = 0.15
"""Of one candidate in one round; the round's figure is the mean over as many calls as fit."""


def file_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of a model file and those of it packed by gzip."""
    content = path.read_bytes()
    return {"bytes": len(content), "bytes_gzipped": len(gzip.compress(content, 6))}


def latencies(candidates: Mapping[str, Callable[[np.ndarray], np.ndarray]], inputs: np.ndarray) -> dict[str, dict]:
    """Return for each candidate the milliseconds of one call, by batch size, each the median of interleaved rounds.

    Args:
        candidates: inference by name, inputs as stored (b, ...) -> scores.
        inputs: at least as many examples as the largest batch.
    """
    found = {name: {} for name in candidates}
    for size in BATCH_SIZES:
        batch = np.ascontiguousarray(np.resize(inputs, (size, *inputs.shape[1:])))
        for forward in candidates.values():
            forward(batch), forward(batch)
        rounds = {name: [] for name in candidates}
        for _ in range(ROUNDS):
            for name, forward in candidates.items():
                rounds[name].append(_seconds(forward, batch))
        for name, values in rounds.items():
            found[name][str(size)] = 1000 * statistics.median(values)
    return found


def _seconds(forward: Callable, batch: np.ndarray) -> float:
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < SECONDS or not calls:
        forward(batch)
        calls += 1
    return spent / calls


def peak_memory(folder: Path, *, trust: bool) -> float:
    """Return the peak resident memory, in MB, of a process of its own that opens a model and answers 32 examples.

    The frameworks are in it: what counts is the difference between models.

    Raises:
        HpcaiError: the process failed.
    """
    environ = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "-1"}
    command = [sys.executable, "-m", "hpcai_cli.engine.compression.inference_cost", str(folder)]
    done = subprocess.run([*command, *(["--trust-model"] if trust else [])], env=environ, capture_output=True,
                          text=True, check=False)
    try:
        return float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        raise HpcaiError(f"cannot measure the memory of {folder}",
                         received=done.stderr.strip().splitlines()[-1:]) from None


def _main(folder: str, *flags: str) -> None:
    from hpcai_cli.engine.inference import open_model

    opened = open_model(Path(folder), trust=bool(flags))
    kind = np.uint8 if opened.recipe.inputs == "images" else np.float32
    opened.forward(np.zeros((BATCH_SIZES[-1], *opened.recipe.input_shape), kind))
    # The kernel's ru_maxrss would be that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    print(sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6)


if __name__ == "__main__":
    _main(*sys.argv[1:])
