"""Writes the HDF5 dataset file that hpcai_cli/engine/store.py reads: whole or not at all, the same bytes each time."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.errors import DataError, HpcaiError

FORMAT = "hpcai.dataset"
VERSION = 1
CHUNK_BYTES = 8 << 20
"""How much is copied or hashed at a time: memory stays flat however large the file is."""
ATTRIBUTE_BYTES = 32 << 10
"""Longer texts are cut: HDF5 holds 64 KiB in an attribute."""
LIBRARY_VERSIONS = ("earliest", "v110")
"""What HDF5 may use of its format: readable from HDF5 1.10 on."""
TYPES = ("uint8", "int64", "float32")


def write(path: Path, splits: Mapping[str, Mapping[str, np.ndarray]], *, recipe: str, class_names: tuple[str, ...],
          source_fingerprint: str, options: Mapping, details: Mapping | None = None) -> str:
    """Write a dataset file whole or not at all, and return its fingerprint. The same input gives the same bytes.

    Args:
        splits: for each of `train`, `validation`, `test` the arrays `images` or `features` (n, ...) and `labels` (n,),
            int64 classes or, for a regression, float32 numbers.
        class_names: names of the classes in the order of their labels; empty for a regression.
        options: what else decided the content.
        details: what was found on the way, such as the files that were rejected; plain JSON values.

    Raises:
        HpcaiError: the disk is full or the folder cannot be written; what was there is still there.
    """
    temporary = None
    with telling_failures(path):
        check_space(path, sum(array.nbytes for arrays in splits.values() for array in arrays.values()))
        try:
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
            os.close(descriptor)
            temporary = Path(name)
            with h5py.File(temporary, "w", libver=LIBRARY_VERSIONS) as file:
                digests = {f"{split}/{name}": _write_array(file, f"{split}/{name}", array)
                           for split, arrays in splits.items() for name, array in arrays.items()}
                inputs = next(name for name in splits["train"] if name != "labels")
                fingerprint = write_description(
                    file, digests, inputs=inputs, recipe=recipe, class_names=class_names, options=options,
                    source_fingerprint=source_fingerprint, details=details or {},
                    statistics=_statistics(splits["train"][inputs]))
            publish(temporary, path)
            return fingerprint
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def telling_failures(path: Path) -> Iterator[None]:
    """Turn what goes wrong while `path` is written into one sentence."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # h5py reports a full disk as an OSError or a RuntimeError without a code of its own.
        raise HpcaiError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was there is "
                         "unchanged", mend="free some space or give another --output") from None


def check_space(path: Path, needed: int) -> None:
    """Make the folder of a file, and raise an OSError where fewer than `needed` bytes are free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} bytes are needed and {free:,} are free")


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, after its bytes are on the disk."""
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    os.replace(temporary, path)


def write_description(file: h5py.File, digests: Mapping[str, str], *, inputs: str, recipe: str,
                      class_names: tuple[str, ...], source_fingerprint: str, options: Mapping, details: Mapping,
                      statistics: Mapping) -> str:
    """Write the attributes of a file whose datasets are there, and return its fingerprint.

    Args:
        digests: SHA-256 of the valid rows of each dataset, by name.
        inputs: `images` or `features`.
    """
    fingerprint = fingerprint_of(digests, class_names)
    write_attributes(file, {
        "format": FORMAT, "version": VERSION, "recipe": recipe, "inputs": inputs, "fingerprint": fingerprint,
        "class_names": json.dumps(class_names), "source_fingerprint": source_fingerprint,
        "options": json.dumps(options, sort_keys=True), "details": json.dumps(details, sort_keys=True),
        "statistics": json.dumps(statistics, sort_keys=True)})
    return fingerprint


def fingerprint_of(digests: Mapping[str, str], class_names: tuple[str, ...]) -> str:
    """Return the hash of the content, which runs and checkpoints remember."""
    return hashlib.sha256(json.dumps([digests, list(class_names)], sort_keys=True).encode()).hexdigest()


def create_dataset(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> h5py.Dataset:
    """Make a contiguous dataset that has its place in the file from now on."""
    if dtype.name not in TYPES:
        raise DataError(f"{name} has a type that the dataset file doesn't hold", expected=", ".join(TYPES),
                        received=dtype.name)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_layout(h5py.h5d.CONTIGUOUS)
    # Early allocation gives the dataset its place in the file now, so that a reader can map it.
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # HDF5's modification times would make two equal files differ.
    layout.set_obj_track_times(False)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape)
    identifier = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, layout, links)
    return h5py.Dataset(identifier)


def _write_array(file: h5py.File, name: str, array: np.ndarray) -> str:
    dataset = create_dataset(file, name, array.shape, array.dtype)
    digest = hashlib.sha256()
    for start, stop in chunks(array):
        block = np.ascontiguousarray(array[start:stop])
        dataset[start:stop] = block
        digest.update(block)
    write_attributes(dataset, {"sha256": digest.hexdigest(), "valid_rows": len(array)})
    return digest.hexdigest()


def write_attributes(item: h5py.HLObject, values: Mapping[str, str | int]) -> None:
    """Write attributes as store.py reads them: texts of fixed size, since HDF5 follows a damaged pointer of one of
    variable size into a crash."""
    for name, value in values.items():
        content = value.encode() if isinstance(value, str) else None
        if content is None:
            item.attrs[name] = value
            continue
        for number, start in enumerate(range(0, max(1, len(content)), ATTRIBUTE_BYTES)):
            piece = content[start:start + ATTRIBUTE_BYTES]
            item.attrs.create(piece_name(name, number), piece, dtype=h5py.string_dtype("utf-8", max(1, len(piece))))


def piece_name(name: str, number: int) -> str:
    """Return the name of the attribute that holds one piece of a long text."""
    return f"{name}.{number}" if number else name


def chunks(array, count: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the blocks of rows in which an array, or its first `count` rows, is read."""
    count = len(array) if count is None else count
    rows = max(1, CHUNK_BYTES // max(1, array.dtype.itemsize * int(np.prod(array.shape[1:], dtype=np.int64))))
    return ((start, min(start + rows, count)) for start in range(0, count, rows))


def _statistics(inputs: np.ndarray) -> dict:
    """Mean and standard deviation per channel (the last axis) of the training split, in float64."""
    total = np.zeros(inputs.shape[-1])
    squares = np.zeros(inputs.shape[-1])
    for start, stop in chunks(inputs):
        block = inputs[start:stop].reshape(-1, inputs.shape[-1]).astype(np.float64)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
    count = max(1, inputs.size // inputs.shape[-1])
    mean = total / count
    return {"mean": mean.tolist(), "std": np.sqrt(np.maximum(squares / count - mean**2, 0)).tolist()}
