"""Reads the IDX format of MNIST and its likes."""

import gzip
import math
import os
import re
import zlib
from pathlib import Path

import numpy as np

from hpcai_cli.errors import DataError

MAX_BYTES = 4 * 2**30
"""Largest array that a file may declare. EMNIST byclass, the largest of the family, has 0.55 GB."""

MAX_DIMS = 4
"""Images with channels have four; a larger number is a wrong file, not a larger one."""

MAX_DEPTH = 4
"""How many folders deep the files are looked for; Kaggle's archive keeps each in a folder of its own name."""

_CHUNK = 2**20
_GZIP = b"\x1f\x8b"
_UINT8 = 0x08
_OTHER_DTYPES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
_SPLITS = {"train": "train", "t10k": "test", "test": "test"}
_NAME = re.compile(
    r"(?P<prefix>(?:[a-z0-9]+-)*)(?P<split>train|t10k|test)-(?P<kind>images|labels)[-.]idx\d-ubyte(?:\.gz)?", re.I)


def looks_like_html(head: bytes) -> bool:
    """Tell a web page, such as a dead mirror's, by its first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<script"))


def read_array(path: Path) -> np.ndarray:
    """Read one IDX file, raw or gzipped as its content says: uint8, of the declared shape, writable.

    The format is that of http://yann.lecun.com/exdb/mnist/: two zero bytes, dtype, number of dimensions, each dimension
    as a big-endian uint32, then the values.

    Raises:
        DataError: the file is missing, something else, of another dtype, longer or shorter than it declares, too large.
    """
    path = Path(path)
    # A pipe or a device would hang or never end.
    if not path.is_file():
        raise DataError("there is no such file", expected="an IDX file", received=str(path))
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == _GZIP
            file.seek(0)
            if not packed:
                return _read_stream(file, path, os.fstat(file.fileno()).st_size)
            with gzip.open(file) as stream:
                return _read_stream(stream, path, None)
    except EOFError as error:
        raise _broken("the gzip stream breaks off", path) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _broken(f"the gzip stream is corrupt ({error})", path) from error
    except OSError as error:
        raise DataError(f"cannot read an IDX file ({error.strerror or error})", received=str(path)) from error


def read_images_and_labels(folder: Path, *, num_classes: int | None = None,
                           image_shape: tuple[int, int, int] | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Find and read the image and label files of both splits below a folder.

    Files whose names begin with `emnist-`, as in https://www.nist.gov/itl/products-and-services/emnist-dataset, hold
    every image with rows and columns exchanged and are turned back here; pictures of the effect are in
    https://github.com/tensorflow/datasets/issues/812 and https://github.com/pytorch/vision/issues/8783.

    Args:
        num_classes: labels must lie in 0 to num_classes - 1; None leaves them unchecked.
        image_shape: (height, width, 1) that every image must have; None takes what the training images have.

    Returns:
        {"train": (images, labels), "test": (images, labels)}, images uint8 (n, height, width, 1) in 0 to 255,
        labels int64 (n,).

    Raises:
        DataError: files are missing, ambiguous or broken, or do not fit together.
    """
    files = _find_files(Path(folder))
    splits = {}
    for split in ("train", "test"):
        image_paths, label_paths = files[split, "images"], files[split, "labels"]
        images = _read_candidates(image_paths, dims=3, holds="images")
        labels = _read_candidates(label_paths, dims=1, holds="labels")
        if len(images) != len(labels):
            raise DataError("the numbers of images and labels differ", expected="one label for each image",
                            mend="fetch both files again from the same place",
                            received=f"{len(images):,} images in {image_paths[0]}, {len(labels):,} labels in "
                                     f"{label_paths[0]}")
        if image_paths[0].name.lower().startswith("emnist-"):
            images = np.ascontiguousarray(images.transpose(0, 2, 1))
        images = images[..., np.newaxis]
        image_shape = tuple(image_shape or images.shape[1:])
        if images.shape[1:] != image_shape:
            raise DataError(f"the {split} images have another shape",
                            expected=f"{image_shape} (height, width, channels)",
                            mend="name a folder with the images of this recipe",
                            received=f"{images.shape[1:]} in {image_paths[0]}")
        _check_labels(labels, num_classes, label_paths[0])
        splits[split] = images, labels.astype(np.int64)
    return splits


def _read_stream(stream, path: Path, length: int | None) -> np.ndarray:
    """Read header and values; `length` is the number of bytes in all where it is known beforehand."""
    head = stream.read(4)
    _check_magic(head, stream, path)
    dims = head[3]
    sizes = stream.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise _broken(f"the file ends within its header, {4 + len(sizes)} of {4 + 4 * dims} bytes are there", path)
    shape = tuple(int.from_bytes(sizes[i:i + 4], "big") for i in range(0, len(sizes), 4))
    # Python's integers: in uint32 or int64 a product of hostile dimensions could wrap round to something small.
    expected = math.prod(shape)
    if expected == 0:
        raise DataError("an IDX file declares no values", expected="dimensions of at least 1",
                        received=f"shape {shape} in {path}")
    if expected > MAX_BYTES:
        raise DataError("an IDX file declares more than is read", expected=f"at most {MAX_BYTES:,} bytes",
                        received=f"shape {shape}, {expected:,} bytes, in {path}")
    header = 4 + 4 * dims
    if length is not None and length < header + expected:
        raise _broken(f"the file is truncated: {length:,} bytes are there, {header + expected:,} were expected", path)
    values = bytearray()
    # Memory grows with what is really there: a few bytes that declare gigabytes take none of it.
    while len(values) < expected:
        try:
            chunk = stream.read(min(_CHUNK, expected - len(values)))
        except EOFError:
            chunk = b""
        if not chunk:
            raise _broken(f"the file is truncated: {header + len(values):,} bytes are there, "
                          f"{header + expected:,} were expected", path)
        values += chunk
    # Reading past the end also makes gzip check its checksum. More is never unpacked, so a bomb stays packed.
    if stream.read(1):
        found = f"{length:,}" if length is not None else "more"
        raise _broken(f"bytes trail after the values: {found} are there, {header + expected:,} were expected", path)
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _check_magic(head: bytes, stream, path: Path) -> None:
    """Refuse what is no IDX file of uint8, saying what it is instead."""
    is_idx = len(head) == 4 and head[:2] == b"\0\0"
    if is_idx and head[2] == _UINT8 and 1 <= head[3] <= MAX_DIMS:
        return
    if not head:
        raise _broken("the file is empty", path)
    if head[:2] == _GZIP:
        raise DataError("a file is gzipped twice", expected="an IDX file, raw or gzipped once",
                        mend="unpack it once with gunzip", received=str(path))
    if looks_like_html(head + stream.read(60)):
        raise DataError("the file is a web page (HTML), as a dead mirror or a login page sends it",
                        expected="an IDX file", mend="fetch the file again from another place", received=str(path))
    if is_idx and head[2] in _OTHER_DTYPES:
        raise DataError(f"the IDX file holds {_OTHER_DTYPES[head[2]]} (0x{head[2]:02X})", expected="uint8 (0x08)",
                        received=str(path))
    raise DataError("the file is no IDX file", expected=f"the first bytes 00 00 08 and 1 to {MAX_DIMS} dimensions",
                    received=f"{head.hex(' ')} in {path}")


def _find_files(folder: Path) -> dict[tuple[str, str], list[Path]]:
    """Return the candidates for each (split, kind), all of one set; raise with all that are missing at once."""
    found = {(split, kind): [] for split in ("train", "test") for kind in ("images", "labels")}
    prefixes, others = set(), []

    def unreadable(error):
        raise DataError(f"cannot read a folder ({error.strerror})", received=str(error.filename))

    for here, subfolders, names in os.walk(folder, onerror=unreadable):
        subfolders.sort()
        if len(Path(here).relative_to(folder).parts) >= MAX_DEPTH:
            subfolders.clear()
        for name in sorted(names):
            match = _NAME.fullmatch(name)
            if match:
                prefixes.add(match["prefix"].lower())
                found[_SPLITS[match["split"].lower()], match["kind"].lower()].append(Path(here, name))
            else:
                others.append(name)
    if len(prefixes) > 1:
        raise DataError("the folder holds several sets", expected="the files of one set",
                        mend="put the four files of one into a folder of their own",
                        received=", ".join(sorted(prefix.rstrip("-") or "mnist" for prefix in prefixes)))
    missing = [_usual_name("".join(prefixes), *key) for key, paths in found.items() if not paths]
    if missing:
        there = [path.name for paths in found.values() for path in paths] + others
        shown = ", ".join(there[:8]) + (f" and {len(there) - 8:,} more" if len(there) > 8 else "")
        raise DataError(f"files are missing: {', '.join(missing)} (or with .gz)",
                        expected=f"all four in the folder or at most {MAX_DEPTH} folders below",
                        mend="fetch them with `--source download`", received=f"{folder} with {shown or 'no files'}")
    return found


def _usual_name(prefix: str, split: str, kind: str) -> str:
    test = "test" if prefix else "t10k"
    return f"{prefix}{'train' if split == 'train' else test}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"


def _read_candidates(paths: list[Path], *, dims: int, holds: str) -> np.ndarray:
    """Read the file; where there are several, such as the same one packed and unpacked, they must hold the same."""
    array = read_array(paths[0])
    if array.ndim != dims:
        other = {1: ", so it holds labels", 3: ", so it holds images"}.get(array.ndim, "")
        raise DataError(f"a file named as {holds} has {array.ndim} dimensions{other}", expected=f"{dims} for {holds}",
                        mend="check whether images and labels were exchanged", received=str(paths[0]))
    for path in paths[1:]:
        if not np.array_equal(array, read_array(path)):
            raise DataError(f"two different files could be the {holds}", expected="one",
                            mend="name the folder that holds the right one alone", received=f"{paths[0]} and {path}")
    return array


def _check_labels(labels: np.ndarray, num_classes: int | None, path: Path) -> None:
    if num_classes is None or labels.max() < num_classes:
        return
    letters = labels.min() == 1 and labels.max() == num_classes
    mend = (f"EMNIST letters count their labels from 1: use --set num_classes={num_classes + 1}" if letters else
            f"name a folder with the labels of this recipe, or use --set num_classes={int(labels.max()) + 1} "
            "(the labels of EMNIST letters start from 1)")
    raise DataError("labels lie outside the classes", expected=f"0 to {num_classes - 1}", mend=mend,
                    received=f"{labels.min()} to {labels.max()} in {path}")


def _broken(what: str, path: Path) -> DataError:
    return DataError(what, expected="a whole IDX file", mend="fetch the file again", received=str(path))
