"""The split of a table: its shares, equal rows on one side, what the source brings."""

import numpy as np
import pytest

from hpcai_cli.engine.raw.table_splits import split_rows
from hpcai_cli.engine.raw.tables import read_table, table_of
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe


def recipe(**fields) -> Recipe:
    return Recipe(name="tiny", summary="", inputs="features", **{"test_fraction": 0.2, "validation_fraction": 0.25,
                                                                   **fields})


def numbered(count: int, values: int):
    """A table of rows 0 to count - 1, of which `values` are different, a quarter of them positive."""
    a = np.arange(count) % values
    return table_of({"a": a, "y": np.where(a % 4 == 0, "yes", "no")}, label="y")


def test_shares_and_classes_are_kept_and_the_seed_decides():
    table = numbered(400, 400)
    splits, _ = split_rows(table, recipe())
    assert {name: len(frame) for name, frame in splits.items()} == {"train": 240, "validation": 80, "test": 80}
    assert all((frame["y"] == "yes").mean() == 0.25 for frame in splits.values())
    assert all(frame.index.is_monotonic_increasing for frame in splits.values())
    again, other = split_rows(table, recipe())[0], split_rows(table, recipe(seed=1))[0]
    assert again["test"].equals(splits["test"]) and not other["test"].equals(splits["test"])


def test_equal_rows_stay_together_and_are_kept():
    splits, found = split_rows(numbered(400, 100), recipe())
    sides = [set(frame["a"]) for frame in splits.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 100
    assert sum(map(len, splits.values())) == 400
    assert found["duplicate_rows"] == 300
    assert found["duplicates"][0] == {"file": "sample:101", "same_as": "sample:1"}


def test_equal_rows_with_another_label_are_counted():
    _, found = split_rows(table_of({"a": [1, 1, 1, 2], "y": ["n", "p", "p", "n"]}, label="y"),
                          recipe(test_fraction=0.0, validation_fraction=0.0))
    assert (found["label_conflicts"], found["duplicate_rows"]) == (2, 1)


def test_the_sources_splits_stay_as_they_are(tmp_path):
    (tmp_path / "train.csv").write_text("a,y\n" + "".join(f"{row},{row % 2}\n" for row in range(40)))
    (tmp_path / "test.csv").write_text("a,y\n3,1\n99,0\n")
    splits, found = split_rows(read_table(tmp_path, label="y"), recipe())
    assert {name: len(frame) for name, frame in splits.items()} == {"train": 30, "validation": 10, "test": 2}
    assert found["duplicates_across_splits"] == 1
    assert found["duplicates"] == [{"file": "test.csv:2", "same_as": "train.csv:5"}]


def test_a_class_of_one_row_is_learned():
    table = table_of({"a": range(41), "y": ["rare", *["no", "yes"] * 20]}, label="y")
    splits, _ = split_rows(table, recipe())
    assert "rare" in set(splits["train"]["y"])


def test_too_few_rows_are_said():
    with pytest.raises(DataError, match="cannot set aside 20% of 2 rows for the test split.*--test-fraction"):
        split_rows(table_of({"a": [1, 2], "y": ["no", "yes"]}, label="y"), recipe())
