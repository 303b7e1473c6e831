"""A server that a benchmark starts on cores of its own: ours, or any other program that listens on a port."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from hpcai_cli.engine.benchmarks.load import open_loop
from hpcai_cli.errors import HpcaiError

_START_SECONDS = 60.0


def ours(folder: Path, *options: str) -> list[str]:
    """Return the command line of our server of the model in a folder."""
    return [sys.executable, "-m", "hpcai_cli.engine.serving.server", str(folder), "--port", "{port}",
            "--log-file", os.devnull, *options]


@contextmanager
def serving(command: list[str], cores: set[int]) -> Iterator[int]:
    """Start a server on cores of its own, wait until it listens, and end it; `{port}` in the command is its port."""
    port = _free_port()
    words = [word.format(port=port) for word in command]
    environ: Mapping = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(len(cores))}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, env=environ, stdout=said, stderr=said, start_new_session=True,
                                   preexec_fn=lambda: os.sched_setaffinity(0, cores))
        try:
            _wait(process, port, said)
            yield port
        finally:
            # Some peers leave the processes behind that they started.
            for stop in (15, 9):
                try:
                    os.killpg(process.pid, stop)
                except ProcessLookupError:
                    break
                try:
                    process.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    continue
            process.wait()


def _wait(process: subprocess.Popen, port: int, said) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            open_loop.drive(port, b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n", rate=100, seconds=0.01,
                            connections=1)
            return
        except HpcaiError:
            time.sleep(0.02)
    said.seek(0)
    lines = said.read().decode(errors="replace").strip().splitlines()[-1:]
    raise HpcaiError("a server of the benchmark does not start", received=lines[0] if lines else process.poll())


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
