"""Counters of energy that this machine has: the processors' (RAPL) and the GPUs' (NVML)."""

import ctypes
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from hpcai_cli.engine import machine

POWERCAP = Path("/sys/class/powercap")
"""Where Linux shows the counters of Intel's and AMD's processors, both under names that begin with `intel-rapl`."""
NVML = "libnvidia-ml.so.1"
"""NVIDIA's library for the management of its GPUs; it comes with the driver."""


class Counter:
    """Energy that something has taken since its counter began, which starts again from 0 when it is full.

    Args:
        name: what it counts.
        read: returns the counter's value.
        unit: joules in one step of the counter.
        full: largest value of the counter; None for one that never gets there.

    Raises:
        OSError: it cannot be read.
    """

    def __init__(self, name: str, read: Callable[[], int], *, unit: float, full: int | None = None):
        self.name, self._read, self._unit, self._full = name, read, unit, full
        self._last, self._counted = read(), 0

    def update(self) -> None:
        """Take in what was counted since the last time; between two calls it may begin again once.

        Raises:
            OSError: it cannot be read, or has lost its count.
        """
        now = self._read()
        if now < self._last and self._full is None:
            raise OSError(f"the counter of {self.name} went back")
        self._counted += now - self._last + (self._full if now < self._last else 0)
        self._last = now

    @property
    def joules(self) -> float:
        """Return the joules between the first reading and the last."""
        return self._counted * self._unit


def processors(root: Path = POWERCAP) -> list[Counter]:
    """Return the counters of all processors and of their memory.

    A package holds its cores and its graphics unit, whose own counters are therefore left out, as is the whole
    platform's (`psys`), which holds the packages. Memory (`dram`) stands beside its package. Where a package shows its
    counter in two ways (`intel-rapl-mmio`), one of them counts.

    Raises:
        OSError: there are none, or they cannot be read; the error says why.
    """
    found = {}
    for folder in sorted(root.glob("*:*"), key=lambda folder: ("mmio" in folder.name, folder.name)):
        name = _read_name(folder)
        if name == "dram":
            name = f"dram of {_read_name(folder.with_name(folder.name.rpartition(':')[0])) or folder.name}"
        if name.startswith(("package", "dram")) and name not in found:
            found[name] = folder
    if not found:
        raise OSError(f"the processor shows no energy counters in {root}, as in most virtual machines")
    return [_processor_counter(name, folder) for name, folder in found.items()]


def _read_name(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return ""


def _processor_counter(name: str, folder: Path) -> Counter:
    file = folder / "energy_uj"
    try:
        full = int((folder / "max_energy_range_uj").read_text())
        return Counter(name, lambda: int(file.read_text()), unit=1e-6, full=full)
    except PermissionError:
        raise OSError(f"only root may read {file}; `sudo chmod a+r {folder.parent}/*/energy_uj` changes that until "
                      "the next start of the machine") from None
    except (OSError, ValueError) as error:
        raise OSError(f"cannot read the counter {file}: {error}") from None


def gpus(library: str = NVML, environ: Mapping[str, str] = os.environ) -> list[Counter]:
    """Return the counters of the NVIDIA GPUs that a job may use here by CUDA_VISIBLE_DEVICES, none without a driver.

    Raises:
        OSError: there are GPUs, but their energy cannot be read; the error says why.
    """
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return []
    count = ctypes.c_uint()
    _check(nvml, nvml.nvmlInit_v2())
    _check(nvml, nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
    names = machine.visible_gpus(count.value, environ.get("CUDA_VISIBLE_DEVICES"))
    # Which number a name of the driver's own belongs to is not known: all are counted rather than none.
    numbers = map(int, names) if all(map(str.isdigit, names)) else range(count.value)
    return [_gpu_counter(nvml, number) for number in numbers]


def _gpu_counter(nvml: ctypes.CDLL, number: int) -> Counter:
    device, value = ctypes.c_void_p(), ctypes.c_ulonglong()
    _check(nvml, nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(number), ctypes.byref(device)))

    def read() -> int:
        _check(nvml, nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(value)))
        return value.value

    # Millijoules since the driver was loaded: 64 bits of them are never full.
    return Counter(f"GPU {number}", read, unit=1e-3)


def _check(nvml: ctypes.CDLL, code: int) -> None:
    if code != 0:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise OSError(f"NVML answers: {(nvml.nvmlErrorString(code) or b'unknown').decode(errors='replace')}")
