"""A real Slurm of one node on this machine, with ports, keys and folders of its own, stopped by process id."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


class Slurm:
    """A controller and a node, of as many processors as this machine has; two at least, so that two ranks fit."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder / "work"
        self._processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Slurm":
        for name in ("state", "spool", "work"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        ports = [_free_port(), _free_port()]
        host = socket.gethostname().split(".")[0]
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(
            f"ClusterName=hpcai\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser=root\nSlurmdUser=root\n"
            f"AuthType=auth/munge\nAuthInfo=socket={self.folder}/munge.socket,cred_expire=10\nCredType=cred/munge\n"
            f"SlurmctldPort={ports[0]}\nSlurmdPort={ports[1]}\nStateSaveLocation={self.folder}/state\n"
            f"SlurmdSpoolDir={self.folder}/spool\nSlurmctldPidFile={self.folder}/slurmctld.pid\n"
            f"SlurmdPidFile={self.folder}/slurmd.pid\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            "SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nJobAcctGatherType=jobacct_gather/none\n"
            "AccountingStorageType=accounting_storage/none\nMpiDefault=none\nReturnToService=2\nKillWait=20\n"
            "SchedulerParameters=sched_interval=2,bf_interval=2\nMinJobAge=600\nSwitchType=switch/none\n"
            f"NodeName={host} NodeAddr=127.0.0.1 CPUs={max(2, os.cpu_count() or 2)} State=UNKNOWN\n"
            f"PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n")
        # A job that is queued again starts when its credentials have expired, by default after two minutes.
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}",
                        f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munge.pid",
                        f"--log-file={self.folder}/munge.log", f"--seed-file={self.folder}/munge.seed")
            self.wait_for((self.folder / "munge.socket").exists, "munge")
            self._start("slurmctld", "-D", "-f", str(self.conf))
            self._start("slurmd", "-D", "-f", str(self.conf))
            self.wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T").stdout, "the node")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if self._processes[1:]:
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def run(self, *words: object) -> subprocess.CompletedProcess:
        """Run a command of a user of this Slurm to its end."""
        return subprocess.run([*map(str, words)], cwd=self.work, env=self.environment(), capture_output=True, text=True,
                              timeout=240)

    def hpcai(self, *words: object) -> subprocess.CompletedProcess:
        """Run hpcai to its end."""
        return self.run(HPCAI, *words)

    def environment(self) -> dict[str, str]:
        """Return the variables of a user."""
        # Open MPI refuses root, also where srun starts the ranks.
        return {**os.environ, "SLURM_CONF": str(self.conf), "HPCAI_CACHE": str(self.folder / "cache"),
                "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}

    def wait_for(self, holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} is not there after {seconds} s: {self.said()}")
            time.sleep(0.2)

    def said(self) -> str:
        """Return the ends of the logs."""
        return "\n".join(f"{path.name}: {path.read_text(errors='replace')[-1500:]}"
                         for path in [*self.folder.glob("*.log"), *self.work.glob("jobs/*/log*")])

    def _start(self, program: str, *words: str) -> None:
        with (self.folder / f"{program}.log").open("w") as log:
            self._processes.append(subprocess.Popen(
                [shutil.which(program), *words], env=self.environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(autouse=True)
def no_job_is_left(slurm) -> Iterator[None]:
    """End what a test has left behind: the next one's jobs would wait for it."""
    yield
    slurm.run("scancel", "--full", "--signal=KILL", "--user=root")
    slurm.run("scancel", "--user=root")
    slurm.wait_for(lambda: not slurm.run("squeue", "--noheader").stdout.strip(), "an empty queue")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory, tiny_recipe) -> Iterator[Slurm]:
    """A Slurm, and a folder with a recipe and its data file."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.fail(f"a Slurm of one's own takes root, and {', '.join(missing) or 'nothing else'}")
    with Slurm(tmp_path_factory.mktemp("slurm")) as started:
        (started.work / "tiny.py").write_text(tiny_recipe)
        written = started.hpcai("preprocess", "./tiny.py", "--source", "sample", "--output", "tiny.h5")
        assert written.returncode == 0, written.stderr
        yield started
