"""uvicorn's server with an own way to take connections, and without its signals, which are the worker's."""

import asyncio
import contextlib
import socket
from collections.abc import Sequence

import uvicorn

from hpcai_cli.engine.serving.connection import Connection

_AT_ONCE = 32
"""Connections that a worker takes before it looks after those it has, and leaves the next ones to other workers."""


class Server(uvicorn.Server):
    """Takes connections from a socket that all workers share.

    uvloop takes one in each turn of its loop. A busy worker's turns are long, so that new clients would wait for
    seconds, and would not even be told that there is too much to do.

    Attributes:
        on_started: called once connections are taken.
    """

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.on_started = lambda: None
        self._tasks: set[asyncio.Task] = set()

    @contextlib.contextmanager
    def capture_signals(self):
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Take connections from now on."""
        loop = asyncio.get_running_loop()
        for listener in sockets:
            loop.add_reader(listener, self._accept, loop, listener, _AT_ONCE)
        self.servers, self.started = [], True
        self.on_started()

    async def shutdown(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Take what came until now, which would be reset else, and no more; then finish what was taken."""
        loop = asyncio.get_running_loop()
        for listener in sockets:
            loop.remove_reader(listener)
            self._accept(loop, listener, self.config.backlog)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        await super().shutdown(sockets=sockets)

    def _accept(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, most: int) -> None:
        for _ in range(most):
            try:
                made, _ = listener.accept()
            except OSError:
                # None is left; another worker was quicker; or descriptors are short, until one is closed.
                return
            made.setblocking(False)
            task = loop.create_task(self._connect(loop, made))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, loop: asyncio.AbstractEventLoop, made: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(config=self.config, server_state=self.server_state, app_state={}), made,
                ssl=self.config.ssl)
        except Exception:
            # A handshake that failed, or a client that has gone again.
            made.close()
