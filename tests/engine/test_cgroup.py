"""What control groups allow: trees of both versions as a kernel shows them, and a real group where one can be made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpcai_cli.engine.cgroup import Groups

GIGABYTE = 1 << 30
NONE = 9223372036854771712
"""What version 1 writes where there is no limit."""


@pytest.fixture
def groups(tmp_path):
    """Return a function that writes a tree of files and a membership, and gives what is read there."""
    def write(membership: str, **files: dict[str, object]) -> Groups:
        for folder, content in files.items():
            for name, text in content.items():
                path = tmp_path / "cgroup" / folder.replace("__", "/") / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"{text}\n")
        (tmp_path / "membership").write_text(membership)
        return Groups(tmp_path / "cgroup", tmp_path / "membership")
    return write


def test_version_2_takes_the_least_of_the_group_and_those_above(groups):
    found = groups("0::/job/step\n", job={"memory.max": 4 * GIGABYTE, "memory.current": 3 * GIGABYTE,
                                          "memory.stat": f"anon 5\ninactive_file {GIGABYTE}",
                                          "cpu.max": "150000 100000",
                                          "pids.max": 100, "pids.current": 90},
                   job__step={"memory.max": "max", "memory.current": GIGABYTE, "cpu.max": "max 100000",
                              "pids.max": "max"})
    assert found.memory() == (4 * GIGABYTE, 2 * GIGABYTE)
    assert found.cores() == 1.5 and found.processes() == 10


def test_version_1_has_a_tree_for_each_controller(groups):
    found = groups("9:memory:/docker/abc\n8:cpu,cpuacct:/docker/abc\n7:pids:/\n", memory={
        "memory.limit_in_bytes": 2 * GIGABYTE, "memory.usage_in_bytes": GIGABYTE, "memory.stat": "inactive_file 7"},
        cpu={"cpu.cfs_quota_us": 50000, "cpu.cfs_period_us": 100000}, pids={"pids.max": "max"})
    # The container sees the path on its host, of which it has the end alone.
    assert found.memory() == (2 * GIGABYTE, GIGABYTE)
    assert found.cores() == 0.5 and found.processes() is None


@pytest.mark.parametrize(("membership", "files"), [
    ("", {}), ("0::/\n", {}), ("x\n:::\n", {}), ("4:memory:/\n", {"memory": {"memory.limit_in_bytes": NONE}}),
    ("3:cpu:/\n", {"cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100000}}),
    ("0::/\n", {"a": {"memory.max": 5}}), ("0::/a\n", {"a": {"memory.max": "none", "cpu.max": "1 0"}})])
def test_what_limits_nothing(groups, membership, files):
    found = groups(membership, **files)
    assert found.memory() is None and found.cores() is None and found.processes() is None


def test_a_real_group_limits_the_memory_that_a_process_in_it_sees():
    group = Path(f"/sys/fs/cgroup/memory/hpcai-{os.getpid()}")
    is_first = group.parent.is_dir()
    group = group if is_first else Path(f"/sys/fs/cgroup/hpcai-{os.getpid()}")
    limit = "memory.limit_in_bytes" if is_first else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(GIGABYTE))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    code = "from hpcai_cli.engine.machine import memory_bytes; print(*memory_bytes())"
    try:
        done = subprocess.run(["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", sys.executable, "-c",
                               code], capture_output=True, text=True, timeout=60)
    finally:
        group.rmdir()
    total, available = map(int, done.stdout.split())
    assert total == GIGABYTE and 0 < available < total
