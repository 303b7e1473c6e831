"""A process of the server that answers: loads the models, then runs uvicorn until it is told to stop."""

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import uvicorn

from hpcai_cli.engine.serving import memory
from hpcai_cli.engine.serving.app import Application
from hpcai_cli.engine.serving.batching import STUCK_SECONDS
from hpcai_cli.engine.serving.connection import Connection
from hpcai_cli.engine.serving.listening import Server
from hpcai_cli.engine.serving.metrics import Metrics
from hpcai_cli.engine.serving.models import Models, Place
from hpcai_cli.engine.serving.request_log import RequestLog
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.shares import Shares
from hpcai_cli.engine.serving.wire import Wire
from hpcai_cli.errors import HpcaiError

STOP_SECONDS = 30
"""In which what was taken is finished when the server stops."""
_DRAIN_SECONDS = 0.3
"""For which a server that stops still answers, so that clients learn from the answers to go elsewhere."""
_KEEP_ALIVE_SECONDS = 75
"""For which an idle connection is kept; longer than proxies keep theirs, which else meet a closed one."""
_CHECK_SECONDS = 1.0
_STUCK = "a model ran for longer than any request waits"
_LOAD_SECONDS = 600.0


@dataclass(frozen=True)
class Start:
    """What a worker begins with."""

    settings: Settings
    folders: Mapping[str, Path]
    listener: socket.socket
    control: socket.socket
    """To the parent; when it ends, so does the worker."""
    state: Path
    slot: int
    """Number of the worker."""
    shares: Shares
    proven: frozenset[str]
    """Digests of exports that other workers have opened."""
    first: bool
    """Whether the server is just starting, so that whatever is wrong should end it."""


def work(start: Start) -> NoReturn:
    """Be a worker, in a process that was just forked; never returns."""
    code, wire = 1, Wire(start.control)
    try:
        signal.set_wakeup_fd(-1)
        actions = {signal.SIGINT: signal.SIG_IGN, signal.SIGHUP: signal.SIG_IGN, signal.SIGTERM: signal.SIG_DFL,
                   signal.SIGCHLD: signal.SIG_DFL}
        for number, action in actions.items():
            signal.signal(number, action)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, actions)
        # It would tell of each broken form, which the answer does.
        logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
        # A model's thread has its answers ready, and should not wait long for the loop to let it tell.
        sys.setswitchinterval(0.001)
        memory.use_one_heap()
        _Worker(start, wire).run()
        code = 0
    except HpcaiError as error:
        code = error.exit_code
        wire.send({"failed": code, "error": str(error)})
    except BaseException as error:
        wire.send({"failed": 1, "error": f"{type(error).__name__}: {error}"})
        traceback.print_exc()
    finally:
        # The parent's temporary folder and exit handlers are not this process's to clean up.
        os._exit(code)


class _Worker:
    def __init__(self, start: Start, wire: Wire):
        self._start, self._wire = start, wire
        self._log = RequestLog(start.settings.log_file)
        self._place = Place(start.state, start.slot, Metrics(list(start.folders), start.state, start.slot),
                            set(start.proven))
        self._models = Models(start.folders, start.settings, self._place)
        self._app = Application(self._models, start.settings, self._place, self._log)
        self._app.load = self._ask_to_load
        self._asked: dict[int, asyncio.Future] = {}
        self._tasks: set[asyncio.Task] = set()
        self._turned = float("inf")
        """When the event loop was last seen to turn."""

    def run(self) -> None:
        problems = self._models.load(strict=self._start.first)
        # What was loaded stays: the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        loop = _new_loop()
        # One thread for what comes now and then, models above all: a pool would grow with the reloads.
        loop.set_default_executor(ThreadPoolExecutor(1, thread_name_prefix="loader"))
        asyncio.set_event_loop(loop)
        loop.run_until_complete(self._serve(loop, problems))
        self._log.close()

    async def _serve(self, loop: asyncio.AbstractEventLoop, problems: list[str]) -> None:
        self._server = Server(_config(self._app, self._start.settings), self._start.shares, self._start.slot)
        self._app.is_crowded = self._server.is_crowded
        self._server.on_started = lambda: self._started(loop, problems)
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_reader(self._start.control, self._hear)
        self._begin(self._check())
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        await self._server.serve(sockets=[self._start.listener])

    def _started(self, loop: asyncio.AbstractEventLoop, problems: list[str]) -> None:
        self._wire.send({"ready": True, "proven": sorted(self._place.proven), "problems": problems})
        # What the first request does not need comes while it may already be there.
        loop.run_in_executor(None, _import_the_rest)

    # ---- The parent ------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        messages = self._wire.receive()
        if messages is None:
            # The parent is gone, and with it whoever could stop this worker.
            asyncio.get_running_loop().remove_reader(self._start.control)
            return self._stop()
        for message in messages:
            if "reload" in message:
                self._begin(self._reload(message["reload"]))
            elif (asked := self._asked.pop(message.get("done"), None)) is not None and not asked.done():
                asked.set_result(message["problems"])

    async def _reload(self, number: int) -> None:
        try:
            problems = await self._models.reload()
        except Exception as error:
            problems = [f"{type(error).__name__}: {error}"]
        self._wire.send({"reloaded": number, "problems": problems, "proven": sorted(self._place.proven)})

    async def _ask_to_load(self) -> list[str]:
        """Have all workers load what is new, by the parent; return what could not be loaded."""
        asked = asyncio.get_running_loop().create_future()
        number = max(self._asked, default=0) + 1
        self._asked[number] = asked
        self._wire.send({"ask": number})
        try:
            return await asyncio.wait_for(asked, _LOAD_SECONDS)
        finally:
            self._asked.pop(number, None)

    # ---- The end ---------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        if not self._app.draining:
            self._app.draining = True
            self._begin(self._drain())

    async def _drain(self) -> None:
        await asyncio.sleep(_DRAIN_SECONDS)
        self._server.should_exit = True

    async def _check(self) -> None:
        """Look after connections whose clients are too slow, and make room for another worker when a model hangs."""
        loop = asyncio.get_running_loop()
        while True:
            self._turned = time.monotonic()
            await asyncio.sleep(_CHECK_SECONDS)
            for connection in list(self._server.server_state.connections):
                connection.check(loop.time())
            if self._app.is_stuck() and not self._app.draining:
                self._wire.send({"failed": 1, "error": _STUCK})
                self._stop()

    def _watch(self) -> None:
        """End the process when the loop itself hangs in a model: nobody else could, and nobody is answered any more."""
        late = 0
        # Twice, since the whole process may have been kept from running.
        while late < 2:
            time.sleep(_CHECK_SECONDS)
            since = time.monotonic() - self._turned
            late = late + 1 if since > self._start.settings.timeout + STUCK_SECONDS else 0
        self._wire.send({"failed": 1, "error": _STUCK})
        os._exit(1)

    def _begin(self, coroutine) -> None:
        # The loop itself holds its tasks weakly.
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _import_the_rest() -> None:
    """Import what the first form and the first look at the metrics would else wait for."""
    import prometheus_client  # noqa: F401
    import python_multipart  # noqa: F401


def _config(app: Application, settings: Settings) -> uvicorn.Config:
    tls = {"ssl_certfile": settings.tls_cert, "ssl_keyfile": settings.tls_key or None} if settings.tls_cert else {}
    return uvicorn.Config(app, http=Connection, ws="none", lifespan="off", interface="asgi3", access_log=False,
                          log_config=None, log_level="error", proxy_headers=False, server_header=False,
                          timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=STOP_SECONDS, **tls)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
