"""What this machine has: cores, memory, instruction sets, GPUs."""

import itertools
import os
import platform
import shutil
import subprocess
from pathlib import Path

from hpcai_cli.engine.cgroup import Groups


def cores() -> int:
    """Return how many cores this process may use: its affinity, and the container's quota where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Groups().cores()
    return count if quota is None else min(count, max(1, int(quota)))


def share(local_size: int) -> int:
    """Return how many cores, and so threads, each of so many ranks of this host gets."""
    return max(1, cores() // local_size)


def memory_bytes() -> tuple[int, int]:
    """Return total and available memory; a container's or a job's own limit counts as total. Zeros where unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    limit, left = Groups().memory() or (total, available)
    return min(total, limit), min(total, limit, available, left)


def instruction_sets() -> str:
    """Name the instruction sets that make mixed_bfloat16 pay."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16") if flag in flags]
    return f"{platform.machine()} with {', '.join(found)}" if found else f"{platform.machine()}, no bfloat16 units"


def gpus() -> list[str]:
    """Return the names of the GPUs that the driver shows."""
    names = first_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    return [line.strip() for line in names.splitlines() if line.strip()]


def usable_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    return visible_gpus(len(gpus()), os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible_gpus(count: int, given: str | None) -> list[str]:
    """Return those of `count` GPUs that CUDA_VISIBLE_DEVICES names: numbers, or the driver's own names; None names all.

    As CUDA does, it ends before the first that is none.
    """
    every = list(map(str, range(count)))
    if given is None or not every:
        return every
    words = [word.strip() for word in given.split(",")]
    return list(itertools.takewhile(lambda word: word in every or word.startswith(("GPU-", "MIG-")), words))


def first_output(command: list[str]) -> str:
    """Return what a short command prints, empty when it cannot be run or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
