"""What `hpcai benchmark matmul` is asked for, and whether this host can do it."""

from dataclasses import dataclass

from hpcai_cli import console, launch
from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.matrix import matrix_split
from hpcai_cli.errors import MissingError, UsageError

RANKS_OF_A_CORE = 4
"""More of them only wait for each other."""
BASE_BYTES = 600 << 20
"""What a process takes before it holds a matrix: Python and TensorFlow."""
LIMIT_ITEMS = 1 << 31
"""MPI counts the numbers of one message in 31 bits; the whole of B is one."""


@dataclass(frozen=True)
class Request:
    """What is to be measured: C = A B with matrices of size x size."""

    size: int
    dtype: str = "float32"
    algorithms: tuple[str, ...] = matrix_split.ALGORITHMS
    width: int = 512
    """Of SUMMA's panels, at most."""


def checked_request(size: int, dtype: str, algorithm: str, width: int | None) -> Request:
    """Return what the command line asks for.

    Args:
        algorithm: `rows`, `summa` or `both`.
        width: None for one that suits the size.

    Raises:
        UsageError: there is no such thing.
    """
    if dtype not in matrix_split.ITEM_BYTES:
        raise UsageError("no such --dtype", expected=", ".join(matrix_split.ITEM_BYTES), received=dtype)
    if algorithm not in (*matrix_split.ALGORITHMS, "both"):
        raise UsageError("no such --algorithm", expected="rows, summa or both", received=algorithm)
    if width is not None and algorithm == "rows":
        raise UsageError("row blocks have no panels", expected="no --block", received=width)
    algorithms = matrix_split.ALGORITHMS if algorithm == "both" else (algorithm,)
    return Request(size, dtype, algorithms, width or matrix_split.panel_width(size, dtype))


def check_ranks(np: int | None) -> int:
    """Return how many ranks there are or will be: those of the launcher, or `np`, or one for each core of this host.

    Says when they share cores.

    Raises:
        UsageError: they are more than this host can bear, or `np` was given to ranks.
        MissingError: Horovod is not installed.
    """
    here, cores = launch.place(), machine.cores()
    count = here.size if here.launcher and np is None else np or cores
    if here.launcher and np is not None or count > here.size:
        launch.require_horovod(count)
    if here.size == 1 and count > RANKS_OF_A_CORE * cores:
        raise UsageError("so many ranks are more than this host can bear", received=count,
                         expected=f"at most {RANKS_OF_A_CORE * cores}, {RANKS_OF_A_CORE} for each of its cores")
    if here.size == 1 and count > cores:
        console.note(f"{count} ranks share {cores} {'core' if cores == 1 else 'cores'}: they wait for each other, and "
                     "the figures say little about ranks with cores of their own")
    if here.size == 1 and np is None:
        console.note(f"{count} {'rank' if count == 1 else 'ranks'}: one for each core")
    return count


def check_fit(request: Request, ranks: int) -> None:
    """Refuse what so many ranks cannot share.

    Raises:
        UsageError: there are more ranks than rows, or the whole of B is too large to be sent at once.
    """
    if request.size < ranks:
        raise UsageError(f"{ranks} ranks cannot share {request.size} rows", expected=f"a --size of {ranks} or more",
                         received=request.size)
    if "rows" in request.algorithms and ranks > 1 and request.size**2 >= LIMIT_ITEMS:
        raise UsageError("row blocks gather more numbers than Horovod can send at once", received=request.size,
                         expected="a --size of 46,340 or less, or --algorithm summa")


def check_memory(request: Request, *, ranks: int, local_ranks: int, available: int, base: int = 0) -> None:
    """Refuse what a host cannot hold, before anything is allocated.

    Args:
        local_ranks: how many of the ranks are on this host.
        available: bytes of memory, 0 where that is not known.
        base: bytes that each rank takes beside the matrices.

    Raises:
        MissingError: it is too large.
    """
    def needed(size: int) -> int:
        return local_ranks * (base + matrix_split.memory_needed(size, ranks, request.dtype, request.algorithms,
                                                                request.width))

    if not available or needed(request.size) <= available:
        return
    fits = request.size
    while fits > 1 and needed(fits) > available:
        fits = int(0.95 * fits)
    raise MissingError(f"a product of {request.size:,} x {request.size:,} in {request.dtype} takes "
                       f"{needed(request.size) / 1e9:,.1f} GB on a host with {local_ranks} of {ranks} ranks",
                       expected=f"no more than the {available / 1e9:,.1f} GB that are free",
                       mend=f"give --size {fits}", received=request.size)


def check_host(request: Request, ranks: int) -> None:
    """Check that this host can hold so many ranks, before they are started.

    Raises:
        MissingError: it lacks the memory.
    """
    check_memory(request, ranks=ranks, local_ranks=ranks, available=machine.memory_bytes()[1], base=BASE_BYTES)
