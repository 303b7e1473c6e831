"""What was trained before, as trials that a search learns from."""

from pathlib import Path

import optuna
from optuna.trial import TrialState

from hpcai_cli import console
from hpcai_cli.engine.tuning.distributions import distribution_of
from hpcai_cli.engine.tuning.study import Study
from hpcai_cli.engine.tuning.trials import WARM
from hpcai_cli.errors import DataError
from hpcai_cli.run import Run, read_json


def learn(study: Study, path: Path) -> None:
    """Add a run, or all runs of a study, to a study that has not got them yet.

    Raises:
        DataError: it is neither, or was trained on other data.
    """
    folders = [path] if not (path / "study.json").is_file() else sorted(
        folder for folder in (path / "trials").iterdir() if (folder / "result.json").is_file())
    known = {trial.user_attrs.get(WARM) for trial in study.record.get_trials(deepcopy=False)}
    added = 0
    for folder in folders:
        name = str(folder.resolve())
        if name not in known and (trial := _trial(study, Run.open(folder), name)):
            study.record.add_trial(trial)
            added += 1
    console.note(f"{path}: {added} of {len(folders)} runs to learn from")


def _trial(study: Study, run: Run, name: str) -> optuna.trial.FrozenTrial | None:
    """Return the trial that a run would have been, None where its settings are not of the search."""
    if run.manifest().get("data_fingerprint") != study.plan.fingerprint:
        raise DataError(f"{run.folder} was trained on other data, and its figures mean something else here",
                        expected=f"fingerprint {study.plan.fingerprint[:12]}",
                        received=str(run.manifest().get("data_fingerprint"))[:12])
    document = read_json(run.result_file)
    metrics = document["metrics"] | {"parameters": document.get("parameters")}
    values = [objective.value_in(metrics) for objective in study.plan.objectives]
    recipe = run.recipe()
    params, distributions = {}, {}
    for parameter in study.plan.space:
        if (value := parameter.value_of(recipe)) is None:
            return None
        params[parameter.name], distributions[parameter.name] = value, distribution_of(parameter)
    if None in values:
        return None
    return optuna.trial.create_trial(state=TrialState.COMPLETE, params=params, distributions=distributions,
                                     values=values, user_attrs={WARM: name})
