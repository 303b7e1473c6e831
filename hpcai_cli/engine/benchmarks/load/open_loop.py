"""An open-loop client: requests are sent when they are due, whether or not earlier ones were answered.

A closed-loop client waits for slow answers before it asks again, and so never sees the queue that it would have stood
in (coordinated omission). Here the time of an answer counts from when its request was due.
"""

import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcai_cli.engine.benchmarks.load import http_answers
from hpcai_cli.errors import HpcaiError

CONNECTIONS = 64
"""That are kept open; a due request waits for one that is free."""
_COARSE = 0.002
"""Seconds before a request is due from which the client looks again and again: the system's waiting is rounded up to
milliseconds, and a request that is sent late would count as one that is answered late."""
_HERE = "127.0.0.1"
_PATIENCE = 10.0
"""Seconds in which a connection must come about and a request must be taken."""
_DRAIN = 5.0
"""Seconds in which answers may come after the last request was due."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int
    tls: ssl.SSLContext | None = None
    """With what the connections are encrypted; None for plain ones."""

    def __str__(self) -> str:
        return f"port {self.port}" if self.host == _HERE else f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Outcome:
    """What became of a load."""

    offered: float
    """Requests per second that were due."""
    answered: float
    """Answers with status 200 per second, from the first that was due to the last answer."""
    statuses: dict[int, int]
    """Answers by status; 0 counts requests without one."""
    seconds: np.ndarray
    """From when a request was due to its answer of status 200, ascending, float64 (n,)."""
    late: float = 0.0
    """Milliseconds after which the client itself has noticed that requests are due, of 99 in 100: its own part in their
    times."""

    def percentile(self, share: float) -> float:
        """Return the milliseconds within which so many percent were answered."""
        return float(1000 * np.percentile(self.seconds, share)) if len(self.seconds) else float("inf")


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request; moments are those of time.perf_counter()."""

    number: int
    """Of the request, from 0 on."""
    status: int
    """0 where no answer came."""
    content: bytes
    """All that came, head and body."""
    sent: float
    came: float
    port: int
    """Of the client's end of the connection."""
    is_first: bool
    """Whether it was its connection's first request, which a server that ends may never have taken."""


def request_of(path: str, body: bytes, headers: dict[str, str], host: str = "localhost") -> bytes:
    """Return an HTTP/1.1 POST request as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def drive(server: int | Address, requests: bytes | Sequence[bytes], *, rate: float, seconds: float,
          connections: int = CONNECTIONS, heard: Callable[[Answer], None] | None = None) -> Outcome:
    """Send requests, one after the other and again from the first, at a constant rate to a server.

    Args:
        server: its port where it is on this host.
        heard: is told what became of each request that was sent.

    Raises:
        HpcaiError: nothing listens there.
    """
    address = Address(_HERE, server) if isinstance(server, int) else server
    load = _Load(address, [requests] if isinstance(requests, bytes) else requests, connections, heard)
    total, due = max(1, int(rate * seconds)), 0
    started, late = time.perf_counter(), []
    load.last = started
    finish = started + seconds + _DRAIN
    try:
        while (now := time.perf_counter()) < finish and (due < total or load.waiting or load.under_way):
            while due < total and started + due / rate <= now:
                load.waiting.append((due, started + due / rate))
                late.append(now - started - due / rate)
                due += 1
            load.send()
            wait = started + due / rate - time.perf_counter() if due < total else 0.05
            load.hear(min(max(wait - _COARSE, 0.0), 0.05))
    finally:
        load.close()
    statuses = load.statuses
    if lost := total - sum(statuses.values()):
        statuses[0] = statuses.get(0, 0) + lost
    spent = max(load.last - started, seconds)
    return Outcome(total / seconds, statuses.get(200, 0) / spent, statuses, np.sort(np.array(load.taken)),
                   float(1000 * np.percentile(late, 99)) if late else 0.0)


class _Load:
    """The connections and what is under way on them."""

    def __init__(self, server: Address, requests: Sequence[bytes], connections: int,
                 heard: Callable[[Answer], None] | None):
        self._requests, self._heard, self._selector = requests, heard, selectors.DefaultSelector()
        self._free = deque(_Connection(server, self._selector) for _ in range(connections))
        for connection in self._free:
            try:
                connection.open()
            except OSError as error:
                self.close()
                raise HpcaiError(f"nothing answers on {server}: {error.strerror or error}") from None
        self.waiting: deque[tuple[int, float]] = deque()
        self.under_way: dict[_Connection, tuple[int, float, float]] = {}
        self.statuses: dict[int, int] = {}
        self.taken: list[float] = []
        self.last = 0.0

    def send(self) -> None:
        """Send what is due, as far as connections are free."""
        while self.waiting and self._free:
            connection = self._free.popleft()
            number, due = self.waiting.popleft()
            self.under_way[connection] = number, due, time.perf_counter()
            if not connection.send(self._requests[number % len(self._requests)]):
                self._end(connection, 0)

    def hear(self, seconds: float) -> None:
        """Take the answers that come within some seconds."""
        for key, _ in self._selector.select(seconds):
            status = key.data.receive()
            if status is not None and key.data in self.under_way:
                self._end(key.data, status)
            elif status is not None:
                # The server has closed it while nothing was asked.
                key.data.close()

    def close(self) -> None:
        for key in list(self._selector.get_map().values()):
            key.data.close()

    def _end(self, connection: "_Connection", status: int) -> None:
        number, due, sent = self.under_way.pop(connection)
        self.last = time.perf_counter()
        self.statuses[status] = self.statuses.get(status, 0) + 1
        if status == 200:
            self.taken.append(self.last - due)
        if self._heard:
            self._heard(Answer(number, status, connection.received, sent, self.last, connection.port,
                               connection.requests <= 1))
        if not status or connection.is_last:
            connection.close()
        self._free.append(connection)


class _Connection:
    """One connection that is kept open as long as the server does, with what has come of an answer."""

    def __init__(self, server: Address, selector: selectors.BaseSelector):
        self._server, self._selector, self._socket = server, selector, None
        self.received, self.port, self.requests, self.is_last = b"", 0, 0, False
        self._head: http_answers.Head | None = None

    def open(self) -> None:
        made = socket.create_connection((self._server.host, self._server.port), timeout=_PATIENCE)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tls = self._server.tls
        self._socket = tls.wrap_socket(made, server_hostname=self._server.host) if tls else made
        self.port = self._socket.getsockname()[1]
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def send(self, request: bytes) -> bool:
        """Send a request, on a new connection where the last one was closed; False where that cannot be."""
        self.received, self._head, self.is_last = b"", None, False
        try:
            if self._socket is None:
                self.open()
            self.requests += 1
            # A request fits the socket's buffer; a server that reads nothing for seconds loses it.
            self._socket.sendall(request)
            return True
        except OSError:
            return False

    def receive(self) -> int | None:
        """Return the status once an answer is whole, 0 where the connection is gone, None before."""
        try:
            part = self._decrypted() if self._server.tls else self._socket.recv(1 << 18)
        except ssl.SSLWantReadError:
            return None
        except OSError:
            part = b""
        self.received += part
        try:
            self._head = self._head or http_answers.head_of(self.received)
            if self._head and self._head.is_whole(self.received, ended=not part):
                self.is_last = self._head.is_last
                return self._head.status
        except ValueError:
            return 0
        return None if part else 0

    def _decrypted(self) -> bytes:
        """Return what has come on a TLS connection; what came may be no more than a part of a record, or a ticket."""
        self._socket.setblocking(False)
        try:
            part = self._socket.recv(1 << 18)
            while self._socket.pending():
                # What is decrypted already makes no socket readable.
                part += self._socket.recv(1 << 18)
            return part
        finally:
            self._socket.settimeout(_PATIENCE)

    def close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket, self.requests = None, 0
