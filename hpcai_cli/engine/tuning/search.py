"""A search from what was asked for to its result: the plan, the trials, what was found."""

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from hpcai_cli import console
from hpcai_cli.engine import job, machine
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.tuning import trials as trainings
from hpcai_cli.engine.tuning import warm_start as before
from hpcai_cli.engine.tuning.live import Live
from hpcai_cli.engine.tuning.population import RUN, Population
from hpcai_cli.engine.tuning.study import METHODS, PRUNERS, Objective, Plan, Study
from hpcai_cli.errors import StoppedEarly, UsageError
from hpcai_cli.search_space import as_text, grid, parse
from hpcai_cli.signals import StopRequest
from hpcai_cli.time_limit import TimeLimit

BUDGET = "--trials N or --max-time TIME"


def search(request: job.Request, settings: Mapping[str, str], *, pairs: Mapping[str, str], objectives: Sequence[str],
           method: str, pruner: str, seed: int, np: int, workers: int | None, budget: int | None,
           seconds: float | None, folder: Path | None, storage: str | None, warm_start: Sequence[Path], members: int,
           interval: int) -> dict:
    """Work on a study until its budget is spent, and return what was found.

    Args:
        request: a training with what is the same in all trials.
        settings: what of it was set, as text.
        pairs: the search space, as text by name; empty for the recipe's.
        budget: trials of the study.
        folder: the study's; None for the next free one.
        warm_start: runs and studies whose results are learned from.
        members, interval: of a population, and the epochs between its comparisons.

    Raises:
        UsageError: what was asked for cannot be, all of it before anything starts.
        StoppedEarly: a signal or the time limit came first.
        HpcaiError: all trials fail.
    """
    plan = _plan(request, settings, pairs=pairs, objectives=objectives, method=method, pruner=pruner, seed=seed, np=np)
    if method == "population" and (budget is not None or warm_start):
        raise UsageError("a population trains its members to the end, and begins with its own",
                         expected="no --trials and no --warm-start with it")
    if budget is None and seconds is None and method not in ("grid", "population"):
        raise UsageError("a search needs a budget", expected=BUDGET)
    study = Study.begin(folder or _next_folder(plan.recipe.name), plan, storage)
    for path in warm_start:
        before.learn(study, path)
    limit = TimeLimit(seconds)
    limit.saving = 5.0
    count = workers or max(1, len(machine.usable_gpus()) // np)
    console.note(f"{study.folder}: {', '.join(map(str, plan.objectives))} of {plan.recipe.name} on {plan.data}, "
                 f"{count} at a time by {method}" + ("" if pruner == "none" else f", pruned by {pruner}"))
    total = budget
    if method == "population":
        total = members * math.ceil(plan.recipe.epochs / interval)
    elif method == "grid":
        points = len(grid(plan.space))
        total = min(points, budget or points)
    with StopRequest() as stop, limit.watching(stop), Live(study, total, seconds) as live:
        if method == "population":
            Population(study, members=members, interval=interval, workers=count, stop=stop, show=live.show,
                       tell=live.tell).work()
        else:
            trainings.Trials(study, workers=count, budget=budget, stop=stop, show=live.show, tell=live.tell).work()
    result = found(study)
    if stop.received and not stop.received.startswith("the time limit (--max-time"):
        raise StoppedEarly(f"stopped by {stop.received}; the study goes on when the same command is given again",
                           mend=f"see what there is with `hpcai tune show {study.folder}`")
    return result


def _plan(request: job.Request, settings: Mapping[str, str], *, pairs: Mapping[str, str], objectives: Sequence[str],
          method: str, pruner: str, seed: int, np: int) -> Plan:
    for option, value, known in (("--method", method, METHODS), ("--pruner", pruner, PRUNERS)):
        if value not in known:
            raise UsageError(f"{option} is unknown", expected=f"one of {', '.join(known)}", received=value)
    file = job.data_of(request)
    dataset = Dataset(file)
    recipe = job.fitted(request.recipe, dataset)
    space = parse(pairs or dict(recipe.search), recipe)
    if not space:
        raise UsageError(f"recipe {recipe.name} names nothing to search", mend="add --search NAME=LOW:HIGH",
                         expected="something to try")
    if both := sorted({name.replace("-", "_") for name in settings} & {parameter.name for parameter in space}):
        raise UsageError(f"{both[0]} is both set and searched", expected="one of them")
    if "validation" not in dataset.splits:
        raise UsageError("a search chooses by the validation split, which the data lack", received=str(file),
                         mend=f"run `hpcai preprocess {recipe.name} --set validation_fraction=0.1`")
    chosen = tuple(map(Objective.parse, objectives)) or (Objective.parse(recipe.best_by),)
    if len({objective.name for objective in chosen}) < len(chosen):
        raise UsageError("an objective is given twice", received=", ".join(objectives))
    if len(chosen) > 1 and (pruner != "none" or method in ("cmaes", "population")):
        raise UsageError("with several objectives no trial is behind another while they train",
                         expected="--pruner none, and neither cmaes nor population")
    if method == "population" and pruner != "none":
        raise UsageError("a population goes on from its best members in place of ending the worst",
                         expected="--pruner none")
    if method == "grid":
        grid(space)
    if method == "cmaes" and (len(space) < 2 or any(parameter.kind == "choice" for parameter in space)):
        raise UsageError("cmaes searches at least two ranges of numbers", expected="--search NAME=LOW:HIGH of each",
                         received=", ".join(f"{each.name}={each.text}" for each in space))
    return Plan(request.reference, recipe, dict(settings), str(file), dataset.fingerprint, space, chosen, method,
                pruner, seed, np)


def _next_folder(name: str) -> Path:
    taken = [int(match[1]) for entry in Path("studies").glob(f"{name}-*")
             if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))]
    return Path("studies") / f"{name}-{max(taken, default=0) + 1}"


def found(study: Study) -> dict:
    """Return the result so far, and write best.json."""
    frozen = study.record.get_trials(deepcopy=False)
    states = Counter(trial.state for trial in frozen)
    best = study.write_best()
    plan = study.plan
    rows = [_row(study, trial) for trial in study.best()]
    return {"schema": "hpcai.tune/1", "command": "tune", "study": str(study.folder), "recipe": plan.reference,
            "data": plan.data, "objectives": [objective.name for objective in plan.objectives],
            "search": {parameter.name: parameter.text for parameter in plan.space},
            "trials": {state.name.lower(): states[state] for state in TrialState if states[state]},
            "metrics": dict(zip((objective.name for objective in plan.objectives), rows[0]["values"], strict=True))
            if rows else {},
            "best": rows,
            "failed": [{"number": trial.number, "cause": trial.user_attrs.get("happened", "")} for trial in frozen
                       if trial.state == TrialState.FAIL],
            "set": " ".join(f"--set {name}={as_text(value)}" for name, value in (best or {}).items()),
            "importance": {}, "page": "", "next": _next(study, rows) if rows else []}


def _next(study: Study, best: list[dict]) -> list[str]:
    """Return the commands that take the best from here to a model for users."""
    plan, run, train = study.plan, study.folder / "best", []
    if plan.method == "population":
        # Its settings changed while it was trained: nothing would train it again.
        run = best[0]["run"]
    else:
        ranks = ["--np", plan.np] if plan.np > 1 else []
        train = [["train", plan.reference, "--data", plan.data, "--from", study.best_file, "--output", run, *ranks]]
    commands = [*train, ["evaluate", run], ["compress", run, "--quantize", "int8"], ["deploy", "export", run]]
    return [shlex.join(["hpcai", *map(str, words)]) for words in commands]


def _row(study: Study, trial: FrozenTrial) -> dict:
    run = trial.user_attrs.get(trainings.WARM) or trial.user_attrs.get(RUN) or str(study.run_of(trial.number))
    return {"number": trial.number, "values": list(trial.values), "params": trial.params, "run": run}
