"""Two ways to multiply matrices that are spread over ranks: by rows with B gathered, and by SUMMA."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.benchmarks.matrix.matrix_operands import make
from hpcai_cli.engine.benchmarks.matrix.matrix_split import Panel, cut, grid_of, grid_weights, panels
from hpcai_cli.engine.distributed import Horovod, Serial


class RowBlocks:
    """The plain way: each rank holds rows of A, B and C, gathers the whole of B, and computes its rows.

    Attributes:
        rows: which rows of C this rank has.
        columns: all of them.
        block: these rows, after `multiply`.
    """

    def __init__(self, ranks: Serial | Horovod, size: int, dtype: str, speeds: Sequence[float]):
        """Make this rank's rows; `speeds` are of all ranks, in any unit."""
        bounds = cut(size, speeds)
        self._ranks = ranks
        self.rows, self.columns = range(*bounds[ranks.rank:ranks.rank + 2]), range(size)
        self._a, self._b = (tf.constant(make(name, self.rows, self.columns, size, dtype)) for name in "AB")
        self.block = None

    def multiply(self) -> None:
        """Compute this rank's rows of C; all ranks call it."""
        self.block = multiply(self._a, self.communicate(), self.block)

    def communicate(self) -> tf.Tensor:
        """Gather B and return it; all ranks call it."""
        if self._ranks.size == 1:
            return self._b
        return _send(self._ranks.operations.allgather, self._b, name="matmul.B")


class Summa:
    """SUMMA: the ranks are a grid and hold blocks; panels of A go along its rows and panels of B along its columns.

    The next panels are on their way while the product of the present ones is added up. Van de Geijn and Watts, SUMMA:
    scalable universal matrix multiplication algorithm, Concurrency: Practice and Experience 9 (1997).

    Attributes:
        grid: rows and columns of ranks.
        panels: in their order.
        rows: which rows of C this rank has.
        columns: which columns of C this rank has.
        block: this block of C, after `multiply`.
    """

    def __init__(self, ranks: Serial | Horovod, size: int, dtype: str, speeds: Sequence[float], width: int):
        """Make this rank's blocks; `speeds` are of all ranks, in any unit, and no panel is wider than `width`."""
        self.grid = rows, columns = grid_of(ranks.size)
        heights, widths = grid_weights(speeds, self.grid)
        row_bounds, column_bounds = cut(size, heights), cut(size, widths)
        row, column = divmod(ranks.rank, columns)
        self.rows, self.columns = range(*row_bounds[row:row + 2]), range(*column_bounds[column:column + 2])
        self.panels = panels(row_bounds, column_bounds, width)
        beside = [row * columns + other for other in range(columns)]
        above_and_below = [other * columns + column for other in range(rows)]
        self._row = _Line(ranks, beside, "A", self._panels_of_a(size, dtype))
        self._column = _Line(ranks, above_and_below, "B", self._panels_of_b(size, dtype))
        self._sum = (TensorFlowSum if dtype == "bfloat16" else BlasSum)()
        self.block = None

    def multiply(self) -> None:
        """Compute this rank's block of C; all ranks call it."""
        with ThreadPoolExecutor(1) as beside:
            coming = beside.submit(self._fetch, 0)
            for number in range(len(self.panels)):
                a, b = coming.result()
                if number + 1 < len(self.panels):
                    coming = beside.submit(self._fetch, number + 1)
                self._sum.add(a, b, is_first=number == 0)
        self.block = self._sum.finish()

    def communicate(self) -> None:
        """Send all panels their ways and compute nothing; all ranks call it."""
        for number in range(len(self.panels)):
            self._fetch(number)

    def _fetch(self, number: int) -> tuple[tf.Tensor, tf.Tensor]:
        # In the same order on all ranks: first along the rows, then along the columns.
        panel = self.panels[number]
        return self._row.fetch(number, panel.grid_column), self._column.fetch(number, panel.grid_row)

    def _panels_of_a(self, size: int, dtype: str) -> list[tf.Tensor]:
        own, start = make("A", self.rows, self.columns, size, dtype), self.columns.start
        return _tensors(self.panels, self.columns, lambda panel: own[:, panel.first - start:panel.last - start],
                        lambda width: np.zeros((len(self.rows), width), own.dtype))

    def _panels_of_b(self, size: int, dtype: str) -> list[tf.Tensor]:
        own, start = make("B", self.rows, self.columns, size, dtype), self.rows.start
        return _tensors(self.panels, self.rows, lambda panel: own[panel.first - start:panel.last - start],
                        lambda width: np.zeros((width, len(self.columns)), own.dtype))


def _tensors(parts: Sequence[Panel], own: range, cut_out: Callable, blank: Callable) -> list[tf.Tensor]:
    """Return each panel that this rank holds, and for each that will come something of its shape."""
    blanks = {panel.width: tf.constant(blank(panel.width)) for panel in parts if panel.first not in own}
    return [tf.constant(cut_out(panel)) if panel.first in own else blanks[panel.width] for panel in parts]


class _Line:
    """A row or a column of the grid, whose ranks send each other panels.

    Args:
        members: its ranks.
        tensors: by number of the panel, as `_tensors` returns them.
    """

    def __init__(self, ranks: Serial | Horovod, members: Sequence[int], matrix: str, tensors: Sequence[tf.Tensor]):
        self._ranks, self._members, self._matrix, self._tensors = ranks, members, matrix, tensors
        self._set = ranks.process_set(members) if len(members) > 1 else None

    def fetch(self, number: int, place: int) -> tf.Tensor:
        """Return a panel that the rank at this place of the line holds; all of the line call it."""
        if self._set is None:
            return self._tensors[number]
        return _send(self._ranks.operations.broadcast, self._tensors[number], self._members[place],
                     process_set=self._set, name=f"matmul.{self._matrix}.{number}")


def _send(operation: Callable, tensor: tf.Tensor, *arguments, **keywords) -> tf.Tensor:
    """Call one of Horovod's operations; they know no bfloat16, so its bits travel as integers."""
    if tensor.dtype != tf.bfloat16:
        return operation(tensor, *arguments, **keywords)
    return tf.bitcast(operation(tf.bitcast(tensor, tf.int16), *arguments, **keywords), tf.bfloat16)


# ---- On one core ---------------------------------------------------------------------------------------------------

def multiply(a: tf.Tensor, b: tf.Tensor, out=None):
    """Return a b: by TensorFlow in bfloat16, which numpy cannot, else by numpy's BLAS, into the array `out`."""
    if a.dtype == tf.bfloat16:
        return tf.matmul(a, b)
    return np.matmul(_array(a), _array(b), out=out)


class BlasSum:
    """A sum of products in float32 or float64."""

    def __init__(self):
        self._sum = self._product = None

    def add(self, a: tf.Tensor, b: tf.Tensor, *, is_first: bool) -> None:
        """Add a b to the sum, or begin it anew."""
        if is_first:
            self._sum = multiply(a, b, self._sum)
        else:
            self._product = multiply(a, b, self._product)
            np.add(self._sum, self._product, out=self._sum)

    def finish(self) -> np.ndarray:
        """Return the sum."""
        return self._sum


class TensorFlowSum:
    """A sum of products in bfloat16, kept in float32: rounded at each step, it would lose what small parts add."""

    def __init__(self):
        self._sum = None

    def add(self, a: tf.Tensor, b: tf.Tensor, *, is_first: bool) -> None:
        """Add a b to the sum, or begin it anew."""
        product = tf.cast(multiply(a, b), tf.float32)
        if self._sum is None:
            self._sum = tf.Variable(product)
        elif is_first:
            self._sum.assign(product)
        else:
            self._sum.assign_add(product)

    def finish(self) -> tf.Tensor:
        """Return the sum in bfloat16."""
        return tf.cast(self._sum, tf.bfloat16)


def _array(tensor: tf.Tensor) -> np.ndarray:
    """Return what the tensor holds without a copy."""
    return np.asarray(memoryview(tensor))
