"""The server's parent: starts the workers, replaces those that die, and brings signals to all of them."""

import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from hpcai_cli.engine.serving.reloads import Child, Reloads
from hpcai_cli.engine.serving.settings import Settings
from hpcai_cli.engine.serving.shares import Shares
from hpcai_cli.engine.serving.wire import Wire
from hpcai_cli.engine.serving.worker import STOP_SECONDS, Start, work
from hpcai_cli.errors import DataError, HpcaiError, MissingError, UsageError

MOST_FAILURES = 5
"""Starts in a row that may fail while no worker answers."""
_LONGEST_PAUSE = 5.0
"""Seconds between starts that fail while other workers answer."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)


class Supervisor:
    """Keeps the workers of one server alive, in a process that has no threads and opens no model."""

    def __init__(self, settings: Settings, folders: Mapping[str, Path], listener: socket.socket, state: Path):
        self._settings, self._folders, self._listener, self._state = settings, folders, listener, state
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, Child] = {}
        self._later: dict[int, float] = {}
        self._failures = dict.fromkeys(range(settings.workers), 0)
        self._proven: set[str] = set()
        self._shares = Shares(settings.workers)
        self._reloads = Reloads(self._ready, _say)
        self._all_ready = False
        self._stopping, self._until = 0, float("inf")
        self._signals: list[int] = []

    def run(self) -> int:
        """Serve until a signal ends it, and return the exit code.

        Raises:
            HpcaiError: no worker can be started.
        """
        with self._listening_to_signals():
            try:
                for slot in range(self._settings.workers):
                    self._start(slot)
                while self._children or not self._stopping:
                    self._turn()
            finally:
                self._kill()
        return 0 if self._stopping == 1 else 1

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._pause()):
            if key.data is None:
                os.read(key.fd, 4096)
            elif key.data.pid in self._children:
                self._hear(key.data)
        while self._signals:
            self._receive(self._signals.pop(0))
        self._bury()
        now = time.monotonic()
        for slot in [slot for slot, when in self._later.items() if when <= now]:
            del self._later[slot]
            self._start(slot)
        if now > self._until:
            self._kill()

    def _pause(self) -> float | None:
        until = min([self._until, *self._later.values()])
        return None if until == float("inf") else max(0.0, until - time.monotonic())

    # ---- Workers ---------------------------------------------------------------------------------------------------

    def _start(self, slot: int) -> None:
        ours, theirs = socket.socketpair()
        self._shares.leave(slot)
        sys.stderr.flush()
        # A signal that came before the worker has its own ways would be lost.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                self._be_a_worker(slot, ours, theirs)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        theirs.close()
        child = self._children[pid] = Child(slot, pid, ours, Wire(ours), self._reloads.number)
        self._selector.register(ours, selectors.EVENT_READ, child)

    def _be_a_worker(self, slot: int, ours: socket.socket, theirs: socket.socket) -> NoReturn:
        try:
            # A worker that held another's end would keep it from seeing that the parent is gone.
            for end in (ours, *(child.end for child in self._children.values())):
                end.close()
            self._selector.close()
            work(Start(self._settings, self._folders, self._listener, theirs, self._state, slot, self._shares,
                       frozenset(self._proven), not self._all_ready))
        finally:
            # Whatever happens, no second parent comes of it.
            os._exit(1)

    def _hear(self, child: Child) -> None:
        messages = child.wire.receive()
        if messages is None:
            self._selector.unregister(child.end)
            return
        for message in messages:
            self._proven |= set(message.get("proven", ()))
            if "ready" in message:
                self._is_ready(child, message["problems"])
            elif "failed" in message:
                child.failed = message["failed"], message["error"]
            elif "ask" in message:
                self._reloads.ask(child, message["ask"])
            elif "reloaded" in message:
                self._reloads.done(child, message["reloaded"], message["problems"])

    def _is_ready(self, child: Child, problems: list[str]) -> None:
        child.ready = time.monotonic()
        for problem in problems:
            _say(problem)
        self._reloads.catch_up(child)
        if not self._all_ready and len(self._ready()) == self._settings.workers:
            self._all_ready = True
            _say(f"ready: {_address(self._settings, self._listener)}")

    def _ready(self) -> list[Child]:
        return [child for child in self._children.values() if child.ready]

    def _bury(self) -> None:
        """Take notice of workers that have ended, and replace them."""
        for child in list(self._children.values()):
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if not pid:
                continue
            if child.end in {key.fileobj for key in self._selector.get_map().values()}:
                # What it said last may not have been read yet.
                self._hear(child)
            if child.end in {key.fileobj for key in self._selector.get_map().values()}:
                self._selector.unregister(child.end)
            child.end.close()
            del self._children[child.pid]
            self._reloads.is_gone(child)
            if not self._stopping:
                self._replace(child, os.waitstatus_to_exitcode(status))

    def _replace(self, child: Child, code: int) -> None:
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lasted = child.ready and time.monotonic() - child.ready > 1
        failures = self._failures[child.slot] = 0 if lasted else self._failures[child.slot] + 1
        exit_code, error = child.failed or (1, f"a worker ended while it started: {how}")
        if not child.ready:
            deterministic = child.failed is not None and not self._all_ready
            if deterministic or (failures >= MOST_FAILURES and not self._ready()):
                raise {2: UsageError, 3: DataError, 4: MissingError}.get(exit_code, HpcaiError)(error)
        _say(f"worker {child.slot} (process {child.pid}) ended: {error if child.failed else how}; starting another")
        # The first replacement comes at once.
        pause = min(_LONGEST_PAUSE, 0.1 * 2**failures) if failures > 1 else 0
        self._later[child.slot] = time.monotonic() + pause

    # ---- Signals ---------------------------------------------------------------------------------------

    def _receive(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._reloads.ask()
        elif number != signal.SIGCHLD:
            self._stopping += 1
            if self._stopping > 1:
                return self._kill()
            self._until = time.monotonic() + STOP_SECONDS + 5
            self._later.clear()
            self._listener.close()
            for child in self._children.values():
                os.kill(child.pid, signal.SIGTERM)

    @contextmanager
    def _listening_to_signals(self):
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda number, _: self._signals.append(number))
                  for number in _SIGNALS}
        self._selector.register(reader, selectors.EVENT_READ)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            os.close(reader)
            os.close(writer)

    def _kill(self) -> None:
        for child in list(self._children.values()):
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.end.close()
        self._children.clear()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _address(settings: Settings, listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http{'s' if settings.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{port}"
