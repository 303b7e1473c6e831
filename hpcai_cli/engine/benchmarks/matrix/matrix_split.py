"""How a matrix product C = A B is cut over ranks: their grid, shares by speed, panels, and the memory that it takes.

All matrices are square, `size` x `size`. Parts of rows or columns are given by their bounds: (0, 3, 8) are two parts, 0
to 2 and 3 to 7.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

ALGORITHMS = ("rows", "summa")
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
LIBRARY_SIZE = 4096
"""Rows of the product that measures a core by itself, at most; larger ones are no faster and take for ever."""
LIKE = 0.05
"""Ranks whose speeds differ by less than this share count as equally fast: so far apart two measurements may lie."""
_ROUNDS = 100
"""Of fitting heights to widths and back; a few are enough."""


@dataclass(frozen=True)
class Panel:
    """Some columns of A, which one column of ranks holds, and as many rows of B, which one row of ranks holds."""

    first: int
    last: int
    """One behind the last."""
    grid_row: int
    grid_column: int

    @property
    def width(self) -> int:
        """How many columns and rows they are."""
        return self.last - self.first


def grid_of(ranks: int) -> tuple[int, int]:
    """Return rows and columns of the grid of ranks that is nearest to a square; never more rows than columns."""
    rows = next(rows for rows in range(math.isqrt(ranks), 0, -1) if ranks % rows == 0)
    return rows, ranks // rows


def process_groups(ranks: int) -> list[list[int]]:
    """Return the ranks of each row and each column of the grid that is not one rank alone, nor all of them."""
    rows, columns = grid_of(ranks)
    groups = [[row * columns + column for column in range(columns)] for row in range(rows)]
    groups += [[row * columns + column for row in range(rows)] for column in range(columns)]
    return [group for group in groups if 1 < len(group) < ranks]


def speeds_for_split(rates: Sequence[float]) -> list[float]:
    """Return the measured rates, or ones where they are too much alike to cut anything by them."""
    return [1.0] * len(rates) if max(rates) <= (1 + LIKE) * min(rates) else list(rates)


def cut(length: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Return the bounds of parts whose lengths are as the weights, to the next whole number, and at least 1.

    Args:
        length: at least as many as there are weights.
    """
    ends = list(accumulate(weights))
    bounds = [0]
    for number, end in enumerate(ends):
        left_for_others = len(weights) - 1 - number
        bounds.append(min(max(round(length * end / ends[-1]), bounds[-1] + 1), length - left_for_others))
    return tuple(bounds)


def grid_weights(speeds: Sequence[float], grid: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Return weights of the grid's rows and columns by which its ranks take the same time, as nearly as can be.

    A rank computes a block of height times width, so the longest time is the largest of height x width / speed. For
    given widths the best heights are known, and the other way round; taking turns never makes it longer. With one row
    or one column the result is exact; that the best for a grid is hard to find show Beaumont et al., A proposal for a
    heterogeneous cluster ScaLAPACK, IEEE Transactions on Computers 50 (2001).

    Args:
        speeds: of the ranks, row by row of the grid, above 0, in any unit.
    """
    rows, columns = grid
    heights, widths = [1 / rows] * rows, [1 / columns] * columns
    for _ in range(_ROUNDS):
        heights = _best([[widths[column] / speeds[row * columns + column] for column in range(columns)]
                         for row in range(rows)])
        widths = _best([[heights[row] / speeds[row * columns + column] for row in range(rows)]
                        for column in range(columns)])
    return heights, widths


def _best(times: Sequence[Sequence[float]]) -> list[float]:
    """Return the lengths, of sum 1, by which each part's slowest rank takes the same time."""
    lengths = [1 / max(line) for line in times]
    return [length / sum(lengths) for length in lengths]


def panels(row_bounds: Sequence[int], column_bounds: Sequence[int], width: int) -> list[Panel]:
    """Return the panels of a product in their order, each held by one column of ranks (A) and one row of them (B).

    Args:
        row_bounds: of the grid's rows, by which B is cut.
        column_bounds: of the grid's columns, by which A is cut.
        width: of a panel, at most.
    """
    found = []
    for first, last in pairwise(sorted({*row_bounds, *column_bounds})):
        row, column = bisect_right(row_bounds, first) - 1, bisect_right(column_bounds, first) - 1
        bounds = cut(last - first, [1.0] * math.ceil((last - first) / width))
        found += [Panel(first + start, first + end, row, column) for start, end in pairwise(bounds)]
    return found


def panel_width(size: int, dtype: str) -> int:
    """Return the width of panels where none is asked for.

    Wide enough that adding their products up takes little beside the products, which in bfloat16 are fast; narrow
    enough that there are some to overlap with.
    """
    return max(64, min(1024 if dtype == "bfloat16" else 512, size // 4))


def memory_needed(size: int, ranks: int, dtype: str, algorithms: Sequence[str], width: int) -> int:
    """Return how many bytes a rank takes at most, evenly cut."""
    item, own, grid = ITEM_BYTES[dtype], math.ceil(size * size / ranks), grid_of(ranks)
    # One library product, and each matrix once more while it is made.
    need = 3 * item * min(size, LIBRARY_SIZE) ** 2 + item * own
    if "rows" in algorithms:
        # Its parts of A, B and C, and the whole of B.
        need += 3 * item * own + item * size * size
    if "summa" in algorithms:
        # Its blocks of A, B and C, the product of two panels (both in float32 where the numbers are shorter), and the
        # panels that are used, that come, and that only show Horovod their shape.
        sides = math.ceil(size / grid[0]) + math.ceil(size / grid[1])
        need += 2 * item * own + 2 * max(item, 4) * own + 3 * item * min(width, size) * sides
    return need
