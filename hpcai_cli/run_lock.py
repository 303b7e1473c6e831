"""One training at a time in a run's folder."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from hpcai_cli.errors import HpcaiError, UsageError

_NAME = ".lock"
_LOOK_SECONDS = 0.1


@contextlib.contextmanager
def held(folder: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock of a run's folder while the block lasts.

    The system lets go of it when the process ends, however that is, so that what a killed training leaves is no lock;
    over NFS too. The file in the folder says who holds it.

    Args:
        patience: seconds to wait for one that is just ending.

    Raises:
        UsageError: another process holds it.
        HpcaiError: the folder cannot be written.
    """
    path, end = folder / _NAME, time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise HpcaiError(f"cannot write {path}: {error.strerror}", expected="a run's folder that you may write",
                             mend="continue it elsewhere with `--output`") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = _holder(descriptor)
            os.close(descriptor)
            if time.monotonic() < end:
                time.sleep(_LOOK_SECONDS)
                continue
            raise UsageError(f"{folder} is being trained by {words}", expected="one training at a time in a folder",
                             mend=f"wait for it or stop it, or copy what there is with `hpcai train --resume {folder} "
                             "--output NEW`") from None
        except OSError:
            # A file system without locks: nothing can be told, and who trains there has known it so.
            pass
        # The one that held it removes the file, and may have done so in between.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)
    with os.fdopen(descriptor, "r+") as stream:
        _write_holder(stream)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()


def check(folder: Path) -> None:
    """Check that nobody trains in a run's folder.

    Raises:
        UsageError: somebody does.
    """
    if (folder / _NAME).exists():
        with held(folder):
            pass


def _write_holder(stream) -> None:
    with contextlib.suppress(OSError):
        stream.truncate(0)
        json.dump({"process": os.getpid(), "host": socket.gethostname(), "since": round(time.time(), 3),
                   "command": shlex.join(["hpcai", *sys.argv[1:]])}, stream)
        stream.flush()


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 65_536, 0))
        since = datetime.fromtimestamp(found["since"]).astimezone().isoformat(" ", "seconds")
        return f"process {int(found['process'])} on {str(found['host'])[:100]} since {since}"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "another process"
