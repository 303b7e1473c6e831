"""Answers examples with an exported model in a process of its own, as a server would run it, and times it there.

What it opens may be broken or foreign: its memory is bounded, and a crash is the end of this process alone.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.runners import open_scores
from hpcai_cli.errors import DataError, HpcaiError, MissingError, printable

BATCH_SIZES = (1, 8, 32)
"""Batches that are timed."""
ROUNDS = 7
SECONDS = 0.1
"""Of each batch size in each round."""
LONGEST = 1800
"""Seconds that a trial may take."""


def answer(folder: Path, inputs: np.ndarray, *, threads: int, trust: bool = False) -> tuple[np.ndarray, dict]:
    """Return the scores, float32 (n, columns), of an export for inputs as stored, and what answering cost.

    The cost: `milliseconds` of one call by batch size, `peak_memory_mb` of the process, `open_seconds` from the start
    of the process to the opened model.

    Raises:
        DataError: the model cannot be opened or does not answer.
        MissingError: its library is not installed.
    """
    with tempfile.TemporaryDirectory() as place:
        np.save(Path(place) / "inputs.npy", inputs)
        command = [sys.executable, "-m", "hpcai_cli.engine.serving.trial", str(folder), place, str(threads)]
        environ = os.environ | {"PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3",
                                "TRIAL_STARTED": str(time.time())}
        try:
            done = subprocess.run([*command, *(["--trust-model"] if trust else [])], env=environ, timeout=LONGEST,
                                  capture_output=True, text=True, errors="replace", check=False)
        except subprocess.TimeoutExpired:
            raise DataError(f"the model in {folder} takes too long to answer",
                            expected=f"at most {LONGEST} s") from None
        if done.returncode == 0:
            return np.load(Path(place) / "scores.npy"), json.loads(done.stdout.splitlines()[-1])
    kind = {MissingError.exit_code: MissingError}.get(done.returncode, DataError)
    said = (done.stderr.strip().splitlines() or [f"it ends its process (exit status {done.returncode})"])[-1]
    raise kind(f"the model in {folder} cannot be used: {printable(said)}")


def _main(folder: str, place: str, threads: str, *flags: str) -> None:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        artefact = Artefact.open(Path(folder))
        artefact.verify()
        forward = open_scores(artefact, threads=int(threads), trust=bool(flags))
        inputs = np.load(Path(place) / "inputs.npy", mmap_mode="r")
        forward(np.ascontiguousarray(inputs[:1]))
        opened = time.time() - float(os.environ["TRIAL_STARTED"])
        size = BATCH_SIZES[-1]
        np.save(Path(place) / "scores.npy", np.concatenate(
            [forward(np.ascontiguousarray(inputs[start:start + size])) for start in range(0, len(inputs), size)]))
    except HpcaiError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    cost = {"milliseconds": _latencies(forward, inputs), "peak_memory_mb": _peak_memory(), "open_seconds": opened}
    print(json.dumps(cost))


def _latencies(forward, inputs: np.ndarray) -> dict[str, float]:
    """Return the milliseconds of one call by batch size, the median of interleaved rounds."""
    batches = {size: np.resize(inputs, (size, *inputs.shape[1:])) for size in BATCH_SIZES}
    rounds = {size: [] for size in BATCH_SIZES}
    for batch in batches.values():
        forward(batch), forward(batch)
    for _ in range(ROUNDS):
        for size, batch in batches.items():
            calls, started = 0, time.perf_counter()
            while (spent := time.perf_counter() - started) < SECONDS or not calls:
                forward(batch)
                calls += 1
            rounds[size].append(spent / calls)
    return {str(size): 1000 * statistics.median(found) for size, found in rounds.items()}


def _peak_memory() -> float:
    # The kernel's ru_maxrss would be that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


if __name__ == "__main__":
    _main(*sys.argv[1:])
