"""Watches over the ranks of a job by their beats: finds one that hangs, keeps the stacks, and ends what is left."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from hpcai_cli import console, rank_signals, stacks
from hpcai_cli.pulse import OVER, SLOW, STALLED, WORKING
from hpcai_cli.rank_signals import SSH_SECONDS

BEGIN_SECONDS = 300.0
"""For which ranks may load their libraries at least, or end, however short the heartbeat."""
STEP_SECONDS = 60.0
"""For which a rank may be silent at least before its first step: what is loaded and compiled then can hold up all
threads of Python."""
_LOOK_SECONDS = 0.25
_HELD_SECONDS = 2.0
"""Whoever looks so late was held up himself, and knows nothing of the ranks."""


@dataclass(frozen=True)
class _Beat:
    heard: float
    step: int
    stride: int
    state: str


class Watch:
    """Judges the ranks of one attempt, by this process's own monotonic clock.

    Args:
        np: how many ranks there are.
        seconds: for which one may be silent; 0 for ever.
        folder: where the ranks write their stacks.
        is_elastic: the others go on without one that hangs, which is ended alone. A rank's number changes then, and two
            may have begun with the same one: they are told apart by their process ids.

    Attributes:
        hang: what was found; empty as long as all is well.
        hung_rank: who hangs, where that is one.
    """

    def __init__(self, np: int, seconds: float, folder: Path, *, is_elastic: bool = False):
        self._np, self._seconds, self._folder, self._is_elastic = np, seconds, folder, is_elastic
        self._beats: dict[int, _Beat] = {}
        self._lock, self._held = threading.Lock(), 0
        self.hang, self.hung_rank = "", None

    @property
    def step(self) -> int:
        """The furthest step that a rank has told of; -1 before the first of this attempt."""
        return max((beat.step for beat in self._beats.values()), default=-1)

    @property
    def stride(self) -> int:
        """How many steps a rank takes at a time: a failure lies within so many after `step`."""
        return max((beat.stride for beat in self._beats.values()), default=1)

    @property
    def positions(self) -> str:
        """How far each of the first ranks has come."""
        return ", ".join(f"rank {rank} at step {max(0, beat.step)}" for rank, beat in sorted(self._beats.items())[:8])

    @property
    def all_began(self) -> bool:
        """Whether every rank has come to its work."""
        return len(self._beats) == self._np

    def heard(self, rank: int, words: list[str]) -> None:
        """Take a beat: the words behind its mark."""
        with suppress(ValueError):
            own, step, stride, state, process = words
            if own == str(rank):
                who = int(process) if self._is_elastic else rank
                self._beats[who] = _Beat(time.monotonic(), int(step), int(stride), state)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Judge nobody while the block lasts: a terminal that was halted by Ctrl-S holds up all that we hear."""
        with self._lock:
            self._held += 1
        try:
            yield
        finally:
            with self._lock:
                self._held -= 1

    @contextmanager
    def over(self, process: subprocess.Popen, launcher: str, started: Mapping[int, tuple[int, str]]) -> Iterator[None]:
        """Watch over a job while the block lasts.

        Args:
            process: the launcher.
            started: process id and host of each rank that has said so.
        """
        ended = threading.Event()
        thread = threading.Thread(target=self._look, args=(process, launcher, started, ended), daemon=True)
        if self._seconds:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if self._seconds:
                # It may be ending the launcher.
                thread.join()

    def _look(self, process: subprocess.Popen, launcher: str, started: Mapping[int, tuple[int, str]],
              ended: threading.Event) -> None:
        last = begun = time.monotonic()
        while not ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if self._held or now - last > _HELD_SECONDS:
                begun += now - last
                self._forgive(now - last)
            last = now
            if self._is_elastic:
                self._end_silent(now, started)
            found = self._judge(now, begun, started)
            if found and process.poll() is None:
                self.hang, self.hung_rank = found
                self._end(process, launcher, dict(started))
                return

    def _forgive(self, seconds: float) -> None:
        for rank, beat in list(self._beats.items()):
            if self._beats[rank] is beat:
                self._beats[rank] = replace(beat, heard=beat.heard + seconds)

    def _judge(self, now: float, begun: float, started: Mapping[int, tuple[int, str]]) -> tuple[str, int | None] | None:
        """Return what is wrong, and whose fault it is."""
        beats = dict(self._beats)
        missing = [] if self._is_elastic else [rank for rank in range(self._np) if rank not in beats]
        patience = max(SLOW * self._seconds, BEGIN_SECONDS)
        if missing and now - begun > patience:
            return f"{_names(missing, started)} did not begin within {patience:.0f} s", missing[0]
        silent = [rank for rank, beat in sorted(beats.items()) if now - beat.heard > self._patience(beat)]
        if silent:
            longest = max(now - beats[rank].heard for rank in silent)
            gives = "gives" if len(silent) == 1 else "give"
            return f"{_names(silent, started)} {gives} no sign of life for {longest:.0f} s", silent[0]
        states = {beat.state for beat in beats.values()}
        if not missing and STALLED in states and WORKING not in states:
            return "no rank makes progress" if self._np > 1 else "the process makes no progress", None
        return None

    def _end_silent(self, now: float, started: Mapping[int, tuple[int, str]]) -> None:
        """End each process of an elastic job that gives no sign of life; one that is gone already gives none either."""
        silent = {process for process, beat in list(self._beats.items()) if now - beat.heard > self._patience(beat)}
        hung = {rank: place for rank, place in dict(started).items() if place[0] in silent}
        for rank in hung:
            console.note(f"{_names([rank], hung)} gives no sign of life for {self._seconds:.0f} s, and is ended")
        rank_signals.send(hung, signal.SIGKILL)
        for process in list(self._beats) if hung else silent:
            # What the others have told of was that they wait for it.
            self._beats.pop(process, None)

    def _patience(self, beat: _Beat) -> float:
        if beat.state == OVER:
            # It has to end too, but libraries take their time for that.
            return max(SLOW * self._seconds, BEGIN_SECONDS)
        return self._seconds if beat.step >= 0 else max(self._seconds, STEP_SECONDS)

    def _end(self, process: subprocess.Popen, launcher: str, started: dict[int, tuple[int, str]]) -> None:
        """Have the stacks written, then end the ranks and what has started them."""
        def ask() -> None:
            if launcher == "srun":
                # It passes these on to all, wherever they are.
                process.send_signal(signal.SIGUSR2)
            else:
                rank_signals.send(started, signal.SIGUSR2, seconds=0)
            # One that is stopped writes nothing before it goes on.
            rank_signals.send(started, signal.SIGCONT, seconds=0)

        stacks.collect(self._folder, range(self._np), self.hang, ask)
        places = stacks.recipe_lines(self._folder, range(self._np))
        if places and self.hung_rank is None:
            self.hang += " (" + ", ".join(f"rank {rank} is in {place}" for rank, place in places.items()) + ")"
            self.hung_rank = next(iter(places)) if len(places) == 1 else None
        rank_signals.send(started, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(SSH_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _names(ranks: list[int], started: Mapping[int, tuple[int, str]]) -> str:
    names = [f"rank {rank}" + (f" on {started[rank][1]}" if rank in started else "") for rank in ranks[:3]]
    return " and ".join(names) + (f" and {len(ranks) - 3} more" if len(ranks) > 3 else "")
