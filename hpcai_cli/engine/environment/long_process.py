"""Run a program that takes minutes: output to a log, one moving line for people, nothing left behind."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from hpcai_cli import launch

PLAIN_SECONDS = 15.0
"""Time between two progress lines where there is no terminal."""

_TAIL_BYTES = 64 * 1024
_PERCENT = re.compile(rb"^\[ *(\d{1,3})%\]", re.MULTILINE)
# Names such as `errors.h` and `-Werror` fill a log without a fault; what failed is `error:` or `CMake Error at`.
_ERROR = re.compile(r"\berror\b:|\w+Error:|CMake Error|\*\*\* .*Error \d", re.IGNORECASE)


def run_logged(command: Sequence[str], *, log: Path, description: str,
               environ: Mapping[str, str] | None = None, folder: Path | None = None) -> int:
    """Run a command with its output appended to `log` and return its exit code.

    However this call ends, by Ctrl-C for one, the whole process group has ended too.
    """
    with open(log, "ab") as stream:
        stream.write(f"\n$ {shlex.join(command)}\n".encode())
        stream.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                                   env=environ, cwd=folder, start_new_session=True)
    line = _MovingLine(description)
    try:
        while True:
            try:
                return process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                line.show(_percent(log))
    finally:
        line.close()
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it started; it must have been started in a session of its own."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    # The leader's end says nothing about its children: a compiler may still be running.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def first_error(log: Path) -> str:
    """Return the first line of a log that tells of an error, or its last line when none does."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if _ERROR.search(line):
            # CMake names only the place on the line with `Error`; what happened is on the lines below.
            return " ".join(lines[number:number + 3]) if line.startswith("CMake Error") else line
    return lines[-1] if lines else "(the log is empty)"


class _MovingLine:
    """Elapsed time on stderr: one line rewritten on a terminal, a line now and then elsewhere; rank 0 alone."""

    def __init__(self, description: str):
        self._description = description
        self._started = self._last = time.monotonic()
        self._percent = ""
        self._silent = launch.place().rank != 0
        self._terminal = sys.stderr.isatty()

    def show(self, percent: str) -> None:
        now = time.monotonic()
        self._percent = percent or self._percent
        if self._silent or now - self._last < (0.5 if self._terminal else PLAIN_SECONDS):
            return
        self._last = now
        text = f"{self._description}: {self._percent + ' %, ' if self._percent else ''}{now - self._started:.0f} s"
        print(f"\r\x1b[2K{text}" if self._terminal else text, end="" if self._terminal else "\n",
              file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._terminal and not self._silent:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def _percent(log: Path) -> str:
    """Read how far make is from the end of its log; empty before it began."""
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        found = _PERCENT.findall(stream.read())
    return found[-1].decode() if found else ""
