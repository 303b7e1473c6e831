"""What each rank runs that measures collective operations, however it was started."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine import distributed, hardware
from hpcai_cli.engine.benchmarks.collective import averaged_gradients, collectives
from hpcai_cli.engine.benchmarks.collective.collective_report import Point, adapter_figures, point_figures, summaries
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.engine.distributed import Horovod
from hpcai_cli.errors import HpcaiError

ROUNDS = 9
"""Of a job that measures everything in one go."""


def measure(ranks: Horovod, operations: Sequence[str], sizes: Sequence[int]) -> Iterator[Figure | Table | Curves]:
    """Measure the operations over the transport that a launcher gave these ranks; all ranks call it."""
    console.note(f"{ranks.size} ranks over {collectives.transport_of(ranks)}")
    points = []
    for record in records(ranks, {"operations": list(operations), "sizes": list(sizes), "rounds": ROUNDS}):
        if "operation" in record:
            points.append(Point(**record))
            yield from point_figures(points[-1], is_largest=_is_largest(points[-1], sizes))
        else:
            yield from adapter_figures(record)
    yield from summaries(points)
    ranks.stop()


def records(ranks: Horovod, task: Mapping) -> Iterator[dict]:
    """Yield what is measured, JSON values, the same on all ranks.

    Args:
        task: `rounds`, and either `operations` and `sizes` in bytes, which gives Points and, with allreduce among
            them, what `averaged_gradients.measure_adapter` returns; or `shapes`, for `averaged_gradients.measure_step`.
    """
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    if "shapes" in task:
        yield averaged_gradients.measure_step(ranks, task["shapes"], task["rounds"])
        return
    for operation in task["operations"]:
        try:
            for size in _sizes_for(operation, task["sizes"], ranks.size):
                yield collectives.measure_point(ranks, operation, size, task["rounds"]).to_json()
        except tf.errors.OpError as error:
            console.note(f"{operation} is left out: {collectives.transport_of(ranks)} says {error.message[:200]!r}")
    if "allreduce" in task["operations"]:
        yield averaged_gradients.measure_adapter(ranks, task["rounds"])


def _sizes_for(operation: str, sizes: Sequence[int], ranks: int) -> list[int]:
    """Return the sizes of which each rank can have an equal part, where the operation deals parts out."""
    if operation in ("allreduce", "broadcast"):
        return list(sizes)
    part = collectives.ITEM * ranks
    return sorted({-(-size // part) * part for size in sizes})


def _is_largest(point: Point, sizes: Sequence[int]) -> bool:
    return point.bytes >= max(sizes)


def main() -> None:
    """Measure what the file argv[1] says, and write a line of JSON for each record to the file argv[2], on rank 0."""
    task = json.loads(Path(sys.argv[1]).read_text())
    try:
        ranks = distributed.start()
        if ranks.size == 1:
            raise HpcaiError("a rank was started alone", expected="several, under horovodrun or mpirun")
        with Path(sys.argv[2]).open("a") as stream:
            for record in records(ranks, task):
                if ranks.rank == 0:
                    stream.write(json.dumps(record) + "\n")
                    stream.flush()
        ranks.stop()
    except HpcaiError as error:
        console.fail(str(error), collective=error.collective)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
