"""A repository of versions: NAME/1, NAME/2, ... and the file `current`, which says which of them answers."""

import os
import shutil
from pathlib import Path

from hpcai_cli.errors import DataError, HpcaiError, UsageError, printable
from hpcai_cli.run import write_bytes

CURRENT = "current"


def versions(folder: Path) -> list[int]:
    """Return the versions in a repository, ascending."""
    try:
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.name == str(
            int(path.name)) and (path / "artefact.json").is_file())
    except OSError:
        return []


def current(folder: Path) -> int:
    """Return the version that answers: the one that `current` names, else the highest.

    Raises:
        DataError: there is none, or `current` names none.
    """
    found = versions(folder)
    if not found:
        raise DataError("there is no version of a model here", expected="folders 1, 2, ... with an artefact.json",
                        mend="make one with `hpcai deploy export RUN --into FOLDER`", received=str(folder))
    try:
        said = (folder / CURRENT).read_text().strip()
    except FileNotFoundError:
        return found[-1]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {folder / CURRENT}: {printable(str(error))}") from None
    if said not in map(str, found):
        raise DataError(f"{folder / CURRENT} names a version that is not there", received=said,
                        expected=", ".join(map(str, found)))
    return int(said)


def next_version(folder: Path) -> Path:
    """Return the folder of the version after the highest."""
    taken = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return folder / str(max(taken, default=0) + 1)


def set_current(folder: Path, version: str) -> None:
    """Let a version answer; servers of the repository take it at their next reload."""
    write_bytes(folder / CURRENT, f"{version}\n".encode())


def roll_back(folder: Path, to: int | None) -> dict:
    """Let an earlier version answer: `to`, or the one before the current; return which it was and which it is.

    Raises:
        UsageError: there is no such version.
        DataError: the folder is no repository.
    """
    before, found = current(folder), versions(folder)
    earlier = [version for version in found if version < before]
    if to is None and not earlier:
        raise UsageError("there is no version before the current one", expected="an earlier version", received=before)
    after = earlier[-1] if to is None else to
    if after not in found:
        raise UsageError("there is no such version", expected=", ".join(map(str, found)), received=after)
    set_current(folder, str(after))
    return {"schema": "hpcai.rollback/1", "command": "deploy rollback", "folder": str(folder), "before": before,
            "after": after, "versions": found}


def deliver(made: Path, target: Path, *, force: bool) -> None:
    """Move a finished folder to its place; with force what was there goes, once the new one stands beside it."""
    aside = target.with_name(f".{target.name}-replaced-{os.getpid()}")
    try:
        if force and target.exists():
            os.rename(target, aside)
        try:
            os.rename(made, target)
        except OSError:
            if aside.exists():
                os.rename(aside, target)
            raise
    except OSError as error:
        raise HpcaiError(f"cannot write {target}: {error.strerror}; what was there is unchanged") from None
    shutil.rmtree(aside, ignore_errors=True)
