"""What signals mean: a wish to stop that the work reads when it can save itself, or an end like that of Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Holds whether this process was asked to stop, while the `with` block lasts.

    A second Ctrl-C raises KeyboardInterrupt, for people who don't want to wait for the checkpoint.

    Attributes:
        received: name of the first signal, empty before it.
    """

    def __init__(self):
        self.received = ""
        self._before = {}

    def __enter__(self) -> "StopRequest":
        # Python delivers signals to the main thread only; a server that embeds the engine has its own way to stop it.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, by which a batch system ends a job, do what Ctrl-C does, so that what was started ends too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
