"""One run of a benchmark: measured, kept, shown, compared, and how it ends."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from hpcai_cli import console, launch, rank_processes
from hpcai_cli.benchmark_options import Common, InRanks
from hpcai_cli.engine import energy
from hpcai_cli.engine.benchmarks import comparison, results, surroundings
from hpcai_cli.engine.energy import Meter
from hpcai_cli.errors import GateError
from hpcai_cli.signals import sigterm_interrupts

IN_RANKS = {"train", "checkpoint", "scaling", "allreduce", "matmul"}
"""What all ranks measure together; under a launcher rank 0 measures the others alone."""


def run(name: str, measured: Callable[[], Iterable | InRanks], common: Common, again: Sequence[str]) -> None:
    """Measure, keep and show.

    Args:
        measured: checks what was asked for, and returns what is measured one by one.
        again: the words of this command for each of several processes.

    Raises:
        DataError: the earlier result is not of this machine.
        GateError: a figure misses its limit, or got worse.
    """
    if launch.place().rank != 0:
        # Rank 0 keeps what all of them measure together.
        for _ in measured() if name in IN_RANKS else ():
            pass
        return
    if name not in IN_RANKS and launch.place().launcher:
        # Or the programs that it starts would wait for the other ranks for ever.
        launch.leave()
    share = comparison.parse_share(common.fail_on)
    old = results.read(common.compare) if common.compare else None
    if old:
        # Before anything is measured that could not be compared.
        comparison.check_comparable(old, surroundings.this_machine())
    folder, found = results.folder_for(name, common.output), measured()
    if isinstance(found, InRanks):
        rank_processes.run_command(found.ranks, [*again, *([] if common.output else ["--output", str(folder)])])
        return
    meter = Meter(common.power_file) if common.energy or common.power_file else None
    kept = results.Results(folder, name, surroundings.Watch(), meter)
    complete = False
    try:
        # SIGTERM too, by which a batch system ends a job: what was started would outlive us.
        with sigterm_interrupts():
            for each in found:
                kept.add(each)
                _tell(each)
        complete = True
    finally:
        # What was measured before an error or Ctrl-C is kept.
        document = kept.finish(complete=complete)
        if document["figures"] and not complete:
            console.note(f"what was measured until then is kept in {folder}")
    changes = comparison.changes(old, document) if old else []
    if common.json:
        console.result_json(document | {"folder": str(folder), "changes": [change.to_json() for change in changes]})
    else:
        _show(document, changes, folder)
    _judge(document, changes, share if old else None, common.check)


def _judge(document: Mapping, changes: list, share: float | None, check: bool) -> None:
    worse = [f"{change.name} is {change.worse:.1%} worse" for change in changes if change.fails(share)]
    missed = [f"{row['name']} misses its limit" for row in document["figures"] if check and row["holds"] is False]
    if worse or missed:
        raise GateError("; ".join([*worse, *missed]))


# ---- What is shown -------------------------------------------------------------------------------------------------

def _tell(found) -> None:
    if hasattr(found, "value"):
        console.note(f"{found.name}: {console.format_value(float(found.value))} {found.unit}")


def _show(document: Mapping, changes: list, folder: Path) -> None:
    for table in document["tables"]:
        console.table(table["title"], table["columns"], table["rows"])
    if document["figures"]:
        console.table("Medians, and where they lie with 95 % confidence",
                      ("figure", "value", "unit", "interval", "limit"),
                      [figure_row(row) for row in document["figures"]])
    if changes:
        console.table("Against the earlier result", ("figure", "then", "now", "unit", "worse by", ""),
                      [(change.name, change.before, change.now, change.unit, f"{change.worse:+.1%}",
                        "chance" if change.is_noise else "") for change in changes])
    if document.get("energy"):
        console.result(energy.words(document["energy"]))
    for words in document["disturbed"]:
        console.note(f"disturbed: {words}; the figures may be off")
    console.result(f"kept in {folder}")


def figure_row(row: Mapping) -> tuple:
    """Return a figure of a result as a row: name, value, unit, interval, limit."""
    interval = " to ".join(console.format_value(float(value)) for value in row["interval"]) if row["interval"] else ""
    limit = "" if row["limit"] is None else (f"{'at most' if row['at_most'] else 'at least'} {row['limit']:g}: "
                                             f"{'holds' if row['holds'] else 'MISSED'}")
    return row["name"], float(row["value"]), row["unit"], interval, limit
