"""Where an HTTP/1.1 answer ends, for a client that reads it piece by piece (RFC 9112, section 6)."""

import re
from dataclasses import dataclass

_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[^\r\n]*chunked[ \t]*\r\n")
_CLOSE = re.compile(rb"\r\nconnection:[^\r\n]*close")
_KEEP = re.compile(rb"\r\nconnection:[^\r\n]*keep-alive")


@dataclass(frozen=True)
class Head:
    """What the head of an answer says."""

    status: int
    end: int
    """Bytes of the head, the empty line with them."""
    length: int | None
    """Bytes of the body; None where it comes in chunks, or ends with the connection."""
    is_chunked: bool
    is_last: bool
    """Whether the server closes the connection after it."""

    def is_whole(self, received: bytes, *, ended: bool = False) -> bool:
        """Tell whether all of an answer is there.

        Args:
            ended: the server has closed the connection.
        """
        if self.length is not None:
            return len(received) >= self.end + self.length
        return _chunks_end(received, self.end) if self.is_chunked else ended


def head_of(received: bytes) -> Head | None:
    """Return what the head of an answer says, None as long as it is not there.

    Raises:
        ValueError: this is no answer of HTTP.
    """
    if not received.startswith(b"HTTP/1."[:len(received)]):
        raise ValueError("no HTTP")
    place = received.find(b"\r\n\r\n")
    if place < 0:
        return None
    lines, status = received[:place + 2].lower(), int(received[9:12])
    length = 0 if status in (204, 304) else int(found[1]) if (found := _LENGTH.search(lines)) else None
    is_chunked = length is None and bool(_CHUNKED.search(lines))
    keeps = _KEEP.search(lines) if lines.startswith(b"http/1.0") else not _CLOSE.search(lines)
    return Head(status, place + 4, length, is_chunked, not keeps or (length is None and not is_chunked))


def _chunks_end(received: bytes, start: int) -> bool:
    """Tell whether the last chunk and the lines after it are there; chunks begin at `start`.

    Raises:
        ValueError: these are no chunks.
    """
    while (line := received.find(b"\r\n", start)) >= 0:
        size = int(received[start:line].partition(b";")[0], 16)
        if size < 0:
            raise ValueError("a chunk of less than nothing")
        if not size:
            return received.startswith(b"\r\n", line + 2) or received.find(b"\r\n\r\n", line + 2) >= 0
        start = line + 2 + size + 2
    return False
