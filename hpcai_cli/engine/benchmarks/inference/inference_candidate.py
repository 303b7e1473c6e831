"""The formats that are compared, each answering and being timed in a process of its own with so many threads.

TensorFlow takes its number of threads once in a process, TFLite's small runtime is not to stand beside it, and what a
format takes in memory is seen only where nothing else is.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli.engine.benchmarks.inference.inference_formats import FORMATS
from hpcai_cli.errors import DataError, HpcaiError, MissingError, printable

SECONDS = 0.3
"""Of one batch size in one round."""
MOST_CALLS = 20_000
"""In one round."""
EXAMPLES = 10_000
"""Of the test split that a format answers, at most: the first ones, or all."""


@dataclass(frozen=True)
class Task:
    """What a process is started for."""

    kind: str
    """One of FORMATS."""
    file: Path
    input_shape: tuple[int, ...]
    columns: int
    """Of the scores."""
    threads: int
    sizes: tuple[int, ...]
    """Of the batches."""
    data: Path | None = None
    """Dataset file whose test split it answers."""
    trust: bool = False


class Candidate:
    """A process that has opened a model and answered; it waits to be timed, and ends with the context.

    Attributes:
        cost: `open_seconds` from its start to the first answer, and `peak_memory_mb` after a batch of each size.
        scores: its answers to the test split, float32 (n, columns); None without data.

    Args:
        inputs: examples as stored, at least as many as the largest batch has.

    Raises:
        DataError: the model cannot be opened or does not answer.
        MissingError: its library is not installed.
    """

    def __init__(self, task: Task, inputs: np.ndarray):
        self._task, self._place = task, tempfile.TemporaryDirectory()
        folder = Path(self._place.name)
        np.save(folder / "inputs.npy", inputs)
        (folder / "task.json").write_text(json.dumps(vars(task), default=str))
        threads = str(task.threads)
        environ = os.environ | {"PYTHONSAFEPATH": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1",
                                "OMP_NUM_THREADS": threads, "STARTED": str(time.time())}
        self._said = (folder / "said").open("w+")
        self._process = subprocess.Popen([sys.executable, "-m", __name__, str(folder)], env=environ, text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        try:
            self.cost = self._line()
            self.scores = np.load(folder / "scores.npy") if self._line() else None
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> "Candidate":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()
        self._place.cleanup()

    def times(self, size: int) -> list[float]:
        """Return the milliseconds of each call with a batch, of as many calls as fit into SECONDS, three at least.

        Raises:
            DataError: the process has ended.
        """
        try:
            self._process.stdin.write(f"{size}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._line()

    def _line(self):
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        said = (self._said.read().strip().splitlines() or [f"it ends its process (exit status {code})"])[-1]
        raise (MissingError if code == MissingError.exit_code else DataError)(printable(said))


# ---- In the process ------------------------------------------------------------------------------------------------

def _main(place: str) -> None:
    folder = Path(place)
    task = json.loads((folder / "task.json").read_text())
    # The same cores for all, whatever threads a library takes beside those that it is told.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:task["threads"]])
    # What a library prints is not to stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(what) -> None:
        print(json.dumps(what), file=answers, flush=True)

    inputs = np.load(folder / "inputs.npy")
    try:
        forward = _opened(task)
        forward(inputs[:1])
        opened = time.time() - float(os.environ["STARTED"])
        for size in task["sizes"]:
            forward(inputs[:size])
        say({"open_seconds": opened, "peak_memory_mb": _peak_memory()})
        if task["data"]:
            np.save(folder / "scores.npy", _scores(forward, Path(task["data"]), task["columns"]))
        say(bool(task["data"]))
    except HpcaiError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    for line in sys.stdin:
        say(_timed(forward, inputs[:int(line)]))


def _timed(forward: Callable, batch: np.ndarray) -> list[float]:
    # The first calls after another size, or after a rest, are those of no server that is busy.
    forward(batch), forward(batch)
    found, started = [], time.perf_counter()
    before = started
    while (before - started < SECONDS or len(found) < 3) and len(found) < MOST_CALLS:
        forward(batch)
        after = time.perf_counter()
        found.append(1000 * (after - before))
        before = after
    return found


def _opened(task: Mapping) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from inputs as stored, (b, *input_shape), to outputs or scores, (b, 1 or columns)."""
    kind, file, threads = task["kind"], Path(task["file"]), task["threads"]
    if FORMATS[kind].file in ("keras", "saved_model"):
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    if kind in ("keras", "keras-predict"):
        from hpcai_cli.engine import model_file

        model = model_file.load(file, trust=task["trust"])
        if kind == "keras":
            return lambda inputs: model(inputs, training=False).numpy()
        return lambda inputs: model.predict(inputs, batch_size=len(inputs), verbose=0)
    from hpcai_cli.engine.serving import runners

    return runners.scores_of(FORMATS[kind].file, file, input_shape=task["input_shape"], columns=task["columns"],
                             owner="the benchmark", threads=threads, trust=task["trust"], tried=True,
                             most=max(task["sizes"][-1], runners.LARGEST_BATCH))


def _scores(forward: Callable, data: Path, columns: int) -> np.ndarray:
    from hpcai_cli.engine.store import Dataset

    split, size, parts = Dataset(data).split("test"), 250, []
    count = min(len(split), EXAMPLES)
    inputs, labels = np.empty((size, *split.inputs.shape[1:]), split.inputs.dtype), np.empty(size, split.labels.dtype)
    for start in range(0, count, size):
        rows = np.arange(start, min(start + size, count))
        # The last batch is filled up to the common shape, or TensorFlow would compile for it.
        split.gather(np.resize(rows, size), inputs, labels)
        parts.append(np.asarray(forward(inputs), np.float32)[:len(rows)])
    scores = np.concatenate(parts)
    # A single output is the logit of the second of two classes.
    return np.concatenate([np.zeros_like(scores), scores], axis=1) if scores.shape[1] < columns else scores


def _peak_memory() -> float:
    # The kernel's ru_maxrss would be that of the process which started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


if __name__ == "__main__":
    _main(*sys.argv[1:])
