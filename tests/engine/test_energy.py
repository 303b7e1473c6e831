"""Joules from the processors' counters, the GPUs' and a power meter's file, each a real tree, library or file here."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine import energy, energy_sources, power_file
from hpcai_cli.errors import DataError

FULL = 262_143_328_850
"""Where the counter of a server's package begins again, in microjoules."""
NO_GPU = "libno-such-nvml.so"


class Powercap:
    """A folder as Linux shows it, of zones by name and value."""

    def __init__(self, root: Path):
        self.root = root

    def zone(self, folder: str, name: str, microjoules: int = 1_000, full: int = FULL) -> None:
        (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / folder / "name").write_text(f"{name}\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{full}\n")
        self.set(folder, microjoules)

    def set(self, folder: str, microjoules: int) -> None:
        # A reader beside this one never finds it empty.
        new = self.root / "new"
        new.write_text(f"{microjoules}\n")
        new.replace(self.root / folder / "energy_uj")


@pytest.fixture
def powercap(tmp_path) -> Powercap:
    """A server of two packages with memory, cores, the whole platform, and one package shown twice."""
    tree = Powercap(tmp_path / "powercap")
    (tree.root / "intel-rapl").mkdir(parents=True)
    tree.zone("intel-rapl:0", "package-0")
    tree.zone("intel-rapl:0:0", "core")
    tree.zone("intel-rapl:0:1", "dram")
    tree.zone("intel-rapl:1", "package-1")
    tree.zone("intel-rapl:1:0", "dram")
    tree.zone("intel-rapl:2", "psys")
    tree.zone("intel-rapl-mmio:0", "package-0")
    return tree


def meter(powercap: Powercap, **settings) -> energy.Meter:
    return energy.Meter(powercap=powercap.root, nvml=NO_GPU, **settings)


# ---- The processors' counters --------------------------------------------------------------------------------------

def test_packages_and_memory_are_summed_and_nothing_counts_twice(powercap):
    measured = meter(powercap)
    measured.start()
    grown = {"intel-rapl:0": 5, "intel-rapl:0:0": 100, "intel-rapl:0:1": 2, "intel-rapl:1": 7, "intel-rapl:1:0": 1,
             "intel-rapl:2": 1000, "intel-rapl-mmio:0": 5}
    for folder, joules in grown.items():
        powercap.set(folder, 1_000 + joules * 1_000_000)
    found = measured.finish()
    assert found["parts"] == pytest.approx(
        {"package-0": 5, "package-1": 7, "dram of package-0": 2, "dram of package-1": 1})
    assert found["joules"] == pytest.approx(15)
    assert found["source"].startswith("RAPL (package-0, ") and found["reason"] is None
    assert found["seconds"] >= 0
    assert energy.words(found).startswith("15.0000 J, by RAPL (")


def test_a_counter_that_was_full_goes_on(tmp_path):
    tree = Powercap(tmp_path)
    tree.zone("intel-rapl:0", "package-0", FULL - 2_000_000)
    measured = meter(tree)
    measured.start()
    tree.set("intel-rapl:0", 3_000_000)
    assert measured.finish()["joules"] == pytest.approx(5)


def test_a_long_run_reads_between_so_that_no_round_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "READ_SECONDS", 0.01)
    tree = Powercap(tmp_path)
    tree.zone("intel-rapl:0", "package-0", 0, full=10_000_000)
    measured = meter(tree)
    measured.start()
    (counter,) = measured._measurement._counters["RAPL"]
    # Up to 9, over the end to 5, to 9, over the end to 1.
    for value, joules in ((9_000_000, 9), (5_000_000, 15), (9_000_000, 19), (1_000_000, 21)):
        tree.set("intel-rapl:0", value)
        until = time.monotonic() + 30
        while counter.joules < joules - 1e-6 and time.monotonic() < until:
            time.sleep(0.01)
    assert measured.finish()["joules"] == pytest.approx(21)


def test_what_lies_between_two_marks(powercap):
    measured = meter(powercap)
    measured.start()
    for folder in ("intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1", "intel-rapl:1:0"):
        powercap.set(folder, 1_001_000)
    first = measured.mark()
    powercap.set("intel-rapl:0", 4_001_000)
    second = measured.mark()
    powercap.set("intel-rapl:1:0", 9_001_000)
    assert measured.finish()["joules"] == pytest.approx(15)
    assert measured.between(first, second) == pytest.approx(3)


def test_without_counters_nothing_is_known_of_a_part_either(tmp_path):
    measured = energy.Meter(powercap=tmp_path, nvml=NO_GPU)
    measured.start()
    span = measured.mark(), measured.mark()
    reason = measured.finish()["reason"]
    with pytest.raises(OSError) as raised:
        measured.between(*span)
    assert str(raised.value) == reason


def test_amd_shows_packages_without_memory(tmp_path):
    tree = Powercap(tmp_path)
    tree.zone("intel-rapl:0", "package-0", 0, full=65_532_610_987)
    tree.zone("intel-rapl:0:0", "core", 0)
    measured = meter(tree)
    measured.start()
    tree.set("intel-rapl:0", 4_000_000)
    found = measured.finish()
    assert (found["joules"], found["source"]) == (pytest.approx(4), "RAPL (package-0)")


def unreadable(tree: Powercap) -> None:
    (tree.root / "intel-rapl:0/energy_uj").write_text("none\n")


def vanishing(tree: Powercap) -> None:
    shutil.rmtree(tree.root / "intel-rapl:0")


def nothing(tree: Powercap) -> None:
    pass


@pytest.mark.parametrize(("before", "meanwhile", "said"), [
    (vanishing, nothing, "as in most virtual machines"),
    (unreadable, nothing, "cannot read the counter"),
    (nothing, nothing, "stands still"),
    (nothing, vanishing, "energy_uj"),
    (nothing, unreadable, "none"),
])
def test_what_cannot_be_read_is_no_figure_but_a_reason(tmp_path, before, meanwhile, said):
    tree = Powercap(tmp_path)
    tree.zone("intel-rapl:0", "package-0")
    before(tree)
    measured = meter(tree)
    measured.start()
    meanwhile(tree)
    found = measured.finish()
    assert found["joules"] is None and found["source"] is None and found["parts"] == {}
    assert said in found["reason"]
    assert energy.words(found) == f"not measurable here: {found['reason']}"


def test_a_counter_for_root_alone_says_how_to_open_it():
    # Root may read everything, so that the reader has to be somebody else, who does not get into tmp_path.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        tree = Powercap(Path(folder))
        tree.zone("intel-rapl:0", "package-0")
        (tree.root / "intel-rapl:0/energy_uj").chmod(0o400 if os.getuid() == 0 else 0)
        script = ("import os, sys; from pathlib import Path; from hpcai_cli.engine import energy_sources\n"
                  "if os.getuid() == 0: os.seteuid(65534)\n"
                  "try: energy_sources.processors(Path(sys.argv[1]))\nexcept OSError as error: print(error)")
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, timeout=60)
    assert "only root may read" in done.stdout and "sudo chmod a+r" in done.stdout, done.stderr


# ---- The GPUs' counters --------------------------------------------------------------------------------------------

LIBRARY = """
static unsigned long long energy[2] = {1000, 5000};
int nvmlInit_v2(void) { return INIT; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &energy[index]; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *value) {
    unsigned long long *mine = device;
    *value = *mine;
    *mine += device == &energy[0] ? 2000 : 500;
    return READ;
}
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : "Driver Not Loaded"; }
"""
"""What NVIDIA's library declares; each reading finds GPU 0 two joules and GPU 1 half a joule further."""


def library(folder: Path, *, init: int = 0, read: int = 0) -> str:
    if not shutil.which("cc"):
        pytest.skip("there is no C compiler")
    (folder / "nvml.c").write_text(LIBRARY)
    path = folder / f"libnvml-{init}-{read}.so"
    subprocess.run(["cc", "-shared", "-fPIC", f"-DINIT={init}", f"-DREAD={read}", "-o", path, folder / "nvml.c"],
                   check=True, timeout=60)
    return str(path)


@pytest.mark.parametrize(("visible", "joules"), [(None, {0: 2, 1: 0.5}), ("1", {1: 0.5}), ("0,1", {0: 2, 1: 0.5}),
                                                 ("-1", {}), ("", {}), ("GPU-1a2b", {0: 2, 1: 0.5})])
def test_the_gpus_that_the_job_may_use_are_counted(tmp_path, visible, joules):
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    counters = energy_sources.gpus(library(tmp_path), environ)
    for counter in counters:
        counter.update()
    assert {counter.name: counter.joules for counter in counters} == pytest.approx(
        {f"GPU {number}": value for number, value in joules.items()})


def test_a_gpu_without_a_counter_is_said_beside_what_was_read(tmp_path):
    tree = Powercap(tmp_path / "powercap")
    tree.zone("intel-rapl:0", "package-0", 0)
    measured = energy.Meter(powercap=tree.root, nvml=library(tmp_path, read=3))
    measured.start()
    tree.set("intel-rapl:0", 8_000_000)
    found = measured.finish()
    assert found["joules"] == pytest.approx(8)
    assert found["reason"] == "without NVML: NVML answers: Not Supported"
    assert energy.words(found).endswith("by RAPL (package-0); without NVML: NVML answers: Not Supported")


def test_gpus_count_where_the_processor_does_not(tmp_path):
    measured = energy.Meter(powercap=tmp_path, nvml=library(tmp_path))
    measured.start()
    found = measured.finish()
    assert found["parts"] == pytest.approx({"GPU 0": 2, "GPU 1": 0.5}) and found["joules"] == pytest.approx(2.5)
    assert found["source"] == "NVML (GPU 0, GPU 1)"
    assert found["reason"].startswith("without RAPL: the processor shows no energy counters")


def test_a_driver_that_is_not_loaded_is_a_reason(tmp_path):
    with pytest.raises(OSError, match="Driver Not Loaded"):
        energy_sources.gpus(library(tmp_path, init=9), {})


# ---- A power meter's file ------------------------------------------------------------------------------------------

def reading(tmp_path: Path, before: str, meanwhile: str) -> power_file.PowerFile:
    path = tmp_path / "watts.txt"
    path.write_text(before)
    file = power_file.PowerFile(path)
    file.begin()
    with path.open("a") as stream:
        stream.write(meanwhile)
    return file


def test_the_area_below_the_readings_between_two_times(tmp_path):
    # 100 W at second 1, rising by 10 W each second: from 2.5 to 5.5 the mean is at 4, 130 W.
    file = reading(tmp_path, "# second watts\n1 100\n2 110\n\n", "3 120\n4 130\n5 140\n6 150\n7 9")
    assert file.joules(2.5, 5.5) == pytest.approx(3 * 130)


def test_readings_without_times_count_from_the_start_of_the_run(tmp_path):
    file = reading(tmp_path, "900\n90", "0\n100\n102\n104\n10")
    # The line that was begun before the start belongs to neither side, and the last is not yet whole.
    assert file.joules(1000.0, 1010.0) == pytest.approx(10 * 102)


def test_the_ends_reach_as_far_as_the_readings_lie_apart(tmp_path):
    file = reading(tmp_path, "", "".join(f"{second} 50\n" for second in range(10, 20)))
    assert file.joules(9.0, 20.0) == pytest.approx(11 * 50)
    with pytest.raises(OSError, match=r"no reading for 8.5 of 20.0 seconds"):
        file.joules(0.0, 20.0)


def test_readings_that_come_late_now_and_then_are_readings(tmp_path):
    seconds = [second / 10 for second in range(1000) if second % 100 > 9]
    file = reading(tmp_path, "", "".join(f"{second} 30\n" for second in seconds))
    assert file.joules(0.9, 99.8) == pytest.approx(98.9 * 30)
    with pytest.raises(OSError, match="no reading for 1.1 of 4.0"):
        file.joules(8.0, 12.0)


def test_a_large_file_is_read_from_its_end(tmp_path):
    before = "".join(f"{second} 70\n" for second in range(100_000))
    file = reading(tmp_path, before, "".join(f"{second} 80\n" for second in range(100_000, 100_010)))
    assert file.joules(100_001.0, 100_009.0) == pytest.approx(8 * 80)


@pytest.mark.parametrize(("meanwhile", "said"), [
    ("", "holds 0 readings"),
    ("5 100\n", "holds 1 readings"),
    ("100\n", "got 1 readings"),
    ("5 100\n6 -1\n", "neither"),
    ("5 100\n6 nan\n", "neither"),
    ("5 100\n6 1 2\n", "neither"),
    ("time,watts\n5 100\n", "'time,watts'"),
    ("5 100\n100\n", "mixes"),
    ("5 100\n4 100\n", "go back"),
    ("1 100\n2 100\n3 100\n9 100\n10 100\n", "no reading for 6.0"),
    ("5000 100\n6000 100\n7000 100\n", "no reading for"),
])
def test_readings_that_do_not_tell_are_a_reason(tmp_path, meanwhile, said):
    with pytest.raises(OSError, match=said):
        reading(tmp_path, "", meanwhile).joules(1.0, 10.0)


def test_of_a_part_only_readings_with_times_tell(tmp_path):
    assert reading(tmp_path, "", "1 100\n2 100\n3 200\n4 200\n").joules(1.0, 2.0, part=True) == pytest.approx(100)
    file = reading(tmp_path, "", "100\n200\n")
    assert file.joules(1.0, 3.0) == pytest.approx(300)
    with pytest.raises(OSError, match="no times, so that nothing can be said of a part"):
        file.joules(1.0, 2.0, part=True)


def test_a_file_that_became_shorter_is_a_reason(tmp_path):
    file = reading(tmp_path, "1 100\n2 100\n", "")
    file.path.write_text("3 100\n")
    with pytest.raises(OSError, match="shorter"):
        file.joules(1.0, 3.0)


@pytest.mark.parametrize("name", ["none.txt", "."])
def test_a_file_that_is_none_is_said_before_the_start(tmp_path, name):
    with pytest.raises(DataError, match="unix_seconds watts"):
        energy.Meter(tmp_path / name)


def test_a_file_that_grows_while_something_runs(power_meter):
    measured = energy.Meter(power_meter)
    measured.start()
    time.sleep(0.6)
    found = measured.finish()
    assert found["joules"] == pytest.approx(200 * found["seconds"], rel=0.05), found["reason"]
    assert found["source"] == f"power meter ({power_meter})"


# ---- A job of several hosts ----------------------------------------------------------------------------------------

class Ranks:
    """What two hosts of two ranks each look like from one rank; the others' rows are those given."""

    def __init__(self, rank: int, others: bytes):
        self.rank, self.local_rank, self.size, self._others = rank, rank % 2, 4, others

    def gather(self, rows):
        return np.concatenate([rows, np.frombuffer(self._others, np.uint8)])


def test_every_host_counts_once_and_one_without_a_figure_leaves_no_sum(powercap):
    sources = {"powercap": powercap.root, "nvml": NO_GPU}
    other = {"host": "other", "joules": 10.0, "seconds": 5.0, "source": "RAPL (package-0)", "parts": {}, "reason": None}
    for others, expected in ((other, 30.0), (other | {"joules": None, "reason": "no counters"}, None)):
        job = energy.JobMeter(Ranks(0, json.dumps(others).encode() + b"\n"), **sources)
        job.start()
        for folder in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:1", "intel-rapl:1:0"):
            before = int((powercap.root / folder / "energy_uj").read_text())
            powercap.set(folder, before + 5_000_000)
        found = job.finish(samples=100)
        assert found["joules"] == (None if expected is None else pytest.approx(expected))
        assert found["joules_per_sample"] == (None if expected is None else pytest.approx(expected / 100))
        assert [host["host"] for host in found["hosts"]][1] == "other"
    assert found["reason"] == "other: no counters"
    quiet = energy.JobMeter(Ranks(1, json.dumps(other).encode() + b"\n"), **sources)
    quiet.start()
    assert len(quiet.finish(samples=1)["hosts"]) == 1
