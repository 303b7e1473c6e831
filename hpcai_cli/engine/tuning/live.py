"""What a search shows while it runs: a table on a terminal, lines in a log."""

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from optuna.trial import FrozenTrial, TrialState

from hpcai_cli import console
from hpcai_cli.console import format_value
from hpcai_cli.engine.tuning.study import DONE, Study

ROWS = 8
"""Of the trials that are over, the best."""
_REDRAW_SECONDS = 0.5


@dataclass(frozen=True)
class Progress:
    """How far a training that runs has come."""

    name: str
    epoch: int
    epochs: int
    value: float | None
    """The first objective after that epoch."""
    settings: Mapping[str, str]


class Live:
    """Shows a study's trials.

    Args:
        budget: trials in all; None where only time ends it.
        seconds: that it may take; None for as many as it needs.
    """

    def __init__(self, study: Study, budget: int | None, seconds: float | None):
        self._study, self._budget, self._seconds = study, budget, seconds
        self._started, self._drawn = time.monotonic(), 0.0
        self._already = self._over()
        self._live = None

    def __enter__(self) -> "Live":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live as RichLive

            self._live = RichLive(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._live:
            self._live.__exit__(kind, error, trace)

    def tell(self, trial: FrozenTrial, happened: str) -> None:
        """Tell of a trial that is over."""
        params = ", ".join(f"{name}={format_value(value)}" for name, value in trial.params.items())
        if trial.state == TrialState.COMPLETE:
            figures = ", ".join(f"{objective.name} {value:.4f}" for objective, value in zip(
                self._study.plan.objectives, trial.values, strict=True))
            best = " (best)" if trial.number in [each.number for each in self._study.best()] else ""
            line = f"trial {trial.number}: {figures}{best}; {params}"
        else:
            line = f"trial {trial.number}: {happened or trial.state.name.lower()}; {params}"
        if self._live:
            self._live.console.print(line, highlight=False, markup=False)
        else:
            console.note(f"{line}; {self._left()}")

    def show(self, running: Iterable[Progress]) -> None:
        """Draw the table anew, on a terminal and now and then; only then is it asked what runs."""
        if self._live and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._live.update(self._table(running), refresh=True)

    def _table(self, running: Iterable[Progress]):
        from rich.box import SIMPLE
        from rich.table import Table

        objectives, names = self._study.plan.objectives, [each.name for each in self._study.plan.space]
        table = Table(box=SIMPLE, title=f"{self._study.folder}: {self._left()}")
        for name in ("trial", "epoch", *(objective.name for objective in objectives), *names):
            table.add_column(name, justify="right")
        done = [each for each in self._study.record.get_trials(deepcopy=False) if each.state == TrialState.COMPLETE]
        done.sort(key=lambda each: each.values[0], reverse=objectives[0].is_maximized)
        for each in done[:ROWS]:
            table.add_row(str(each.number), "", *(f"{value:.4f}" for value in each.values),
                          *(format_value(each.params.get(name, "")) for name in names))
        for each in running:
            value = "" if each.value is None else f"{each.value:.4f}"
            table.add_row(each.name, f"{each.epoch}/{each.epochs}", value,
                          *[""] * (len(objectives) - 1), *(each.settings[name] for name in names), style="dim")
        return table

    def _over(self) -> int:
        return sum(trial.state in DONE for trial in self._study.record.get_trials(deepcopy=False))

    def _left(self) -> str:
        over, seconds = self._over(), time.monotonic() - self._started
        text = f"{over} of {self._budget} trials" if self._budget else f"{over} trials"
        left = [] if self._seconds is None else [max(0.0, self._seconds - seconds)]
        if self._budget and over > self._already:
            left.append((self._budget - over) * seconds / (over - self._already))
        if left:
            text += f", {min(left) / 60:.0f} min left" if min(left) >= 90 else f", {min(left):.0f} s left"
        return text
