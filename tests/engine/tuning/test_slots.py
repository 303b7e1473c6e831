"""Shares of a machine: each training gets GPUs of its own, among those that the search itself may use."""

import os
from pathlib import Path

import pytest

from hpcai_cli.engine.tuning.slots import Slots


def seen_by_trainings(folder: Path, count: int, np: int) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES of a program on each share."""
    slots = Slots(count, np)
    for slot in range(count):
        process = slots.start(slot, ["sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES" >&2'], folder / str(slot))
        assert process.wait(timeout=20) == 0
    return [(folder / str(slot)).read_text().strip() for slot in range(count)]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A driver that shows four GPUs, as no machine of the tests has any."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf 'H100\\nH100\\nH100\\nH100\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(("given", "count", "np", "expected"), [
    (None, 2, 1, ["0", "1"]), (None, 2, 2, ["0,1", "2,3"]), ("2,3", 2, 1, ["2", "3"]), ("3", 2, 1, ["3", "3"]),
    ("3", 1, 2, ["3"]),
    ("GPU-77,GPU-99", 2, 1, ["GPU-77", "GPU-99"]), ("1,9,2", 1, 1, ["1"]), ("-1", 1, 1, ["-1"]), ("", 1, 1, [""])])
def test_each_training_gets_gpus_of_those_that_the_search_may_use(driver, tmp_path, monkeypatch, given, count, np,
                                                                  expected):
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert seen_by_trainings(tmp_path, count, np) == expected
