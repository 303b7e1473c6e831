"""What a process has started ends when that process ends, also where it was killed and could end nothing."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
"""Of prctl(2): the signal that this process gets when the thread that has started it ends."""


def ended_by_ours() -> Callable[[], None] | None:
    """Return a `preexec_fn` for what is to get SIGTERM when this process ends; None where only Linux could do it."""
    if sys.platform != "linux":
        return None
    # Loaded here: between fork and exec as little as possible is done.
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It has ended in between.
            os._exit(1)

    return ask
