"""Gathers the examples of concurrent requests into batches, with a bound on how long any of them waits."""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from hpcai_cli.engine.serving.tensors import RequestError

WAITING_SECONDS = 0.5
"""Seconds of work that may wait; what comes on top is refused at once, so that what is taken is answered soon."""
STUCK_SECONDS = 5.0
"""For which a model may run on top of what a request waits before it counts as one that never comes back."""
INLINE_SECONDS = 0.0005
"""A batch that takes less is run in the event loop: to hand it to a thread and back costs as much. While a longer one
runs in its thread, the loop reads the next requests."""


@dataclass(frozen=True)
class Bounds:
    """What a batcher keeps to."""

    max_batch: int = 32
    """Examples that the model gets at once."""
    max_delay: float = 0.0
    """Seconds to wait for more examples when the model is free."""
    seconds: float = 30.0
    """Seconds in which a request is answered, or is told that it will not be."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a model took at its warm-up."""

    one: float
    """For one example."""
    each: float
    """For each example of a full batch."""

    def of(self, count: int) -> float:
        """Return about how long a batch takes."""
        return max(self.one, self.each * count)


@dataclass(eq=False)
class _Entry:
    """The examples of a request, or a part of them, that go to the model together."""

    inputs: np.ndarray
    future: asyncio.Future
    arrived: float
    deadline: float


class Batcher:
    """Runs a model for the requests of one event loop.

    While the model runs, requests gather; when it is free, all that wait go together, up to a full batch.

    Attributes:
        taken: examples that were taken and are not answered yet.
        most: examples that may be taken at a time.
    """

    def __init__(self, scores: Callable[[np.ndarray], np.ndarray], columns: int, bounds: Bounds, cost: Cost,
                 ran: Callable[[np.ndarray, np.ndarray], None] | None = None):
        """Make a batcher; it belongs to the event loop that first asks it.

        Args:
            scores: inputs (b, ...) -> float32 (b, columns), called by one thread at a time.
            ran: is told the inputs and scores of each batch, after its answers are on their way, by the thread that
                ran the model.
        """
        self._scores, self._columns, self._bounds, self._cost, self._ran = scores, columns, bounds, cost, ran
        self._entries: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._started = 0.0
        self._busy = self._retired = False
        self._delay = self._sweeper = self._jobs = None
        self._each, self._finished_at = cost.each, 0.0
        self.taken = 0
        self.most = self._room()

    async def scores(self, inputs: np.ndarray) -> np.ndarray:
        """Return the scores of a request's examples, float32 (n, columns); more than a full batch go in parts.

        Raises:
            RequestError: 503 there is too much to do, 504 it took too long, 500 the model failed.
        """
        count, size = len(inputs), self._bounds.max_batch
        self.check(count)
        now = time.monotonic()
        self.taken += count
        deadline = now + self._bounds.seconds
        try:
            if count <= size:
                return await self._enter(inputs, now, deadline)
            # One part after the other, so that smaller requests find their place between them.
            return np.concatenate([await self._enter(inputs[start:start + size], time.monotonic(), deadline)
                                   for start in range(0, count, size)])
        finally:
            self.taken -= count
            self._stop_if_done()

    def check(self, count: int = 1) -> None:
        """Raise RequestError, 503, where so many examples more could not be answered in time."""
        # A request that alone is more than the bound must have a chance when nothing else is there.
        if self.taken and (self.taken + count > self.most or self._is_late(time.monotonic())):
            pause = max(1, math.ceil(self.taken * self._each))
            raise RequestError(503, "the server has more to do than it can do in time", {"Retry-After": str(pause)})

    def is_stuck(self) -> bool:
        """Tell whether the model has been running for longer than any request waits."""
        return bool(self._running) and time.monotonic() - self._started > self._bounds.seconds + STUCK_SECONDS

    def retire(self) -> None:
        """Let the thread end once all that was taken is answered; whoever still asks is answered all the same."""
        self._retired = True
        self._stop_if_done()

    # ---- Gathering -------------------------------------------------------------------------------------------------

    def _enter(self, inputs: np.ndarray, now: float, deadline: float) -> asyncio.Future:
        loop = asyncio.get_running_loop()
        entry = _Entry(inputs, loop.create_future(), now, deadline)
        self._entries.append(entry)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._pause(), self._sweep, loop)
        if not self._busy:
            self._busy = True
            self._schedule(loop)
        elif self._delay and sum(len(entry.inputs) for entry in self._entries) >= self._bounds.max_batch:
            self._delay.cancel()
            self._delay = loop.call_soon(self._start, loop)
        return entry.future

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start the next batch: at once, or when the oldest has waited for others as long as it may."""
        left = self._bounds.max_delay - (time.monotonic() - self._entries[0].arrived) if self._bounds.max_delay else 0
        if left > 0:
            self._delay = loop.call_later(left, self._start, loop)
        else:
            # Not at once: the other requests that came with this one are still to be read.
            loop.call_soon(self._start, loop)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._delay, count = None, 0
        while self._entries and count + len(self._entries[0].inputs) <= self._bounds.max_batch:
            entry = self._entries.popleft()
            # Whose client has gone away is left out.
            if not entry.future.done():
                self._running.append(entry)
                count += len(entry.inputs)
        if not self._running:
            self._next(loop)
            return
        self._started = time.monotonic()
        # Made at the first batch of any size: one that came with the first large batch would look like a leak.
        jobs = self._thread_jobs(loop)
        if self._cost.of(count) < INLINE_SECONDS:
            inputs, scores, error = self._run(self._running)
            self._finish(loop, len(inputs), scores, error)
            if error is None and self._ran:
                loop.call_soon(self._ran, inputs, scores)
        else:
            jobs.put(list(self._running))

    def _finish(self, loop: asyncio.AbstractEventLoop, count: int, scores: np.ndarray, error: Exception | None) -> None:
        """Give each request of the batch its own rows."""
        start = 0
        for entry in self._running:
            stop = start + len(entry.inputs)
            if not entry.future.done():
                if error is None:
                    entry.future.set_result(scores[start:stop])
                else:
                    entry.future.set_exception(RequestError(500, "the model failed on this request"))
            start = stop
        self._running = []
        self._learn(count)
        self._next(loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._entries:
            self._schedule(loop)
        else:
            self._busy, self._finished_at = False, 0.0

    # ---- The model -------------------------------------------------------------------------------------------------

    def _run(self, entries: list[_Entry]) -> tuple[np.ndarray, np.ndarray | None, Exception | None]:
        inputs = entries[0].inputs if len(entries) == 1 else np.concatenate([entry.inputs for entry in entries])
        try:
            scores = self._scores(inputs)
            if scores.shape != (len(inputs), self._columns):
                raise ValueError(f"{len(inputs)} examples gave scores of the shape {scores.shape}")
            return inputs, scores, None
        except Exception as error:
            return inputs, None, error

    def _thread_jobs(self, loop: asyncio.AbstractEventLoop) -> SimpleQueue:
        if self._jobs is None:
            self._jobs = SimpleQueue()
            threading.Thread(target=self._work, args=(self._jobs, loop), name="model", daemon=True).start()
        return self._jobs

    def _work(self, jobs: SimpleQueue, loop: asyncio.AbstractEventLoop) -> None:
        """Run batches until None comes; the body of the model's thread."""
        while (entries := jobs.get()) is not None:
            inputs, scores, error = self._run(entries)
            try:
                loop.call_soon_threadsafe(self._finish, loop, len(inputs), scores, error)
            except RuntimeError:
                return  # The loop was closed meanwhile.
            if error is None and self._ran:
                self._ran(inputs, scores)

    def _stop_if_done(self) -> None:
        if self._retired and not self.taken and not self._running and self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    # ---- Bounds ----------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        return max(self._bounds.max_batch, int(WAITING_SECONDS / max(self._each, 1e-9)))

    def _is_late(self, now: float) -> bool:
        """Tell whether the oldest that waits has waited longer than it was meant to, full batches apart.

        It has not where no batch began since it came: this process was kept from running, and what waits may be little.
        """
        longest = max(WAITING_SECONDS, 2 * self._each * self._bounds.max_batch) + self._bounds.max_delay
        oldest = self._entries[0].arrived if self._entries else now
        return now - oldest > longest and oldest < self._started

    def _learn(self, count: int) -> None:
        """Learn from batches that follow each other at once what an example takes, with all that is around it.

        What counts is how much longer than at the warm-up: a small batch takes more for each example than the full
        ones will that queue up. It counts as its size, and four times at most, since a moment in which the machine did
        other things says nothing of the next ones.
        """
        now = time.monotonic()
        if self._finished_at:
            seen = self._cost.each * (now - self._finished_at) / max(self._cost.of(count), 1e-9)
            self._each += 0.1 * count / self._bounds.max_batch * (min(seen, 4 * self._each) - self._each)
            self.most = self._room()
        self._finished_at = now if self._entries else 0.0

    def _pause(self) -> float:
        return min(0.25, self._bounds.seconds / 4)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell those whose time has passed; one timer for all costs less than one for each."""
        now = time.monotonic()
        for entry in (*self._running, *self._entries):
            if now > entry.deadline and not entry.future.done():
                entry.future.set_exception(RequestError(504, "the model did not answer in time"))
        waiting = self._running or self._entries
        self._sweeper = loop.call_later(self._pause(), self._sweep, loop) if waiting else None
