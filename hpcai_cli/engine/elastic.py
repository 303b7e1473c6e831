"""Elastic training: what a rank keeps in memory, and how the ranks that are left meet those that come."""

import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console, launch
from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.learning_rates import ChangingRates
from hpcai_cli.engine.model import is_random_state
from hpcai_cli.engine.step import HALT, Wishes
from hpcai_cli.engine.timed_ranks import LagWatch
from hpcai_cli.errors import HpcaiError, MissingError
from hpcai_cli.pulse import Pulse

COMMIT_SHARE = 0.01
"""Of the time, at most so much goes into commits."""
COMMIT_SECONDS = 1.0
"""Between two commits at least."""
MEETINGS = 5
"""How often in a row ranks may fail to find each other, each time for as long as Gloo waits, before one gives up."""
_CHUNK = 64 << 20
"""Bytes that travel at a time when a state is handed over."""
_LOST = re.compile(r"Horovod has been shut down|gloo[/\\]|Horovod has not been initialized")


class HostsChanged(Exception):
    """Ranks can be had that don't take part yet, or some are to go; raised on all ranks after the same step, with the
    state committed."""


@dataclass
class Built:
    """What a rank has built and compiled for the training, and needs again when the ranks have met again."""

    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    rates: ChangingRates | None
    steps: Callable
    final_steps: Callable
    validate: Callable[[], dict]
    watch: LagWatch
    keeper: Any = None

    @property
    def variables(self) -> list[keras.Variable]:
        """All state of model and optimizer."""
        return [*self.model.variables, *self.optimizer.variables]

    @property
    def weights(self) -> list[keras.Variable]:
        """Of these what all ranks should hold alike: not the state of their random generators."""
        return [variable for variable in self.variables if not is_random_state(variable)]


class Crew:
    """This rank among those of an elastic job, from its start to its end.

    What it has built stays where it is when ranks are lost; what changed since the last commit is taken back.

    Attributes:
        ranks: those that there are now.
        job: this rank's, once the run and the data are known.
        built: what the training has built: a rank that comes builds it anew.
        holder: the rank whose state counts; None where no rank has one, at the beginning.
        started: when this rank began, s of the monotonic clock.
        leads: whether this one was rank 0 when they met.
        news: what has happened since the last meeting, for people; empty at the beginning.
    """

    def __init__(self, ranks: Horovod, pulse: Pulse):
        self.ranks, self.started, self._pulse = ranks, time.monotonic(), pulse
        self.job: Any = None
        self.built: Built | None = None
        self.holder: int | None = None
        self.news: dict = {}
        self._position: dict | None = None
        self._arrays: list[np.ndarray] = []
        self._step, self._next_commit = 0, 0.0
        self._has_news = self.leads = False
        ranks.tell_of_hosts(self._note_hosts)

    def _note_hosts(self) -> None:
        self._has_news = True
        if self.job:
            self.job.wishes.commit.assign(HALT)

    # ---- While the ranks are together ------------------------------------------------------------------------------

    def meet(self) -> None:
        """Find out together whose state counts: that of the rank that has committed last."""
        steps = self.ranks.gather(np.array([-1 if self._position is None else self._position["step"]]))
        self.holder = int(np.argmax(steps)) if steps.max() >= 0 else None

    def after_block(self, at: Position, wishes: Wishes) -> None:
        """Take note of the step, and on rank 0 wish for a commit when one is due or when ranks are waiting."""
        self._step = at.step
        if self.ranks.rank == 0 and (self._has_news or time.monotonic() >= self._next_commit):
            wishes.commit.assign(HALT if self._has_news else 1.0)

    def commit(self, at: Position, variables: Sequence[keras.Variable], *, if_due: bool = False) -> None:
        """Keep a copy of the state in memory, to which the ranks go back when one of them is lost."""
        started = time.monotonic()
        if if_due and started < self._next_commit:
            return
        self._arrays = [variable.numpy() for variable in variables]
        self._position = at.copied()
        self._step = at.step
        ended = time.monotonic()
        self._next_commit = ended + max(COMMIT_SECONDS, (ended - started) / COMMIT_SHARE)

    def look_for_hosts(self, wishes: Wishes) -> None:
        """See together, after a commit, whether other ranks are to take part.

        Raises:
            HostsChanged: they are.
        """
        wishes.commit.assign(0.0)
        if self.ranks.gather(np.array([self._has_news])).any():
            raise HostsChanged

    def recall(self, variables: Sequence[keras.Variable]) -> dict:
        """Give all ranks the state that counts, as of its last commit, and return the position."""
        assert self.holder is not None
        is_mine = self.ranks.rank == self.holder
        position = self.ranks.broadcast_json(self._position if is_mine else None, self.holder)
        arrays = self._arrays if is_mine else [None] * len(variables)
        for chunk in _chunks(list(zip(variables, arrays, strict=True))):
            sizes = [int(np.prod(variable.shape, dtype=np.int64)) * np.dtype(variable.dtype).itemsize
                     for variable, _ in chunk]
            content = np.frombuffer(b"".join(array.tobytes() for _, array in chunk), np.uint8) if is_mine else None
            content = self.ranks.broadcast_bytes(content, sum(sizes), self.holder)
            for (variable, _), end, size in zip(chunk, np.cumsum(sizes), sizes, strict=True):
                variable.assign(content[end - size:end].view(np.dtype(variable.dtype)).reshape(variable.shape))
        return position

    def tell(self, at: Position) -> None:
        """Tell people on stderr that the job goes on with other ranks."""
        if self.news:
            before, now = self.news["world_size_before"], self.ranks.size
            what = "a process was lost" if self.news["reason"] == "lost a rank" else (
                "more processes" if now > before else "fewer processes" if now < before else "nobody came")
            lost = f", {self.news['lost_steps']:,} steps back" if self.news["lost_steps"] else ""
            console.note(f"{what}: {now} in place of {before} go on after step {at.step:,}{lost}")

    # ---- When they are not ------------------------------------------------------------------------------------------

    def goes_on(self, error: Exception) -> bool:
        """Tell whether the job goes on after an error on this rank: another rank was lost, or others can be had.

        What is a rank's own failure ends the job, also where the others see no more of it than that it is gone.
        """
        if isinstance(error, HostsChanged):
            return True
        return is_loss(error) and not (self.job and self.job.run.failure_file.is_file())

    def meet_again(self, error: Exception) -> None:
        """Wait until horovodrun has settled who takes part, and join them.

        Raises:
            MissingError: the ranks don't find each other, or there are too few of them for too long.
            SystemExit: the job goes on without this rank.
        """
        started, size = time.monotonic(), self.ranks.size
        # Before the meeting: what comes in meanwhile may be later than what it knows.
        self._has_news = False
        # One that comes has to start first.
        with self._pulse.slow():
            self._rejoin()
        launch.announce()
        committed = self._position["step"] if self._position else 0
        self.news = {"reason": "hosts changed" if isinstance(error, HostsChanged) else "lost a rank",
                     "world_size_before": size, "lost_steps": self._step - committed,
                     "seconds": round(time.monotonic() - started, 3)}

    def _rejoin(self) -> None:
        reason = ""
        for _ in range(MEETINGS):
            try:
                self.ranks.rejoin()
                return
            except ValueError as error:
                reason = self.ranks.why_not_joined() or str(error)
            if "has been removed from elastic job" in reason:
                # Its place is not offered any more; horovodrun takes no notice of how it ends.
                sys.exit(0)
            if "HTTP request failed" in reason:
                # horovodrun has given up, and what it was asked stays without an answer.
                raise MissingError("too few processes are left, and no others came in time",
                                   expected="--min-np of them within --elastic-timeout",
                                   mend="continue the run with --resume")
        raise MissingError("the processes that are left do not find each other", received=reason,
                           mend="continue the run with --resume")


def until_done(crew: Crew | None, function: Callable):
    """Call the function until it ends without losing a rank, and return its value.

    Raises:
        Exception: what it raises, where that is no loss of a rank or the job has no crew to go on with.
    """
    while True:
        try:
            return function()
        except Exception as error:
            if crew is None or not crew.goes_on(error):
                raise
            loss = error
        crew.meet_again(loss)


def part(ranks: Serial | Horovod) -> None:
    """End the communication; a rank that is lost now is missed no more, since all have done their work."""
    try:
        ranks.stop()
    except Exception as error:
        if not (ranks.is_elastic and is_loss(error)):
            raise


def is_loss(error: BaseException) -> bool:
    """Tell whether an error only says that another rank is gone.

    Upstream's own wrapper looks for the names of some operations, and takes every other failure for an end without one.
    """
    return isinstance(error, (tf.errors.OpError, ValueError, RuntimeError)) and not isinstance(error, HpcaiError) and (
        bool(_LOST.search(str(error))))


def _chunks(pairs: list[tuple[keras.Variable, np.ndarray | None]]) -> Iterator[list]:
    """Yield the pairs in groups of some megabytes each."""
    group, size = [], 0
    for variable, array in pairs:
        group.append((variable, array))
        size += int(np.prod(variable.shape, dtype=np.int64)) * np.dtype(variable.dtype).itemsize
        if size >= _CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group
