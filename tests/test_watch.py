"""Who watches over ranks: whom he suspects, when, and when not."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcai_cli import stacks
from hpcai_cli.watch import Watch

STARTED = {0: (1, "a"), 1: (2, "b")}


@pytest.fixture
def watch():
    """Two ranks whose first beats came just now, watched with 5 seconds of patience."""
    found = Watch(2, 5, Path("stacks"))
    for rank in (0, 1):
        found.heard(rank, [str(rank), "8", "4", "working", "7"])
    return found


def judged(watch, seconds):
    """Return what is said of the ranks, so many seconds from now."""
    return watch._judge(time.monotonic() + seconds, time.monotonic(), STARTED)


def test_ranks_that_beat_are_well(watch):
    assert judged(watch, 4.9) is None
    assert (watch.step, watch.stride, watch.all_began) == (8, 4, True)


def test_who_is_silent_hangs(watch):
    watch._forgive(3)
    watch.heard(0, ["0", "9", "4", "working", "7"])
    assert judged(watch, 4.5) is None
    assert judged(watch, 5.1)[0] == "rank 0 on a gives no sign of life for 5 s", "rank 1 was forgiven for three more"
    assert judged(watch, 9) == ("rank 0 on a and rank 1 on b give no sign of life for 9 s", 0)


def test_who_has_made_no_step_may_be_silent_longer(watch):
    watch.heard(1, ["1", "-1", "1", "working", "7"])
    watch._forgive(0)
    assert judged(watch, 5.1)[1] == 0
    for rank in (0, 1):
        watch.heard(rank, [str(rank), "-1", "1", "working", "7"])
    assert judged(watch, 59) is None
    assert judged(watch, 61)[1] == 0


def test_one_that_stands_still_may_wait_for_another_that_works(watch):
    watch.heard(0, ["0", "8", "4", "stalled", "7"])
    assert judged(watch, 0) is None
    watch.heard(1, ["1", "8", "4", "stalled", "7"])
    assert judged(watch, 0) == ("no rank makes progress", None)
    watch.heard(1, ["1", "8", "4", "over", "7"])
    assert judged(watch, 0) == ("no rank makes progress", None)


def test_ranks_have_time_to_begin_and_to_end(watch):
    late = Watch(2, 5, Path("stacks"))
    late.heard(0, ["0", "-1", "1", "working", "7"])
    assert late._judge(time.monotonic() + 4, time.monotonic() - 295, STARTED) is None
    assert late._judge(time.monotonic() + 4, time.monotonic() - 297, STARTED) == (
        "rank 1 on b did not begin within 300 s", 1)
    for rank in (0, 1):
        watch.heard(rank, [str(rank), "8", "4", "over", "7"])
    assert judged(watch, 299) is None
    assert judged(watch, 301)[1] == 0


@pytest.mark.parametrize("words", ["", "0", "1 8 4 working 7", "0 x 4 working 7", "0 8 4 working 7 now"])
def test_a_beat_that_cannot_be_read_is_none(words):
    watch = Watch(1, 5, Path("stacks"))
    watch.heard(0, words.split())
    assert not watch.all_began


def test_of_an_elastic_job_who_is_silent_is_ended_and_the_others_go_on():
    with subprocess.Popen(["sleep", "60"]) as hung:
        watch = Watch(2, 5, Path("stacks"), is_elastic=True)
        started = {0: (4_000_000, socket.gethostname()), 1: (hung.pid, socket.gethostname())}
        # Two that have begun as rank 1: the one that was there before is rank 0 now, and goes on.
        watch.heard(1, ["1", "8", "4", "working", str(hung.pid)])
        watch._forgive(-10)
        watch.heard(1, ["1", "9", "4", "stalled", "4000000"])
        watch._end_silent(time.monotonic(), started)
        assert hung.wait(10) == -signal.SIGKILL
    assert watch._judge(time.monotonic(), time.monotonic(), started) is None, "the others have waited for it"


# ---- Stacks --------------------------------------------------------------------------------------------------------

def test_a_stopped_process_writes_its_stacks_below_those_of_an_earlier_attempt():
    Path("recipe.py").write_text("""
import faulthandler, signal, time
from pathlib import Path
from hpcai_cli import stacks

faulthandler.register(signal.SIGUSR2, file=stacks.opened(Path("stacks"), 0), all_threads=True)
def hangs():
    print("ready", flush=True)
    time.sleep(60)
hangs()
""")
    Path("stacks").mkdir()
    Path("stacks/rank-0.txt").write_text("earlier\n")
    with subprocess.Popen([sys.executable, "recipe.py"], stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        os.kill(process.pid, signal.SIGSTOP)

        def ask():
            for number in (signal.SIGUSR2, signal.SIGCONT):
                os.kill(process.pid, number)

        stacks.collect(Path("stacks"), [0, 1], "rank 0 hangs", ask)
        process.kill()
    text = Path("stacks/rank-0.txt").read_text()
    assert text.startswith("earlier\n--- ") and "rank 0 hangs\n" in text
    assert re.fullmatch("{0: .hangs of recipe.py, line [89].}", str(stacks.recipe_lines(Path("stacks"), [0, 1])))
    assert not Path("stacks/rank-1.txt").exists(), "that rank had none, and would have ended by the signal"


def test_empty_files_go_and_the_folder_with_them():
    for rank in (0, 1):
        stacks.opened(Path("stacks"), rank).close()
    Path("stacks/rank-0.txt").write_text("something")
    stacks.clear(Path("stacks"))
    assert [path.name for path in Path("stacks").iterdir()] == ["rank-0.txt"]
    Path("stacks/rank-0.txt").unlink()
    stacks.clear(Path("stacks"))
    assert not Path("stacks").exists()
    stacks.clear(Path("stacks"))
