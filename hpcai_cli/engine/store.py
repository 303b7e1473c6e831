"""The HDF5 dataset: write, verify, open.

Per split two contiguous, unfiltered datasets, `SPLIT/images` (or `SPLIT/features`) and `SPLIT/labels`. Contiguous and
unfiltered, so that a reader maps them at their offset in the file and gathers shuffled rows at memory speed, without
HDF5's global lock; any HDF5 tool reads them all the same.
"""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.errors import DataError, HpcaiError
from hpcai_cli.recipe import Recipe

FORMAT = "hpcai.dataset"
VERSION = 1
CHUNK_BYTES = 8 << 20
"""How much is copied or hashed at a time: memory stays flat however large the file is."""
RESIDENT_BYTES = 256 << 20
"""Mapped pages that a reader keeps before it gives them back; the kernel's page cache still has them."""
ATTRIBUTE_BYTES = 32 << 10
"""Longer texts are cut: HDF5 holds 64 KiB in an attribute."""
MOST_EXPANSION = 2000
"""A packed dataset that says it is larger by more than this is a bomb; deflate reaches 1032."""
TYPES = ("uint8", "int64", "float32")


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


def write(path: Path, splits: Mapping[str, Mapping[str, np.ndarray]], *, recipe: str, class_names: tuple[str, ...],
          source_fingerprint: str, options: Mapping) -> str:
    """Write a dataset file whole or not at all, and return its fingerprint. The same input gives the same bytes.

    Args:
        splits: for each of `train`, `validation`, `test` the arrays `images` or `features` (n, ...) and `labels` (n,).

    Raises:
        HpcaiError: the disk is full or the folder cannot be written; what was there is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(array.nbytes for arrays in splits.values() for array in arrays.values())
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(descriptor)
        temporary = Path(name)
        fingerprint = _fill(temporary, splits, recipe, class_names, source_fingerprint, options)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        return fingerprint
    except (OSError, RuntimeError) as error:
        # h5py reports a full disk as an OSError or a RuntimeError without a code of its own.
        raise HpcaiError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there is "
                         "unchanged", mend="free some space or give another --output") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _fill(path: Path, splits, recipe, class_names, source_fingerprint, options) -> str:
    digests = {}
    with h5py.File(path, "w", libver=("earliest", "v110")) as file:
        for split, arrays in splits.items():
            for name, array in arrays.items():
                digests[f"{split}/{name}"] = _write_array(file, f"{split}/{name}", array)
        train = splits["train"]
        inputs = next(name for name in train if name != "labels")
        fingerprint = hashlib.sha256(json.dumps([digests, list(class_names)], sort_keys=True).encode()).hexdigest()
        write_attributes(file, {
            "format": FORMAT, "version": VERSION, "recipe": recipe, "inputs": inputs, "fingerprint": fingerprint,
            "class_names": json.dumps(class_names), "source_fingerprint": source_fingerprint,
            "options": json.dumps(options, sort_keys=True),
            "statistics": json.dumps(_statistics(train[inputs]), sort_keys=True)})
    return fingerprint


def _write_array(file: h5py.File, name: str, array: np.ndarray) -> str:
    if array.dtype.name not in TYPES:
        raise DataError(f"{name} has a type that the dataset file doesn't hold", expected=", ".join(TYPES),
                        received=array.dtype.name)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    # Early allocation gives the dataset its place in the file now, so that a reader can map it.
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # HDF5's modification times would make two equal files differ.
    layout.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(array.shape)
    identifier = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, layout, links)
    dataset = h5py.Dataset(identifier)
    digest = hashlib.sha256()
    for start, stop in _chunks(array):
        block = np.ascontiguousarray(array[start:stop])
        dataset[start:stop] = block
        digest.update(block)
    write_attributes(dataset, {"sha256": digest.hexdigest(), "valid_rows": len(array)})
    return digest.hexdigest()


def write_attributes(item: h5py.HLObject, values: Mapping[str, str | int]) -> None:
    """Write attributes as `_text` reads them: texts of fixed size, since HDF5 follows a damaged pointer of one of
    variable size into a crash."""
    for name, value in values.items():
        content = value.encode() if isinstance(value, str) else None
        if content is None:
            item.attrs[name] = value
            continue
        for number, start in enumerate(range(0, max(1, len(content)), ATTRIBUTE_BYTES)):
            piece = content[start:start + ATTRIBUTE_BYTES]
            item.attrs.create(_piece(name, number), piece, dtype=h5py.string_dtype("utf-8", max(1, len(piece))))


def _piece(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def _text(item: h5py.HLObject, name: str) -> str:
    pieces = []
    while not pieces or _piece(name, len(pieces)) in item.attrs:
        place = _piece(name, len(pieces))
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


def _chunks(array):
    rows = max(1, CHUNK_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))))
    return ((start, min(start + rows, len(array))) for start in range(0, len(array), rows))


def _statistics(inputs: np.ndarray) -> dict:
    """Mean and standard deviation per channel (the last axis) of the training split, in float64."""
    total = np.zeros(inputs.shape[-1])
    squares = np.zeros(inputs.shape[-1])
    for start, stop in _chunks(inputs):
        block = inputs[start:stop].reshape(-1, inputs.shape[-1]).astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    count = max(1, inputs.size // inputs.shape[-1])
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()}


class Split:
    """The examples of one split, mapped from the file.

    Attributes:
        inputs: uint8 or float32 (n, ...), a read-only view of the file.
        labels: int64 (n,), read-only.
    """

    def __init__(self, inputs: np.ndarray, labels: np.ndarray, pages: mmap.mmap | None, offset: int):
        self.inputs, self.labels = inputs, labels
        self._pages, self._offset = pages, offset
        self._row_bytes = inputs.dtype.itemsize * int(np.prod(inputs.shape[1:], dtype=np.int64))
        self._large = inputs.nbytes > RESIDENT_BYTES
        self._floor = _mapped_bytes() if self._large else 0

    def __len__(self) -> int:
        return len(self.labels)

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


class Dataset:
    """An opened dataset file.

    Attributes:
        splits: the file's splits by name.
        fingerprint: hash of the content, which runs and checkpoints remember.
        recipe: name of the recipe that wrote the file.
        class_names: names of the classes in the order of their labels.
        statistics: mean and std per channel of the training split.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        with _opened(self.path) as file:
            self.recipe = _text(file, "recipe")
            self.fingerprint = _text(file, "fingerprint")
            self.inputs_name = _text(file, "inputs")
            self.class_names = tuple(_json(file, "class_names", list))
            if not all(isinstance(name, str) for name in self.class_names):
                raise ValueError("attribute class_names holds something else than names")
            self.statistics = _json(file, "statistics", dict)
            places = {}
            for name in _split_names(file):
                inputs, labels = (_dataset(file, f"{name}/{kind}", self.path) for kind in (self.inputs_name, "labels"))
                if inputs.ndim < 2 or labels.ndim != 1 or len(inputs) != len(labels) or labels.dtype.kind != "i":
                    raise _broken(self.path, f"{name} has {len(inputs)} examples and {labels.shape} labels")
                places[name] = [(item.id.get_offset(), item.shape, item.dtype) for item in (inputs, labels)]
        self._h5 = None
        with self.path.open("rb") as stream:
            # Mapped once for all splits; the map holds the file open by itself, across forks too.
            self._pages = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.splits = {name: self._split(name, *place) for name, place in places.items()}

    def _split(self, name: str, inputs, labels) -> Split:
        if inputs[0] is None or labels[0] is None:
            self._h5 = self._h5 or h5py.File(self.path, "r", locking=False)
            return Split(self._h5[f"{name}/{self.inputs_name}"], self._h5[f"{name}/labels"][:], None, 0)
        arrays = [np.frombuffer(self._pages, dtype, int(np.prod(shape, dtype=np.int64)), offset).reshape(shape)
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
    digests, total = {}, 0
    with _opened(path) as file:
        for split in dataset.splits:
            for kind in (dataset.inputs_name, "labels"):
                item = file[f"{split}/{kind}"]
                digest = hashlib.sha256()
                for start, stop in _chunks(item):
                    digest.update(np.ascontiguousarray(item[start:stop]))
                total += item.size * item.dtype.itemsize
                digests[f"{split}/{kind}"] = digest.hexdigest()
                if digest.hexdigest() != _text(item, "sha256"):
                    raise _broken(path, f"the checksum of {split}/{kind} does not match its content")
        options = _json(file, "options", dict)
        source = _text(file, "source_fingerprint")
    names = list(dataset.class_names)
    if hashlib.sha256(json.dumps([digests, names], sort_keys=True).encode()).hexdigest() != dataset.fingerprint:
        raise _broken(path, "the fingerprint does not match the content")
    return Report(str(path), dataset.fingerprint, dataset.recipe, source, options, dataset.class_names,
                  {name: len(split) for name, split in dataset.splits.items()}, path.stat().st_size)


def check_fits(dataset: Dataset, recipe: Recipe, *, training: bool = True) -> None:
    """Check that the data fit the recipe.

    Raises:
        DataError: everything that doesn't fit, at once.
    """
    problems = []
    for name, split in dataset.splits.items():
        if tuple(split.inputs.shape[1:]) != recipe.input_shape:
            problems.append(f"{name} has examples of shape {tuple(split.inputs.shape[1:])} where the recipe has "
                            f"{recipe.input_shape}")
        if not len(split):
            problems.append(f"{name} is empty")
        elif int(split.labels.min()) < 0 or int(split.labels.max()) >= recipe.num_classes:
            problems.append(f"{name} has labels from {split.labels.min()} to {split.labels.max()} where the recipe has "
                            f"{recipe.num_classes} classes")
    if len(dataset.class_names) != recipe.num_classes:
        problems.append(f"it names {len(dataset.class_names)} classes where the recipe has {recipe.num_classes}")
    if training and recipe.early_stopping_patience and "validation" not in dataset.splits:
        problems.append("it has no validation split for early_stopping_patience to look at")
    if problems:
        raise DataError(f"{dataset.path} does not fit recipe {recipe.name}: {'; '.join(problems)}",
                        mend=f"write the file with `hpcai preprocess {recipe.dataset or recipe.name}`")


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
