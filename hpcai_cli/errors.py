"""What can go wrong for a person, each kind with the exit code that a script sees."""

import re

EXIT_STOPPED = 75
"""Stopped early, resumable; sysexits.h calls it EX_TEMPFAIL."""
EXIT_INTERRUPTED = 130
"""Ctrl-C where there is nothing to resume, as shells number it."""

LONGEST_VALUE = 300
"""Characters of a received value that an error shows."""

_NOTHING = object()


def printable(text: str) -> str:
    """Return what a stranger wrote as it can stand in a message: one line of bounded length, nothing that a terminal
    would obey."""
    shown = text if text.isprintable() else ascii(text)[1:-1]
    return shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + "..."


class HpcaiError(Exception):
    """A failure told in one sentence: what happened, what was expected, what mends it, the value received.

    Raised as it is (exit code 1) for a failure of the world around us; its kinds are the ones that people can mend.

    Args:
        happened: what happened, starting in lower case, without a full stop.
        expected: what was expected instead, a noun phrase.
        mend: what to do, best a command.
        received: the offending value, shown last.
    """

    exit_code = 1
    collective = False
    """True when every rank fails with this same error at the same point, so that rank 0 alone reports it."""

    def __init__(self, happened: str, *, expected: str = "", mend: str = "", received: object = _NOTHING):
        parts = [happened]
        if expected:
            parts.append(f"expected {expected}")
        if mend:
            parts.append(mend)
        if received is not _NOTHING:
            text = repr(received) if isinstance(received, str) else str(received)
            # What a stranger's file says can be long, and the sentence is for people.
            parts.append(f"received: {text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + '...'}")
        super().__init__("; ".join(parts))


class UsageError(HpcaiError):
    """The command line or a recipe asks for something that cannot be."""

    exit_code = 2


class UnsuitableError(UsageError):
    """The model is not made so that what is asked can be done to it."""


class DataError(HpcaiError):
    """A data or model file is missing, broken, foreign or unsafe."""

    exit_code = 3


class MissingError(HpcaiError):
    """The environment lacks something: a package, a compiler, memory, a launcher's counterpart."""

    exit_code = 4


class GateError(HpcaiError):
    """A condition that the user set does not hold (`--require`)."""

    exit_code = 5


class DivergedError(HpcaiError):
    """The loss is no longer a number, or the ranks no longer hold the same weights."""

    exit_code = 6
    collective = True


class StoppedEarly(HpcaiError):
    """The job was asked to stop, saved its state and can be resumed."""

    exit_code = EXIT_STOPPED
    collective = True


def is_aftermath(error: BaseException) -> bool:
    """Tell whether an error only says that another rank has ended: what ended that one is the job's failure."""
    return bool(re.search(r"Horovod has been shut down|gloo/transport/.*(?:reset|closed) by peer", str(error)))
