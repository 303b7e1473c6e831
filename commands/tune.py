"""hpcai tune: a recipe and a search space to its best settings within a budget."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, durations, launch, options
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.recipe import parse_assignments
from hpcai_cli.search_space import HOW

_SHOW = "show"


def tune(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|show", help="A name from `hpcai recipes list`, a recipe "
                                          "file, or `show` with a study.")],
    shown: Annotated[Path | None, typer.Argument(metavar="[STUDY]", help="The study to show.",
                                                 show_default=False)] = None,
    data: options.Data = None,
    trials: Annotated[int | None, typer.Option(min=1, metavar="N", help="Trials of the study in all.",
                                               show_default=False)] = None,
    max_time: Annotated[str | None, typer.Option(metavar="TIME", help="End before so much time has passed, such as 90m "
                                                 "or 2h; under Slurm its limit counts too.",
                                                 show_default=False)] = None,
    search: Annotated[list[str] | None, typer.Option(metavar="NAME=VALUES", help=f"What to try: {HOW}; repeatable. By "
                                                     "default what the recipe names.")] = None,
    objective: Annotated[list[str] | None, typer.Option(
        metavar="NAME[:min|max]", help="A validation figure of the training, or parameters, seconds or latency_ms; "
        "repeatable. By default what the recipe chooses its best epoch by.")] = None,
    method: Annotated[str, typer.Option(help="tpe or cmaes, which begin with the recipe's own settings; random; grid; "
                                        "or population: members that train side by side, the worst going on from the "
                                        "best with changed settings (arXiv 1711.09846).")] = "tpe",
    population: Annotated[int, typer.Option(min=2, metavar="N", help="Members of a population.")] = 8,
    interval: Annotated[int, typer.Option(min=1, metavar="EPOCHS", help="After which members are compared.")] = 1,
    pruner: Annotated[str, typer.Option(help="none, asha or hyperband: what ends trials early that lag.")] = "none",
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Trials at a time here; one for each GPU, or "
                                                "one, by default.", show_default=False)] = None,
    np: Annotated[int, typer.Option("--np", min=1, metavar="N", help="Processes of each trial.")] = 1,
    settings: options.Set = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set epochs=N.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the search; --set seed=N is the trainings'.")] = 0,
    warm_start: Annotated[list[Path] | None, typer.Option(metavar="RUN|STUDY", help="Learn from what was trained "
                                                          "before on the same data; repeatable.")] = None,
    study: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The study's folder, new or to go on with; "
                                               "studies/RECIPE-N by default. Several machines may work on one.",
                                               show_default=False)] = None,
    storage: Annotated[str | None, typer.Option(metavar="ADDRESS", help="A database for Optuna's record, such as "
                                                "postgresql://..., in place of a file in the study's folder.",
                                                show_default=False)] = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Find better settings of a recipe within a budget of trials or time.

    A study that was stopped or killed goes on when the same command is given again, and a trial that was interrupted
    from its checkpoint. Several of these commands, on any hosts that share the folder, work on one study.

    Examples:
        $ hpcai tune mnist-mlp --trials 20 --search learning_rate=log:1e-4:1e-1 --search batch_size=32,64,128
        $ hpcai tune mnist --data data/mnist.h5 --max-time 2h --search learning_rate=log:1e-4:1e-2 --pruner asha
        $ hpcai tune mnist-mlp --trials 20 --search learning_rate=1e-3,1e-2 --study studies/first --workers 2
        $ hpcai tune mnist --trials 30 --search width=4:32 --objective accuracy --objective latency_ms
        $ hpcai tune mnist-mlp --method population --population 8 --search learning_rate=log:1e-4:1e-1
        $ hpcai tune show studies/first

    Next: hpcai train RECIPE --from STUDY/best.json --output STUDY/best
    """
    if missing := [name for name in ("optuna", *(("cmaes",) if method == "cmaes" else ()))
                   if launch.missing_package(name)]:
        raise MissingError("hpcai tune needs a package that is not installed", received=missing[0],
                           mend="run `pip install 'hpcai[tune]'`")
    with console.quiet():
        from hpcai_cli.engine import job
        from hpcai_cli.engine.tuning import report
        from hpcai_cli.engine.tuning import search as searches
    if (recipe == _SHOW) != (shown is not None):
        raise UsageError("cannot tell what to tune", expected="`hpcai tune RECIPE` or `hpcai tune show STUDY`",
                         received=" ".join([recipe, *([str(shown)] if shown else [])]))
    if shown is not None:
        _print(report.show(shown), json)
        return
    entry = catalog.find(recipe)
    assignments = parse_assignments(settings or []) | ({"epochs": str(epochs)} if epochs is not None else {})
    source = entry.data_source()
    functions = map(entry.function, ("build_model", "augment", "final_augment", "adapt"))
    request = job.Request(entry.recipe.override(assignments), entry.reference, *functions, source.recipe,
                          source.function("sample"), data)
    result = searches.search(
        request, assignments, pairs=parse_assignments(search or [], what="--search"),
        objectives=objective or [], method=method, pruner=pruner, seed=seed, np=np, workers=workers, budget=trials,
        seconds=durations.seconds(max_time, what="--max-time") if max_time is not None else None, folder=study,
        storage=storage, warm_start=warm_start or [], members=population, interval=interval)
    _print(result, json)


def _print(result: dict, json: bool) -> None:
    if json:
        console.result_json(result)
        return
    names = list(result["search"])
    title = ", ".join(f"{count} {state}" for state, count in result["trials"].items() if count)
    console.table(f"{result['study']}: {title or 'no trials yet'}",
                  ("trial", *result["objectives"], *names),
                  [(each["number"], *each["values"], *(each["params"].get(name, "") for name in names))
                   for each in result["best"]])
    if result["importance"]:
        console.table("how much of the differences each explains (fANOVA)", ("parameter", "share"),
                      list(result["importance"].items()))
    if result["page"]:
        console.result(f"{result['page']}")
    if result["set"]:
        console.result(f"best: {result['set']}")
        console.result("next: " + "\n      ".join(result["next"]))
