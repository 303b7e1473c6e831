"""Starts several ranks of this very program on this host, and makes them look like one."""

import contextlib
import importlib.util
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from hpcai_cli.errors import EXIT_STOPPED, HpcaiError
from hpcai_cli.launch import REGISTER_VARIABLE, TERMINAL_VARIABLE, VERBOSE_VARIABLE, beside


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


def run_command(np: int, arguments: Sequence[str]) -> None:
    """Run a command of hpcai in so many processes, and end as it does where that is not with 0.

    Raises:
        HpcaiError: the ranks have failed without a word.
        typer.Exit: they have said why.
    """
    outcome = run_ranks(np, arguments)
    if outcome.exit_code not in (0, EXIT_STOPPED) and not outcome.reported:
        raise HpcaiError("the ranks ended without a word of their own", mend="run it again with --verbose",
                         received=outcome.launcher_words)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def run_ranks(np: int, arguments: Sequence[str]) -> Outcome:
    """Run `hpcai ARGUMENTS` in np processes on this host, as if it were one program.

    Under mpirun where Horovod was built with Open MPI, whose ranks talk through shared memory, else under horovodrun.

    Rank 0's stdout becomes ours, the ranks' stderr becomes ours, and signals reach every rank.

    Raises:
        KeyboardInterrupt: a signal ended the job, and it had nothing to save.
    """
    with tempfile.TemporaryDirectory(prefix="hpcai-") as folder:
        # Open MPI refuses root, and says so only when it starts; in a container there is nobody else.
        environment = {**os.environ, REGISTER_VARIABLE: folder, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                       "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        if sys.stderr.isatty():
            environment[TERMINAL_VARIABLE] = os.ttyname(2)
        # A session of its own: a Ctrl-C on the terminal comes to us alone, and we pass it on as the wish to stop; the
        # launcher would end the ranks before they could save themselves.
        process = subprocess.Popen(
            [*launcher_words(np), beside("hpcai"), *arguments], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
        reader = _Reader(process)
        with _forwarded(process, Path(folder)) as asked:
            outcome = reader.outcome()
        if asked and outcome.exit_code not in (0, EXIT_STOPPED):
            raise KeyboardInterrupt
        return outcome


def launcher_words(np: int) -> list[str | Path]:
    """Return the command line that starts np processes of what is written behind it."""
    if _has_open_mpi():
        # Not bound: each rank chooses its own cores. More ranks than cores are the user's to ask for.
        return ["mpirun", "-np", str(np), "--bind-to", "none", "--oversubscribe", "--tag-output"]
    return gloo_words(np)


def gloo_words(np: int) -> list[str | Path]:
    """Return the command line that starts them under Gloo, also where there is Open MPI."""
    return [beside("horovodrun"), "-np", str(np), "--gloo", "--network-interfaces", "lo", "--disable-cache"]


def _has_open_mpi() -> bool:
    """Tell whether Horovod is linked with Open MPI and mpirun is there, without loading either."""
    package = importlib.util.find_spec("horovod")
    mpirun = shutil.which("mpirun")
    if package is None or mpirun is None:
        return False
    libraries = [path for path in Path(package.origin).parent.glob("tensorflow/mpi_lib*.so") if path.stat().st_size]
    for library in libraries:
        with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            # MPICH's library is libmpi.so.12, Open MPI's libmpi.so.40.
            if content.find(b"libmpi.so.40") >= 0:
                return True
    return False


class _Reader:
    """Takes the launcher's prefixes off the ranks' lines and learns from its own lines which rank failed first."""

    # horovodrun writes [1]<stdout>: before each line, Open MPI [1,1]<stdout>: before each piece of one.
    _TAG = re.compile(r"\[(?:\d+,)?(\d+)\]<(stdout|stderr)>:")
    _EXIT = re.compile(r"Process (\d+) exit with status code (-?\d+)")
    _MPI_NAME = re.compile(r"\s*Process name: \[\[.*\],(\d+)\]")
    _MPI_CODE = re.compile(r"\s*Exit code:\s+(\d+)")
    _MPI_SIGNAL = re.compile(r"mpirun noticed that process rank (\d+) .* exited on signal (\d+)")

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self._failed: tuple[int, int] | None = None
        self._named: int | None = None
        self._reported, self._words = False, ""

    def outcome(self) -> Outcome:
        """Pass everything on until the job ends."""
        errors = threading.Thread(target=self._pump, args=(self._process.stderr,), daemon=True)
        errors.start()
        with self._process.stdout, self._process.stderr:
            self._pump(self._process.stdout)
            code = self._process.wait()
            errors.join()
        if self._failed is None:
            return Outcome(code, None, self._reported, self._words)
        rank, status = self._failed
        return Outcome(status if status in (1, 2, 3, 4, 5, 6, EXIT_STOPPED) else 1, rank, self._reported,
                       f"status {status}")

    def _pump(self, stream) -> None:
        begun: dict[tuple[int, str], str] = {}
        for line in stream:
            own, *tagged = self._TAG.split(line)
            if own:
                self._own(own)
            for rank, kind, text in zip(tagged[::3], tagged[1::3], tagged[2::3], strict=True):
                whole = begun.pop((int(rank), kind), "") + text
                if whole.endswith("\n"):
                    self._line(int(rank), kind, whole)
                elif whole:
                    begun[int(rank), kind] = whole
        for (rank, kind), text in begun.items():
            self._line(rank, kind, text)

    def _line(self, rank: int, kind: str, text: str) -> None:
        if kind == "stdout" and rank == 0:
            _pass_on(sys.stdout, text)
        elif kind == "stderr":
            self._reported = self._reported or text.startswith(("error:", f"[rank {rank}]"))
            if rank == 0 or text.startswith("[rank ") or os.environ.get(VERBOSE_VARIABLE):
                _pass_on(sys.stderr, text)

    def _own(self, line: str) -> None:
        if match := self._MPI_NAME.match(line):
            self._named = int(match[1])
        failed = None
        if match := self._EXIT.match(line):
            failed = int(match[1]), int(match[2])
        elif (match := self._MPI_CODE.match(line)) and self._named is not None:
            failed = self._named, int(match[1])
        elif match := self._MPI_SIGNAL.match(line):
            failed = int(match[1]), -int(match[2])
        self._failed = self._failed or failed
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
            # Nothing to save, or nobody wants to wait: the launcher ends its ranks when it is told to.
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
