"""Brings the wish for a reload to all workers of a server, one reload at a time, and word of its end to who asked."""

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hpcai_cli.engine.serving.wire import Wire


@dataclass(eq=False)
class Child:
    """A worker as its parent sees it."""

    slot: int
    pid: int
    end: socket.socket
    wire: Wire
    reload: int
    """Number of the last reload that was begun before it was started."""
    ready: float = 0.0
    """When it began to answer, time.monotonic(); 0 before."""
    failed: tuple[int, str] | None = None
    """Exit code and sentence with which it could not start."""


@dataclass
class _Round:
    """A reload of all workers."""

    waiting: set[Child]
    asked: list[tuple[Child, int]]
    problems: set[str] = field(default_factory=set)


class Reloads:
    """The reloads of one server.

    Attributes:
        number: of those that were begun.
    """

    def __init__(self, ready: Callable[[], Iterable[Child]], say: Callable[[str], None]):
        """Take part in a server.

        Args:
            ready: returns the workers that answer.
            say: tells a line to whoever runs the server.
        """
        self._ready, self._say = ready, say
        self._round: _Round | None = None
        self._wanted, self._asked = False, []
        self.number = 0

    def ask(self, child: Child | None = None, number: int = 0) -> None:
        """Have all workers load what is new; while they do, what is asked for waits for the next time.

        Args:
            child, number: who wants to know of the end, and under which number.
        """
        self._wanted = True
        if child is not None:
            self._asked.append((child, number))
        self._begin()

    def done(self, child: Child, number: int, problems: Iterable[str]) -> None:
        """Take note that a worker has reloaded, and of what it could not load."""
        if self._round is not None and number == self.number:
            self._round.problems |= set(problems)
            self._round.waiting.discard(child)
            self._end()

    def is_gone(self, child: Child) -> None:
        """Take note that a worker has ended."""
        self._asked = [(who, number) for who, number in self._asked if who is not child]
        if self._round is not None:
            self._round.asked = [(who, number) for who, number in self._round.asked if who is not child]
            self._round.waiting.discard(child)
            self._end()

    def catch_up(self, child: Child) -> None:
        """Have a worker that was loading its models while they changed load them again."""
        if child.reload != self.number:
            child.wire.send({"reload": 0})

    def _begin(self) -> None:
        if self._wanted and self._round is None:
            self.number += 1
            self._wanted = False
            self._round = _Round(set(self._ready()), self._asked)
            self._asked = []
            for child in self._round.waiting:
                child.wire.send({"reload": self.number})
            self._end()

    def _end(self) -> None:
        """End the reload if all workers are done, and begin the next one if it is wanted."""
        if self._round.waiting:
            return
        ended, self._round = self._round, None
        problems = sorted(ended.problems)
        for problem in problems:
            self._say(f"not loaded: {problem}")
        if not problems:
            self._say("reloaded")
        for child, number in ended.asked:
            child.wire.send({"done": number, "problems": problems})
        self._begin()
