"""Matmul: the matrix product C = A B of matrices spread over ranks, one thread each, against the local library."""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median as middle

import numpy as np
import tensorflow as tf
from threadpoolctl import threadpool_limits

from hpcai_cli import console
from hpcai_cli.engine import hardware, machine
from hpcai_cli.engine.benchmarks.matrix import matrix_operands, matrix_split
from hpcai_cli.engine.benchmarks.matrix.matmul_request import Request, check_memory
from hpcai_cli.engine.benchmarks.matrix.matrix_products import RowBlocks, Summa, multiply
from hpcai_cli.engine.benchmarks.measure import Figure, Table, interleaved, median, ratio
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.errors import DivergedError, HpcaiError, MissingError

NAME = "matmul"
ROUNDS = 7
SPEED_ROUNDS = 3
EFFICIENCY, OVER_ROWS, PROMISED_SIZE = 0.85, 1.2, 4096
"""What the project promises of SUMMA on two cores, from this size on."""


def measure(ranks: Serial | Horovod, request: Request) -> Iterator[Figure | Table]:
    """Measure both ways to multiply; all ranks call it and yield the same.

    Raises:
        MissingError: a host of the ranks lacks memory.
        DivergedError: a product is wrong.
    """
    try:
        with threadpool_limits(1):
            yield from _measured(ranks, request)
    except HpcaiError as error:
        if error.collective:
            # Together, so that no rank's end takes rank 0's words away.
            ranks.stop()
        raise
    ranks.stop()


def _measured(ranks: Serial | Horovod, request: Request) -> Iterator[Figure | Table]:
    _take_one_core(ranks)
    _check_memory_everywhere(ranks, request)
    clock, library = _Clock(ranks), _Library(request)
    rates = clock.rates(library)
    speeds = matrix_split.speeds_for_split(rates)
    products = {name: _product(name, ranks, request, speeds) for name in request.algorithms}
    yield _split_table(ranks, request, rates, products)
    yield from _figures(request, ranks.size, clock.run(library, products), products)
    for name, product in products.items():
        yield _checked(ranks, request, name, product)


def _check_memory_everywhere(ranks: Serial | Horovod, request: Request) -> None:
    # The one with the least memory decides for all: others would wait for it for ever.
    here = np.array([[ranks.local_size, machine.memory_bytes()[1]]], np.int64)
    local_ranks, available = min(ranks.gather(here).tolist(), key=lambda host: (host[1] or float("inf")) / host[0])
    try:
        check_memory(request, ranks=ranks.size, local_ranks=local_ranks, available=available)
    except MissingError as error:
        error.collective = True
        raise


def _take_one_core(ranks: Serial | Horovod) -> None:
    hardware.share_cores(local_rank=ranks.local_rank, local_size=ranks.local_size)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:
        console.note("TensorFlow is running already; its threads and devices stay as they are")


def _product(name: str, ranks: Serial | Horovod, request: Request, speeds: Sequence[float]) -> RowBlocks | Summa:
    if name == "rows":
        return RowBlocks(ranks, request.size, request.dtype, speeds)
    return Summa(ranks, request.size, request.dtype, speeds, request.width)


# ---- The clock -----------------------------------------------------------------------------------------------------

class _Library:
    """The local library's own product, of the matrices or of the first rows and columns of large ones."""

    def __init__(self, request: Request):
        size = min(request.size, matrix_split.LIBRARY_SIZE)
        self._a, self._b = (tf.constant(matrix_operands.make(name, range(size), range(size), size, request.dtype))
                            for name in "AB")
        self._c = None
        self.operations = 2 * size**3

    def multiply(self) -> None:
        """Compute it."""
        self._c = multiply(self._a, self._b, self._c)


class _Clock:
    """Takes the time of what all ranks do together."""

    def __init__(self, ranks: Serial | Horovod):
        self._ranks = ranks

    def seconds(self, work: Callable[[], object]) -> list[float]:
        """Return how long each rank took, on every rank; they begin together."""
        self._ranks.barrier()
        started = time.perf_counter()
        work()
        return self._ranks.gather(np.array([time.perf_counter() - started])).tolist()

    def rates(self, library: _Library) -> list[float]:
        """Return how fast each rank computes while all do, in GFLOP/s."""
        library.multiply()
        rounds = [self.seconds(library.multiply) for _ in range(SPEED_ROUNDS)]
        return [library.operations / middle(spent) / 1e9 for spent in zip(*rounds, strict=True)]

    def run(self, library: _Library, products: dict[str, RowBlocks | Summa]) -> dict[str, list[float]]:
        """Return what each round took, in seconds: `alone` and `at once` for the library on one core and on all, and
        for each product its name, and with ` communication` behind it what takes its communication alone."""
        def slowest(work: Callable[[], object]) -> float:
            return max(self.seconds(work))

        def alone() -> float:
            return self.seconds(library.multiply if self._ranks.rank == 0 else lambda: None)[0]

        candidates = {"alone": alone, "at once": partial(slowest, library.multiply)}
        for name, product in products.items():
            candidates[name] = partial(slowest, product.multiply)
            candidates[f"{name} communication"] = partial(slowest, product.communicate)
        # One round to warm up.
        interleaved(1, **candidates)
        return interleaved(ROUNDS, **candidates)


# ---- What is told --------------------------------------------------------------------------------------------------

def _split_table(ranks: Serial | Horovod, request: Request, rates: list[float], products: dict) -> Table:
    columns, cells = ["rank", "GFLOP/s of its core"], [[rank, rate] for rank, rate in enumerate(rates)]
    for name, product in products.items():
        columns.append("rows of C" if name == "rows" else f"block of C on {product.grid[0]} x {product.grid[1]} ranks")
        shapes = ranks.gather(np.array([[len(product.rows), len(product.columns)]], np.int64)).tolist()
        for row, (height, width) in zip(cells, shapes, strict=True):
            row.append(height if name == "rows" else f"{height:,} x {width:,}")
    return Table(NAME, f"{request.size:,} x {request.size:,} in {request.dtype}, cut by the ranks' speeds",
                 tuple(columns), tuple(tuple(row) for row in cells))


TITLES = {"rows": "row blocks", "summa": "SUMMA"}


def _prefix(request: Request, ranks: int) -> str:
    return f"{request.dtype} {request.size:,}, np {ranks}"


def _figures(request: Request, ranks: int, seconds: dict[str, list[float]], products: dict) -> Iterator[Figure]:
    """Yield rates in GFLOP/s, and efficiencies: over the library's rate on as many cores, taken from one that works
    alone, and from all of them working at once."""
    of, library_size = _prefix(request, ranks), min(request.size, matrix_split.LIBRARY_SIZE)
    is_promised = ranks == 2 and request.size >= PROMISED_SIZE
    gflops = {name: [2 * (library_size if name in ("alone", "at once") else request.size) ** 3 / each / 1e9
                     for each in spent] for name, spent in seconds.items()}
    cores, at_once = [ranks * rate for rate in gflops["alone"]], [ranks * rate for rate in gflops["at once"]]
    yield median(NAME, f"{of}: the library on one core", gflops["alone"], "GFLOP/s")
    yield median(NAME, f"{of}: the library on each core at once", at_once, "GFLOP/s")
    for name in products:
        title = f"{of}: {TITLES[name]}"
        yield median(NAME, title, gflops[name], "GFLOP/s")
        yield ratio(NAME, f"{title}, efficiency", gflops[name], cores,
                    limit=EFFICIENCY if is_promised and name == "summa" else None)
        yield ratio(NAME, f"{title}, efficiency against the cores at once", gflops[name], at_once)
        yield median(NAME, f"{title}, communication alone",
                     [1e3 * each for each in seconds[f"{name} communication"]], "ms")
    if len(products) == 2:
        yield ratio(NAME, f"{of}: SUMMA over row blocks", gflops["summa"], gflops["rows"],
                    limit=OVER_ROWS if is_promised else None)
        # No way to multiply can gain more than row blocks lose.
        yield ratio(NAME, f"{of}: the cores at once over row blocks", at_once, gflops["rows"])


def _checked(ranks: Serial | Horovod, request: Request, name: str, product: RowBlocks | Summa) -> Figure:
    """Return the largest scaled residual of all ranks.

    Raises:
        DivergedError: the product is wrong somewhere.
    """
    here = matrix_operands.errors(product.block, product.rows, product.columns, request.size, request.dtype)
    everywhere, limit = ranks.gather(np.array([here])), matrix_operands.tolerance(request.size, request.dtype)
    wrong = [rank for rank, (_, error) in enumerate(everywhere) if not error <= limit]
    if wrong:
        raise DivergedError(f"the product by {TITLES[name]} is wrong on ranks {wrong}",
                            expected=f"errors of at most {limit:.2g} times the numbers' mean size",
                            received=everywhere[wrong[0], 1])
    return Figure(NAME, f"{_prefix(request, ranks.size)}: {TITLES[name]}, scaled residual",
                  float(everywhere[:, 0].max()), "")
