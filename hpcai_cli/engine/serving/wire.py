"""Messages between the server's parent and a worker: JSON, one to a line, on a pair of sockets."""

import contextlib
import json
import socket
from collections.abc import Mapping


class Wire:
    """One end of the pair."""

    def __init__(self, end: socket.socket):
        self._end, self._begun = end, b""

    def send(self, message: Mapping) -> None:
        """Send a message; to a process that is gone, nothing."""
        with contextlib.suppress(OSError):
            self._end.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """Return what has come, once the end is readable; None when the other process is gone."""
        try:
            content = self._end.recv(1 << 16)
        except OSError:
            content = b""
        if not content:
            return None
        *lines, self._begun = (self._begun + content).split(b"\n")
        return [json.loads(line) for line in lines]
