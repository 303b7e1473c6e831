"""hpcai evaluate: judge a model on held-out data."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, options, rank_processes
from hpcai_cli.errors import HpcaiError
from hpcai_cli.run import Run


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, or a compressed or "
                                          "exported model.")],
    data: options.Data = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    compare: Annotated[Path | None, typer.Option(metavar="MODEL", help="Another model to judge on the same "
                                                 "examples.")] = None,
    by: Annotated[str, typer.Option(metavar="COLUMN", help="Figures by the values of a table's column, or by "
                                    "`class`.")] = "",
    robustness: Annotated[bool, typer.Option("--robustness", help="Also judge it on noisy, blurred, brighter and "
                                             "JPEG-compressed pictures.")] = False,
    require: Annotated[list[str] | None, typer.Option(metavar="CONDITION", help="A condition such as accuracy>=0.99 "
                                                      "or, of an interval's lower end, accuracy_low>=0.99; exit code "
                                                      "5 when it does not hold. Repeatable.")] = None,
    like: options.Like = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the report goes; by default below "
                                                "the run's evaluation/.")] = None,
    np: options.Processes = 1,
    trust_model: options.TrustModel = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Judge a model on held-out data: figures with their intervals, curves, calibration, the hardest examples.

    Writes metrics.json, PNG files and report.html, one page that holds everything.

    Examples:
        $ hpcai evaluate runs/mnist-1
        $ hpcai evaluate runs/mnist-1 --data data/mnist.h5 --require "accuracy>=0.99" --robustness
        $ hpcai evaluate runs/mnist-2 --compare runs/mnist-1 --require "difference_low>=-0.005"
        $ hpcai evaluate runs/shoppers-1 --by VisitorType
        $ hpcai evaluate runs/mnist-1 --np 2 --json

    Next: hpcai predict MODEL FILES
    """
    from hpcai_cli.engine.reports import conditions

    required = tuple(conditions.parse(text) for text in require or [])
    for path in filter(None, (model, compare, like)):
        if not path.exists():
            # Says which runs there are, before anything is started.
            Run.open(path)
    launch.register()
    if np > 1:
        _evaluate_in_ranks(np, [str(model), "--split", split, *_words("--data", data), *_words("--compare", compare),
                                *_words("--by", by), *_words("--robustness", robustness),
                                *(word for text in require or [] for word in ("--require", text)),
                                *_words("--like", like), *_words("--output", output),
                                *_words("--trust-model", trust_model), *_words("--json", json)])
        return
    with console.quiet():
        from hpcai_cli.engine.reports import judging
    document = judging.evaluate(judging.Question(
        model, like, data, split, compare, by, robustness, output, trust_model, catalog.find, required))
    if json:
        console.result_json(document)
    else:
        _print(document)
    conditions.check(required, judging.figures(document), split)


def _words(option: str, value: object) -> list[str]:
    """Return an option as words of a command line, none where it was not given."""
    return [] if not value else [option] if value is True else [option, str(value)]


def _evaluate_in_ranks(np: int, arguments: list[str]) -> None:
    launch.require_horovod(np)
    outcome = rank_processes.run_ranks(np, ["evaluate", *arguments])
    if outcome.exit_code and not outcome.reported:
        raise HpcaiError("the ranks ended without a word of their own", mend="run it again with --verbose",
                         received=outcome.launcher_words)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _print(document: dict) -> None:
    from hpcai_cli.engine.reports import page

    console.table(f"{document['model']} on {document['examples']:,} examples of the {document['split']} split",
                  *page.metric_rows(document))
    if "classes" in document:
        columns = ("name", "precision", "recall", "f1", "support")
        console.table("By class", ("class", *columns[1:]), [tuple(row[name] for name in columns)
                                                            for row in document["classes"]])
    if "slices" in document:
        console.table(f"By {document['by']}", *page.slice_rows(document))
    if "robustness" in document:
        console.table("Under corruptions", *page.robustness_rows(document))
    if "comparison" in document:
        console.table(f"Against {document['comparison']['model']}", *page.comparison_rows(document))
        console.result(page.comparison_words(document["comparison"]))
    console.result(f"written: {document['folder']}/report.html, metrics.json and pictures")
