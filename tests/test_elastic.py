"""Elastic jobs: what is asked of horovodrun, and real ranks that are killed, come back, fail or are too few."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli import elastic, launch
from hpcai_cli.elastic import Elastic
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.hosts import Host, is_here
from hpcai_cli.launch import Place
from hpcai_cli.launchers import Ranks

HPCAI = str(Path(sys.executable).parent / "hpcai")
TWO = (Host("203.0.113.1", 2), Host("198.51.100.2", 2))
"""Addresses of no host (RFC 5737)."""
needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")


# ---- What horovodrun is asked for ----------------------------------------------------------------------------------

def test_each_place_of_this_host_has_a_name_of_its_own():
    names = elastic.names_here(4)
    assert len(set(names)) == 4 and all(map(is_here, names))
    environ = Ranks(3, "horovodrun", elastic=Elastic()).environment()
    ranks = [launch.place({**environ, "HOROVOD_HOSTNAME": name, "HOROVOD_RANK": "1", "HOROVOD_SIZE": "2",
                           "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "1", "HOROVOD_CROSS_SIZE": "2"})
             for name in elastic.names_here(3)]
    assert ranks == [Place(1, 2, number, 3, 1, "horovodrun") for number in range(3)]


def test_the_command_line_on_this_host():
    words = Ranks(2, "horovodrun", elastic=Elastic(min_np=1, max_np=4, timeout=60)).words()[1:]
    assert words == ["-np", "2", "--gloo", "--disable-cache", "--min-np", "1", "--elastic-timeout", "60",
                     "--blacklist-cooldown-range", "1", "300", "--max-np", "4", "-H", "127.0.0.1:1,127.0.0.01:1",
                     "--network-interfaces", "lo"]


def test_the_command_line_on_hosts():
    words = Ranks(4, "horovodrun", TWO, "eth0", elastic=Elastic()).words()
    assert words[words.index("-H") + 1] == "203.0.113.1:2,198.51.100.2:2" and words[-1] == "eth0"
    words = Ranks(4, "horovodrun", TWO, "eth0", elastic=Elastic(discovery=Path("my hosts.sh"))).words()
    assert words[words.index("--host-discovery-script") + 1] == f"'{os.getcwd()}/my hosts.sh'" and "-H" not in words


@pytest.mark.parametrize(("words", "message"), [
    (["--min-np", 2], "--min-np says how an elastic job goes on; expected --elastic with it"),
    (["--elastic"], "goes on with another; expected --np N of at least 2"),
    (["--elastic", "--np", 1], "expected --np N of at least 2"),
    (["--elastic", "--np", 2, "--launcher", "mpirun"], "--elastic jobs are started by horovodrun"),
    (["--elastic", "--np", 2, "--min-np", 3], "expected a number from 3 to more"),
    (["--elastic", "--np", 4, "--max-np", 3], "expected a number from 1 to 3"),
    (["--elastic", "--hosts", "a:1,b:1", "--discovery", "hosts.sh"], "--discovery names the hosts"),
    (["--elastic", "--discovery", "none.sh"], "--discovery takes a program that prints hosts"),
    (["--elastic", "--np", 2, "--autotune"], "--autotune needs the same processes"),
    (["--elastic", "--np", 2, "--tensor-parallel", 2], "--tensor-parallel needs the same processes"),
    (["--elastic", "--np", 2, "--profile", "1-2"], "--profile needs the same processes"),
    (["--elastic", "--np", 2, "--prove"], "--prove needs the same processes"),
    (["--elastic", "--np", 2, "--energy"], "--energy needs the same processes"),
    (["--elastic", "--np", 2, "--set", "gradient_reduction=adasum"], "Adasum combines")])
def test_what_cannot_be(hpcai, words, message, monkeypatch):
    monkeypatch.setattr(launch, "require_horovod", lambda np: None)
    done = hpcai("train", "mnist", *words)
    assert done.exit_code == 2 and message in done.stderr


def test_a_discovery_that_shows_no_way_to_other_hosts(hpcai, monkeypatch):
    monkeypatch.setattr(launch, "require_horovod", lambda np: None)
    done = hpcai("train", "mnist", "--elastic", "--discovery", program("echo localhost:2"))
    assert done.exit_code == 2 and "expected --interface NAME" in done.stderr


def program(text: str) -> Path:
    path = Path("hosts.sh")
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_hosts_are_discovered():
    assert elastic.discovered(program("echo a:2; echo b")) == (Host("a", 2), Host("b"))
    assert elastic.discovered(program("true")) == ()


@pytest.mark.parametrize(("text", "kind", "message"), [
    ("echo gone >&2; exit 3", DataError, "ends with 3; .*received: 'gone'"), ("echo a:x", UsageError, "cannot read")])
def test_a_discovery_that_fails(text, kind, message):
    with pytest.raises(kind, match=message):
        elastic.discovered(program(text))


# ---- Real ranks ----------------------------------------------------------------------------------------------------

SLOW = '''

def augment(inputs, seed, recipe):
    """Take 20 ms for each step, so that there is a time to kill a rank at."""
    import time

    import tensorflow as tf

    def wait(step):
        time.sleep(0.02)
        return step

    with tf.control_dependencies([tf.numpy_function(wait, [seed[1]], tf.int32)]):
        return tf.identity(inputs)
'''


class Job:
    """An elastic training of two ranks in a process of its own."""

    def __init__(self, *words: object):
        self.process = subprocess.Popen(
            [HPCAI, "train", "./tiny.py", "--elastic", "--np", "2", "--output", "run", "--json", *map(str, words)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def events(self, kind: str) -> list[dict]:
        file = Path("run/events.jsonl")
        found = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return [event for event in found if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        deadline = time.monotonic() + 150
        while len(self.events(kind)) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr.read()
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=200)
        return self.process.returncode, out, err


@pytest.fixture
def job(tiny_folder):
    """Return a function that starts one, which is told to end when the test ends before it does."""
    (tiny_folder / "tiny.py").write_text((tiny_folder / "tiny.py").read_text() + SLOW)
    started = []

    def start(*words: object) -> Job:
        started.append(Job(*words))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            # The first signal asks for a checkpoint, and the second ends it.
            for number in (signal.SIGINT, signal.SIGINT):
                each.process.send_signal(number)
                time.sleep(1)
            each.process.communicate(timeout=60)


@needs_horovod
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_rank_that_is_killed_is_gone_on_without_and_comes_back(job, ranks_in, rank):
    # Checkpoints more often than blocks of steps: other ranks are looked for all the same.
    training = job("--epochs", 400, "--checkpoint-every", "3steps")
    training.wait_for("epoch")
    killed = time.time()
    os.kill(ranks_in(Path.cwd())[rank], signal.SIGKILL)
    training.wait_for("elastic", 2)
    training.wait_for("first_step", 3)
    training.process.send_signal(signal.SIGTERM)
    code, _, err = training.end()
    assert code == 75, err
    alone, both = training.events("elastic")[:2]
    assert (alone["world_size"], alone["reason"]) == (1, "lost a rank")
    assert (both["world_size"], both["reason"], both["lost_steps"]) == (2, "hosts changed", 0)
    # The time is the machine's affair; that it is short, and without another compilation, is ours.
    assert alone["time"] - killed < 20
    epochs = training.events("epoch")
    assert [event["epoch"] for event in epochs] == list(range(1, len(epochs) + 1))
    assert {event["examples"] for event in epochs} == {80}, "each example once"
    assert "a process was lost: 1 in place of 2 go on after step" in err and "more processes: 2 in place of 1" in err
    assert "error" not in err
    resumed = subprocess.run([HPCAI, "train", "--resume", "run", "--epochs", str(len(epochs) + 1), "--json"],
                             capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["epochs"] == len(epochs) + 1


@needs_horovod
@pytest.mark.long
def test_a_rank_s_own_failure_is_the_job_s(job):
    code, out, err = job("--set", "break_rank=1").end()
    assert (code, out) == (2, ""), err
    assert err.count("error:") == 1 and "[rank 1] error: recipe tiny: build_model fails" in err
    assert json.loads(Path("run/failure.json").read_text())["rank"] == 1


@needs_horovod
@pytest.mark.long
def test_too_few_ranks_end_the_job(job, ranks_in):
    training = job("--min-np", 2, "--elastic-timeout", 1, "--epochs", 400, "--max-restarts", 0)
    training.wait_for("checkpoint")
    os.kill(ranks_in(Path.cwd())[1], signal.SIGKILL)
    code, out, err = training.end()
    assert (code, out) == (1, ""), err
    assert "error: fewer than --min-np processes could be had in time" in err and "--resume run" in err
