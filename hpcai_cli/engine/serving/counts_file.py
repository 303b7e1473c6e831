"""A file of fixed size in which one process counts, in slots of time: mapped into memory, readable at any moment.

The header says whose counts they are. A ring of slots follows, each a row of int64 that begins with the number of its
time, so that a slot is used again after SLOTS times its length. A process that is killed loses nothing that it counted.
"""

import contextlib
import math
import mmap
import os
import struct
from pathlib import Path

import numpy as np

from hpcai_cli.errors import DataError, HpcaiError

SLOTS = 24
NEVER = -1
"""Number of a slot that holds nothing."""
_MAGIC = b"hpcaist1"
_HEADER = struct.Struct("<8s32sdqq")
"""Magic, key, seconds of a slot, slots, words of a slot."""


def mapped(path: Path, *, key: bytes, words: int, slot_seconds: float) -> tuple[mmap.mmap, np.ndarray]:
    """Open a file to count in, or make it; what this model counted there before goes on.

    Args:
        key: SHA-256 of whose counts they are.
        words: int64 in a slot, its number included.
        slot_seconds: a file with another length of its slots begins anew.

    Returns:
        The map, and its slots as int64 (SLOTS, words) that shares its memory.

    Raises:
        DataError: it is another model's file, or none of this kind.
        HpcaiError: the disk is full or the folder cannot be written.
    """
    try:
        if not path.exists() or _header(path, key, words) != slot_seconds:
            _make(path, _HEADER.pack(_MAGIC, key, slot_seconds, SLOTS, words), words)
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), _size(words))
    except OSError as error:
        raise HpcaiError(f"cannot keep statistics in {path}: {error.strerror or error}",
                         expected="a folder that can be written, with room") from None
    return memory, np.frombuffer(memory, np.int64, offset=_HEADER.size).reshape(SLOTS, words)


def read(path: Path, *, key: bytes, words: int) -> tuple[float, np.ndarray]:
    """Return the seconds of a slot, and a copy of the slots, int64 (SLOTS, words), while they may be counted in.

    Raises:
        DataError: it is another model's file, or none of this kind.
        FileNotFoundError: there is none.
    """
    slot_seconds = _header(path, key, words)
    with path.open("rb") as file:
        content = file.read(_size(words))[_HEADER.size:]
    if len(content) != SLOTS * words * 8:
        raise _broken(path)
    return slot_seconds, np.frombuffer(content, np.int64).reshape(SLOTS, words)


def _size(words: int) -> int:
    return _HEADER.size + SLOTS * words * 8


def _header(path: Path, key: bytes, words: int) -> float:
    """Return the seconds of a slot, or raise DataError."""
    # Opening a pipe, or reading a device, may never come back.
    if not path.is_file() and path.exists():
        raise _broken(path)
    with path.open("rb") as file:
        head, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    if len(head) < _HEADER.size:
        raise _broken(path)
    magic, found, slot_seconds, slots, length = _HEADER.unpack(head)
    if magic != _MAGIC or not (math.isfinite(slot_seconds) and slot_seconds > 0):
        raise _broken(path)
    if found != key:
        raise DataError(f"the statistics in {path} are of another model", expected="those of the model that is served",
                        mend="delete the file, or give another place for it", received=found.hex()[:16])
    if (slots, length) != (SLOTS, words) or size != _size(words):
        raise _broken(path)
    return slot_seconds


def _broken(path: Path) -> DataError:
    return DataError(f"{path} holds no statistics of a server", expected="a file that `hpcai deploy serve` writes",
                     mend="delete it")


def _make(path: Path, header: bytes, words: int) -> None:
    """Write an empty file under a temporary name and rename it, so that nobody ever finds half of one."""
    begun = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with begun.open("wb") as file:
            empty = np.zeros((SLOTS, words), np.int64)
            empty[:, 0] = NEVER
            # Every byte is written: touching a mapped page for which the disk has no room would kill the process.
            file.write(header + empty.tobytes())
        os.replace(begun, path)
    except BaseException:
        with contextlib.suppress(OSError):
            begun.unlink()
        raise
