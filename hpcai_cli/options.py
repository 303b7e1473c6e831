"""Options that several commands share, so that they read and work alike."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli.launch import VERBOSE_VARIABLE


def _set_verbose(value: bool) -> None:
    if value:
        # In the environment, so that the ranks that this process starts are verbose too.
        os.environ[VERBOSE_VARIABLE] = "1"
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "0"


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show what TensorFlow and Horovod print as they start.",
                                       callback=_set_verbose, is_eager=True)]
Data = Annotated[Path | None, typer.Option("--data", metavar="FILE.h5", help="Dataset file from `hpcai preprocess`.")]
Processes = Annotated[int, typer.Option("--np", min=1, metavar="N", help="Processes on this host, under horovodrun.")]
TrustModel = Annotated[bool, typer.Option("--trust-model", help="Load classes of your own from the model file; only "
                                          "for files that you made: they can run code.")]
Like = Annotated[Path | None, typer.Option("--like", metavar="RUN", help="The run that says recipe, classes and data, "
                                           "for a model file that lies in no run folder.")]
Energy = Annotated[bool, typer.Option("--energy", help="Measure the joules that the host takes, by the counters of its "
                                      "processors and GPUs.")]
PowerFile = Annotated[Path | None, typer.Option(metavar="FILE", help="Measure the joules by a power meter's file, to "
                                                "which lines of `unix_seconds watts` or `watts` come meanwhile.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set a field of the recipe; "
                                               "repeatable. `hpcai recipes show` lists them.")]
From = Annotated[Path | None, typer.Option("--from", metavar="FILE", help="Take settings from a recipe.json or a TOML "
                                           "file first.")]


def words(given: Mapping[str, object]) -> list[str]:
    """Return options as words of a command line, none for those that were not given; a list repeats its option."""
    found = []
    for option, value in given.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False and each != "":
                found += [option] if each is True else [option, str(each)]
    return found
