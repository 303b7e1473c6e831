"""Where am I: alone, or rank r of n, started by what; and how to start several ranks of this very program."""

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.errors import EXIT_STOPPED, MissingError, UsageError

TERMINAL_VARIABLE = "HPCAI_TERMINAL"
"""Path of the terminal on which rank 0 draws its progress when a launcher stands between the two."""
VERBOSE_VARIABLE = "HPCAI_VERBOSE"
"""Set by --verbose, for this process and for the ranks that it starts."""
REGISTER_VARIABLE = "HPCAI_RANKS"
"""Folder in which the ranks that `run_ranks` started leave their process ids."""


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


def _first_number(text: str) -> int | None:
    # Slurm writes "4(x2)" for four tasks on each of two nodes.
    match = re.match(r"\d+", text)
    return int(match[0]) if match else None


@dataclass(frozen=True)
class Outcome:
    """How a job of several ranks ended: the first rank that failed, and with what."""

    exit_code: int
    rank: int | None = None
    """The first rank that failed; None when all ended well or the launcher itself failed."""
    reported: bool = False
    """Whether a rank said on stderr what went wrong."""
    launcher_words: str = ""
    """What the launcher itself printed last."""


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
    if missing_package("horovod") or not _beside("horovodrun").exists():
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


def run_ranks(np: int, arguments: Sequence[str]) -> Outcome:
    """Run `hpcai ARGUMENTS` in np processes on this host under horovodrun, as if it were one program.

    Rank 0's stdout becomes ours, the ranks' stderr becomes ours, and signals reach every rank.

    Raises:
        KeyboardInterrupt: a signal ended the job, and it had nothing to save.
    """
    with tempfile.TemporaryDirectory(prefix="hpcai-") as folder:
        environment = {**os.environ, REGISTER_VARIABLE: folder}
        if sys.stderr.isatty():
            environment[TERMINAL_VARIABLE] = os.ttyname(2)
        # A session of its own: a Ctrl-C on the terminal comes to us alone, and we pass it on as the wish to stop;
        # horovodrun would end the ranks before they could save themselves.
        process = subprocess.Popen(
            [_beside("horovodrun"), "-np", str(np), "--gloo", "--network-interfaces", "lo", "--disable-cache",
             _beside("hpcai"), *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True)
        reader = _Reader(process)
        with _forwarded(process, Path(folder)) as asked:
            outcome = reader.outcome()
        if asked and outcome.exit_code not in (0, EXIT_STOPPED):
            raise KeyboardInterrupt
        return outcome


class _Reader:
    """Takes horovodrun's prefixes off the ranks' lines and learns from its own lines which rank failed first."""

    _LINE = re.compile(r"\[(\d+)\]<(stdout|stderr)>:(.*)", re.DOTALL)
    _EXIT = re.compile(r"Process (\d+) exit with status code (-?\d+)")

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self._failed: tuple[int, int] | None = None
        self._reported, self._words = False, ""

    def outcome(self) -> Outcome:
        """Pass everything on until the job ends."""
        errors = threading.Thread(target=self._pump, args=(self._process.stderr,), daemon=True)
        errors.start()
        self._pump(self._process.stdout)
        code = self._process.wait()
        errors.join()
        if self._failed is None:
            return Outcome(code, None, self._reported, self._words)
        rank, status = self._failed
        return Outcome(status if status in (1, 2, 3, 4, 5, 6, EXIT_STOPPED) else 1, rank, self._reported,
                       f"status {status}")

    def _pump(self, stream) -> None:
        for line in stream:
            match = self._LINE.match(line)
            if match is None:
                self._own(line)
                continue
            rank, kind, text = int(match[1]), match[2], match[3]
            if kind == "stdout" and rank == 0:
                _pass_on(sys.stdout, text)
            elif kind == "stderr":
                self._reported = self._reported or text.startswith(("error:", f"[rank {rank}]"))
                if rank == 0 or text.startswith("[rank ") or os.environ.get(VERBOSE_VARIABLE):
                    _pass_on(sys.stderr, text)

    def _own(self, line: str) -> None:
        match = self._EXIT.match(line)
        if match is not None and self._failed is None:
            self._failed = int(match[1]), int(match[2])
        if line.strip():
            self._words = line.strip()
        if os.environ.get(VERBOSE_VARIABLE):
            _pass_on(sys.stderr, line)


def _pass_on(stream, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # `hpcai ... | head`: the reader has what it wanted, and the job goes on, so that its exit code stays true.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen, folder: Path) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGUSR1 on to every rank while the block lasts; a second Ctrl-C ends them at once."""
    asked = []

    def forward(number: int, frame) -> None:
        ranks = [int(path.read_text() or 0) for path in folder.iterdir()]
        if asked and number == signal.SIGINT or not ranks:
            # Nothing to save, or nobody wants to wait: horovodrun ends its ranks when it is told to.
            os.killpg(process.pid, signal.SIGTERM)
        asked.append(number)
        for rank in filter(None, ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def _beside(program: str) -> Path:
    """Return a program of this environment, which need not be on PATH."""
    return Path(sys.executable).parent / program
