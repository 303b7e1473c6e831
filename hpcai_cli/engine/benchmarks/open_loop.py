"""An open-loop client: requests are sent when they are due, whether or not earlier ones were answered.

A closed-loop client waits for slow answers before it asks again, and so never sees the queue that it would have stood
in (coordinated omission). Here the time of an answer counts from when its request was due.
"""

import selectors
import socket
import time
from collections import deque
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


def request_of(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """Return an HTTP/1.1 POST request as it goes over the wire."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers.items()), "", ""]).encode() + body


def drive(port: int, request: bytes, *, rate: float, seconds: float, connections: int = CONNECTIONS) -> Outcome:
    """Send one request again and again at a constant rate to a server on this host.

    Raises:
        HpcaiError: nothing listens there.
    """
    selector, free, waiting = selectors.DefaultSelector(), deque(), deque()
    for _ in range(connections):
        free.append(_Connection(port, selector))
    total, sent = max(1, int(rate * seconds)), 0
    statuses, taken, due = {}, [], {}
    started = time.perf_counter()
    finish = started + seconds + _DRAIN
    last = started
    while (now := time.perf_counter()) < finish and (sent < total or waiting or due):
        while sent < total and started + sent / rate <= now:
            waiting.append(started + sent / rate)
            sent += 1
        while waiting and free:
            connection = free.popleft()
            due[connection] = waiting.popleft()
            connection.send(request)
        wait = 0.0 if sent >= total else max(0.0, started + sent / rate - time.perf_counter())
        for key, _ in selector.select(min(wait, 0.05) if sent < total else 0.05):
            connection = key.data
            status = connection.receive()
            if status is None:
                continue
            last = time.perf_counter()
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                taken.append(last - due[connection])
            del due[connection]
            free.append(connection)
            if not status:
                connection.reconnect()
    lost = total - sum(statuses.values())
    if lost:
        statuses[0] = statuses.get(0, 0) + lost
    for key in list(selector.get_map().values()):
        key.data.close()
    spent = max(last - started, seconds)
    return Outcome(total / seconds, statuses.get(200, 0) / spent, statuses, np.sort(np.array(taken)))


class _Connection:
    """One connection that is kept open, with what has come of an answer."""

    def __init__(self, port: int, selector: selectors.BaseSelector):
        self._port, self._selector = port, selector
        self._open()

    def _open(self) -> None:
        try:
            self._socket = socket.create_connection(("127.0.0.1", self._port), timeout=10)
        except OSError as error:
            raise HpcaiError(f"nothing answers on port {self._port}: {error.strerror or error}") from None
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received, self._length = b"", 0
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def send(self, request: bytes) -> None:
        self._received, self._length = b"", 0
        try:
            # A request fits the socket's buffer; a server that reads nothing for seconds loses it.
            self._socket.sendall(request)
        except OSError:
            self._received = b""

    def receive(self) -> int | None:
        """Return the status once an answer is whole, 0 where the connection is gone, None before."""
        try:
            part = self._socket.recv(1 << 18)
        except OSError:
            part = b""
        if not part:
            return 0
        self._received += part
        if not self._length:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return None
            head = self._received[:end].lower()
            place = head.find(b"content-length:")
            self._length = end + 4 + (int(head[place + 15:].split(b"\r\n", 1)[0]) if place >= 0 else 0)
        return int(self._received[9:12]) if len(self._received) >= self._length else None

    def reconnect(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        self._selector.unregister(self._socket)
        self._socket.close()
