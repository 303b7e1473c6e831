"""Tables: the files of a source, the columns' kinds, the rows that cannot be learned from."""

import numpy as np
import pytest

from hpcai_cli.engine.raw.tables import read_table
from hpcai_cli.errors import DataError, UsageError

PLAIN = "a,b,y\n1,2.5,no\n2,3.5,yes\n3,4.5,no\n"


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the table of one or several files."""
    def read(content: str | dict[str, str], **settings):
        for name, text in (content if isinstance(content, dict) else {"data.csv": content}).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return read_table(tmp_path, **{"label": "y", **settings})
    return read


@pytest.mark.parametrize("files", [
    {"deep/data.csv": PLAIN, "deep/readme.txt": "hello"}, {"data.tsv": PLAIN.replace(",", "\t")}, {"adult.data": PLAIN},
    {"data.csv": PLAIN, ".hidden.csv": "x", "__MACOSX/data.csv": "x"}], ids=lambda files: next(iter(files)))
def test_the_one_table_of_a_folder_is_found(read, files):
    assert len(read(files).splits["train"]) == 3


def test_the_source_brings_its_splits(read):
    table = read({"train.csv": PLAIN, "Test.csv": "b,y,a\n1,no,9\n", "valid.csv": PLAIN})
    assert {split: len(frame) for split, frame in table.splits.items()} == {"train": 3, "test": 1, "validation": 3}
    assert table.splits["test"]["a"].tolist() == [9]


@pytest.mark.parametrize(("files", "message"), [
    ({}, "no table"),
    ({"readme.md": "x"}, "no table.*readme.md"),
    ({"one.csv": PLAIN, "two.csv": PLAIN}, "several tables.*one.csv, two.csv"),
    ({"train.csv": PLAIN, "test.csv": PLAIN, "sample_submission.csv": PLAIN}, "several tables.*sample_submission"),
    ({"train.csv": PLAIN, "test.csv": "a,b\n1,2\n"}, "test.csv lacks the label 'y'"),
])
def test_a_source_that_is_not_one_table(read, files, message):
    with pytest.raises(DataError, match=message):
        read(files)


@pytest.mark.parametrize(("cells", "kind", "held"), [
    (["1", "-2.5", "1e3"], "number", [1, -2.5, 1000]),
    (["1,5", "-2", "3,25"], "number", [1.5, -2, 3.25]),
    (["inf", "1e300", "5"], "number", [np.nan, np.nan, 5]),
    (["TRUE", "False", ""], "boolean", [1, 0, np.nan]),
    (["red", "", "red"], "category", ["red", np.nan, "red"]),
    (["1.234,5", "2", "3"], "category", ["1.234,5", "2", "3"]),
    (["1,234", "1.5", "2"], "category", ["1,234", "1.5", "2"]),
])
def test_kinds_are_told_by_the_cells(read, cells, kind, held):
    table = read("a;y\n" + "".join(f"{cell};{row}\n" for row, cell in enumerate(cells)))
    assert table.kinds == {"a": kind}
    np.testing.assert_array_equal(table.splits["train"]["a"].tolist(), held)


def test_a_comma_that_may_separate_thousands_makes_no_number(read):
    assert read('a,y\n"1,234",no\n"2,345",yes\n').kinds == {"a": "category"}


def test_numbers_that_are_names(read):
    table = read({"train.csv": "a,b,y\n1,1,no\n2,,yes\n", "test.csv": "a,b,y\n1.0,1,no\n"}, categories=("a", "b"))
    assert table.kinds == {"a": "category", "b": "category"}
    assert table.splits["test"]["a"].tolist() == ["1"], "as it is called in the training file"


def test_rows_that_cannot_be_learned_from_are_listed(read):
    table = read("a,y\n" + "".join(f"{row},{row % 2}\n" for row in range(50)) + "oops,1\n7,\n8\n")
    assert table.rejected == (
        {"file": "data.csv:52", "reason": "column 'a' holds 'oops', which is no number"},
        {"file": "data.csv:53", "reason": "it has no label in column 'y'"},
        {"file": "data.csv:54", "reason": "it has 1 cells and the header 2"})
    assert len(table.splits["train"]) == 50


def test_labels_of_a_regression_are_finite_numbers(read):
    table = read("x,y\n1,2\n2,inf\n3,abc\n4,5\n", task="regression")
    assert table.splits["train"]["y"].tolist() == [2, 5]
    assert [entry["file"] for entry in table.rejected] == ["data.csv:3", "data.csv:4"]


def test_columns_are_left_out_and_said(read):
    table = read(",a,b,y\n0,1,2,no\n1,3,4,yes\n", drop=("b",))
    assert list(table.kinds) == ["a"]
    assert {entry["name"] for entry in table.dropped} == {"b", "column 1"}


@pytest.mark.parametrize(("content", "settings", "kind", "message"), [
    (PLAIN, {"label": ""}, UsageError, "--set label=COLUMN"),
    (PLAIN, {"label": "Y"}, DataError, "lacks the label 'Y', perhaps 'y'"),
    (PLAIN, {"drop": ("aa",)}, DataError, "lacks the column 'aa', perhaps 'a'"),
    (PLAIN, {"categories": ("c",)}, DataError, "lacks the column 'c'"),
    (PLAIN, {"drop": ("y",)}, UsageError, "the label is among the columns to leave out"),
    (PLAIN, {"drop": ("a", "b")}, DataError, "no column to learn from"),
    ("a,y\n1,\n2,\n", {}, DataError, "no row that can be used"),
    ("1,2\n3,4\n", {"label": "9"}, DataError, "no header"),
])
def test_what_is_wrongly_named_is_said(read, content, settings, kind, message):
    with pytest.raises(kind, match=message):
        read(content, **settings)
