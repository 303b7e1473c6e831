"""The report as one HTML page that opens anywhere: pictures inside, no script, nothing fetched, everything escaped."""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

from hpcai_cli.console import format_value
from hpcai_cli.errors import printable

MOST_ROWS = 100
"""Rows of a table that are shown; metrics.json has them all."""
MOST_CHANGED = 20
"""The same of the examples that two models answer differently."""
CAPTIONS = {
    "confusion": "Confusion matrix: rows are the true classes, columns the answers.",
    "curves": "ROC and precision-recall curves; the classes with the smallest areas, each against the rest.",
    "reliability": "Reliability diagram: how often the answer is right, by how sure the model is of it.",
    "residuals": "Predicted against true values, and the errors.",
    "hardest": "The hardest examples, those with the highest loss first: true class, then the answer and its "
               "probability.",
    "robustness": "The metric under corrupted pictures, by severity; 0 is the picture as it is.",
}
"""What each picture shows, which is also its text where it cannot be seen."""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; } dt { opacity: .7; }
dd { margin: 0; overflow-wrap: anywhere; }
div.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; opacity: .8; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; max-width: 24rem; overflow-wrap: anywhere; }
thead th { background: var(--soft); } tbody th { font-weight: normal; }
figure { margin: 1rem 0; } figcaption { opacity: .8; }
img { max-width: 100%; height: auto; background: white; border-radius: 4px; }
footer { margin-top: 3rem; opacity: .7; font-size: .85rem; }
@media print { body { max-width: none; margin: 0; } figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(document: Mapping, pictures: Mapping[str, bytes]) -> str:
    """Return the page.

    Args:
        document: what `metrics.json` holds.
        pictures: PNG files by name, one of CAPTIONS each.
    """
    title = f"Evaluation of {document['model']}"
    facts = {"data": document["data"], "split": document["split"], "examples": document["examples"],
             "format": document["format"], "decision threshold": document["decision_threshold"]}
    return whole(title, [f"<h1>{text(title)}</h1>", *fact_list(facts), *_parts(document, pictures)],
                 "Intervals: 95 %, percentile bootstrap over the examples. One that is a single point tells nothing: "
                 "no resample could differ. Written by hpcai evaluate.")


def whole(title: str, parts: Iterable[str], footer: str) -> str:
    """Return a page of parts that are HTML already; title and footer are text."""
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        # Even if something slipped through the escaping, a browser would neither run nor fetch it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        'style-src \'unsafe-inline\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">', f"<title>{text(title)}</title>",
        f"<style>{_STYLE}</style>", "</head>", "<body>", *parts, f"<footer>{escape(footer)}</footer>", "</body>",
        "</html>", ""])


def fact_list(facts: Mapping) -> list[str]:
    """Return names and values as a list; a value that is None is left out."""
    return ["<dl>", *(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in facts.items()
                      if value is not None), "</dl>"]


def metric_rows(document: Mapping) -> tuple[Sequence[str], list[tuple]]:
    """Return columns and rows of the table of metrics, by the names that --require takes; for page and terminal."""
    return ("metric", "value", "95 % interval"), [
        (name, value, _interval(document["intervals"].get(name)))
        for name, value in document["metrics"].items()]


def comparison_rows(document: Mapping) -> tuple[Sequence[str], list[tuple]]:
    """Return columns and rows of the table of differences."""
    return ("metric", "this", "other", "difference", "95 % interval"), [
        (name, row["ours"], row["theirs"], row["difference"], _interval(row["interval"]))
        for name, row in document["comparison"]["differences"].items()]


def comparison_words(found: Mapping) -> str:
    """Return what McNemar's test says, in one sentence; for a regression how many predictions differ."""
    if "mcnemar" not in found:
        return f"The predictions differ on {found['changed_examples']:,} examples."
    test = found["mcnemar"]
    return (f"The answers differ on {found['changed_examples']:,} examples: only this model is right on "
            f"{test['only_ours_right']:,}, only the other one on {test['only_theirs_right']:,}; McNemar's test "
            f"({test['test']}): p = {test['p_value']:.3g}.")


def slice_rows(document: Mapping) -> tuple[Sequence[str], list[tuple]]:
    """Return columns and rows of the table of slices."""
    main, *others = document["slices"][0]["metrics"]
    return ("slice", "examples", _words(main), "95 % interval", *map(_words, others)), [
        (row["name"], row["count"], row["metrics"][main], _interval(row["intervals"][main]),
         *(row["metrics"][name] for name in others)) for row in document["slices"]]


def robustness_rows(document: Mapping) -> tuple[Sequence[str], list[tuple]]:
    """Return columns and rows of the table of corruptions."""
    metric = document["robustness"]["metric"]
    return ("corruption", "severity", "setting", _words(metric), "change", "loss"), [
        (row["corruption"], row["severity"], row["setting"], row[metric], row["change"], row["loss"])
        for row in document["robustness"]["rows"]]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _interval(interval: Sequence[float] | None) -> str:
    return f"{format_value(interval[0])} to {format_value(interval[1])}" if interval else ""


def _parts(document: Mapping, pictures: Mapping[str, bytes]) -> Iterator[str]:
    yield from ("<h2>Metrics</h2>", *table("The whole split", *metric_rows(document)))
    if "comparison" in document:
        found = document["comparison"]
        yield f"<h2>Against {text(found['model'])}</h2>"
        yield from table("Differences are this model minus the other, on the same examples; the intervals are paired",
                         *comparison_rows(document))
        yield f"<p>{text(comparison_words(found))}</p>"
        if found["changed"]:
            yield from table("Examples with another answer", ("row", "true", "this model", "the other"),
                             [(str(row["row"]), row["label"], row["answer"], row["other_answer"])
                              for row in found["changed"]], most=MOST_CHANGED)
    if "slices" in document:
        yield from ("<h2>Slices</h2>", *table(f"By {document['by']}", *slice_rows(document)))
    if "robustness" in document:
        found = document["robustness"]
        yield from ("<h2>Robustness</h2>", *table(
            f"{_words(found['metric'])}: {format_value(found['clean'])} on the pictures as they are, "
            f"{format_value(found['mean'])} on average under these corruptions", *robustness_rows(document)))
        yield from _picture("robustness", pictures)
    if "classes" in document:
        # A class that never occurs has no areas; the columns are those that any class has.
        names = list(dict.fromkeys(name for row in document["classes"] for name in row))
        yield from ("<h2>Classes</h2>", *table("Figures by class", [_words(name) for name in names], [
            tuple(row.get(name) for name in names) for row in document["classes"]]))
    for name in ("confusion", "curves", "reliability", "residuals"):
        yield from _picture(name, pictures)
    columns = tuple(document["hardest"][0])
    yield from ("<h2>The hardest examples</h2>", *_picture("hardest", pictures), *table(
        "Those with the highest loss", columns,
        [(str(row["row"]), *(row[name] for name in columns[1:])) for row in document["hardest"]]))


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[object]],
          most: int = MOST_ROWS) -> list[str]:
    """Return a table as HTML; of many rows the first ones."""
    more = f" (the first {most} of {len(rows):,})" if len(rows) > most else ""
    lines = [f'<div class="table"><table><caption>{text(caption + more)}</caption>', "<thead><tr>",
             *(f'<th scope="col">{text(column)}</th>' for column in columns), "</tr></thead>", "<tbody>"]
    for first, *others in rows[:most]:
        lines.append(f'<tr><th scope="row">{text(first)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in others)
                     + "</tr>")
    return [*lines, "</tbody></table></div>"]


def _picture(name: str, pictures: Mapping[str, bytes]) -> list[str]:
    return [figure(pictures[name], CAPTIONS[name])] if name in pictures else []


def figure(content: bytes, caption: str) -> str:
    """Return a PNG as HTML; the caption is also its text where it cannot be seen."""
    source = "data:image/png;base64," + base64.b64encode(content).decode()
    caption = escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def text(value: object) -> str:
    """Return a value as HTML shows it: names come from strangers, with whatever signs and however long."""
    return escape(printable(format_value(value)))
