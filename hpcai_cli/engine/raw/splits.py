"""Shares examples out to the splits: stratified, by seed, with each content on one side only."""

import hashlib
from collections.abc import Iterable

import numpy as np

from hpcai_cli.errors import HpcaiError
from hpcai_cli.recipe import Recipe

SPLITS = ("train", "validation", "test")


def share_out(labels: np.ndarray, recipe: Recipe, present: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the rows of each split that is made of the source's training examples; each keeps their order.

    Args:
        labels: of the training examples, each of another content: int64 (n,), which are stratified, or float32.
        present: the splits that the source brings, which are not made again.

    Raises:
        HpcaiError: a share leaves a class without an example.
    """
    rows = {"train": np.arange(len(labels))}
    for name in ("test", "validation"):
        fraction = getattr(recipe, f"{name}_fraction")
        if fraction and name not in present:
            kept, aside = _set_aside(labels[rows["train"]], fraction, recipe, name)
            rows |= {"train": rows["train"][kept], name: rows["train"][aside]}
    return rows


def _set_aside(labels: np.ndarray, fraction: float, recipe: Recipe, name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    try:
        kept, aside = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=recipe.seed,
                                       stratify=labels if recipe.task == "classification" else None)
    except ValueError as error:
        raise HpcaiError(f"cannot set aside {fraction:.1%} of {len(labels)} training examples: {error}",
                         mend=f"give --{name}-fraction 0") from None
    return np.sort(kept), np.sort(aside)


def first_of_each(rows: Iterable[np.ndarray]) -> np.ndarray:
    """Return for each row the place of the first one of the same bytes: int64 (n,)."""
    seen = {}
    return np.array([seen.setdefault(hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest(), place)
                     for place, row in enumerate(rows)], np.int64)


def share_out_arrays(splits: dict, recipe: Recipe) -> tuple[dict, dict]:
    """Make the splits that the recipe wants and the source doesn't bring, and return them with what was found.

    Where the source brings a test split, its examples all stay, and repeated ones are only counted: a published split
    is not ours to change. Else each content is kept once, and none that has two labels.

    Returns:
        The splits, and what was found: `duplicates` and `conflicts`, lists for the report; `duplicate_rows` and
        `label_conflicts`, counts.
    """
    first = first_of_each(row for inputs, _ in splits.values() for row in inputs)
    every = np.concatenate([labels for _, labels in splits.values()])
    found = {"duplicates": [], "conflicts": [], "duplicate_rows": int((first != np.arange(len(first))).sum()),
             "label_conflicts": int((every != every[first]).sum())}
    inputs, labels = splits["train"]
    # The training split need not come first.
    start = sum(len(splits[name][1]) for name in list(splits)[:list(splits).index("train")])
    first = first_of_each(inputs) if start else first[:len(labels)]
    unique = np.flatnonzero(first == np.arange(len(first)))
    if recipe.test_fraction and "test" not in splits:
        unique = _cleaned(first, labels, unique, found)
        groups = {row: [row] for row in unique.tolist()}
    else:
        groups = {row: [] for row in unique.tolist()}
        for row, same_as in enumerate(first.tolist()):
            groups[same_as].append(row)
    made = share_out(labels[unique], recipe, splits)
    result = {}
    for name, chosen in made.items():
        rows = np.sort(np.array([row for place in chosen.tolist() for row in groups[int(unique[place])]], np.int64))
        result[name] = (inputs, labels) if len(rows) == len(labels) else (inputs[rows], labels[rows])
    return {name: pair for name in SPLITS if (pair := result.get(name) or splits.get(name)) is not None}, found


def _cleaned(first: np.ndarray, labels: np.ndarray, unique: np.ndarray, found: dict) -> np.ndarray:
    """Return the rows to keep of examples that are ours to split, and note the others in `found`."""
    contradicted = set(first[labels != labels[first]].tolist())
    for row in np.flatnonzero(first != np.arange(len(first))).tolist():
        if int(first[row]) not in contradicted:
            found["duplicates"].append({"file": f"train[{row}]", "same_as": f"train[{first[row]}]"})
    for same_as in sorted(contradicted):
        rows = np.flatnonzero(first == same_as).tolist()
        found["conflicts"].append({"files": [f"train[{row}]" for row in rows], "labels": labels[rows].tolist()})
    return np.array([row for row in unique.tolist() if row not in contradicted], np.int64)
