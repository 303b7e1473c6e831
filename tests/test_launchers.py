"""What is to start the ranks: chosen, checked, and written as a command line."""

import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli import launch, launchers
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.hosts import Host
from hpcai_cli.launchers import Ranks

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
TWO = (Host("203.0.113.1", 2), Host("198.51.100.2", 2))
"""Addresses of no host (RFC 5737), in two networks, so that no interface leads to both directly."""


def program(folder: Path, name: str, text: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Return a function that puts programs on PATH, alone, and lets Horovod be linked with Open MPI or not."""
    def make(*names: str, open_mpi: bool = True) -> None:
        (tmp_path / "bin").mkdir()
        for name in names:
            program(tmp_path / "bin", name, "echo 'MPI plugin types are... pmix_v4 none'")
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setattr(launch, "require_horovod", lambda np: None)
        monkeypatch.setattr(launchers, "_linked_with_open_mpi", lambda: open_mpi)
    return make


# ---- What starts them ----------------------------------------------------------------------------------------------

def test_one_process_needs_nothing():
    assert launchers.chosen(None) is None and launchers.chosen(1) is None


@pytest.mark.parametrize("given", [{"launcher": "mpirun"}, {"interface": "eth0"}, {"options": ("-v",)}])
def test_one_process_has_no_launcher(given):
    with pytest.raises(UsageError, match="a single process needs no launcher"):
        launchers.chosen(None, **given)


@pytest.mark.parametrize(("programs", "open_mpi", "launcher"), [
    (["mpirun"], True, "mpirun"), (["mpirun"], False, "horovodrun"), ([], True, "horovodrun"),
    (["mpirun", "srun"], True, "mpirun")])
def test_the_launcher_of_this_host(built, programs, open_mpi, launcher):
    built(*programs, open_mpi=open_mpi)
    assert launchers.chosen(2) == Ranks(2, launcher)


@pytest.mark.parametrize(("programs", "open_mpi", "found"), [
    (["mpirun", "srun"], True, Ranks(4, "srun")),
    (["mpirun"], True, Ranks(4, "mpirun", (Host("n1", 2), Host("n2", 2)))),
    (["srun"], False, Ranks(4, "horovodrun", (Host("n1", 2), Host("n2", 2))))])
def test_the_launcher_in_a_job_of_slurm(built, monkeypatch, programs, open_mpi, found):
    built(*programs, open_mpi=open_mpi)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    assert launchers.chosen(4) == found


def test_more_ranks_than_slurm_has_tasks_are_started_otherwise(built, monkeypatch):
    built("mpirun", "srun")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1")
    assert launchers.chosen(2) == Ranks(2, "mpirun")


@pytest.mark.parametrize(("launcher", "programs", "open_mpi", "message"), [
    ("mpirun", [], True, "mpirun, which is not on PATH"), ("srun", [], True, "srun, which is not on PATH"),
    ("mpirun", ["mpirun"], False, "--build-horovod --with-mpi"), ("srun", ["srun"], False, "--with-mpi")])
def test_a_launcher_that_cannot_work(built, launcher, programs, open_mpi, message):
    built(*programs, open_mpi=open_mpi)
    with pytest.raises(MissingError, match=message):
        launchers.chosen(2, launcher=launcher)


def test_a_slurm_without_pmix(built, tmp_path):
    built("srun")
    program(tmp_path / "bin", "srun", "echo none pmi2")
    with pytest.raises(MissingError, match="starts no Open MPI ranks.*--launcher mpirun"):
        launchers.chosen(2, launcher="srun")


def test_a_launcher_that_there_is_not():
    with pytest.raises(UsageError, match="auto, horovodrun, mpirun, srun; received: 'ssh'"):
        launchers.chosen(2, launcher="ssh")


# ---- Hosts ---------------------------------------------------------------------------------------------------------

def test_hosts_say_how_many_ranks_there_are(built):
    built("mpirun")
    assert launchers.chosen(None, named=TWO) == Ranks(4, "mpirun", TWO)
    assert launchers.chosen(3, named=TWO) == Ranks(3, "mpirun", TWO)
    with pytest.raises(UsageError, match="the hosts take 4 ranks.*received: 5"):
        launchers.chosen(5, named=TWO)


def test_hosts_that_are_all_this_one_are_no_hosts(built):
    built("mpirun")
    assert launchers.chosen(None, named=(Host("localhost", 3),)) == Ranks(3, "mpirun")
    assert launchers.chosen(None, named=(Host("localhost"), Host("203.0.113.1"))).other_hosts == ["203.0.113.1"]


def test_a_smaller_job_takes_the_first_hosts():
    job = Ranks(4, "mpirun", TWO)
    assert [job.first(np).hosts for np in (1, 2, 3, 4)] == [TWO[:1], TWO[:1], TWO, TWO]
    assert Ranks(4, "mpirun").first(2) == Ranks(2, "mpirun")


def test_an_interface_that_leads_nowhere(built):
    built("mpirun")
    with pytest.raises(MissingError, match="no such network interface.*lo"):
        launchers.chosen(2, interface="eth77")
    with pytest.raises(UsageError, match="leads to no other host"):
        launchers.chosen(None, named=TWO, interface="lo")
    assert launchers.chosen(2, interface="lo").interface == "lo"


# ---- Command lines -------------------------------------------------------------------------------------------------

def test_the_command_line_of_mpirun_on_this_host(built):
    assert Ranks(2, "mpirun").words() == ["mpirun", "-np", "2", "--bind-to", "none", "--tag-output", "--oversubscribe"]


def test_the_command_line_of_mpirun_on_hosts(built, monkeypatch, tmp_path):
    built("mpirun")
    monkeypatch.setenv("HPCAI_CACHE", "c")
    monkeypatch.setenv("SECRET", "s")
    words = Ranks(4, "mpirun", TWO, "eth0", ("--report-bindings",)).words()
    assert words[0] == str(tmp_path / "bin" / "mpirun")
    assert words[words.index("--host") + 1] == "203.0.113.1:2,198.51.100.2:2"
    forwarded = [words[place + 1] for place, word in enumerate(words) if word == "-x"]
    assert {"PATH", "HPCAI_CACHE", "HPCAI_RANKS", "HOROVOD_GLOO_IFACE"} <= set(forwarded) and "SECRET" not in forwarded
    assert words[-7:] == ["--mca", "btl_tcp_if_include", "eth0", "--mca", "oob_tcp_if_include", "eth0",
                          "--report-bindings"]


def test_the_command_line_of_horovodrun():
    assert Ranks(2, "horovodrun").words()[1:] == ["-np", "2", "--gloo", "--disable-cache", "--network-interfaces", "lo"]
    assert Ranks(4, "horovodrun", TWO).words()[1:] == [
        "-np", "4", "--gloo", "--disable-cache", "-H", "203.0.113.1:2,198.51.100.2:2", "--start-timeout", "30"]
    assert Ranks(4, "horovodrun", TWO, "eth0").words()[-2:] == ["--network-interfaces", "eth0"]


def test_the_command_line_of_srun():
    words = Ranks(4, "srun", options=("--exclusive",)).words()
    assert words[:4] == ["srun", "--mpi=pmix", "--ntasks", "4"] and words[-1] == "--exclusive"
    assert Ranks(4, "srun", TWO).words()[-2:] == ["--nodelist", "203.0.113.1,198.51.100.2"]


@pytest.mark.parametrize(("library", "is_linked"), [
    (b"\x7fELF libmpi.so.40\0", True), (b"\x7fELF libmpi.so.12\0", False), (b"\x7fELF", False), (b"", False)])
def test_open_mpi_is_found_in_horovod_s_library(tmp_path, monkeypatch, library, is_linked):
    folder = tmp_path / "horovod" / "tensorflow"
    folder.mkdir(parents=True)
    (tmp_path / "horovod" / "__init__.py").touch()
    (folder / "mpi_lib.cpython-311-x86_64-linux-gnu.so").write_bytes(library)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    script = "from hpcai_cli import launchers; print(launchers._linked_with_open_mpi())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.strip() == str(is_linked)


# ---- The commands --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "message"), [
    (["--hosts", "a:0"], "cannot read --hosts"), (["--hosts", "a", "--hostfile", "f"], "both name hosts"),
    (["--np", "2", "--launcher", "ssh"], "no such launcher"), (["--launcher", "mpirun"], "needs no launcher"),
    (["--np", "2", "--launcher-options", "'"], "cannot read --launcher-options")])
@pytest.mark.parametrize("command", [["train", "mnist"], ["benchmark", "scaling", "--data", "tiny.h5"]])
def test_what_cannot_be_is_said_before_anything_else(hpcai, tmp_path, command, words, message, monkeypatch):
    if command[0] == "benchmark":
        monkeypatch.setattr("hpcai_cli.commands.benchmark._dataset", Path)
    done = hpcai(*command, *words)
    assert done.exit_code == 2 and message in done.stderr and not list(Path.cwd().iterdir())


def test_a_hostfile_that_is_not_there(hpcai):
    done = hpcai("train", "mnist", "--hostfile", "none")
    assert done.exit_code == 3 and "cannot read the hostfile" in done.stderr


@needs_horovod
def test_a_host_that_nobody_knows(hpcai):
    done = hpcai("evaluate", "run", "--hosts", f"{socket.gethostname()}:1,no-such-host.invalid:1")
    assert done.exit_code == 3, "the run is looked for first"
    Path("run").mkdir()
    done = hpcai("evaluate", "run", "--hosts", f"{socket.gethostname()}:1,no-such-host.invalid:1")
    assert done.exit_code == 4
    assert "no-such-host.invalid has no address" in done.stderr or "ssh, which is not on PATH" in done.stderr
