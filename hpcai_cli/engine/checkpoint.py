"""Checkpoints: written under a temporary name, synced, hashed in a manifest, renamed; the newest that verifies is read.

A checkpoint is a folder `step-NNNNNNNN` with `arrays.npz` (weights and optimizer slots), `state.json` (position,
history, decisions) and `manifest.json` (the SHA-256 of the two).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from hpcai_cli.errors import DataError, HpcaiError, printable

_ASIDE = ".aside"


@dataclass
class Position:
    """Where a training is.

    Attributes:
        step: steps of the optimizer so far.
        epoch: epochs that are complete.
        cursor: examples of the current epoch that are done, over all ranks.
        sums: running sums of the current epoch's loss, measure and examples.
        history: one row per complete epoch.
        best: epoch, step and the figure of the best epoch so far; empty before the first.
        seconds: how long the current epoch has been trained.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0])
    history: list[dict] = field(default_factory=list)
    best: dict = field(default_factory=dict)
    seconds: float = 0.0

    def copied(self) -> dict:
        """Return the values, which don't change when the training goes on."""
        return vars(self) | {"sums": list(self.sums), "history": list(self.history), "best": dict(self.best)}


@dataclass
class State(Position):
    """What a training needs to go on as if it had never stopped.

    Attributes:
        fingerprint: the dataset's.
        arrays: variables by number; model first, then optimizer.
    """

    fingerprint: str = ""
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def position(self) -> Position:
        """Where it stands, without the rest."""
        return Position(**{each.name: getattr(self, each.name) for each in fields(Position)})


def save(folder: Path, state: State, *, keep: int = 2) -> Path:
    """Write a checkpoint and drop those that are neither among the newest `keep` nor the best.

    Raises:
        HpcaiError: it could not be written; those before it are untouched.
    """
    name = f"step-{state.step:08d}"
    temporary = folder / f".{name}.{os.getpid()}.part"
    try:
        for left in folder.glob(".step-*.part"):
            # A save that was killed; in a container the next one may have the same name.
            shutil.rmtree(left, ignore_errors=True)
        _recover(folder)
        temporary.mkdir(parents=True)
        with (temporary / "arrays.npz").open("wb") as stream:
            np.savez(stream, **state.arrays)
        values = {key: value for key, value in vars(state).items() if key != "arrays"}
        (temporary / "state.json").write_text(json.dumps(values))
        hashes = {part: _hash(temporary / part) for part in ("arrays.npz", "state.json")}
        (temporary / "manifest.json").write_text(json.dumps({"format": "hpcai.checkpoint/1", "sha256": hashes}))
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        final, aside = folder / name, folder / f".{name}{_ASIDE}"
        if final.exists():
            # A folder cannot take the place of another one: in between, the old one has this name.
            os.replace(final, aside)
        os.replace(temporary, final)
        _sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise HpcaiError(f"cannot write the checkpoint of step {state.step}: {error.strerror}; the ones before it are "
                         "unchanged", mend="free some space, then continue with --resume") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    best = f"step-{state.best['step']:08d}" if state.best else ""
    for old in _folders(folder)[keep:]:
        if old.name != best:
            # Under another name: what a kill leaves of it must not be taken for a checkpoint.
            going = old.with_name(f".{old.name}.{os.getpid()}.part")
            with contextlib.suppress(OSError):
                os.replace(old, going)
            shutil.rmtree(going, ignore_errors=True)
    return final


def newest(folder: Path) -> tuple[State, list[str]]:
    """Read the newest checkpoint that verifies, and say which were passed over and why.

    Raises:
        DataError: there is none.
    """
    _recover(folder)
    passed = []
    for path in _folders(folder):
        try:
            return read(path), passed
        except DataError as error:
            passed.append(str(error))
    raise DataError(f"no checkpoint in {folder} can be read" + "".join(f"; {reason}" for reason in passed),
                    expected="a run that got as far as its first checkpoint", mend="train anew without --resume")


def at_step(folder: Path, step: int) -> State:
    """Read the checkpoint of one step.

    Raises:
        DataError: it is missing or does not verify.
    """
    return read(path_of(folder, step))


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def read(path: Path) -> State:
    """Read one checkpoint after its hashes were compared.

    Raises:
        DataError: it does not verify.
    """
    try:
        hashes = json.loads((path / "manifest.json").read_text())["sha256"]
        for part in ("arrays.npz", "state.json"):
            if _hash(path / part) != hashes[part]:
                raise ValueError(f"{part} does not match its hash")
        values = json.loads((path / "state.json").read_text())
        # No pickles: an array file of numbers is all that a checkpoint may hold.
        with np.load(path / "arrays.npz", allow_pickle=False) as arrays:
            # Arrays are read when they are asked for, and only then take memory.
            _check_sizes(path / "arrays.npz")
            return State(**values, arrays={name: arrays[name] for name in arrays.files})
    # A damaged header makes numpy raise whatever Python's parser does.
    except Exception as error:
        raise DataError(f"checkpoint {path.name} does not verify: {printable(str(error))}",
                        expected="a checkpoint of `hpcai train`") from None


def exists(folder: Path) -> bool:
    """Tell whether there is any checkpoint, whether it verifies or not."""
    _recover(folder)
    return bool(_folders(folder))


def copy(folder: Path, target: Path, state: State) -> None:
    """Bring a checkpoint that was read, and that of the best epoch, to another run.

    Raises:
        HpcaiError: they could not be written.
    """
    for step in {state.step, state.best.get("step", state.step)}:
        with contextlib.suppress(DataError):
            save(target, state if step == state.step else at_step(folder, step), keep=2)


def _recover(folder: Path) -> None:
    """Put back what was set aside for one of the same step, where a kill came in between."""
    with contextlib.suppress(OSError):
        for aside in folder.glob(f".step-*{_ASIDE}"):
            final = folder / aside.name[1:].removesuffix(_ASIDE)
            if final.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(aside, final)


def _check_sizes(file: Path) -> None:
    """Refuse an array file whose parts would take more memory than the file is long."""
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:
        for part in archive.infolist():
            if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
                raise ValueError(f"{part.filename} is packed, which hpcai never does")
            with archive.open(part) as stream:
                version = np.lib.format.read_magic(stream)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
                    np.lib.format.read_array_header_2_0)
                shape, _, dtype = read_header(stream)
            if int(np.prod(shape, dtype=object)) * dtype.itemsize > size:
                raise ValueError(f"{part.filename} says that it is larger than the file")


def _folders(folder: Path) -> list[Path]:
    """Return the checkpoints, newest first."""
    with contextlib.suppress(OSError):
        found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)
    return []


def _hash(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else (
            hashlib.sha256(stream.read()).hexdigest())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
