"""Answers examples with an exported model in a process of its own, as a server would run it, and times it there.

What it opens may be broken or foreign: its memory is bounded, and a crash is the end of this process alone.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.runners import open_scores
from hpcai_cli.engine.serving.sandbox import bound_memory
from hpcai_cli.errors import DataError, HpcaiError, MissingError, printable

BATCH_SIZES = (1, 8, 32)
"""Batches that are timed."""
ROUNDS = 7
SECONDS = 0.1
"""Of each batch size in each round."""
LONGEST = 1800
"""Seconds that a trial may take."""


class Trial:
    """A process that has opened an export and answered examples; it waits to be timed, and ends with the context.

    Attributes:
        scores: its answers, float32 (n, columns).
        cost: `peak_memory_mb` of the process, and `open_seconds` from its start to the opened model.

    Args:
        inputs: examples as stored, (n, *input_shape).
        trust: leave out the checks of what runs code.

    Raises:
        DataError: the model cannot be opened or does not answer.
        MissingError: its library is not installed.
    """

    def __init__(self, folder: Path, inputs: np.ndarray, *, threads: int, trust: bool = False):
        self._folder, self._place = folder, tempfile.TemporaryDirectory()
        np.save(Path(self._place.name) / "inputs.npy", inputs)
        command = [sys.executable, "-m", "hpcai_cli.engine.serving.trial", str(folder), self._place.name, str(threads)]
        environ = os.environ | {"PYTHONSAFEPATH": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "TRIAL_STARTED": str(time.time())}
        self._said = (Path(self._place.name) / "said").open("w+")
        self._process = subprocess.Popen([*command, *(["--trust-model"] if trust else [])], env=environ, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        self._watch = threading.Timer(LONGEST, self._process.kill)
        self._watch.start()
        try:
            self.cost = self._line()
            self.scores = np.load(Path(self._place.name) / "scores.npy")
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, *_) -> None:
        self._watch.cancel()
        self._process.kill()
        self._process.communicate()
        self._said.close()
        self._place.cleanup()

    def round(self) -> dict[str, float]:
        """Return the milliseconds of one call by batch size, the mean over as many calls as fit into SECONDS."""
        self._process.stdin.write("time\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        said = (self._said.read().strip().splitlines() or [f"it crashes (exit status {code})"])[-1]
        kind = MissingError if code == MissingError.exit_code else DataError
        raise kind(f"the model in {self._folder} cannot be used: {printable(said)}")


def latencies(trials: Sequence[Trial]) -> list[dict[str, float]]:
    """Return for each trial the milliseconds of one call by batch size, medians of rounds in which all take turns."""
    rounds = [[trial.round() for trial in trials] for _ in range(ROUNDS)]
    return [{size: statistics.median(found[place][size] for found in rounds) for size in map(str, BATCH_SIZES)}
            for place in range(len(trials))]


def _main(folder: str, place: str, threads: str, *flags: str) -> None:
    bound_memory()
    # What a library prints is not to stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        artefact = Artefact.open(Path(folder))
        artefact.verify()
        forward = open_scores(artefact, threads=int(threads), trust=bool(flags), tried=True)
        inputs = np.load(Path(place) / "inputs.npy", mmap_mode="r")
        forward(np.ascontiguousarray(inputs[:1]))
        opened = time.time() - float(os.environ["TRIAL_STARTED"])
        size = BATCH_SIZES[-1]
        np.save(Path(place) / "scores.npy", np.concatenate(
            [forward(np.ascontiguousarray(inputs[start:start + size])) for start in range(0, len(inputs), size)]))
    except HpcaiError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps({"peak_memory_mb": _peak_memory(), "open_seconds": opened}), file=answers, flush=True)
    batches = {size: np.resize(inputs, (size, *inputs.shape[1:])) for size in BATCH_SIZES}
    for _ in sys.stdin:
        found = {str(size): 1000 * _seconds(forward, batch) for size, batch in batches.items()}
        print(json.dumps(found), file=answers, flush=True)


def _seconds(forward: Callable, batch: np.ndarray) -> float:
    # The first call after another size plans its memory anew.
    forward(batch)
    calls, started = 0, time.perf_counter()
    while (spent := time.perf_counter() - started) < SECONDS or not calls:
        forward(batch)
        calls += 1
    return spent / calls


def _peak_memory() -> float:
    # The kernel's ru_maxrss would be that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


if __name__ == "__main__":
    _main(*sys.argv[1:])
