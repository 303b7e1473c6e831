"""A study: its folder, what it searches, and Optuna's record of what was tried."""

import contextlib
import math
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import TrialState

from hpcai_cli.engine.tuning.journal import JournalLock
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import read_json, write_json
from hpcai_cli.search_space import Parameter, as_text, grid, parse

SCHEMA = "hpcai.study/1"
METHODS = ("tpe", "random", "grid", "cmaes", "population")
PRUNERS = ("none", "asha", "hyperband")
DONE = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
GENERATION = "generation"
"""Attribute of a trial: how many comparisons of a population came before."""
STARTUP = 5
"""Trials that TPE draws at random before it learns from them; Optuna's default of 10 is half of a small budget."""
GOOD = 0.25
"""Share of the trials near which TPE looks on; of 20 trials Optuna's tenth are two."""


@dataclass(frozen=True)
class Objective:
    """A figure that is to become small or large."""

    name: str
    is_maximized: bool

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Read `accuracy`, `validation_loss:min`.

        Raises:
            UsageError: the direction is none.
        """
        name, _, direction = text.partition(":")
        small = name.endswith(("loss", "error", "seconds", "parameters", "latency_ms", "brier"))
        if direction not in ("", "min", "max"):
            raise UsageError("cannot read --objective", expected="NAME, NAME:min or NAME:max", received=text)
        return cls(name, direction == "max" if direction else not small)

    def value_in(self, figures: Mapping[str, object]) -> float | None:
        """Return the figure among those of an epoch or of a run, of which the validation's counts; None without it."""
        value = figures.get(f"validation_{self.name}", figures.get(self.name))
        return float(value) if isinstance(value, (int, float)) else None

    @property
    def direction(self) -> str:
        """As Optuna says it."""
        return "maximize" if self.is_maximized else "minimize"

    def __str__(self) -> str:
        return f"{self.name}:{'max' if self.is_maximized else 'min'}"


@dataclass(frozen=True)
class Plan:
    """What makes a study that one and no other; all processes that work on it agree on it."""

    reference: str
    """What finds the recipe again."""
    recipe: Recipe
    """With what is the same in all trials."""
    settings: dict[str, str]
    """What was set for all trials, as `--set` takes it."""
    data: str
    fingerprint: str
    space: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    method: str
    pruner: str
    seed: int
    np: int = 1
    """Ranks of a trial."""

    def to_json(self) -> dict:
        """Return it as plain JSON values."""
        return {"schema": SCHEMA, "recipe_reference": self.reference, "recipe": self.recipe.to_json(),
                "settings": self.settings, "data": self.data, "data_fingerprint": self.fingerprint,
                "search": {parameter.name: parameter.text for parameter in self.space},
                "objectives": list(map(str, self.objectives)), "method": self.method, "pruner": self.pruner,
                "seed": self.seed, "np": self.np}

    def own_points(self) -> list[dict[str, object]]:
        """Return the recipe's own settings, which a search begins with; nothing where they are not in its space."""
        values = {parameter.name: parameter.value_of(self.recipe) for parameter in self.space}
        return [] if None in values.values() else [values]

    @classmethod
    def from_json(cls, document: dict, *, where: str) -> "Plan":
        """Read what `to_json` gave.

        Raises:
            DataError: it is something else.
        """
        try:
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']}")
            recipe = Recipe.from_json(document["recipe"], where=where)
            return cls(str(document["recipe_reference"]), recipe, dict(document["settings"]), str(document["data"]),
                       str(document["data_fingerprint"]), parse(document["search"], recipe),
                       tuple(map(Objective.parse, document["objectives"])), str(document["method"]),
                       str(document["pruner"]), int(document["seed"]), int(document["np"]))
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise DataError(f"{where} holds no study", expected="what `hpcai tune` writes",
                            received=f"{type(error).__name__}: {error}") from None


class Study:
    """The folder of a study, on which several processes of several hosts may work at once.

    Attributes:
        record: Optuna's.
        trials: folder of the runs, one for each trial, by its number.
    """

    def __init__(self, folder: Path, plan: Plan, name: str, storage: str | None):
        self.folder, self.plan, self.trials = folder, plan, folder / "trials"
        self.best_file = folder / "best.json"
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.record = optuna.create_study(
                storage=_storage(folder, storage), study_name=name, load_if_exists=True,
                directions=[objective.direction for objective in plan.objectives], pruner=_pruner(plan))
        # A process that comes later must not draw again what an earlier one has drawn.
        taken = len(self.record.get_trials(deepcopy=False))
        self.record.sampler = _sampler(plan, plan.seed + 1_000_003 * taken)

    @classmethod
    def begin(cls, folder: Path, plan: Plan, storage: str | None) -> "Study":
        """Make the study in a folder, or go on with the one that is there.

        Raises:
            UsageError: another one is there, or something else.
        """
        file = folder / "study.json"
        if not file.exists():
            if folder.exists() and any(entry.name != "trials" and not entry.name.startswith(".")
                                       for entry in folder.iterdir()):
                raise UsageError("the folder holds something that is no study", expected="a new one, or a study's",
                                 received=str(folder))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "trials").mkdir(exist_ok=True)
            _write_once(file, plan.to_json() | {"name": f"{folder.name}-{secrets.token_hex(4)}", "storage": storage})
        document = read_json(file)
        there = Plan.from_json(document, where=str(file)).to_json()
        wanted = plan.to_json()
        if differing := [key for key, value in wanted.items() if there[key] != value]:
            raise UsageError(f"the study in {folder} has another {', '.join(differing)}",
                             expected="the same as when it began", mend="give another --study",
                             received=wanted[differing[0]])
        if storage and storage != document["storage"]:
            raise UsageError(f"the study in {folder} is recorded elsewhere", expected=str(document["storage"]),
                             received=storage)
        made = cls(folder, plan, str(document["name"]), document["storage"])
        if plan.method == "grid":
            made._enqueue(grid(plan.space))
        elif plan.method in ("tpe", "cmaes"):
            made._enqueue(plan.own_points())
        return made

    @classmethod
    def open(cls, folder: Path) -> "Study":
        """Open the study of a folder.

        Raises:
            DataError: there is none.
        """
        file = folder / "study.json"
        if not file.is_file():
            raise DataError("not a study's folder", expected="a folder with a study.json in it",
                            mend="run `hpcai tune RECIPE` first", received=str(folder))
        document = read_json(file)
        return cls(folder, Plan.from_json(document, where=str(file)), str(document.get("name")),
                   document.get("storage"))

    def _enqueue(self, points: Sequence[dict[str, object]]) -> None:
        """Have these tried before all others, in a study that is new."""
        with self.turn():
            if not self.record.get_trials(deepcopy=False):
                for point in points:
                    self.record.enqueue_trial(point)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Be the only process, of those that work on the study, that is in such a block."""
        lock = JournalLock(self.folder / ".turn")
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def suggest(self, trial: optuna.Trial) -> dict[str, str]:
        """Return a trial's settings, as `--set` takes them."""
        found = {}
        for each in self.plan.space:
            if each.kind == "choice":
                value = trial.suggest_categorical(each.name, each.choices)
            elif each.kind == "int":
                value = trial.suggest_int(each.name, each.low, each.high, log=each.log)
            else:
                value = trial.suggest_float(each.name, each.low, each.high, log=each.log)
            found[each.name] = as_text(value)
        return found

    def best(self) -> list[optuna.trial.FrozenTrial]:
        """Return the best trial, or with several objectives those that no other beats in all; none before the first.

        Of a population it is the best member as it is now.
        """
        done = [trial for trial in self.record.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
        if done and self.plan.method == "population":
            newest = max(trial.user_attrs[GENERATION] for trial in done)
            last = [trial for trial in done if trial.user_attrs[GENERATION] == newest]
            return sorted(last, key=lambda trial: trial.value, reverse=self.plan.objectives[0].is_maximized)[:1]
        return sorted(self.record.best_trials, key=lambda trial: trial.number) if done else []

    def write_best(self) -> dict | None:
        """Write best.json, which `hpcai train --from` takes, and return it; of several objectives the first counts."""
        front = self.best()
        if not front:
            return None
        first = self.plan.objectives[0]
        trial = sorted(front, key=lambda trial: trial.values[0], reverse=first.is_maximized)[0]
        document = self.plan.settings | trial.params
        if not self.best_file.exists() or read_json(self.best_file) != document:
            write_json(self.best_file, document)
        return document

    def run_of(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.trials / f"{number:04d}"


def _write_once(file: Path, document: dict) -> None:
    """Write a file unless another process has been quicker."""
    mine = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    write_json(mine, document)
    try:
        os.link(mine, file)
    except FileExistsError:
        pass
    finally:
        mine.unlink()


def _storage(folder: Path, address: str | None):
    if address:
        try:
            return optuna.storages.RDBStorage(address)
        # Whatever SQLAlchemy and the database's own package raise.
        except Exception as error:
            raise UsageError(f"cannot keep the record there: {str(error).splitlines()[0]}", received=address,
                             expected="an address of SQLAlchemy, such as sqlite:///record.db") from None
    journal = folder / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=JournalLock(journal))
    return optuna.storages.JournalStorage(backend)


def _sampler(plan: Plan, seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # For gamma, which Optuna 5 deprecates and Optuna 6 will lack.
        warnings.simplefilter("ignore", FutureWarning)
        if plan.method == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if plan.method == "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=STARTUP, multivariate=True, seed=seed,
                                              gamma=lambda count: math.ceil(GOOD * count))
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(plan: Plan) -> optuna.pruners.BasePruner:
    if plan.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if plan.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=plan.recipe.epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()
