"""From raw files to a proven dataset file, with a report of what was found."""

import hashlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.cache import cache_folder
from hpcai_cli.engine import store
from hpcai_cli.engine.sources import fingerprint, open_source
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe


def preprocess(recipe: Recipe, *, load: Callable, sample: Callable | None, downloads, source: str, output: Path,
               force: bool = False) -> dict:
    """Write the dataset file of a recipe, unless it is there already, and return the report.

    Raises:
        DataError: the source is missing, broken or not what the recipe reads.
        UsageError: the output holds something else.
        MissingError: the network was asked for and gave nothing.
    """
    started = time.monotonic()
    options = {"validation_fraction": recipe.validation_fraction, "seed": recipe.seed,
               "reader": reader_digest(sample if source == "sample" else load)}
    if source == "sample":
        if sample is None:
            raise UsageError(f"recipe {recipe.name} has no built-in sample", expected="a folder, archive or address",
                             received=source)
        return _write(recipe, sample, "sample", options, output, force, started, source)
    with open_source(source, downloads=downloads, cache=cache_folder()) as folder:
        return _write(recipe, lambda: load(folder, recipe), fingerprint(folder), options, output, force, started, source)


def reader_digest(reader: Callable | None) -> str:
    """Return a hash of a reader's code: a changed load or sample gives other data from the same source."""
    try:
        return hashlib.sha256(inspect.getsource(reader).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _write(recipe, read, source_fingerprint, options, output, force, started, source) -> dict:
    report = {"schema": "hpcai.preprocess/1", "command": "preprocess", "recipe": recipe.name, "source": source,
              "file": str(output)}
    if output.exists() and not force:
        there = _still_valid(output, recipe, source_fingerprint, options)
        return report | {"reused": True, "fingerprint": there.fingerprint,
                         "metrics": {"bytes": there.bytes, **_counts(there.counts),
                                     "seconds": round(time.monotonic() - started, 3)}}
    console.note(f"reading {source}")
    splits = checked(recipe, read())
    duplicates, conflicts = _duplicates(splits)
    if recipe.validation_fraction and "validation" not in splits:
        splits = _set_aside(splits, recipe.validation_fraction, recipe.seed)
    names = recipe.class_names or tuple(map(str, range(recipe.num_classes)))
    digest = store.write(output, {name: {recipe.inputs: inputs, "labels": labels}
                                  for name, (inputs, labels) in splits.items()},
                         recipe=recipe.name, class_names=names, source_fingerprint=source_fingerprint, options=options)
    balance = {name: np.bincount(labels, minlength=recipe.num_classes).tolist() for name, (_, labels) in splits.items()}
    return report | {
        "reused": False, "fingerprint": digest, "rejected": [], "classes": list(names), "class_balance": balance,
        "metrics": {**_counts({name: len(labels) for name, (_, labels) in splits.items()}), "rejected": 0,
                    "duplicates": duplicates, "label_conflicts": conflicts, "bytes": output.stat().st_size,
                    "seconds": round(time.monotonic() - started, 3)}}


def _counts(counts: dict[str, int]) -> dict[str, int]:
    return {f"{name}_examples": count for name, count in counts.items()}


def _still_valid(output: Path, recipe: Recipe, source_fingerprint: str, options: dict) -> store.Report:
    """Return the report of a file that is what would be written; anything else is not ours to overwrite."""
    try:
        there = store.verify(output)
    except DataError as error:
        raise UsageError(f"the output exists and is no valid dataset file: {error}", mend="give another --output, or "
                         "replace it with --force", received=str(output)) from None
    if (there.recipe, there.source_fingerprint, there.options) != (recipe.name, source_fingerprint, options):
        raise UsageError("the output exists and was made from other input or options",
                         expected=f"recipe {recipe.name}, {options}",
                         mend="give another --output, or replace it with --force", received=str(output))
    return there


def checked(recipe: Recipe, splits: object) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Check what a recipe's load returned: people write recipes, and a wrong shape must not become a file."""
    problems = []
    if not isinstance(splits, dict) or "train" not in splits:
        raise UsageError(f"recipe {recipe.name}: load gives no training split",
                         expected='{"train": (inputs, labels), "test": (inputs, labels)}',
                         received=type(splits).__name__)
    for name, pair in splits.items():
        if name not in ("train", "validation", "test"):
            problems.append(f"{name!r} is no split")
            continue
        try:
            inputs, labels = pair
            shape, count, labeled = tuple(inputs.shape[1:]), len(inputs), (labels.shape, labels.dtype.kind)
        except (TypeError, ValueError, AttributeError):
            problems.append(f"{name} is no pair of arrays")
            continue
        if shape != recipe.input_shape:
            problems.append(f"{name} has examples of shape {shape} where the recipe has {recipe.input_shape}")
        if inputs.dtype.name not in ("uint8", "float32"):
            problems.append(f"{name} has inputs of type {inputs.dtype} where uint8 and float32 can be stored")
        if labeled not in (((count,), "i"), ((count,), "u")):
            problems.append(f"{name} has labels {labels.dtype} {labels.shape} for {count} examples")
        elif not count:
            problems.append(f"{name} is empty")
        elif labels.min() < 0 or labels.max() >= recipe.num_classes:
            problems.append(f"{name} has labels from {labels.min()} to {labels.max()} where the recipe has "
                            f"{recipe.num_classes} classes")
    if problems:
        raise DataError(f"recipe {recipe.name} read something that it cannot train on: {'; '.join(problems)}")
    return {name: (inputs, labels.astype(np.int64)) for name, (inputs, labels) in splits.items()}


def _set_aside(splits: dict, fraction: float, seed: int) -> dict:
    """Move a stratified share of the training examples to a validation split; both keep the source's order."""
    from sklearn.model_selection import train_test_split

    inputs, labels = splits["train"]
    try:
        kept, aside = train_test_split(np.arange(len(labels)), test_size=fraction, random_state=seed, stratify=labels)
    except ValueError as error:
        raise HpcaiError(f"cannot set aside {fraction:.1%} of {len(labels)} training examples: {error}",
                         mend="give --validation-fraction 0") from None
    kept.sort()
    aside.sort()
    return {"train": (inputs[kept], labels[kept]), "validation": (inputs[aside], labels[aside]),
            **{name: pair for name, pair in splits.items() if name != "train"}}


def _duplicates(splits: dict) -> tuple[int, int]:
    """Count examples whose content was there before, in any split, and those among them with another label."""
    seen, duplicates, conflicts = {}, 0, 0
    for inputs, labels in splits.values():
        for row, label in zip(inputs, labels.tolist(), strict=True):
            key = hashlib.blake2b(np.ascontiguousarray(row), digest_size=16).digest()
            duplicates += key in seen
            conflicts += seen.setdefault(key, label) != label
    return duplicates, conflicts
