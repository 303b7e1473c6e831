"""hpcai benchmark: how fast it is, as ratios against peers and limits that are measured in the same run."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import DataError, GateError, UsageError

NAMES = ("start", "input", "train", "accuracy", "scaling", "memory", "preprocess", "photographs", "tutorial",
         "quantization", "serve")
ON_MNIST = {"input", "train", "accuracy", "scaling"}
"""Those that measure with MNIST's dataset file."""
PEERS = ("litserve", "mlserver", "flask")
"""Other servers that serve can be measured beside."""
PHOTOGRAPHS = Path("data/petimages.zip")
"""What the tutorial, which needs real photographs, is measured with where nothing else is given."""


def benchmark(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAMES]", help=f"{', '.join(NAMES)}; all of them by "
                                                      "default.")] = None,
    data: Annotated[Path, typer.Option(metavar="FILE.h5", help="MNIST's dataset file.")] = Path("data/mnist.h5"),
    photographs: Annotated[Path | None, typer.Option(
        metavar="PATH", help="Photographs of dogs and cats, a folder or an archive, for preprocess, photographs and "
        f"tutorial. Without them the first two make their own; tutorial takes {PHOTOGRAPHS} where it exists.",
        show_default=False)] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of tutorial, for both sides.")] = 15,
    peer: Annotated[list[str] | None, typer.Option(
        metavar="NAME=PYTHON", help="For serve, another server to measure beside ours, and the Python that has it: "
        "litserve, mlserver or flask. Repeatable.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 5 when a figure misses its limit.")] = False,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure how fast it is, as ratios against peers and limits that are measured in the same run.

    Examples:
        $ hpcai benchmark start input
        $ hpcai benchmark --data data/mnist.h5 --json
        $ hpcai benchmark tutorial --photographs petimages.zip
        $ hpcai benchmark serve --peer litserve=/opt/litserve/bin/python
    """
    unknown = sorted(set(names or []) - set(NAMES))
    if unknown:
        raise UsageError("no such benchmark", expected=f"some of {', '.join(NAMES)}", received=", ".join(unknown))
    chosen, peers = _measurable(names, photographs), _peers(peer or [])
    with console.quiet():
        from hpcai_cli.engine.benchmarks.measure import Setting
        from hpcai_cli.engine.store import Dataset
    if ON_MNIST & set(chosen):
        Dataset(data)
    entries = {name: catalog.find(name) for name in ("mnist", "mnist-mlp", "dogs-vs-cats")}
    recipes = {name: (entry.recipe, entry.function("build_model")) for name, entry in entries.items()}
    augment, figures = entries["dogs-vs-cats"].function("augment"), []
    for name in chosen:
        console.note(f"benchmark {name}")
        with console.quiet():
            module = import_module(f"hpcai_cli.engine.benchmarks.{name}")
        own = photographs or (PHOTOGRAPHS if name == "tutorial" else None)
        figures += module.measure(Setting(data, recipes, augment, own, epochs, peers))
    if json:
        console.result_json({"schema": "hpcai.benchmark/1", "command": "benchmark",
                             "figures": [figure.to_json() for figure in figures]})
    else:
        console.table("Medians, with the smallest and the largest round",
                      ("figure", "value", "unit", "rounds", "limit"), [_row(figure) for figure in figures])
    missed = [f"{figure.benchmark}: {figure.name}" for figure in figures if figure.holds is False]
    if missed and check:
        raise GateError(f"missed: {'; '.join(missed)}")


def _peers(given: list[str]) -> dict[str, str]:
    """Return the other servers' Pythons by name."""
    found = {}
    for text in given:
        name, equals, python = text.partition("=")
        if name not in PEERS or not equals or not Path(python).is_file():
            raise UsageError("there is no such peer", received=text,
                             expected=f"NAME=PYTHON with a name of {', '.join(PEERS)} and a Python that exists")
        found[name] = python
    return found


def _measurable(names: list[str] | None, photographs: Path | None) -> list[str]:
    """Return the benchmarks to measure; the one without its photographs is left out, unless it was asked for by name.

    Raises:
        DataError: the photographs that it asked for are not there.
    """
    if photographs is not None and not photographs.exists():
        raise DataError("the photographs do not exist", expected="a folder or an archive", received=str(photographs))
    if photographs is not None or PHOTOGRAPHS.exists():
        return list(names or NAMES)
    mend = "give real photographs with `hpcai benchmark tutorial --photographs petimages.zip`"
    if "tutorial" in (names or []):
        raise DataError(f"there is no {PHOTOGRAPHS} for the tutorial", expected="a folder or an archive", mend=mend)
    if not names:
        console.note(f"tutorial is left out, without {PHOTOGRAPHS}; {mend}")
    return [name for name in names or NAMES if name != "tutorial"]


def _row(figure) -> tuple:
    spread = " to ".join(console.format_value(float(value)) for value in figure.spread) if figure.spread else ""
    limit = "" if figure.limit is None else (f"{'at most' if figure.at_most else 'at least'} {figure.limit:g}: "
                                             f"{'holds' if figure.holds else 'MISSED'}")
    return f"{figure.benchmark}  {figure.name}", float(figure.value), figure.unit, spread, limit
