"""The collective operations' definitions, and what is made of their times."""

import numpy as np
import pytest
import tensorflow as tf

from hpcai_cli.engine.benchmarks.collective import collectives, fusion
from hpcai_cli.engine.benchmarks.collective.collective_report import (
    OPERATIONS,
    Point,
    adapter_figures,
    against_gloo,
    bus_factor,
    point_figures,
    size_text,
    summaries,
)
from hpcai_cli.engine.benchmarks.measure import Curves, Table
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.errors import HpcaiError


def by_definition(operation: str, given: list[np.ndarray], rank: int) -> np.ndarray:
    """What MPI's standard says that a rank receives when the ranks give these."""
    parts = [np.split(each, len(given)) for each in given] if operation in ("reduce-scatter", "all-to-all") else []
    return {"allreduce": lambda: sum(given),
            "broadcast": lambda: given[0],
            "allgather": lambda: np.concatenate(given),
            "reduce-scatter": lambda: sum(each[rank] for each in parts),
            "all-to-all": lambda: np.concatenate([each[rank] for each in parts])}[operation]()


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [2, 3])
def test_what_is_expected_is_what_the_definition_gives(operation, size):
    count = 30 * size
    given = [collectives.source_of(operation, count, rank, size) for rank in range(size)]
    for rank in range(size):
        expected = collectives.expected_of(operation, count, rank, size)
        assert expected.dtype == np.float32
        np.testing.assert_array_equal(expected, by_definition(operation, given, rank))
        # The larger of the two buffers has the size that is reported.
        assert max(len(given[rank]), len(expected)) == count


class Forgetful(Serial):
    """One rank of two that gets its own numbers back."""

    size = 2

    class operations:
        Sum = None
        allreduce = staticmethod(lambda tensor, op, name: tf.identity(tensor))
        nccl_built = mpi_built = staticmethod(lambda: False)


def test_a_wrong_result_is_an_error_of_all_ranks():
    with pytest.raises(HpcaiError, match=r"allreduce of 64 bytes over Gloo gave a wrong result.*wrong on ranks \[0\]") \
            as raised:
        collectives.measure_point(Forgetful(), "allreduce", 64, 1)
    assert raised.value.collective


# ---- What is made of the times -------------------------------------------------------------------------------------

def test_bandwidths_are_nccl_tests_own():
    # doc/PERFORMANCE.md of nccl-tests: allreduce 2(n-1)/n, allgather and reduce-scatter (n-1)/n, broadcast 1.
    assert [bus_factor(operation, 4) for operation in OPERATIONS] == [1.5, 1, 0.75, 0.75, 0.75]
    point = Point("allreduce", "MPI", 4, 1 << 20, (2e-3, 1e-3, 4e-3), (1e-4, 2e-4, 1e-4))
    assert point.bus_bandwidths == pytest.approx([0.786432, 1.572864, 0.393216])
    time, bandwidth, share = point_figures(point, is_largest=True)
    assert (time.name, time.value, time.unit) == ("allreduce of 1 MB, 4 ranks, MPI", 2000, "us")
    assert bandwidth.value == pytest.approx(0.786432) and bandwidth.unit == "GB/s"
    # Round by round: 1.5 x 0.05, 1.5 x 0.2, 1.5 x 0.025.
    assert share.value == pytest.approx(0.075)
    assert len(list(point_figures(point, is_largest=False))) == 1


def test_an_adapter_that_takes_longer_than_the_raw_call_misses_the_limit():
    record = {"ranks": 2, "transport": "Gloo", "bytes": 4_000_000, "raw": [1.0, 1.0, 1.0]}
    slow, fast = ([*adapter_figures(record | {"ours": [seconds] * 3})][1] for seconds in (1.05, 1.02))
    assert (slow.holds, fast.holds) == (False, True)


def test_mpi_is_held_against_gloo_from_a_megabyte_on():
    sizes = (1 << 18, 1 << 20, 1 << 22)
    points = [Point("allreduce", transport, 2, size, (seconds,) * 3, (1e-4,) * 3) for size in sizes
              for transport, seconds in (("Gloo", 3e-3), ("MPI", 1e-3 if size < 1 << 22 else 2.5e-3))]
    first, second = against_gloo([*points, Point("broadcast", "MPI", 2, 1 << 20, (1e-3,), (1e-4,))])
    assert (first.name, first.value, first.holds) == ("allreduce of 1 MB, 2 ranks: MPI against Gloo", 3.0, True)
    assert second.value == pytest.approx(1.2) and not second.holds
    assert not list(against_gloo(points[:1]))


def test_each_operation_gets_a_table_and_a_line_for_each_transport():
    points = [Point(operation, transport, 2, size, (size * 1e-9,), (size * 1e-10,))
              for operation in ("allreduce", "broadcast") for transport in ("Gloo", "MPI") for size in (1024, 4)]
    table, times, bandwidths, *others = summaries(points)
    assert isinstance(table, Table) and len(others) == 3 and isinstance(others[0], Table)
    assert [row[:2] for row in table.rows] == [("4 B", "Gloo"), ("4 B", "MPI"), ("1 KB", "Gloo"), ("1 KB", "MPI")]
    assert all(row[3:] == (1.0, 1.0, 10.0, 0.1) for row in table.rows)
    assert isinstance(times, Curves) and times.lines["MPI"] == ((4.0, pytest.approx(0.004)),
                                                                (1024.0, pytest.approx(1.024)))
    assert bandwidths.lines["memcpy"] == ((4.0, pytest.approx(10)), (1024.0, pytest.approx(10)))
    assert set(bandwidths.lines) == {"Gloo", "MPI", "memcpy"}


@pytest.mark.parametrize("count, text", [(4, "4 B"), (1000, "1000 B"), (1024, "1 KB"), (1536, "1536 B"),
                                         (256 << 20, "256 MB"), (4 << 30, "4 GB"), (0, "0 B")])
def test_sizes_are_written_in_powers_of_1024(count, text):
    assert size_text(count) == text


def test_a_setting_is_better_by_chance_when_the_intervals_overlap():
    started = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
    overlapping = {fusion.AS_STARTED: started, "quick": [value - 0.2 for value in started]}
    assert fusion.verdict_of(overlapping) == ("quick: steps 19.0% faster than as hpcai starts its ranks, which may be "
                                              "chance: the intervals overlap")
    assert fusion.verdict_of({fusion.AS_STARTED: started, "quick": [value / 2 for value in started]}) == (
        "quick: steps 100.0% faster than as hpcai starts its ranks")
    assert fusion.verdict_of({fusion.AS_STARTED: started, "slow": [2.0] * 6}) == (
        "none was better than what hpcai sets")
