"""What the doctor says of limits: real ones, lowered for a process of its own."""

import os
import subprocess
import sys

import pytest

LOOK = ("from hpcai_cli.engine.environment import limits\n"
        "for each in limits.findings(): print(each.status, each.name, each.value, each.mend, sep='|')")


def findings(before: str = "true", *, prefix: tuple[str, ...] = (), **environ: str) -> dict[str, list[str]]:
    """Return status, name, value and mend of what is found where a shell has run these words before."""
    done = subprocess.run([*prefix, "bash", "-c", f'{before} && exec {sys.executable} -c "$0"', LOOK],
                          capture_output=True, text=True, timeout=120, env={**os.environ, **environ})
    if "unshare failed" in done.stderr or "permission denied" in done.stderr.lower():
        pytest.skip("no namespace can be made here")
    assert done.returncode == 0, done.stderr
    return {line.split("|")[1]: line.split("|") for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("words", "name", "value", "mend"), [
    ("ulimit -Sn 256", "open files", "at most 256", "ulimit -n 4096"),
    ("ulimit -n 256", "open files", "at most 256", "docker run --ulimit nofile=65536, or /etc/security/limits.conf"),
    ("ulimit -u 500", "processes", "at most 500", "docker run --ulimit nproc=65536, or /etc/security/limits.conf"),
    ("ulimit -Sv 8000000", "address space", "at most 8.2 GB", "ulimit -v unlimited")])
def test_a_limit_that_is_too_low(words, name, value, mend):
    found = findings(words)[name]
    assert found[0] == "warning" and found[2] == value and found[3] == mend


def test_locked_memory_matters_to_infiniband_alone():
    found = findings("ulimit -l 64")["locked memory"]
    assert "at most 65.5 KB" in found[2]
    assert found[0] == ("warning" if os.path.isdir("/sys/class/infiniband") else "ok")


def test_the_shared_memory_of_a_container():
    found = findings("mount -t tmpfs -o size=64m none /dev/shm", prefix=("unshare", "--mount"))["shared memory"]
    assert found[0] == "warning" and "/dev/shm has 67.1 MB" in found[2] and found[3] == "docker run --shm-size=1g"


def test_shared_memory_that_ended_programs_have_filled():
    words = "mount -t tmpfs -o size=512m none /dev/shm && head -c 400M /dev/zero > /dev/shm/left"
    found = findings(words, prefix=("unshare", "--mount"))["shared memory"]
    assert found[0] == "warning" and found[3] == "remove what ended programs have left in /dev/shm"


@pytest.mark.parametrize(("name", "value", "is_well"), [
    ("OMP_NUM_THREADS", "1", True), ("OMP_NUM_THREADS", "1,1", True), ("TF_NUM_INTRAOP_THREADS", "0", True),
    ("OMP_NUM_THREADS", "9999", False), ("TF_NUM_INTEROP_THREADS", "many", False), ("MKL_NUM_THREADS", "-1", False)])
def test_threads_that_do_not_suit_the_cores(name, value, is_well):
    found = findings(**{name: value})["threads"]
    assert found[0] == ("ok" if is_well else "warning") and "for each of 2 processes" in found[2]
    assert found[3] == ("" if is_well else f"unset {name}")


def test_one_core_is_one_thread():
    found = findings(prefix=("taskset", "--cpu-list", str(min(os.sched_getaffinity(0)))))
    assert found["cores"][2].startswith("1 for this process of ") and found["threads"][2].startswith("1 for each")
