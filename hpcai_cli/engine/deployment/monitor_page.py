"""The monitor's report as one HTML page, in the ways of the evaluation's page."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone

from hpcai_cli.engine.deployment import monitor_plots
from hpcai_cli.engine.deployment.drift import FAILS
from hpcai_cli.engine.reports.page import fact_list, figure, table, text, whole
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.statistics_layout import Layout

CHECK_COLUMNS = ("of", "figure", "value", "threshold", "limit", "examples", "")
_FOOTER = ("A figure beyond its limit fails. With few examples the limit lies beyond the threshold, so that chance "
           "alone passes it in one of 1,000 reports. Written by hpcai deploy monitor.")


def monitor_page(artefact: Artefact, report: Mapping, statistics: Mapping) -> str:
    """Return the page.

    Args:
        report: what `monitor` gave.
        statistics: what it rests on.
    """
    failed = report["failed"]
    words = f"{len(failed)} of {len(report['checks'])} checks fail." if failed else "No check fails."
    title = f"Monitoring of {report['model']}"
    facts = {"from": moment(report["from"]), "to": moment(report["to"]), "answers": report["answers"],
             "inputs looked at": report["inputs"], "answers that are no numbers": report["broken"] or None}
    return whole(title, [f"<h1>{text(title)}</h1>", f"<p>{text(words)}</p>", *fact_list(facts),
                         *_parts(artefact, report, statistics)], _FOOTER)


def check_rows(report: Mapping) -> list[tuple]:
    """Return the rows of the table of checks, those that fail first; for page and terminal."""
    rows = sorted(report["checks"], key=lambda check: check["state"] != FAILS)
    return [(check["of"], check["figure"], check["value"], check["threshold"], check["limit"], check["examples"],
             check["state"]) for check in rows]


def moment(time: float | None) -> str | None:
    """Return a Unix time for people."""
    return None if time is None else f"{datetime.fromtimestamp(time, timezone.utc):%Y-%m-%d %H:%M} UTC"


def _parts(artefact: Artefact, report: Mapping, statistics: Mapping) -> Iterator[str]:
    layout = Layout(artefact)
    yield from ("<h2>Checks</h2>", *table("Those that fail come first", CHECK_COLUMNS, check_rows(report)))
    if "live_accuracy" in report:
        yield from _labelled(report["live_accuracy"])
    pairs = _pairs(layout, report, statistics)
    if pairs:
        yield "<h2>Inputs and answers</h2>" if layout.values else "<h2>Inputs</h2>"
        yield figure(monitor_plots.quantities(pairs[:monitor_plots.MOST_QUANTITIES]), "Share of each bin, in training "
                     "and live, of the quantities that changed most. The outer bins lie outside of what training held.")
    if report["quantities"]:
        names = ("name", "reference_mean", "mean", "reference_std", "std", "outside", "missing")
        yield from table("Means and standard deviations, share outside of what training held, and missing ones",
                         ("quantity", "mean in training", "mean", "deviation in training", "deviation", "outside",
                          "missing"), [tuple(row[name] for name in names) for row in report["quantities"]])
    if artefact.class_names and sum(statistics["answers"]["classes"]):
        then = layout.reference["answers"] if layout.reference else {}
        now = statistics["answers"]
        yield "<h2>Answers</h2>"
        yield figure(monitor_plots.classes(artefact.class_names, then.get("classes"), now["classes"]),
                     "Share of each class among the answers, in training and live.")
        yield figure(monitor_plots.confidence(then.get("confidence"), now["confidence"]),
                     "How sure the answers are, in training and live.")
    if sum(statistics["latency"]):
        marks = {check["figure"].removesuffix("_ms"): check["value"] for check in report["checks"]
                 if check["of"] == "the latency"}
        yield "<h2>Requests</h2>"
        yield figure(monitor_plots.latency(statistics["latency"], marks), "How long requests took that went well.")
        yield from table("Answered requests by status", ("status", "requests"), list(statistics["requests"].items()))


def _pairs(layout: Layout, report: Mapping, statistics: Mapping) -> list[tuple[str, Mapping, Mapping]]:
    """Return title, reference and live counts of each quantity with any, the most changed first."""
    if layout.reference is None:
        return []
    moved = {check["of"]: check["value"] for check in report["checks"] if check["figure"] == "psi"}
    named = [(f"input {then['name']}", then, now) for then, now in zip(
        layout.inputs, statistics["inputs"]["quantities"], strict=True)]
    if layout.values:
        named.append(("the answers", layout.values[0], statistics["answers"]["values"]))
    found = [(moved[of], of, then, now) for of, then, now in named if moved.get(of) is not None and sum(now["counts"])]
    return [(f"{of.removeprefix('input ')}: psi {psi:.3g}", then, now) for psi, of, then, now in sorted(
        found, key=lambda row: -row[0])]


def _labelled(found: Mapping) -> Iterator[str]:
    """Give how right the answers were."""
    figures = [(name.replace("_", " "), found[name]) for name in ("accuracy", "mean_absolute_error", "mean_error")
               if found.get(name) is not None]
    interval: Sequence[float] | None = found["interval"]
    yield "<h2>Labels that came later</h2>"
    yield from fact_list(dict(figures) | {
        "95 % interval": f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else None,
        "examples": found["examples"],
        **{name.replace("_", " "): count for name, count in found["counts"].items() if count}})
    if found.get("classes"):
        columns = ("name", "examples", "answered", "right", "recall", "precision")
        yield from table("By class", columns, [tuple(row[name] for name in columns) for row in found["classes"]])
