"""Signals to ranks where they are: on this host at once, on others by ssh."""

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping

SSH_SECONDS = 5.0
"""A host that takes longer is lost."""


def send(started: Mapping[int, tuple[int, str]], *numbers: signal.Signals, seconds: float = SSH_SECONDS) -> None:
    """Send each rank these signals in this order, and wait at most so long for the other hosts.

    Args:
        started: process id and host of each rank.
    """
    elsewhere: dict[str, list[int]] = {}
    for process, host in started.values():
        if host != socket.gethostname():
            elsewhere.setdefault(host, []).append(process)
            continue
        for number in numbers:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process, number)
    threads = [_by_ssh(host, processes, numbers) for host, processes in elsewhere.items()]
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


def ask_to_stop(started: Mapping[int, tuple[int, str]]) -> None:
    """Send SIGTERM to the ranks of this host, or to one elsewhere: what one knows, all know at the next step."""
    here = {rank: place for rank, place in started.items() if place[1] == socket.gethostname()}
    send(here or {min(started): started[min(started)]}, signal.SIGTERM, seconds=0)


def _by_ssh(host: str, processes: list[int], numbers: tuple[signal.Signals, ...]) -> threading.Thread:
    kills = "; ".join(f"kill -{number.name[3:]} {' '.join(map(str, processes))}" for number in numbers)
    thread = threading.Thread(target=subprocess.run, args=(["ssh", "-o", "BatchMode=yes", host, kills],), daemon=True,
                              kwargs={"stdin": subprocess.DEVNULL, "capture_output": True})
    thread.start()
    return thread
