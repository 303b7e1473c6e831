"""Splits the rows of a table, equal rows never on two sides."""

from typing import TYPE_CHECKING

import numpy as np

from hpcai_cli.engine.raw.tables import Table
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

if TYPE_CHECKING:
    import pandas

MOST_LISTED = 1_000
"""Equal rows that are listed; all are counted."""


def split_rows(table: Table, recipe: Recipe) -> tuple[dict[str, "pandas.DataFrame"], dict]:
    """Return the rows of each split, and what was found out about equal ones.

    Splits that the source brings stay as they are; a test and a validation split that it does not bring are set aside
    by the recipe's fractions and seed, stratified by class. Equal rows are observations of their own in a table: they
    are kept, and stay together.

    Raises:
        DataError: there are too few rows.
    """
    found = _equal_rows(table)
    splits = dict(table.splits)
    for name, fraction in (("test", recipe.test_fraction), ("validation", recipe.validation_fraction)):
        if fraction and name not in splits:
            splits["train"], splits[name] = _set_aside(splits["train"], table, name, fraction, recipe.seed)
    order = [name for name in ("train", "validation", "test") if name in splits]
    return {name: splits[name] for name in order}, found


def _set_aside(frame: "pandas.DataFrame", table: Table, name: str, fraction: float, seed: int) -> tuple:
    """Part a share of the rows from a frame; both parts keep its order."""
    import pandas
    from sklearn.model_selection import train_test_split

    groups, _ = pandas.factorize(_keys(frame))
    _, firsts = np.unique(groups, return_index=True)
    labels = frame[table.label].to_numpy()[firsts]
    candidates, stratify = np.arange(len(firsts)), None
    if table.task == "classification":
        codes, names = pandas.factorize(labels)
        # A class with a single row can be learned or judged, not both.
        candidates = candidates[np.bincount(codes)[codes] > 1]
        stratify = codes[candidates]
    try:
        _, aside = train_test_split(candidates, test_size=fraction, random_state=seed, stratify=stratify)
    except ValueError as error:
        raise DataError(f"cannot set aside {fraction:.0%} of {len(frame):,} rows for the {name} split: {error}",
                        expected="more rows", mend=f"change `--{name}-fraction`") from None
    chosen = np.isin(groups, aside)
    return frame[~chosen], frame[chosen]


def _equal_rows(table: Table) -> dict:
    """Count and list rows that equal one before in any split, and count those that differ from it in the label."""
    seen, seen_features, listed = {}, {}, []
    duplicates = across = conflicts = 0
    for split, frame in table.splits.items():
        whole, features = _keys(frame).tolist(), _keys(frame.drop(columns=table.label)).tolist()
        for line, label, key, feature_key in zip(frame.index, frame[table.label], whole, features, strict=True):
            place = f"{table.files[split]}:{line}"
            if key in seen:
                duplicates += 1
                across += seen[key][0] != split
                if len(listed) < MOST_LISTED:
                    listed.append({"file": place, "same_as": seen[key][1]})
            else:
                seen[key] = split, place
            conflicts += seen_features.setdefault(feature_key, label) != label
    return {"duplicates": listed, "duplicate_rows": duplicates, "duplicates_across_splits": across,
            "label_conflicts": conflicts if table.task == "classification" else 0}


def _keys(frame: "pandas.DataFrame") -> np.ndarray:
    """Return a number for each row, equal for equal rows; that it might be equal for others does no harm."""
    import pandas

    return pandas.util.hash_pandas_object(frame, index=False).to_numpy()
