"""The figures of parts of a split: by class, or by the values of a column of a table."""

import difflib
from collections.abc import Mapping

import numpy as np

from hpcai_cli.engine.evaluation import answers, log_probabilities
from hpcai_cli.engine.reports import bootstrap
from hpcai_cli.engine.store import Dataset, Split
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Recipe

MOST_SLICES = 50
"""Categories beyond the most frequent ones are one slice together."""
FEW_VALUES = 4
"""Different numbers up to which each is a slice of its own; of more, each quarter of the examples is one."""
BLOCK_ROWS = 10_000


def columns_of(details: Mapping, width: int) -> dict[str, dict]:
    """Return a table's columns by name, each with `first`, its first feature, and `features`, their number.

    Args:
        details: a data file's, or those in a run's manifest; none of a table give no columns.
        width: features of an example.

    Raises:
        DataError: they are not as `table_encoding.encode` writes them.
    """
    found, first = {}, 0
    try:
        for column in details.get("columns", []):
            categories = column.get("categories", [])
            offset = float(column.get("offset", 0))
            features = (len(categories) if "categories" in column else 1) + bool(column["missing"])
            found[str(column["name"])] = {"kind": column["kind"], "missing": bool(column["missing"]), "offset": offset,
                                          "categories": [str(category) for category in categories],
                                          "first": first, "features": features}
            first += features
        if found and first != width:
            raise ValueError(f"{first} features where the examples have {width}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the description of the table's columns is damaged: {error}",
                        expected="what `hpcai preprocess` writes", mend="write the data file again") from None
    return found


def check(by: str, dataset: Dataset, recipe: Recipe) -> None:
    """Refuse a column that the data don't have.

    Raises:
        UsageError: with the names that there are.
    """
    names = list(columns_of(dataset.details, dataset.split("train").inputs.shape[-1]))
    names += ["class"] if recipe.task == "classification" and "class" not in names else []
    if by not in names:
        near = difflib.get_close_matches(by, names, n=1)
        raise UsageError(f"--by knows no column {by!r}{f', perhaps {near[0]!r}' if near else ''}",
                         expected=f"one of {', '.join(names)}" if names else "a classification, or rows of a table",
                         received=by)


def slices(by: str, dataset: Dataset, split: Split, recipe: Recipe, scores: np.ndarray,
           threshold: float | None = None) -> list[dict]:
    """Return for each slice its `name`, `count`, `metrics` and `intervals`, as JSON values.

    Args:
        by: a name that `check` lets through; the data's own columns come before `class`.
        scores: the task's scores, float32 (n, columns).
    """
    columns = columns_of(dataset.details, split.inputs.shape[-1])
    parts = _by_column(by, columns[by], split) if by in columns else [
        (name, split.labels == number) for number, name in enumerate(recipe.class_names)]
    if recipe.task == "regression":
        errors = scores[:, 0].astype(np.float64) - split.labels
        figures = {"mean_absolute_error": np.abs(errors), "loss": np.square(errors), "mean_error": errors}
    else:
        figures = {"accuracy": answers(scores, threshold) == split.labels,
                   "loss": -log_probabilities(scores)[np.arange(len(split)), split.labels]}
    found = []
    for name, inside in parts:
        own = bootstrap.means({figure: values[inside] for figure, values in figures.items()})
        count = int(inside.sum())
        if count:
            found.append({"name": name, "count": count, "metrics": own(np.ones(count)),
                          "intervals": bootstrap.intervals(own, count)})
    return found


def _by_column(name: str, column: Mapping, split: Split) -> list[tuple[str, np.ndarray]]:
    """Return the names of a column's slices and which examples are in them, bool (n,)."""
    own = slice(column["first"], column["first"] + column["features"])
    values = np.concatenate([np.asarray(split.inputs[start:start + BLOCK_ROWS])[:, own]
                             for start in range(0, len(split), BLOCK_ROWS)])
    missing = values[:, -1] > 0 if column["missing"] else np.zeros(len(values), bool)
    parts = _by_category(column["categories"], values) if column["categories"] else _by_number(
        name, values[:, 0] + column["offset"], ~missing)
    return [*parts, (f"{name} is missing", missing)]


def _by_category(categories: list[str], values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    inside = values[:, :len(categories)] > 0
    often = np.argsort(-inside.sum(axis=0), kind="stable")
    shown = sorted(often[:MOST_SLICES].tolist())
    others = inside[:, often[MOST_SLICES:]].any(axis=1)
    # A category that the training split does not have is 0 in all features.
    return [*((categories[place], inside[:, place]) for place in shown), ("other values", others),
            ("unknown values", ~(values > 0).any(axis=1))]


def _by_number(name: str, values: np.ndarray, known: np.ndarray) -> list[tuple[str, np.ndarray]]:
    different = np.unique(values[known])
    if len(different) <= FEW_VALUES:
        return [(f"{name} = {value:g}", known & (values == value)) for value in different]
    edges = np.unique(np.quantile(values[known], [0, 0.25, 0.5, 0.75, 1]))
    places = np.clip(np.searchsorted(edges, values, side="left") - 1, 0, len(edges) - 2)
    # Each slice holds its upper end; the lowest one its lower end too.
    return [(f"{name} {'from' if not place else 'above'} {low:g} to {high:g}", known & (places == place))
            for place, (low, high) in enumerate(zip(edges, edges[1:], strict=False))]
