"""Starts several ranks of this very program, here or on several hosts, and makes them look like one."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from hpcai_cli import host_check, last_will, rank_signals
from hpcai_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, HpcaiError
from hpcai_cli.launch import ANNOUNCEMENT, TERMINAL_VARIABLE, VERBOSE_VARIABLE, beside
from hpcai_cli.launchers import Ranks
from hpcai_cli.pulse import BEAT
from hpcai_cli.watch import Watch

_OWN_CODES = (*range(1, 7), EXIT_STOPPED, EXIT_INTERRUPTED)
"""With which a rank ends by itself."""
_CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

TAG = re.compile(r"\[(?:\d+,)?(\d+)\]<(stdout|stderr)>:")
"""What horovodrun writes before each line of a rank, and Open MPI, [1,1]<stdout>:, before each piece of one."""


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
    signal: str = ""
    """The signal that ended the rank; SIGKILL is how a kernel without memory, or a batch system, ends processes."""
    hang: str = ""
    """What was found by whoever watched over the ranks, and ended them for it."""
    answered: bool = False
    """Whether rank 0 has written something to stdout."""

    @property
    def happened(self) -> str:
        """What can be said of an end without a rank's own words."""
        if self.hang:
            return self.hang
        who = "the launcher" if self.rank is None else f"rank {self.rank}"
        return f"{who} was ended by {self.signal}" if self.signal else f"{who} ended without a word of its own"


def run_command(ranks: Ranks, arguments: Sequence[str], files: Sequence[Path] = ()) -> None:
    """Run a command of hpcai in so many processes, and end as it does where that is not with 0.

    Args:
        files: what each host has to see.

    Raises:
        HpcaiError: the ranks have failed without a word.
        MissingError: a host cannot take ranks.
        typer.Exit: they have said why.
    """
    outcome = run_ranks(ranks, arguments, files)
    if outcome.exit_code not in (0, EXIT_STOPPED) and not outcome.reported:
        raise HpcaiError(outcome.happened, mend="run it again with --verbose",
                         received=outcome.launcher_words)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def run_ranks(ranks: Ranks, arguments: Sequence[str], files: Sequence[Path] = (),
              watch: Watch | None = None) -> Outcome:
    """Run `hpcai ARGUMENTS` in several processes, as if it were one program.

    Rank 0's stdout becomes ours, the ranks' stderr becomes ours, and signals reach every rank.

    Args:
        watch: looks for ranks that hang.

    Raises:
        MissingError: a host cannot take ranks.
        KeyboardInterrupt: a signal ended the job, and it had nothing to save.
    """
    host_check.check(ranks, files)
    environment = {**os.environ, **ranks.environment()}
    if sys.stderr.isatty() and not ranks.other_hosts and ranks.launcher != "srun":
        environment[TERMINAL_VARIABLE] = os.ttyname(2)
    # A session of its own: a Ctrl-C on the terminal comes to us alone, and we pass it on as the wish to stop; the
    # launcher would end the ranks before they could save themselves. When we are killed it ends them too, which would
    # otherwise train on unseen and keep the run's lock.
    process = subprocess.Popen(
        [*ranks.words(), beside("hpcai"), *arguments], env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        preexec_fn=last_will.ended_by_ours())
    reader = _Reader(process, ranks.launcher, watch, is_elastic=ranks.elastic is not None)
    watching = watch.over(process, ranks.launcher, reader.processes) if watch else contextlib.nullcontext()
    with _forwarded(process, ranks, reader) as asked, watching:
        outcome = reader.outcome()
    if watch and watch.hang:
        # How ranks and launcher have ended since says nothing of the cause.
        outcome = replace(outcome, exit_code=1, rank=watch.hung_rank, signal="", hang=watch.hang)
    if asked and outcome.exit_code not in (0, EXIT_STOPPED):
        raise KeyboardInterrupt
    return outcome


class _Reader:
    """Takes the launcher's prefixes off the ranks' lines and learns from its own lines which rank failed first."""

    # srun writes 1: before each line, and tells the streams apart.
    _LABEL = re.compile(r" *(\d+): (.*)", re.DOTALL)
    _EXIT = re.compile(r"Process (\d+) exit with status code (-?\d+)")
    _MPI_NAME = re.compile(r"\s*Process name: \[\[.*\],(\d+)\]")
    _MPI_CODE = re.compile(r"\s*Exit code:\s+(\d+)")
    _MPI_SIGNAL = re.compile(r"mpirun noticed that process rank (\d+) .* exited on signal (\d+)")
    _SRUN_CODE = re.compile(r"srun: error: .*: tasks? (\d+)[\d,-]*: Exited with exit code (\d+)")
    _SRUN_SIGNALS = {"Killed": signal.SIGKILL, "Segmentation fault": signal.SIGSEGV, "Aborted": signal.SIGABRT,
                     "Bus error": signal.SIGBUS, "Illegal instruction": signal.SIGILL}
    _SRUN_SIGNAL = re.compile(rf"srun: error: .*: tasks? (\d+)[\d,-]*: ({'|'.join(_SRUN_SIGNALS)})")

    def __init__(self, process: subprocess.Popen, launcher: str = "mpirun", watch: Watch | None = None, *,
                 is_elastic: bool = False):
        self._process, self._launcher, self._watch, self._is_elastic = process, launcher, watch, is_elastic
        # In an elastic job a rank keeps the number by which its lines are tagged when it gets another one.
        self._heard = {0}
        self._failed: tuple[int, int] | None = None
        self._named: int | None = None
        self._reported, self._answered, self._has_given_up, self._words = False, False, False, ""
        self.processes: dict[int, tuple[int, str]] = {}
        """Process id and host of each rank that has said so."""

    def outcome(self) -> Outcome:
        """Pass everything on until the job ends."""
        pump = {"srun": self._pump_labels, "": self._pump_plain}.get(self._launcher, self._pump_tags)
        errors = threading.Thread(target=pump, args=(self._process.stderr, "stderr"), daemon=True)
        errors.start()
        with self._process.stdout, self._process.stderr:
            pump(self._process.stdout, "stdout")
            code = self._process.wait()
            errors.join()
        if not self._launcher and code:
            self._failed = 0, code
        if self._has_given_up:
            # What it has ended says nothing of the cause.
            return Outcome(1, None, self._reported, hang="fewer than --min-np processes could be had in time",
                           answered=self._answered)
        if self._failed is None or code == 0 and self._is_elastic:
            return Outcome(code, None, self._reported, self._words, answered=self._answered)
        rank, status = self._failed
        return Outcome(status if status in _OWN_CODES else 1, rank, self._reported,
                       f"status {status}", _crash(status), answered=self._answered)

    def _pump_plain(self, stream, kind: str) -> None:
        for line in stream:
            self._line(0, kind, line)

    def _pump_labels(self, stream, kind: str) -> None:
        for line in stream:
            if match := self._LABEL.match(line):
                self._line(int(match[1]), kind, match[2])
            else:
                self._own(line)

    def _pump_tags(self, stream, _: str) -> None:
        begun: dict[tuple[int, str], str] = {}
        for line in stream:
            own, *tagged = TAG.split(line)
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
        if kind == "stderr":
            # It may come within a line of a library that writes in pieces, which goes on behind it.
            text, beat, words = text.partition(BEAT)
            if beat and self._watch:
                self._watch.heard(rank, words.split())
            if not text:
                return
        if kind == "stderr" and text.startswith(ANNOUNCEMENT):
            words = text.split()
            if len(words) == 5 and (words[1] == str(rank) or self._is_elastic) and words[2].isdecimal():
                self._place(int(words[1]), rank, int(words[2]), words[3], int(words[4]))
        elif kind == "stdout" and rank in self._heard:
            self._answered = True
            self._pass_on(sys.stdout, text)
        elif kind == "stderr":
            self._reported = self._reported or text.startswith(("error:", f"[rank {rank}]"))
            if rank in self._heard or text.startswith("[rank ") or os.environ.get(VERBOSE_VARIABLE):
                self._pass_on(sys.stderr, text)

    def _place(self, rank: int, tag: int, process: int, host: str, size: int) -> None:
        """Take note of where a rank is; one of an elastic job says so again when it has got another number."""
        for other in [each for each, known in self.processes.items() if known == (process, host) or (
                self._is_elastic and each >= size)]:
            del self.processes[other]
        self.processes[rank] = process, host
        if rank == 0:
            self._heard.add(tag)

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
        elif match := self._SRUN_CODE.match(line):
            failed = int(match[1]), int(match[2])
        elif match := self._SRUN_SIGNAL.match(line):
            failed = int(match[1]), -self._SRUN_SIGNALS[match[2]]
        # horovodrun's words for it; it waits for other things too, which it names otherwise.
        self._has_given_up |= self._is_elastic and "TimeoutException: Timed out waiting" in line
        if failed and self._is_cause(failed):
            self._failed = failed
        if line.strip():
            self._words = line.strip()
        if os.environ.get(VERBOSE_VARIABLE):
            self._pass_on(sys.stderr, line)

    def _pass_on(self, stream, text: str) -> None:
        with self._watch.held() if self._watch else contextlib.nullcontext():
            _pass_on(stream, text)

    def _is_cause(self, failed: tuple[int, int]) -> bool:
        """Tell whether a failure is more of a cause than the one that was seen before."""
        if self._failed is None:
            return True
        if self._is_elastic:
            # The others go on without one that is lost, and what one of them ends with by itself is the cause. Over ssh
            # a rank that was killed ends with 255.
            return failed[1] in _OWN_CODES and self._failed[1] not in _OWN_CODES
        # A rank that crashed is the cause, also where one that it left behind was seen to end before.
        return bool(_crash(failed[1])) and not _crash(self._failed[1])


def _crash(status: int) -> str:
    """Return the signal that a status stands for, of those that nobody sends to ranks that are merely in the way."""
    number = -status if status < 0 else status - 128
    return signal.Signals(number).name if number in _CRASHES else ""


def _pass_on(stream, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        # `hpcai ... | head`: the reader has what it wanted, and the job goes on, so that its exit code stays true.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def _forwarded(process: subprocess.Popen, ranks: Ranks, reader: _Reader) -> Iterator[list[int]]:
    """Pass SIGINT, SIGTERM and SIGUSR1 on to the ranks while the block lasts; a second Ctrl-C ends them at once."""
    asked = []

    def forward(number: int, frame) -> None:
        started = dict(reader.processes)
        if asked and number == signal.SIGINT or not started:
            # Nothing to save, or nobody wants to wait: the launcher ends its ranks when it is told to.
            os.killpg(process.pid, signal.SIGTERM)
        elif ranks.launcher == "srun":
            # It passes this one on to all, wherever they are.
            process.send_signal(signal.SIGUSR1)
        else:
            rank_signals.ask_to_stop(started)
        asked.append(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
