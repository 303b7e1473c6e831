"""Trains the trials of a study in processes of their own, some at a time, and tells Optuna what came of them."""

import fcntl
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from optuna.trial import TrialState

from hpcai_cli import launch
from hpcai_cli.engine.tuning import slots
from hpcai_cli.engine.tuning.live import Progress
from hpcai_cli.engine.tuning.study import DONE, Plan, Study
from hpcai_cli.errors import HpcaiError, UsageError
from hpcai_cli.run import Run, read_json
from hpcai_cli.signals import StopRequest

LOOK_SECONDS = 0.1
"""How often the trainings are looked at."""
HOPELESS = 3
"""Trials that fail, all from the first, end the study."""
ENDING_SECONDS = 60
"""For a training that was asked to stop; then it is killed, and resumed from an older checkpoint."""
WARM = "from"
"""Attribute of a trial that was not trained here."""


@dataclass
class Training:
    """One trial, and the process that works at it."""

    trial: optuna.Trial
    slot: int
    """Which share of the cores and GPUs is its."""
    claim: int
    """Descriptor of its lock."""
    run: Run
    command: list[object]
    process: subprocess.Popen | None = None
    read: int = 0
    """Bytes of events.jsonl."""
    epoch: int = 0
    value: float | None = None
    """The first objective after the newest epoch."""
    is_own: bool = False
    """Whether these are the recipe's own settings. They are not pruned: what begins with them ends no worse."""
    is_pruned: bool = False
    stopped: float = 0.0
    """When it was asked to stop, by time.monotonic(); 0 if it was not."""
    settings: dict[str, str] = field(default_factory=dict)


def train_command(plan: Plan, settings: Mapping[str, str]) -> list[object]:
    """Return the words that train with these settings, but for where."""
    pairs = [f"{name}={text}" for name, text in (plan.settings | dict(settings)).items()]
    return [launch.beside("hpcai"), "train", plan.reference, "--data", plan.data, "--json", "--keep-checkpoints", 1,
            *(["--np", plan.np] if plan.np > 1 else []), *(word for pair in pairs for word in ("--set", pair))]


class Trials:
    """Works on a study until its budget is spent, beside other processes that may do the same.

    Args:
        workers: trials at a time here.
        budget: trials of the study in all; None for as many as there is time for.
        show: called with the trainings that run, whenever something may have changed.
        tell: called with each trial that is over, and what happened.
    """

    def __init__(self, study: Study, *, workers: int, budget: int | None, stop: StopRequest,
                 show: Callable[[Iterable[Progress]], None], tell: Callable[[optuna.trial.FrozenTrial, str], None]):
        self._study, self._record, self._plan = study, study.record, study.plan
        self._slots, self._budget, self._stop, self._show, self._tell = slots.Slots(
            workers, study.plan.np), budget, stop, show, tell
        self._running: list[Training] = []
        self._is_one_ending = False

    def work(self) -> None:
        """Train until nothing is left to do or the stop was asked for.

        Raises:
            HpcaiError: every trial fails.
        """
        try:
            while not self._stop.received:
                if any([self._follow(training) for training in list(self._running)]):
                    self._end_if_hopeless()
                while len(self._running) < self._slots.count and not self._stop.received and self._begin():
                    pass
                self._show(map(self._progress, self._running))
                if not self._running and not self._is_one_ending and self._is_spent():
                    return
                time.sleep(LOOK_SECONDS)
        finally:
            self._end_all()

    # ---- What comes next -------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Take up a trial that nobody works at, or a new one; return whether there was one."""
        slot = self._slots.free([each.slot for each in self._running])
        # One process at a time: none may take what another one is just taking, or one trial too many.
        with self._study.turn():
            training = self._orphan(slot) or self._new(slot)
        if training:
            self._running.append(training)
            self._start(training)
        return training is not None

    def _orphan(self, slot: int) -> Training | None:
        """Take up a trial whose search was killed, when its training has ended."""
        mine, self._is_one_ending = {each.trial.number for each in self._running}, False
        for frozen in self._record.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if frozen.number in mine or (claim := self._claimed(frozen.number)) is None:
                continue
            run = Run(self._study.run_of(frozen.number))
            if slots.is_being_trained(run):
                self._is_one_ending = True
                os.close(claim)
                continue
            trial = optuna.Trial(self._record, frozen._trial_id)
            training = self._training(trial, slot, claim, run)
            training.epoch = max(frozen.intermediate_values, default=0)
            return training
        return None

    def _new(self, slot: int) -> Training | None:
        if self._is_spent():
            return None
        trial = self._record.ask()
        run = Run(self._study.run_of(trial.number))
        return self._training(trial, slot, self._claimed(trial.number), run)

    def _is_spent(self) -> bool:
        trials = [trial for trial in self._record.get_trials(deepcopy=False) if WARM not in trial.user_attrs]
        waiting = sum(trial.state == TrialState.WAITING for trial in trials)
        if self._plan.method == "grid" and not waiting:
            return True
        return self._budget is not None and len(trials) - waiting >= self._budget

    def _training(self, trial: optuna.Trial, slot: int, claim: int, run: Run) -> Training:
        settings = self._study.suggest(trial)
        plan = self._plan
        where = ["--resume", run.folder] if run.recipe_file.exists() else ["--output", run.folder]
        return Training(trial, slot, claim, run, [*train_command(plan, settings), *where],
                        is_own=trial.params in plan.own_points(), settings=settings)

    def _claimed(self, number: int) -> int | None:
        """Return the descriptor of a trial's lock, which ends with this process; None if another one holds it."""
        descriptor = os.open(self._study.trials / f".{number:04d}.claim", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def _start(self, training: Training) -> None:
        training.process = self._slots.start(training.slot, training.command, self._log_of(training.trial.number))

    def _log_of(self, number: int) -> Path:
        return self._study.trials / f"{number:04d}.log"

    def _progress(self, training: Training) -> Progress:
        return Progress(str(training.trial.number), training.epoch, self._epochs(training), training.value,
                        training.settings)

    def _epochs(self, training: Training) -> int:
        return int(training.settings.get("epochs", self._plan.recipe.epochs))

    # ---- What becomes of it ----------------------------------------------------------------------------------------

    def _follow(self, training: Training) -> bool:
        """Pass on what a training has told, prune it where that is due, and return whether it has ended."""
        code, lags = training.process.poll(), False
        for event in self._events(training):
            training.epoch, value = event["epoch"], self._plan.objectives[0].value_in(event)
            if value is None:
                continue
            training.value = value
            known = self._record.get_trials(deepcopy=False)[training.trial.number].intermediate_values
            # Optuna takes none where there are several objectives.
            if training.epoch not in known and len(self._plan.objectives) == 1:
                training.trial.report(training.value, step=training.epoch)
            # Asked of all, also of those that go on: it keeps the record of the rungs.
            if self._plan.pruner != "none" and not training.stopped and training.trial.should_prune():
                lags = True
        # One that has trained all its epochs, as a short one may between two looks, has nothing left to save.
        if lags and not training.is_own and training.epoch < self._epochs(training):
            training.is_pruned = True
            self._ask_to_stop(training)
        if training.stopped and code is None and time.monotonic() - training.stopped > ENDING_SECONDS:
            training.process.kill()
        if code is not None:
            self._running.remove(training)
            self._finish(training, code)
            os.close(training.claim)
        return code is not None

    def _events(self, training: Training) -> list[dict]:
        """Return the epochs that have ended since the last look."""
        try:
            with training.run.events_file.open("rb") as stream:
                stream.seek(training.read)
                new = stream.read()
        except OSError:
            return []
        whole = new[:new.rfind(b"\n") + 1]
        training.read += len(whole)
        return slots.epochs(whole)

    def _ask_to_stop(self, training: Training) -> None:
        if not training.stopped and training.process.poll() is None:
            training.stopped = time.monotonic()
            training.process.send_signal(signal.SIGTERM)

    def _finish(self, training: Training, code: int) -> None:
        """Tell Optuna how a training ended."""
        if code == 0:
            self._complete(training)
        elif training.is_pruned and slots.was_stopped(code):
            self._end(training, TrialState.PRUNED, f"pruned after epoch {training.epoch}")
        elif slots.was_stopped(code) or training.stopped:
            # It was interrupted, and is taken up again where it was.
            return
        else:
            cause = slots.cause(code, training.run.failure_file, self._log_of(training.trial.number))
            self._end(training, TrialState.FAIL, cause, exit_code=code)

    def _complete(self, training: Training) -> None:
        document = read_json(training.run.result_file)
        metrics = document["metrics"] | {"parameters": document.get("parameters")}
        if any(objective.name == "latency_ms" for objective in self._plan.objectives):
            metrics["latency_ms"] = self._latency_ms(training)
        values = []
        for objective in self._plan.objectives:
            value = objective.value_in(metrics)
            if value is None:
                raise UsageError(f"a training has no {objective.name}", received=str(objective),
                                 expected=f"one of {', '.join(sorted(map(str, metrics)))}")
            values.append(value)
        self._end(training, TrialState.COMPLETE, "", values=values)

    def _latency_ms(self, training: Training) -> float:
        """Return the median time of a call with one example, by `hpcai benchmark inference`, on this trial's cores."""
        command = [launch.beside("hpcai"), "benchmark", "inference", training.run.folder, "--data", self._plan.data,
                   "--formats", "function", "--batch-sizes", 1, "--threads", self._slots.cores, "--json"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False,
                              env=launch.without_launcher())
        if done.returncode != 0:
            raise HpcaiError(f"the latency of {training.run.folder} could not be measured",
                             received=(done.stderr.strip().splitlines() or ["no word"])[-1])
        figures = json.loads(done.stdout)["figures"]
        return next(float(row["value"]) for row in figures if row["name"].endswith("batch of 1: p50"))

    def _end(self, training: Training, state: TrialState, happened: str, *, values: list[float] | None = None,
             exit_code: int = 0) -> None:
        trial = training.trial
        if happened:
            trial.set_user_attr("happened", happened)
        if exit_code:
            trial.set_user_attr("exit_code", exit_code)
        self._record.tell(trial, values, state=state)
        self._tell(self._record.get_trials(deepcopy=False)[trial.number], happened)

    def _end_if_hopeless(self) -> None:
        ended = [trial for trial in self._record.get_trials(deepcopy=False)
                 if trial.state in DONE and WARM not in trial.user_attrs]
        if len(ended) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in ended):
            cause = ended[-1].user_attrs.get("happened", "")
            codes = {trial.user_attrs.get("exit_code") for trial in ended}
            error = HpcaiError(f"all of {len(ended)} trials have failed, the last of them so: {cause}",
                               mend=f"see {self._log_of(ended[-1].number)}")
            if len(codes) == 1 and (code := codes.pop()) in (2, 3, 4, 6):
                error.exit_code = code
            raise error

    def _end_all(self) -> None:
        """Have what still runs save itself, to be taken up another time."""
        for training in self._running:
            self._ask_to_stop(training)
        while self._running:
            for training in list(self._running):
                self._follow(training)
            time.sleep(LOOK_SECONDS)
