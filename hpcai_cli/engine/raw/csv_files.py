"""Reads one CSV file, however it is written, into a pandas frame, and lists the rows that are none."""

import codecs
import contextlib
import csv
import gzip
import io
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from hpcai_cli.engine.raw.idx import looks_like_html
from hpcai_cli.errors import DataError

if TYPE_CHECKING:
    import pandas

MOST_BYTES = 1 << 30
"""Bytes of a file, unpacked; the whole table is held in memory."""
MOST_COLUMNS = 10_000
MOST_CELLS = 200_000_000
"""Rows times columns: an empty cell takes one byte in the file and eight in memory."""
MOST_LINE = 16 << 20
"""Characters of one line. A cell has at most csv.field_size_limit(), 131,072."""
MOST_REJECTED = 100_000
"""Rows that are listed; a file with more of them is no table."""
DELIMITERS = "\t;|,"
"""Comma last: where another one fits as well, the commas are decimal ones."""
MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "-nan", "NULL", "null")
"""What stands for a missing value."""
_HEAD_LINES, _HEAD_CHARACTERS = 200, 1 << 20
"""What the delimiter is told by."""
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
                     codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class CsvFile:
    """What was read of one file."""

    frame: "pandas.DataFrame"
    """The cells as numbers, booleans or text, as pandas tells them; the index is the line that a row starts in."""
    rejected: tuple[tuple[int, str], ...]
    """Line and reason of each row that is none."""
    header: bool
    """Whether the first row names the columns; else they are column_1, column_2, ..."""
    decimal_comma: bool
    """Whether a comma in a number can only be a decimal one, since something else separates the cells."""
    unnamed: tuple[int, ...]
    """Positions, from 1, of columns that the header leaves without a name; they are not in the frame."""


def read_csv(path: Path, *, label: str = "", texts: tuple[str, ...] = (), header: bool | None = None,
             names: Callable[[int], tuple[str, ...]] | None = None) -> CsvFile:
    """Read a CSV file: any of four delimiters, UTF-8 or UTF-16 by its mark, packed by gzip or not.

    Args:
        label: the column to predict, by its name, or by its position from 1 in a file without a header.
        texts: columns to leave as text, also where they look like numbers.
        header: whether there is one; None tells it by the label.
        names: gives the names of that many columns in a file without a header; column_1, column_2, ... by default.

    Raises:
        DataError: the file is missing, damaged, no table of text, or larger than is held in memory.
    """
    import pandas

    delimiter = _delimiter(path)
    cells, lines, rejected = io.BytesIO(), [], []
    with _opened(path) as stream:
        rows = _rows(stream, path, delimiter, rejected)
        first_line, first = next(rows, (0, []))
        if not first:
            raise DataError("the file is empty", expected="a CSV file with a header", received=str(path))
        if header is None:
            header = _has_header(first, label, path)
        columns = first if header else list((names or _numbered)(len(first)))
        _check_names(columns, path)
        kept = [place for place, name in enumerate(columns) if name]
        text = io.TextIOWrapper(cells, encoding="utf-8", newline="")
        writer = csv.writer(text, lineterminator="\n")
        for line, row in rows if header else itertools.chain([(first_line, first)], rows):
            if len(row) != len(columns):
                _reject(rejected, line, f"it has {len(row)} cells and the header {len(columns)}", path)
                continue
            writer.writerow([row[place].strip() for place in kept])
            lines.append(line)
            if len(lines) * len(kept) > MOST_CELLS:
                raise DataError("the table is too large", expected=f"at most {MOST_CELLS:,} cells", received=str(path))
        text.flush()
    if not lines:
        why = f"the file has no row that can be read: line {rejected[0][0]}: {rejected[0][1]}" if rejected else (
            "the file has no rows below its header")
        raise DataError(why, expected="a table", received=str(path))
    cells.seek(0)
    chosen = [columns[place] for place in kept]
    # Rows of equal length only, without blank lines: what pandas would fill up or pass over silently is gone by now.
    frame = pandas.read_csv(cells, header=None, names=chosen, index_col=False, low_memory=False, encoding="utf-8",
                            dtype={name: str for name in texts if name in chosen}, na_values=list(MISSING),
                            keep_default_na=False, skip_blank_lines=False)
    frame.index = pandas.Index(lines, name="line")
    unnamed = tuple(place + 1 for place, name in enumerate(columns) if not name)
    return CsvFile(frame, tuple(rejected), header, delimiter != ",", unnamed)


def is_number(text: str) -> bool:
    """Tell whether a cell holds a number, with a point or a comma."""
    try:
        float(text.replace(",", ".", 1))
    except ValueError:
        return False
    return "_" not in text


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a file as text; what is wrong with its bytes is said by `_lines`."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError("the file is too large", expected=f"at most {MOST_BYTES:,} bytes", received=str(path))
        with open(path, "rb") as packed, contextlib.ExitStack() as stack:
            gzipped = packed.peek(2)[:2] == b"\x1f\x8b"
            raw = io.BufferedReader(stack.enter_context(gzip.open(packed))) if gzipped else packed
            head = raw.peek(512)[:512]
            if looks_like_html(head):
                raise DataError("the file is a web page (HTML), as a dead mirror or a login page sends it",
                                expected="a CSV file", mend="fetch the file again", received=str(path))
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
            yield io.TextIOWrapper(raw, encoding=encoding, newline="")
    except FileNotFoundError:
        raise DataError("the file does not exist", expected="a CSV file", received=str(path)) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {getattr(error, 'strerror', None) or error}", expected="a CSV file",
                        received=str(path)) from None


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    """Yield the lines of a text, each bounded, all bounded, without what no text holds."""
    size = 0
    for number in itertools.count(1):
        try:
            line = stream.readline(MOST_LINE)
        except UnicodeDecodeError as error:
            line = number + error.object[:error.start].count(b"\n")
            raise DataError(f"the file is not {error.encoding.upper()}: byte {error.object[error.start]:#04x} in "
                            f"line {line:,}", expected="UTF-8",
                            mend="convert it, as in `iconv -f WINDOWS-1252 -t UTF-8 OLD.csv > NEW.csv`",
                            received=str(path)) from None
        except UnicodeError as error:
            raise DataError(f"the file is no text: {error}", expected="UTF-8", received=str(path)) from None
        if not line:
            return
        size += len(line)
        if len(line) >= MOST_LINE or size > MOST_BYTES:
            raise DataError(f"the file is too large at line {number:,}", received=str(path),
                            expected=f"lines of at most {MOST_LINE:,} and a file of at most {MOST_BYTES:,} characters")
        if "\0" in line:
            raise DataError(f"line {number:,} holds a NUL byte", expected="text",
                            mend="if it is UTF-16, convert it: `iconv -f UTF-16LE -t UTF-8 OLD.csv > NEW.csv`",
                            received=str(path))
        yield line


def _rows(stream: TextIO, path: Path, delimiter: str, rejected: list) -> Iterator[tuple[int, list[str]]]:
    """Yield each row with the line that it starts in; blank lines are none."""
    reader = csv.reader(_lines(stream, path), delimiter=delimiter, skipinitialspace=True, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "expected after" not in str(error):
                # What follows lies inside or outside of the quotes, no one knows.
                most = csv.field_size_limit()
                what = "never ends" if "end of data" in str(error) else f"has more than {most:,} characters"
                raise DataError(f"a cell in the row that starts in line {line:,} {what}", expected="closed quotes",
                                received=str(path)) from None
            upto = f", which goes on to line {reader.line_num}," if reader.line_num > line else ""
            _reject(rejected, line, f"the row{upto} has text behind a closing quote", path)
            continue
        if row and (len(row) > 1 or row[0].strip()):
            yield line, row


def _reject(rejected: list, line: int, reason: str, path: Path) -> None:
    if len(rejected) == MOST_REJECTED:
        raise DataError(f"over {MOST_REJECTED:,} rows are not like the header", expected="a table",
                        mend=f"look at line {rejected[0][0]}: {rejected[0][1]}", received=str(path))
    rejected.append((line, reason))


def _delimiter(path: Path) -> str:
    """Return what most rows of the file's head have as often as its first one."""
    with _opened(path) as stream:
        head = io.StringIO("".join(itertools.islice(_lines(stream, path), _HEAD_LINES))[:_HEAD_CHARACTERS])
    best, best_share = ",", 0.0
    for delimiter in DELIMITERS:
        head.seek(0)
        try:
            counts = [len(row) for row in csv.reader(head, delimiter=delimiter, skipinitialspace=True) if row]
        except csv.Error:
            continue
        # The last row may be cut.
        counts = counts[:-1] if len(counts) > 2 else counts
        if not counts or counts[0] == 1:
            continue
        share = Counter(counts)[counts[0]] / len(counts)
        if share > best_share:
            best, best_share = delimiter, share
    return best


def _has_header(first: list[str], label: str, path: Path) -> bool:
    """Tell whether the first row names the columns, by what the label is called."""
    cells = [cell.strip() for cell in first]
    numbers = [is_number(cell) for cell in cells]
    counted = [str(place) for place in range(len(cells))]
    # pandas writes 0, 1, 2, ... above an array without names.
    named = label in cells and (not all(numbers) or cells in (counted, [*counted[1:], str(len(cells))]))
    if named or not any(numbers):
        return True
    place = label.removeprefix("column_")
    if place.isascii() and place.isdigit() and 1 <= int(place) <= len(cells):
        return False
    if all(numbers):
        raise DataError("the file has no header: its first row holds numbers only", expected="the columns' names",
                        mend=f"name the label by its position, `--set label={len(cells)}` for the last column",
                        received=str(path))
    return True


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"column_{place}" for place in range(1, count + 1))


def _check_names(columns: list[str], path: Path) -> None:
    if len(columns) > MOST_COLUMNS:
        raise DataError("the file has too many columns", expected=f"at most {MOST_COLUMNS:,}",
                        received=f"{len(columns):,} in {path}")
    columns[:] = [name.strip() for name in columns]
    twice = [name for name, count in Counter(columns).items() if count > 1 and name]
    if twice:
        raise DataError(f"the header has {', '.join(map(repr, twice[:5]))} more than once", expected="each name once",
                        received=str(path))
