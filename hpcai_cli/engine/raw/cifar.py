"""Reads CIFAR-10 and CIFAR-100, binary and Python, as https://www.cs.toronto.edu/~kriz/cifar.html offers them."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.raw.idx import looks_like_html
from hpcai_cli.engine.raw.pickles import MAX_BYTES, read_pickle
from hpcai_cli.errors import DataError, UsageError

MAX_DEPTH = 4
"""How many folders deep the files are looked for."""

PIXELS = 32 * 32 * 3
_COARSE_CLASSES = 20
_SHAPE = "uint8 (n, 3072), the channels of each image one after the other"


@dataclass(frozen=True)
class _Form:
    """One way in which one of the two sets is packed."""

    num_classes: int
    kind: str
    train: tuple[str, ...]
    test: str

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.train, self.test)

    def __str__(self) -> str:
        return f"CIFAR-{self.num_classes}, {self.kind} version"


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
# The binary one first: where both are there, it is read.
_FORMS = (_Form(10, "binary", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin"),
          _Form(10, "Python", _BATCHES, "test_batch"),
          _Form(100, "binary", ("train.bin",), "test.bin"),
          _Form(100, "Python", ("train",), "test"))


def has_cifar(folder: Path) -> bool:
    """Tell whether a folder, or one at most MAX_DEPTH below it, has a file named as one of CIFAR's."""
    return bool(_found(Path(folder)))


def read_cifar(folder: Path, *, num_classes: int = 10) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find and read the batches of CIFAR-10, or of CIFAR-100 with its 100 fine labels.

    Nothing in the Python version's pickles is run.

    Returns:
        {"train": (images, labels), "test": (images, labels)}, images uint8 (n, 32, 32, 3) in [0, 255], labels
        int64 (n,) in [0, num_classes - 1].

    Raises:
        DataError: batches are missing, broken or of the other set.
    """
    form, place = _chosen(Path(folder), num_classes)
    batches = [_read_batch(place / name, form) for name in form.train]
    counts = {name: len(labels) for name, (_, labels) in zip(form.train, batches, strict=True)}
    # A download that broke off just at the end of a record shows in nothing else.
    if len(set(counts.values())) > 1:
        raise DataError("the training batches differ in length, so one was cut", expected="the same number of images",
                        mend="fetch the files again",
                        received=f"{', '.join(f'{count:,} in {name}' for name, count in counts.items())}, in {place}")
    images, labels = zip(*batches, strict=True)
    del batches
    train = images[0] if len(images) == 1 else np.concatenate(images), np.concatenate(labels)
    del images
    return {"train": train, "test": _read_batch(place / form.test, form)}


def _chosen(folder: Path, num_classes: int) -> tuple[_Form, Path]:
    """Return which form is read, and the folder with all of its files."""
    if num_classes not in (10, 100):
        raise UsageError("CIFAR has 10 classes or 100", expected="num_classes=10 or num_classes=100",
                         received=num_classes)
    found = _found(folder)
    fitting = [(form, place) for form, place in found if form.num_classes == num_classes]
    if not fitting:
        raise DataError(f"the folder holds {found[0][0]}, not CIFAR-{num_classes}" if found
                        else "the folder holds no files of CIFAR", mend="name the folder of the unpacked archive",
                        expected=f"{_FORMS[0].names[0]} and so on" if num_classes == 10 else "train.bin and test.bin",
                        received=str(folder))
    missing = {choice: [name for name in choice[0].names if not (choice[1] / name).is_file()] for choice in fitting}
    whole = [choice for choice in fitting if not missing[choice]]
    if not whole:
        form, place = min(fitting, key=lambda choice: len(missing[choice]))
        raise DataError(f"files of {form} are missing: {', '.join(missing[form, place])}",
                        expected="all in one folder", mend="fetch the archive again and unpack it whole",
                        received=str(place))
    form, place = whole[0]
    if any(other is form for other, _ in whole[1:]):
        raise DataError(f"{form} is there more than once", expected="one folder with it", mend="name that folder",
                        received=", ".join(str(there) for other, there in whole if other is form))
    if len(fitting) > 1:
        console.note(f"{folder} has more than one version of the data; {form} in {place} is read")
    return form, place


def _found(folder: Path) -> list[tuple[_Form, Path]]:
    """Return the forms of which at least one file is there, each with its folder, in the order of `_FORMS`."""
    def unreadable(error):
        raise DataError(f"cannot read a folder ({error.strerror})", received=str(error.filename))

    found = []
    for here, subfolders, names in os.walk(folder, onerror=unreadable):
        subfolders.sort()
        if len(Path(here).relative_to(folder).parts) >= MAX_DEPTH:
            subfolders.clear()
        there = set(names)
        found += [(form, Path(here)) for form in _FORMS
                  if any(name in there and Path(here, name).is_file() for name in form.names)]
    return sorted(found, key=lambda choice: _FORMS.index(choice[0]))


def _read_batch(path: Path, form: _Form) -> tuple[np.ndarray, np.ndarray]:
    try:
        return (_read_binary if form.kind == "binary" else _read_python)(path, form.num_classes)
    except OSError as error:
        raise DataError(f"cannot read a file of CIFAR ({error.strerror})", received=str(path)) from error


def _read_binary(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read records of one label (CIFAR-10) or a coarse and a fine one (CIFAR-100) and 3,072 pixels."""
    size = path.stat().st_size
    record, other = (PIXELS + 1, PIXELS + 2) if num_classes == 10 else (PIXELS + 2, PIXELS + 1)
    with open(path, "rb") as file:
        head = file.read(64)
    if not size:
        raise _broken("the file is empty", path)
    if looks_like_html(head):
        raise _broken("the file is a web page (HTML), as a dead mirror or a login page sends it", path)
    if size > MAX_BYTES:
        raise DataError("the file is too large", expected=f"at most {MAX_BYTES:,} bytes",
                        received=f"{size:,} in {path}")
    if size % record and size % other == 0:
        raise DataError(f"the file has records of {other:,} bytes, which are those of CIFAR-{110 - num_classes}",
                        expected=f"records of {record:,} bytes, as CIFAR-{num_classes} has them", received=str(path))
    if size % record:
        raise _broken(f"the file is truncated, or not of CIFAR: {size:,} bytes are no multiple of {record:,}", path)
    records = np.fromfile(path, np.uint8).reshape(-1, record)
    if num_classes == 100 and records[:, 0].max() >= _COARSE_CLASSES:
        raise _broken(f"coarse labels reach {records[:, 0].max()} where there are {_COARSE_CLASSES}", path)
    labels = _checked_labels(records[:, record - PIXELS - 1], num_classes, path)
    return _channels_last(records[:, -PIXELS:]), labels


def _read_python(path: Path, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the dictionary of a pickled batch."""
    batch = read_pickle(path)
    key, other = ("labels", "fine_labels") if num_classes == 10 else ("fine_labels", "labels")
    if not isinstance(batch, dict) or "data" not in batch:
        raise _broken("the pickle is no batch of CIFAR", path, expected=f"a dictionary with data and {key}")
    if key not in batch:
        wrong = f"the pickle is a batch of CIFAR-{110 - num_classes}" if other in batch else f"the batch has no {key}"
        raise DataError(wrong, expected=f"a batch of CIFAR-{num_classes}", received=str(path))
    images = batch["data"]
    if not isinstance(images, np.ndarray):
        raise _broken(f"the batch's data are a {type(images).__name__}", path, expected=f"an array, {_SHAPE}")
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != PIXELS:
        raise DataError(f"the batch's data are {images.dtype} {images.shape}", expected=_SHAPE, received=str(path))
    labels = batch[key]
    if isinstance(labels, list) and all(type(label) is int and abs(label) < 2**31 for label in labels):
        labels = np.array(labels, np.int64)
    if not isinstance(labels, np.ndarray) or labels.dtype.kind not in "iu" or labels.shape != (len(images),):
        raise _broken(f"the batch's {key} are not {len(images):,} whole numbers", path,
                      expected="one label for each image")
    if not len(images):
        raise _broken("the batch is empty", path)
    return _channels_last(images), _checked_labels(labels, num_classes, path)


def _checked_labels(labels: np.ndarray, num_classes: int, path: Path) -> np.ndarray:
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError("labels lie outside the classes, so the file is damaged or not of this set",
                        expected=f"0 to {num_classes - 1}", received=f"{labels.min()} to {labels.max()} in {path}")
    return labels.astype(np.int64)


def _channels_last(rows: np.ndarray) -> np.ndarray:
    """Turn uint8 (n, 3072), all red, then all green, then all blue, into (n, 32, 32, 3)."""
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _broken(what: str, path: Path, *, expected: str = "a whole batch of CIFAR") -> DataError:
    return DataError(what, expected=expected, mend="fetch the archive again", received=str(path))
