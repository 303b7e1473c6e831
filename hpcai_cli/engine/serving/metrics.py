"""Counts of requests in a file that each worker maps into its memory, summed up for Prometheus.

The names of a server's models are known when it starts, and so is the layout of the file, which lives on when its
worker is killed and replaced.
"""

import mmap
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

import numpy as np

STATUSES = (200, 400, 401, 404, 405, 408, 411, 413, 415, 499, 500, 503, 504)
"""What requests end with; 499 stands for clients that went away, and the place behind the last for any other."""
SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
NO_MODEL = ""
"""Name under which requests count that concern no model."""

_STATUS_PLACES = {status: place for place, status in enumerate(STATUSES)}
_LATENCY = len(STATUSES) + 1
_BATCH = _LATENCY + len(SECONDS) + 2
_GAUGES = _BATCH + len(BATCHES) + 2
_WIDTH = _GAUGES + 2
"""Numbers of a model: the statuses, the bins of both histograms with their sums, requests in flight, examples taken."""


class Metrics:
    """The counts of one worker, a row for each model."""

    def __init__(self, names: Sequence[str], folder: Path, slot: int):
        """Map the worker's file.

        Args:
            slot: number of the worker; one that replaces another goes on with its counts.
        """
        self._names, self._folder = (NO_MODEL, *names), folder
        path, size = folder / f"metrics-{slot}.bin", 8 * _WIDTH * (len(names) + 1)
        if not path.exists() or path.stat().st_size != size:
            path.write_bytes(bytes(size))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), size)
        view = memoryview(self._map).cast("d")
        self._rows = {name: Row(view[place * _WIDTH:(place + 1) * _WIDTH]) for place, name in enumerate(self._names)}
        for row in self._rows.values():
            row.forget()

    def row(self, name: str) -> "Row":
        """Return the counts of a model."""
        return self._rows[name]

    def text(self) -> bytes:
        """Return the sums over all workers in Prometheus' text format."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self):
        """Yield the families of metrics; Prometheus' registry calls this."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        requests = CounterMetricFamily("hpcai_requests", "Requests by model and HTTP status.",
                                       labels=("model", "status"))
        latency = HistogramMetricFamily("hpcai_request_seconds", "Seconds from a request's head to its answer.",
                                        labels=("model",))
        batches = HistogramMetricFamily("hpcai_batch_size", "Examples that a model got at once.", labels=("model",))
        in_flight = GaugeMetricFamily("hpcai_requests_in_flight", "Requests that are being answered.",
                                      labels=("model",))
        queued = GaugeMetricFamily("hpcai_examples_queued", "Examples that were taken and are not answered yet.",
                                   labels=("model",))
        for name, row in zip(self._names, self._sums(), strict=True):
            for status, count in zip((*STATUSES, "other"), row, strict=False):
                if count:
                    requests.add_metric((name, str(status)), count)
            latency.add_metric((name,), *_histogram(SECONDS, row[_LATENCY:_BATCH]))
            in_flight.add_metric((name,), row[_GAUGES])
            if name != NO_MODEL:
                batches.add_metric((name,), *_histogram(BATCHES, row[_BATCH:_GAUGES]))
                queued.add_metric((name,), row[_GAUGES + 1])
        yield from (requests, latency, batches, in_flight, queued)

    def _sums(self) -> np.ndarray:
        """Return the counts over all workers, (models, numbers)."""
        shape = (len(self._names), _WIDTH)
        found = [np.frombuffer(content).reshape(shape) for path in sorted(self._folder.glob("metrics-*.bin"))
                 if len(content := path.read_bytes()) == 8 * shape[0] * shape[1]]
        return np.sum(found, axis=0)


class Row:
    """A worker's counts of one model."""

    def __init__(self, numbers: memoryview):
        self._numbers = numbers

    def begin(self) -> None:
        """Count a request that is being answered."""
        self._numbers[_GAUGES] += 1

    def end(self, status: int, seconds: float) -> None:
        """Count the answer of a request that has begun."""
        numbers = self._numbers
        numbers[_GAUGES] -= 1
        numbers[_STATUS_PLACES.get(status, len(STATUSES))] += 1
        numbers[_LATENCY + bisect_left(SECONDS, seconds)] += 1
        numbers[_BATCH - 1] += seconds

    def batch(self, size: int) -> None:
        """Count a batch."""
        self._numbers[_BATCH + bisect_left(BATCHES, size)] += 1
        self._numbers[_GAUGES - 1] += size

    def queued(self, examples: int) -> None:
        """Say how many examples were taken and are not answered yet."""
        self._numbers[_GAUGES + 1] = examples

    def forget(self) -> None:
        """Forget what a killed worker had in its hands."""
        self._numbers[_GAUGES] = self._numbers[_GAUGES + 1] = 0


def _histogram(bounds: Sequence[float], numbers: np.ndarray) -> tuple[list[tuple[str, float]], float]:
    """Return the cumulative buckets and the sum, as Prometheus has them, of (bins, overflow, sum)."""
    counts = np.cumsum(numbers[:-1])
    return [(str(bound), count) for bound, count in zip((*map(float, bounds), "+Inf"), counts.tolist(), strict=True)], \
        float(numbers[-1])
