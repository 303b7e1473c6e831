"""Opens a model, runs it before anybody waits for it, and measures what it takes."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.batching import Cost
from hpcai_cli.engine.serving.runners import open_scores
from hpcai_cli.errors import DataError

_SMALL_FILE = 8 << 20
"""Bytes of a model that may be opened once for each size of a batch."""
_SECONDS = 0.03
"""For which a size is measured; twice at least."""
_GAIN = 0.03
"""Share of an example's time that a larger batch must save."""
_QUICK_SECONDS = 0.005
"""Of a full batch, for which one thread is enough."""

Scores = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Warm:
    """A model that is ready to answer."""

    scores: Scores
    """From inputs (b, ...) to float32 (b, columns)."""
    cost: Cost
    batch: int
    """Examples that it should get at once: more than one only where each of them is answered sooner then."""


def opened(artefact: Artefact, *, threads: int, trust: bool, tried: bool, max_batch: int) -> Warm:
    """Open a model, warm it up, and measure what it takes.

    Args:
        threads: at most; a model that is quick with one gets no more, which would cost other work more than they help.
        trust, tried: as `runners.scores_of` takes them.

    Raises:
        DataError: the model is broken, unsafe or does not fit its artefact.json.
        MissingError: its library is not installed.
    """
    warm = _measured(artefact, 1, trust, tried, max_batch)
    if threads == 1 or warm.cost.of(max_batch) < _QUICK_SECONDS:
        return warm
    several = _measured(artefact, threads, trust, True, max_batch)
    return several if several.cost.each < warm.cost.each else warm


def _measured(artefact: Artefact, threads: int, trust: bool, tried: bool, max_batch: int) -> Warm:
    first = open_scores(artefact, threads=threads, trust=trust, tried=tried, most=max_batch)
    # TFLite plans its memory anew whenever the size changes, which takes longer than a small model does.
    fixed = artefact.kind == "tflite" and artefact.file.stat().st_size <= _SMALL_FILE
    by_size, each, best = {}, {}, 1
    for size in _sizes(max_batch):
        by_size[size] = open_scores(artefact, threads=threads, tried=True) if fixed and size > 1 else first
        each[size] = _seconds(by_size[size], size, artefact) / size
        if each[size] < (1 - _GAIN) * each[best]:
            best = size
        elif size > 2 * best:
            # Two sizes in a row have saved nothing.
            break
    kept = {size: by_size[size] for size in sorted(by_size, reverse=True) if size <= best}
    return Warm(in_sizes(kept) if fixed else first, Cost(each[1], each[best]), best)


def _sizes(most: int) -> list[int]:
    """Return the powers of two up to a number, and the number."""
    return sorted({1 << power for power in range(most.bit_length())} | {most})


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


def _seconds(scores: Scores, size: int, artefact: Artefact) -> float:
    """Return the median seconds of a call with a batch of a size, the first one apart, which is slower."""
    dtype = np.uint8 if artefact.inputs == "images" else np.float32
    inputs = np.zeros((size, *artefact.input_shape), dtype)
    spent, until = [], time.perf_counter() + _SECONDS
    while len(spent) < 2 or (time.perf_counter() < until and len(spent) < 50):
        started = time.perf_counter()
        found = scores(inputs)
        spent.append(time.perf_counter() - started)
        if found.shape != (len(inputs), artefact.columns):
            raise DataError(f"the model in {artefact.folder} gives other scores than its artefact.json says",
                            expected=(len(inputs), artefact.columns), received=found.shape)
    return float(np.median(spent[1:]))
