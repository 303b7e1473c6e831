"""Predictions for files: in batches, each file on its own, an unreadable one reported and passed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from hpcai_cli.engine.evaluation import answers, log_probabilities
from hpcai_cli.engine.raw.images import read_image
from hpcai_cli.errors import DataError

BATCH_SIZE = 32
"""Files or rows per forward pass; a pipe sees its answers after so many."""


def predict_images(files: Iterable[str], *, run_forward: Callable, shape: tuple[int, int, int],
                   class_names: tuple[str, ...], threshold: float | None = None) -> Iterator[dict]:
    """Yield for each file, in order, `file` and its answer (`label` and `probability`, or `value`), or `error`.

    Args:
        run_forward: a model's inference as `inference.open_model` gives it.
        class_names: empty for a regression.
        threshold: of two classes, the probability from which on the second is the answer.
    """
    files = iter(files)
    while names := list(islice(files, BATCH_SIZE)):
        said, images, places = [], np.zeros((BATCH_SIZE, *shape), np.uint8), []
        for name in names:
            try:
                images[len(places)] = read_image(Path(name), shape)
                places.append(len(said))
                said.append({"file": name})
            except DataError as error:
                said.append({"file": name, "error": str(error)})
        if places:
            # Always the same shape, so that TensorFlow compiles once.
            scores = run_forward(images)[:len(places)]
            for place, answer in zip(places, _answered(scores, class_names, threshold), strict=True):
                said[place] |= answer
        yield from said


def predict_rows(files: Iterable[str], *, run_forward: Callable, details: Mapping, class_names: tuple[str, ...],
                 threshold: float | None = None) -> Iterator[dict]:
    """Yield for each row of each CSV file, in order, `file`, `row` (from 1) and its answer, or `error`.

    A file that cannot be read at all gives one line with `file` and `error`.

    Args:
        details: how the training data's columns came about, as `table_encoding.encode` tells it.
    """
    from hpcai_cli.engine.raw.table_encoding import encode_rows

    for name in files:
        try:
            inputs, problems = encode_rows(Path(name), details)
        except DataError as error:
            yield {"file": name, "error": str(error)}
            continue
        reasons = dict(problems)
        for start in range(0, len(inputs), BATCH_SIZE):
            part = inputs[start:start + BATCH_SIZE]
            padded = np.zeros((BATCH_SIZE, inputs.shape[1]), np.float32)
            padded[:len(part)] = part
            scores = run_forward(padded)[:len(part)]
            for place, answer in enumerate(_answered(scores, class_names, threshold), start):
                yield {"file": name, "row": place + 1, **({"error": reasons[place]} if place in reasons else answer)}


def _answered(scores: np.ndarray, class_names: tuple[str, ...], threshold: float | None) -> list[dict]:
    if not class_names:
        return [_finite({"value": float(value)}) for value in scores[:, 0]]
    probabilities = np.exp(log_probabilities(scores))
    return [_finite({"label": class_names[best], "probability": float(row[best])})
            for best, row in zip(answers(scores, threshold).tolist(), probabilities, strict=True)]


def _finite(answer: dict) -> dict:
    """Return the answer, or an error where it is no number: JSON has none for it, and its label would be chance."""
    number = [*answer.values()][-1]
    return answer if math.isfinite(number) else {"error": f"the model's answer is {number}, which is no number"}
