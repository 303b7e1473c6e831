"""The collective operations that are measured: what each takes and gives, and how long it takes."""

import os
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from hpcai_cli.engine.benchmarks.collective.collective_report import Point
from hpcai_cli.engine.benchmarks.measure import interleaved
from hpcai_cli.engine.distributed import Horovod
from hpcai_cli.errors import HpcaiError

ROUND_SECONDS = 0.03
"""A round takes about so long, or one call where that takes longer."""
MOST_CALLS = 100
"""Of one round."""
ITEM = 4
"""Bytes of a float32, which is what is sent."""


def transport_of(ranks: Horovod) -> str:
    """Return what carries the ranks' bytes: Gloo, MPI, NCCL or oneCCL."""
    hvd = ranks.operations
    if hvd.nccl_built() and tf.config.get_visible_devices("GPU"):
        return "NCCL"
    names = {"gloo": "Gloo", "mpi": "MPI", "ccl": "oneCCL"}
    asked = names.get(os.environ.get("HOROVOD_CPU_OPERATIONS", "").lower())
    return asked or ("MPI" if hvd.mpi_built() and hvd.mpi_enabled() else "Gloo")


def measure_point(ranks: Horovod, operation: str, size: int, rounds: int) -> Point:
    """Verify one operation on one size, and time it beside memcpy of as many bytes.

    Args:
        operation: one of `collective_report.OPERATIONS`.
        size: bytes of the larger of a rank's two buffers, a multiple of 4 and, but for allreduce and broadcast, of 4
            times the number of ranks.

    Raises:
        HpcaiError: a rank received something else than it should have; on all ranks.
        tf.errors.OpError: the transport has no such operation; on all ranks.
    """
    source = source_of(operation, size // ITEM, ranks.rank, ranks.size)
    call = _call_of(ranks, operation, tf.constant(source), f"{operation}.{size}")
    _verify(ranks, operation, size, call)
    calls = calls_of_a_round(ranks, call)
    numbers = np.ones(size // ITEM, np.float32)
    buffer = np.empty_like(numbers)
    seconds = interleaved(rounds, collective=lambda: seconds_of_a_call(ranks, call, calls),
                          memcpy=lambda: seconds_of_a_call(ranks, lambda: np.copyto(buffer, numbers), calls))
    slowest = slowest_of(ranks, [*seconds["collective"], *seconds["memcpy"]])
    return Point(operation, transport_of(ranks), ranks.size, size, slowest[:rounds], slowest[rounds:])


def source_of(operation: str, count: int, rank: int, size: int) -> np.ndarray:
    """Return what a rank gives to an operation on `count` numbers, float32: whole numbers, so that sums are exact."""
    numbers = _numbers(count) + np.float32(rank)
    return _part(numbers, rank, size) if operation == "allgather" else numbers


def expected_of(operation: str, count: int, rank: int, size: int) -> np.ndarray:
    """Return what a rank receives from it, float32."""
    numbers = _numbers(count)
    if operation == "broadcast":
        return numbers
    if operation == "allgather":
        return numbers + np.repeat(np.arange(size, dtype=np.float32), count // size)
    if operation == "all-to-all":
        mine = _part(numbers, rank, size)
        return np.concatenate([mine + np.float32(other) for other in range(size)])
    total = np.float32(size) * numbers + np.float32(size * (size - 1) // 2)
    return _part(total, rank, size) if operation == "reduce-scatter" else total


def _numbers(count: int) -> np.ndarray:
    # Thirteen different ones: no power of two, so that parts that changed places are told apart.
    return np.tile(np.arange(13, dtype=np.float32), count // 13 + 1)[:count]


def _part(numbers: np.ndarray, rank: int, size: int) -> np.ndarray:
    length = len(numbers) // size
    return numbers[rank * length:(rank + 1) * length]


def _call_of(ranks: Horovod, operation: str, tensor: tf.Tensor, name: str) -> Callable[[], tf.Tensor]:
    hvd = ranks.operations
    return {"allreduce": lambda: hvd.allreduce(tensor, op=hvd.Sum, name=name),
            "broadcast": lambda: hvd.broadcast(tensor, root_rank=0, name=name),
            "allgather": lambda: hvd.allgather(tensor, name=name),
            "reduce-scatter": lambda: hvd.reducescatter(tensor, op=hvd.Sum, name=name),
            "all-to-all": lambda: hvd.alltoall(tensor, name=name)}[operation]


def _verify(ranks: Horovod, operation: str, size: int, call: Callable[[], tf.Tensor]) -> None:
    is_right = np.array_equal(call().numpy(), expected_of(operation, size // ITEM, ranks.rank, ranks.size))
    # All ranks end together: one that went on would wait for the others for ever.
    wrong = np.flatnonzero(ranks.gather(np.array([0 if is_right else 1])))
    if len(wrong):
        error = HpcaiError(f"{operation} of {size} bytes over {transport_of(ranks)} gave a wrong result",
                           expected="what its definition says", received=f"wrong on ranks {wrong.tolist()}")
        error.collective = True
        raise error


# ---- Time ----------------------------------------------------------------------------------------------------------

def calls_of_a_round(ranks: Horovod, call: Callable[[], object], seconds: float = ROUND_SECONDS) -> int:
    """Warm up, and return how many calls take about so many seconds, the same number on all ranks."""
    call()
    once = min(seconds_of_a_call(ranks, call, 1) for _ in range(2))
    return ranks.broadcast_json(max(1, min(MOST_CALLS, int(seconds / once))))


def seconds_of_a_call(ranks: Horovod, call: Callable[[], object], calls: int) -> float:
    """Return what a call takes on this rank, in a row of them that all ranks begin together."""
    ranks.barrier()
    started = time.perf_counter()
    for _ in range(calls):
        result = call()
    last = tf.nest.flatten(result)[-1]
    if tf.is_tensor(last):
        # A GPU goes on after the call has returned.
        tf.reshape(last, [-1])[:1].numpy()
    return (time.perf_counter() - started) / calls


def slowest_of(ranks: Horovod, seconds: list[float]) -> tuple[float, ...]:
    """Return of each round the slowest rank's seconds: the operation has ended when its last rank has."""
    return tuple(ranks.gather(np.array([seconds])).max(axis=0).tolist())
