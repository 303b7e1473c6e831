"""hpcai preprocess: raw files to one proven dataset file."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import catalog, console, options
from hpcai_cli.errors import UsageError, printable
from hpcai_cli.recipe import parse_assignments

SHOWN = 20
"""Files that the table for people names; the JSON document has them all."""


class OnBad(str, Enum):
    """What becomes of files that cannot be used."""

    skip = "skip"
    fail = "fail"
    quarantine = "quarantine"


def preprocess(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="A name from `hpcai recipes list`, or a recipe "
                                                 "file; or the word inspect.")] = None,
    file: Annotated[Path | None, typer.Argument(metavar="[FILE.h5]", help="The dataset file to inspect; only after "
                                                "inspect.", show_default=False)] = None,
    source: Annotated[str, typer.Option(help="A folder, an archive, an address, `download` for the known mirrors, or "
                                        "`sample` for data that come with the packages.")] = "download",
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="The dataset file, data/RECIPE.h5 by default; "
                                                "after inspect a PNG for a sheet of samples.",
                                                show_default=False)] = None,
    test_fraction: Annotated[float | None, typer.Option(
        help="Share of the examples to set aside for the test, where the source brings none; the recipe says by "
             "default.")] = None,
    validation_fraction: Annotated[float | None, typer.Option(
        help="Share of the training examples to set aside; the recipe says by default.")] = None,
    on_bad: Annotated[OnBad, typer.Option(help="What becomes of files that cannot be used: they are left out, or end "
                                          "the job, or are copied to OUTPUT.quarantine.")] = OnBad.skip,
    max_bad: Annotated[str, typer.Option(metavar="SHARE", help="Bad files, such as 1% or 0.01, beyond which nothing is "
                                         "written.")] = "10%",
    min_size: Annotated[int, typer.Option(metavar="PIXELS", min=1, help="Photographs whose shorter side has less count "
                                          "as bad.")] = 16,
    processes: Annotated[int, typer.Option(min=0, help="Processes that decode photographs; 0 takes all cores.")] = 0,
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
        $ hpcai preprocess dogs-vs-cats --source petimages.zip --on-bad quarantine --max-bad 1%
        $ hpcai preprocess inspect data/mnist.h5 --output samples.png
        $ hpcai preprocess --verify data/mnist.h5

    Next: hpcai train RECIPE --data FILE.h5
    """
    if file is not None and recipe != "inspect":
        raise UsageError("preprocess takes one recipe", expected="`hpcai preprocess inspect FILE.h5` or no second word",
                         mend="give the raw files with --source", received=str(file))
    if verify is not None:
        _verify(verify, json)
        return
    if recipe == "inspect":
        _inspect(file, output, json)
        return
    if recipe is None:
        raise UsageError("preprocess needs a recipe", expected="a name",
                         mend="run `hpcai recipes list` for all of them")
    entry = catalog.find(recipe).data_source()
    assignments = parse_assignments(settings or [])
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if value is not None:
            assignments[name] = str(value)
    chosen = entry.recipe.override(assignments)
    most = _share(max_bad)

    with console.quiet():
        from hpcai_cli.engine.raw import preprocessing

    report = preprocessing.preprocess(
        chosen, load=entry.function("load"), sample=entry.function("sample"),
        downloads=getattr(entry.module, "downloads", None), source=source,
        output=output or Path("data") / f"{chosen.name}.h5",
        wishes=preprocessing.Wishes(force, on_bad.value, most, min_size, processes))
    if json:
        console.result_json(report)
    else:
        _show(report)


def _share(text: str) -> float:
    """Read 1% or 0.01."""
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
        if 0 <= share <= 1:
            return share
    except ValueError:
        pass
    raise UsageError("cannot read --max-bad", expected="a share from 0 to 1 or a percentage, such as 0.01 or 1%",
                     received=text)


def _show(report: dict) -> None:
    title = f"{report['file']} {'is valid already' if report['reused'] else 'written'}"
    console.table(title, ("", ""), list(report["metrics"].items()))
    if "class_balance" in report:
        names = list(report["class_balance"])
        console.table("Examples by class", ("class", *names),
                      [(label, *(report["class_balance"][name][number] for name in names))
                       for number, label in enumerate(report["classes"])])
    _show_lists(report, report["classes"])


def _show_lists(lists: dict, classes: list[str]) -> None:
    _show_files("Rejected", "reason", [(entry["file"], entry["reason"]) for entry in lists["rejected"]])
    _show_files("Duplicates", "equal to", [(entry["file"], entry["same_as"]) for entry in lists["duplicates"]])
    _show_files("The same under different labels, left out", "label", [
        (name, classes[label]) for entry in lists["conflicts"]
        for name, label in zip(entry["files"], entry["labels"], strict=True)])


def _show_files(title: str, column: str, rows: list[tuple[str, object]], first: str = "file") -> None:
    if rows:
        shown = [tuple(printable(console.format_value(cell)) for cell in row) for row in rows[:SHOWN]]
        console.table(title, (first, column), shown)
    if len(rows) > SHOWN:
        console.result(f"  and {len(rows) - SHOWN:,} more, see --json")


def _inspect(file: Path | None, sheet: Path | None, json: bool) -> None:
    if file is None:
        raise UsageError("inspect needs a dataset file", expected="`hpcai preprocess inspect FILE.h5`",
                         mend="name the file that `hpcai preprocess` wrote")
    with console.quiet():
        from hpcai_cli.engine.raw import inspection

    document = inspection.inspect(file)
    if sheet is not None:
        inspection.draw_contact_sheet(file, sheet)
        document = {**document, "contact_sheet": str(sheet)}
    if json:
        console.result_json(document)
        return
    inputs = document["inputs"]
    console.table(str(file), ("", ""), [
        ("recipe", document["recipe"]), ("fingerprint", document["fingerprint"][:16]),
        ("inputs", f"{inputs['kind']}, {inputs['dtype']} {'x'.join(map(str, inputs['shape']))}"),
        *document["metrics"].items()])
    details = document["details"]
    for name, split in document["splits"].items():
        balance = split.get("class_balance")
        if isinstance(balance, dict):
            _show_files(f"{name}, by class", "examples", list(balance.items()), first="class")
        statistics = split["statistics"]
        if inputs["kind"] == "features":
            rows = [(feature, _cell(figures)) for feature, figures in statistics.items()]
        else:
            rows = [(figure, _cell(values)) for figure, values in statistics.items()]
        _show_files(f"{name}, statistics", "", rows, first="")
    _show_lists({name: details.get(name, []) for name in ("rejected", "duplicates", "conflicts")}, document["classes"])


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    return ", ".join(map(_cell, value)) if isinstance(value, list) else console.format_value(value)


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
