"""hpcai preprocess: raw files to one proven dataset file."""

from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import parse_assignments


def preprocess(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A name from `hpcai recipes list`, or a recipe "
                                                 "file.")] = None,
    source: Annotated[str, typer.Option(help="A folder, an archive, an address, `download` for the known mirrors, or "
                                        "`sample` for data that come with the packages.")] = "download",
    output: Annotated[Path | None, typer.Option(metavar="FILE.h5", help="The dataset file; data/RECIPE.h5 by default.",
                                                show_default=False)] = None,
    validation_fraction: Annotated[float | None, typer.Option(
        help="Share of the training examples to set aside; the recipe says by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that was made from something "
                                        "else.")] = False,
    verify: Annotated[Path | None, typer.Option(metavar="FILE.h5", help="Prove a dataset file and do nothing "
                                                "else.")] = None,
    settings: options.Set = None,
    json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Turn raw files into one proven dataset file.

    Examples:
        $ hpcai preprocess mnist --source sample --output data/sample.h5
        $ hpcai preprocess mnist --source ~/downloads/mnist --output data/mnist.h5
        $ hpcai preprocess mnist
        $ hpcai preprocess --verify data/mnist.h5

    Next: hpcai train RECIPE --data FILE.h5
    """
    if verify is not None:
        _verify(verify, json)
        return
    if recipe is None:
        raise UsageError("preprocess needs a recipe", expected="a name",
                         mend="run `hpcai recipes list` for all of them")
    entry = catalog.find(recipe).data_source()
    assignments = parse_assignments(settings or [])
    if validation_fraction is not None:
        assignments["validation_fraction"] = str(validation_fraction)
    chosen = entry.recipe.override(assignments)

    with console.quiet():
        from hpcai_cli.engine import preprocessing

    report = preprocessing.preprocess(
        chosen, load=entry.function("load"), sample=entry.function("sample"),
        downloads=getattr(entry.module, "downloads", None), source=source,
        output=output or Path("data") / f"{chosen.name}.h5", force=force)
    if json:
        console.result_json(report)
        return
    title = f"{report['file']} {'is valid already' if report['reused'] else 'written'}"
    console.table(title, ("", ""), list(report["metrics"].items()))
    if "class_balance" in report:
        names = list(report["class_balance"])
        console.table("Examples by class", ("class", *names),
                      [(label, *(report["class_balance"][name][number] for name in names))
                       for number, label in enumerate(report["classes"])])


def _verify(path: Path, json: bool) -> None:
    with console.quiet():
        from hpcai_cli.engine import store

    proven = store.verify(path)
    counts = {f"{name}_examples": count for name, count in proven.counts.items()}
    if json:
        console.result_json({"schema": "hpcai.verify/1", "command": "preprocess", "file": proven.path,
                             "recipe": proven.recipe, "fingerprint": proven.fingerprint,
                             "metrics": {**counts, "bytes": proven.bytes}})
        return
    console.table(f"{proven.path} is whole", ("", ""), [
        ("recipe", proven.recipe), ("fingerprint", proven.fingerprint[:16]), *counts.items(), ("bytes", proven.bytes)])
