"""Keeps what was measured: one folder a run, written again with each figure, so that an interrupted run keeps its own.

FOLDER/result.json holds everything, FOLDER/figures.csv the figures; pictures of the curves lie beside them.
"""

import csv
import io
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from hpcai_cli.engine.benchmarks import measure, result_plots, surroundings
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table, Work
from hpcai_cli.engine.energy import Meter
from hpcai_cli.errors import DataError
from hpcai_cli.run import read_json, write_bytes, write_json

SCHEMA = "hpcai.benchmark/2"
FILE = "result.json"


class Results:
    """What one run of benchmarks has measured so far.

    Attributes:
        document: what FOLDER/result.json holds.
    """

    def __init__(self, folder: Path, name: str, watch: surroundings.Watch, meter: Meter | None = None):
        self._folder, self._watch, self._meter = folder, watch, meter
        self._started = time.monotonic()
        self.document = {
            "schema": SCHEMA, "command": "benchmark", "benchmark": name, "ran": surroundings.command(),
            "started": f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}", "seconds": 0.0, "complete": False,
            "machine": surroundings.this_machine(), "versions": surroundings.versions(), "before": watch.before,
            "after": None, "disturbed": [], "energy": None, "figures": [], "tables": [],
            "curves": []}
        self._works: list[Work] = []
        if meter:
            meter.start()
            measure.mark_by(meter.mark)

    def add(self, found: Figure | Table | Curves | Work) -> None:
        """Add what was measured, and write it down."""
        if isinstance(found, Work):
            self._works.append(found)
            return
        if isinstance(found, Figure):
            self.document["figures"].append(found.to_json())
        else:
            self.document["tables" if isinstance(found, Table) else "curves"].append(asdict(found))
        self._write()

    def finish(self, *, complete: bool) -> dict:
        """Write down how it ended, and draw the curves; return the document."""
        energy = self._meter.finish() if self._meter else None
        measure.mark_by(time.time)
        if energy and energy["joules"] is not None:
            self._add_joules(energy)
        after, disturbed = self._watch.finish()
        self.document |= {"complete": complete, "after": after, "disturbed": disturbed, "energy": energy}
        self._write()
        write_bytes(self._folder / "figures.csv", figures_csv(self.document).encode())
        for name, content in result_plots.pictures(self.document).items():
            write_bytes(self._folder / name, content)
        return self.document

    def _add_joules(self, energy: dict) -> None:
        """Add the joules of a sample of each work, or the reason why nothing can be said of them."""
        try:
            for work in self._works:
                rounds = [self._meter.between(*span) / samples
                          for samples, span in zip(work.samples, work.spans, strict=True)]
                self.add(measure.median(work.benchmark, f"{work.name}: energy of a sample", rounds, "J/sample"))
        except OSError as error:
            energy["reason"] = "; ".join(filter(None, (energy["reason"], f"of a sample: {error}")))

    def _write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._started, 3)
        write_json(self._folder / FILE, self.document)


def folder_for(name: str, given: Path | None) -> Path:
    """Return the folder of a new run: the one that was given, or benchmarks/NAME-TIME.

    Raises:
        DataError: the one that was given is not empty.
    """
    if given is None:
        return Path("benchmarks") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    if given.exists() and (not given.is_dir() or any(given.iterdir())):
        raise DataError("the results' folder is not empty", expected="a new or empty folder", received=str(given))
    return given


def read(path: Path) -> dict:
    """Read what a run has kept.

    Args:
        path: its folder, or the result.json in it.

    Raises:
        DataError: it is none, or of another schema.
    """
    file = path / FILE if path.is_dir() else path
    document = read_json(file)
    if document.get("schema") != SCHEMA:
        raise DataError(f"{file} is no result that this version can read", expected=f"the schema {SCHEMA}",
                        received=document.get("schema"))
    rows = document.get("figures")
    whole = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("value"), (int, float)) and isinstance(row.get("rounds"), list)
        and {"benchmark", "name", "unit", "interval"} <= row.keys() for row in rows)
    if not whole or not isinstance(document.get("machine"), dict):
        raise DataError(f"{file} is broken", expected="a result.json as `hpcai benchmark` writes it")
    return document


def kept(folder: Path) -> Iterator[tuple[Path, dict]]:
    """Yield folder and document of each run that is kept in a folder, the oldest first; what is no result is left
    out."""
    found = []
    for file in folder.glob(f"*/{FILE}"):
        try:
            found.append((file.parent, read(file)))
        except DataError:
            continue
    yield from sorted(found, key=lambda pair: pair[1].get("started", ""))


def figures_csv(document: dict) -> str:
    """Return the figures as CSV, a row each."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerow(("benchmark", "figure", "value", "unit", "low", "high", "rounds", "limit", "holds"))
    for row in document["figures"]:
        low, high = row["interval"] or (None, None)
        writer.writerow((row["benchmark"], row["name"], row["value"], row["unit"], low, high, len(row["rounds"]),
                         row["limit"], row["holds"]))
    return stream.getvalue()
