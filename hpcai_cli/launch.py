"""Where am I: alone, or rank r of n, started by what; what starting several ranks needs."""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.errors import MissingError, UsageError

TERMINAL_VARIABLE = "HPCAI_TERMINAL"
"""Path of the terminal on which rank 0 draws its progress when a launcher stands between the two."""
VERBOSE_VARIABLE = "HPCAI_VERBOSE"
"""Set by --verbose, for this process and for the ranks that it starts."""
REGISTER_VARIABLE = "HPCAI_RANKS"
"""Folder in which the ranks that rank_processes.py started leave their process ids."""


@dataclass(frozen=True)
class Place:
    """This process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = ""
    """The program that started this process as one of several; empty when it was started alone."""


# Each launcher leaves rank, size, local rank and local size in variables of its own. The order matters: horovodrun may
# itself run inside a Slurm job step, and Open MPI under Slurm sees both sets.
_VARIABLES = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
     "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("mpiexec", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def place(environ: Mapping[str, str] = os.environ) -> Place:
    """Read this process's place from the variables that launchers set."""
    for launcher, *variables in _VARIABLES:
        rank, size, local_rank, local_size = (_first_number(environ.get(name, "")) for name in variables)
        if rank is not None and size is not None:
            return Place(rank, size, local_rank or 0, local_size or size, launcher)
    return Place()


def without_launcher(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables without those by which programs that are started with them would take part in a job.

    Outside of one, what the user has set for MPI or Horovod stays, but nothing of a Slurm allocation, in which mpirun
    would start processes on other hosts.
    """
    foreign = ("SLURM_", "HOROVOD_", "OMPI_", "PMIX_", "PMI_", "MPI_LOCAL") if place(environ).launcher else ("SLURM_",)
    return {name: value for name, value in environ.items() if not name.startswith(foreign)}


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


def register() -> None:
    """Leave this rank's process id where the process that started it finds it, to pass signals on."""
    folder = os.environ.get(REGISTER_VARIABLE)
    if folder:
        Path(folder, str(place().rank)).write_text(str(os.getpid()))


def beside(program: str) -> Path:
    """Return a program of this environment, which need not be on PATH."""
    return Path(sys.executable).parent / program
