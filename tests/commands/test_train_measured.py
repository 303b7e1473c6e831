"""hpcai train --profile and --energy as a user meets them, on the built-in sample, alone and in two processes."""

import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")


@contextmanager
def power_meter(path: Path, watts: float):
    """A power meter that writes ten readings a second."""
    ended = threading.Event()

    def write() -> None:
        with path.open("a", buffering=1) as stream:
            while not ended.wait(0.1):
                stream.write(f"{time.time():.2f} {watts}\n")

    path.write_text("")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.3)
        yield
    finally:
        ended.set()
        writer.join()


# ---- Profiles ------------------------------------------------------------------------------------------------------

def test_a_profile_is_written_and_said_in_words(hpcai):
    done = hpcai("train", "mnist-mlp", "--epochs", "4", "--output", "run", "--profile", "30-40")
    assert done.exit_code == 0, done.stderr
    assert "# Where the time goes, steps " in done.stdout and "## What to change" in done.stdout
    found = json.loads(Path("run/result.json").read_text())["profile"]
    assert found["steps"][0] <= 30 and found["steps"][1] >= 40
    assert Path("run/profile/summary.md").read_text() in done.stdout
    assert len(list(Path("run/profile").glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert not Path("run/profile/horovod_timeline.json").exists()


@pytest.mark.long
@needs_horovod
def test_two_processes_write_one_trace_and_one_timeline(monkeypatch):
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    done = subprocess.run([HPCAI, "train", "mnist-mlp", "--epochs", "4", "--np", "2", "--output", "run", "--json",
                           "--profile", "15-25", "--energy"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    found, steps = result["profile"], result["profile"]["steps"]
    assert steps[0] <= 15 and steps[1] >= 25
    assert len(found["ranks_ms"]) == 2 and found["shares"]["communication"] > 0
    assert all(row[2] > 0 for row in found["ranks_ms"])
    # Sending is a part of what rank 0 waits for, but for what the clocks of two threads differ.
    assert 0 < found["transfer_ms"] < 1.2 * found["ranks_ms"][0][2]
    assert found["gradient_bytes"] == 4 * result["parameters"]
    events = json.loads(Path("run/profile/horovod_timeline.json").read_text())
    assert {"NEGOTIATE_ALLREDUCE", "ALLREDUCE"} <= {event.get("name") for event in events}
    # Every gradient travels once a step.
    assert found["messages"] >= 1
    names = [event["args"].get("name", "") for event in events if event.get("name") == "process_name"]
    gradients = [name for name in names if "gradients." in name]
    assert gradients
    sent = [event for event in events if event.get("name") == "ALLREDUCE"]
    assert len([event for event in sent if event["pid"] > 1]) >= len(gradients) * (steps[1] - steps[0])
    assert len(list(Path("run/profile").glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert len(result["energy"]["hosts"]) == 1, "one rank of a host reads its counters"


@pytest.mark.parametrize("given", ["100", "20-10", "0-5", "a-b", "1-1001", "1-2-3", ""])
def test_steps_that_are_none_are_refused_before_the_start(hpcai, given):
    done = hpcai("train", "mnist-mlp", "--profile", given)
    assert done.exit_code == 2 and "--profile 100-120" in done.stderr
    assert not Path("runs").exists()


def test_steps_beyond_the_training_are_refused_before_the_start(hpcai):
    done = hpcai("train", "mnist-mlp", "--epochs", "1", "--profile", "5000-5010")
    assert done.exit_code == 2 and "the training has" in done.stderr
    assert not Path("runs").exists()


def test_a_timeline_that_goes_elsewhere_is_not_taken_away(hpcai, monkeypatch):
    monkeypatch.setenv("HOROVOD_TIMELINE", "mine.json")
    done = hpcai("train", "mnist-mlp", "--profile", "10-20")
    assert done.exit_code == 2 and "mine.json" in done.stderr


# ---- Energy --------------------------------------------------------------------------------------------------------

def test_joules_by_a_power_meter_are_watts_times_seconds(hpcai):
    with power_meter(Path("watts.txt"), watts=150):
        done = hpcai("train", "mnist-mlp", "--epochs", "2", "--output", "run", "--power-file", "watts.txt")
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("run/result.json").read_text())
    energy = result["energy"]
    assert energy["joules"] == pytest.approx(150 * energy["seconds"], rel=0.05)
    examples = energy["samples"]
    assert examples > 1000 and result["metrics"]["joules_per_sample"] == pytest.approx(energy["joules"] / examples)
    assert "J a sample, by power meter (watts.txt)" in done.stdout
    (finished,) = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()
                   if '"finished"' in line]
    assert finished["joules"] == energy["joules"]


def test_without_counters_energy_is_a_reason_and_no_figure(hpcai):
    done = hpcai("train", "mnist-mlp", "--epochs", "1", "--output", "run", "--energy")
    assert done.exit_code == 0, done.stderr
    result = json.loads(Path("run/result.json").read_text())
    if result["energy"]["joules"] is not None:
        pytest.skip("this machine counts its joules")
    assert result["energy"]["reason"] and "joules" not in result["metrics"]
    assert "not measurable here: " in done.stdout


def test_a_power_meters_file_that_is_missing_is_said_before_the_start(hpcai):
    done = hpcai("train", "mnist-mlp", "--power-file", "none.txt")
    assert done.exit_code == 3 and "none.txt" in done.stderr
    assert not Path("runs").exists()
