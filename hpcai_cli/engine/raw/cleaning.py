"""Decides what becomes of files that cannot be used: skipped, copied aside, or the end of the job."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from hpcai_cli.errors import DataError, HpcaiError, printable

SHOWN = 5
"""Bad files that an error names."""


def judge(details: Mapping, good: int, wishes, output: Path, *, folder: Path | None) -> None:
    """Hold what was rejected against what the user allows, and copy it aside where that is asked for.

    Args:
        details: with `rejected`, a list of `file` and `reason`.
        good: how many examples are left.
        wishes: with `on_bad` and `max_bad`.
        folder: where the files are, None where there are none to copy.

    Raises:
        DataError: a file is bad and none may be, or too many are.
    """
    rejected = details.get("rejected", [])
    if not rejected:
        return
    count = details.get("files", good + len(rejected))
    said = "; ".join(f"{printable(entry['file'])}: {entry['reason']}" for entry in rejected[:SHOWN])
    said += f"; and {len(rejected) - SHOWN:,} more" if len(rejected) > SHOWN else ""
    if wishes.on_bad == "fail":
        raise DataError(f"{len(rejected):,} of {count:,} files cannot be used ({said})", expected="none",
                        mend="mend or remove them, or give --on-bad skip")
    if len(rejected) > wishes.max_bad * count:
        raise DataError(f"{len(rejected):,} of {count:,} files cannot be used ({said})",
                        expected=f"at most {100 * wishes.max_bad:g} %",
                        mend="look whether this is the right source, or give a larger --max-bad")
    if wishes.on_bad == "quarantine" and folder is not None:
        _copy_aside([entry["file"] for entry in rejected], folder, Path(f"{output}.quarantine"))


def _copy_aside(names: list[str], folder: Path, target: Path) -> None:
    try:
        for name in names:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if os.access(folder / name, os.R_OK):
                shutil.copyfile(folder / name, target / name)
    except OSError as error:
        raise HpcaiError(f"cannot copy bad files to {target}: {error.strerror}; the dataset file was not written",
                         mend="free some space, or give --on-bad skip") from None
