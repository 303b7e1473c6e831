"""Predictions for files: in batches, each file on its own, an unreadable one reported and passed."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.evaluation import log_probabilities
from hpcai_cli.engine.images import read_image
from hpcai_cli.errors import DataError

BATCH_SIZE = 32
"""Files per forward pass; a pipe sees its answers after so many."""


def predict(files: Iterable[str], *, run_forward: Callable, shape: tuple[int, int, int],
            class_names: tuple[str, ...]) -> Iterator[dict]:
    """Yield for each file, in order, `file`, `label` and `probability`, or `file` and `error`."""
    files = iter(files)
    while names := list(islice(files, BATCH_SIZE)):
        answers, images, places = [], np.zeros((BATCH_SIZE, *shape), np.uint8), []
        for name in names:
            try:
                images[len(places)] = read_image(Path(name), shape)
                places.append(len(answers))
                answers.append({"file": name})
            except DataError as error:
                answers.append({"file": name, "error": str(error)})
        if places:
            # Always the same shape, so that TensorFlow compiles once.
            scores = run_forward(tf.constant(images)).numpy()[:len(places)]
            probabilities = np.exp(log_probabilities(scores))
            for place, row in zip(places, probabilities, strict=True):
                best = int(row.argmax())
                answers[place] |= {"label": class_names[best], "probability": float(row[best])}
        yield from answers
