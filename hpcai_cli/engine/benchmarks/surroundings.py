"""What a measurement depends on beside what is measured: the machine, the versions, and what else went on meanwhile."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from hpcai_cli.engine import machine

PACKAGES = ("hpcai", "tensorflow", "keras", "horovod", "numpy", "h5py", "onnxruntime", "ai-edge-litert")
OTHERS_LIMIT = 0.05
"""Share of the cores' time that other processes may take before a run counts as disturbed."""
STOLEN_LIMIT = 0.01
"""The same of what the hypervisor keeps from this machine."""
_LAUNCHERS = {"mpirun", "mpiexec", "orterun", "prterun", "horovodrun", "srun"}
DRIFT_LIMIT = 0.1
"""By which a fixed piece of work may take longer or shorter at the end than at the beginning."""


def this_machine() -> dict:
    """Return what must be the same for two results to be compared."""
    return {"host": platform.node(), "processor": _processor(), "cores": machine.cores(),
            # Kernels keep some of it for themselves, not always the same.
            "memory_gb": round(machine.memory_bytes()[0] / 1e9), "instruction_sets": machine.instruction_sets(),
            "gpus": machine.gpus(), "system": platform.system(), "python": platform.python_version()}


def versions() -> dict[str, str | None]:
    """Return the versions of the packages that results depend on, None for those that are not installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


class Watch:
    """Looks at the machine before and after a measurement."""

    def __init__(self):
        self.before = state()
        self._cpu, self._own, self._started = _cpu_seconds(), _job_seconds(), time.monotonic()

    def own_seconds(self) -> float:
        """Return the processor's seconds that this job has taken since the beginning, with all of its processes."""
        return _job_seconds() - self._own

    def finish(self) -> tuple[dict, list[str]]:
        """Return the state afterwards, and in words each thing that disturbed the measurement."""
        seconds, cores = time.monotonic() - self._started, os.cpu_count() or 1
        busy, stolen = (now - then for now, then in zip(_cpu_seconds(), self._cpu, strict=True))
        own, after = self.own_seconds(), state()
        # The kernel counts in hundredths of a second.
        others = max(0.0, busy - own - 0.02 * cores) / max(seconds * cores, 1e-9)
        after |= {"others": round(others, 4), "stolen": round(stolen / max(seconds * cores, 1e-9), 4)}
        said = []
        if others > OTHERS_LIMIT:
            said.append(f"other processes took {others:.0%} of the cores' time")
        if after["stolen"] > STOLEN_LIMIT:
            said.append(f"the hypervisor kept back {after['stolen']:.0%} of the cores' time")
        change = after["fixed_work_ms"] / self.before["fixed_work_ms"] - 1
        if abs(change) > DRIFT_LIMIT:
            said.append(f"a fixed piece of work took {abs(change):.0%} {'longer' if change > 0 else 'less'} at the end "
                        "than at the beginning")
        for name in ("governor", "throttled"):
            if self.before[name] != after[name]:
                said.append(f"the processor's {name} changed from {self.before[name]} to {after[name]}")
        return after, said


def state() -> dict:
    """Return load, free memory, the processor's speed where it can be read, and how long a fixed piece of work takes.

    `fixed_work_ms` is the median of some products of two matrices of 256 x 256 on one core.
    """
    folder = Path("/sys/devices/system/cpu/cpu0")
    frequency = _read(folder / "cpufreq/scaling_cur_freq")
    throttled = _read(folder / "thermal_throttle/core_throttle_count")
    return {"load": list(os.getloadavg()), "free_memory_gb": round(machine.memory_bytes()[1] / 1e9, 2),
            "governor": _read(folder / "cpufreq/scaling_governor"),
            "frequency_mhz": int(frequency) / 1000 if frequency else None,
            "throttled": int(throttled) if throttled else None, "fixed_work_ms": _fixed_work()}


def _fixed_work() -> float:
    # Not a BLAS call, which may take all cores, and so would tell of what else runs on them.
    values = np.random.default_rng(0).normal(size=(256, 256))
    spent = []
    for _ in range(15):
        started = time.perf_counter()
        np.einsum("ij,jk->ik", values, values, optimize=False)
        spent.append(1000 * (time.perf_counter() - started))
    return statistics.median(spent)


def _cpu_seconds() -> tuple[float, float]:
    """Return the seconds that all cores together have worked, and those that the hypervisor kept from them."""
    words = (_read(Path("/proc/stat")) or "cpu").splitlines()[0].split()[1:]
    if len(words) < 8:
        return 0.0, 0.0
    user, nice, system, _, _, hard, soft, stolen = (int(word) / os.sysconf("SC_CLK_TCK") for word in words[:8])
    return user + nice + system + hard + soft, stolen


def _job_seconds() -> float:
    """Return the seconds of all processes of this job: what the launcher started, or this process has.

    Of those that have ended the system knows what those who waited for them have noted.
    """
    processes = {}
    for folder in Path("/proc").glob("[0-9]*"):
        # Its name, in parentheses, may hold anything.
        name, _, rest = (_read(folder / "stat") or "").partition(") ")
        if words := rest.split():
            processes[int(folder.name)] = int(words[1]), name.split("(", 1)[-1], sum(map(int, words[11:15]))
    root = here = os.getpid()
    while here in processes:
        if processes[here][1] in _LAUNCHERS:
            root = here
        here = processes[here][0]
    waiting, ticks = [root], 0
    while waiting:
        parent = waiting.pop()
        ticks += processes[parent][2] if parent in processes else 0
        waiting += [number for number, (above, _, _) in processes.items() if above == parent]
    return ticks / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def command() -> str:
    """Return the command line that began this process, as a shell takes it."""
    import shlex

    return shlex.join(["hpcai" if number == 0 else word for number, word in enumerate(sys.argv)])


def peak_memory_mb() -> float:
    """Return the largest resident memory that this process has had."""
    lines = (_read(Path("/proc/self/status")) or "").splitlines()
    # The kernel's ru_maxrss would be that of the process which started this one.
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6
