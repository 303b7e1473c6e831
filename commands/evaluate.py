"""hpcai evaluate: judge a run on held-out data."""

import difflib
import operator
import re
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, options, rank_processes
from hpcai_cli.errors import DataError, GateError, HpcaiError, UsageError
from hpcai_cli.run import Run, write_json

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq}


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder from `hpcai train`.")],
    data: options.Data = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    require: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help="A condition such as accuracy>=0.99; "
                                                      "exit code 5 when it does not hold. Repeatable.")] = None,
    np: options.Processes = 1,
    trust_model: Annotated[bool, typer.Option("--trust-model", help="Load classes of your own from the model file; "
                                              "only for files that you made: they can run code.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Judge a run on held-out data: loss, accuracy, per-class figures, confusion matrix, calibration.

    Examples:
        $ hpcai evaluate runs/mnist-1
        $ hpcai evaluate runs/mnist-1 --data data/mnist.h5 --require "accuracy>=0.99"
        $ hpcai evaluate runs/mnist-1 --np 2 --json

    Next: hpcai predict RUN FILES
    """
    conditions = [_parse(text) for text in require or []]
    opened = Run.open(run)
    launch.register()
    if np > 1:
        _evaluate_in_ranks(np, opened, data, split, require or [], trust_model, json)
        return
    document = _evaluate_here(opened, data, split, trust_model, conditions)
    if json:
        console.result_json(document)
    else:
        _print(document)
    absent = [name for name, _, _ in conditions if name not in document["metrics"]]
    if absent:
        raise DataError(f"{', '.join(absent)} {'has' if len(absent) == 1 else 'have'} no value on the {split} split",
                        expected="labels that are not all the same", received=f"--require {conditions[0][0]}")
    failed = [f"{name} is {document['metrics'][name]:.6g} where {name}{sign}{bound:g} is required"
              for name, sign, bound in conditions if not _OPERATORS[sign](document["metrics"][name], bound)]
    if failed:
        error = GateError("; ".join(failed))
        error.collective = True
        raise error


def _parse(text: str) -> tuple[str, str, float]:
    match = re.fullmatch(r"\s*(\w+)\s*(>=|<=|==|>|<)\s*(\S+)\s*", text)
    try:
        return match[1], match[2], float(match[3])
    except (TypeError, ValueError):
        raise UsageError("cannot read --require", expected='a condition such as "accuracy>=0.99"',
                         received=text) from None


def _evaluate_in_ranks(np, run, data, split, require, trust_model, json) -> None:
    launch.require_horovod(np)
    arguments = ["evaluate", str(run.folder), "--split", split]
    arguments += ["--data", str(data)] if data else []
    arguments += [part for text in require for part in ("--require", text)]
    arguments += ["--trust-model"] if trust_model else []
    arguments += ["--json"] if json else []
    outcome = rank_processes.run_ranks(np, arguments)
    if outcome.exit_code and not outcome.reported:
        raise HpcaiError("the ranks ended without a word of their own", mend="run it again with --verbose",
                         received=outcome.launcher_words)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _evaluate_here(run: Run, data: Path | None, split_name: str, trust_model: bool, conditions) -> dict:
    manifest, recipe = run.manifest(), run.recipe()
    with console.quiet():
        from hpcai_cli.engine import distributed, evaluation, hardware, model_file
        from hpcai_cli.engine.store import Dataset, check_fits
        from hpcai_cli.engine.task import task_of

        ranks = distributed.start()
    _check_names(conditions, evaluation.metric_names(recipe))
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    dataset = Dataset(data or Path(manifest["data"]))
    recipe = check_fits(dataset, recipe, training=False)
    if list(dataset.class_names) != manifest.get("class_names"):
        raise DataError("the data file names other classes than the run was trained on",
                        expected=", ".join(manifest.get("class_names", [])), received=", ".join(dataset.class_names))
    split = dataset.split(split_name)
    if trust_model:
        # Classes of the user's own are registered by the module that defines them.
        catalog.find(manifest["recipe_reference"])
    model = model_file.load(run.model_file, trust=trust_model)
    with console.progress("evaluating", total=-(-len(split) // ranks.size),
                          unit="images" if recipe.inputs == "images" else "rows") as shown:
        scores = evaluation.scores_of(evaluation.forward(model, recipe), split, ranks,
                                      columns=task_of(recipe).columns, on_batch=shown.update)
    threshold = run.decision_threshold()
    document = {"schema": "hpcai.evaluate/1", "command": "evaluate", "run": str(run.folder),
                "data": str(dataset.path), "split": split_name, "examples": len(split),
                "decision_threshold": threshold, **evaluation.report(recipe, scores, split.labels, threshold)}

    def write() -> None:
        write_json(run.evaluation / "metrics.json", document)
        if "confusion" in document:
            evaluation.draw_confusion(document["confusion"], recipe.class_names, run.evaluation / "confusion.png")

    distributed.on_rank_zero(ranks, write)
    ranks.stop()
    return document


def _check_names(conditions, known: tuple[str, ...]) -> None:
    for name, sign, bound in conditions:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(f"--require knows no {name!r}{f', perhaps {near[0]!r}' if near else ''}",
                             expected=f"one of {', '.join(known)}", received=f"{name}{sign}{bound:g}")


def _print(document: dict) -> None:
    console.table(f"{document['run']} on {document['examples']:,} examples of the {document['split']} split",
                  ("metric", "value"), list(document["metrics"].items()))
    if "classes" in document:
        console.table("By class", ("class", "precision", "recall", "f1", "support"),
                      [tuple(row.values()) for row in document["classes"]])
    console.result(f"written: {document['run']}/evaluation/metrics.json"
                   + (", confusion.png" if "confusion" in document else ""))
