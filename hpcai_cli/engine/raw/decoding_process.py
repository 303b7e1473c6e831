"""What one decoding process does: file after file, with bounds on time and memory, and nothing on the terminal."""

import hashlib
import os
import resource
import signal
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcai_cli.engine.raw.images import decode_picture, read_bytes
from hpcai_cli.errors import DataError

SECONDS = 10
"""Processor time that one file may take."""
GRACE_SECONDS = 2
"""How much later a decoder that does not come back to Python is ended with its process."""
MEMORY_BYTES = 1 << 30
"""What decoding may take beyond what the process has at its start."""
DIGEST_BYTES = 16
_SQUARES = np.stack([np.arange(256), np.arange(256) ** 2])


class Row(NamedTuple):
    """What became of one candidate."""

    number: int
    """Candidates are numbered through all splits."""
    digest: str = ""
    """Of its pixels, in hexadecimal; empty where it was rejected."""
    reason: str = ""
    """Why it was rejected."""
    warnings: int = 0
    """Lines that the decoder had to say about it."""
    sums: tuple[int, ...] = ()
    """Per channel the sum of the pixels, then per channel the sum of their squares."""


def digest_of(pixels: bytes) -> str:
    """Return the hash that tells one row's content from all others'."""
    return hashlib.sha256(pixels).hexdigest()[:2 * DIGEST_BYTES]


@dataclass(frozen=True)
class Setting:
    """What all files of a job have in common."""

    folder: Path
    part: Path
    """The dataset file in the making."""
    shape: tuple[int, int, int]
    min_size: int
    seconds: float = SECONDS
    """Processor time that one file may take."""

    @property
    def too_slow(self) -> str:
        """The reason why a file that took longer is rejected."""
        return f"takes longer than {self.seconds:g} s to decode"


class _TooSlowError(BaseException):
    """Not an Exception, so that no decoder takes it for damage."""


def decode_chunks(connection, setting: Setting) -> None:
    """Say that the process is there, then answer each list of (number, name, place) with a list of Row.

    An OSError is answered where the pixels cannot be written. Ends when the other side is gone.
    """
    chatter = _Chatter()
    signal.signal(signal.SIGVTALRM, _too_slow)
    # Its own handling ends the process, also where the decoder never comes back to Python.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _bound_memory()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            connection.send([])
            file = os.open(setting.part, os.O_WRONLY)
            while True:
                connection.send(_answer(connection.recv(), file, setting, chatter, warned))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except OSError as error:
            connection.send(error)


def _answer(chunk: list, file: int, setting: Setting, chatter: "_Chatter", warned: list) -> list[Row]:
    parent, rows = os.getppid(), []
    for number, name, place in chunk:
        if os.getppid() != parent:
            # Nobody is left to take the answer, and another job may want the file.
            raise EOFError
        row = _decoded(number, setting.folder / name, place, file, setting)
        rows.append(row._replace(warnings=len(warned) + chatter.lines()))
        warned.clear()
    return rows


def _decoded(number: int, path: Path, place: int, file: int, setting: Setting) -> Row:
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, setting.seconds)
        signal.setitimer(signal.ITIMER_PROF, setting.seconds + GRACE_SECONDS)
        try:
            picture = decode_picture(_read(path), setting.shape, min_size=setting.min_size)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_PROF, 0)
    except DataError as error:
        return Row(number, reason=str(error))
    except _TooSlowError:
        return Row(number, reason=setting.too_slow)
    content = picture.tobytes()
    written = os.pwrite(file, content, place)
    if written != len(content):
        # The next write says why.
        os.pwrite(file, content[written:], place + written)
    # Pillow counts pixels by their value ten times faster than numpy adds them up.
    histogram = np.array(picture.histogram()).reshape(-1, 256)
    return Row(number, digest_of(content), sums=tuple((_SQUARES @ histogram.T).ravel().tolist()))


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from None


def _too_slow(number: int, frame) -> None:
    raise _TooSlowError


def _bound_memory() -> None:
    with open("/proc/self/statm", "rb") as stream:
        most = int(stream.read().split()[0]) * resource.getpagesize() + MEMORY_BYTES
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    given = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *given]), hard))
    # A crash is told by the parent; nobody looks for its memory on the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


class _Chatter:
    """What C libraries print on the error output of this process: kept in a file, and counted."""

    def __init__(self):
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)

    def lines(self) -> int:
        """Return how many lines there are since the last time."""
        size = os.fstat(2).st_size
        if not size:
            return 0
        count = os.pread(2, min(size, 1 << 20), 0).count(b"\n")
        os.ftruncate(2, 0)
        os.lseek(2, 0, os.SEEK_SET)
        return count
