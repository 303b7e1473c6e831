"""Watches a server: its statistics against those of training, labels that came later, a report of both."""

import json
import math
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path

from hpcai_cli.engine.deployment import drift
from hpcai_cli.engine.deployment.drift import Thresholds
from hpcai_cli.engine.deployment.live_accuracy import live_accuracy
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.statistics import files_of, merged
from hpcai_cli.errors import DataError, GateError, HpcaiError, UsageError, printable
from hpcai_cli.run import write_bytes, write_json

LARGEST_ANSWER = 64 << 20
"""Bytes of a server's answer that are read."""
HOUR = 3600.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    """Its address, as in http://127.0.0.1:8000."""
    token: str = ""
    """Sent as a bearer token."""
    certificate: Path | None = None
    """The authority that signed the server's certificate; None for those that the system knows."""
    version: str = ""
    """Of the model; empty for the one that answers when none is named."""
    timeout: float = 10.0
    """Seconds."""


@dataclass(frozen=True)
class Labels:
    """Labels that came later, and the log of the requests that they belong to."""

    labels: Path
    logs: Sequence[Path]


def monitor(artefact: Artefact, source: Server | Path, thresholds: Thresholds, *, name: str = "",
            hours: float | None = None, labels: Labels | None = None) -> tuple[dict, dict]:
    """Return a report (drift.examine) and the statistics that it rests on, as JSON values.

    Args:
        source: a running server, or the folder in which one keeps its state.
        name: of the model in the server's addresses; by default that of the export.
        hours: how far to look back, in whole slots of the statistics; None for all that they hold.
        labels: add `live_accuracy`, and its checks.

    Raises:
        UsageError: the address is none.
        DataError: the statistics are missing, broken or another model's, or a file of labels cannot be read.
        HpcaiError: the server cannot be reached, or refuses.
    """
    artefact = replace(artefact, document={**artefact.document, "name": name or artefact.name})
    since = None if hours is None else time.time() - hours * HOUR
    if isinstance(source, Server):
        statistics = fetched(source, artefact.name, since)
    else:
        files = files_of(artefact, source)
        if not files:
            raise DataError(f"there are no statistics of the model {artefact.name} here", received=str(source),
                            expected="the folder that `hpcai deploy serve` keeps its state in, with this same export")
        statistics = merged(artefact, files, since=since)
    report = drift.examine(artefact, statistics, thresholds)
    if labels is not None:
        found = live_accuracy(artefact, labels.labels, labels.logs, since=since,
                              version=getattr(source, "version", "") or None)
        report = drift.concluded(report | {"live_accuracy": found,
                                           "checks": [*report["checks"], *_of_labels(found, thresholds)]})
    return report, statistics


def fetched(server: Server, name: str, since: float | None = None) -> dict:
    """Return what a running server's statistics of a model are.

    Raises:
        UsageError: the address is none.
        DataError: the answer holds no statistics.
        HpcaiError: the server cannot be reached, or refuses.
    """
    address = _address(server, name, since)
    request = urllib.request.Request(address, headers={"Accept": "application/json"})
    if server.token:
        request.add_header("Authorization", f"Bearer {server.token}")
    try:
        content = _answer(request, server)
    except urllib.error.HTTPError as error:
        with error:
            raise HpcaiError(f"the server answers {error.code} for {printable(address)}: {_words(error)}",
                             mend=_MENDS.get(error.code, "")) from None
    except (OSError, HTTPException) as error:
        reason = printable(str(getattr(error, "reason", None) or error))
        raise HpcaiError(f"cannot reach the server: {reason}", expected="a running `hpcai deploy serve`",
                         received=address) from None
    except ValueError:
        # The message would show the token.
        raise UsageError("the address or the token holds signs that cannot be sent", received=address) from None
    try:
        statistics = json.loads(content if len(content) <= LARGEST_ANSWER else b"")
    except (ValueError, RecursionError):
        statistics = None
    if not isinstance(statistics, dict):
        raise DataError("the server's answer holds no statistics", expected="a server of hpcai", received=address)
    if since is not None and statistics.get("since") is None:
        # It would be a report on other hours than the user's, and nobody would notice.
        raise DataError("the server does not look back a number of hours", expected="a server of hpcai",
                        mend="leave out the hours")
    return statistics


def require(report: Mapping) -> None:
    """Raise GateError where a check of a report fails."""
    if not report["holds"]:
        failed = report["failed"]
        raise GateError(f"{len(failed)} of {len(report['checks'])} checks fail: {printable(', '.join(failed[:8]))}",
                        mend="look at what changed in the data, and train again on it")


def write(folder: Path, artefact: Artefact, report: Mapping, statistics: Mapping) -> None:
    """Write monitor.json, statistics.json and report.html.

    Raises:
        HpcaiError: the folder cannot be written.
    """
    from hpcai_cli.engine.deployment.monitor_page import monitor_page

    write_bytes(folder / "report.html", monitor_page(artefact, report, statistics).encode("utf-8", "replace"))
    write_json(folder / "statistics.json", statistics)
    write_json(folder / "monitor.json", report)


def prometheus_text(report: Mapping) -> str:
    """Return a report's checks in Prometheus' text format.

    Source: https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    families = {"value": "A figure that compares what a server sees with its model's training.",
                "limit": "What that figure fails above.",
                "examples": "How many examples that figure rests on.",
                "failed": "Whether that figure fails."}
    lines = []
    for family, words in families.items():
        lines += [f"# HELP hpcai_monitor_{family} {words}", f"# TYPE hpcai_monitor_{family} gauge"]
        for check in report["checks"]:
            value = check["state"] == drift.FAILS if family == "failed" else check[family]
            if value is not None:
                labels = ",".join(f'{name}="{_escaped(text)}"' for name, text in (
                    ("model", report["model"]), ("of", check["of"]), ("figure", check["figure"])))
                lines.append(f"hpcai_monitor_{family}{{{labels}}} {float(value)!r}")
    lines += ["# HELP hpcai_monitor_holds Whether no check fails.", "# TYPE hpcai_monitor_holds gauge",
              f'hpcai_monitor_holds{{model="{_escaped(report["model"])}"}} {float(report["holds"])!r}']
    return "\n".join(lines) + "\n"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect an error: it would take the token to another server."""

    def redirect_request(self, *arguments):
        return None


_MENDS = {401: "give the server's token", 403: "give the server's token",
          404: "give the name under which the server has the model"}


def _address(server: Server, name: str, since: float | None) -> str:
    """Return where the statistics are, or raise UsageError."""
    try:
        parts = urllib.parse.urlsplit(server.url)
        fits = parts.scheme in ("http", "https") and parts.hostname and not parts.query and not parts.fragment
    except ValueError:
        fits = False
    if not fits:
        raise UsageError("this is no server's address", expected="http://HOST:PORT or https://HOST:PORT",
                         received=server.url)
    model = urllib.parse.quote(name, safe="")
    if server.version:
        model += f"/versions/{urllib.parse.quote(server.version, safe='')}"
    asked = "" if since is None else f"?since={since:.0f}"
    return f"{server.url.rstrip('/')}/v2/models/{model}/statistics{asked}"


def _answer(request: urllib.request.Request, server: Server) -> bytes:
    try:
        context = ssl.create_default_context(cafile=server.certificate)
    except (OSError, ssl.SSLError) as error:
        raise DataError(f"cannot use the certificate {server.certificate}: {error.strerror or error}") from None
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=server.timeout) as answer:
        return answer.read(LARGEST_ANSWER + 1)


def _words(error: urllib.error.HTTPError) -> str:
    """Return what a server says of its refusal."""
    try:
        return printable(error.read(1000).decode("utf-8", "replace").strip()) or str(error.reason)
    except (OSError, HTTPException):
        return str(error.reason)


def _of_labels(found: Mapping, thresholds: Thresholds) -> list[dict]:
    """Return the checks of how right the answers were; those fail whose whole interval lies beyond the threshold."""
    least, low, high = thresholds.min_examples, *(found["interval"] or (math.nan, math.nan))
    figure = "accuracy" if "accuracy" in found else "mean_absolute_error"
    threshold = getattr(thresholds, figure)
    row = drift.check("the labels", figure, found[figure], threshold=threshold, examples=found["examples"],
                      least=least, interval=found["interval"])
    if row["state"] in (drift.HOLDS, drift.FAILS):
        beyond = high < threshold if figure == "accuracy" else low > threshold
        row |= {"limit": threshold, "state": drift.FAILS if beyond else drift.HOLDS}
    return [row]


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
