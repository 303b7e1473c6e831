"""Ranks that reduce and train a step for the doctor: what becomes of those that fail, hang, or lose their listener."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest

from hpcai_cli.engine.environment import rank_checks
from hpcai_cli.engine.environment.finding import Finding

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
HANGS = ("from hpcai_cli.engine.environment import rank_trial\n"
         "rank_trial.SECONDS = {seconds}\n"
         "rank_trial.distributed.start = lambda: print('waits', flush=True) or rank_trial.time.sleep(60)\n"
         "rank_trial.findings()")
"""A rank that the others never join."""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tried(*words: str) -> Finding:
    (finding,) = rank_checks._tried(words, os.environ, "hosts", "mend it")
    return finding


@pytest.mark.parametrize(("script", "words"), [
    ("echo noise; echo '[1,0]<stderr>:[rank 0] error: b broke; mend a' >&2; echo 'mpirun has much to say'; exit 1",
     "fails: error: b broke; mend a"), ("kill -9 $$", "fails: killed by SIGKILL"),
    ("echo 'the launcher is unhappy' >&2; exit 3", "fails: the launcher is unhappy"), ("exit 9", "fails: exit code 9"),
    ("echo -----; echo 'a daemon was unable to connect:'; echo ' Local host: b'; echo -----; exit 1",
     "fails: a daemon was unable to connect: Local host: b"),
    ("echo '[1]<stderr>:  what():  HTTP request failed.' >&2; echo 'RuntimeError: Horovod detected'; exit 1",
     "fails: HTTP request failed.")])
def test_why_there_is_no_result(script, words):
    finding = tried("sh", "-c", script)
    assert finding.status == "missing" and finding.required
    assert finding.value == words and finding.mend == "mend it"


def test_a_launcher_that_is_not_there():
    assert tried("no-such-launcher").value == "fails: no-such-launcher: No such file or directory"


def test_a_launcher_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    monkeypatch.setattr(rank_checks, "SECONDS", 1)
    finding = tried("sh", "-c", f"sleep 300 & echo $! > {tmp_path}/pid; wait")
    assert finding.value == "fails: no answer within 1 s"
    pid, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_rank_that_finds_nobody_gives_up_and_says_why():
    done = subprocess.run([sys.executable, "-c", HANGS.format(seconds=1)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 4
    assert "the ranks came to no result within 1 s" in done.stderr and "--interface" in done.stderr


def test_a_rank_that_nobody_hears_any_more_ends():
    process = subprocess.Popen([sys.executable, "-c", HANGS.format(seconds=200)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "HPCAI_RANKS": "1"})
    assert process.stdout.readline() == "waits\n"
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=30) == 1


@needs_horovod
def test_a_rank_alone_refuses_to_pass():
    done = subprocess.run([sys.executable, "-c", "from hpcai_cli.engine.environment import rank_trial; "
                           "rank_trial.findings()"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "started alone" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(("mpi", "gloo", "best"), [(2e9, 1e9, "MPI"), (1e9, 2e9, "Gloo")])
def test_the_faster_transport_is_recommended(monkeypatch, mpi, gloo, best):
    monkeypatch.setattr(rank_checks.launchers, "has_open_mpi", lambda: True)
    (finding,) = rank_checks._faster({name: [Finding("allreduce", "ok", "", metrics={
        f"allreduce_bytes_per_second_{name.lower()}": speed, f"allreduce_latency_seconds_{name.lower()}": 1e-4})]
        for name, speed in (("Gloo", gloo), ("MPI", mpi))})
    assert finding.value.startswith(f"{best} is faster for gradients: 2.00 GB/s against 1.00 by")
    assert finding.mend == ("" if best == "MPI" else "--launcher horovodrun with --np")


def test_one_transport_is_not_compared():
    assert rank_checks._faster({"Gloo": [Finding("allreduce, gloo", "missing", "fails")]}) == []
