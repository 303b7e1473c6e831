"""The folders that models are served from: an export, versions of one, or several of either."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpcai_cli.engine.serving.artefact import DOCUMENT, LARGEST_DOCUMENT, Artefact
from hpcai_cli.errors import DataError, UsageError

CURRENT = "current"
"""File of a repository with the version that answers when a request names none."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


def named(words: Sequence[str]) -> dict[str, Path]:
    """Return the folders by the name of their model, from FOLDER or NAME=FOLDER each.

    FOLDER is an export, holds versions of one, or holds folders of such models, which are called as their folders.

    Raises:
        UsageError: two models have the same name.
        DataError: there is no model in a folder.
    """
    folders = {}
    for word in words:
        for name, folder in _models_at(word):
            if name in folders:
                raise UsageError("two models have the same name", mend="name them NAME=FOLDER", received=name)
            folders[name] = folder
    if not folders:
        raise UsageError("there is no model to serve", expected="the folder of an export")
    return folders


def _models_at(word: str) -> list[tuple[str, Path]]:
    name, equals, path = word.partition("=")
    if not (equals and _NAME.fullmatch(name)):
        name, path = "", word
    # Relative to where the server was started, whatever becomes of that.
    folder = Path(path).absolute()
    try:
        newest = list(versions(folder).values())[-1]
    except DataError:
        inner = [place for place in sorted(folder.glob("*")) if _NAME.fullmatch(place.name) and _is_model(place)]
        if name or not inner:
            raise
        return [(place.name, place) for place in inner]
    return [(name or Artefact.open(newest).name, folder)]


def versions(folder: Path) -> dict[str, Path]:
    """Return the folders of a model's versions in their order; of an export it is version 1.

    Raises:
        DataError: there is no model.
    """
    if (folder / DOCUMENT).is_file():
        return {"1": folder}
    try:
        names = sorted((path.name for path in folder.iterdir() if _VERSION.fullmatch(path.name)), key=int)
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}", expected="the folder of an export") from None
    # A version that is just being copied has no artefact.json yet.
    found = {name: folder / name for name in names if (folder / name / DOCUMENT).is_file()}
    if not found:
        raise DataError("there is no model here", expected=f"a folder with {DOCUMENT}, or with folders 1, 2, ... that "
                        "have one", received=str(folder))
    return found


def _is_model(folder: Path) -> bool:
    try:
        return folder.is_dir() and bool(versions(folder))
    except DataError:
        return False


def current(folder: Path, known: Iterable[str]) -> str:
    """Return the version that the file `current` names, else the highest that is known.

    Raises:
        DataError: it names none that is known.
    """
    try:
        with (folder / CURRENT).open("rb") as file:
            said = file.read(100).decode(errors="replace").strip()
    except FileNotFoundError:
        return max(known, key=int)
    except OSError as error:
        raise DataError(f"cannot read {folder / CURRENT}: {error.strerror}") from None
    if said not in known:
        raise DataError(f"{folder / CURRENT} names a version that is not there", expected=" or ".join(known),
                        received=said)
    return said


def digest(folder: Path) -> str:
    """Return the SHA-256 of an export's artefact.json, in which those of its files are.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with (folder / DOCUMENT).open("rb") as file:
            return hashlib.sha256(file.read(LARGEST_DOCUMENT + 1)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {folder / DOCUMENT}: {error.strerror}") from None
