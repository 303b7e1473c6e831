"""The server of the soak as its machine sees it: processes, memory, descriptors, connections, what it says."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 60
WORKERS = 2


@dataclass(frozen=True)
class Sample:
    """What a server has of the machine at a moment."""

    moment: float
    """time.perf_counter()"""
    megabytes: float
    """Of memory, the proportional set size: pages that processes share count once."""
    descriptors: int
    threads: int
    processes: int
    seconds: float
    """Of processor time until now."""


class Server:
    """A running server of one repository.

    Attributes:
        port: where it answers.
        process: the parent of its workers.
    """

    def __init__(self, folder: Path, repository: Path, cores: set[int]):
        self._said, self._log = folder / "server.log", folder / "requests.jsonl"
        command = [sys.executable, "-m", "hpcai_cli.engine.serving.server", str(repository), "--port", "0",
                   "--workers", str(WORKERS), "--threads", "1", "--log-file", str(self._log)]
        with self._said.open("wb") as said:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                            preexec_fn=lambda: os.sched_setaffinity(0, cores))
        self.port = self._wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        """Return what it has said of itself until now."""
        return self._said.read_text(errors="replace")

    def logged(self, start: int = 0) -> list[str]:
        """Return the lines of the request log from a byte on."""
        with self._log.open("rb") as file:
            file.seek(start)
            return file.read().decode(errors="replace").splitlines()

    def log_size(self) -> int:
        return self._log.stat().st_size

    def reload(self) -> None:
        """Have it load what has changed on disk."""
        self.process.send_signal(signal.SIGHUP)

    def reloads(self) -> int:
        """Return how many times it was done with that."""
        return len(re.findall("^reloaded$", self.said(), re.MULTILINE))

    def workers(self) -> list[int]:
        """Return the processes that it has started."""
        return _children(self.process.pid)

    def sample(self) -> Sample:
        """Look at all of its processes."""
        found = [[0.0, 0, 0, 0.0]]
        for pid in _tree(self.process.pid):
            # A process that ends meanwhile has nothing any more.
            with contextlib.suppress(OSError, IndexError):
                found.append(_looked_at(Path(f"/proc/{pid}")))
        memory, descriptors, threads, seconds = map(sum, zip(*found, strict=True))
        return Sample(time.perf_counter(), memory, descriptors, threads, len(found) - 1, seconds)

    def ports_of(self, pid: int) -> set[int]:
        """Return the ports of the clients whose connections a worker holds."""
        inodes = set()
        with contextlib.suppress(OSError):
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {int(row[2].partition(":")[2], 16) for row in rows
                if row[9] in inodes and int(row[1].partition(":")[2], 16) == self.port} - {0}

    def _wait(self) -> int:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"^ready: .*:(\d+)$", self.said(), re.MULTILINE):
                return int(found[1])
            time.sleep(0.02)
        self.__exit__()
        sys.exit(f"the server does not start: {self.said()[-2000:]}")


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return found


def _tree(pid: int) -> Iterator[int]:
    yield pid
    for child in _children(pid):
        yield from _tree(child)


def _looked_at(place: Path) -> list[float]:
    """Return the megabytes, descriptors, threads and seconds of a process."""
    size = re.search(r"^Pss: +(\d+) kB", (place / "smaps_rollup").read_text(), re.MULTILINE)
    fields = (place / "stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return [int(size[1]) / 1024, len(os.listdir(place / "fd")), int(fields[17]), ticks / os.sysconf("SC_CLK_TCK")]
