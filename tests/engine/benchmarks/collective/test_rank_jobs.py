"""Ranks that are started to measure: what they write is passed on at once, and they end with whoever started them."""

import os
import signal
import sys
import threading
import time

import pytest

from hpcai_cli.engine.benchmarks.collective import rank_jobs
from hpcai_cli.errors import HpcaiError

WRITES = "import os, sys, time; file = open(sys.argv[-1], 'a'); file.write('{\"pid\": %d}\\n' % os.getpid()); "
"""A program in the ranks' place: it writes one record."""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Process:
    """Stands where ranks do: one process, of a command line that may not be that of ranks."""

    def __init__(self, *words: str):
        self._words = words

    def words(self) -> list[str]:
        return list(self._words)

    def environment(self) -> dict[str, str]:
        return {}


def test_sigterm_is_an_interruption_that_ends_the_ranks():
    records = rank_jobs.records(Process(sys.executable, "-c", WRITES + "file.close(); time.sleep(60)"), {}, {})
    pid = next(records)["pid"]
    assert is_running(pid)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(records)
    assert not is_running(pid) and time.monotonic() - started < 10
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_record_is_read_when_its_line_is_whole():
    halves = WRITES + ("file.write('{\"half\"'); file.flush(); time.sleep(0.5); file.write(': 1}\\n'); file.close()")
    records = rank_jobs.records(Process(sys.executable, "-c", halves), {}, {})
    assert [list(record) for record in records] == [["pid"], ["half"]]


def test_ranks_that_fail_are_told_in_their_own_words():
    with pytest.raises(HpcaiError, match="failed with exit code 1.*'ZeroDivisionError: division by zero'"):
        list(rank_jobs.records(Process(sys.executable, "-c", "1 / 0"), {}, {}))
    # Without a launcher in front, the rank itself finds that it is alone.
    with pytest.raises(HpcaiError, match="a rank was started alone"):
        list(rank_jobs.records(Process(), {"operations": [], "sizes": [], "rounds": 1}, {}))
