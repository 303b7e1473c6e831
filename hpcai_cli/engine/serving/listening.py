"""uvicorn's server with an own way to take connections, and without its signals, which are the worker's."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Sequence

import uvicorn

from hpcai_cli.engine.serving.connection import Connection
from hpcai_cli.engine.serving.shares import Shares

_AT_ONCE = 32
"""Connections that a worker takes before it looks after those it has."""
_MOMENT = 0.002
"""Seconds in which a worker that has fewer connections may take the next ones; it may be too busy, or gone."""
_SPARE = 2
"""Connections more than twice another worker's that are not yet too many."""
_CROWDED_SECONDS = 0.5
"""For which they must have been too many before some are sent away."""
_BETWEEN_SECONDS = 0.02
"""From one that is sent away to the next."""


class Server(uvicorn.Server):
    """Takes connections from a socket that all workers share.

    uvloop takes one in each turn of its loop. A busy worker's turns are long, so that new clients would wait for
    seconds, and would not even be told that there is too much to do. And whoever is first would take all: a pool of
    clients that keep their connections would stay with one worker while the others have nothing to do.

    Attributes:
        on_started: called once connections are taken.
    """

    def __init__(self, config: uvicorn.Config, shares: Shares, slot: int):
        super().__init__(config)
        self.on_started = lambda: None
        self._shares, self._slot = shares, slot
        self._tasks: set[asyncio.Task] = set()
        self._ends, self._look_again, self._alike = False, 0.0, time.monotonic()

    def is_crowded(self) -> bool:
        """Tell whether the connection of the answer that is sent now had better go to another worker.

        One that has replaced another finds no clients: those of the lost one have gone to the workers that were there.
        """
        if (now := time.monotonic()) < self._look_again:
            return False
        self._look_again = now + _BETWEEN_SECONDS
        crowded = self._count() > 2 * min(self._shares.others(self._slot), default=self._count()) + _SPARE
        if not crowded:
            self._alike = now
        return now - self._alike > _CROWDED_SECONDS

    @contextlib.contextmanager
    def capture_signals(self):
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Take connections from now on."""
        loop = asyncio.get_running_loop()
        for listener in sockets:
            loop.add_reader(listener, self._take, loop, listener)
        self.servers, self.started = [], True
        self._publish()
        self.on_started()

    async def shutdown(self, sockets: Sequence[socket.socket] = ()) -> None:
        """Take what came until now, which would be reset else, and no more; then finish what was taken."""
        loop = asyncio.get_running_loop()
        self._ends = True
        for listener in sockets:
            loop.remove_reader(listener)
            while self._accept(loop, listener):
                pass
        self._publish()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
        await super().shutdown(sockets=sockets)

    def _take(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> None:
        """Take connections until another worker has fewer, to which the next ones are left for a moment."""
        for _ in range(_AT_ONCE):
            others = self._shares.others(self._slot)
            least = min(others, default=self._count())
            if self._count() > least + least // 8:
                loop.remove_reader(listener)
                loop.call_later(_MOMENT, self._take_again, loop, listener, others)
                return
            if not self._accept(loop, listener):
                return

    def _take_again(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, before: list[int]) -> None:
        if self._ends:
            return
        if self._shares.others(self._slot) == before:
            # Not all that come: it may only have been slow to wake.
            for _ in range(1 + self._count() // 4):
                if not self._accept(loop, listener):
                    break
        loop.add_reader(listener, self._take, loop, listener)

    def _accept(self, loop: asyncio.AbstractEventLoop, listener: socket.socket) -> bool:
        try:
            made, _ = listener.accept()
        except OSError:
            # None is left; another worker was quicker; or descriptors are short, until one is closed.
            return False
        made.setblocking(False)
        task = loop.create_task(self._connect(loop, made))
        self._tasks.add(task)
        task.add_done_callback(self._connected)
        self._publish()
        return True

    async def _connect(self, loop: asyncio.AbstractEventLoop, made: socket.socket) -> None:
        try:
            await loop.connect_accepted_socket(self._connection, made, ssl=self.config.ssl)
        except Exception:
            # A handshake that failed, or a client that has gone again.
            made.close()

    def _connection(self) -> Connection:
        connection = Connection(config=self.config, server_state=self.server_state, app_state={})
        connection.on_lost = self._publish
        return connection

    def _connected(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        self._publish()

    def _count(self) -> int:
        return len(self.server_state.connections) + len(self._tasks)

    def _publish(self) -> None:
        if self._ends:
            self._shares.leave(self._slot)
        else:
            self._shares.put(self._slot, self._count())
