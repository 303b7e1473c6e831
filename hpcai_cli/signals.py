"""What signals mean: a wish to stop that the work reads when it can save itself, or an end like that of Ctrl-C."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_END = b"\0"


class StopRequest:
    """Holds whether this process was asked to stop: by a signal while the `with` block lasts, or by `ask`.

    A second Ctrl-C raises KeyboardInterrupt, for people who don't want to wait for the checkpoint.

    Attributes:
        received: what asked first, such as the name of a signal; empty before it.
    """

    def __init__(self):
        self.received = ""
        self._told: list[Callable[[], None]] = []
        self._before = {}
        self._signals = 0

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; a server that embeds the engine has its own way to stop it.
        if threading.current_thread() is threading.main_thread():
            # Python's handlers wait until the main thread is back from TensorFlow; the number of a signal is written
            # to this pipe at once.
            self._reading, self._writing = os.pipe()
            os.set_blocking(self._writing, False)
            self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
            # Not by closing it, of which a forked process may hold a copy.
            os.write(self._writing, _END)
            self._thread.join()
            os.close(self._writing)
            os.close(self._reading)
            self._before = {}

    def ask(self, reason: str) -> None:
        """Ask for the end; from any thread."""
        self.received = self.received or reason
        for tell in self._told:
            tell()

    def tell(self, function: Callable[[], None]) -> None:
        """Have a function called when the end is asked for, in another thread than the main one, also if it was."""
        self._told.append(function)
        if self.received:
            function()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._reading, 64):
                if number in _SIGNALS:
                    self.ask(signal.Signals(number).name)
                elif number == _END[0]:
                    return

    def _receive(self, number: int, frame) -> None:
        # Who is to be told is told by the thread: the main one may be in the middle of compiling a step.
        self.received = self.received or signal.Signals(number).name
        self._signals += 1
        if self._signals > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt


def _in_child() -> None:
    # A signal to a forked process would be told to its parent.
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, by which a batch system ends a job, do what Ctrl-C does, so that what was started ends too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
