"""Keeps a training going: starts it again from its newest checkpoint when ranks have died or hang, but not for ever."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from hpcai_cli import console, rank_processes, stacks
from hpcai_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, HpcaiError, StoppedEarly
from hpcai_cli.launchers import Ranks
from hpcai_cli.pulse import at_step
from hpcai_cli.rank_processes import Outcome
from hpcai_cli.run import Run, read_json
from hpcai_cli.signals import StopRequest
from hpcai_cli.watch import Watch

RESTARTS = 3
"""Of a job of several ranks, unless --max-restarts says otherwise."""
LONGEST_PAUSE = 60
"""Seconds; the pauses double from one on, so that what comes and goes has time to go."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended without a result."""

    happened: str
    step: int
    """The furthest that a rank has told of; -1 before the first."""
    stride: int
    """It was at work on as many more, at most."""
    exit_code: int
    is_transient: bool
    """Whether it may go well the next time."""
    is_told: bool
    """Whether a rank has said what went wrong."""
    rank: int | None
    received: str
    """What the launcher said, or how far the ranks have come."""

    def is_where(self, other: "Failure") -> bool:
        """Tell whether both can be of the same step, of those that are taken together."""
        return abs(self.step - other.step) < max(self.stride, other.stride)

    def __str__(self) -> str:
        return f"{self.happened} {at_step(self.step)}"


def supervise(ranks: Ranks, arguments: Callable[[str], list[str]], run: Run, files: list, *, resumes: bool,
              heartbeat: float, max_restarts: int) -> int:
    """Train in ranks that are started again when they fail, and return the job's exit code.

    Args:
        arguments: returns the command line's words for an attempt that begins with `--output` or `--resume`.
        files: what each host has to see.
        resumes: whether the first attempt is to go on with the run.
        heartbeat: seconds without a sign of life after which a rank hangs; 0 for never.

    Raises:
        HpcaiError: the ranks have failed without a word, or for the last time.
        MissingError: a host cannot take ranks.
        StoppedEarly: a signal came between two attempts.
        KeyboardInterrupt: so it did, and nothing has been saved yet; or as of `rank_processes.run_ranks`.
    """
    before, restarts = None, 0
    while True:
        watch = Watch(ranks.np, heartbeat, run.stacks, is_elastic=ranks.elastic is not None)
        try:
            outcome = rank_processes.run_ranks(ranks, arguments("--resume" if resumes else "--output"), files, watch)
        except KeyboardInterrupt:
            # This attempt had nothing to save yet, but one before it may have.
            if restarts and _is_saved(run):
                _raise_stopped(run, "a signal")
            raise
        # Ranks that were killed have left theirs.
        stacks.clear(run.stacks)
        if outcome.exit_code in (0, EXIT_STOPPED):
            return outcome.exit_code
        failure = _failure(outcome, watch, run)
        if not failure.is_transient or max_restarts == 0:
            return _told(failure, run)
        if before and failure.is_where(before):
            return _told(failure, run, f", where it had failed before: {before.happened}")
        if restarts == max_restarts:
            return _told(failure, run, f", after {_plural(restarts, 'restart')}")
        before, restarts = failure, restarts + 1
        resumes = _pause(failure, run, f"{restarts} of {max_restarts}", min(2 ** (restarts - 1), LONGEST_PAUSE))


def _failure(outcome: Outcome, watch: Watch, run: Run) -> Failure:
    """Judge how an attempt ended."""
    code, rank, happened = outcome.exit_code, outcome.rank, outcome.happened
    recorded = read_json(run.failure_file) if run.failure_file.is_file() else {}
    if recorded and not outcome.hang:
        # The ranks' own record is the truth: which of them the launcher sees end first is a race.
        code = recorded.get("exit_code", code)
        rank = rank if outcome.signal else recorded.get("rank", rank)
    if outcome.reported and not (outcome.hang or outcome.signal):
        happened = "the training failed" if rank is None else f"rank {rank} failed"
    # What was wrong with the request, the data or the mathematics is so the next time too. A launcher that ends without
    # a word has lost a host, unless it never came to start all ranks.
    is_transient = code not in (2, 3, 4, 5, 6, EXIT_INTERRUPTED) and not outcome.answered and bool(
        outcome.hang or outcome.signal or watch.step >= 0 or rank is None and not outcome.reported and watch.all_began)
    return Failure(happened, watch.step, watch.stride, code, is_transient, outcome.reported and not outcome.hang, rank,
                   watch.positions if outcome.hang else outcome.launcher_words)


def _told(failure: Failure, run: Run, history: str = "") -> int:
    """Return the exit code of a failure that the ranks have told of; tell of another one, and of what came before it.

    Raises:
        HpcaiError: there is something to tell.
    """
    if failure.is_told and not history:
        return failure.exit_code
    resume = f"go on with `hpcai train --resume {run.folder}`" if _is_saved(run) else "train again"
    if run.stacks.is_dir():
        mend = f"see in {run.stacks} what each thread did, or {resume}"
    else:
        mend = f"run it again with --verbose, or {resume}"
    error = HpcaiError(f"{failure}{history}", mend=mend, received=failure.received)
    run.record_failure(rank=failure.rank, error=error, exit_code=error.exit_code)
    raise error


def _pause(failure: Failure, run: Run, number: str, seconds: int) -> bool:
    """Tell of the restart, wait, and return whether it goes on with the run, which is otherwise empty again.

    Raises:
        StoppedEarly: a signal came, and there is a checkpoint.
        KeyboardInterrupt: a signal came, and there is none.
    """
    is_saved, begins = _is_saved(run), run.recipe_file.is_file()
    source = "from the newest checkpoint" if is_saved else "from the beginning"
    with StopRequest() as stop:
        console.note(f"{failure}; restarting {source} in {seconds} s ({number})")
        if begins:
            run.event("restart", happened=failure.happened, step=failure.step, number=number, pause=seconds)
        end = time.monotonic() + seconds
        while time.monotonic() < end and not stop.received:
            time.sleep(0.05)
    if stop.received:
        if is_saved:
            _raise_stopped(run, stop.received)
        raise KeyboardInterrupt
    run.failure_file.unlink(missing_ok=True)
    if not begins:
        for left in run.folder.glob(".*.json.*"):
            # What was being written when the ranks ended; the folder has to be empty.
            left.unlink()
    return begins


def _raise_stopped(run: Run, name: str) -> None:
    run.event("stopped", signal=name)
    raise StoppedEarly(f"stopped by {name} at a restart; the newest checkpoint is there",
                       mend=f"continue with `hpcai train --resume {run.folder}`")


def _is_saved(run: Run) -> bool:
    return any(run.checkpoints.glob("step-*"))


def _plural(number: int, one: str) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {one}s"
