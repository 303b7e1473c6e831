"""The command lines that start several ranks: by mpirun, horovodrun or srun, here or on several hosts."""

import dataclasses
import functools
import importlib.util
import mmap
import os
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import hosts, launch
from hpcai_cli.elastic import Elastic
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.hosts import Host

NAMES = ("auto", "horovodrun", "mpirun", "srun")
START_SECONDS = 30
"""Within which the hosts have to answer and the ranks to find each other."""

# What ranks on other hosts get of the environment; horovodrun and srun forward all of it.
_FORWARDED = ("HPCAI_", "HOROVOD_", "TF_", "KERAS_", "XLA_", "OMP_", "MKL_", "NCCL_", "CUDA_", "PYTHON", "UCX_",
              "HDF5_", "PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "CONDA_PREFIX", "TMPDIR", "LANG", "LC_")


@dataclass(frozen=True)
class Ranks:
    """Processes of one command: how many, where, and what starts them."""

    np: int
    launcher: str
    """horovodrun, mpirun or srun; empty for a single process, which needs none."""
    hosts: tuple[Host, ...] = ()
    """Other machines too; empty when all ranks are on this one, or where srun finds the nodes itself."""
    interface: str = ""
    """The network interface that they talk over; empty for the one that leads to the hosts."""
    options: tuple[str, ...] = ()
    """Words for the launcher itself."""
    elastic: Elastic | None = None
    """How the job goes on without ranks that are lost; horovodrun alone knows how."""

    def words(self) -> list[str]:
        """Return the command line that starts them, behind which the command is to be written."""
        words = {"mpirun": self._mpirun, "srun": self._srun, "horovodrun": self._horovodrun, "": list}[self.launcher]()
        return [*map(str, words), *self.options]

    def environment(self) -> dict[str, str]:
        """Return the variables that the launcher and its ranks get beside ours."""
        # Open MPI refuses root, and says so only when it starts; in a container there is nobody else.
        found = {launch.STARTED_VARIABLE: "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if self.interface:
            found |= {"HOROVOD_GLOO_IFACE": self.interface, "NCCL_SOCKET_IFNAME": self.interface}
        if self.elastic:
            found |= self.elastic.environment(self.np, self.hosts)
        return found

    @functools.cached_property
    def way(self) -> tuple[str, str]:
        """The interface and the network by which the ranks find each other, empty for the launcher's choice.

        Left to themselves, Open MPI also takes interfaces that lead nowhere, those of containers for one, and hangs;
        horovodrun gives up.
        """
        if self.interface:
            return self.interface, self.interface
        return hosts.common_interface(self.other_hosts) if self.hosts else ("lo", "")

    @functools.cached_property
    def other_hosts(self) -> list[str]:
        """Names of the hosts that are not this one."""
        return [host.name for host in self.hosts if not hosts.is_here(host.name)]

    def first(self, np: int) -> "Ranks":
        """Return a job of fewer ranks, on as many of the first hosts as it needs."""
        places, left = [], np
        for host in self.hosts:
            if left > 0:
                places.append(host)
                left -= host.slots
        return dataclasses.replace(self, np=np, hosts=tuple(places))

    def _mpirun(self) -> list[object]:
        # Not bound: each rank chooses its own cores. More ranks than cores are the user's to ask for.
        found = ["mpirun", "-np", self.np, "--bind-to", "none", "--tag-output"]
        if not self.hosts:
            found.append("--oversubscribe")
        else:
            # By its path, so that mpirun looks for its helper at the same place there.
            found[0] = shutil.which("mpirun")
            found += ["--host", ",".join(map(str, self.hosts)), "--map-by", "slot", "--wdir", os.getcwd()]
            for name in sorted({**os.environ, **self.environment()}):
                if name.startswith(_FORWARDED):
                    found += ["-x", name]
        if self.way[1]:
            for layer in ("btl", "oob"):
                found += ["--mca", f"{layer}_tcp_if_include", self.way[1]]
        return found

    def _horovodrun(self) -> list[object]:
        found = [launch.beside("horovodrun"), "-np", self.np, "--gloo", "--disable-cache"]
        if self.elastic:
            found += self.elastic.words(self.np, self.hosts)
        elif self.hosts:
            found += ["-H", ",".join(map(str, self.hosts))]
        if self.hosts:
            found += ["--start-timeout", START_SECONDS]
        return [*found, "--network-interfaces", self.way[0]] if self.way[0] else found

    def _srun(self) -> list[object]:
        found = ["srun", "--mpi=pmix", "--ntasks", self.np, "--label", "--unbuffered", "--kill-on-bad-exit=1",
                 "--cpu-bind=none"]
        if self.hosts:
            found += ["--nodelist", ",".join(host.name for host in self.hosts)]
        return found


def chosen(np: int | None, *, named: tuple[Host, ...] = (), launcher: str = "auto", interface: str = "",
           options: tuple[str, ...] = ()) -> Ranks | None:
    """Settle what starts the ranks, and check what can be checked on this host.

    Args:
        np: how many; None for all that the named hosts take, or one.
        named: the hosts; those of the batch system's allotment where none are named and it has more than one.

    Returns:
        None when this process alone does the work.

    Raises:
        UsageError: what was asked for contradicts itself, or this process is itself one of several.
        MissingError: Horovod, the launcher or the interface is missing.
    """
    if launcher not in NAMES:
        raise UsageError("there is no such launcher", expected=f"one of {', '.join(NAMES)}", received=launcher)
    count = np or sum(host.slots for host in named) or 1
    if count == 1 and not named:
        if launcher != "auto" or interface or options:
            raise UsageError("a single process needs no launcher", expected="--np N or --hosts with it")
        return None
    launch.require_horovod(count)
    allotment = () if named else hosts.allotted()
    places = named or (allotment if len(allotment) > 1 else ())
    if named and count > sum(host.slots for host in named):
        raise UsageError(f"the hosts take {sum(host.slots for host in named)} ranks", expected="at most so many",
                         mend="write the number behind each host, as in --hosts a:4,b:4", received=count)
    if named and all(hosts.is_here(host.name) for host in named):
        places = ()
    launcher = _launcher(launcher, count, allotment)
    if interface:
        _check_interface(interface, several=bool(places))
    if launcher == "srun" and not named:
        # It takes the nodes of its job by itself.
        places = ()
    return Ranks(count, launcher, places, interface, options)


def local(np: int, launcher: str = "auto") -> Ranks:
    """Return ranks on this host; `auto` is mpirun where Horovod was built with Open MPI, else horovodrun."""
    return Ranks(np, ("mpirun" if has_open_mpi() else "horovodrun") if launcher == "auto" else launcher)


def has_open_mpi() -> bool:
    """Tell whether Horovod is linked with Open MPI and mpirun is there, without loading either."""
    return bool(shutil.which("mpirun")) and _linked_with_open_mpi()


def srun_speaks_pmix() -> bool:
    """Tell whether the Slurm of this host lets Open MPI's ranks find each other."""
    if not shutil.which("srun"):
        return False
    try:
        listed = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, errors="replace",
                                timeout=START_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return "pmix" in listed.stdout + listed.stderr


@functools.cache
def _linked_with_open_mpi() -> bool:
    package = importlib.util.find_spec("horovod")
    libraries = Path(package.origin).parent.glob("tensorflow/mpi_lib*.so") if package else ()
    for library in libraries:
        if library.stat().st_size:
            with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                # MPICH's library is libmpi.so.12, Open MPI's libmpi.so.40.
                if content.find(b"libmpi.so.40") >= 0:
                    return True
    return False


def _launcher(asked: str, count: int, allotment: tuple[Host, ...]) -> str:
    """Return what starts the ranks.

    Raises:
        MissingError: what was asked for is not there, or Horovod was not built for it.
    """
    if asked == "auto":
        if sum(host.slots for host in allotment) >= count and _linked_with_open_mpi() and srun_speaks_pmix():
            return "srun"
        return "mpirun" if has_open_mpi() else "horovodrun"
    if asked == "horovodrun":
        return asked
    if not shutil.which(asked):
        raise MissingError(f"--launcher {asked} needs {asked}, which is not on PATH", expected="the program",
                           mend="install Open MPI" if asked == "mpirun" else "run it where Slurm is, or leave it out")
    if not _linked_with_open_mpi():
        raise MissingError(f"ranks that {asked} starts find each other by MPI, which Horovod was not built with",
                           expected="Horovod built with Open MPI", mend="run `hpcai doctor --build-horovod --with-mpi`")
    if asked == "srun" and not srun_speaks_pmix():
        raise MissingError("this Slurm starts no Open MPI ranks", expected="pmix in `srun --mpi=list`",
                           mend="use --launcher mpirun")
    return asked


def _check_interface(name: str, *, several: bool) -> None:
    present = [interface for _, interface in socket.if_nameindex()]
    if name not in present:
        raise MissingError("this host has no such network interface", expected=f"one of {', '.join(present)}",
                           received=name)
    if several and name == "lo":
        raise UsageError("the interface lo leads to no other host", received=name,
                         expected=f"one of {', '.join(each for each in present if each != 'lo')}")
