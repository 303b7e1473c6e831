"""A rank's pulse: what it tells, what counts as progress, and how a rank ends for which nobody cares."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcai_cli import console, launch
from hpcai_cli.pulse import Pulse


@pytest.fixture
def supervised(monkeypatch):
    monkeypatch.setenv(launch.STARTED_VARIABLE, "1")


def beats(text: str) -> list[list[str]]:
    """Return rank, step, stride and state of each beat."""
    return [line.split()[1:-1] for line in text.split("\n") if line.startswith("\x1dhpcai-beat ")]


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60,
                          env={**os.environ, **environment})


# ---- What it tells -------------------------------------------------------------------------------------------------

def test_a_process_that_nobody_started_has_no_pulse(capfd):
    with Pulse(1) as pulse:
        pulse.begin()
        pulse.mark(1)
    assert capfd.readouterr() == ("", "")


def test_beats_tell_rank_step_and_state_also_while_libraries_load(capfd, supervised, monkeypatch):
    monkeypatch.setenv("PMI_RANK", "3")
    monkeypatch.setenv("PMI_SIZE", "4")
    with Pulse(1) as pulse:
        with console.quiet():
            pulse.begin()
        pulse.mark(7)
        pulse.mark(17)
        time.sleep(0.8)
    told = beats(capfd.readouterr().err)
    assert told[0] == ["3", "-1", "1", "working"]
    assert ["3", "17", "10", "working"] in told
    assert told[-1] == ["3", "17", "10", "over"]


def test_without_a_heartbeat_it_is_told_how_far_a_rank_has_come_and_nothing_is_judged(capfd, supervised):
    with Pulse(0) as pulse:
        pulse.begin()
        pulse.mark(7)
        assert not pulse.is_stalled(time.monotonic() + 1e6)
    assert beats(capfd.readouterr().err)[-1] == ["0", "7", "1", "over"]


# ---- What counts as progress ---------------------------------------------------------------------------------------

def test_a_rank_stands_still_when_no_step_has_come_for_so_long(supervised):
    pulse = Pulse(2)
    now = time.monotonic()
    assert (pulse.is_stalled(now + 19), pulse.is_stalled(now + 21)) == (False, True), "compiling takes longer"
    pulse.mark(1)
    now = time.monotonic()
    assert (pulse.is_stalled(now + 1.9), pulse.is_stalled(now + 2.1)) == (False, True)
    with pulse.slow():
        assert (pulse.is_stalled(now + 19), pulse.is_stalled(now + 21)) == (False, True)
    assert pulse.is_stalled(time.monotonic() + 2.1)


def test_long_steps_may_take_long(supervised):
    pulse = Pulse(1)
    pulse.mark(1)
    time.sleep(0.3)
    pulse.mark(2)
    now = time.monotonic()
    assert (pulse.is_stalled(now + 2.9), pulse.is_stalled(now + 4.5)) == (False, True)


def test_a_rank_that_nobody_watches_waits_longer_for_the_others():
    pulse = Pulse(2)
    assert not pulse.is_stalled(time.monotonic() + 190), "rank 0 may be fitting what the model takes from the data"
    pulse.mark(1)
    assert pulse.is_stalled(time.monotonic() + 2.1)


def test_a_thread_that_computes_is_at_work_and_one_that_waits_is_not():
    script = """
import os, sys, time
from hpcai_cli.pulse import Pulse
with Pulse(1) as pulse:
    pulse.begin()
    pulse.mark(1)
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        {work}
"""
    working, waiting = (run(script.format(work=work), **{launch.STARTED_VARIABLE: "1"})
                        for work in ("sum(range(1000))", "time.sleep(0.1)"))
    assert {state for *_, state in beats(working.stderr)} == {"working", "over"}, working.stderr
    assert "stalled" in {state for *_, state in beats(waiting.stderr)}, waiting.stderr


# ---- Nobody watches ------------------------------------------------------------------------------------------------

def test_a_rank_of_several_that_hangs_ends_itself_and_says_where_it_was():
    done = run("""
import threading
from pathlib import Path
from hpcai_cli.pulse import Pulse
from hpcai_cli.run import Run

def the_place_where_it_hangs():
    threading.Event().wait()

Path("run").mkdir()
with Pulse(1) as pulse:
    pulse.begin()
    pulse.attend(Run(Path("run")))
    pulse.mark(5)
    the_place_where_it_hangs()
""", PMI_RANK="1", PMI_SIZE="2")
    assert done.returncode == 1
    assert re.match(r"\[rank 1\] error: no progress for \d+ s at step 5; what each thread did is in run/stacks; "
                    "expected a step within 1 s; ", done.stderr), done.stderr
    assert "the_place_where_it_hangs" in Path("run/stacks/rank-1.txt").read_text()
    assert '"rank": 1' in Path("run/failure.json").read_text()
