"""Finds photographs in folders: which files there are, of which class, in which split, and what is left aside why."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from hpcai_cli.errors import DataError, printable

DECODER_VERSION = 2
"""What decoding makes of a file; another number makes dataset files anew."""
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")
"""Names that are taken for images; what they hold is for the decoder to say."""
SPLITS = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
          "valid": "validation", "test": "test", "testing": "test"}
"""Folder names of splits, in lower case."""
MOST_FILES = 20_000_000
"""A bound for folders that never end; ImageNet-21k has 14 million."""
_FLAT = re.compile(r"([^\W\d_][\w -]*)\.(\d+)\.[^.]+")
"""Kaggle's names: cat.0.jpg."""
_LAYOUTS = "CLASS/*.jpg, train/CLASS/*.jpg with test/CLASS/*.jpg, or train/cat.0.jpg"


@dataclass(frozen=True)
class ImageFiles:
    """The photographs of one split, to be decoded in parallel straight into the dataset file."""

    folder: Path
    """The folder that the names are relative to, the same one for all splits."""
    names: tuple[str, ...]
    """Posix paths below the folder, sorted; bytes that are no text are surrogates, as os.fsdecode has them."""
    labels: np.ndarray
    """int64 (n,) in [0, len(class_names))."""
    shape: tuple[int, int, int]
    """Height, width and channels that each photograph is brought to."""
    class_names: tuple[str, ...]
    """In the order of the labels."""
    ignored: tuple[tuple[str, str], ...] = ()
    """Names and reasons of the files that are no candidates; of all splits, on the first one."""

    def __len__(self) -> int:
        return len(self.names)


def find_image_files(folder: Path, *, shape: tuple[int, ...], class_names: tuple[str, ...] = ()) -> dict[str,
                                                                                                         ImageFiles]:
    """Find the photographs below a folder, by split.

    Understood are CLASS/*.jpg, at any depth below the class; train/CLASS/*.jpg beside test/CLASS (and validation, val,
    valid, testing); Kaggle's flat train/cat.0.jpg; and each of them inside single folders such as PetImages/.

    Args:
        shape: height, width and channels (1 or 3) that the photographs are to be brought to.
        class_names: the recipe's, matched without regard to case, with their plural too; sorted folder names else.

    Raises:
        DataError: there are no images, fewer than two classes, or other classes than the recipe's.
    """
    if len(shape) != 3 or shape[2] not in (1, 3):
        raise DataError("photographs have a height, a width and 1 or 3 channels", received=shape,
                        mend="give them with `--set input_shape=150,150,3`")
    top, ignored = _descended(Path(folder))
    images, folders, stray = _images(top)
    ignored += stray
    if not images:
        raise DataError("there are no images", expected=f"{_LAYOUTS}; names that end in {', '.join(SUFFIXES)}",
                        received=os.fsdecode(folder))
    placed = _placed(images, folders, ignored)
    names = _class_names(placed, class_names)
    result = {}
    for split in ("train", "validation", "test"):
        files = sorted(((name, label) for name, (where, label) in placed.items() if where == split),
                       key=lambda entry: os.fsencode(entry[0]))
        if files:
            labels = np.array([names[1][label] for _, label in files], np.int64)
            result[split] = ImageFiles(top, tuple(name for name, _ in files), labels, tuple(shape), names[0],
                                       () if result else tuple(sorted(ignored)))
    _check_classes(result, names[0])
    return result


def _descended(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """Go into single folders such as PetImages, as long as no images and no other folders lie beside them."""
    ignored = []
    while True:
        entries = _entries(folder)
        folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and not _hidden(entry.name)]
        files = [entry for entry in entries if not entry.is_dir(follow_symlinks=False)]
        if len(folders) != 1 or any(_is_image_name(entry.name) for entry in files):
            return folder, ignored
        # A folder of images is a class, unless their own names say theirs.
        below = _entries(folders[0].path)
        flat = [bool(_FLAT.fullmatch(entry.name)) for entry in below if _is_image_name(entry.name)]
        nested = any(entry.is_dir(follow_symlinks=False) for entry in below)
        if folders[0].name.lower() in SPLITS or not nested and not (flat and all(flat)):
            return folder, ignored
        ignored += [(entry.name, _why_ignored(entry.name) or "not an image name") for entry in files]
        folder = Path(folders[0].path)


def _entries(folder: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise DataError(f"cannot read a folder ({error.strerror})", received=os.fsdecode(folder)) from None


def _images(top: Path) -> tuple[list[str], list[str], list[tuple[str, str]]]:
    """Return image files, folders, and the files that are left aside with the reason; all as names below `top`."""
    real, images, folders, ignored, waiting = os.path.realpath(top), [], [], [], [""]
    while waiting:
        here = waiting.pop()
        for entry in _entries(top / here):
            name = f"{here}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                if _hidden(entry.name):
                    ignored.append((f"{name}/", "hidden folder"))
                else:
                    waiting.append(f"{name}/")
                    folders.append(name)
                continue
            reason = _why_ignored(entry.name) or _why_not_followed(entry, real)
            if reason:
                ignored.append((name, reason))
            else:
                images.append(name)
            if len(images) + len(ignored) > MOST_FILES:
                raise DataError(f"the folder holds more than {MOST_FILES:,} files", received=os.fsdecode(top))
    return images, folders, ignored


def _hidden(name: str) -> bool:
    # Zips that a Mac packed hold a shadow of each file in __MACOSX.
    return name.startswith(".") or name == "__MACOSX"


def _is_image_name(name: str) -> bool:
    return not _hidden(name) and name.lower().endswith(SUFFIXES)


def _why_ignored(name: str) -> str:
    return "hidden file" if _hidden(name) else "" if _is_image_name(name) else "not an image name"


def _why_not_followed(entry: os.DirEntry, real_top: str) -> str:
    """Say why a link or something that is no regular file is not read: a stranger's link may lead anywhere."""
    if entry.is_symlink():
        target = os.path.realpath(entry.path)
        if os.path.commonpath([target, real_top]) != real_top:
            return "a link that leads out of the folder"
        if os.path.isdir(target):
            return "a link to a folder"
    try:
        return "" if entry.is_file() else "not a regular file"
    except OSError:
        return "a link that leads nowhere"


def _parts(name: str) -> tuple[str, ...]:
    """Split a name at its slashes; a train.zip that was unpacked as train/ holds another train/."""
    parts = PurePosixPath(name).parts
    while len(parts) > 2 and parts[0] == parts[1]:
        parts = parts[1:]
    return parts


def _placed(images: list[str], folders: list[str], ignored: list) -> dict[str, tuple[str, str]]:
    """Return the split and the class of each image by its name; those that have none go to `ignored`."""
    parts = {name: _parts(name) for name in images}
    by_split = any(SPLITS.get(path[0].lower()) == "train" for path in parts.values() if len(path) > 1)
    depth = 2 if by_split else 1
    if not any(len(path) > depth for path in parts.values()):
        return _placed_by_name(parts, ignored)
    placed = {}
    for name, path in parts.items():
        split = SPLITS.get(path[0].lower()) if by_split else "train"
        if split and len(path) > depth:
            placed[name] = split, path[depth - 1]
        else:
            ignored.append((name, "not in a folder of a class" if split else "outside the folders of the splits"))
    filled = {_parts(name)[:depth] for name in placed}
    empty = [name for name in folders if len(_parts(name)) == depth and _parts(name) not in filled
             and (not by_split or _parts(name)[0].lower() in SPLITS)]
    if empty:
        raise DataError(f"a class has no images: {_listed(empty)}", expected="images in each folder of a class",
                        mend="remove the folder, or put its images there")
    return placed


def _placed_by_name(parts: dict[str, tuple[str, ...]], ignored: list) -> dict[str, tuple[str, str]]:
    """Place Kaggle's flat files, cat.0.jpg, in train/ or right here; its test1/ holds `1.jpg`, without a class."""
    placed = {}
    for name, path in parts.items():
        split = "train" if len(path) == 1 else SPLITS.get(path[0].lower())
        match = _FLAT.fullmatch(path[-1])
        if split and match:
            placed[name] = split, match[1]
        else:
            ignored.append((name, "its name says no class" if split or len(path) > 1 else "not in a folder of a class"))
    return placed


def _class_names(placed: dict, wanted: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the classes in the order of their labels, and the label of each name that the files use."""
    found = sorted({label for _, label in placed.values()})
    if wanted:
        spellings = {spelling: number for number, name in enumerate(wanted)
                     for spelling in (f"{name.casefold()}es", f"{name.casefold()}s", name.casefold())}
        spellings |= {name.casefold(): number for number, name in enumerate(wanted)}
        labels = {name: spellings.get(name.casefold(), -1) for name in found}
        if set(labels.values()) != set(range(len(wanted))):
            raise DataError(f"the classes are {_listed(found)}", expected=f"the recipe's: {_listed(wanted)}",
                            mend="name the folders like the recipe's classes, or set class_names in a recipe of "
                                 "your own")
        return tuple(wanted), labels
    if len(found) < 2:
        raise DataError(f"there is only one class: {_listed(found)}" if found else "no image has a class",
                        expected=f"at least two classes, as {_LAYOUTS}")
    return tuple(found), {name: number for number, name in enumerate(found)}


def _check_classes(splits: dict[str, ImageFiles], class_names: tuple[str, ...]) -> None:
    if "train" not in splits:
        raise DataError("there are no images to train on", expected="a folder named train",
                        received=", ".join(splits))
    for name, files in splits.items():
        missing = [label for number, label in enumerate(class_names) if number not in set(files.labels.tolist())]
        if missing:
            raise DataError(f"{name} has no images of {_listed(missing)}", expected="the same classes in each split",
                            received=_listed(class_names))


def _listed(names: Iterable[str], most: int = 10) -> str:
    names = list(map(printable, names))
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
