"""Joules of a run: what the host's processors and GPUs count, or what a power meter writes; never an estimate."""

import json
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.energy_sources import NVML, POWERCAP, Counter, gpus, processors
from hpcai_cli.engine.power_file import PowerFile

READ_SECONDS = 10.0
"""Time between two readings of the counters, of which the smallest are full after some minutes."""


class Meter:
    """Measures the energy that this host takes between `start` and `finish`, whoever causes it there.

    Args:
        power_file: a power meter's file, whose readings then count instead of the host's own counters.
        powercap: the folder of the processors' counters.
        nvml: the library that reads the GPUs' counters.

    Raises:
        DataError: the power meter's file cannot be read.
    """

    def __init__(self, power_file: Path | None = None, *, powercap: Path = POWERCAP, nvml: str = NVML):
        self._measurement = (_FileMeasurement(PowerFile(power_file)) if power_file else
                             _CounterMeasurement(RAPL=partial(processors, powercap), NVML=partial(gpus, nvml)))

    def start(self) -> None:
        """Begin to measure."""
        self._measurement.start()
        self._started = time.monotonic()

    def mark(self) -> float:
        """Read what is measured until now, so that `between` knows this moment, and return it as unix time."""
        return self._measurement.mark()

    def between(self, started: float, ended: float) -> float:
        """Return the joules between two marks, once `finish` was called.

        Raises:
            OSError: why nothing can be said.
        """
        return self._measurement.between(started, ended)

    def finish(self) -> dict:
        """Stop, and return what was measured.

        Returns:
            `joules`, None where nothing could be measured; `seconds`; `source`, what was read, in words, None where
            nothing was; `parts`, joules by name; `reason`, why nothing was measured or what the joules lack, else None.
        """
        seconds = time.monotonic() - self._started
        joules, source, parts, reason = self._measurement.finish()
        return {"joules": joules, "seconds": round(seconds, 3), "source": source, "parts": parts, "reason": reason}


class _FileMeasurement:
    """What a power meter's file says of the time between start and finish."""

    def __init__(self, file: PowerFile):
        self._file, self._started, self._reason = file, 0.0, None

    def start(self) -> None:
        try:
            self._file.begin()
        except OSError as error:
            self._reason = str(error)
        self._started = time.time()

    def mark(self) -> float:
        return time.time()

    def between(self, started: float, ended: float) -> float:
        if self._reason is not None:
            raise OSError(self._reason)
        return self._file.joules(started, ended, part=True)

    def finish(self) -> tuple:
        if self._reason is None:
            try:
                joules = self._file.joules(self._started, time.time())
                return joules, f"power meter ({self._file.path})", {}, None
            except OSError as error:
                self._reason = str(error)
        return None, None, {}, self._reason


class _CounterMeasurement:
    """What the host's counters count between start and finish.

    Args:
        kinds: by name, what finds the counters of a kind.
    """

    def __init__(self, **kinds: Callable[[], list[Counter]]):
        self._kinds = kinds
        self._counters: dict[str, list[Counter]] = {}
        self._reasons: dict[str, str] = {}
        self._marks: dict[float, dict[str, float]] = {}
        self._reading = threading.Lock()
        self._ended = threading.Event()
        self._reader = threading.Thread(target=self._read_often, name="energy", daemon=True)

    def start(self) -> None:
        for kind, find in self._kinds.items():
            try:
                self._counters[kind] = find()
            except (OSError, ValueError) as error:
                self._reasons[kind] = str(error)
        self._reader.start()

    def mark(self) -> float:
        self._read()
        now = time.time()
        self._marks[now] = {kind: sum(counter.joules for counter in counters)
                            for kind, counters in self._counters.items()}
        return now

    def between(self, started: float, ended: float) -> float:
        if not any(self._counters.values()):
            raise OSError("; ".join(self._reasons.values()))
        # Of a kind that was lost meanwhile, no part is known either.
        return sum(self._marks[ended][kind] - self._marks[started][kind] for kind, counters in self._counters.items()
                   if counters)

    def finish(self) -> tuple:
        self._ended.set()
        self._reader.join()
        self._read()
        for kind, counters in list(self._counters.items()):
            still = [counter.name for counter in counters if counter.joules == 0]
            if still:
                self._lose(kind, f"the counter of {still[0]} stands still")
        parts = {counter.name: counter.joules for counters in self._counters.values() for counter in counters}
        words = [f"{kind} ({', '.join(counter.name for counter in counters)})"
                 for kind, counters in self._counters.items() if counters]
        lacking = "; ".join(self._reasons.values())
        if not parts:
            return None, None, {}, lacking
        return (sum(parts.values()), " and ".join(words), parts,
                f"without {' and '.join(self._reasons)}: {lacking}" if lacking else None)

    def _read_often(self) -> None:
        # In a thread, since a counter that is full twice between two readings would lose a round.
        while not self._ended.wait(READ_SECONDS):
            self._read()

    def _read(self) -> None:
        with self._reading:
            for kind, counters in list(self._counters.items()):
                try:
                    for counter in counters:
                        counter.update()
                except (OSError, ValueError) as error:
                    self._lose(kind, str(error))

    def _lose(self, kind: str, reason: str) -> None:
        del self._counters[kind]
        self._reasons[kind] = reason


class JobMeter:
    """Measures what all hosts of a job take; every rank has one and calls it at the same points.

    Args:
        ranks: the job's, from `distributed.start()`.
        power_file: as in `Meter`; one meter for the whole job, which rank 0 reads.
        sources: further arguments of `Meter`.
    """

    def __init__(self, ranks, power_file: Path | None = None, **sources):
        # The counters are the host's: two ranks of one host that read them would count everything twice.
        reads = ranks.rank == 0 if power_file else ranks.local_rank == 0
        self._ranks, self._meter = ranks, Meter(power_file, **sources) if reads else None

    def start(self) -> None:
        """Begin to measure."""
        if self._meter:
            self._meter.start()

    def finish(self, samples: int) -> dict:
        """Stop, and return the same on every rank.

        Args:
            samples: how many examples the job has worked on meanwhile.

        Returns:
            `joules` of all hosts, `joules_per_sample`, `samples`, `seconds`, `source`, `reason`, and `hosts`, what
            `Meter.finish` said on each. Without a figure from every host there is no sum: `joules` is None.
        """
        mine = [{"host": socket.gethostname(), **self._meter.finish()}] if self._meter else []
        hosts = _gathered(self._ranks, mine)
        known = all(host["joules"] is not None for host in hosts)
        joules = sum(host["joules"] for host in hosts) if known else None
        reasons = [f"{host['host']}: {host['reason']}" if len(hosts) > 1 else host["reason"]
                   for host in hosts if host["reason"]]
        return {"joules": joules, "joules_per_sample": joules / samples if known and samples else None,
                "samples": samples, "seconds": max(host["seconds"] for host in hosts),
                "source": "; ".join(dict.fromkeys(host["source"] for host in hosts)) if known else None,
                "reason": "; ".join(dict.fromkeys(reasons)) or None, "hosts": hosts}


def _gathered(ranks, rows: list[dict]) -> list[dict]:
    """Return the rows of all ranks, in the order of the ranks."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    # An empty array has no place in an allgather of every version; a line break alone is no row.
    gathered = ranks.gather(np.frombuffer(text or b"\n", np.uint8))
    return [json.loads(line) for line in gathered.tobytes().splitlines() if line.strip()]


def words(measured: dict) -> str:
    """Return what was measured, a meter's or a job's, as one sentence for people."""
    if measured["joules"] is None:
        return f"not measurable here: {measured['reason']}"
    each = measured.get("joules_per_sample")
    text = f"{console.format_value(float(measured['joules']))} J"
    if each is not None:
        text += f", {console.format_value(float(each))} J a sample"
    text += f", by {measured['source']}"
    return f"{text}; {measured['reason']}" if measured["reason"] else text
