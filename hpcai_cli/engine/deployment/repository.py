"""Adds to the versions of a model, NAME/1, NAME/2, ..., and says which of them answers, in the file `current`."""

import os
import shutil
from pathlib import Path

from hpcai_cli.engine.serving import artefact, model_folders
from hpcai_cli.errors import HpcaiError, UsageError
from hpcai_cli.run import write_bytes


def current(folder: Path) -> int:
    """Return the version that answers: the one that the file `current` names, else the highest.

    Raises:
        DataError: there is no version here, or `current` names none.
    """
    return int(model_folders.current(folder, model_folders.versions(folder)))


def next_version(folder: Path) -> Path:
    """Return the folder of the version after the highest."""
    taken = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    return folder / str(max(taken, default=0) + 1)


def set_current(folder: Path, version: str) -> None:
    """Let a version answer; servers of the repository take it at their next reload."""
    write_bytes(folder / model_folders.CURRENT, f"{version}\n".encode())


def roll_back(folder: Path, to: int | None) -> dict:
    """Let an earlier version answer: `to`, or the one before the current; return which it was and which it is.

    Raises:
        UsageError: there is no such version, or the folder has none.
        DataError: there is no model in the folder.
    """
    if (folder / artefact.DOCUMENT).is_file():
        raise UsageError("this is one export and no folder of versions", expected="folders 1, 2, ...",
                         mend="make them with `hpcai deploy export RUN --into FOLDER`", received=str(folder))
    before, found = current(folder), [int(name) for name in model_folders.versions(folder)]
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
