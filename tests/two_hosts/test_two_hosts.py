"""One command over two hosts: it trains as one process would, and each wrong set-up ends in its sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.launchers import START_SECONDS

HPCAI = str(Path(sys.executable).parent / "hpcai")
pytestmark = pytest.mark.cluster
LAUNCHERS = pytest.mark.parametrize("launcher", ["mpirun", "horovodrun"])


@pytest.fixture
def train(two_hosts, request):
    """Return a function that trains from host a, by default in a run folder of this test's own."""
    def run(*words: object, host: str = "a", output: str = "", **how):
        name = output or "".join(sign if sign.isalnum() else "-" for sign in request.node.name)
        done = two_hosts.hpcai(host, "train", "./tiny.py", "--data", "tiny.h5", "--output", name, "--json", *words,
                               **how)
        return done, two_hosts.folder / name
    return run


def weights(run: Path) -> dict[str, np.ndarray]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def wait_for_epochs(events: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not events.exists() or events.read_text().count('"epoch"') < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.05)


def wait_for_checkpoint(events: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not events.exists() or '"checkpoint"' not in events.read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)
        time.sleep(0.05)


def assert_close(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], rtol=1e-4, atol=1e-5)


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


# ---- It trains -----------------------------------------------------------------------------------------------------

@LAUNCHERS
def test_two_hosts_train_the_model_of_one(train, launcher):
    done, run = train("--hosts", "a:1,b:1", "--launcher", launcher)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == json.loads((run / "manifest.json").read_text())["hosts"] == 2
    alone, other = train("--batch-size", 16, output=f"alone-{launcher}")
    assert alone.returncode == 0, alone.stderr
    assert_close(run, other)


@LAUNCHERS
def test_mnist_to_the_accuracy_of_one_host(two_hosts, train_mnist, launcher):
    words, accuracy = train_mnist()
    done = two_hosts.hpcai("a", *words, "--hosts", "a:1,b:1", "--launcher", launcher, "--output", f"mnist-{launcher}",
                           "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["accuracy"] == accuracy


def test_a_hostfile_and_an_interface(train, two_hosts):
    (two_hosts.folder / "hosts").write_text("a slots=1\nb slots=1\n")
    done, _ = train("--hostfile", "hosts", "--interface", "wire")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


@LAUNCHERS
def test_the_host_that_starts_need_not_take_part(train, launcher):
    done, _ = train("--hosts", "b:2", "--launcher", launcher)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2


def test_evaluate_gives_the_same_figures(train, two_hosts):
    done, run = train()
    assert done.returncode == 0, done.stderr
    alone, spread = (two_hosts.hpcai("a", "evaluate", run.name, "--data", "tiny.h5", "--json", "--output", name, *words)
                     for name, words in (("alone", ()), ("spread", ("--hosts", "a,b"))))
    assert alone.returncode == spread.returncode == 0, alone.stderr + spread.stderr
    assert json.loads(alone.stdout)["metrics"] == json.loads(spread.stdout)["metrics"]


# ---- It ends -------------------------------------------------------------------------------------------------------

@LAUNCHERS
@pytest.mark.parametrize("places", ["a:1,b:1", "b:2"], ids=["here-too", "elsewhere"])
def test_a_signal_ends_in_a_checkpoint_and_resuming_gives_the_undisturbed_weights(train, two_hosts, launcher, places):
    words = ["--hosts", places, "--launcher", launcher, "--epochs", 100]
    done, whole = train(*words, output=f"whole-{launcher}-{places[0]}")
    assert done.returncode == 0, done.stderr
    name = f"stopped-{launcher}-{places[0]}"
    with two_hosts.started("a", "train", "./tiny.py", "--data", "tiny.h5", "--output", name, *words) as process:
        wait_for_epochs(two_hosts.folder / name / "events.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    resumed = two_hosts.hpcai("a", "train", "./tiny.py", "--resume", name, "--hosts", places, "--launcher", launcher)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(two_hosts.folder / name, whole)


@LAUNCHERS
def test_a_rank_that_dies_on_the_other_host_costs_nothing_but_time(train, two_hosts, launcher):
    words = ["--hosts", "a:1,b:1", "--launcher", launcher, "--epochs", 150]
    done, whole = train(*words, output=f"undisturbed-{launcher}")
    assert done.returncode == 0, done.stderr
    name = f"killed-{launcher}"
    with two_hosts.started("a", "train", "./tiny.py", "--data", "tiny.h5", "--output", name, *words) as process:
        wait_for_checkpoint(two_hosts.folder / name / "events.jsonl", process)
        os.kill(two_hosts.rank_of("b"), signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("restarting from the newest checkpoint") == 1, errors
    assert_same_bits(two_hosts.folder / name, whole)


def test_an_elastic_job_goes_on_without_the_other_host_and_takes_it_back(two_hosts):
    words = ["train", "./tiny.py", "--data", "tiny.h5", "--output", "elastic", "--elastic", "--hosts", "a:1,b:1",
             "--min-np", 1, "--epochs", 5_000]
    events = two_hosts.folder / "elastic" / "events.jsonl"

    def sizes() -> list[int]:
        told = [json.loads(line) for line in events.read_text().splitlines()]
        return [event["world_size"] for event in told if event["event"] == "elastic"]

    with two_hosts.started("a", *words) as process:
        wait_for_checkpoint(events, process)
        os.kill(two_hosts.rank_of("b"), signal.SIGKILL)
        deadline = time.monotonic() + 90
        while sizes() != [1, 2]:
            assert process.poll() is None and time.monotonic() < deadline, (sizes(), process.communicate(timeout=60))
            time.sleep(0.1)
        two_hosts.rank_of("b")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    epochs = [json.loads(line) for line in events.read_text().splitlines() if '"epoch"' in line]
    examples = {event["examples"] for event in epochs if event["event"] == "epoch"}
    assert len(examples) == 1, "each example once"


@LAUNCHERS
def test_the_first_failing_rank_is_named(train, launcher):
    done, run = train("--hosts", "a:1,b:1", "--launcher", launcher, "--set", "break_rank=1")
    assert done.returncode == 2 and "[rank 1] error: " in done.stderr and "told to break" in done.stderr
    failure = json.loads((run / "failure.json").read_text())
    assert failure["rank"] == 1 and "told to break" in failure["message"]


# ---- Wrong set-ups -------------------------------------------------------------------------------------------------

def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 4, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr
    assert "Traceback" not in done.stderr


@LAUNCHERS
@pytest.mark.parametrize(("words", "expected"), [
    (["--hosts", "a:1,gone:1"], ["gone cannot be reached", "check that it is up"]),
    (["--hosts", "a:1,nobody:1"], ["nobody has no address"]),
    (["--hosts", "a:1,b:1", "--interface", "dead"], ["b is not reached over dead"]),
    (["--hosts", "a:1,b:1", "--interface", "eth77"], ["no such network interface", "wire"])])
def test_a_host_or_an_interface_that_leads_nowhere(train, launcher, words, expected):
    assert_refused(train(*words, "--launcher", launcher, timeout=START_SECONDS + 15)[0], *expected)


@pytest.mark.parametrize(("key", "expected"), [
    (["other_key"], ["b does not accept a key of this user's", "ssh-copy-id b"]),
    (["user_key", "nobody_known"], ["b is not known to ssh", "run `ssh b` once"])], ids=["key", "host-key"])
def test_an_ssh_that_refuses(train, two_hosts, key, expected):
    two_hosts.user_key(*key)
    try:
        done, _ = train("--hosts", "a:1,b:1", timeout=START_SECONDS + 15)
    finally:
        two_hosts.user_key("user_key")
    assert_refused(done, *expected)


def test_a_folder_that_the_other_host_does_not_see(two_hosts, tmp_path):
    """A folder on a disk of host a's own: host b's processes run where it is not mounted."""
    done = two_hosts.run("a", "sh", "-c", "mkdir -p $0 && mount -t tmpfs none $0 && cp tiny.py tiny.h5 $0/ && cd $0 && "
                         f"exec {HPCAI} train ./tiny.py --data tiny.h5 --output run --hosts a:1,b:1",
                         tmp_path / "own")
    assert done.returncode == 4, done.stderr
    assert "b does not see" in done.stderr and "tiny.h5" in done.stderr


# ---- Benchmarks ----------------------------------------------------------------------------------------------------

def test_scaling_measures_one_host_and_two(two_hosts):
    done = two_hosts.hpcai("a", "benchmark", "scaling", "--hosts", "a:1,b:1", "--recipe", "./tiny.py", "--data",
                           "tiny.h5", "--mode", "weak", "--seconds", "0.05", "--output", "scaling", "--json")
    assert done.returncode == 0, done.stderr
    names = [figure["name"] for figure in json.loads(done.stdout)["figures"]]
    assert any("2 ranks, efficiency" in name for name in names), names
    assert not list(two_hosts.folder.glob(".hpcai-*"))


@pytest.mark.parametrize(("words", "message"), [
    (["--hosts", "a:1,b:2"], "the same number of ranks"), (["--hosts", "a:2,b:2", "--np", "2,3"], "multiples of 2")])
def test_scaling_takes_whole_hosts(two_hosts, words, message):
    done = two_hosts.hpcai("a", "benchmark", "scaling", "--recipe", "./tiny.py", "--data", "tiny.h5", *words)
    assert done.returncode == 2 and message in done.stderr
