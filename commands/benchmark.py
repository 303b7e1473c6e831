"""hpcai benchmark: how fast it is, as ratios against peers and limits that are measured in the same run."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import GateError, UsageError

NAMES = ("start", "input", "train", "accuracy", "scaling", "memory")


def benchmark(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAMES]", help=f"{', '.join(NAMES)}; all of them by "
                                                      "default.")] = None,
    data: Annotated[Path, typer.Option(metavar="FILE.h5", help="MNIST's dataset file.")] = Path("data/mnist.h5"),
    check: Annotated[bool, typer.Option("--check", help="Exit with code 5 when a figure misses its limit.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast it is, as ratios against peers and limits that are measured in the same run.

    Examples:
        $ hpcai benchmark start input
        $ hpcai benchmark --data data/mnist.h5 --json
    """
    unknown = sorted(set(names or []) - set(NAMES))
    if unknown:
        raise UsageError("no such benchmark", expected=f"some of {', '.join(NAMES)}", received=", ".join(unknown))
    with console.quiet():
        from hpcai_cli.engine.benchmarks.measure import Setting
        from hpcai_cli.engine.store import Dataset
    Dataset(data)
    entries = {name: catalog.find(name) for name in ("mnist", "mnist-mlp")}
    setting = Setting(data, {name: (entry.recipe, entry.function("build_model")) for name, entry in entries.items()})
    figures = []
    for name in names or NAMES:
        console.note(f"benchmark {name}")
        with console.quiet():
            module = import_module(f"hpcai_cli.engine.benchmarks.{name}")
        figures += module.measure(setting)
    if json:
        console.result_json({"schema": "hpcai.benchmark/1", "command": "benchmark",
                             "figures": [figure.to_json() for figure in figures]})
    else:
        console.table("Medians, with the smallest and the largest round",
                      ("figure", "value", "unit", "rounds", "limit"), [_row(figure) for figure in figures])
    missed = [f"{figure.benchmark}: {figure.name}" for figure in figures if figure.holds is False]
    if missed and check:
        raise GateError(f"missed: {'; '.join(missed)}")


def _row(figure) -> tuple:
    spread = " to ".join(console.format_value(float(value)) for value in figure.spread) if figure.spread else ""
    limit = "" if figure.limit is None else (f"{'at most' if figure.at_most else 'at least'} {figure.limit:g}: "
                                             f"{'holds' if figure.holds else 'MISSED'}")
    return f"{figure.benchmark}  {figure.name}", float(figure.value), figure.unit, spread, limit
