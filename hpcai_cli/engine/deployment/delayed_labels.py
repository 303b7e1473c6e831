"""Reads labels that came later, a CSV file of ids, and the lines of files that may be of any size."""

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from hpcai_cli.errors import DataError

MOST_LABELS = 2_000_000
"""Labels that are held in memory."""
MOST_LINE = 1 << 20
"""Bytes of a line that is read; a longer one counts as unreadable."""
LONGEST_ID = 300
CONFLICTING = object()
"""Stands in place of a label of which there are two that differ."""


def labels_of(path: Path, class_names: Sequence[str], counts: Counter) -> dict:
    """Return the labels by id: a class's place, a number where there are no classes, or CONFLICTING.

    Args:
        counts: takes `labels`, and of them `foreign_labels`, `duplicate_labels` and `conflicting`; `unreadable_labels`.

    Raises:
        DataError: the file cannot be read, has no such columns, or too many labels.
    """
    places = {name: place for place, name in enumerate(class_names)}
    rows = _rows(path, counts)
    header = [name.strip().lower() for name in next(rows, [])]
    if "id" not in header or "label" not in header:
        raise DataError(f"{path} holds no labels", expected="a CSV file that begins with the line id,label",
                        received=",".join(header))
    id_place, label_place = header.index("id"), header.index("label")
    known: dict = {}
    for row in rows:
        if len(row) != len(header) or not 0 < len(row[id_place]) <= LONGEST_ID:
            counts["unreadable_labels"] += 1
            continue
        counts["labels"] += 1
        identity, told = row[id_place], row[label_place]
        label = places.get(told, places.get(told.strip())) if places else _number(told)
        if label is None:
            counts["foreign_labels"] += 1
        elif identity not in known:
            known[identity] = label
        elif known[identity] == label:
            counts["duplicate_labels"] += 1
        elif known[identity] is not CONFLICTING:
            counts["conflicting"] += 1
            known[identity] = CONFLICTING
        if len(known) > MOST_LABELS:
            raise DataError(f"{path} has too many labels", expected=f"at most {MOST_LABELS:,}", mend="split the file")
    return known


def _rows(path: Path, counts: Counter) -> Iterator[list[str]]:
    """Give the rows of a CSV file that are not empty; what is no row is counted."""
    def text() -> Iterator[str]:
        for line in lines_of(path):
            if line is None:
                counts["unreadable_labels"] += 1
            else:
                yield line.decode("utf-8-sig", "replace")

    rows = csv.reader(text(), skipinitialspace=True)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            counts["unreadable_labels"] += 1
            continue
        if row:
            yield row


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if abs(value) < 1e150 else None


def lines_of(path: Path) -> Iterator[bytes | None]:
    """Give the lines of a file that are not empty, None for one that is too long to be held."""
    try:
        with path.open("rb") as file:
            while line := file.readline(MOST_LINE):
                if len(line) == MOST_LINE and not line.endswith(b"\n"):
                    _skip(file)
                    yield None
                elif line.strip():
                    yield line
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _skip(file: BinaryIO) -> None:
    """Go to the end of the line."""
    while (rest := file.readline(MOST_LINE)) and not rest.endswith(b"\n"):
        pass
