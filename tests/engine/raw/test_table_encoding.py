"""Tables as arrays: each kind of column, fitted on the training split alone, and new rows encoded alike."""

import numpy as np
import pytest

from hpcai_cli.engine.raw import table_encoding
from hpcai_cli.engine.raw.table_encoding import encode, encode_rows
from hpcai_cli.engine.raw.tables import read_table, table_of
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

WHOLE = Recipe(name="tiny", summary="", inputs="features")
NAN = float("nan")


def encoded(columns: dict, labels=("no", "yes", "no", "yes"), **settings):
    return encode(table_of({**columns, "y": labels}, label="y", **settings), WHOLE)


def test_each_kind_has_its_features():
    found = encoded({"age": [1.0, NAN, 3.0, 8.0], "new": [True, False, False, True],
                     "color": ["red", "blue", NAN, "red"]})
    assert found.details["features"] == ["age", "age is missing", "new", "color=blue", "color=red", "color is missing"]
    inputs, labels = found.splits["train"]
    np.testing.assert_array_equal(inputs, [
        [1, 0, 1, 0, 1, 0], [3, 1, 0, 1, 0, 0], [3, 0, 0, 0, 0, 1], [8, 0, 1, 0, 1, 0]])
    assert (inputs.dtype, labels.dtype) == (np.float32, np.int64)
    assert (found.class_names, labels.tolist()) == (("no", "yes"), [0, 1, 0, 1])


def test_all_is_fitted_on_the_training_split(tmp_path, capsys):
    (tmp_path / "train.csv").write_text("age,color,y\n1,red,no\n2,blue,yes\n3,red,no\n")
    (tmp_path / "test.csv").write_text("age,color,y\n,green,yes\n500,red,no\n9,red,perhaps\n")
    found = encode(read_table(tmp_path, label="y"), WHOLE)
    assert found.details["features"] == ["age", "color=blue", "color=red"]
    np.testing.assert_array_equal(found.splits["test"][0], [[2, 0, 0], [500, 0, 1]])
    assert "column 'color' has unknown categories in 1 of 2 rows" in capsys.readouterr().err
    assert found.details["rejected"] == [
        {"file": "test.csv:4", "reason": "its label 'perhaps' is not in the training split"}]


def test_columns_that_say_nothing_are_dropped_with_the_reason():
    ids = [f"customer {row}" for row in range(40)]
    found = encoded({"a": range(40), "same": [7] * 40, "empty": [NAN] * 40, "id": ids}, labels=["no", "yes"] * 20)
    assert found.details["features"] == ["a"]
    assert [(entry["name"], entry["reason"]) for entry in found.details["dropped_columns"]] == [
        ("same", "it is the same in each row"), ("empty", "it is empty"),
        ("id", "it holds text that differs in nearly each row (40 values in 40 rows)")]


def test_large_numbers_close_together_stay_apart():
    seconds = [1.7e9, 1.7e9 + 1, 1.7e9 + 2, 1.7e9 + 3]
    assert len(set(encoded({"time": seconds}).splits["train"][0][:, 0].tolist())) == 4


@pytest.mark.parametrize(("labels", "names"), [
    (["10", "9", "10", "9"], ("9", "10")), (["b", "a", "b", "a"], ("a", "b")),
    ([True, False, True, False], ("False", "True")), ([1.0, 2.0, 1.0, 2.0], ("1", "2"))])
def test_classes_have_an_order(labels, names):
    assert encoded({"a": range(4)}, labels=labels).class_names == names


def test_a_regression_keeps_its_numbers():
    found = encoded({"a": range(4)}, labels=[1.5, 2.5, -3, 4], task="regression")
    assert found.splits["train"][1].dtype == np.float32
    assert (found.splits["train"][1].tolist(), found.class_names) == ([1.5, 2.5, -3, 4], ())


def test_what_cannot_be_learned_is_refused(monkeypatch):
    with pytest.raises(DataError, match="one class only"):
        encoded({"a": range(4)}, labels=["no"] * 4)
    with pytest.raises(DataError, match="no column is left to learn from.*same in each row"):
        encoded({"a": [1] * 4})
    monkeypatch.setattr(table_encoding, "MOST_CLASSES", 3)
    with pytest.raises(DataError, match="4 different values.*--set task=regression"):
        encoded({"a": range(4)}, labels=["1.5", "2", "3", "4"])
    monkeypatch.setattr(table_encoding, "MOST_BYTES", 10)
    with pytest.raises(DataError, match="too large once it is encoded"):
        encoded({"a": range(4)})


# ---- New rows --------------------------------------------------------------------------------------------------------

TRAINING = "age;new;color;y\n" + "".join(f"{row},5;{row % 3 == 0};{'red' if row % 2 else 'blue'};{row % 2}\n"
                                         for row in range(20)) + ";true;;1\n"


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "data.csv").write_text(TRAINING)
    return encode(read_table(tmp_path, label="y"), WHOLE)


def test_the_training_rows_are_encoded_as_they_were(trained, tmp_path):
    inputs, problems = encode_rows(tmp_path / "data.csv", trained.details)
    np.testing.assert_array_equal(inputs, trained.splits["train"][0])
    assert not problems


def test_new_rows_need_no_label_and_keep_their_places(trained, tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("color,age,note,new\nred,3.5,x,TRUE\nred,old,x,true\nred\ngreen,,x,false\n")
    inputs, problems = encode_rows(tmp_path / "rows.csv", trained.details)
    assert trained.details["features"] == [
        "age", "age is missing", "new", "color=blue", "color=red", "color is missing"]
    np.testing.assert_array_equal(inputs[0], [3.5, 0, 1, 0, 1, 0])
    np.testing.assert_array_equal(inputs[3], [10, 1, 0, 0, 0, 0])
    assert problems == [(1, "line 3: column 'age' holds 'old', which is no number"),
                        (2, "line 4: it has 1 cells and the header 4")]
    said = capsys.readouterr().err
    assert "ignored: columns that the training data did not have: note" in said and "unknown categories" in said


def test_new_rows_lack_a_column(trained, tmp_path):
    (tmp_path / "rows.csv").write_text("Age,new,color\n3,true,red\n")
    with pytest.raises(DataError, match="the rows lack the column 'age', perhaps 'Age'"):
        encode_rows(tmp_path / "rows.csv", trained.details)


def test_rows_without_a_header_go_by_position(tmp_path):
    (tmp_path / "data.csv").write_text("1,0,5\n2,1,7\n3,0,9\n")
    details = encode(read_table(tmp_path, label="2"), WHOLE).details
    for name, text in (("with.csv", "8,1,6\n"), ("without.csv", "8,6\n")):
        (tmp_path / name).write_text(text)
        assert encode_rows(tmp_path / name, details)[0].tolist() == [[8, 6]]
