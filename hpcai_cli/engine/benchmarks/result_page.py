"""All results in a folder as one HTML page, and as a table in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpcai_cli.console import format_value
from hpcai_cli.engine import energy
from hpcai_cli.engine.benchmarks import result_plots
from hpcai_cli.engine.reports.page import fact_list, figure, table, text, whole

FIGURE_COLUMNS = ("figure", "value", "unit", "95 % interval", "rounds", "limit", "")
_FOOTER = ("Medians; the intervals are where the median lies with 95 % confidence, by the order of the rounds; of "
           "fewer than six rounds the smallest and the largest. Written by hpcai benchmark.")
_MARKS = "<!-- figures by hpcai benchmark -->", "<!-- end of figures -->"


def page(results: Sequence[tuple[Path, Mapping]]) -> str:
    """Return the page.

    Args:
        results: folder and document of each run, all of one machine.
    """
    machine = results[-1][1]["machine"]
    title = f"Benchmarks of {machine['host']}"
    installed = {name: version for name, version in results[-1][1]["versions"].items() if version}
    facts = {name.replace("_", " "): ", ".join(value) or None if isinstance(value, list) else value
             for name, value in machine.items()}
    parts = [f"<h1>{text(title)}</h1>", *fact_list(facts | installed)]
    for _, document in results:
        parts += _part(document)
    return whole(title, parts, _FOOTER)


def _part(document: Mapping) -> Iterator[str]:
    yield f"<h2>{text(document['benchmark'])}</h2>"
    measured = document.get("energy")
    yield from fact_list({
        "ran": document["ran"], "started": document["started"], "seconds": document["seconds"],
        "whole": None if document["complete"] else "no, it ended before its end",
        "disturbed": "; ".join(document["disturbed"]) or None, "energy": energy.words(measured) if measured else None})
    for each in document["curves"]:
        yield figure(result_plots.draw(each), each["title"])
    if document["figures"]:
        yield from table("Figures", FIGURE_COLUMNS, [_row(row) for row in document["figures"]])
    for each in document["tables"]:
        yield from table(each["title"], each["columns"], each["rows"])


def _row(row: Mapping) -> tuple:
    interval = " to ".join(map(format_value, map(float, row["interval"]))) if row["interval"] else ""
    return (row["name"], float(row["value"]), row["unit"], interval, len(row["rounds"]) or "", _limit(row),
            {None: "", True: "holds", False: "missed"}[row["holds"]])


def _limit(row: Mapping) -> str:
    return "" if row["limit"] is None else f"{'at most' if row['at_most'] else 'at least'} {row['limit']:g}"


def markdown(results: Sequence[tuple[Path, Mapping]]) -> str:
    """Return a table of the figures that have a limit to hold."""
    lines = ["| benchmark | figure | value | limit | holds |", "|---|---|---|---|---|"]
    for _, document in results:
        for row in document["figures"]:
            if row["limit"] is not None:
                holds = "yes" if row["holds"] else "**no**"
                value = f"{format_value(float(row['value']))} {'' if row['unit'] == 'ratio' else row['unit']}".strip()
                name = row["name"].replace("|", "/")
                lines.append(f"| {row['benchmark']} | {name} | {value} | {_limit(row)} | {holds} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str, table: str) -> str | None:
    """Return a text with the table between its two marks, None where it has none."""
    before, first, rest = readme.partition(_MARKS[0])
    _, second, after = rest.partition(_MARKS[1])
    return f"{before}{first}\n{table}{second}{after}" if first and second else None
