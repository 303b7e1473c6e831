"""What the doctor makes of what a process of its own has loaded, beside programs that say who they are."""

import pytest

from hpcai_cli.engine.environment import software
from hpcai_cli.engine.environment.toolchain import mpi_named

HOROVOD = {"value": {"Gloo": True, "MPI": True, "NCCL": False}}
GPU = 'case "$1" in *name*) echo H200; echo H200;; *) echo 570.1;; esac'


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Return a function that makes these the only programs on PATH: names and the shell's words."""
    def make(**texts: str) -> None:
        for name, text in texts.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
    return make


def probed(**found) -> dict[str, dict]:
    nothing = {name: {"error": "none"} for name in ("hdf5", "tensorflow", "keras", "mpi", "cuda")}
    return {**nothing, "horovod": HOROVOD, **{name: {"value": value} for name, value in found.items()}}


@pytest.mark.parametrize(("text", "name"), [
    ("mpirun (Open MPI) 4.1.4\n", "openmpi4.1.4"), ("Open MPI v5.0.3, package: x", "openmpi5.0.3"),
    ("HYDRA build details:\n    Version:   4.0.2", "mpich4.0.2"), ("MPICH Version:      4.2.1\n", "mpich4.2.1"),
    ("Intel(R) MPI Library for Linux* OS, Version 2021.5 Build", "intelmpi2021.5"), ("", ""), ("1.2", "")])
def test_an_mpi_is_known_by_its_words(text, name):
    assert mpi_named(text) == name


@pytest.mark.parametrize(("library", "status", "words"), [
    ("Open MPI v4.1.4, package", "ok", "openmpi4.1.4, mpirun and the library of Horovod"),
    ("Open MPI v5.0.1, package", "warning", "Horovod loads openmpi5.0.1 from /opt/mpi/libmpi.so"),
    ("MPICH Version: 4.0.2", "missing", "mpirun is openmpi4.1.4, and Horovod loads mpich4.0.2")])
def test_an_mpirun_of_another_make_than_horovod_s(programs, library, status, words):
    programs(mpirun="echo 'mpirun (Open MPI) 4.1.4'")
    finding = software._mpi(probed(mpi={"path": "/opt/mpi/libmpi.so", "version": library}))
    assert finding.status == status and words in finding.value
    assert ("first on PATH" in finding.mend) == (status != "ok")


@pytest.mark.parametrize(("words", "status", "value"), [
    ({}, "ok", "not here"), ({"srun": "exit 1"}, "ok", "no cluster answers"),
    ({"srun": 'case "$1" in --version) echo slurm 22.05.8;; *) echo none pmix_v4;; esac'}, "ok",
     "slurm 22.05.8, with PMIx"),
    ({"srun": 'case "$1" in --version) echo slurm 22.05.8;; *) echo none pmi2;; esac'}, "warning", "without PMIx")])
def test_a_slurm_and_whether_it_starts_ranks(programs, words, status, value):
    programs(**words)
    finding = software._slurm()
    assert finding.status == status and value in finding.value


def test_no_gpu_needs_neither_cuda_nor_nccl(programs):
    programs()
    found = probed(cuda={"cuda": "12.5.1", "cudnn": "9", "gpus": 0})
    assert software._cuda(found).status == software._nccl(found).status == "ok"
    assert "none needed" in software._cuda(found).value and "CUDA 12.5.1 and cuDNN 9" in software._cuda(found).value


@pytest.mark.parametrize(("seen", "variable", "status", "mend"), [
    (2, None, "ok", ""), (1, "0", "ok", ""), (0, "-1", "warning", "unset CUDA_VISIBLE_DEVICES"),
    (0, None, "warning", "pip install 'tensorflow[and-cuda]")])
def test_gpus_that_tensorflow_does_not_see(programs, monkeypatch, seen, variable, status, mend):
    programs(nvidia_smi=GPU)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    finding = software._cuda(probed(cuda={"cuda": "12.5.1", "cudnn": "9", "gpus": seen}))
    assert finding.status == status and f"sees {seen} of 2 GPUs; driver 570.1" in finding.value
    assert finding.mend.startswith(mend)


def test_gpus_want_nccl_in_horovod(programs):
    programs(nvidia_smi=GPU)
    finding = software._nccl(probed())
    assert finding.status == "warning" and finding.mend == "hpcai doctor --build-horovod --with-nccl"
    assert software._nccl(probed(horovod={"NCCL": True})).status == "ok"
