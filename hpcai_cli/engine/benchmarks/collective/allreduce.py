"""Allreduce and the other collective operations: latency and bus bandwidth of each transport, against memcpy.

What is measured is a call of Horovod's, as a training makes it. Horovod looks for work once in a cycle, of 1 ms over
Gloo and of 0.5 ms as we start it over MPI; below about 1 MB that, and not the transport, is the latency.
"""

import re
from collections.abc import Iterator, Sequence

from hpcai_cli import console, launch, launchers
from hpcai_cli.engine import distributed, machine
from hpcai_cli.engine.benchmarks.collective import rank_jobs
from hpcai_cli.engine.benchmarks.collective.collective_report import (
    OPERATIONS,
    Point,
    adapter_figures,
    against_gloo,
    point_figures,
    size_text,
    summaries,
)
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.errors import HpcaiError, MissingError, UsageError

LARGEST = 256 << 20
LIMIT = 4 << 30
"""Larger ones Horovod's counters of 32 bits cannot count in all operations."""
PASSES, ROUNDS = 2, 5
"""Each transport is started so often, in turn with the others, and measures so many rounds each time."""
RANKS_OF_A_CORE = 4
BASE_BYTES, COPIES = 800 << 20, 8
"""What a rank takes: TensorFlow and Horovod, and so many buffers of the largest size (4 to 7.6 were measured)."""

TRANSPORTS = ("Gloo", "MPI", "NCCL")
HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1"}
"""What ranks over Gloo and MPI get: bytes on GPUs are NCCL's."""


def measure(np: int, operations: Sequence[str], sizes: Sequence[int]) -> Iterator[Figure | Table | Curves]:
    """Start ranks with each transport in turn, and yield what all passes have measured; or, when it is interrupted or
    fails, what they had measured until then."""
    points: dict[tuple, Point] = {}
    adapters: dict[str, dict] = {}
    failure = None
    try:
        for transport, record in _measured(np, operations, sizes):
            if "operation" in record:
                point = Point(**record)
                points[point.key] = points[point.key].joined(point) if point.key in points else point
            elif transport in adapters:
                adapters[transport] |= {name: [*adapters[transport][name], *record[name]] for name in ("ours", "raw")}
            else:
                adapters[transport] = record
    except (KeyboardInterrupt, HpcaiError) as error:
        failure = error
    for point in points.values():
        yield from point_figures(point, is_largest=point.bytes >= max(sizes))
    for record in adapters.values():
        yield from adapter_figures(record)
    yield from against_gloo(list(points.values()))
    yield from summaries(list(points.values()))
    if failure is not None:
        raise failure


def _measured(np: int, operations: Sequence[str], sizes: Sequence[int]) -> Iterator[tuple[str, dict]]:
    task = {"operations": list(operations), "sizes": list(sizes), "rounds": ROUNDS}
    transports = _transports(np)
    for number in range(PASSES):
        for transport in transports:
            console.note(f"pass {number + 1} of {PASSES}: {np} ranks over {transport} ...")
            # Gloo takes a launcher of its own: Horovod 0.28.1 crashes with HOROVOD_CPU_OPERATIONS=gloo under mpirun.
            ranks = launchers.local(np, "horovodrun" if transport == "Gloo" else "auto")
            for record in rank_jobs.records(ranks, task, {} if transport == "NCCL" else HIDDEN):
                yield transport, record


def _transports(np: int) -> list[str]:
    """Return the transports that Horovod was built with and that can carry so many ranks here."""
    built = distributed.built_transports()
    for name in TRANSPORTS:
        if name not in built:
            console.note(f"{name} is left out: Horovod was built without it")
    if "MPI" in built and not launchers.has_open_mpi():
        console.note("MPI is left out: its ranks are started by Open MPI's mpirun, which is not here")
        built.remove("MPI")
    if "NCCL" in built and len(machine.gpus()) < np:
        console.note(f"NCCL is left out: it wants a GPU for each of the {np} ranks")
        built.remove("NCCL")
    return built


# ---- What is asked for ---------------------------------------------------------------------------------------------

def chosen_operations(text: str) -> tuple[str, ...]:
    """Return the operations of that name, all for `all`.

    Raises:
        UsageError: there is none.
    """
    if text == "all":
        return OPERATIONS
    if text not in OPERATIONS:
        raise UsageError("there is no such operation", expected=f"{', '.join(OPERATIONS)} or all", received=text)
    return (text,)


def chosen_sizes(sizes: str | None, largest: str | None, ranks: int) -> list[int]:
    """Return the sizes in bytes: those that are listed, or all powers of 4 from 4 to the largest one.

    Without either, those up to 256 MB for which there is memory; it is said when some are left out.

    Raises:
        UsageError: a size cannot be read, or both are given.
        MissingError: so many ranks with buffers of such a size do not fit into this host's memory.
    """
    if sizes and largest:
        raise UsageError("--sizes and --largest were given", expected="one of them", received=f"{sizes} and {largest}")
    if sizes:
        found = sorted({_size(text) for text in sizes.split(",")})
    else:
        end = _size(largest) if largest else LARGEST
        found = [4**power for power in range(1, 17) if 4**power <= end]
    needed = [_memory(ranks, size) for size in found]
    free = machine.memory_bytes()[1]
    if free and needed[-1] > free:
        fitting = [size for size, bytes_ in zip(found, needed, strict=True) if bytes_ <= free]
        if sizes or largest or not fitting:
            raise MissingError(f"{ranks} ranks with buffers of {size_text(found[-1])} need {needed[-1] / 1e9:.1f} GB "
                               "of memory", expected=f"at most the {free / 1e9:.1f} GB that are free here",
                               mend="take smaller --sizes, or fewer ranks", received=found[-1])
        console.note(f"sizes above {size_text(fitting[-1])} are left out: {free / 1e9:.1f} GB of memory are free")
        found = fitting
    return found


def _size(text: str) -> int:
    """Read a number of bytes such as 4, 64KB, 1M or 256MB, in powers of 1024."""
    match = re.fullmatch(r"(\d{1,12}) *([KMG]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    count = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()] if match else 0
    if not 4 <= count <= LIMIT or count % 4:
        raise UsageError("cannot measure such a size", received=text,
                         expected=f"bytes, a multiple of 4 up to {size_text(LIMIT)}, such as 4, 64KB or 256MB")
    return count


def _memory(ranks: int, size: int) -> int:
    return ranks * (BASE_BYTES + COPIES * size)


def check_ranks(np: int | None) -> int:
    """Return how many ranks this host has or will have: those of the launcher, or `np`, which is 2 by default.

    Says when they share cores.

    Raises:
        UsageError: they are more than this host can bear, a launcher has started one alone, or `np` was given to ranks.
        MissingError: Horovod is not installed.
    """
    here = launch.place()
    if here.launcher and here.size == 1:
        raise UsageError(f"{here.launcher} has started one rank", expected="two or more, or no launcher", received=1)
    if here.size == 1 or np is not None:
        launch.require_horovod(np or 2)
    local_ranks, cores = np or (here.local_size if here.size > 1 else 2), machine.cores()
    if here.size == 1 and local_ranks > RANKS_OF_A_CORE * cores:
        raise UsageError("so many ranks are more than this host can bear", received=local_ranks,
                         expected=f"at most {RANKS_OF_A_CORE * cores}, {RANKS_OF_A_CORE} for each of its cores")
    if local_ranks > cores:
        console.note(f"{local_ranks} ranks share {cores} {'core' if cores == 1 else 'cores'}: they wait for each "
                     "other, and the figures say little about ranks with cores of their own")
    return local_ranks
