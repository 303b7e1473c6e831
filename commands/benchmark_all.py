"""hpcai benchmark all, report, list: one benchmark after the other, and what is kept of them."""

import signal
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from hpcai_cli import console, launch, options
from hpcai_cli.errors import DataError, GateError, HpcaiError, UsageError
from hpcai_cli.run import write_bytes

benchmark_all = typer.Typer()
"""A part of the group `hpcai benchmark`."""

PETIMAGES = Path("data/petimages.zip")
NAMES = ("start", "input", "train", "checkpoint", "matmul", "allreduce", "scaling", "horovod", "inference", "serve",
         "accuracy", "memory", "preprocess", "photographs", "tutorial", "quantization")
NEED_HOROVOD = {"matmul", "allreduce", "scaling", "horovod"}
TAKE_DATA = {"input", "train", "checkpoint", "accuracy", "scaling", "horovod"}
TAKE_PHOTOGRAPHS = {"preprocess", "photographs", "tutorial"}


@benchmark_all.command("all")
def everything(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these.")] = None,
    data: Annotated[Path, typer.Option("--data", metavar="FILE.h5", help="MNIST's dataset file.")] = Path(
        "data/mnist.h5"),
    photographs: Annotated[Path | None, typer.Option(
        metavar="PATH", help="Photographs of dogs and cats, a folder or an archive, for those that take them.",
        show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="By default benchmarks/all-TIME.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with code 5 when a figure misses its limit.")] = False,
) -> None:
    """Run one benchmark after the other, each in a process of its own, and make one page of them.

    Examples:
        $ hpcai benchmark all
        $ hpcai benchmark all input train --output benchmarks/today
    """
    unknown = [name for name in names or [] if name not in NAMES]
    if unknown:
        raise UsageError("no such benchmark", expected=f"some of {', '.join(NAMES)}", received=unknown[0])
    with console.quiet():
        from hpcai_cli.engine.benchmarks import results
    folder, codes = results.folder_for("all", output), {}
    for name in _possible(names, photographs):
        console.note(f"benchmark {name}")
        given = {"--data": data if name in TAKE_DATA else None, "--output": folder / name, "--check": check,
                 "--photographs": photographs if name in TAKE_PHOTOGRAPHS else None}
        words = [str(launch.beside("hpcai")), "benchmark", name, *options.words(given)]
        codes[name] = _run(words)
        if codes[name] < 0 or codes[name] == 130:
            raise KeyboardInterrupt
        if any(folder.glob(f"*/{results.FILE}")):
            _write_report(folder)
    console.result(f"{folder / 'report.html'}")
    failed = [name for name, code in codes.items() if code not in (0, GateError.exit_code)]
    if failed:
        raise HpcaiError(f"{', '.join(failed)} failed", mend=f"run `hpcai benchmark {failed[0]}`")
    if any(codes.values()):
        raise GateError(f"a figure misses its limit in {', '.join(name for name, code in codes.items() if code)}")


def _run(words: list[str]) -> int:
    """Run a benchmark and return its exit code; SIGTERM is passed on, and a Ctrl-C has reached it too.

    Raises:
        KeyboardInterrupt: Ctrl-C, after the benchmark has kept what it had measured.
    """
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        return process.wait()
    finally:
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _possible(names: list[str] | None, photographs: Path | None) -> list[str]:
    """Return the benchmarks to run; of all of them those that can be run here."""
    if photographs is not None and not photographs.exists():
        raise DataError("the photographs do not exist", expected="a folder or an archive", received=str(photographs))
    if names:
        return names
    left_out = {}
    if launch.missing_package("horovod"):
        left_out |= dict.fromkeys(NEED_HOROVOD, "Horovod is not installed; run `hpcai doctor --build-horovod`")
    if not (photographs or PETIMAGES.exists()):
        left_out["tutorial"] = f"there is no {PETIMAGES}; give real photographs with --photographs"
    for name, reason in left_out.items():
        console.note(f"{name} is left out: {reason}")
    return [name for name in NAMES if name not in left_out]


@benchmark_all.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That holds results, a folder each.")] = Path(
        "benchmarks"),
    readme: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table of figures with a limit into "
                                                "this Markdown file, between its marks.")] = None,
) -> None:
    """Make one HTML page of the results in a folder, FOLDER/report.html, and a table in Markdown.

    Examples:
        $ hpcai benchmark report benchmarks/today --readme README.md
    """
    console.result(str(_write_report(folder, readme)))


def _write_report(folder: Path, readme: Path | None = None) -> Path:
    with console.quiet():
        from hpcai_cli.engine.benchmarks import result_page, results
    found = list(results.kept(folder))
    if not found:
        raise DataError("there are no results", expected="folders with a result.json", received=str(folder))
    table = result_page.markdown(found)
    if readme is not None:
        changed = result_page.with_table(readme.read_text() if readme.is_file() else "", table)
        if changed is None:
            raise DataError(f"{readme} has no place for the table", expected="a Markdown file with the two marks of "
                            "hpcai benchmark", received=str(readme))
        write_bytes(readme, changed.encode())
    write_bytes(folder / "figures.md", table.encode())
    write_bytes(folder / "report.html", result_page.page(found).encode())
    return folder / "report.html"


@benchmark_all.command("list")
def list_results(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="That holds results, a folder each.")] = Path(
        "benchmarks"),
    json: options.Json = False,
) -> None:
    """List the machines and results that are kept in a folder.

    Examples:
        $ hpcai benchmark list
    """
    with console.quiet():
        from hpcai_cli.engine.benchmarks import results
    rows = [(str(place), document["machine"].get("host"), document["machine"].get("cores"), document["benchmark"],
             document["started"], len(document["figures"]), sum(row["holds"] is False for row in document["figures"]),
             "; ".join([*document["disturbed"], *([] if document["complete"] else ["not complete"])]))
            for place, document in results.kept(folder)]
    columns = ("folder", "host", "cores", "benchmark", "started", "figures", "missed", "disturbed")
    if json:
        console.result_json({"schema": "hpcai.benchmark.list/1", "command": "benchmark list",
                             "results": [dict(zip(columns, row, strict=True)) for row in rows]})
    else:
        console.table(f"{len(rows)} results in {folder}", columns, rows)
