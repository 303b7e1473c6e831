"""What a process of its own tries in a folder for `hpcai doctor`; each step may wait for ever on a broken mount."""

import fcntl
import json
import mmap
import os
import sys
import tempfile

STEPS = ("folder", "free", "write", "map", "flock", "lockf")
_PAGE = b"hpcai" * 1024


def main() -> None:
    """Try the folder argv[1], and print a line of JSON for each step: its name, what it gave or `error:` and why.

    With a second word, `make`, the folder is made where it is not there.
    """
    folder = sys.argv[1]
    _step("folder", lambda: _opened(folder, make="make" in sys.argv[2:]))
    _step("free", lambda: os.statvfs(folder).f_frsize * os.statvfs(folder).f_bavail)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpcai-") as file:
            _step("write", lambda: _written(file))
            _step("map", lambda: _mapped(file))
            # HDF5 locks by flock, MPI's files by lockf, which is another kind of lock on some network file systems.
            for lock in (fcntl.flock, fcntl.lockf):
                _step(lock.__name__, lambda lock=lock: _locked(file, lock))
    except OSError as error:
        print(json.dumps(["write", f"error: {error.strerror}"]), flush=True)


def _step(name: str, function) -> None:
    try:
        value = function()
    except (OSError, ValueError) as error:
        value = f"error: {getattr(error, 'strerror', None) or error}"
    print(json.dumps([name, value]), flush=True)


def _opened(folder: str, *, make: bool) -> str:
    if make:
        os.makedirs(folder, exist_ok=True)
    os.stat(folder)
    return os.path.realpath(folder)


def _written(file) -> None:
    file.write(_PAGE)
    file.flush()
    os.fsync(file.fileno())


def _mapped(file) -> None:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
        if bytes(pages) != _PAGE:
            raise ValueError("other bytes than those that were written")


def _locked(file, lock) -> None:
    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock(file, fcntl.LOCK_UN)


if __name__ == "__main__":
    main()
