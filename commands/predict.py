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


def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, a checkpoint, or a compressed or "
                                          "exported model.")],
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES | -]", help="Images or CSV files; `-` has names "
                                                      "from standard input, one a line.")] = None,
    like: options.Like = None,
    trust_model: options.TrustModel = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say for each image, or each row of a CSV file, its class and the probability; with --json one object a line.

    A file or row that cannot be read is reported in its own line and by exit code 3; the rest goes on.

    Examples:
        $ hpcai predict runs/mnist-1 digit.png
        $ hpcai predict runs/mnist-1/compressed/int8 digit.png
        $ hpcai predict mnist.onnx digit.png --like runs/mnist-1
        $ find . -name '*.png' | hpcai predict runs/mnist-1 - --json
        $ hpcai predict runs/shoppers-1 sessions.csv
    """
    if not files:
        raise UsageError("predict needs files", expected="images or CSV files, or `-` for names on standard input")
    with console.quiet():
        from hpcai_cli.engine import inference, prediction
    opened = inference.open_model(model, like=like, trust=trust_model, find_recipe=catalog.find)
    recipe, details = opened.recipe, opened.run.manifest().get("data_details") or {}
    if recipe.inputs != "images" and "columns" not in details:
        raise UsageError(f"recipe {recipe.name} takes neither images nor rows of a table", received=recipe.inputs)
    failed, reading = 0, True
    asked = {"run_forward": opened.forward, "class_names": recipe.class_names,
             "threshold": opened.run.decision_threshold()}
    if recipe.inputs == "images":
        answers = prediction.predict_images(_names(files), shape=recipe.input_shape, **asked)
    else:
        answers = prediction.predict_rows(_names(files), details=details, **asked)
    for answer in answers:
        failed += "error" in answer
        if json:
            reading = console.result(json_module.dumps(answer, allow_nan=False))
        elif "error" in answer:
            console.note(f"{_place(answer)}: {answer['error']}")
        else:
            said = f"{answer['label']} ({answer['probability']:.1%})" if "label" in answer else f"{answer['value']:g}"
            reading = console.result(f"{_place(answer)}: {said}")
        if not reading:
            break
    if failed:
        one, more = ("file", "files") if recipe.inputs == "images" else ("row or file", "rows or files")
        raise DataError(f"{failed} {one + ' has' if failed == 1 else more + ' have'} no answer",
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
