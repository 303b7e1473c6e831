"""The HDF5 dataset: open, verify, fit to a recipe; hpcai_cli/engine/store_writer.py writes it.

Per split two contiguous, unfiltered datasets, `SPLIT/images` (or `SPLIT/features`) and `SPLIT/labels`. Contiguous and
unfiltered, so that a reader maps them at their offset in the file and gathers shuffled rows at memory speed, without
HDF5's global lock; any HDF5 tool reads them all the same.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine.store_writer import FORMAT, TYPES, VERSION, chunks, fingerprint_of, piece_name
from hpcai_cli.engine.store_writer import write as write
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe

RESIDENT_BYTES = 256 << 20
"""Mapped pages that a reader keeps before it gives them back; the kernel's page cache still has them."""
MOST_EXPANSION = 2000
"""A packed dataset that says it is larger by more than this is a bomb; deflate reaches 1032."""


@dataclass(frozen=True)
class Report:
    """What `verify` found in a file."""

    path: str
    fingerprint: str
    recipe: str
    source_fingerprint: str
    options: dict
    """What else decided the file's content, such as the validation fraction and the seed."""
    class_names: tuple[str, ...]
    counts: dict[str, int]
    bytes: int
    details: dict
    """What was found on the way: lists of rejected files, duplicates, conflicts and ignored files."""


def _text(item: h5py.HLObject, name: str) -> str:
    pieces = []
    while not pieces or piece_name(name, len(pieces)) in item.attrs:
        place = piece_name(name, len(pieces))
        kind = item.attrs.get_id(place)
        if kind.dtype.kind != "S" or kind.shape != ():
            raise ValueError(f"attribute {place} is no text of fixed size")
        pieces.append(bytes(item.attrs[place]))
    return b"".join(pieces).decode()


def _number(item: h5py.HLObject, name: str) -> int:
    kind = item.attrs.get_id(name)
    if kind.dtype.kind not in "iu" or kind.shape != ():
        raise ValueError(f"attribute {name} is no whole number")
    return int(item.attrs[name])


class Split:
    """The examples of one split, mapped from the file.

    Attributes:
        inputs: uint8 or float32 (n, ...), a read-only view of the file.
        labels: int64 (n,), or float32 (n,) for a regression, read-only.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, pages: mmap.mmap | None, offset: int):
        self.inputs, self.labels = inputs, labels
        self._pages, self._offset = pages, offset
        self._row_bytes = inputs.dtype.itemsize * int(np.prod(inputs.shape[1:], dtype=np.int64))
        self._large = inputs.nbytes > RESIDENT_BYTES
        self._floor = _mapped_bytes() if self._large else 0

    def __len__(self) -> int:
        return len(self.labels)

    def with_labels(self, labels: np.ndarray) -> "Split":
        """Return the same examples with other labels, (n, ...)."""
        return Split(self.inputs, labels, self._pages, self._offset)

    def gather(self, rows: np.ndarray, inputs_out: np.ndarray, labels_out: np.ndarray) -> None:
        """Copy rows (int64 (b,), each in [0, n)) into the caller's buffers, which are used again for each batch."""
        if self._pages is None:
            # A file that cannot be mapped: one hyperslab per row; h5py's fancy indexing is slower still.
            for place, row in enumerate(rows):
                inputs_out[place] = self.inputs[row]
            labels_out[:] = self.labels[rows]
            return
        # mode="clip" lets numpy write straight into the buffer; the default mode copies through another one.
        np.take(self.inputs, rows, axis=0, out=inputs_out, mode="clip")
        np.take(self.labels, rows, axis=0, out=labels_out, mode="clip")
        if self._large:
            self._release()

    def announce(self, rows: np.ndarray) -> None:
        """Tell the kernel which rows come next, so that a file larger than memory is read ahead of its use."""
        if self._pages is None or not self._large:
            return
        page = mmap.PAGESIZE
        for row in rows:
            start = self._offset + int(row) * self._row_bytes
            self._pages.madvise(mmap.MADV_WILLNEED, start // page * page, start % page + self._row_bytes)

    def _release(self) -> None:
        # Measured, not counted: for one page that is touched the kernel maps up to 2 MiB around it (large folios).
        if _mapped_bytes() - self._floor > RESIDENT_BYTES:
            # Resident memory grows with the batch, not with the file: the pages stay cached, only unmapped.
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._floor = _mapped_bytes()


def _mapped_bytes() -> int:
    """Return how much of this process's memory is pages of files, the libraries' among them."""
    with open("/proc/self/statm", "rb") as stream:
        return int(stream.read().split()[2]) * mmap.PAGESIZE


class _FirstRows:
    """The valid rows of a dataset that cannot be mapped, read when they are asked for."""

    def __init__(self, item: h5py.Dataset, count: int):
        self._item, self._count = item, count
        self.dtype, self.shape = item.dtype, (count, *item.shape[1:])
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * item.dtype.itemsize

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows):
        # A slice that ends beyond the valid rows ends there, as it does with an array.
        return self._item[slice(*rows.indices(self._count)) if isinstance(rows, slice) else rows]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self._item[:self._count], dtype)


class Dataset:
    """An opened dataset file.

    Attributes:
        splits: the file's splits by name.
        fingerprint: hash of the content, which runs and checkpoints remember.
        recipe: name of the recipe that wrote the file.
        class_names: names of the classes in the order of their labels.
        statistics: mean and std per channel of the training split.
        details: what was found when the file was made, such as lists of rejected files.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        with _opened(self.path) as file:
            self.recipe = _text(file, "recipe")
            self.fingerprint = _text(file, "fingerprint")
            self.inputs_name = _text(file, "inputs")
            if self.inputs_name not in ("images", "features"):
                raise ValueError("attribute inputs is neither images nor features")
            self.class_names = tuple(_json(file, "class_names", list))
            if not all(isinstance(name, str) for name in self.class_names):
                raise ValueError("attribute class_names holds something else than names")
            self.statistics = _json(file, "statistics", dict)
            # Files of earlier versions of hpcai have none.
            self.details = _json(file, "details", dict) if "details" in file.attrs else {}
            places = {name: _place(file, name, self.inputs_name, self.path) for name in _split_names(file)}
        self._h5 = None
        with self.path.open("rb") as stream:
            # Mapped once for all splits; the map holds the file open by itself, across forks too.
            self._pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.splits = {name: self._split(name, *place) for name, place in places.items()}

    def _split(self, name: str, count: int, inputs, labels) -> Split:
        if inputs[0] is None or labels[0] is None:
            self._h5 = self._h5 or h5py.File(self.path, "r", locking=False)
            return Split(_FirstRows(self._h5[f"{name}/{self.inputs_name}"], count), self._h5[f"{name}/labels"][:count],
                         None, 0)
        arrays = [np.frombuffer(self._pages, dtype, int(np.prod(shape, dtype=np.int64)), offset).reshape(shape)[:count]
                  for offset, shape, dtype in (inputs, labels)]
        return Split(*arrays, self._pages, inputs[0])

    def split(self, name: str) -> Split:
        """Return a split.

        Raises:
            DataError: the file has none of that name.
        """
        if name not in self.splits:
            raise DataError(f"{self.path} has no {name} split", expected=f"one of {', '.join(self.splits)}",
                            mend="write the file again with `hpcai preprocess`")
        return self.splits[name]


def verify(path: Path) -> Report:
    """Prove a file: its structure, its sizes and the checksum of every dataset.

    Raises:
        DataError: what is wrong with it.
    """
    dataset = Dataset(path)
    digests = {}
    with _opened(path) as file:
        for split, examples in dataset.splits.items():
            for kind in (dataset.inputs_name, "labels"):
                item = file[f"{split}/{kind}"]
                digest = hashlib.sha256()
                for start, stop in chunks(item, len(examples)):
                    digest.update(np.ascontiguousarray(item[start:stop]))
                digests[f"{split}/{kind}"] = digest.hexdigest()
                if digest.hexdigest() != _text(item, "sha256"):
                    raise _broken(path, f"the checksum of {split}/{kind} does not match its content")
        options = _json(file, "options", dict)
        source = _text(file, "source_fingerprint")
    if fingerprint_of(digests, dataset.class_names) != dataset.fingerprint:
        raise _broken(path, "the fingerprint does not match the content")
    return Report(str(path), dataset.fingerprint, dataset.recipe, source, options, dataset.class_names,
                  {name: len(split) for name, split in dataset.splits.items()}, path.stat().st_size, dataset.details)


def check_fits(dataset: Dataset, recipe: Recipe, *, training: bool = True) -> Recipe:
    """Return the recipe with what it leaves to the data (shape, classes) taken from them.

    Raises:
        DataError: everything that doesn't fit, at once.
    """
    train = dataset.split("train")
    shape = recipe.input_shape or tuple(train.inputs.shape[1:])
    if not recipe.num_classes and train.labels.dtype.kind == "f":
        # A recipe that leaves its classes to the data finds that there are none: the labels are numbers.
        recipe = dataclasses.replace(recipe, task="regression")
    regression = recipe.task == "regression"
    count = 0 if regression else recipe.num_classes or len(dataset.class_names)
    problems = []
    for name, split in dataset.splits.items():
        if tuple(split.inputs.shape[1:]) != shape:
            problems.append(f"{name} has examples of shape {tuple(split.inputs.shape[1:])} where the recipe has "
                            f"{shape}")
        problems += [f"{name} {problem}" for problem in label_problems(split.labels, recipe, count)]
    names = dataset.class_names
    if len(names) != count or count == 1:
        problems.append(f"it names {len(names)} classes where the recipe has "
                        f"{'none' if regression else count if count > 1 else '2 or more'}")
    elif recipe.class_names and recipe.class_names != names:
        problems.append(f"its classes are {', '.join(names)} where the recipe has {', '.join(recipe.class_names)}")
    if training and recipe.early_stopping_patience and "validation" not in dataset.splits:
        problems.append("it has no validation split for early_stopping_patience to look at")
    if problems:
        raise DataError(f"{dataset.path} does not fit recipe {recipe.name}: {'; '.join(problems)}",
                        mend=f"write the file with `hpcai preprocess {recipe.dataset or recipe.name}`")
    return dataclasses.replace(recipe, input_shape=shape, num_classes=count, class_names=names)


def label_problems(labels: np.ndarray, recipe: Recipe, num_classes: int) -> list[str]:
    """Say what keeps labels from being those of a recipe's task; 0 classes bounds them from below only."""
    if not len(labels):
        return ["is empty"]
    if recipe.task == "regression":
        if labels.dtype.kind != "f":
            return [f"has labels of type {labels.dtype} where a regression has float32 numbers"]
        return [] if np.isfinite(labels).all() else ["has labels that are not finite numbers"]
    if labels.dtype.kind not in "iu":
        return [f"has labels of type {labels.dtype} where a classification has whole numbers"]
    if labels.min() < 0 or num_classes and labels.max() >= num_classes:
        classes = num_classes or "any number of"
        return [f"has labels from {labels.min()} to {labels.max()} where the recipe has {classes} classes"]
    return []


@contextlib.contextmanager
def _opened(path: Path):
    """Open a file that a stranger may have made; every way in which HDF5 fails becomes a DataError."""
    if not path.is_file():
        raise DataError("the data file does not exist", expected="a file written by `hpcai preprocess`",
                        mend=f"run `hpcai preprocess RECIPE --output {path}`", received=str(path))
    try:
        # Locking is off: network file systems often lack it, and a finished file never changes.
        with h5py.File(path, "r", locking=False) as file:
            if "format" not in file.attrs or _text(file, "format") != FORMAT:
                raise DataError("an HDF5 file, but not one that hpcai wrote", expected="a dataset file",
                                mend="run `hpcai preprocess` to make one", received=str(path))
            version = _number(file, "version")
            if version != VERSION:
                raise DataError("a dataset file of another version", expected=f"version {VERSION}",
                                mend="write it again with `hpcai preprocess`", received=version)
            yield file
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise _broken(path, str(error)) from None


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"{path} is truncated, damaged or no dataset file: {why}",
                     expected="a file written by `hpcai preprocess`", mend="write it again with `hpcai preprocess`")


def _json(file: h5py.File, name: str, kind: type):
    value = json.loads(_text(file, name))
    if not isinstance(value, kind):
        raise ValueError(f"attribute {name} is not a {kind.__name__}")
    return value


def _split_names(file: h5py.File) -> list[str]:
    names = [name for name in ("train", "validation", "test")
             if isinstance(file.get(name, getlink=True), h5py.HardLink)]
    if "train" not in names:
        raise ValueError("it has no train split")
    return names


def _place(file: h5py.File, name: str, inputs_name: str, path: Path) -> tuple:
    """Return the number of valid rows of a split, and offset, shape and type of its inputs and labels."""
    inputs, labels = (_dataset(file, f"{name}/{kind}", path) for kind in (inputs_name, "labels"))
    if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or labels.dtype.kind not in "if":
        raise _broken(path, f"{name} has {len(inputs)} examples and {labels.shape} labels of type {labels.dtype}")
    counts = {_number(item, "valid_rows") for item in (inputs, labels)}
    if len(counts) != 1 or not 0 <= min(counts) <= len(labels):
        raise _broken(path, f"{name} has {len(labels)} rows of which {counts} are said to be valid")
    return counts.pop(), *((item.id.get_offset(), item.shape, item.dtype) for item in (inputs, labels))


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """Return a dataset after the checks that a stranger's file needs: no links, no outside storage, no absurd shape."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise _broken(path, f"{name} is missing or points elsewhere")
    item = file[name]
    if not isinstance(item, h5py.Dataset) or item.is_virtual or item.external:
        raise _broken(path, f"{name} keeps its data outside the file")
    if item.dtype.name not in TYPES:
        raise _broken(path, f"{name} has the type {item.dtype}")
    stored = item.id.get_offset()
    size = int(np.prod([int(dim) for dim in item.shape], dtype=object)) * item.dtype.itemsize
    there = path.stat().st_size
    # Without a place in the file it is packed in chunks, or has no data at all, and reading would make the zeros up.
    if size > there * MOST_EXPANSION if stored is None else stored + size > there:
        raise _broken(path, f"{name} says it is longer than the file")
    return item
