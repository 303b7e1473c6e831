"""One request as the application sees it: its head, its body within bounds, its answer."""

import asyncio
import itertools
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping

import numpy as np

from hpcai_cli.engine.serving.connection import TASK
from hpcai_cli.engine.serving.models import Version
from hpcai_cli.engine.serving.tensors import RequestError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,99}")
_LINGER_SECONDS = 5.0
"""For which a body that nobody wants is read, so that its sender comes to read why."""
_LINGER_BYTES = 256 << 20
_PLAIN = {"Content-Type": "application/json"}

_numbers = itertools.count(1)
_prefix = ""


class GoneAway(Exception):
    """The client has closed its connection."""


class Call:
    """A request and its answer.

    Attributes:
        method, path, query, headers: of the request; headers by lower-case name, both bytes.
        id: what the client's header calls the request where that is harmless, else a new name.
        name: for the log, what the client's body calls it, else the id.
        started: when the head had come; time.perf_counter().
        served: the version of a model that answers, once it is known.
        examples, scores: of the answer, for the log.
        status, seconds: of the answer and until it; 0 before it.
    """

    def __init__(self, scope: Mapping, receive: Callable[[], Awaitable[Mapping]],
                 send: Callable[[Mapping], Awaitable[None]]):
        self.started = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.query: bytes = scope.get("query_string", b"")
        self._receive, self._send = receive, send
        self._unread = b"transfer-encoding" in self.headers or self.headers.get(b"content-length", b"0") != b"0"
        self._too_slow = False
        self.id = self.name = _id_of(self.headers.get(b"x-request-id"))
        self.served: Version | None = None
        self.scores: np.ndarray | None = None
        self.examples = self.status = 0
        self.seconds = 0.0
        self._task = scope[TASK] = asyncio.current_task()

    def header(self, name: bytes) -> str | None:
        """Return the value of a header, None without it."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1").strip()

    async def body(self, limit: int, seconds: float) -> bytes:
        """Read the body.

        Raises:
            RequestError: 408 it does not come in time, 411 there is none, 413 it is too long, 415 it is compressed.
            GoneAway: the client went away.
        """
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RequestError(415, "compressed bodies are not taken; expected no Content-Encoding")
        length = self.headers.get(b"content-length")
        if length is None and b"transfer-encoding" not in self.headers:
            raise RequestError(411, "the request has no body; expected a Content-Length, or a chunked body")
        if length is not None and int(length) > limit:
            raise _too_long(limit)
        timer = asyncio.get_running_loop().call_later(seconds, self._give_up)
        try:
            return await self._whole(limit)
        except asyncio.CancelledError:
            if self._too_slow:
                raise RequestError(408, f"the body did not come in {seconds:g} s") from None
            raise
        finally:
            timer.cancel()

    async def answer(self, status: int, content: bytes, headers: Mapping[str, str] = _PLAIN, *,
                     close: bool = False) -> None:
        """Send the whole answer; `finish` comes after it."""
        self.status, self.seconds = status, time.perf_counter() - self.started
        close = close or self._unread
        lines = [(b"content-length", b"%d" % len(content)), (b"x-request-id", self.id.encode())]
        lines += [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        if close:
            lines.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": status, "headers": lines})
        await self._send({"type": "http.response.body", "body": content, "more_body": self._unread})

    async def finish(self) -> None:
        """Read on for a while where a body is unread, then end the answer.

        Whoever closes on unread bytes resets the connection, and what was answered may be lost.
        """
        if self._unread and self.status:
            await self._linger()
            await self._send({"type": "http.response.body"})

    def has_body(self) -> bool:
        """Tell whether the request has a body that was not read."""
        return self._unread

    async def _whole(self, limit: int) -> bytes:
        message = await self._receive()
        if message["type"] == "http.request" and not message["more_body"]:
            self._unread = False
            content = message["body"]
            if len(content) > limit:
                raise _too_long(limit)
            return content
        content = bytearray()
        while message["type"] == "http.request":
            content += message["body"]
            if len(content) > limit:
                raise _too_long(limit)
            if not message["more_body"]:
                self._unread = False
                return bytes(content)
            message = await self._receive()
        raise GoneAway

    async def _linger(self) -> None:
        if b"expect" in self.headers:
            return
        until, left = time.monotonic() + _LINGER_SECONDS, _LINGER_BYTES
        while left > 0 and (seconds := until - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(self._receive(), seconds)
            except asyncio.TimeoutError:
                return
            if message["type"] != "http.request" or not message["more_body"]:
                return
            left -= len(message["body"])

    def _give_up(self) -> None:
        self._too_slow = True
        self._task.cancel()


def _id_of(given: bytes | None) -> str:
    """Return the client's name of a request if it is a harmless one, else a new one."""
    global _prefix
    if given is not None and _ID.fullmatch(text := given.decode("latin-1")):
        return text
    # Made late, so that workers, which are copies of one process, differ.
    _prefix = _prefix or secrets.token_hex(6)
    return f"{_prefix}-{next(_numbers):x}"


def _too_long(limit: int) -> RequestError:
    return RequestError(413, f"the body is too long; expected at most {limit:,} bytes")
