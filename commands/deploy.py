"""hpcai deploy: export a trained model, prove the export, bundle it, serve it, watch it."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import UsageError

deploy = typer.Typer(help="Export a model with proof, bundle it, serve it, watch it.", no_args_is_help=True)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Name = Annotated[str, typer.Option(help="Name of the model in addresses; by default the recipe's.")]
Into = Annotated[Path | None, typer.Option(metavar="FOLDER", help="Add it to a folder of models, as the next version "
                                           "FOLDER/NAME/1, 2, ..., which answers from then on.")]
Format = Annotated[str, typer.Option("--format", help="tflite, onnx, saved_model or keras; auto takes the one that "
                                     "answers soonest here.")]
Tolerance = Annotated[float, typer.Option(min=0.0, help="Largest difference of a probability (of a number: in standard "
                                          "deviations) with which an export is delivered.")]


@deploy.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, trained or compressed.")],
    format: Format = "auto",
    data: options.Data = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder of the export; by default "
                                                "RUN/exports/FORMAT.")] = None,
    into: Into = None,
    name: Name = "",
    tolerance: Tolerance = 1e-3,
    force: Force = False,
    trust_model: options.TrustModel = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a model for deployment, and prove on real examples that it answers as before.

    The exported file answers the test split in a process like a server's; where an answer differs, nothing is
    delivered (exit code 5). Beside it stand parity.json, MODEL_CARD.md, statistics of the training's inputs, and
    artefact.json with everything's SHA-256.

    Examples:
        $ hpcai deploy export runs/mnist-1 --format tflite
        $ hpcai deploy export runs/mnist-1/compressed/int8 --into models
        $ hpcai deploy export runs/shoppers-1 --json

    Next: hpcai deploy serve runs/mnist-1/exports/tflite
    """
    if output and into:
        raise UsageError("an export has one place", expected="--output or --into")
    with console.quiet():
        from hpcai_cli.engine.deployment import export as exporting
    document = exporting.export(exporting.Order(run, format, output, into, data, name, tolerance, force, trust_model,
                                                catalog.find))
    if json:
        console.result_json(document)
        return
    parity = document["parity"]
    console.table(f"{document['run']} as {document['format']}, on {parity['examples']:,} examples",
                  ("figure", "before", "after"), [(name, values["before"], values["after"])
                                                  for name, values in parity["metrics"].items()])
    for kind, cost in document["serving"]["measured"].items():
        console.result(f"{kind}: {cost['milliseconds']['1']:.3g} ms for one, "
                       f"{cost['milliseconds']['32']:.3g} ms for 32")
    console.result(f"the same answer for {parity['agreement']:.2%}, largest difference "
                   f"{parity['largest_difference']:.2g}")
    console.result(f"written: {document['folder']}")


@deploy.command()
def rollback(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model's folder of versions.")],
    to: Annotated[int | None, typer.Option(metavar="VERSION", help="The version that is to answer; by default the one "
                                           "before the current.")] = None,
    json: options.Json = False,
) -> None:
    """Let an earlier version of a model answer; a server of the folder takes it when it reloads.

    Examples:
        $ hpcai deploy rollback models/mnist
        $ hpcai deploy rollback models/mnist --to 1

    Next: kill -HUP SERVER
    """
    from hpcai_cli.engine.deployment import repository

    document = repository.roll_back(folder, to)
    if json:
        console.result_json(document)
    else:
        console.result(f"{folder}: version {document['before']} answered, from the next reload "
                       f"{document['after']} does")
