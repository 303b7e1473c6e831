"""The C library's heap, in which models are opened again and again while a server lives.

glibc gives threads heaps of their own, keeps what is freed in them, and returns to the system only what lies at the end
of the first one: ten reloads of a model of 20 MB took 80 MB more (https://www.gnu.org/software/libc/manual, "Malloc
Tunable Parameters"). Other C libraries have neither of the two calls, and need none.
"""

import contextlib
import ctypes

_M_ARENA_MAX = -8
"""From malloc.h."""


def use_one_heap() -> None:
    """Have the threads that are still to come share the first heap, the only one that can be given back as a whole."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return to the system what is free."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
