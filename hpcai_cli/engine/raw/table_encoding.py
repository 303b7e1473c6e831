"""Encodes tables as the float32 arrays that a model takes; all that is fitted is fitted on the training split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.raw.csv_files import CsvFile, read_csv
from hpcai_cli.engine.raw.table_splits import split_rows
from hpcai_cli.engine.raw.tables import Table, as_kind, nearest
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

if TYPE_CHECKING:
    import pandas

MOST_CATEGORIES = 1_000
MOST_CLASSES = 1_000
MOST_BYTES = 4 << 30
"""Bytes of the encoded table, which is held in memory."""


@dataclass(frozen=True)
class Encoded:
    """A table as arrays, with all that is needed to encode new rows alike."""

    splits: Mapping[str, tuple[np.ndarray, np.ndarray]]
    """Inputs float32 (n, features), labels int64 (n,) or, for a regression, float32 (n,)."""
    class_names: tuple[str, ...]
    """In the order of the labels; none for a regression."""
    details: dict
    """JSON values: `columns`, `features`, `label`, `dropped_columns`, `rejected`, `duplicates`, `label_conflicts`."""


def encode(table: Table, recipe: Recipe) -> Encoded:
    """Split a table as the recipe says, fit the encoding on the training split, and encode every split.

    Numbers stay as they are, missing ones become the median, with a feature that says so where the training split has
    missing ones; booleans become 0 and 1; each category becomes a feature of its own.

    Raises:
        DataError: the rows cannot be split, or hold nothing to learn.
    """
    splits, counts = split_rows(table, recipe)
    train = splits["train"]
    class_names = _class_names(train[table.label], table) if table.task == "classification" else ()
    splits, unknown = _known_labels(splits, table, class_names)
    columns, dropped = [], list(table.dropped)
    for name, kind in table.kinds.items():
        reason = _useless(train[name], kind)
        if reason:
            dropped.append({"name": name, "reason": reason})
        else:
            columns.append(_fit_number(name, kind, train[name]) if kind != "category" else
                           _fit_category(name, train[name]))
    if not columns:
        raise DataError("no column is left to learn from", expected="columns with different values",
                        received="; ".join(f"{entry['name']}: {entry['reason']}" for entry in dropped[:8]))
    label = {"name": table.label, "task": table.task, "classes": list(class_names)}
    if table.task == "regression":
        label |= {"mean": float(train[table.label].mean()), "deviation": float(train[table.label].std(ddof=0))}
    details = {"columns": columns, "features": [name for column in columns for name in _features(column)],
               "label": label, "dropped_columns": dropped, "rejected": [*table.rejected, *unknown],
               "header": table.header, "names": list(table.names), **counts}
    size = 4 * len(details["features"]) * sum(map(len, splits.values()))
    if size > MOST_BYTES:
        raise DataError("the table is too large once it is encoded", expected=f"at most {MOST_BYTES:,} bytes",
                        mend="leave out columns, as in `--set drop=COLUMN,COLUMN`", received=f"{size:,} bytes")
    places = {name: number for number, name in enumerate(class_names)}
    arrays = {}
    for split, frame in splits.items():
        labels = frame[table.label]
        labels = labels.map(places).to_numpy(np.int64) if class_names else labels.to_numpy(np.float32)
        arrays[split] = _inputs(frame, columns), labels
    return Encoded(arrays, class_names, details)


def encode_rows(rows: "Path | pandas.DataFrame", details: Mapping) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Encode new rows as the training's were; they need no label, and what they have beyond the columns is ignored.

    Args:
        rows: a CSV file, or a frame whose cells are as `read_csv` gives them.
        details: what `encode` gave.

    Returns:
        Inputs float32 (n, features), one for each row of the file, and for the rows that cannot be encoded, whose
        inputs are 0, their place from 0 and the reason.

    Raises:
        DataError: the file is no table, or lacks columns.
    """
    columns = details["columns"]
    file = _read_rows(rows, details) if isinstance(rows, Path) else CsvFile(rows, (), True, False, ())
    frame = file.frame
    missing = [column["name"] for column in columns if column["name"] not in frame]
    if missing:
        near = nearest(missing[0], list(frame)) if len(missing) == 1 else ""
        raise DataError(f"the rows lack the column{'s' if len(missing) > 1 else ''} "
                        f"{', '.join(map(repr, missing[:8]))}{near}", expected="the columns of the training data",
                        received=", ".join(map(str, list(frame)[:12])))
    extra = [str(name) for name in frame if name not in details["names"]]
    if extra:
        console.note(f"ignored: columns that the training data did not have: {', '.join(extra[:8])}")
    lines = sorted([*frame.index, *(line for line, _ in file.rejected)])
    reasons = dict(file.rejected)
    held = {}
    for column in columns:
        name, kind = column["name"], column["kind"]
        held[name], wrong = as_kind(frame[name], kind, decimal_comma=file.decimal_comma)
        for line, cell in frame[name][wrong].items():
            reasons.setdefault(line, f"column {name!r} holds {str(cell)[:40]!r}, which is no {kind}")
    import pandas

    readable = frame.index[~frame.index.isin(list(reasons))]
    inputs = np.zeros((len(lines), len(details["features"])), np.float32)
    inputs[np.searchsorted(lines, readable)] = _inputs(pandas.DataFrame(held).loc[readable], columns)
    return inputs, [(place, f"line {line}: {reasons[line]}") for place, line in enumerate(lines) if line in reasons]


def _read_rows(path: Path, details: Mapping) -> CsvFile:
    texts = tuple(column["name"] for column in details["columns"] if column["kind"] == "category")
    if details["header"]:
        return read_csv(path, texts=texts, header=True)
    names, label = tuple(details["names"]), details["label"]["name"]
    return read_csv(path, texts=texts, header=False, names=lambda count: names if count == len(names) else tuple(
        name for name in names if name != label))


def _class_names(labels: "pandas.Series", table: Table) -> tuple[str, ...]:
    """Return the classes of the training split, numbers by size, names by letter."""
    names = _ordered(labels.unique())
    if len(names) < 2:
        raise DataError(f"the label {table.label!r} has one class only", expected="two or more", received=names[0])
    if len(names) > MOST_CLASSES:
        raise DataError(f"the label {table.label!r} has {len(names):,} different values",
                        expected=f"at most {MOST_CLASSES:,} classes",
                        mend="if it is a quantity, add `--set task=regression`", received=", ".join(names[:5]))
    return tuple(names)


def _ordered(names) -> list[str]:
    try:
        return sorted(names, key=float)
    except ValueError:
        return sorted(names)


def _known_labels(splits: Mapping, table: Table, class_names: tuple[str, ...]) -> tuple[dict, list[dict]]:
    """Leave out rows of other splits whose class the training split does not have."""
    kept, rejected = {}, []
    for split, frame in splits.items():
        known = frame[table.label].isin(class_names) if class_names else frame[table.label].notna()
        kept[split] = frame[known]
        file = table.files.get(split, table.files["train"])
        rejected += [{"file": f"{file}:{line}", "reason": f"its label {label!r} is not in the training split"}
                     for line, label in frame[table.label][~known].items()]
        if kept[split].empty:
            raise DataError(f"no row of the {split} split has a label of the training split",
                            expected=f"one of {', '.join(class_names[:8])}", received=rejected[-1]["file"])
    return kept, rejected


def _useless(values: "pandas.Series", kind: str) -> str:
    """Return why nothing can be learned from a column, or nothing."""
    count = values.nunique()
    if not count:
        return "it is empty"
    if count == 1 and values.notna().all():
        return "it is the same in each row"
    if kind == "category" and count > MOST_CATEGORIES:
        return f"it holds text with {count:,} different values, more than {MOST_CATEGORIES:,}"
    if kind == "category" and count > max(20, len(values) // 2):
        return f"it holds text that differs in nearly each row ({count:,} values in {len(values):,} rows)"
    return ""


def _fit_number(name: str, kind: str, values: "pandas.Series") -> dict:
    median, mean, deviation = float(values.median()), float(values.mean()), float(values.std(ddof=0))
    # In float32 a time stamp is exact to two minutes; its distance from the median is exact to parts of a second.
    offset = median if abs(mean) > 1000 * deviation else 0.0
    missing = int(values.isna().sum())
    return {"name": name, "kind": kind, "fill": median, "offset": offset, "mean": mean, "deviation": deviation,
            "missing": missing}


def _fit_category(name: str, values: "pandas.Series") -> dict:
    return {"name": name, "kind": "category", "categories": _ordered(values.dropna().unique()),
            "missing": int(values.isna().sum())}


def _features(column: Mapping) -> list[str]:
    """Return the names of a column's features, in their order."""
    name = column["name"]
    values = [f"{name}={category}" for category in column["categories"]] if "categories" in column else [name]
    return [*values, f"{name} is missing"] if column["missing"] else values


def _inputs(frame: "pandas.DataFrame", columns: list[Mapping]) -> np.ndarray:
    """Return the features of rows, float32 (n, features); a category that is unknown is 0 in all of its features."""
    inputs = np.zeros((len(frame), sum(len(_features(column)) for column in columns)), np.float32)
    start = 0
    for column in columns:
        values, width = frame[column["name"]], len(_features(column))
        if "categories" in column:
            places = values.map({category: place for place, category in enumerate(column["categories"])})
            known = places.notna().to_numpy()
            inputs[np.flatnonzero(known), start + places[known].to_numpy(np.int64)] = 1
            unknown = int((places.isna() & values.notna()).sum())
            if unknown:
                console.note(f"column {column['name']!r} has unknown categories in {unknown:,} of {len(frame):,} rows; "
                             "all of its features are 0 there")
        else:
            inputs[:, start] = values.fillna(column["fill"]).to_numpy() - column["offset"]
        if column["missing"]:
            inputs[:, start + width - 1] = values.isna()
        start += width
    return inputs
