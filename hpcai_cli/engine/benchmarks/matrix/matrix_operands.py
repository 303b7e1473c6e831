"""The matrices that a distributed product multiplies, and the check of what comes out.

Each row is drawn from a seed of its own, so that any rank can make any part of A and B, and check its part of C by
itself.
"""

import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf

EPSILON = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7}
"""The distance from 1 to the next larger number."""
SAMPLES = 16
"""Rows of a rank's block that are checked one by one."""
_SEEDS = {"A": 1, "B": 2}
_CHUNK = 256
"""Rows that are made at a time."""


def make(matrix: str, rows: range, columns: range, size: int, dtype: str) -> np.ndarray:
    """Return a part of the matrix A or B, (len(rows), len(columns)): numbers between -1 and 1, as `dtype` rounds
    them."""
    part = np.empty((len(rows), len(columns)), tf.as_dtype(dtype).as_numpy_dtype)
    for number, row in enumerate(rows):
        values = np.random.default_rng((_SEEDS[matrix], row)).random(size)
        part[number] = 2 * values[columns.start:columns.stop] - 1
    return part


def errors(block, rows: range, columns: range, size: int, dtype: str) -> tuple[float, float]:
    """Compare a block of C = A B with numpy's product in float64.

    Some of its rows are compared as they are; a sum of all rows with random signs shows what is wrong in any other, as
    in the checksums of Huang and Abraham, Algorithm-based fault tolerance for matrix operations, IEEE Transactions on
    Computers C-33 (1984).

    Args:
        block: what was computed, (len(rows), len(columns)), anything that numpy can read.
        rows: which rows of C it holds.
        columns: which columns of C it holds.

    Returns:
        The scaled residual ||C - A B|| / (size epsilon ||A|| ||B||) in Frobenius norms of what is compared, and the
        largest difference over the root mean square of what is right.
    """
    weights = _weights(len(rows))
    left, found = np.zeros((len(weights), size)), np.zeros((len(weights), len(columns)))
    for chunk in _chunks(len(rows)):
        part = weights[:, chunk.start:chunk.stop]
        whole_rows = range(rows.start + chunk.start, rows.start + chunk.stop)
        left += part @ make("A", whole_rows, range(size), size, dtype).astype(np.float64)
        found += part @ np.asarray(block[chunk.start:chunk.stop]).astype(np.float64)
    right, squares = np.zeros_like(found), 0.0
    for chunk in _chunks(size):
        part = make("B", chunk, columns, size, dtype).astype(np.float64)
        right += left[:, chunk.start:chunk.stop] @ part
        squares += float(np.square(part).sum())
    difference = found - right
    residual = np.linalg.norm(difference) / (size * EPSILON[dtype] * np.linalg.norm(left) * math.sqrt(squares))
    return float(residual), float(np.abs(difference).max() / math.sqrt(np.square(right).mean()))


def tolerance(size: int, dtype: str) -> float:
    """Return how large the second of `errors` may be.

    Rounding errors of both signs grow as the root of the number of sums (Higham and Mary, A new approach to
    probabilistic rounding error analysis, SIAM Journal on Scientific Computing 41, 2019); in bfloat16 only what comes
    out is rounded, and sums are kept in float32.
    """
    return 16 * EPSILON[dtype] * (1.0 if dtype == "bfloat16" else math.sqrt(size))


def _weights(height: int) -> np.ndarray:
    """Return how rows are combined, float64 (combinations, height): each of norm 1."""
    source = np.random.default_rng(height)
    chosen = source.choice(height, min(SAMPLES, height), replace=False)
    weights = np.zeros((len(chosen) + 1, height))
    weights[np.arange(len(chosen)), chosen] = 1
    weights[-1] = source.choice([-1.0, 1.0], height) / math.sqrt(height)
    return weights


def _chunks(length: int) -> Iterator[range]:
    for start in range(0, length, _CHUNK):
        yield range(start, min(start + _CHUNK, length))
