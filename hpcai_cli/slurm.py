"""A command of hpcai as a job of Slurm: the script, handing it in, and what became of it."""

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hpcai_cli.errors import HpcaiError, MissingError, UsageError
from hpcai_cli.job_script import CONTAINER

_PLAIN = re.compile(r"[\w.,:+/@%=-]+", re.ASCII)
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}", re.ASCII)
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", re.ASCII)
_SECONDS = 60


@dataclass(frozen=True)
class Resources:
    """What a job asks Slurm for; what is 0 or empty is left to Slurm."""

    nodes: int = 1
    tasks_per_node: int = 1
    """Ranks of each node."""
    cpus_per_task: int = 0
    gpus_per_task: int = 0
    time: str = ""
    partition: str = ""
    account: str = ""
    array: str = ""
    signal_before: int = 120
    """Seconds before the limit at which the job saves itself; 0 for no signal."""
    requeue: bool = True
    """Whether a job that has saved itself at its limit is queued again, and goes on."""
    stage: str = ""
    """A folder on each node's own disk, to which the dataset file is copied first."""
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    """Lines of shell that come before the command."""
    container: str = ""
    launcher: str = "auto"
    options: tuple[str, ...] = ()
    """Further options of sbatch."""

    def check(self) -> None:
        """Raise a UsageError for what Slurm would not understand."""
        for name, pattern, expected in (("time", _TIME, "minutes, HH:MM:SS or D-HH:MM:SS"),
                                        ("array", _ARRAY, "indices such as 1-8 or 0-31%4"),
                                        ("partition", _PLAIN, "a name"), ("account", _PLAIN, "a name")):
            value = getattr(self, name)
            if value and not pattern.fullmatch(value):
                raise UsageError(f"Slurm takes no such {name}", expected=expected, received=value)
        for option in self.options:
            if not option.startswith("-") or "\n" in option:
                raise UsageError("no option of sbatch", expected="an option such as --qos=long", received=option)
        for name in self.modules:
            if not _PLAIN.fullmatch(name) or name.startswith("-"):
                raise UsageError("no name of a module", expected="a name such as cuda/12.4", received=name)

    def header(self, name: str, log: str) -> list[str]:
        """Return the lines for sbatch."""
        found = {"job-name": name, "output": log, "open-mode": "append", "nodes": self.nodes,
                 "ntasks-per-node": self.tasks_per_node, "cpus-per-task": self.cpus_per_task,
                 "gpus-per-task": self.gpus_per_task, "time": self.time, "partition": self.partition,
                 "account": self.account, "array": self.array}
        lines = [f"#SBATCH --{option}={value}" for option, value in found.items() if value]
        if self.signal_before:
            # To the script alone, which passes it on: a signal to each rank would end the launcher in between.
            lines.append(f"#SBATCH --signal=B:USR1@{self.signal_before}")
        lines.append(f"#SBATCH --{'requeue' if self.requeue else 'no-requeue'}")
        return [*lines, *(f"#SBATCH {option}" for option in self.options)]

    def before(self) -> list[str]:
        """Return the lines of shell that come before the command."""
        found = [f"module load {shlex.quote(name)}" for name in self.modules] + list(self.setup)
        # Since Slurm 22.05 a step does not inherit it.
        return [*found, 'export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"']

    def program(self) -> list[str]:
        """Return the words that start ranks in a container; none where hpcai starts them itself."""
        if not self.container:
            return []
        nvidia = ["--nv"] if self.gpus_per_task else []
        return ["srun", "--mpi=pmix", "--kill-on-bad-exit=1", "--cpu-bind=none", CONTAINER, "exec", *nvidia,
                self.container]

    @property
    def tasks(self) -> int:
        """Ranks of the job."""
        return self.nodes * self.tasks_per_node


def submit(script: str) -> str:
    """Hand a job script in, and return the job's number.

    Raises:
        MissingError: there is no Slurm here.
        UsageError: Slurm refuses it.
    """
    done = _run(["sbatch", "--parsable"], stdin=script)
    number = done.stdout.strip().split(";")[0]
    if done.returncode != 0 or not number.isdecimal():
        words = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()] or ["nothing"]
        # The first line says what is wrong, the next ones that it was not submitted and where help is.
        raise UsageError("Slurm does not take the job", mend="look at it with --dry-run", received=words[0])
    return number


def states(numbers: Iterable[str]) -> dict[str, str]:
    """Return the state of each job that Slurm still knows, in its words and lower case: pending (Priority), running.

    Of a job array it is the states of its tasks, each once.
    """
    numbers = list(numbers)
    if not numbers:
        return {}
    done = _run(["squeue", "--noheader", "--states=all", "--jobs", ",".join(numbers), "--format=%F|%T|%r"])
    found: dict[str, list[str]] = {}
    # Slurm forgets jobs some minutes after their end, and answers with an error when it knows none of them.
    for line in done.stdout.splitlines():
        number, _, rest = line.strip().partition("|")
        state, _, reason = rest.partition("|")
        words = state.lower() + (f" ({reason})" if state == "PENDING" and reason not in ("", "None") else "")
        if words not in found.setdefault(number, []):
            found[number].append(words)
    return {number: ", ".join(words) for number, words in found.items()}


def cancel(number: str) -> None:
    """End a job, after it has saved itself.

    Raises:
        HpcaiError: Slurm does not.
    """
    found = states([number]).get(number, "").split(", ")
    orders = []
    if any(not state.startswith("pending") for state in found):
        # The script too, which tells the ranks; without --full it would hear nothing.
        orders.append(["scancel", "--state=RUNNING", "--full", "--signal=TERM", number])
    if any(state.startswith("pending") for state in found):
        # What waits takes no signal: scancel would try for more than a minute.
        orders.append(["scancel", "--state=PENDING", number])
    for order in orders:
        done = _run(order)
        if done.returncode != 0:
            raise HpcaiError("Slurm does not cancel the job", received=done.stderr.strip() or done.returncode)


def seconds_left(number: str) -> float | None:
    """Return how long a job may still run; None where it has no limit, or Slurm does not say it."""
    try:
        left = _run(["squeue", "--noheader", "--jobs", number, "--format=%L"]).stdout.strip()
    except HpcaiError:
        return None
    match = re.fullmatch(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)", left)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds if match else None


def _run(words: Sequence[str], stdin: str = "") -> subprocess.CompletedProcess:
    try:
        return subprocess.run(words, input=stdin, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except FileNotFoundError:
        raise MissingError(f"{words[0]} is not on PATH", expected="a host of a Slurm cluster, such as its login node",
                           mend="use `hpcai launch local`, or --dry-run to see the script") from None
    except subprocess.TimeoutExpired:
        raise HpcaiError(f"Slurm does not answer {words[0]} within {_SECONDS} s") from None
