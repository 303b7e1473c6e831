"""What people send and read who do not speak the protocol: image files, a table's rows, answers with names."""

import re
from collections.abc import Mapping

import numpy as np

from hpcai_cli.engine.raw import images
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.protocol import LIMITS, Limits, check_scores, probabilities, winners
from hpcai_cli.engine.serving.tensors import RequestError, shown, tensor
from hpcai_cli.errors import DataError, printable

MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null")
"""Texts that stand for a missing value in a row, as in a CSV file (raw/csv_files.py, which bundles do not have)."""
LARGEST = float(np.finfo(np.float32).max)
"""Numbers beyond it count as missing, as they do in a CSV file."""
LONGEST_NUMBER = 1000
"""Characters of a number that is sent as text."""
MOST_ENCODED = 256 << 20
"""Bytes of encoded rows; a row with many categories is far larger than what was sent."""
_NUMBER = re.compile(r"[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|inf(inity)?)", re.ASCII | re.IGNORECASE)
"""What pandas reads as a number in a CSV file."""
_TRUTHS = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, "1.0": 1.0, "0.0": 0.0}
_TOO_LARGE = re.compile(r"(the file )?has more than|\d+x\d+ pixels are more than|needs too much memory")


def image_example(artefact: Artefact, content: bytes, limits: Limits = LIMITS) -> np.ndarray:
    """Decode an image file as `hpcai predict` does, to uint8 (1, height, width, channels).

    At most limits.most_pixels and never more than raw.images.MOST_PIXELS are decoded.

    Raises:
        RequestError: 415 for what is no image, or for a model of rows, 413 for too large ones, 400 for damaged ones.
    """
    if artefact.inputs != "images":
        raise RequestError(415, "this model takes no images; expected rows of a table")
    try:
        most = min(limits.most_pixels, images.MOST_PIXELS)
        return images.decode(content, artefact.input_shape, most_pixels=most)[None]
    except DataError as error:
        reason = str(error)
    if reason == "not an image":
        raise RequestError(415, f"this is not an image; expected {', '.join(images.FORMATS)}")
    raise RequestError(413 if _TOO_LARGE.match(reason) else 400, f"the image cannot be used: {printable(reason)}")


def row_examples(artefact: Artefact, rows: object, limits: Limits = LIMITS) -> np.ndarray:
    """Encode rows as the training's were, to float32 (n, features), as raw/table_encoding.py does it for CSV files.

    Args:
        rows: a list of JSON objects, column -> value, with null or a text of MISSING for a missing one; of a model
            that was trained on plain features, lists of numbers. What an object has beyond the columns is ignored.

    Raises:
        RequestError: 413 for too many rows, 400 for rows that lack a column or hold what the column does not.
    """
    if artefact.inputs != "features":
        raise RequestError(400, "this model takes no rows; expected images")
    width = artefact.input_shape[0]
    if type(rows) is not list or not rows:
        raise RequestError(400, f"there are no rows; expected a list of them; received: {shown(rows)}")
    if len(rows) > min(limits.most_examples, MOST_ENCODED // (4 * width)):
        raise RequestError(413, "the request has too many rows; expected at most "
                           f"{min(limits.most_examples, MOST_ENCODED // (4 * width)):,}; received: {len(rows):,}")
    kind = list if artefact.encoding is None else dict
    for place, row in enumerate(rows, 1):
        if type(row) is not kind or kind is list and len(row) != width:
            expected = f"a list of {width:,} numbers" if kind is list else "an object with a value for each column"
            raise RequestError(400, f"row {place} cannot be used; expected {expected}; received: {shown(row)}")
    if artefact.encoding is None:
        return tensor(rows, (len(rows), width), "FP32")
    inputs, start = np.zeros((len(rows), width), np.float32), 0
    for column in artefact.encoding["columns"]:
        end = start + _width(column)
        _encode_column(column, _cells(rows, column["name"]), inputs[:, start:end])
        start = end
    return inputs


def check_encoding(artefact: Artefact) -> None:
    """Raise DataError where an artefact's encoding does not give its model's features; rows rely on that."""
    encoding = artefact.encoding
    if encoding is None:
        return
    columns = encoding.get("columns")
    if (not isinstance(columns, list) or not all(map(_is_column, columns))
            or sum(map(_width, columns)) != artefact.input_shape[0]):
        raise DataError(f"the encoding of the model {artefact.name} is not that of its features",
                        expected=f"columns that give {artefact.input_shape[0]:,}", mend="export the model again")


def answers(artefact: Artefact, scores: np.ndarray) -> list[dict]:
    """Return for each row of scores `label`, `probability` and `probabilities` by class, or `value`.

    Args:
        scores: float32 (n, columns), the logits of a classification or the number of a regression.

    Raises:
        RequestError: 500 where a score is no number.
    """
    check_scores(artefact, scores)
    names = artefact.class_names
    if not names:
        return [{"value": value} for value in scores[:, 0].tolist()]
    chances = probabilities(scores)
    return [{"label": names[best], "probability": row[best], "probabilities": dict(zip(names, row, strict=True))}
            for best, row in zip(winners(artefact, scores, chances), chances.tolist(), strict=True)]


def _is_column(column: object) -> bool:
    if not isinstance(column, dict) or not isinstance(column.get("missing"), int) or column["missing"] < 0:
        return False
    if column.get("kind") == "category":
        texts = [column.get("name"), *(column["categories"] if isinstance(column.get("categories"), list) else [None])]
        return all(isinstance(text, str) for text in texts)
    numbers = [column.get("fill"), column.get("offset")]
    return column.get("kind") in ("number", "boolean") and isinstance(column.get("name"), str) and all(
        type(number) in (int, float) and abs(number) <= LARGEST for number in numbers)


def _width(column: Mapping) -> int:
    """Return how many features a column becomes."""
    return (len(column["categories"]) if column["kind"] == "category" else 1) + bool(column["missing"])


def _cells(rows: list[dict], name: str) -> list:
    """Return a column's cells, missing ones as None."""
    cells = []
    for place, row in enumerate(rows, 1):
        if name not in row:
            raise RequestError(400, f"row {place} lacks the column {shown(name)}; expected the columns of the training "
                               f"data; received: {', '.join(map(shown, [*row][:12])) or 'none'}")
        cell = row[name]
        cell = cell.strip() if isinstance(cell, str) else cell
        cells.append(None if isinstance(cell, str) and cell in MISSING else cell)
    return cells


def _encode_column(column: Mapping, cells: list, features: np.ndarray) -> None:
    """Write a column's features, float32 (n, features of the column), which are 0 before.

    Raises:
        RequestError: a cell is not of the column's kind.
    """
    name, kind = column["name"], column["kind"]
    values = []
    for place, cell in enumerate(cells, 1):
        try:
            values.append(cell if cell is None else _READERS[kind](cell))
        except ValueError:
            raise RequestError(400, f"row {place}: column {shown(name)} holds {shown(cell)}, "
                               f"which is no {kind}") from None
    if kind == "category":
        places = {category: place for place, category in enumerate(column["categories"])}
        for row, value in enumerate(values):
            if value in places:
                features[row, places[value]] = 1
    else:
        filled = np.array([column["fill"] if value is None else value for value in values], np.float64)
        with np.errstate(over="ignore"):
            features[:, 0] = filled - column["offset"]
        if not np.isfinite(features[:, 0]).all():
            place = int(np.isfinite(features[:, 0]).argmin())
            raise RequestError(400, f"row {place + 1}: column {shown(name)} holds {shown(cells[place])}, "
                               "which is too far from the training data")
    if column["missing"]:
        features[:, -1] = [value is None for value in values]


def _number(cell: object) -> float | None:
    if isinstance(cell, str) and len(cell) <= LONGEST_NUMBER and _NUMBER.fullmatch(cell):
        cell = float(cell)
    if type(cell) not in (int, float):
        raise ValueError
    return float(cell) if abs(cell) <= LARGEST else None


def _truth(cell: object) -> float:
    text = str(cell).lower() if isinstance(cell, (str, int, float)) else ""
    if text not in _TRUTHS:
        raise ValueError
    return _TRUTHS[text]


def _category(cell: object) -> str:
    # JSON's true could be any of True, TRUE and true in the training data's text.
    if type(cell) not in (str, int, float):
        raise ValueError
    # A whole number reads 2.0 where the training data had missing cells in the column, and 2 elsewhere.
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", str(cell))


_READERS = {"number": _number, "boolean": _truth, "category": _category}
