"""Population-based training (arXiv 1711.09846): the worst members go on from the best ones, with changed settings."""

import json
import math
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpcai_cli import run_lock
from hpcai_cli.engine.tuning import slots
from hpcai_cli.engine.tuning.distributions import distribution_of
from hpcai_cli.engine.tuning.live import Progress
from hpcai_cli.engine.tuning.study import GENERATION, Study
from hpcai_cli.engine.tuning.trials import ENDING_SECONDS, LOOK_SECONDS, train_command
from hpcai_cli.errors import HpcaiError, UsageError
from hpcai_cli.run import Run
from hpcai_cli.search_space import Parameter, as_text
from hpcai_cli.signals import StopRequest

SHARE = 0.25
"""Of the members, the worst, that take the place of the best; the paper's truncation selection has 0.2."""
FACTORS = (0.8, 1.2)
"""By one of which a number is changed, as in the paper."""
RESAMPLED = 0.25
"""Probability that a choice is drawn anew."""
RUN = "run"
"""Attribute of a trial: the folder of its run, where that is not trials/NUMBER."""


@dataclass(frozen=True)
class Segment:
    """What one member trains between two comparisons."""

    member: int
    generation: int
    parent: int
    """The member whose weights it goes on from; itself, or a better one."""
    params: dict[str, object]


class Population:
    """Trains the members of a study generation by generation; after a kill it goes on where it was.

    Everything that is drawn depends on seed, generation and member alone, and what was trained is in the study's
    record, so that no other state is kept.

    Args:
        interval: epochs of a generation.
        show: called with what trains, whenever something may have changed.
        tell: called with each segment that is over, and what happened.
    """

    def __init__(self, study: Study, *, members: int, interval: int, workers: int, stop: StopRequest,
                 show: Callable[[Iterable[Progress]], None], tell: Callable[[FrozenTrial, str], None]):
        self._study, self._plan, self._members, self._interval = study, study.plan, members, interval
        self._slots, self._stop = slots.Slots(workers, study.plan.np), stop
        self._show, self._tell = show, tell
        self._epochs = study.plan.recipe.epochs
        self._folder = study.folder / "population"

    def work(self) -> None:
        """Train all generations.

        Raises:
            UsageError: another process trains them, or they were begun otherwise.
            HpcaiError: no member is left.
        """
        self._folder.mkdir(exist_ok=True)
        self._check_as_begun()
        with run_lock.held(self._folder):
            before: dict[int, Segment] = {}
            for generation in range(math.ceil(self._epochs / self._interval)):
                values = self._done(generation - 1)
                if generation and all(value is None for value in values.values()):
                    raise HpcaiError("no member of the population is left", mend=f"see {self._folder}")
                segments = [self._segment(generation, member, before, values) for member in range(self._members)]
                # One that somebody else has stopped is taken up again.
                while left := [each for each in segments if each.member not in self._done(generation)]:
                    if self._stop.received:
                        return
                    self._train(left)
                before = {each.member: each for each in segments}
                self._forget(generation - 1)

    def _check_as_begun(self) -> None:
        wanted = {"members": self._members, "interval": self._interval}
        begun = self._study.record.user_attrs.get("population")
        if begun is None:
            self._study.record.set_user_attr("population", wanted)
        elif begun != wanted:
            raise UsageError("the population was begun otherwise", received=json.dumps(wanted),
                             expected=f"--population {begun['members']} --interval {begun['interval']}")

    # ---- Who goes on from whom, with what --------------------------------------------------------------------------

    def _segment(self, generation: int, member: int, before: dict[int, Segment],
                 values: dict[int, float | None]) -> Segment:
        draw = random.Random(f"{self._plan.seed} {generation} {member}")
        if generation == 0 and member == 0 and (own := self._plan.own_points()):
            return Segment(member, 0, member, own[0])
        if generation == 0:
            return Segment(member, 0, member, {each.name: _drawn(each, draw) for each in self._plan.space})
        sign = -1 if self._plan.objectives[0].is_maximized else 1
        order = sorted(values, key=lambda each: (math.inf if values[each] is None else sign * values[each], each))
        count = max(1, round(SHARE * self._members))
        left = [each for each in order if values[each] is not None]
        if member in order[-count:] or values[member] is None:
            parent = draw.choice(left[:count])
            if parent != member:
                return Segment(member, generation, parent, {
                    each.name: _changed(each, before[parent].params[each.name], draw) for each in self._plan.space})
        return Segment(member, generation, member, before[member].params)

    def _done(self, generation: int) -> dict[int, float | None]:
        """Return the members that have trained a generation, with what they came to; None for one that failed."""
        return {trial.user_attrs["member"]: trial.values[0] if trial.values else None
                for trial in self._study.record.get_trials(deepcopy=False)
                if trial.user_attrs.get(GENERATION) == generation}

    # ---- Training --------------------------------------------------------------------------------------------------

    def _run(self, member: int, generation: int) -> Run:
        return Run(self._folder / f"{member:02d}-{generation:03d}")

    def _train(self, segments: list[Segment]) -> None:
        """Train them, some at a time, and record what they came to; less when the stop is asked for."""
        waiting, running = list(segments), {}
        asked = 0.0
        while waiting and not self._stop.received or running:
            for segment in list(waiting):
                run = self._run(segment.member, segment.generation)
                if self._stop.received or len(running) == self._slots.count or slots.is_being_trained(run):
                    continue
                slot = self._slots.free(list(running))
                running[slot] = segment, self._start(slot, segment)
                waiting.remove(segment)
            self._show(self._progress(segment) for segment, _ in running.values())
            time.sleep(LOOK_SECONDS)
            if self._stop.received:
                asked = asked or time.monotonic()
                for _, process in running.values():
                    if time.monotonic() - asked > ENDING_SECONDS:
                        process.kill()
                    elif time.monotonic() - asked < LOOK_SECONDS:
                        process.send_signal(signal.SIGTERM)
            for slot, (segment, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    self._finish(segment, process.returncode)

    def _start(self, slot: int, segment: Segment) -> subprocess.Popen:
        run = self._run(segment.member, segment.generation)
        end = (segment.generation + 1) * self._interval
        words = train_command(self._plan, {name: as_text(value) for name, value in segment.params.items()})
        if run.recipe_file.exists():
            words += ["--resume", run.folder]
        elif segment.generation:
            words += ["--resume", self._run(segment.parent, segment.generation - 1).folder, "--output", run.folder]
        else:
            words += ["--output", run.folder]
        return self._slots.start(slot, [*words, *(["--until-epoch", end] if end < self._epochs else [])],
                                 self._log(segment))

    def _log(self, segment: Segment):
        return self._folder / f"{segment.member:02d}.log"

    def _finish(self, segment: Segment, code: int) -> None:
        run = self._run(segment.member, segment.generation)
        end = min(self._epochs, (segment.generation + 1) * self._interval)
        value = self._values(run).get(end)
        if value is None and (slots.was_stopped(code) or self._stop.received):
            return
        happened = "" if value is not None else slots.cause(code, run.failure_file, self._log(segment))
        trial = optuna.trial.create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE, value=value, params=segment.params,
            distributions={each.name: distribution_of(each) for each in self._plan.space},
            intermediate_values={} if value is None else {end: value},
            user_attrs={"member": segment.member, GENERATION: segment.generation, "parent": segment.parent,
                        "happened": happened, "exit_code": code, RUN: str(run.folder)})
        self._study.record.add_trial(trial)
        self._tell(self._study.record.get_trials(deepcopy=False)[-1], happened)

    def _values(self, run: Run) -> dict[int, float | None]:
        """Return the objective after each epoch so far."""
        try:
            events = run.events_file.read_bytes()
        except OSError:
            return {}
        return {event["epoch"]: self._plan.objectives[0].value_in(event) for event in slots.epochs(events)}

    def _progress(self, segment: Segment) -> Progress:
        run = self._run(segment.member, segment.generation)
        values = self._values(run)
        epoch = max(values, default=segment.generation * self._interval)
        return Progress(run.folder.name, epoch, self._epochs, values.get(epoch),
                        {name: as_text(value) for name, value in segment.params.items()})

    def _forget(self, generation: int) -> None:
        """Remove the checkpoints of a generation, of which the next one has copies."""
        for member in range(self._members if generation >= 0 else 0):
            shutil.rmtree(self._run(member, generation).checkpoints, ignore_errors=True)


def _drawn(parameter: Parameter, draw: random.Random) -> object:
    if parameter.kind == "choice":
        return draw.choice(parameter.choices)
    if parameter.log:
        value = math.exp(draw.uniform(math.log(parameter.low), math.log(parameter.high)))
    else:
        value = draw.uniform(parameter.low, parameter.high)
    return _within(parameter, value)


def _changed(parameter: Parameter, value: object, draw: random.Random) -> object:
    if parameter.kind == "choice":
        return draw.choice(parameter.choices) if draw.random() < RESAMPLED else value
    return _within(parameter, value * draw.choice(FACTORS))


def _within(parameter: Parameter, value: float) -> float | int:
    value = min(max(value, parameter.low), parameter.high)
    return round(value) if parameter.kind == "int" else value
