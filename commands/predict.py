"""hpcai predict: answers for files."""

import json as json_module
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.run import Run


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder from `hpcai train`.")],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES | -]", help="Images or CSV files; `-` has names "
                                                      "from standard input, one a line.")] = None,
    trust_model: Annotated[bool, typer.Option("--trust-model", help="Load classes of your own from the model file; "
                                              "only for files that you made: they can run code.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say for each image, or each row of a CSV file, its class and the probability; with --json one object a line.

    A file or row that cannot be read is reported in its own line and by exit code 3; the rest goes on.

    Examples:
        $ hpcai predict runs/mnist-1 digit.png
        $ find . -name '*.png' | hpcai predict runs/mnist-1 - --json
        $ hpcai predict runs/shoppers-1 sessions.csv
    """
    if not files:
        raise UsageError("predict needs files", expected="images or CSV files, or `-` for names on standard input")
    opened = Run.open(run)
    manifest, recipe = opened.manifest(), opened.recipe()
    details = manifest.get("data_details", {})
    if recipe.inputs != "images" and "columns" not in details:
        raise UsageError(f"recipe {recipe.name} takes neither images nor rows of a table", received=recipe.inputs)
    with console.quiet():
        from hpcai_cli.engine import evaluation, model_file, prediction
    if trust_model:
        # Classes of the user's own are registered by the module that defines them.
        catalog.find(manifest["recipe_reference"])
    model = model_file.load(opened.model_file, trust=trust_model)
    failed, reading = 0, True
    asked = {"run_forward": evaluation.forward(model, recipe), "class_names": recipe.class_names,
             "threshold": opened.decision_threshold()}
    if recipe.inputs == "images":
        answers = prediction.predict_images(_names(files), shape=recipe.input_shape, **asked)
    else:
        answers = prediction.predict_rows(_names(files), details=details, **asked)
    for answer in answers:
        failed += "error" in answer
        if json:
            reading = console.result(json_module.dumps(answer))
        elif "error" in answer:
            console.note(f"{_place(answer)}: {answer['error']}")
        else:
            said = f"{answer['label']} ({answer['probability']:.1%})" if "label" in answer else f"{answer['value']:g}"
            reading = console.result(f"{_place(answer)}: {said}")
        if not reading:
            break
    if failed:
        one, more = ("file", "files") if recipe.inputs == "images" else ("row or file", "rows or files")
        raise DataError(f"{failed} {one if failed == 1 else more} could not be read",
                        expected="images" if recipe.inputs == "images" else "CSV files with the training's columns",
                        mend="the lines above say why")


def _place(answer: dict) -> str:
    return f"{answer['file']}:{answer['row']}" if "row" in answer else answer["file"]


def _names(files: list[str]) -> Iterator[str]:
    for name in files:
        if name == "-":
            # As bytes: a file name need not be valid text.
            yield from (os.fsdecode(line.rstrip(b"\n")) for line in sys.stdin.buffer if line.strip())
        else:
            yield name
