"""hpcai benchmark allreduce: what is checked before the start, and real ranks on small sizes."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.collective import allreduce, fusion

HPCAI = str(Path(sys.executable).parent / "hpcai")

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")


def figures_of(document: dict) -> dict[str, dict]:
    return {figure["name"]: figure for figure in document["figures"]}


# ---- What is checked before anything starts ------------------------------------------------------------------------

@needs_horovod
@pytest.mark.parametrize("words, code, said", [
    (["--operation", "mean"], 2, "there is no such operation"),
    (["--sizes", "4,6"], 2, "a multiple of 4"),
    (["--sizes", "4,,8"], 2, "cannot measure such a size"),
    (["--sizes", "5GB"], 2, "up to 4 GB"),
    (["--largest", "-4"], 2, "cannot measure such a size"),
    (["--sizes", "4", "--largest", "8"], 2, "expected one of them"),
    (["--tune", "--sizes", "4"], 2, "--tune measures the gradients of mnist"),
    (["--np", "1"], 2, "--np"),
    (["--np", "1000"], 2, "more than this host can bear"),
])
def test_what_cannot_be_is_said_before_the_start(hpcai, words, code, said):
    done = hpcai("benchmark", "allreduce", *words)
    assert done.exit_code == code and said in done.stderr
    assert not Path("benchmarks").exists()


@needs_horovod
def test_buffers_past_the_memory_are_refused_and_by_default_left_out(monkeypatch, capsys):
    monkeypatch.setattr(machine, "memory_bytes", lambda: (4 << 30, 3 << 30))
    with pytest.raises(allreduce.MissingError, match=r"2 ranks with buffers of 256 MB need 6\.0 GB of memory.*3\.2 GB"):
        allreduce.chosen_sizes("4,256MB", None, 2)
    assert allreduce.chosen_sizes(None, None, 2)[-1] == 64 << 20
    assert "sizes above 64 MB are left out" in capsys.readouterr().err


def test_sizes_are_powers_of_4_or_those_that_are_listed(monkeypatch):
    monkeypatch.setattr(machine, "memory_bytes", lambda: (1 << 40, 1 << 40))
    assert allreduce.chosen_sizes(None, None, 2) == [4**power for power in range(1, 15)]
    assert allreduce.chosen_sizes(None, "1KB", 2) == [4, 16, 64, 256, 1024]
    assert allreduce.chosen_sizes("1M, 64KiB,4", None, 2) == [4, 65536, 1048576]


@needs_horovod
def test_more_ranks_than_cores_are_measured_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(machine, "cores", lambda: 1)
    assert allreduce.check_ranks(None) == 2
    assert "2 ranks share 1 core:" in capsys.readouterr().err


@needs_horovod
def test_under_a_launcher_neither_one_rank_nor_np(hpcai, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    alone = hpcai("benchmark", "allreduce")
    assert alone.exit_code == 2 and "mpirun has started one rank" in alone.stderr
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    twice = hpcai("benchmark", "allreduce", "--np", "2")
    assert twice.exit_code == 2 and "mpirun has started 2 processes already" in twice.stderr
    tuned = hpcai("benchmark", "allreduce", "--tune")
    assert tuned.exit_code == 2 and "run it without mpirun" in tuned.stderr


# ---- Real ranks ----------------------------------------------------------------------------------------------------

@needs_horovod
@pytest.mark.long
def test_alone_it_starts_ranks_over_each_transport(hpcai, monkeypatch):
    for name, value in {"PASSES": 1, "ROUNDS": 2}.items():
        monkeypatch.setattr(allreduce, name, value)
    done = hpcai("benchmark", "allreduce", "--sizes", "4,64KB", "--output", "here", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    figures, transports = figures_of(document), [row[1] for row in document["tables"][0]["rows"][:2]]
    assert "Gloo" in transports and "NCCL is left out" in done.stderr
    for transport in set(transports):
        time = figures[f"allreduce of 64 KB, 2 ranks, {transport}"]
        bandwidth = figures[f"allreduce of 64 KB, 2 ranks, {transport}: bus bandwidth"]
        # Of two ranks, allreduce's bus bandwidth is size / time; by rounds, of which there are two.
        assert [65.536 / microseconds for microseconds in time["rounds"]] == pytest.approx(bandwidth["rounds"])
        assert len(time["rounds"]) == 2 and figures[f"allreduce of 4 B, 2 ranks, {transport}"]["value"] > 0
        adapter = figures[f"our adapter against the raw call, 13.8 MB of gradients, 2 ranks, {transport}"]
        assert adapter["limit"] == 0.97 and adapter["value"] > 0
    assert {path.suffix for path in Path("here").iterdir()} == {".json", ".csv", ".png"}


@pytest.mark.long
@needs_horovod
@needs_mpirun
def test_under_mpirun_the_ranks_measure_and_verify_every_operation(tmp_path):
    done = subprocess.run(
        ["mpirun", "--allow-run-as-root", "-np", "2", "--bind-to", "none", "--oversubscribe", HPCAI, "benchmark",
         "allreduce", "--operation", "all", "--sizes", "12", "--output", tmp_path / "here", "--json"],
        capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    times = [name for name, figure in figures_of(json.loads(line)).items() if figure["unit"] == "us"]
    # Operations that deal out parts take the next size of which two ranks have equal parts.
    assert times == ["allreduce of 12 B, 2 ranks, MPI", "broadcast of 12 B, 2 ranks, MPI",
                     "allgather of 16 B, 2 ranks, MPI", "reduce-scatter of 16 B, 2 ranks, MPI",
                     "all-to-all of 16 B, 2 ranks, MPI"]


@needs_horovod
@pytest.mark.long
def test_tune_starts_ranks_with_each_setting_and_names_the_best(hpcai, monkeypatch):
    setting = {"HOROVOD_FUSION_THRESHOLD": "0", "HOROVOD_CYCLE_TIME": "20"}
    monkeypatch.setattr(fusion, "_settings", lambda total: {fusion.AS_STARTED: {}, f"of {total} bytes": setting})
    for name, value in {"PASSES": 1, "ROUNDS": 3}.items():
        monkeypatch.setattr(fusion, name, value)
    done = hpcai("benchmark", "allreduce", "--tune", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    (table,) = document["tables"]
    # 35,546 parameters, moving statistics among them.
    assert [row[0] for row in table["rows"]] == [fusion.AS_STARTED, "of 142184 bytes"]
    assert table["rows"][1][4:] == ["0", "20"]
    assert len(figures_of(document)) == 3 and "fusion threshold and cycle time:" in done.stderr
