"""What `hpcai launch` has started from this folder: a folder below jobs/ for each, with its script and its log."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcai_cli import slurm
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.run import read_json, write_json

FOLDER = Path("jobs")
ACTIVE = ("pending", "running", "requeue", "suspended", "completing", "configuring")
"""How states begin of jobs that are not over."""


@dataclass(frozen=True)
class Job:
    """One job. Its files are script.sh, log.txt (log-TASK.txt of an array) and, when it is over, ended."""

    folder: Path
    kind: str
    """slurm or local."""
    number: str
    """Of Slurm, or the script's process id."""
    command: str
    submitted: float
    """Unix time."""
    began: str = ""
    """When the process of a local job was started, by the kernel's clock: another process may get its id later."""

    @classmethod
    def open(cls, name: str) -> "Job":
        """Return the job of that name, number or folder.

        Raises:
            UsageError: there is none.
        """
        known = everything()
        for job in known:
            if name in (job.folder.name, str(job.folder), f"{job.folder}/", job.number):
                return job
        raise UsageError("there is no such job here", received=name,
                         mend="run `hpcai launch status` where it was started",
                         expected=f"one of {', '.join(job.folder.name for job in known) or 'none yet'}")

    @property
    def logs(self) -> list[Path]:
        """The files with what it has printed, one for each task of an array."""
        return sorted(self.folder.glob("log*.txt"))

    def state(self, queued: str = "") -> str:
        """Say what became of it.

        Args:
            queued: what Slurm says of it.
        """
        codes = {path.name.partition("-")[2]: path.read_text().strip() for path in sorted(self.folder.glob("ended*"))}
        if self.kind == "local" and not codes:
            return "running" if self.began and self.began == _began(self.number) else "gone without an exit code"
        active = [state for state in queued.split(", ") if state.startswith(ACTIVE)]
        ends = sorted({_meaning(code) for code in codes.values()})
        others = [] if ends or active else [queued or "no longer known to Slurm"]
        return ", ".join([*active, *ends, *others])

    def cancel(self) -> None:
        """Ask it to save itself and end."""
        if self.kind == "slurm":
            slurm.cancel(self.number)
        elif self.state() == "running":
            os.kill(int(self.number), 15)


def new_folder(name: str) -> Path:
    """Make the next free folder jobs/NAME-1, jobs/NAME-2, ..."""
    FOLDER.mkdir(exist_ok=True)
    taken = [int(match[1]) for entry in FOLDER.iterdir()
             if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))]
    for number in range(max(taken, default=0) + 1, 1_000_000):
        try:
            (FOLDER / f"{name}-{number}").mkdir()
            return FOLDER / f"{name}-{number}"
        except FileExistsError:
            continue
    raise UsageError("there are too many jobs here", expected=f"fewer folders in {FOLDER}")


def keep(folder: Path, kind: str, number: str, command: Sequence[str], began: str = "") -> Job:
    """Write down what was started."""
    job = Job(folder, kind, number, " ".join(command), round(time.time(), 3), began)
    write_json(folder / "job.json", {"schema": "hpcai.job/1", **asdict(job)})
    return job


def start_here(folder: Path) -> tuple[str, str]:
    """Start the job's script in the background, which goes on when the terminal is closed.

    Returns:
        Its process id, and when it began.
    """
    # A shell between the two, so that the job is nobody's child when this program has ended.
    started = subprocess.run(["bash", "-c", 'bash "$0" < /dev/null >> "$1" 2>&1 & echo $!', folder / "script.sh",
                              folder / "log.txt"], capture_output=True, text=True, start_new_session=True)
    process = started.stdout.strip()
    return process, _began(process)


def everything() -> list[Job]:
    """Return all jobs that were started from this folder, the oldest first."""
    found = []
    for path in FOLDER.glob("*/job.json"):
        try:
            document = read_json(path)
            if document.pop("schema") == "hpcai.job/1":
                found.append(Job(**{**document, "folder": path.parent}))
        except (DataError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda job: job.submitted)


def _began(process: str) -> str:
    """Return when a process began, in the kernel's ticks; empty when there is none."""
    try:
        words = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if words[0] == "Z" else words[19]


def _meaning(code: str) -> str:
    meanings = {"0": "done", "75": "stopped, resumable"}
    return meanings.get(code, f"failed with exit code {code}")
