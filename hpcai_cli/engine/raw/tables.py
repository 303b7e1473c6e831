"""Tables: which CSV files a source holds, what their columns are, and the rows that cannot be learned from."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcai_cli.engine.raw.csv_files import CsvFile, read_csv
from hpcai_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas

SUFFIXES = (".csv", ".tsv", ".txt", ".data")
"""Names of tables, also with .gz; the last two only where there is none of the others."""
MAX_DEPTH = 4
"""Folders below the source that are looked into."""
LARGEST = float(np.finfo(np.float32).max)
"""Numbers beyond it count as infinite: the dataset file holds float32."""
_SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation",
           "val": "validation"}
_MOSTLY = 0.95
"""Share of numbers from which on a column of many different ones holds numbers, and its texts are mistakes."""
_MANY = 20


@dataclass(frozen=True)
class Table:
    """Rows to learn from, by split, not yet encoded."""

    splits: Mapping[str, "pandas.DataFrame"]
    """Number and boolean columns as float64 with NaN, categories as text, the label as text or float64; indexed by
    line. `train` alone still has to be split."""
    files: Mapping[str, str]
    """Name of the file that each split comes from."""
    label: str
    task: str
    kinds: Mapping[str, str]
    """number, boolean or category, for each column but the label, in the file's order."""
    rejected: tuple[Mapping[str, str], ...] = ()
    """`file` (with its line) and `reason` for each row that was left out."""
    dropped: tuple[Mapping[str, str], ...] = ()
    """`name` and `reason` for each column that was left out."""
    header: bool = True
    """Whether the files name their columns."""
    names: tuple[str, ...] = ()
    """All columns of the training file, in its order, the label among them."""


def read_table(source: Path, *, label: str, task: str = "classification", drop: tuple[str, ...] = (),
               categories: tuple[str, ...] = ()) -> Table:
    """Read the one CSV file below a folder, or its train.csv, test.csv and, where there is one, validation.csv.

    Args:
        label: the column to predict; in files without a header its position from 1.
        drop: columns to leave out.
        categories: columns that hold names, also where these are numbers.

    Raises:
        DataError: the files are not one table, or a column that was named is not in it.
        UsageError: no label was named.
    """
    if not label:
        raise UsageError("the column to predict is not named", expected="its name in the header",
                         mend="add `--set label=COLUMN`", received=label)
    paths = find_files(source)
    # A label stays text, so that 01 and 1 or NO and no remain what they are.
    texts = (*categories, *([label] if task == "classification" else []))
    if label.isascii() and label.isdigit():
        texts += (f"column_{label}",)
    read = {split: read_csv(path, label=label, texts=texts) for split, path in paths.items()}
    if not read["train"].header and label not in read["train"].frame:
        label = f"column_{label}"
    return _table(read, {split: path.name for split, path in paths.items()}, label, task, drop, categories)


def table_of(columns: "Mapping | pandas.DataFrame", *, label: str, task: str = "classification", name: str = "sample",
             categories: tuple[str, ...] = ()) -> Table:
    """Make a table of columns in memory; its rows count from 1."""
    import pandas

    frame = pandas.DataFrame(columns)
    frame.index = range(1, len(frame) + 1)
    return _table({"train": CsvFile(frame, (), True, False, ())}, {"train": name}, label, task, (), categories)


def find_files(source: Path) -> dict[str, Path]:
    """Return the file of each split, `train` alone where there is only one file.

    Raises:
        DataError: there is none, or several that are no splits.
    """
    def unreadable(error):
        raise DataError(f"cannot read a folder ({error.strerror})", received=str(error.filename))

    found = []
    for here, subfolders, names in os.walk(source, onerror=unreadable):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith((".", "__MACOSX")))
        if len(Path(here).relative_to(source).parts) >= MAX_DEPTH:
            subfolders.clear()
        found += [path for name in sorted(names) if not name.startswith(".") and (path := Path(here, name)).is_file()]
    tables = [path for path in found if _suffix(path) in SUFFIXES[:2]] or [
        path for path in found if _suffix(path) in SUFFIXES[2:]]
    if len(tables) == 1:
        return {"train": tables[0]}
    splits = [_SPLITS.get(path.name.split(".")[0].lower()) for path in tables]
    if None not in splits and len(set(splits)) == len(splits) and {"train", "test"} <= set(splits):
        return dict(sorted(zip(splits, tables, strict=True), key=lambda pair: pair[0] != "train"))
    shown = ", ".join(path.name for path in tables or found) if len(tables or found) <= 8 else (
        ", ".join(path.name for path in (tables or found)[:8]) + f" and {len(tables or found) - 8:,} more")
    if not tables:
        raise DataError("the source holds no table", expected=f"a file whose name ends in {', '.join(SUFFIXES)}",
                        received=f"{source} with {shown or 'no files'}")
    raise DataError("the source holds several tables", expected="one, or train.csv and test.csv (and validation.csv)",
                    mend="put the one to train on into a folder of its own", received=shown)


def as_kind(column: "pandas.Series", kind: str, *, decimal_comma: bool) -> tuple["pandas.Series", "pandas.Series"]:
    """Return a column as its kind is held, missing cells as NaN, and where its cells are none of the kind.

    Infinite numbers, and those too large for float32, count as missing.
    """
    if kind == "category":
        # A whole number reads 2.0 in a column that has missing cells, and 2 in the same column of another file.
        texts = column.dropna().astype(str).str.replace(r"^([+-]?\d+)\.0+$", r"\1", regex=True)
        return texts.astype("object").reindex(column.index), column.isna() & False
    if kind == "boolean":
        words = column.astype("object").map(lambda cell: str(cell).lower())
        values = words.map({"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}).astype("float64")
        return values, values.isna() & column.notna()
    values = _numbers(column, decimal_comma)
    return values.where(values.abs() <= LARGEST), values.isna() & column.notna()


def nearest(name: str, known) -> str:
    """Return what to say about the known name that looks most like one that is unknown."""
    folded = {str(other).lower(): str(other) for other in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    return f", perhaps {folded[close[0]]!r}" if close else ""


def _table(read: Mapping[str, CsvFile], files: Mapping[str, str], label: str, task: str, drop: tuple[str, ...],
           categories: tuple[str, ...]) -> Table:
    train = read["train"]
    _check_columns(read, files, label, drop, categories)
    kinds = {name: "category" if name in categories else _kind(train.frame[name], train.decimal_comma)
             for name in train.frame if name != label and name not in drop}
    if not kinds:
        raise DataError("the table has no column to learn from", expected=f"others beside {label!r}",
                        received=files["train"])
    kept, rejected = {}, []
    for split, file in read.items():
        listed = dict(file.rejected)
        columns = {}
        for name, kind in {label: "category" if task == "classification" else "number", **kinds}.items():
            cells = file.frame[name]
            columns[name], wrong = as_kind(cells, kind, decimal_comma=file.decimal_comma)
            for line, cell in cells[wrong].items():
                listed.setdefault(line, f"column {name!r} holds {_short(cell)}, which is no {kind}")
        unlabeled = columns[label].isna()
        for line, cell in file.frame[label][unlabeled].items():
            listed.setdefault(line, f"it has no label in column {label!r}" if cell != cell or cell is None else
                              f"its label {_short(cell)} is no finite number")
        frame = _frame(columns)
        kept[split] = frame[~frame.index.isin(list(listed))]
        rejected += [{"file": f"{files[split]}:{line}", "reason": listed[line]} for line in sorted(listed)]
        if kept[split].empty:
            raise DataError(f"{files[split]} has no row that can be used", expected="rows with a label",
                            received=f"{rejected[-1]['file']}: {rejected[-1]['reason']}")
    dropped = [{"name": name, "reason": "the recipe leaves it out"} for name in drop]
    dropped += [{"name": f"column {place}", "reason": "the header gives it no name"} for place in train.unnamed]
    return Table(kept, dict(files), label, task, kinds, tuple(rejected), tuple(dropped), train.header,
                 tuple(train.frame))


def _frame(columns: Mapping[str, "pandas.Series"]) -> "pandas.DataFrame":
    import pandas

    return pandas.DataFrame(dict(columns))


def _check_columns(read, files, label, drop, categories) -> None:
    if label in drop:
        raise UsageError("the label is among the columns to leave out", expected="another one", received=label)
    problems = []
    for split, file in read.items():
        names = list(file.frame)
        asked = {label, *drop, *categories} if split == "train" else set(read["train"].frame) - set(drop)
        for name in sorted(asked - set(names)):
            what = "the label" if name == label else "the column"
            problems.append(f"{files[split]} lacks {what} {name!r}{nearest(name, names)}")
    if problems:
        names = list(read["train"].frame)
        shown = ", ".join(names[:12]) + (f" and {len(names) - 12:,} more" if len(names) > 12 else "")
        raise DataError("; ".join(problems[:8]), expected=f"a column of {files['train']}", received=shown)


def _kind(column: "pandas.Series", decimal_comma: bool) -> str:
    """Tell a column's kind: numbers with few mistakes among them are numbers, other texts are categories."""
    import pandas

    if pandas.api.types.is_bool_dtype(column):
        return "boolean"
    if pandas.api.types.is_numeric_dtype(column):
        return "number"
    there = column.dropna()
    if set(there.astype(str).str.lower().unique()) <= {"true", "false"}:
        return "boolean"
    read = _numbers(there, decimal_comma)
    count = read.notna().sum()
    return "number" if count == len(there) or count >= _MOSTLY * len(there) and read.nunique() > _MANY else "category"


def _numbers(column: "pandas.Series", decimal_comma: bool) -> "pandas.Series":
    """Return a column as float64, NaN where there is no number."""
    import pandas

    if pandas.api.types.is_numeric_dtype(column):
        return column.astype("float64")
    texts = column.dropna().astype(str)
    # A point in the same column would make a thousands separator of the comma.
    if decimal_comma and not texts.str.contains(".", regex=False).any():
        commas = texts.str.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?").astype(bool)
        texts = texts.where(~commas, texts.str.replace(",", ".", regex=False))
    return pandas.to_numeric(texts.astype("object"), errors="coerce").reindex(column.index).astype("float64")


def _short(cell: object) -> str:
    text = str(cell)
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix
