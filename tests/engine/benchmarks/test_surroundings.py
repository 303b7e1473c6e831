"""What else went on: a busy machine is told as one, and a run's own processes are not others."""

import subprocess
import sys
import time

import pytest

from hpcai_cli.engine.benchmarks import surroundings

pytestmark = pytest.mark.alone

BURN = "import time; end = time.time() + 4\nwhile time.time() < end: pass"


def test_the_machine_is_the_same_twice_and_says_what_results_depend_on():
    assert surroundings.this_machine() == surroundings.this_machine()
    found = surroundings.versions()
    assert found["tensorflow"] and found["numpy"] and found["hpcai"]


def test_other_processes_are_told():
    # A process that this one does not wait for belongs to somebody else, as far as the system's accounts go.
    burner = subprocess.Popen([sys.executable, "-c", f"import os\nif os.fork(): os._exit(0)\n{BURN}"])
    burner.wait()
    watch = surroundings.Watch()
    time.sleep(2)
    after, said = watch.finish()
    assert after["others"] > 0.05 and any(words.startswith("other processes took") for words in said)


def test_its_own_children_are_not_others():
    watch = surroundings.Watch()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 1: pass"], check=True)
    assert watch.own_seconds() >= 1


def test_the_state_is_what_can_be_read():
    found = surroundings.state()
    assert found["fixed_work_ms"] > 0 and found["free_memory_gb"] > 0 and len(found["load"]) == 3


def test_the_command_can_be_given_to_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/hpcai", "benchmark", "input", "--data", "my file.h5"])
    assert surroundings.command() == "hpcai benchmark input --data 'my file.h5'"
