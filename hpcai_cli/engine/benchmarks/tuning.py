"""Tune: a search against random trials, what pruning saves, what a second worker brings, what a search itself takes."""

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from optuna.trial import TrialState

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, Table, interleaved, median, ratio
from hpcai_cli.engine.tuning.study import DONE, Study
from hpcai_cli.errors import HpcaiError

ROUNDS = 3
"""Of one worker against two."""
FEW = 6
"""Trials of each of these rounds, which differ in their learning rate alone and so take the same time."""
POINTS = 0.002
"""That a pruned search may stay behind: 0.2 points."""


@dataclass(frozen=True)
class _Searched:
    """What one study came to."""

    best: float
    drawn: float
    """The best of the trials that the method drew, without the recipe's own settings, which it may begin with."""
    epochs: int
    """That were trained, of all trials."""
    seconds: float
    trials: float
    """Seconds of the trials themselves, one after the other."""


def measure(recipe: str, data: Path, *, seeds: int, trials: int, search: Sequence[str], objective: str,
            workers: int) -> Iterator[Figure | Table]:
    """Search with each seed at random, by TPE, and by TPE with ASHA.

    Args:
        objective: a validation figure that is to become large.
        search: the space; empty takes the recipe's.
        workers: trials at a time, but for the first search of all: its time is compared with that of its trials.
    """
    with tempfile.TemporaryDirectory() as folder:
        searches = _Searches(recipe, data, search, objective, Path(folder))
        rows, found = [], {"random": [], "tpe": [], "asha": []}
        for seed in range(seeds):
            for name, words in (("random", ("--method", "random")), ("tpe", ()), ("asha", ("--pruner", "asha"))):
                count = workers if any(found.values()) else 1
                found[name].append(searches.search(trials, "--seed", str(seed), "--workers", str(count), *words))
            rows.append((seed, *(f"{found[name][-1].best:.4f}" for name in found),
                         f"{found['asha'][-1].epochs / found['tpe'][-1].epochs:.2f}"))
            console.note(f"seed {seed}: " + ", ".join(f"{name} {each[-1].best:.4f}" for name, each in found.items())
                         + f" in {rows[-1][-1]} of the epochs")
        title = f"{recipe}, {trials} trials"
        yield Table("tune", f"{title}: the best {objective} on the validation split",
                    ("seed", "random", "TPE", "TPE with ASHA", "of the epochs"), tuple(rows))
        pairs = list(zip(found["tpe"], found["random"], strict=True))
        yield Figure("tune", f"{title}: seeds with which TPE is better than random trials",
                     sum(tpe.best > random.best for tpe, random in pairs) / seeds, "share", limit=0.7)
        yield Figure("tune", f"{title}: seeds with which what TPE drew itself is better, without the recipe's own "
                     "settings", sum(tpe.drawn > random.best for tpe, random in pairs) / seeds, "share")
        yield median("tune", f"{title}: TPE minus random", [tpe.best - random.best for tpe, random in pairs], objective)
        yield median("tune", f"{title}: ASHA behind TPE without it", [
            whole.best - pruned.best for whole, pruned in zip(found["tpe"], found["asha"], strict=True)], objective,
            limit=POINTS, at_most=True)
        yield ratio("tune", f"{title}: epochs with ASHA", [float(each.epochs) for each in found["asha"]],
                    [float(each.epochs) for each in found["tpe"]], limit=0.4, at_most=True)
        yield ratio("tune", f"{title}: seconds of trials with ASHA, each with its start",
                    [each.trials for each in found["asha"]], [each.trials for each in found["tpe"]])
        first = found["random"][0]
        yield Figure("tune", f"{title}: time beside the trials", first.seconds / first.trials - 1, "share", limit=0.05,
                     at_most=True)
        if len(os.sched_getaffinity(0)) > 1:
            rates = interleaved(ROUNDS, one=lambda: searches.rate(1), two=lambda: searches.rate(2))
            yield ratio("tune", f"{recipe}: trials per hour of two workers on two cores against one on one",
                        rates["two"], rates["one"], limit=1.8)


class _Searches:
    """Runs `hpcai tune`, each time in a study of its own."""

    def __init__(self, recipe: str, data: Path, search: Sequence[str], objective: str, folder: Path):
        self._words = ["tune", recipe, "--data", str(data), "--objective", objective, "--json"]
        self._space = [word for pair in search for word in ("--search", pair)]
        self._folder, self._number = folder, 0

    def search(self, trials: int, *words: str, cores: int | None = None, space: Sequence[str] = ()) -> _Searched:
        """Search, and return what it came to."""
        self._number += 1
        folder = self._folder / str(self._number)
        some = sorted(os.sched_getaffinity(0))[:cores]
        started = time.monotonic()
        done = subprocess.run([PROGRAM, *self._words, *(space or self._space), "--trials", str(trials), "--study",
                               str(folder), *words],
                              capture_output=True, text=True, preexec_fn=lambda: os.sched_setaffinity(0, some))
        seconds = time.monotonic() - started
        if done.returncode != 0:
            raise HpcaiError("a search failed", received=(done.stderr.strip().splitlines() or ["no word"])[-1])
        study = Study.open(folder)
        ended = [each for each in study.record.get_trials(deepcopy=False) if each.state in DONE]
        epochs = sum(max(each.intermediate_values, default=0) for each in ended)
        best_first = sorted((each for each in ended if each.state == TrialState.COMPLETE),
                            key=lambda each: each.value, reverse=True)
        if not best_first:
            raise HpcaiError("no trial of a search came to its end", mend="search where the recipe learns")
        own = study.plan.own_points()
        drawn = next((each.value for each in best_first if each.params not in own), -math.inf)
        return _Searched(best_first[0].value, drawn, epochs, seconds,
                         sum(each.duration.total_seconds() for each in ended))

    def rate(self, workers: int) -> float:
        """Return trials per hour of so many workers, on a core each."""
        searched = self.search(FEW, "--method", "random", "--workers", str(workers), cores=workers,
                               space=("--search", "learning_rate=log:1e-4:1e-2"))
        return 3_600 * FEW / searched.seconds
