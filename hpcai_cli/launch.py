"""Where am I: alone, or rank r of n, started by what; what starting several ranks needs."""

import importlib.util
import os
import re
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import elastic, hosts
from hpcai_cli.errors import MissingError, UsageError

TERMINAL_VARIABLE = "HPCAI_TERMINAL"
"""Path of the terminal on which rank 0 draws its progress when a launcher stands between the two."""
VERBOSE_VARIABLE = "HPCAI_VERBOSE"
"""Set by --verbose, for this process and for the ranks that it starts."""
STAGED_VARIABLE = "HPCAI_STAGED_FROM"
"""The dataset file of which --data is a copy that goes with the job; the run's folder names this one."""
ANNOUNCEMENT = "\x1dhpcai-rank"
"""Begins a line with rank, process id, host and number of ranks, which no person gets to see."""
STARTED_VARIABLE = "HPCAI_RANKS"
"""Set for the ranks that this program starts: they say on stderr who they are, and share the cores of their host."""


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    hosts: int = 1
    launcher: str = ""
    """The program that started this process as one of several; empty when it was started alone."""
    is_size_known: bool = True
    """PMIx tells the number of processes to its library alone; `size` is then the least that it can be."""


# Each launcher leaves rank, size, local rank, local size and the number of hosts in variables of its own. The order
# matters: horovodrun may itself run inside a Slurm job step, and Open MPI under Slurm sees both sets.
_VARIABLES = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE", "HOROVOD_CROSS_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_MCA_orte_num_nodes"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE",
     "SLURM_STEP_NUM_NODES"),
    # MPICH and Intel MPI, and what else speaks their process managers' language.
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""),
    ("mpirun of MVAPICH", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK",
     "MV2_COMM_WORLD_LOCAL_SIZE", ""),
)
VARIABLES = tuple(name for _, *names in _VARIABLES for name in names if name) + (
    "PMIX_RANK", "SLURM_NODEID", "HOROVOD_HOSTNAME", elastic.NAMES_VARIABLE)
"""All that `place` reads."""


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place from the variables that launchers set."""
    for launcher, *variables in _VARIABLES:
        rank, size, local_rank, local_size, count = (_first_number(environ.get(name, "")) for name in variables)
        if rank is not None and size is not None:
            if launcher == "srun":
                # Each node may have another number of tasks.
                each = hosts.per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
                node = _first_number(environ.get("SLURM_NODEID", "")) or 0
                local_size = each[node] if node < len(each) else local_size
            if found := elastic.local_place(environ):
                # To horovodrun each rank is alone on a host of its own.
                local_rank, local_size, count = *found, 1
            here = local_size or size
            return Place(rank, size, local_rank or 0, here, count or -(-size // here), launcher)
    rank = _first_number(environ.get("PMIX_RANK", ""))
    if rank is not None:
        return Place(rank, max(2, rank + 1), 0, 1, 1, "PMIx", is_size_known=False)
    return Place()


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables without those by which programs that are started with them would take part in a job.

    Outside of one, what the user has set for MPI or Horovod stays, but nothing of a Slurm allocation, in which mpirun
    would start processes on other hosts.
    """
    # What such a program starts has no rank to announce either.
    foreign = ("SLURM_", STARTED_VARIABLE)
    if place(environ).launcher:
        foreign += ("HOROVOD_", "OMPI_", "PMIX_", "PMI_", "MPI_LOCAL", "MV2_COMM_")
    return {name: value for name, value in environ.items() if not name.startswith(foreign)}


def is_elastic(environ: Mapping[str, str] = os.environ) -> bool:
    """Tell whether this process is a rank of a job that goes on without those that are lost."""
    return environ.get("HOROVOD_ELASTIC") == "1"


def leave() -> None:
    """Have this process, and whatever it starts, count as started alone."""
    for name in os.environ.keys() - without_launcher().keys():
        del os.environ[name]


def _first_number(text: str) -> int | None:
    # Slurm writes "4(x2)" for four tasks on each of two nodes.
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


def require_horovod(np: int) -> None:
    """Check that several processes can be started.

    Raises:
        MissingError: Horovod is not installed: n unconnected copies would train n models.
        UsageError: this process was itself started as one of several.
    """
    here = place()
    if here.size > 1:
        raise UsageError(f"{here.launcher} has started {here.size} processes already", expected="no --np",
                         mend=f"leave out --np {np}, or start `hpcai` without {here.launcher}", received=np)
    if missing_package("horovod") or not beside("horovodrun").exists():
        raise MissingError(f"--np {np} needs Horovod, which is not installed", expected="Horovod for several processes",
                           mend="run `hpcai doctor --build-horovod`", received=np)


def missing_package(name: str) -> bool:
    """Tell whether a package is missing, without loading it."""
    return importlib.util.find_spec(name) is None


def announce() -> None:
    """Tell the process that started this rank where it is, so that signals can be passed on to it."""
    if os.environ.get(STARTED_VARIABLE):
        here = place()
        print(f"{ANNOUNCEMENT} {here.rank} {os.getpid()} {socket.gethostname()} {here.size}", file=sys.stderr,
              flush=True)


def beside(program: str) -> Path:
    """Return a program of this environment, which need not be on PATH."""
    return Path(sys.executable).parent / program
