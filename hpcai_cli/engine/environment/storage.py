"""The folders that a job works in: their file systems, whether files there can be locked and mapped, their space."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli.cache import cache_folder
from hpcai_cli.engine.environment import folder_trial
from hpcai_cli.engine.environment.finding import Finding, judged

_SECONDS = 10
"""Within which a file system answers: a lock on one whose lock server is gone waits for ever."""
_NETWORK = re.compile(r"nfs\d?|lustre|gpfs|beegfs|cifs|smb\w*|ceph|fuse\..*|9p|virtiofs|afs|panfs|wekafs|pvfs2|gfs2")
_LOCKING = "HDF5_USE_FILE_LOCKING"


@dataclass(frozen=True)
class Tried:
    """What a folder answered."""

    folder: Path
    file_system: str
    steps: dict[str, object]
    """Of `folder_trial.STEPS` those that came to an end: what they gave, or `error:` and the reason."""

    def failed(self, step: str) -> str:
        """Return why a step failed, empty where it did not."""
        if step not in self.steps:
            is_next = len(self.steps) == folder_trial.STEPS.index(step)
            return f"no answer within {_SECONDS} s" if is_next else "not tried"
        return _why(self.steps[step])

    @property
    def locks(self) -> str:
        """Why files cannot be locked, empty where they can."""
        return self.failed("flock") or self.failed("lockf")


def findings() -> list[Finding]:
    """Try the current folder, the cache folder and the folder of temporary files, all at once."""
    here, cache, temporary = _tried([Path(), cache_folder(), Path(os.environ.get("TMPDIR") or "/tmp")])
    return [_folder("current folder", here, 1, "cd to a folder with room in which you may write"),
            _folder("cache folder", cache, 2, "export HPCAI_CACHE=FOLDER"),
            _temporary(temporary), _locking([here, cache])]


def file_system_of(folder: str, mounts: str) -> str:
    """Return the type of the file system of a folder, from what /proc/self/mountinfo says; empty where it is not there.

    Args:
        folder: an absolute path without links.
    """
    best, kind = "", ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) < 5 or not after:
            continue
        # Spaces and such are written as octal numbers.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        # Of several at one place the last hides the others.
        if (folder == point or folder.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, after.split()[0]
    return kind


def _tried(folders: Sequence[Path]) -> list[Tried]:
    """Try each folder in a process of its own, which is left alone where the kernel lets nobody end it."""
    # Of these the cache folder alone is ours to make.
    started = [subprocess.Popen(
        [sys.executable, "-m", folder_trial.__name__, folder, *(["make"] if folder == cache_folder() else [])],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"}) for folder in folders]
    found, deadline, mounts = [], time.monotonic() + _SECONDS, _text(Path("/proc/self/mountinfo"))
    try:
        for folder, process in zip(folders, started, strict=True):
            output = _output(process, max(0.0, deadline - time.monotonic()))
            steps = dict(json.loads(line) for line in output.splitlines() if line.endswith("]"))
            real = folder if "folder" not in steps or _why(steps["folder"]) else Path(steps["folder"])
            found.append(Tried(real, file_system_of(str(real), mounts), steps))
        return found
    finally:
        for process in started:
            process.kill()


def _output(process: subprocess.Popen, seconds: float) -> str:
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
    try:
        return process.communicate(timeout=1)[0]
    except subprocess.TimeoutExpired as late:
        # It sleeps in the kernel, from which even its end does not wake it.
        return (late.stdout or b"").decode()


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _why(found: object) -> str:
    """Return why a step failed, from what it gave; empty where it did not."""
    return str(found).removeprefix("error: ") if str(found).startswith("error: ") else ""


def _folder(name: str, tried: Tried, least: float, mend: str) -> Finding:
    """Judge a folder that is written to.

    Args:
        least: gigabytes that should be free.
    """
    kind = _kind(tried)
    for step, happened in (("folder", "cannot be opened"), ("write", "cannot be written"), ("map", "cannot be mapped"),
                           ("free", "does not say how much is free")):
        if why := tried.failed(step):
            return Finding(name, "warning", f"{tried.folder}, {kind}: a file there {happened}: {why}"
                           if step == "map" else f"{tried.folder}, {kind}, {happened}: {why}",
                           "keep dataset files in another folder" if step == "map" else mend)
    free = int(tried.steps["free"])
    value = f"{tried.folder}, {kind}, {free / 1e9:.1f} GB free"
    return judged(name, value, mend, is_well=free >= least * 1e9,
                  metrics={f"{name.replace(' ', '_')}_free_bytes": free})


def _temporary(tried: Tried) -> Finding:
    found = _folder("temporary files", tried, 1, "export TMPDIR=FOLDER")
    if found.status == "ok" and _NETWORK.fullmatch(tried.file_system):
        # Open MPI puts there what its ranks share.
        return Finding(found.name, "warning", f"{found.value}; ranks share memory through files there",
                       "export TMPDIR=FOLDER on a disk of this host", found.metrics)
    return found


def _locking(tried: Sequence[Tried]) -> Finding:
    """Say whether files can be locked, and what HDF5 makes of it.

    Dataset files are read without locks, but the variable outweighs what a program asks HDF5 for.
    """
    setting = os.environ.get(_LOCKING, "")
    said = f"; {_LOCKING}={setting}" if setting else ""
    known = setting.upper() in ("", "FALSE", "0", "TRUE", "1", "BEST_EFFORT")
    if not known:
        return Finding("file locking", "warning", f"HDF5 does not understand {_LOCKING}={setting}", f"unset {_LOCKING}")
    broken = {f"in {each.folder}: {each.locks}": None for each in tried if each.locks and not each.failed("write")}
    if not broken:
        return Finding("file locking", "ok", f"works in the current folder and in the cache folder{said}")
    is_off = setting.upper() in ("FALSE", "0")
    return judged("file locking", f"files cannot be locked {'; '.join(broken)}{said}", f"export {_LOCKING}=FALSE",
                  is_well=is_off)


def _kind(tried: Tried) -> str:
    kind = tried.file_system or "unknown file system"
    return f"{kind} over a network or in a program" if _NETWORK.fullmatch(kind) else kind
