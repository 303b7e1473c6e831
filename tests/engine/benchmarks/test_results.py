"""What a run keeps: the energy of a sample beside that of the whole run."""

import time

import pytest

from hpcai_cli.engine.benchmarks import measure, results, surroundings
from hpcai_cli.engine.energy import Meter

NO_GPU = "libno-such-nvml.so"


@pytest.fixture
def zone(tmp_path):
    """A processor's counter, as Linux shows it."""
    folder = tmp_path / "powercap/intel-rapl:0"
    folder.mkdir(parents=True)
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text("262143328850\n")
    (folder / "energy_uj").write_text("0\n")
    return folder


def kept(tmp_path, meter: Meter, candidates: dict) -> dict:
    """Return what is kept of a benchmark whose first candidate works on 40 samples a round."""
    run = results.Results(tmp_path / "result", "made-up", surroundings.Watch(), meter)
    found = measure.interleaved(3, **candidates)
    run.add(measure.median("made-up", "rate", found["ours"], "samples/s"))
    run.add(found.work("made-up", "ours", "ours", 40))
    return run.finish(complete=True)


def test_the_energy_of_a_sample_is_that_of_its_own_rounds(tmp_path, zone):
    spent = 0

    def spending(joules: int):
        def work() -> float:
            nonlocal spent
            spent += joules
            (zone / "new").write_text(f"{spent * 1_000_000}\n")
            (zone / "new").replace(zone / "energy_uj")
            return 1.0
        return work

    document = kept(tmp_path, Meter(powercap=zone.parent, nvml=NO_GPU), {"ours": spending(20), "theirs": spending(700)})
    assert document["energy"]["joules"] == pytest.approx(3 * 720)
    figure = document["figures"][-1]
    assert figure["name"] == "ours: energy of a sample" and figure["unit"] == "J/sample" and figure["less_is_better"]
    assert figure["rounds"] == pytest.approx([0.5] * 3)
    assert measure.mark() == pytest.approx(time.time(), abs=5), "the clock is the system's again"


def test_a_power_meter_tells_it_too(tmp_path, power_meter):
    document = kept(tmp_path, Meter(power_meter), {"ours": lambda: time.sleep(0.4) or 1.0})
    assert document["figures"][-1]["value"] == pytest.approx(200 * 0.4 / 40, rel=0.1), document["energy"]


def test_where_only_the_whole_is_known_it_says_so(tmp_path):
    path = tmp_path / "watts.txt"
    path.write_text("")

    def work() -> float:
        with path.open("a") as stream:
            stream.write("100\n200\n")
        return 1.0

    document = kept(tmp_path, Meter(path), {"ours": work})
    assert document["energy"]["joules"] > 0 and len(document["figures"]) == 1
    assert "of a sample: the readings in" in document["energy"]["reason"]


def test_where_nothing_is_known_there_is_no_figure(tmp_path):
    document = kept(tmp_path, Meter(powercap=tmp_path, nvml=NO_GPU), {"ours": lambda: 1.0})
    assert document["energy"]["joules"] is None and len(document["figures"]) == 1
