"""What comes of measured collective operations: latency, bus bandwidth, and their place beside memcpy.

Bandwidths are nccl-tests' own: of the algorithm, size / time; of the bus, that times what the operation moves through
each rank's connection (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). The size is that of the
larger of a rank's two buffers. GB are 10^9 bytes, as there.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table, median, ratio

NAME = "allreduce"
ADAPTER_LIMIT = 0.97
MPI_LIMIT = 1.5
GRADIENTS = 1 << 20
"""Bytes from which on a message is like the gradients of a step."""
OPERATIONS = ("allreduce", "broadcast", "allgather", "reduce-scatter", "all-to-all")


@dataclass(frozen=True)
class Point:
    """One operation on one size: seconds a call of the slowest rank, round by round, those of memcpy beside them."""

    operation: str
    transport: str
    ranks: int
    bytes: int
    seconds: tuple[float, ...]
    memcpy: tuple[float, ...]

    def joined(self, other: "Point") -> "Point":
        """Return both points' rounds as one."""
        return Point(self.operation, self.transport, self.ranks, self.bytes, (*self.seconds, *other.seconds),
                     (*self.memcpy, *other.memcpy))

    def to_json(self) -> dict:
        """Return the point as JSON values."""
        return asdict(self)

    @property
    def key(self) -> tuple[str, str, int]:
        """Return what tells points apart: operation, transport, size."""
        return self.operation, self.transport, self.bytes

    @property
    def label(self) -> str:
        """Name it for people."""
        return f"{self.operation} of {size_text(self.bytes)}, {self.ranks} ranks, {self.transport}"

    @property
    def bus_bandwidths(self) -> list[float]:
        """Return the rounds' bus bandwidths in GB/s."""
        factor = bus_factor(self.operation, self.ranks)
        return [factor * self.bytes / seconds / 1e9 for seconds in self.seconds]

    @property
    def memcpy_bandwidths(self) -> list[float]:
        """Return in GB/s what memcpy copies of the same bytes, on all ranks at once."""
        return [self.bytes / seconds / 1e9 for seconds in self.memcpy]


def bus_factor(operation: str, ranks: int) -> float:
    """Return by what nccl-tests multiplies size / time."""
    if operation == "broadcast":
        return 1.0
    return (2 if operation == "allreduce" else 1) * (ranks - 1) / ranks


def size_text(count: int) -> str:
    """Write a number of bytes for people, in powers of 1024 where it is whole."""
    for unit in ("B", "KB", "MB"):
        if count % 1024 or count == 0:
            return f"{count} {unit}"
        count //= 1024
    return f"{count} GB"


def point_figures(point: Point, *, is_largest: bool) -> Iterator[Figure]:
    """Yield the time of a call, and for the largest size the bandwidth."""
    yield median(NAME, point.label, [1e6 * seconds for seconds in point.seconds], "us")
    if is_largest:
        yield median(NAME, f"{point.label}: bus bandwidth", point.bus_bandwidths, "GB/s")
        yield ratio(NAME, f"{point.label}: bus bandwidth against memcpy", point.bus_bandwidths,
                    point.memcpy_bandwidths)


def adapter_figures(record: Mapping) -> Iterator[Figure]:
    """Yield what averaging gradients takes, by our adapter and by the raw call.

    Args:
        record: ranks, transport, bytes and, in seconds a call, ours and raw.
    """
    said = f"{record['bytes'] / 1e6:.1f} MB of gradients, {record['ranks']} ranks, {record['transport']}"
    yield median(NAME, f"our adapter, {said}", [1e3 * seconds for seconds in record["ours"]], "ms")
    yield ratio(NAME, f"our adapter against the raw call, {said}", record["raw"], record["ours"], limit=ADAPTER_LIMIT)


def summaries(points: Sequence[Point]) -> Iterator[Table | Curves]:
    """Yield of each operation a table and the curves, a line for each transport."""
    for operation in dict.fromkeys(point.operation for point in points):
        mine = sorted((point for point in points if point.operation == operation), key=lambda point: point.bytes)
        title = f"{operation}, {mine[0].ranks} ranks"
        yield Table(NAME, f"{title}, each result verified; of memcpy: bus bandwidth over memcpy's",
                    ("size", "transport", "us", "algorithm GB/s", "bus GB/s", "memcpy GB/s", "of memcpy"),
                    tuple(_row(point) for point in mine))
        yield Curves(NAME, f"{title}: time of a call", "bytes", "us",
                     _lines(mine, lambda point: 1e6 * statistics.median(point.seconds)), "xy")
        memcpy = tuple((float(size), value) for size, value in _memcpy(mine).items())
        yield Curves(NAME, f"{title}: bus bandwidth", "bytes", "GB/s",
                     {**_lines(mine, lambda point: statistics.median(point.bus_bandwidths)), "memcpy": memcpy}, "xy")


def against_gloo(points: Sequence[Point]) -> Iterator[Figure]:
    """Yield how many times Gloo's bandwidth MPI has, of each size that gradients have."""
    found = {point.key: point for point in points}
    for size in sorted({point.bytes for point in points if point.bytes >= GRADIENTS}):
        mpi, gloo = (found.get(("allreduce", transport, size)) for transport in ("MPI", "Gloo"))
        if mpi and gloo:
            yield ratio(NAME, f"allreduce of {size_text(size)}, {mpi.ranks} ranks: MPI against Gloo",
                        mpi.bus_bandwidths, gloo.bus_bandwidths, limit=MPI_LIMIT)


def _row(point: Point) -> tuple:
    seconds, bus = statistics.median(point.seconds), statistics.median(point.bus_bandwidths)
    memcpy = statistics.median(point.memcpy_bandwidths)
    return (size_text(point.bytes), point.transport, round(1e6 * seconds, 1),
            *(round(value, 4) for value in (point.bytes / seconds / 1e9, bus, memcpy, bus / memcpy)))


def _lines(points: Sequence[Point], value) -> dict[str, tuple]:
    return {transport: tuple((float(point.bytes), value(point)) for point in points if point.transport == transport)
            for transport in dict.fromkeys(point.transport for point in points)}


def _memcpy(points: Sequence[Point]) -> dict[int, float]:
    """Return memcpy's GB/s by size; all transports' rounds together, for it is the same memory."""
    sizes = sorted({point.bytes for point in points})
    return {size: statistics.median(bandwidth for point in points if point.bytes == size
                                    for bandwidth in point.memcpy_bandwidths) for size in sizes}
