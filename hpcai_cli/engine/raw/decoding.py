"""Decodes image files in parallel processes, each of which writes its pixels straight into the dataset file.

A decoder that crashes takes only its process along: the files that were in it are tried again, each alone in a fresh
process, and the one that does it again is rejected.
"""

import contextlib
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import connection, get_context
from typing import NamedTuple

from hpcai_cli.engine.raw.decoding_process import Row, Setting, decode_chunks
from hpcai_cli.errors import HpcaiError

CHUNK_FILES = 32
"""Files that are sent, answered and noted at once."""
AHEAD = 2
"""Chunks that a process has at a time, so that it need not wait for the next one."""


class Task(NamedTuple):
    """One file to decode."""

    number: int
    """Of the candidate."""
    name: str
    """Below the folder."""
    place: int
    """Offset of its pixels in the dataset file."""


def decode_files(tasks: Iterable[Task], setting: Setting, *, processes: int, stop) -> Iterator[list[Row]]:
    """Decode files into the dataset file and yield what became of them, some at a time, in any order.

    Args:
        stop: a StopRequest; after a signal no more is yielded.

    Raises:
        OSError: the pixels cannot be written.
        HpcaiError: the processes cannot be started.
    """
    waiting, suspects = _chunks(tasks), deque()
    workers = []
    try:
        for _ in range(processes):
            workers.append(_Worker(setting))
        while not stop.received:
            for worker in workers:
                worker.feed(waiting, suspects)
            busy = {worker.connection: worker for worker in workers if worker.assigned}
            if not busy:
                return
            # With a limit, since a signal does not end the waiting.
            for ready in connection.wait(list(busy), timeout=0.2):
                worker = busy[ready]
                answer = worker.answer()
                if answer is None:
                    yield from worker.buried(suspects)
                    workers[workers.index(worker)] = _Worker(setting)
                elif answer:
                    yield answer
    finally:
        for worker in workers:
            worker.end()


def _chunks(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    chunk = []
    for task in tasks:
        chunk.append(task)
        if len(chunk) == CHUNK_FILES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class _Worker:
    """A process that decodes, and the chunks that it has."""

    def __init__(self, setting: Setting):
        self.assigned: deque[list[Task]] = deque()
        self._there, self._setting = False, setting
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=decode_chunks, args=(theirs, setting), daemon=True)
        # Ctrl-C and a batch system's signals reach the whole group; what to do then is for this process to say. The
        # mask is inherited, so that there is no moment at its start when a process would answer with a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def feed(self, waiting: Iterator[list[Task]], suspects: deque) -> None:
        """Give the process what it can take: more of the ordinary chunks, or one suspect alone."""
        while len(self.assigned) < AHEAD:
            if suspects and self.assigned:
                return
            chunk = suspects.popleft() if suspects else next(waiting, None)
            if chunk is None:
                return
            self.assigned.append(chunk)
            # The answer of a process that is gone is looked for, and missed, in its turn.
            with contextlib.suppress(OSError):
                self.connection.send(chunk)
            if len(chunk) == 1:
                return

    def answer(self) -> list[Row] | None:
        """Take the answer to the oldest chunk, None where the process is gone."""
        try:
            answer = self.connection.recv()
        except (EOFError, OSError):
            return None
        if isinstance(answer, Exception):
            raise answer
        if not self._there:
            self._there = True
            return []
        self.assigned.popleft()
        return [Row(*values) for values in answer]

    def buried(self, suspects: deque) -> Iterator[list[Row]]:
        """Yield the one file that a process was lost with, or put its files among the suspects."""
        self._process.join()
        if not self._there:
            raise HpcaiError("a process that decodes cannot start", received=f"exit code {self._process.exitcode}",
                             mend="look at the memory that is free, or give fewer --processes")
        chunks, self.assigned = list(self.assigned), deque()
        if len(chunks) == 1 and len(chunks[0]) == 1:
            slow = self._process.exitcode == -signal.SIGPROF
            yield [Row(chunks[0][0].number, reason=self._setting.too_slow if slow else
                       "the decoder crashed")]
        else:
            suspects.extend([task] for chunk in chunks for task in chunk)

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()
