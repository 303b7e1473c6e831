"""What uvicorn's HTTP connection lacks: bounds on a head and its time, on connections, and errors as JSON."""

import asyncio
import select
from collections.abc import Callable

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LARGEST_HEAD = 32 << 10
"""Bytes of a request's first line and headers."""
MOST_HEADERS = 100
HEAD_SECONDS = 10.0
"""In which the head of a request must have come."""
CLOSING_SECONDS = 10.0
"""For which a connection that is to be closed waits for a client that does not read."""
MOST_CONNECTIONS = 1000
"""Of one worker; what comes on top is told to come again, and from twice as many on is not even told."""
_FRESH_SECONDS = 0.5
"""In which the first request of a connection may be on its way when the server stops."""
TASK = "hpcai.task"
"""Key of an ASGI scope under which the application leaves the task that answers, to be cancelled when the client goes
away."""

_REFUSALS = {
    400: (b"Bad Request", "this is no HTTP request that can be read"),
    408: (b"Request Timeout", f"the head of the request did not come in {HEAD_SECONDS:.0f} s"),
    431: (b"Request Header Fields Too Large",
          f"the head of the request has more than {LARGEST_HEAD:,} bytes or {MOST_HEADERS} headers"),
    503: (b"Service Unavailable\r\nretry-after: 1", "the server has too many connections"),
}


class _Together:
    """Writes the head of an answer with its body: each write is a system call, and wakes the client."""

    def __init__(self, transport: asyncio.Transport, *, method: str):
        # To HEAD there comes no body, and the head would wait until all of the request's body was read.
        self._transport, self._head, self._passed = transport, b"", method == "HEAD"
        self.is_closing = transport.is_closing

    def write(self, content: bytes) -> None:
        if self._passed or content.startswith(b"HTTP/1.1 100"):
            self._transport.write(content)
        elif self._head:
            self._transport.write(self._head + content)
            self._passed = True
        else:
            self._head = content

    def flush(self) -> None:
        """Write a head without a body."""
        if self._head and not self._passed:
            self._transport.write(self._head)
            self._passed = True

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Connection(HttpToolsProtocol):
    """One connection of a client.

    Attributes:
        on_lost: called when it has ended.
    """

    on_lost: Callable[[], None] = staticmethod(lambda: None)

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._active = None
        self._in_head, self._head_bytes, self._head_size = True, 0, 0
        self._since, self._closing_since = self.loop.time(), None
        self._surplus = len(self.connections) > MOST_CONNECTIONS
        if len(self.connections) > 2 * MOST_CONNECTIONS:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.on_lost()
        self.pipeline.clear()
        if self._is_busy():
            self._active.disconnected = True
            # Nobody waits for the answer any more.
            if (task := self._active.scope.get(TASK)) is not None:
                task.cancel()

    # ---- The parser's events ---------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        # Told only now: to close a connection on which something is unread resets it, answer and all.
        if self._surplus:
            return self._refuse(503)
        if self._in_head:
            if self._head_bytes > LARGEST_HEAD:
                return self._fail(431)
            self._head_bytes += len(data)
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._begin_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        # What trails a chunked body could else pass for a header.
        if self._in_head:
            super().on_header(name, value)
            self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._begin_head()

    def _begin_head(self) -> None:
        self._in_head, self._head_bytes, self._head_size, self._since = True, 0, 0, self.loop.time()

    def _count_head(self, size: int) -> None:
        self._head_size += size
        if self._head_size > LARGEST_HEAD or len(self.headers) > MOST_HEADERS:
            raise ValueError("the head is too large")

    # ---- Refusals --------------------------------------------------------------------------------------------------

    def check(self, now: float) -> None:
        """End a connection whose client takes too long to send a head or to read an answer."""
        if self.transport.is_closing():
            self._closing_since = self._closing_since or now
            if now - self._closing_since > CLOSING_SECONDS:
                self.transport.abort()
        elif (self._in_head and self.timeout_keep_alive_task is None and not self._is_busy()
              and now - self._since > HEAD_SECONDS):
            self._refuse(408)

    def shutdown(self) -> None:
        """Close, where no request is being answered and none is just coming; the answer closes it then."""
        if self._is_busy():
            self._active.keep_alive = False
        elif self.cycle is None and self.loop.time() - self._since < _FRESH_SECONDS:
            self.loop.call_later(_FRESH_SECONDS, self.shutdown)
        elif not self.transport.is_closing() and not self._has_unread():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        self._fail(431 if self._head_size > LARGEST_HEAD or len(self.headers or ()) > MOST_HEADERS else 400)

    def on_response_complete(self) -> None:
        self._active.transport.flush()
        super().on_response_complete()

    def _start_asgi_task(self, cycle, app) -> None:
        self._active = cycle
        cycle.transport = _Together(cycle.transport, method=cycle.scope["method"])
        super()._start_asgi_task(cycle, app)

    def _has_unread(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _is_busy(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _fail(self, status: int) -> None:
        """Refuse a request; one before it, on the same connection, is answered first and nothing after it."""
        if self._is_busy() and (self._active is not self.cycle or not self._active.more_body):
            self._active.keep_alive = False
            self.pipeline.clear()
            self.flow.pause_reading()
        else:
            self._refuse(status)

    def _refuse(self, status: int) -> None:
        if self._is_busy():
            if self._active.response_started:
                # All of the answer is written by now; what is broken behind it must not cost the client that.
                return self._active.transport.close()
            self._active.disconnected = True
            self._active.message_event.set()
        phrase, message = _REFUSALS[status]
        body = orjson.dumps({"error": message})
        self.transport.write(b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
                             b"connection: close\r\n\r\n%s" % (status, phrase, len(body), body))
        self.transport.close()
