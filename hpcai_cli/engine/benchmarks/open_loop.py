"""An open-loop client: requests are sent when they are due, whether or not earlier ones were answered.

A closed-loop client waits for slow answers before it asks again, and so never sees the queue that it would have stood
in (coordinated omission). Here the time of an answer counts from when its request was due.
"""

import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hpcai_cli.errors import HpcaiError

CONNECTIONS = 64
"""That are kept open; a due request waits for one that is free."""
_DRAIN = 5.0
"""Seconds in which answers may come after the last request was due."""


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


def request_of(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return an HTTP/1.1 POST request as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def drive(port: int, requests: bytes | Sequence[bytes], *, rate: float, seconds: float,
          connections: int = CONNECTIONS, heard: Callable[[Answer], None] | None = None) -> Outcome:
    """Send requests, one after the other and again from the first, at a constant rate to a server on this host.

    Args:
        heard: is told what became of each request that was sent.

    Raises:
        HpcaiError: nothing listens there.
    """
    load = _Load(port, [requests] if isinstance(requests, bytes) else requests, connections, heard)
    total, due = max(1, int(rate * seconds)), 0
    started = load.last = time.perf_counter()
    finish = started + seconds + _DRAIN
    while (now := time.perf_counter()) < finish and (due < total or load.waiting or load.under_way):
        while due < total and started + due / rate <= now:
            load.waiting.append((due, started + due / rate))
            due += 1
        load.send()
        wait = started + due / rate - time.perf_counter() if due < total else 0.05
        load.hear(min(max(wait, 0.0), 0.05))
    load.close()
    statuses = load.statuses
    if lost := total - sum(statuses.values()):
        statuses[0] = statuses.get(0, 0) + lost
    spent = max(load.last - started, seconds)
    return Outcome(total / seconds, statuses.get(200, 0) / spent, statuses, np.sort(np.array(load.taken)))


class _Load:
    """The connections and what is under way on them."""

    def __init__(self, port: int, requests: Sequence[bytes], connections: int,
                 heard: Callable[[Answer], None] | None):
        self._requests, self._heard, self._selector = requests, heard, selectors.DefaultSelector()
        self._free = deque(_Connection(port, self._selector) for _ in range(connections))
        for connection in self._free:
            try:
                connection.open()
            except OSError as error:
                raise HpcaiError(f"nothing answers on port {port}: {error.strerror or error}") from None
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
            if key.data not in self.under_way:
                # The server has closed it while nothing was asked.
                key.data.close()
            elif status is not None:
                self._end(key.data, status)

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

    def __init__(self, port: int, selector: selectors.BaseSelector):
        self._port, self._selector, self._socket = port, selector, None
        self.received, self.port, self.requests, self.is_last = b"", 0, 0, False

    def open(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self._socket.getsockname()[1]
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def send(self, request: bytes) -> bool:
        """Send a request, on a new connection where the last one was closed; False where that cannot be."""
        self.received, self._length, self.is_last = b"", 0, False
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
            part = self._socket.recv(1 << 18)
        except OSError:
            part = b""
        if not part:
            return 0
        self.received += part
        if not self._length:
            end = self.received.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self.received[:end].lower()
            place = head.find(b"content-length:")
            self._length = end + 4 + (int(head[place + 15:].split(b"\r\n", 1)[0]) if place >= 0 else 0)
            self.is_last = b"\r\nconnection: close" in head
        return int(self.received[9:12]) if len(self.received) >= self._length else None

    def close(self) -> None:
        if self._socket is not None:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket, self.requests = None, 0
