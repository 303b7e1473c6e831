"""Photographs to a dataset file: which contents there are, who goes into which split, what is left out and why."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import machine
from hpcai_cli.engine.raw.cleaning import judge
from hpcai_cli.engine.raw.decoding import Task, decode_files
from hpcai_cli.engine.raw.decoding_process import Setting
from hpcai_cli.engine.raw.image_files import ImageFiles
from hpcai_cli.engine.raw.partial_file import PartialFile, partial_file
from hpcai_cli.engine.raw.splits import SPLITS, share_out
from hpcai_cli.errors import DataError, StoppedEarly
from hpcai_cli.recipe import Recipe
from hpcai_cli.signals import StopRequest

_PRIORITY = ("test", "validation", "train")
"""Of equal photographs in several splits the one in the first of these stays."""


class Photograph(NamedTuple):
    """One content, under the name that stays for it."""

    split: str
    name: str
    label: int
    copies: tuple[tuple[str, int], ...] = ()
    """Names and labels of the other files with the same bytes."""


def write(output: Path, splits: Mapping[str, ImageFiles], recipe: Recipe, wishes, about: Mapping) -> None:
    """Decode the files of all splits into a dataset file.

    Args:
        wishes: with `on_bad`, `max_bad`, `min_size`, `processes`.
        about: `recipe`, `source_fingerprint` and `options` for the file's attributes.

    Raises:
        DataError: there are too many bad files, or a class is left without photographs.
        StoppedEarly: a signal came; what is decoded stays, and the same call goes on from there.
    """
    first = splits["train"]
    chosen = _shared_out(_contents(splits), recipe, splits)
    photographs = [photograph for split in SPLITS for photograph in chosen if photograph.split == split]
    counts = Counter(photograph.split for photograph in photographs)
    with partial_file(output, counts, first.shape, _key(photographs, about, first.shape)) as part:
        _decode(part, photographs, first, wishes)
        labels, details = _cleaned(part, photographs)
        details |= {"ignored": [{"file": name, "reason": reason} for files in splits.values()
                                for name, reason in files.ignored],
                    "files": sum(map(len, splits.values())), "decoder_warnings": part.warnings}
        try:
            judge(details, len(labels), wishes, output, folder=first.folder)
            _check_left(labels, photographs, first.class_names)
        except DataError:
            part.discard()
            raise
        part.publish(labels, {**about, "class_names": first.class_names, "details": details})


def _contents(splits: Mapping[str, ImageFiles]) -> list[Photograph]:
    """Return the different contents among the files of all splits, sorted by name."""
    found, sizes, files = {}, Counter(), []
    for split in _PRIORITY:
        if split in splits:
            for name, label in zip(splits[split].names, splits[split].labels.tolist(), strict=True):
                files.append((split, name, label, _size(splits[split].folder / name)))
                sizes[files[-1][3]] += 1
    for split, name, label, size in files:
        # Only files of the same size can be equal, and only they need to be read for that.
        key = (size, _digest(splits[split].folder / name)) if sizes[size] > 1 and size >= 0 else (name,)
        found.setdefault(key, []).append(Photograph(split, name, label))
    return sorted((same[0]._replace(copies=tuple((other.name, other.label) for other in same[1:]))
                   for same in found.values()), key=lambda photograph: os.fsencode(photograph.name))


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # what cannot be read is said when it is decoded


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return os.fsencode(path)
    return digest.digest()


def _shared_out(photographs: list[Photograph], recipe: Recipe, splits: Mapping[str, ImageFiles]) -> list[Photograph]:
    """Give the splits that the recipe wants and the source doesn't bring their share of the training photographs."""
    # What has two labels will be left out, and must not weigh in the shares.
    shared = [place for place, photograph in enumerate(photographs) if photograph.split == "train"
              and {label for _, label in photograph.copies} <= {photograph.label}]
    labels = np.array([photographs[place].label for place in shared], np.int64)
    result = list(photographs)
    for split, rows in share_out(labels, recipe, splits).items():
        for row in rows.tolist():
            result[shared[row]] = result[shared[row]]._replace(split=split)
    return result


def _key(photographs: list[Photograph], about: Mapping, shape: tuple[int, ...]) -> str:
    """Return what tells a job of these files and options from all others."""
    digest = hashlib.sha256(json.dumps([dict(about), list(shape)], sort_keys=True).encode())
    for photograph in photographs:
        digest.update(repr(photograph).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _decode(part: PartialFile, photographs: list[Photograph], files: ImageFiles, wishes) -> None:
    before, total = int(part.done.sum()), len(photographs)
    if before:
        console.note(f"going on after {before:,} of {total:,} photographs")
    tasks = (Task(number, photograph.name, part.place(number)) for number, photograph in enumerate(photographs)
             if not part.done[number])
    setting = Setting(files.folder.absolute(), part.path.absolute(), files.shape, wishes.min_size)
    done = before
    with (StopRequest() as stop,
          console.progress("decoding", total=total, unit="photographs", done=before) as shown):
        processes = min(wishes.processes or machine.cores(), max(1, total - before))
        for rows in decode_files(tasks, setting, processes=processes if done < total else 0, stop=stop):
            part.note(rows)
            done += len(rows)
            shown.update(done)
    if done < total:
        raise StoppedEarly(f"stopped by {stop.received} after {done:,} of {total:,} photographs; run the same command "
                           "again to go on from there")


def _cleaned(part: PartialFile, photographs: list[Photograph]) -> tuple[dict[int, int], dict]:
    """Return the labels of the photographs that stay, by their number, and the lists for the report.

    First goes what has the same bytes under two labels; among the others, the same pixels in other bytes (written
    again, or with something behind their end) count as the same photograph.
    """
    rejected, duplicates, conflicts, labels = [], [], [], {}
    for number, reason in part.reasons.items():
        rejected += [{"file": name, "reason": reason} for name, _ in _files(photographs[number])]
    contradicted = {number for number, photograph in enumerate(photographs)
                    if any(label != photograph.label for _, label in photograph.copies)}
    for number in sorted(contradicted - part.reasons.keys()):
        conflicts.append(_conflict(_files(photographs[number])))
    good = [number for number in range(len(photographs)) if number not in part.reasons and number not in contradicted]
    for numbers in _same_pixels(part.digests, np.array(good, np.int64)):
        numbers.sort(key=lambda number: (_PRIORITY.index(photographs[number].split), number))
        files = [file for number in numbers for file in _files(photographs[number])]
        if len({label for _, label in files}) > 1:
            conflicts.append(_conflict(files))
        else:
            labels[numbers[0]] = files[0][1]
            duplicates += [{"file": name, "same_as": files[0][0]} for name, _ in files[1:]]
    by_file = {"key": lambda entry: os.fsencode(entry["file"])}
    return labels, {"rejected": sorted(rejected, **by_file), "duplicates": sorted(duplicates, **by_file),
                    "conflicts": sorted(conflicts, key=lambda entry: os.fsencode(entry["files"][0]))}


def _files(photograph: Photograph) -> list[tuple[str, int]]:
    return [(photograph.name, photograph.label), *photograph.copies]


def _conflict(files: list[tuple[str, int]]) -> dict:
    files = sorted(files, key=lambda file: os.fsencode(file[0]))
    return {"files": [name for name, _ in files], "labels": [label for _, label in files]}


def _same_pixels(digests: np.ndarray, numbers: np.ndarray) -> Iterator[list[int]]:
    """Yield the numbers of the candidates in groups of the same digest."""
    if not len(numbers):
        return
    _, group = np.unique(digests[numbers], axis=0, return_inverse=True)
    order = np.argsort(group.ravel(), kind="stable")
    for same in np.split(numbers[order], np.flatnonzero(np.diff(group.ravel()[order])) + 1):
        yield same.tolist()


def _check_left(labels: Mapping[int, int], photographs: list[Photograph], class_names: tuple[str, ...]) -> None:
    left = {split: set() for split in (photograph.split for photograph in photographs)}
    for number, label in labels.items():
        left[photographs[number].split].add(label)
    problems = [f"{split} has no photographs of {class_names[label]} left" for split, found in left.items()
                for label in range(len(class_names)) if label not in found]
    if problems:
        raise DataError("; ".join(problems), expected="usable photographs of each class in each split",
                        mend="look at the files with `--on-bad fail`")
