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
    files: Annotated[list[str] | None, typer.Argument(metavar="[FILES | -]", help="Image files; `-` reads their names "
                                                      "from standard input, one a line.")] = None,
    trust_model: Annotated[bool, typer.Option("--trust-model", help="Load classes of your own from the model file; "
                                              "only for files that you made: they can run code.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Say for each file its class and the probability; with --json one object a line.

    A file that cannot be read is reported in its own line and by exit code 3; the rest goes on.

    Examples:
        $ hpcai predict runs/mnist-1 digit.png
        $ find . -name '*.png' | hpcai predict runs/mnist-1 - --json
    """
    if not files:
        raise UsageError("predict needs files", expected="image files, or `-` for names on standard input")
    opened = Run.open(run)
    manifest, recipe = opened.manifest(), opened.recipe()
    if recipe.inputs != "images":
        raise UsageError(f"recipe {recipe.name} does not take images", received=recipe.inputs)
    with console.quiet():
        from hpcai_cli.engine import evaluation, model_file, prediction
    if trust_model:
        # Classes of the user's own are registered by the module that defines them.
        catalog.find(manifest["recipe_reference"])
    model = model_file.load(opened.model_file, trust=trust_model)
    failed, reading = 0, True
    for answer in prediction.predict_images(
            _names(files), run_forward=evaluation.forward(model, recipe), shape=recipe.input_shape,
            class_names=recipe.class_names, threshold=opened.decision_threshold()):
        failed += "error" in answer
        if json:
            reading = console.result(json_module.dumps(answer))
        elif "error" in answer:
            console.note(f"{answer['file']}: {answer['error']}")
        else:
            said = f"{answer['label']} ({answer['probability']:.1%})" if "label" in answer else f"{answer['value']:g}"
            reading = console.result(f"{answer['file']}: {said}")
        if not reading:
            break
    if failed:
        raise DataError(f"{failed} file{'s' if failed > 1 else ''} could not be read", expected="images",
                        mend="the lines above say why")


def _names(files: list[str]) -> Iterator[str]:
    for name in files:
        if name == "-":
            # As bytes: a file name need not be valid text.
            yield from (os.fsdecode(line.rstrip(b"\n")) for line in sys.stdin.buffer if line.strip())
        else:
            yield name
