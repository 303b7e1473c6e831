"""One training at a time in a folder, and nothing that a killed one leaves behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hpcai_cli import run_lock
from hpcai_cli.errors import HpcaiError, UsageError

HOLD = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from hpcai_cli import run_lock
    with run_lock.held(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
    """)


@pytest.fixture
def holder(tmp_path):
    """Return a function that starts a process which holds the folder's lock for so many seconds."""
    started = []

    def start(seconds: float) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), str(seconds)], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_one_is_refused_with_who_and_since_when(tmp_path, holder):
    process = holder(60)
    for look in (run_lock.check, lambda folder: run_lock.held(folder).__enter__()):
        with pytest.raises(UsageError, match=rf"is being trained by process {process.pid} on \S+ since 20\d\d-"):
            look(tmp_path)
    assert json.loads((tmp_path / ".lock").read_text())["process"] == process.pid


def test_a_killed_one_holds_nothing(tmp_path, holder):
    process = holder(60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (tmp_path / ".lock").exists()
    run_lock.check(tmp_path)
    with run_lock.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_one_that_is_just_ending_is_waited_for(tmp_path, holder):
    holder(0.5)
    with run_lock.held(tmp_path, patience=30):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"process": "x", "host": 1, "since": 1e99}', b"\xff"])
def test_a_holder_who_says_nothing_of_use(tmp_path, holder, content):
    holder(60)
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(UsageError, match="is being trained by another process"):
        run_lock.check(tmp_path)


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HpcaiError, match="cannot write"), run_lock.held(tmp_path / "file"):
        pass
