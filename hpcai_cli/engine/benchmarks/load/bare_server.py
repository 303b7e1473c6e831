"""The least that a server can do: it answers every request with the same few bytes, whatever was asked.

`python bare_server.py PORT`: what its clients measure is the machine's own part, its loopback, its waking up and what
keeps it from running, and no server's.
"""

import contextlib
import selectors
import socket
import sys

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
_END = b"\r\n\r\n"


def main(port: int) -> None:
    """Answer on loopback until the process is ended."""
    selector, listener = selectors.DefaultSelector(), socket.create_server(("127.0.0.1", port), backlog=1024)
    selector.register(listener, selectors.EVENT_READ)
    gathered: dict[socket.socket, bytes] = {}
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(client, selectors.EVENT_READ)
                gathered[client] = b""
                continue
            client, content = key.fileobj, b""
            with contextlib.suppress(OSError):
                content = client.recv(1 << 16)
            if content:
                gathered[client] = _answer(client, gathered[client] + content)
            else:
                selector.unregister(client)
                del gathered[client]
                client.close()


def _answer(client: socket.socket, content: bytes) -> bytes:
    """Answer the requests that are whole, and return the rest."""
    while (end := content.find(_END)) >= 0:
        length = content[:end].lower().partition(b"content-length:")[2].split(b"\r\n")[0]
        size = end + len(_END) + int(length or 0)
        if len(content) < size:
            break
        content = content[size:]
        with contextlib.suppress(OSError):
            client.sendall(ANSWER)
    return content


if __name__ == "__main__":
    main(int(sys.argv[1]))
