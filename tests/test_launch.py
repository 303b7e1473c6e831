"""What each launcher's variables say about this process's place."""

import os
import socket

import pytest

from hpcai_cli import launch
from hpcai_cli.launch import Place, place

SLURM_STEP = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4",
              "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}
SBATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_TASKS_PER_NODE": "2(x2)",
                 "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
HOROVODRUN = {"HOROVOD_RANK": "2", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "0", "HOROVOD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(("variables", "where"), [
    ({}, Place(0, 1, 0, 1, 1, "")),
    (HOROVODRUN, Place(2, 4, 0, 2, 2, "horovodrun")),
    ({**HOROVODRUN, "HOROVOD_CROSS_SIZE": "3"}, Place(2, 4, 0, 2, 3, "horovodrun")),
    (OPEN_MPI, Place(5, 8, 1, 4, 2, "mpirun")),
    ({**OPEN_MPI, "OMPI_MCA_orte_num_nodes": "5"}, Place(5, 8, 1, 4, 5, "mpirun")),
    (SLURM_STEP, Place(3, 4, 1, 2, 2, "srun")),
    ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "4"}, Place(3, 4, 1, 4, 1, "srun")),
    ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_STEP_NUM_NODES": "2"}, Place(3, 4, 1, 1, 2, "srun")),
    ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"}, Place(3, 4, 1, 3, 2, "srun")),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Place(1, 2, 0, 2, 1, "mpiexec")),
    ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
     Place(3, 4, 1, 2, 2, "mpiexec")),
    ({"MV2_COMM_WORLD_RANK": "1", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1",
      "MV2_COMM_WORLD_LOCAL_SIZE": "2"}, Place(1, 4, 1, 2, 2, "mpirun of MVAPICH")),
    ({"PMIX_RANK": "0"}, Place(0, 2, 0, 1, 1, "PMIx", False)),
    ({"PMIX_RANK": "5"}, Place(5, 6, 0, 1, 1, "PMIx", False)),
    ({**OPEN_MPI, "PMIX_RANK": "5"}, Place(5, 8, 1, 4, 2, "mpirun")),
    ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, Place(0, 1, 0, 1, 1, "srun"))])
def test_each_launcher(variables, where):
    assert place(variables) == where


def test_a_submitted_script_without_srun_is_alone():
    assert place(SBATCH_SCRIPT) == Place()


@pytest.mark.parametrize(("outer", "inner", "launcher"), [
    (SLURM_STEP, HOROVODRUN, "horovodrun"), (SLURM_STEP, OPEN_MPI, "mpirun"), (SBATCH_SCRIPT, HOROVODRUN, "horovodrun"),
    (OPEN_MPI, HOROVODRUN, "horovodrun")])
def test_the_innermost_launcher_counts(outer, inner, launcher):
    assert place({**outer, **inner}).launcher == launcher
    assert place({**inner, **outer}) == place(inner)


@pytest.mark.parametrize("variables", [HOROVODRUN, OPEN_MPI, SLURM_STEP, {
    "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}])
def test_what_a_rank_starts_need_be_no_rank(variables, monkeypatch):
    left = launch.without_launcher({**variables, "PATH": "/bin", "OMPI_MCA_btl": "self"})
    assert left == {"PATH": "/bin"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place().launcher
    launch.leave()
    assert place() == Place() and not variables.keys() & os.environ.keys()


def test_outside_of_a_job_the_users_settings_stay():
    given = {"OMPI_MCA_btl": "self", "HOROVOD_CYCLE_TIME": "2", "SLURM_JOB_ID": "7"}
    assert launch.without_launcher(given) == {"OMPI_MCA_btl": "self", "HOROVOD_CYCLE_TIME": "2"}


@pytest.mark.parametrize("garbage", ["", "x", "-1", " ", "None"])
def test_garbage_is_no_place(garbage):
    assert place({"HOROVOD_RANK": garbage, "HOROVOD_SIZE": "4"}) == Place()
    assert place({"HOROVOD_RANK": "0", "HOROVOD_SIZE": garbage}) == Place()
    assert place({**OPEN_MPI, "HOROVOD_RANK": garbage}).launcher == "mpirun"


@pytest.mark.parametrize("half", ["HOROVOD_RANK", "HOROVOD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK",
                                  "MV2_COMM_WORLD_RANK"])
def test_half_of_the_variables_is_no_place(half):
    assert place({half: "1"}) == Place()


def test_garbage_about_the_host_takes_all_ranks_to_be_here():
    assert place({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "?"}) == Place(1, 2, 0, 2, 1, "mpiexec")


def test_one_of_several_refuses_to_start_several(hpcai, monkeypatch):
    for name, value in SLURM_STEP.items():
        monkeypatch.setenv(name, value)
    done = hpcai("train", "mnist", "--np", 2)
    assert done.exit_code == 2
    assert done.stderr == ("[rank 3] error: srun has started 4 processes already; expected no --np; leave out --np 2, "
                           "or start `hpcai` without srun; received: 2\n")


def test_several_processes_need_horovod(hpcai, monkeypatch):
    # Horovod may be installed here: only its absence is played.
    monkeypatch.setattr(launch, "missing_package", lambda name: True)
    done = hpcai("train", "mnist", "--np", 2)
    assert done.exit_code == 4
    assert "--np 2 needs Horovod" in done.stderr and "run `hpcai doctor --build-horovod`" in done.stderr


@pytest.mark.parametrize("np", ["0", "-1", "two"])
def test_a_number_of_processes_that_is_none(hpcai, np):
    assert hpcai("train", "mnist", "--np", np).exit_code == 2


def test_a_rank_that_this_program_started_says_where_it_is(monkeypatch, capsys):
    monkeypatch.setenv("HOROVOD_RANK", "3")
    monkeypatch.setenv("HOROVOD_SIZE", "4")
    launch.announce()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("HPCAI_RANKS", "1")
    launch.announce()
    assert capsys.readouterr().err == f"\x1dhpcai-rank 3 {os.getpid()} {socket.gethostname()} 4\n"
