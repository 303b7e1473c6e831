"""From raw files to a proven dataset file, with a report of what was found."""

import hashlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.cache import cache_folder
from hpcai_cli.engine import store
from hpcai_cli.engine.raw.cleaning import judge
from hpcai_cli.engine.raw.image_files import DECODER_VERSION, ImageFiles
from hpcai_cli.engine.raw.sources import fingerprint, open_source
from hpcai_cli.engine.raw.splits import SPLITS, share_out_arrays
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Recipe


@dataclass(frozen=True)
class Wishes:
    """What the user may ask of a preprocessing beyond the recipe."""

    force: bool = False
    """Replace an output that was made from something else."""
    on_bad: str = "skip"
    """What becomes of files that cannot be used: skip, fail (nothing is written) or quarantine (they are copied)."""
    max_bad: float = 0.1
    """Share of bad files beyond which nothing is written."""
    min_size: int = 16
    """Pixels of the shorter side that a photograph has at least."""
    processes: int = 0
    """Processes that decode; 0 takes all cores."""


NO_WISHES = Wishes()


def preprocess(recipe: Recipe, *, load: Callable, sample: Callable | None, downloads, source: str, output: Path,
               wishes: Wishes = NO_WISHES) -> dict:
    """Write the dataset file of a recipe, unless it is there already, and return the report.

    Raises:
        DataError: the source is missing, broken or not what the recipe reads, or too much of it is bad.
        UsageError: the output holds something else.
        MissingError: the network was asked for and gave nothing.
        StoppedEarly: a signal came while photographs were decoded; the same call goes on from there.
    """
    started = time.monotonic()
    if source == "sample" and sample is None:
        raise UsageError(f"recipe {recipe.name} has no built-in sample", expected="a folder, archive or address",
                         received=source)
    options = _options(recipe, sample if source == "sample" else load, wishes)
    report = {"schema": "hpcai.preprocess/1", "command": "preprocess", "recipe": recipe.name, "source": source,
              "file": str(output)}
    if source == "sample":
        reused = _write(recipe, sample, "sample", options, output, wishes, source)
    else:
        with open_source(source, downloads=downloads, cache=cache_folder()) as folder:
            reused = _write(recipe, lambda: load(folder, recipe), fingerprint(folder), options, output, wishes, source)
    return report | {"reused": reused} | _described(output, recipe, time.monotonic() - started)


def _options(recipe: Recipe, reader: Callable | None, wishes: Wishes) -> dict:
    """Return what decides a file's content beside its source."""
    return {"validation_fraction": recipe.validation_fraction, "test_fraction": recipe.test_fraction,
            "seed": recipe.seed, "reader": reader_digest(reader), "decoder": DECODER_VERSION,
            "min_size": wishes.min_size, "task": recipe.task, "input_shape": list(recipe.input_shape),
            "class_names": list(recipe.class_names),
            # A recipe that leaves the shape to the data decides it by options; other options are the model's.
            "options": {} if recipe.input_shape else dict(recipe.options)}


def reader_digest(reader: Callable | None) -> str:
    """Return a hash of a reader's code: a changed load or sample gives other data from the same source."""
    try:
        return hashlib.sha256(inspect.getsource(reader).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _write(recipe, read, source_fingerprint, options, output, wishes, source) -> bool:
    """Write the file, or return True where it is there already."""
    if output.exists() and not wishes.force:
        there = _still_valid(output, recipe, source_fingerprint, options)
        judge(there.details, sum(there.counts.values()), wishes, output, folder=None)
        return True
    console.note(f"reading {source}")
    value = read()
    about = {"recipe": recipe.name, "source_fingerprint": source_fingerprint, "options": options}
    splits, class_names, details = read_splits(recipe, value)
    if any(isinstance(files, ImageFiles) for files in splits.values()):
        from hpcai_cli.engine.raw import photographs

        photographs.write(output, splits, recipe, wishes, about)
        return False
    judge(details, sum(len(labels) for _, labels in splits.values()), wishes, output, folder=None)
    store.write(output, {name: {recipe.inputs: inputs, "labels": labels} for name, (inputs, labels) in splits.items()},
                class_names=class_names, details=details, **about)
    return False


def read_splits(recipe: Recipe, value: object) -> tuple[dict, tuple[str, ...], dict]:
    """Return splits, class names and details from what a recipe's load or sample returned.

    Arrays are checked and shared out as the recipe says, a table is encoded, photographs, which name their classes
    themselves, stay files.
    """
    if not isinstance(value, dict):
        from hpcai_cli.engine.raw.table_encoding import encode
        from hpcai_cli.engine.raw.tables import Table

        if isinstance(value, Table):
            encoded = encode(value, recipe)
            return checked(recipe, dict(encoded.splits)), tuple(encoded.class_names), dict(encoded.details)
    splits = checked(recipe, value)
    if any(isinstance(files, ImageFiles) for files in splits.values()):
        return splits, (), {}
    splits, found = share_out_arrays(splits, recipe)
    return splits, _class_names(recipe, splits), found


def _class_names(recipe: Recipe, splits: dict) -> tuple[str, ...]:
    if recipe.task == "regression":
        return ()
    count = recipe.num_classes or 1 + max(int(labels.max()) for _, labels in splits.values())
    return recipe.class_names or tuple(map(str, range(count)))


def _described(output: Path, recipe: Recipe, seconds: float) -> dict:
    """Return the part of the report that the finished file itself tells, the same for a new and a reused one."""
    dataset = store.Dataset(output)
    lists = {name: dataset.details.get(name, []) for name in ("rejected", "duplicates", "conflicts", "ignored")}
    balance = {} if recipe.task == "regression" else {"class_balance": {
        name: np.bincount(split.labels, minlength=len(dataset.class_names)).tolist()
        for name, split in dataset.splits.items()}}
    counts = {f"{name}_examples": len(split) for name, split in dataset.splits.items()}
    return {"fingerprint": dataset.fingerprint, "classes": list(dataset.class_names), **lists, **balance, "metrics": {
        **counts, "rejected": len(lists["rejected"]),
        "duplicates": dataset.details.get("duplicate_rows", len(lists["duplicates"])),
        "label_conflicts": dataset.details.get("label_conflicts", len(lists["conflicts"])),
        "ignored": len(lists["ignored"]), "decoder_warnings": dataset.details.get("decoder_warnings", 0),
        "bytes": output.stat().st_size, "seconds": round(seconds, 3)}}


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


def checked(recipe: Recipe, splits: object) -> dict[str, tuple[np.ndarray, np.ndarray] | ImageFiles]:
    """Check what a recipe's load returned: people write recipes, and a wrong shape must not become a file.

    Labels become int64, those of a regression float32.
    """
    if not isinstance(splits, dict) or "train" not in splits:
        raise UsageError(f"recipe {recipe.name}: load gives no training split",
                         expected='{"train": (inputs, labels), "test": (inputs, labels)}',
                         received=type(splits).__name__)
    problems = [f"{name!r} is no split" for name in splits if name not in SPLITS]
    result, shape = {}, recipe.input_shape
    kinds = {isinstance(value, ImageFiles) for value in splits.values()}
    if len(kinds) > 1:
        problems.append("some splits are files and some are arrays")
    for name, value in splits.items():
        if name not in SPLITS or isinstance(value, ImageFiles):
            result[name] = value
            continue
        try:
            inputs, labels = value
            shape = shape or tuple(inputs.shape[1:])
            found = _pair_problems(inputs, labels, recipe, shape)
        except (TypeError, ValueError, AttributeError):
            found = ["is no pair of arrays"]
        problems += [f"{name} {problem}" for problem in found]
        if not found:
            result[name] = inputs, labels.astype(np.float32 if recipe.task == "regression" else np.int64)
    if problems:
        raise DataError(f"recipe {recipe.name} read something that it cannot train on: {'; '.join(problems)}")
    return result


def _pair_problems(inputs, labels, recipe: Recipe, shape: tuple[int, ...]) -> list[str]:
    """Say what is wrong with the arrays of one split."""
    count, problems = len(inputs), []
    if tuple(inputs.shape[1:]) != shape:
        problems.append(f"has examples of shape {tuple(inputs.shape[1:])} where the recipe has {shape}")
    if not shape:
        problems.append("has inputs of one dimension where each example is an array of its own")
    if inputs.dtype.name not in ("uint8", "float32"):
        problems.append(f"has inputs of type {inputs.dtype} where uint8 and float32 can be stored")
    kinds = "iuf" if recipe.task == "regression" else "iu"
    if labels.shape != (count,) or labels.dtype.kind not in kinds:
        problems.append(f"has labels {labels.dtype} {labels.shape} for {count} examples")
    else:
        numbers = labels.astype(np.float32) if recipe.task == "regression" else labels
        problems += store.label_problems(numbers, recipe, recipe.num_classes)
    return problems
