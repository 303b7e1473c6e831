"""A rank's pulse: whether its work goes on, told to the process that started it, and its stacks when that asks.

Where nobody asks, a rank of several that stands still ends itself, so that its launcher ends the others.
"""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from hpcai_cli import launch, stacks
from hpcai_cli.errors import HpcaiError
from hpcai_cli.run import Run

BEAT = "\x1dhpcai-beat"
"""Begins a line with rank, step, steps at a time, state and process id, which no person gets to see."""
WORKING, STALLED, OVER = "working", "stalled", "over"
SLOW = 10
"""What is slow and shows no steps, such as compiling the first one, may take so many times the heartbeat."""
_SHORTEST, _LONGEST = 0.5, 5.0
"""Seconds between two beats, a sixth of the heartbeat in between."""
_BUSY = 0.02
"""A thread that takes this share of a core is at work, also where it shows no steps."""


class Pulse:
    """Notes signs of progress and tells of them while the `with` block lasts; one that never began does nothing.

    The clock is the monotonic one: nothing comes of it when somebody sets the time.

    Args:
        seconds: without progress after which a rank stands still; 0 for never.
    """

    def __init__(self, seconds: float = 0.0):
        self._seconds, self._interval = seconds, min(max(seconds / 6, _SHORTEST), _LONGEST) if seconds else _LONGEST
        self._step, self._stride, self._gap, self._is_slow = -1, 1, 0.0, True
        self._marked = self._busy = time.monotonic()
        self._place, self._is_supervised = launch.place(), bool(os.environ.get(launch.STARTED_VARIABLE))
        self._stream, self._run, self._stacks, self._thread = None, None, None, None
        self._awake, self._is_over = threading.Event(), False

    # ---- What the work calls -----------------------------------------------------------------------------------------

    def mark(self, step: int | None = None) -> None:
        """Note that the work goes on, and the last of the steps that are done."""
        now = time.monotonic()
        if not self._is_slow:
            self._gap = max(self._gap, now - self._marked)
        self._marked = now
        if step is not None:
            if self._step >= 0:
                # Small steps come several at a time.
                self._stride = max(self._stride, step - self._step)
            is_first, self._step = self._step < 0, step
            if is_first:
                # It has been compiled: from now on they come regularly. Whether there was one is told at once.
                self._is_slow = False
                self._awake.set()

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Have patience while the block lasts: it writes or computes something long in one go."""
        before, self._is_slow = self._is_slow, True
        try:
            yield
        finally:
            self.mark()
            self._is_slow = before

    def is_stalled(self, now: float) -> bool:
        """Tell whether there has been no progress for longer than anything so far would explain.

        A thread that computes is at work, as when a function is compiled again; not for ever, where steps are due.
        """
        if not self._seconds:
            return False
        patience = SLOW * self._seconds if self._is_slow else max(self._seconds, 10 * self._gap)
        if not self._is_supervised and self._is_slow:
            # It cannot know what the others do, for whom it may have to wait: rank 0 writes and fits alone.
            patience *= SLOW
        is_idle = now - max(self._marked, self._busy) > patience
        return is_idle or not self._is_slow and now - self._marked > SLOW * patience

    # ---- Who listens -------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Pulse":
        if self._is_supervised or self._place.size > 1 and self._seconds:
            # A copy: stderr itself goes elsewhere while libraries load.
            self._stream = os.dup(2)
        return self

    def begin(self) -> None:
        """Beat from now on: loading TensorFlow may keep all threads of Python waiting for as long as the disk takes."""
        if self._stream is None:
            return
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._marked = self._busy = time.monotonic()
        self._tell(WORKING)
        self._thread = threading.Thread(target=self._beat, daemon=True, name="pulse")
        self._thread.start()

    def attend(self, run: Run) -> None:
        """Write the stacks of all threads into the run's folder on SIGUSR2, also from within a call that hangs."""
        if self._stream is None:
            return
        self._run = run
        # Another host need not see the folder: only rank 0 has to write there.
        with suppress(OSError):
            self._stacks = stacks.opened(run.stacks, self._place.rank)
            faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def __exit__(self, *exception) -> None:
        if self._stream is None:
            return
        self._is_over = True
        self._awake.set()
        if self._thread:
            # It may be held up by a reader who does not read.
            self._thread.join(self._interval)
        self._tell(OVER)
        if self._stacks:
            faulthandler.unregister(signal.SIGUSR2)
            self._stacks.close()
            stacks.clear(self._run.stacks)
        os.close(self._stream)
        self._stream = None

    def _beat(self) -> None:
        last, before = time.monotonic(), time.clock_gettime(self._clock)
        while True:
            self._awake.wait(self._interval)
            self._awake.clear()
            if self._is_over:
                return
            now, used = time.monotonic(), time.clock_gettime(self._clock)
            if now - last > 3 * self._interval:
                # The whole process stood still, as a batch system suspends jobs: that time counts for nobody.
                self._marked += now - last
            if used - before > _BUSY * (now - last):
                self._busy = now
            is_stalled = self.is_stalled(now)
            if is_stalled and not self._is_supervised:
                self._end(now)
            self._tell(STALLED if is_stalled else WORKING)
            last, before = now, used

    def _tell(self, state: str) -> None:
        if self._is_supervised:
            # Whoever listened may have gone.
            with suppress(OSError):
                # In one piece and past Python's own stream, whose lock the thread that hangs may hold.
                line = f"{BEAT} {self._place.rank} {self._step} {self._stride} {state} {os.getpid()}\n"
                os.write(self._stream, line.encode())

    def _end(self, now: float) -> None:
        """End this process, and by it the job, whose other ranks wait for it as it waits for them."""
        if self._stacks:
            faulthandler.dump_traceback(self._stacks, all_threads=True)
        # The others see the same, a beat sooner or later, and are to write their stacks too.
        time.sleep(2 * self._interval)
        where = f"; what each thread did is in {self._run.stacks}" if self._run else ""
        error = HpcaiError(f"no progress for {now - self._marked:.0f} s {at_step(self._step)}{where}",
                           expected=f"a step within {self._seconds:g} s",
                           mend="go on with --resume, allow longer with --heartbeat SECONDS, or start the ranks with "
                                "--np, which restarts them")
        if self._run:
            self._run.record_failure(rank=self._place.rank, error=error, exit_code=1)
        os.write(self._stream, f"[rank {self._place.rank}] error: {error}\n".encode())
        os._exit(1)


def at_step(step: int) -> str:
    """Return words on how far the ranks have come."""
    return f"at step {step}" if step >= 0 else "before the first step"
