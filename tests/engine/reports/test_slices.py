"""Slices: by class, by the categories and the numbers of a table's columns, as pandas finds them in the same rows."""

from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from hpcai_cli.engine.raw.table_encoding import _features, _inputs
from hpcai_cli.engine.reports import slices
from hpcai_cli.engine.store import Split
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Recipe

TWO = Recipe(name="two", summary="", num_classes=2, class_names=("no", "yes"), inputs="features")
COLUMNS = [
    {"name": "kind", "kind": "category", "categories": ["blue", "red"], "missing": 1},
    {"name": "size", "kind": "number", "fill": 5.0, "offset": 1000.0, "mean": 0.0, "deviation": 1.0, "missing": 3},
    {"name": "open", "kind": "boolean", "fill": 0.0, "offset": 0.0, "mean": 0.0, "deviation": 1.0, "missing": 0}]


@pytest.fixture
def table():
    """Return the rows, the dataset made of them, its split and scores that are right for small sizes."""
    source = np.random.default_rng(0)
    frame = pandas.DataFrame({"kind": source.choice(["blue", "red", "green", None], 200),
                              "size": source.normal(1000, 9, 200).round(3), "open": source.integers(0, 2, 200)})
    frame.loc[::10, "size"] = np.nan
    inputs = _inputs(frame, COLUMNS)
    split = Split(inputs, source.integers(0, 2, 200), None, 0)
    details = {"columns": COLUMNS, "features": [name for column in COLUMNS for name in _features(column)]}
    dataset = SimpleNamespace(details=details, split=lambda name: split)
    right = (frame["size"].fillna(0) < 1000).to_numpy()
    scores = np.eye(2, dtype=np.float32)[np.where(right, split.labels, 1 - split.labels)]
    return frame.assign(right=right), dataset, split, scores


def by(column, table) -> dict:
    _, dataset, split, scores = table
    slices.check(column, dataset, TWO)
    return {part["name"]: part for part in slices.slices(column, dataset, split, TWO, scores)}


def test_a_category_is_a_slice(table, capsys):
    frame, found = table[0], by("kind", table)
    names = frame["kind"].fillna("kind is missing").replace({"green": "unknown values"})
    assert {name: part["count"] for name, part in found.items()} == names.value_counts().to_dict()
    for name, right in frame["right"].groupby(names):
        assert found[name]["metrics"]["accuracy"] == pytest.approx(right.mean())
        low, high = found[name]["intervals"]["accuracy"]
        assert low < right.mean() < high


def test_numbers_are_cut_into_quarters_in_their_own_unit(table):
    frame, found = table[0], by("size", table)
    assert found["size is missing"]["count"] == frame["size"].isna().sum() == 20
    quarters = pandas.qcut(frame["size"], 4)
    counts = [part["count"] for name, part in found.items() if name != "size is missing"]
    assert counts == quarters.value_counts(sort=False).tolist()
    assert list(found)[0].startswith(f"size from {frame['size'].min():g} to ")
    accuracies = [part["metrics"]["accuracy"] for part in found.values()]
    np.testing.assert_allclose(accuracies[:4], frame["right"].groupby(quarters, observed=False).mean())


def test_few_values_are_slices_of_their_own(table):
    assert {name: part["count"] for name, part in by("open", table).items()} == {
        f"open = {value}": count for value, count in table[0]["open"].value_counts().items()}


def test_a_class_is_a_slice(table):
    found = by("class", table)
    assert [(name, part["count"]) for name, part in found.items()] == list(zip(
        ("no", "yes"), np.bincount(table[2].labels).tolist(), strict=True))


def test_the_rarest_of_many_categories_are_together():
    names = [f"c{number:03}" for number in range(80)]
    column = {"name": "many", "kind": "category", "categories": names, "missing": 0}
    inputs = np.eye(80, dtype=np.float32)[np.repeat(np.arange(80), np.arange(1, 81))]
    split = Split(inputs, np.zeros(len(inputs), np.int64), None, 0)
    dataset = SimpleNamespace(details={"columns": [column]}, split=lambda name: split)
    found = slices.slices("many", dataset, split, TWO, np.tile(np.float32([1, 0]), (len(inputs), 1)))
    assert [part["name"] for part in found] == [*names[30:], "other values"]
    assert found[-1]["count"] == sum(range(1, 31))


def test_a_regression_is_sliced_by_its_errors(table):
    _, dataset, split, _ = table
    number = Recipe(name="n", summary="", task="regression", inputs="features")
    labels = np.arange(200, dtype=np.float32)
    found = slices.slices("open", dataset, split.with_labels(labels), number, labels[:, None] + 2)
    assert [part["metrics"] for part in found] == [{"mean_absolute_error": 2, "loss": 4, "mean_error": 2}] * 2
    with pytest.raises(UsageError, match="knows no column 'class'"):
        slices.check("class", dataset, number)


def test_an_unknown_column_is_answered_with_the_known(table):
    with pytest.raises(UsageError, match="no column 'sise', perhaps 'size'; expected one of kind, size, open, class"):
        slices.check("sise", table[1], TWO)


@pytest.mark.parametrize("columns", [
    3, ["kind"], [{"name": "kind"}], [{**COLUMNS[1], "offset": "far"}], COLUMNS[:2], [{**COLUMNS[0], "categories": 7}]])
def test_a_damaged_description_is_refused(table, columns):
    dataset = SimpleNamespace(details={"columns": columns}, split=table[1].split)
    with pytest.raises(DataError, match="description of the table's columns is damaged"):
        slices.check("kind", dataset, TWO)
