"""What ends a training before its time is over, and what Slurm says of it."""

import stat
import time

import pytest

from hpcai_cli import slurm
from hpcai_cli.signals import StopRequest
from hpcai_cli.time_limit import TimeLimit


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that puts a program of that name on PATH, which says how much is left."""
    def say(left: str) -> None:
        file = tmp_path / "squeue"
        file.write_text(f"#!/bin/sh\necho '{left}'\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return say


@pytest.mark.parametrize(("left", "expected"), [
    ("1-02:03:04", 93_784), ("2:00:00", 7_200), ("59:01", 3_541), ("0:30", 30), ("UNLIMITED", None), ("NOT_SET", None),
    ("INVALID", None), ("", None)])
def test_what_slurm_says(squeue, left, expected):
    squeue(left)
    assert slurm.seconds_left("7") == expected


def test_without_slurm_there_is_no_limit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert slurm.seconds_left("7") is None


def waited(limit: TimeLimit, seconds: float) -> tuple[str, float]:
    """Return what asked for the end, and after how long."""
    stop, started = StopRequest(), time.monotonic()
    with limit.watching(stop):
        while not stop.received and time.monotonic() - started < seconds:
            time.sleep(0.01)
    return stop.received, time.monotonic() - started


def test_the_end_is_asked_for_before_the_limit():
    limit = TimeLimit(4)
    limit.saving = 0.5
    reason, seconds = waited(limit, 8)
    assert reason == "the time limit (--max-time 4 s)"
    assert 1.9 < seconds < 4


def test_what_takes_long_to_save_is_asked_early_and_has_half_of_its_time():
    limit = TimeLimit(4)
    limit.saving = 100
    reason, seconds = waited(limit, 8)
    assert reason
    assert 1.9 < seconds < 4


def test_slurm_s_limit_counts_where_it_is_the_first(squeue, monkeypatch):
    squeue("0:03")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    reason, seconds = waited(TimeLimit(3_600), 8)
    assert reason == "the time limit (Slurm's)"
    assert seconds < 3


def test_without_a_limit_nothing_is_asked():
    assert waited(TimeLimit(None), 0.5)[0] == ""
