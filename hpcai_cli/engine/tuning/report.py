"""What a study has found, as figures, pictures and one HTML page."""

import io
import warnings
from collections.abc import Callable
from pathlib import Path

import optuna
from optuna.trial import TrialState

from hpcai_cli.engine.reports import page as pages
from hpcai_cli.engine.tuning.search import found
from hpcai_cli.engine.tuning.study import Study
from hpcai_cli.run import write_bytes

LEAST = 4
"""Trials without which neither importance nor contours mean anything."""
_CAPTIONS = {"history": "Each trial's value in turn, and the best so far.",
             "importance": "How much of the differences between the trials each parameter explains (fANOVA).",
             "contour": "The value over each pair of parameters.",
             "slices": "The value over each parameter.",
             "intermediate": "The value after each epoch, of each trial.",
             "front": "The trials by their objectives; of those on the front no other beats all."}


def show(folder: Path) -> dict:
    """Write a study's pictures and page into its folder, and return what was found.

    Raises:
        DataError: there is no study.
    """
    study = Study.open(folder)
    result = found(study)
    done = study.record.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not done:
        return result
    several = len(study.plan.objectives) > 1
    with warnings.catch_warnings():
        # Optuna's pictures are experimental, and say so each time.
        warnings.simplefilter("ignore")
        if len(done) >= LEAST and len(study.plan.space) > 1:
            result["importance"] = {name: float(share) for name, share in optuna.importance.get_param_importances(
                study.record, target=(lambda trial: trial.values[0]) if several else None).items()}
        pictures = _pictures(study, len(done), several=several, with_importance=bool(result["importance"]))
    for name, picture in pictures.items():
        write_bytes(folder / f"{name}.png", picture)
    result["page"] = str(folder / "report.html")
    write_bytes(folder / "report.html", _page(study, result, pictures).encode())
    return result


def _pictures(study: Study, count: int, *, several: bool, with_importance: bool) -> dict[str, bytes]:
    import matplotlib

    matplotlib.use("Agg")
    drawings = optuna.visualization.matplotlib
    first = study.plan.objectives[0].name
    target = {"target": lambda trial: trial.values[0], "target_name": first} if several else {"target_name": first}
    makers: dict[str, Callable] = {"history": lambda: drawings.plot_optimization_history(study.record, **target)}
    if several:
        if len(study.plan.objectives) <= 3:
            makers["front"] = lambda: drawings.plot_pareto_front(
                study.record, target_names=[objective.name for objective in study.plan.objectives])
    else:
        makers["intermediate"] = lambda: drawings.plot_intermediate_values(study.record)
    makers["slices"] = lambda: drawings.plot_slice(study.record, **target)
    if with_importance:
        makers["importance"] = lambda: drawings.plot_param_importances(study.record, **target)
    if count >= LEAST and len(study.plan.space) > 1:
        makers["contour"] = lambda: drawings.plot_contour(study.record, **target)
    return {name: _png(make) for name, make in makers.items()}


def _png(make: Callable) -> bytes:
    import numpy as np
    from matplotlib import pyplot

    axes = make()
    figure = np.ravel(axes)[0].figure
    side = max(1, round(np.size(axes)**0.5))
    figure.set_size_inches(max(8, 3 * side), max(4.5, 2.6 * side) if side > 1 else 4.5)
    content = io.BytesIO()
    figure.savefig(content, dpi=110, bbox_inches="tight", format="png")
    pyplot.close(figure)
    return content.getvalue()


def _page(study: Study, result: dict, pictures: dict[str, bytes]) -> str:
    plan, text = study.plan, pages.text
    names = [parameter.name for parameter in plan.space]
    facts = {"recipe": plan.recipe.name, "data": plan.data, "method": plan.method, "pruner": plan.pruner,
             "trials": ", ".join(f"{count} {state}" for state, count in result["trials"].items()),
             "best": result["set"]} | {f"search {name}": values for name, values in result["search"].items()}
    rows = [(trial.number, trial.state.name.lower(), *(trial.values or [""] * len(plan.objectives)),
             *(trial.params.get(name, "") for name in names), trial.user_attrs.get("happened", ""))
            for trial in sorted(study.record.get_trials(deepcopy=False), key=lambda trial: _rank(study, trial))]
    parts = [f"<h1>{text(f'Study {study.folder}')}</h1>", *pages.fact_list(facts)]
    parts += [pages.figure(picture, _CAPTIONS[name]) for name, picture in pictures.items()]
    parts += pages.table("Trials, the best first", ("trial", "state", *result["objectives"], *names, "what happened"),
                         rows)
    return pages.whole(f"Study {study.folder}", parts, "Written by hpcai tune show.")


def _rank(study: Study, trial: optuna.trial.FrozenTrial) -> float:
    if trial.state != TrialState.COMPLETE:
        return float("inf")
    return -trial.values[0] if study.plan.objectives[0].is_maximized else trial.values[0]
