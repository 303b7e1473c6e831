"""CSV files as they are found in the wild: what is read alike, which rows are left out, what is refused."""

import codecs
import gzip

import pytest

from hpcai_cli.engine.raw import csv_files
from hpcai_cli.engine.raw.csv_files import read_csv
from hpcai_cli.errors import DataError

PLAIN = "a,b,y\n1,2.5,no\n2,3.5,yes\n3,4.5,no\n"


def write(tmp_path, content: str | bytes, name: str = "data.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def values(file) -> list:
    return [list(file.frame), *file.frame.to_numpy().tolist()]


@pytest.mark.parametrize("content", [
    PLAIN.encode(), codecs.BOM_UTF8 + PLAIN.encode(), PLAIN.encode("utf-16"), PLAIN.encode("utf-32"),
    PLAIN.replace("\n", "\r\n").encode(), PLAIN.replace("\n", "\r").encode(), PLAIN.replace("\n", "\n\n").encode(),
    PLAIN.replace(",", "\t").encode(), PLAIN.replace(",", "|").encode(), PLAIN.replace(",", ";").encode(),
    PLAIN.replace(",", ", ").encode(), PLAIN.rstrip().encode(), gzip.compress(PLAIN.encode()),
    "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in PLAIN.splitlines()).encode(),
], ids=["plain", "bom", "utf-16", "utf-32", "crlf", "cr", "blank lines", "tab", "bar", "semicolon", "spaces", "no end",
        "gzip", "quoted"])
def test_one_table_however_it_is_written(tmp_path, content):
    file = read_csv(write(tmp_path, content))
    assert values(file) == [["a", "b", "y"], [1, 2.5, "no"], [2, 3.5, "yes"], [3, 4.5, "no"]]
    assert not file.rejected


def test_rows_know_the_line_that_they_start_in(tmp_path):
    file = read_csv(write(tmp_path, 'a,b\n1,"x\ny"\n\n2,z\n'))
    assert list(file.frame.index) == [2, 5]
    assert list(file.frame["b"]) == ["x\ny", "z"]


def test_rows_that_are_none_are_listed_with_line_and_reason(tmp_path):
    file = read_csv(write(tmp_path, 'a,b\n1,2\n3\n4,5,6\n"7"x,8\n"9\n"x,1\n10,11\n'))
    assert values(file) == [["a", "b"], [1, 2], [10, 11]]
    assert file.rejected == (
        (3, "it has 1 cells and the header 2"), (4, "it has 3 cells and the header 2"),
        (5, "the row has text behind a closing quote"),
        (6, "the row, which goes on to line 7, has text behind a closing quote"))


def test_missing_values_in_all_their_spellings(tmp_path):
    file = read_csv(write(tmp_path, "a,b\n" + "".join(f"1,{text}\n" for text in csv_files.MISSING) + "1,5\n"))
    assert file.frame["b"].isna().sum() == len(csv_files.MISSING)
    assert file.frame["b"].iloc[-1] == 5


def test_text_that_looks_like_numbers_stays_text_where_asked(tmp_path):
    assert list(read_csv(write(tmp_path, "zip,y\n01,1\n1,2\n"), texts=("zip",)).frame["zip"]) == ["01", "1"]


@pytest.mark.parametrize(("content", "label", "columns"), [
    ("1,2,0\n3,4,1\n", "3", ["column_1", "column_2", "column_3"]),
    ("5.1,3.5,setosa\n4,3,other\n", "3", ["column_1", "column_2", "column_3"]),
    ("0,1,2\n5,6,7\n", "2", ["0", "1", "2"]),
    ("3,1,3\n5,6,7\n", "3", ["column_1", "column_2", "column_3"]),
    ("2019,2020,y\n5,6,7\n", "y", ["2019", "2020", "y"]),
], ids=["numbers", "iris", "counted by pandas", "the label's number is a value", "years"])
def test_a_missing_header_is_told_by_the_label(tmp_path, content, label, columns):
    file = read_csv(write(tmp_path, content), label=label)
    assert list(file.frame) == columns
    assert len(file.frame) == content.count("\n") - file.header


@pytest.mark.parametrize(("content", "message"), [
    ("", "the file is empty"),
    ("\n\n \n", "the file is empty"),
    ("a,b\n", "no rows below its header"),
    ("a,b\n1\n2\n", "no row that can be read: line 2: it has 1 cells"),
    ("a,b,a\n1,2,3\n", "the header has 'a' more than once"),
    ("1,2\n3,4\n", "no header.*--set label=2"),
    ("<!DOCTYPE html><html><body>Not found</body></html>", "web page"),
    ("a,b\n1,é\n".encode("latin-1"), "not UTF-8: byte 0xe9 in line 2.*iconv -f WINDOWS-1252"),
    (b"a,b\n1,2\n3,\0\n", "line 3 holds a NUL byte"),
    (PLAIN.encode("utf-16-le"), "NUL byte.*UTF-16LE"),
    (PLAIN.encode("utf-16") + b"x", "not UTF-16"),
    (bytes(range(128, 256)) * 9, "not UTF-8"),
    (gzip.compress(PLAIN.encode() * 99)[:-20], "ended before"),
    ('a,b\n1,"2\n3,4\n', "a cell in the row that starts in line 2 never ends"),
    ('a,b\n1,"' + "x" * 200_000 + '"\n', "a cell in the row that starts in line 2 has more than 131,072 characters"),
    (",".join(f"c{place}" for place in range(10_001)) + "\n", "too many columns"),
], ids=lambda value: "" if len(value) > 40 else None)
def test_what_is_no_table_is_refused_with_the_reason(tmp_path, content, message):
    with pytest.raises(DataError, match=f"(?s){message}"):
        read_csv(write(tmp_path, content), label="y")


def test_a_file_that_is_not_there():
    with pytest.raises(DataError, match="does not exist"):
        read_csv(csv_files.Path("none.csv"))


@pytest.mark.parametrize(("bound", "most", "content", "message"), [
    ("MOST_BYTES", 40, PLAIN * 2, "too large"),
    ("MOST_BYTES", 4_000, gzip.compress(b"a,b\n" + b"1,2\n" * 9_000, mtime=0), "too large"),
    ("MOST_LINE", 100, "a,b\n" + "1" * 200 + ",2\n", "too large at line 2"),
    ("MOST_CELLS", 5, PLAIN, "too large"),
    ("MOST_REJECTED", 3, "a,b\n1,2\n" + "1\n" * 9, "over 3 rows are not like the header.*line 3"),
])
def test_sizes_are_bounded(tmp_path, monkeypatch, bound, most, content, message):
    monkeypatch.setattr(csv_files, bound, most)
    with pytest.raises(DataError, match=message):
        read_csv(write(tmp_path, content))
