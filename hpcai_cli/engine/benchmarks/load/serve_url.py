"""Serve, of any server of the Open Inference Protocol v2: latency by rate, throughput and errors, open loop."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.load import open_loop, protocol_client, protocol_requests
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table, interleaved, median
from hpcai_cli.errors import DataError, UsageError

ROUNDS = 3
START = 16.0
"""Requests per second that are tried first."""
BEARABLE = 0.98
"""Share of the offered requests that are answered with 200 by a server that bears them."""
FINER = 3
"""Rates that are tried between the last one that was borne and the first that was not."""
MOST_RATE = 200_000.0
"""Requests per second beyond which nothing is tried."""
SHARES = (0.1, 0.5, 0.7, 0.9)
"""Of the highest rate that is borne, at which the latency is measured."""
_FIRST = 60.0
"""Seconds in which the first request must be answered."""
LATE = 0.5
"""Share of the 99th percentile that may be the client's own delay before it is said."""


@dataclass(frozen=True)
class Asked:
    """What the user asked for, beside the rates.

    Attributes:
        model: its name.
        seconds: of one rate in one round.
        connections: that are kept open.
        batch: examples in a request.
        tensors: json, binary, or auto for what the server offers.
        shapes: NAME=N,N,... of inputs whose shape the server leaves open.
    """

    model: str
    seconds: float
    connections: int
    batch: int
    tensors: str
    shapes: tuple[str, ...]

    def of(self, url: str, token: str, certificate: Path | None) -> "Load":
        """Return the load on a server, which has said what the model takes, and has answered one request of that.

        Raises:
            UsageError: something cannot be asked for, or the server has no such model.
            DataError: it does not speak the protocol, or does not take what it says that it takes.
            HpcaiError: nobody listens, or the server refuses.
        """
        if self.tensors not in ("auto", "json", "binary"):
            raise UsageError("cannot read --tensors", expected="auto, json or binary", received=self.tensors)
        shapes = dict(map(_read_shape, self.shapes))
        server = protocol_client.server_at(url, token=token, certificate=certificate)
        model = protocol_client.describe(server, self.model)
        requests = protocol_requests.requests_for(
            server, model, shapes=shapes, batch=self.batch,
            binary=model.takes_binary if self.tensors == "auto" else self.tensors == "binary")
        _try(server, requests[0])
        return Load(server, self.model, requests, self.seconds, self.connections)


@dataclass(frozen=True)
class Load:
    """How a server is asked.

    Attributes:
        requests: as they go over the wire, one after the other and again from the first.
        seconds: of one rate in one round.
        connections: that are kept open.
    """

    server: protocol_client.Server
    model: str
    requests: list[bytes]
    seconds: float
    connections: int


def measure(load: Load, rates: Sequence[float]) -> Iterator[Figure | Table | Curves]:
    """Load a server at constant rates, or without any at such as it bears, after those at which it no longer does.

    Args:
        rates: requests per second.

    Raises:
        HpcaiError: nobody listens.
    """
    name = f"{load.model} at {load.server.host}"
    # What a server makes ready for its first requests is no part of its latency.
    open_loop.drive(load.server.address, load.requests, rate=START, seconds=load.seconds, connections=load.connections)
    tried = [] if rates else _ramp(load)
    most = max((outcome.answered for outcome in tried if _bears(outcome)), default=0.0)
    if tried:
        yield _table(f"{name}, one rate after the other", [[outcome] for outcome in tried])
        yield Figure("serve", f"{name}: most answers at a rate that is borne", most, "1/s")
    names = {f"at {rate:g}/s": rate for rate in rates} or {
        f"at {share:.0%} of these answers": share * most for share in SHARES if most}
    if tried:
        # A rate that is too high keeps all connections busy.
        names["at saturation"] = 1.5 * max(outcome.answered for outcome in tried) or START
    # Rounds in which all rates take turns.
    found = interleaved(ROUNDS, **{words: partial(_drive, load, rate) for words, rate in names.items()})
    for words, outcomes in found.items():
        yield from _figures(f"{name}, {words}", outcomes, latency=words != "at saturation")
    yield _table(f"{name}, {load.connections} connections, {load.seconds:g} s a rate, {ROUNDS} rounds",
                 list(found.values()))
    lines = _lines([each for each in (*([outcome] for outcome in tried), *found.values())
                    if all(len(outcome.seconds) for outcome in each)])
    if lines:
        yield Curves("serve", f"{name}: latency by rate", "requests/s", "ms", lines, "y")


def _read_shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, equals, sizes = text.rpartition("=")
    try:
        shape = tuple(map(int, sizes.split(",")))
        if not equals or min(shape) < 1:
            raise ValueError
        return name, shape
    except ValueError:
        raise UsageError("cannot read --shape", expected="NAME=N,N,... of numbers from 1 on", received=text) from None


def _try(server: protocol_client.Server, request: bytes) -> None:
    """Send one request, which may take as long as a server needs that has not answered before."""
    answers: list[open_loop.Answer] = []
    open_loop.drive(server.address, request, rate=1 / _FIRST, seconds=_FIRST, connections=1, heard=answers.append)
    status, content = (answers[0].status, answers[0].content) if answers else (0, b"")
    if status != 200:
        said = protocol_client.words_of(content.partition(b"\r\n\r\n")[2])
        raise DataError(f"the server does not answer a request of what it says that the model takes: {said}",
                        expected="status 200", mend="try --tensors json, --tensors binary or --shape",
                        received=status or "no answer")


# ---- Loads ---------------------------------------------------------------------------------------------------------

def _drive(load: Load, rate: float) -> open_loop.Outcome:
    outcome = open_loop.drive(load.server.address, load.requests, rate=rate, seconds=load.seconds,
                              connections=load.connections)
    console.note(f"{rate:,.0f}/s: {outcome.answered:,.0f} answers/s, p50 {outcome.percentile(50):.3g} ms, "
                 f"p99 {outcome.percentile(99):.3g} ms")
    if _bears(outcome) and outcome.late > LATE * outcome.percentile(99):
        console.note(f"at {rate:,.0f}/s this client itself is late by {outcome.late:.3g} ms; the server may be quicker")
    return outcome


def _ramp(load: Load) -> list[open_loop.Outcome]:
    """Return what became of rates, each twice the one before, until one is not borne, and of some just below it."""
    tried, rate = [], START
    while rate < MOST_RATE:
        tried.append(_tried(load, rate))
        if not _bears(tried[-1]):
            break
        rate *= 2
    low, high = rate / 2, rate
    for _ in range(FINER if len(tried) > 1 else 0):
        rate = (low * high) ** 0.5
        tried.append(_tried(load, rate))
        low, high = (rate, high) if _bears(tried[-1]) else (low, rate)
    return sorted(tried, key=lambda outcome: outcome.offered)


def _tried(load: Load, rate: float) -> open_loop.Outcome:
    # A rate that is not borne is tried once more: a machine may have been away for a moment.
    outcome = _drive(load, rate)
    return outcome if _bears(outcome) else _drive(load, rate)


def _bears(outcome: open_loop.Outcome) -> bool:
    return set(outcome.statuses) == {200} and outcome.answered >= BEARABLE * outcome.offered


# ---- What became of them -------------------------------------------------------------------------------------------

def _figures(name: str, outcomes: Sequence[open_loop.Outcome], *, latency: bool) -> Iterator[Figure]:
    if not latency:
        yield median("serve", f"{name}: answers", [outcome.answered for outcome in outcomes], "1/s")
    elif all(len(outcome.seconds) for outcome in outcomes):
        for share in (50, 90, 99):
            yield median("serve", f"{name}: p{share}", [outcome.percentile(share) for outcome in outcomes], "ms")


def _table(title: str, rows: Sequence[Sequence[open_loop.Outcome]]) -> Table:
    """Return a row for each rate: medians of its rounds, and all statuses but 200 together."""
    return Table("serve", title, ("requests/s", "answers/s", "p50 ms", "p90 ms", "p99 ms", "client late by ms",
                                  "without an answer of 200"),
                 tuple((outcomes[0].offered, _middle(outcome.answered for outcome in outcomes),
                        *(_middle(outcome.percentile(share) for outcome in outcomes) for share in (50, 90, 99)),
                        _middle(outcome.late for outcome in outcomes), _errors(outcomes)) for outcomes in rows))


def _errors(outcomes: Sequence[open_loop.Outcome]) -> str:
    counts = {}
    for outcome in outcomes:
        for status, count in outcome.statuses.items():
            counts[status] = counts.get(status, 0) + count
    return ", ".join(f"{status or 'none'}: {count:,}" for status, count in sorted(counts.items()) if status != 200)


def _lines(rows: Sequence[Sequence[open_loop.Outcome]]) -> dict[str, tuple[tuple[float, float], ...]]:
    """Return the percentiles in milliseconds by rate."""
    rows = sorted(rows, key=lambda outcomes: outcomes[0].offered)
    return {f"p{share}": tuple((outcomes[0].offered, _middle(outcome.percentile(share) for outcome in outcomes))
                               for outcomes in rows) for share in (50, 90, 99)} if rows else {}


def _middle(values: Iterable[float]) -> float | None:
    """Return the median, None where nothing was answered."""
    found = float(statistics.median(values))
    return found if math.isfinite(found) else None
