"""Looks into a dataset file: what it holds, in numbers and as a contact sheet of samples."""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hpcai_cli.engine import store
from hpcai_cli.engine.store_writer import chunks
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.run import write_bytes

MOST_ROWS = 20
"""Classes on a contact sheet; further ones are counted below it."""
MOST_PER_CLASS = 50
_CELL, _GAP, _NAMES, _TEXT = 96, 4, 160, 15
"""Pixels of a contact sheet: side of a sample, space around it, width of the names, height of their letters."""


def inspect(path: Path) -> dict:
    """Prove a dataset file and describe it as JSON values; memory stays flat however large the file is.

    Each split has its number of examples; for a classification how many of each class, for a regression mean, std,
    minimum and maximum of the labels; and those figures for the inputs: of images a list with one number per channel,
    of features a set per feature, by its name. NaN and infinite values are counted as `missing` and left out of the
    others, which are null where nothing else is there.

    Raises:
        DataError: the file is missing, damaged, or no dataset file.
    """
    proven, dataset = store.verify(path), store.Dataset(path)
    train = dataset.splits["train"].inputs
    names = _feature_names(dataset)
    splits = {}
    for name, split in dataset.splits.items():
        figures = _input_figures(split)
        by_name = {feature: {key: values[number] for key, values in figures.items()}
                   for number, feature in enumerate(names)}
        splits[name] = {"examples": len(split), **_label_figures(split.labels, dataset),
                        "statistics": by_name if dataset.inputs_name == "features" else figures}
    return {
        "schema": "hpcai.inspect/1", "command": "preprocess inspect", "file": str(path), "recipe": dataset.recipe,
        "fingerprint": dataset.fingerprint, "source_fingerprint": proven.source_fingerprint,
        "inputs": {"kind": dataset.inputs_name, "shape": list(train.shape[1:]), "dtype": train.dtype.name},
        "splits": splits, "classes": list(dataset.class_names), "options": proven.options, "details": proven.details,
        "metrics": {**{f"{name}_examples": len(split) for name, split in dataset.splits.items()},
                    "bytes": proven.bytes}}


def draw_contact_sheet(path: Path, target: Path, *, per_class: int = 8, seed: int = 0) -> None:
    """Write a PNG with training samples chosen by seed, one row per class with its name; one row for a regression.

    Raises:
        UsageError: the file holds no pictures, or per_class is out of range.
        DataError: the file is missing, damaged, or no dataset file.
        HpcaiError: the PNG cannot be written; what was there is still there.
    """
    if not 1 <= per_class <= MOST_PER_CLASS:
        raise UsageError("the number of samples per class is out of range", expected=f"1 to {MOST_PER_CLASS}",
                         received=per_class)
    dataset = store.Dataset(path)
    split = dataset.splits["train"]
    shape = tuple(split.inputs.shape[1:])
    if dataset.inputs_name != "images" or len(shape) != 3 or shape[2] not in (1, 3):
        raise UsageError("a contact sheet shows pictures, and this file has none",
                         expected="images (height, width, 1 or 3)", mend=f"run `hpcai preprocess inspect {path}` "
                         "without it", received=f"{dataset.inputs_name} {shape}")
    source = np.random.default_rng(seed)
    rows = []
    for name, members in _groups(split.labels, dataset):
        chosen = source.choice(members, min(per_class, len(members)), replace=False)
        rows.append((name, len(members), [_thumbnail(split, int(row)) for row in np.sort(chosen)]))
    content = io.BytesIO()
    _sheet(rows, per_class, max(0, len(dataset.class_names) - MOST_ROWS)).save(content, format="PNG")
    write_bytes(target, content.getvalue())


def _feature_names(dataset: store.Dataset) -> list[str]:
    """Return the names that a table's columns were given, or their numbers."""
    count = dataset.splits["train"].inputs.shape[-1]
    names = dataset.details.get("features")
    if isinstance(names, list) and len({str(name) for name in names}) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def _label_figures(labels: np.ndarray, dataset: store.Dataset) -> dict:
    if labels.dtype.kind == "f":
        moments = _Moments(1)
        for start, stop in chunks(labels):
            moments.add(labels[start:stop, np.newaxis])
        return {"labels": {name: values[0] for name, values in moments.figures().items()}}
    _check_labels(labels, dataset)
    counts = np.bincount(labels, minlength=len(dataset.class_names)).tolist()
    return {"class_balance": dict(zip(dataset.class_names, counts, strict=True))}


def _check_labels(labels: np.ndarray, dataset: store.Dataset) -> None:
    names = dataset.class_names
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(names)):
        raise DataError(f"{dataset.path} has labels without a class", expected=f"0 to {len(names) - 1}",
                        mend="write it again with `hpcai preprocess`", received=f"{labels.min()} to {labels.max()}")
    if len(set(names)) < len(names):
        raise DataError(f"{dataset.path} has two classes of the same name", expected="a name for each class",
                        received=", ".join(names[:20]))


class _Moments:
    """Mean, deviation, minimum and maximum of columns of which a block is seen at a time.

    Blocks are joined as in Chan, Golub and LeVeque (1979), https://doi.org/10.1007/978-3-642-51461-6_3: sums of squares
    would lose the deviation of large numbers.
    """

    def __init__(self, columns: int):
        self.seen = 0
        self.count, self.mean, self.squares = (np.zeros(columns) for _ in range(3))
        self.minimum, self.maximum = np.full(columns, np.inf), np.full(columns, -np.inf)

    def add(self, block: np.ndarray) -> None:
        """Take a block (rows, columns) in."""
        values = block.astype(np.float64)
        there = np.isfinite(values)
        count = there.sum(axis=0)
        total = self.count + count
        mean = np.where(there, values, 0).sum(axis=0) / np.maximum(count, 1)
        away = mean - self.mean
        self.squares += np.square(np.where(there, values - mean, 0)).sum(axis=0)
        self.squares += np.square(away) * self.count * count / np.maximum(total, 1)
        self.mean += away * count / np.maximum(total, 1)
        self.minimum = np.minimum(self.minimum, np.where(there, values, np.inf).min(axis=0))
        self.maximum = np.maximum(self.maximum, np.where(there, values, -np.inf).max(axis=0))
        self.count, self.seen = total, self.seen + len(values)

    def figures(self) -> dict[str, list]:
        std = np.sqrt(self.squares / np.maximum(self.count, 1))
        columns = {"mean": self.mean, "std": std, "minimum": self.minimum, "maximum": self.maximum}
        return {**{name: [value if count else None for value, count in zip(values.tolist(), self.count, strict=True)]
                   for name, values in columns.items()},
                "missing": (self.seen - self.count).astype(int).tolist()}


def _input_figures(split: store.Split) -> dict[str, list]:
    """Return mean, std, minimum, maximum and missing of the last axis, each a list."""
    columns = split.inputs.shape[-1]
    moments, histogram = _Moments(columns), np.zeros((256, columns), np.int64)
    for start, stop in chunks(split.inputs):
        # Copied out: what a reader touches of the map itself would stay in its memory.
        block = np.empty((stop - start, *split.inputs.shape[1:]), split.inputs.dtype)
        split.gather(np.arange(start, stop), block, np.empty(stop - start, split.labels.dtype))
        # In parts, since float64 is eight times a picture's bytes.
        for part in np.array_split(block.reshape(-1, columns), 32):
            if part.dtype == np.uint8:
                # Counting is exact and ten times as fast.
                for column in range(columns):
                    histogram[:, column] += np.bincount(part[:, column], minlength=256)
            elif len(part):
                moments.add(part)
    return _histogram_figures(histogram) if histogram.any() else moments.figures()


def _histogram_figures(histogram: np.ndarray) -> dict[str, list]:
    """Return the figures of uint8 values that have been counted: int64 (256, columns)."""
    values, count = np.arange(256.0)[:, np.newaxis], histogram.sum(axis=0)
    mean = (values * histogram).sum(axis=0) / count
    std = np.sqrt((np.square(values - mean) * histogram).sum(axis=0) / count)
    return {"mean": mean.tolist(), "std": std.tolist(), "minimum": (histogram > 0).argmax(axis=0).tolist(),
            "maximum": (255 - (histogram[::-1] > 0).argmax(axis=0)).tolist(), "missing": [0] * len(count)}


def _groups(labels: np.ndarray, dataset: store.Dataset) -> list[tuple[str, np.ndarray]]:
    """Return name and members of each row of the sheet."""
    if labels.dtype.kind == "f":
        return [("samples", np.arange(len(labels)))]
    _check_labels(labels, dataset)
    return [(name, np.flatnonzero(labels == number)) for number, name in enumerate(dataset.class_names[:MOST_ROWS])]


def _thumbnail(split: store.Split, row: int) -> Image.Image:
    """Return one example at a size that people see: small ones in whole multiples, so that their pixels stay sharp."""
    pixels = np.empty((1, *split.inputs.shape[1:]), split.inputs.dtype)
    split.gather(np.array([row]), pixels, np.empty(1, split.labels.dtype))
    pixels = pixels[0]
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float64), posinf=0, neginf=0)
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    scale = _CELL / max(picture.size)
    if scale >= 2:
        return picture.resize([side * math.floor(scale) for side in picture.size], Image.Resampling.NEAREST)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


def _sheet(rows: list[tuple[str, int, list[Image.Image]]], per_class: int, further: int) -> Image.Image:
    step = _CELL + _GAP
    width, height = _NAMES + per_class * step + _GAP, len(rows) * step + _GAP
    sheet = Image.new("RGB", (width, height + (2 * _TEXT if further else 0)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
    for number, (name, count, pictures) in enumerate(rows):
        top = _GAP + number * step
        draw.text((2 * _GAP, top + _CELL // 2 - _TEXT), _shown(name), fill="black", font=font)
        draw.text((2 * _GAP, top + _CELL // 2 + _GAP), f"{count:,}", fill="gray", font=font)
        for place, picture in enumerate(pictures):
            sheet.paste(picture, (_NAMES + place * step + (_CELL - picture.width) // 2,
                                  top + (_CELL - picture.height) // 2))
    if further:
        draw.text((2 * _GAP, height), f"and {further:,} more classes", fill="gray", font=font)
    return sheet


def _shown(name: str, most: int = 18) -> str:
    """Return a name on one line that fits beside its row."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return name if len(name) <= most else f"{name[:most - 3]}..."
