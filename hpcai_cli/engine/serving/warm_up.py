"""Opens a model, runs it before anybody waits for it, and measures what it takes."""

import time
from collections.abc import Callable

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.batching import Cost
from hpcai_cli.engine.serving.runners import open_scores
from hpcai_cli.errors import DataError

_SMALL_FILE = 8 << 20
"""Bytes of a model that may be opened once for each size of a batch."""
_SECONDS = 0.05
"""For which a size is measured; twice at least."""

_QUICK_SECONDS = 0.005
"""Of a full batch, for which one thread is enough."""

Scores = Callable[[np.ndarray], np.ndarray]


def opened(artefact: Artefact, *, threads: int, trust: bool, tried: bool, max_batch: int) -> tuple[Scores, Cost]:
    """Return a model's function from inputs to scores, warmed up, and what it takes.

    Args:
        threads: at most; a model that is quick with one gets no more, which would cost other work more than they help.
        trust, tried: as `runners.scores_of` takes them.

    Raises:
        DataError: the model is broken, unsafe or does not fit its artefact.json.
        MissingError: its library is not installed.
    """
    scores, cost = _measured(artefact, 1, trust, tried, max_batch)
    if threads == 1 or cost.of(max_batch) < _QUICK_SECONDS:
        return scores, cost
    several = _measured(artefact, threads, trust, True, max_batch)
    return several if several[1].each < cost.each else (scores, cost)


def _measured(artefact: Artefact, threads: int, trust: bool, tried: bool, max_batch: int) -> tuple[Scores, Cost]:
    scores = open_scores(artefact, threads=threads, trust=trust, tried=tried, most=max_batch)
    if artefact.kind == "tflite" and artefact.file.stat().st_size <= _SMALL_FILE and max_batch > 1:
        # TFLite plans its memory anew whenever the size changes, which takes longer than a small model does.
        sizes = [1 << power for power in range(max_batch.bit_length() - 1, -1, -1)]
        again = [open_scores(artefact, threads=threads, tried=True) for _ in sizes[1:]]
        scores = in_sizes(dict(zip(sizes, [scores, *again], strict=True)))
    dtype = np.uint8 if artefact.inputs == "images" else np.float32
    one, full = (_seconds(scores, np.zeros((size, *artefact.input_shape), dtype), artefact)
                 for size in (1, max_batch))
    return scores, Cost(one, full / max_batch)


def in_sizes(by_size: dict[int, Scores]) -> Scores:
    """Return a function that cuts any batch into sizes, given from the largest to 1, each for a function of its own."""
    def scores(inputs: np.ndarray) -> np.ndarray:
        if (whole := by_size.get(len(inputs))) is not None:
            return whole(inputs)
        parts, start = [], 0
        for size, run in by_size.items():
            while len(inputs) - start >= size:
                parts.append(run(inputs[start:start + size]))
                start += size
        return np.concatenate(parts)
    return scores


def _seconds(scores: Scores, inputs: np.ndarray, artefact: Artefact) -> float:
    """Return the median seconds of a call, the first ones apart, which are slower."""
    spent, until = [], time.perf_counter() + _SECONDS
    while len(spent) < 2 or (time.perf_counter() < until and len(spent) < 50):
        started = time.perf_counter()
        found = scores(inputs)
        spent.append(time.perf_counter() - started)
        if found.shape != (len(inputs), artefact.columns):
            raise DataError(f"the model in {artefact.folder} gives other scores than its artefact.json says",
                            expected=(len(inputs), artefact.columns), received=found.shape)
    return float(np.median(spent[1:]))
