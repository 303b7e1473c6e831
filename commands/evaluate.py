"""hpcai evaluate: judge a model on held-out data."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, launch, options, rank_processes
from hpcai_cli.run import Run


@options.flattened
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
    np: options.Processes = None,
    where: options.Where = options.HERE,
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
    launch.announce()
    if ranks := where.ranks(np):
        given = {"--split": split, "--data": data, "--compare": compare, "--by": by, "--robustness": robustness,
                 "--require": require, "--like": like, "--output": output, "--trust-model": trust_model, "--json": json}
        rank_processes.run_command(ranks, ["evaluate", str(model), *options.words(given)],
                                   list(filter(None, (model, data, compare, like))))
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
