"""Run: one run's folder and the files in it."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe

_BEGUN = re.compile(r"\.lock|\.writable|\.(manifest\.json|recipe\.json|copying)\..*|manifest\.json")
"""What a training leaves that was killed before it had described itself; recipe.json, which makes a run, comes last."""


_COPYING = ".copying"
"""In a folder to which another run is being copied."""


class Run:
    """A run folder: every file in it has one name, known here and nowhere else.

    Args:
        folder: the run's folder; `create` makes a new one, `open` checks an existing one.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.recipe_file = self.folder / "recipe.json"
        self.manifest_file = self.folder / "manifest.json"
        self.events_file = self.folder / "events.jsonl"
        self.history_file = self.folder / "history.csv"
        self.result_file = self.folder / "result.json"
        self.failure_file = self.folder / "failure.json"
        self.model_file = self.folder / "model.keras"
        self.tflite_file = self.folder / "model.tflite"
        self.checkpoints = self.folder / "checkpoints"
        self.evaluation = self.folder / "evaluation"
        self.compressed = self.folder / "compressed"
        self.exports = self.folder / "exports"
        self.tensorboard = self.folder / "tensorboard"
        self.profile = self.folder / "profile"
        self.stacks = self.folder / "stacks"

    @classmethod
    def create(cls, name: str, output: Path | None) -> "Run":
        """Make a new run folder: `output`, or the next free `runs/NAME-1`, `runs/NAME-2`, ...

        Raises:
            UsageError: the folder holds something already, or cannot be written.
        """
        try:
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                cls(output)._remove_part_of_copy()
                if not all(_BEGUN.fullmatch(entry.name) for entry in output.iterdir()):
                    raise UsageError("the output folder is not empty", expected="a new or empty folder",
                                     mend=f"give another --output, or continue it with `--resume {output}`",
                                     received=str(output))
                probe = output / ".writable"
                probe.touch()
                probe.unlink()
                return cls(output)
            Path("runs").mkdir(exist_ok=True)
            taken = [int(match[1]) for entry in Path("runs").iterdir()
                     if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", entry.name))]
            number = max(taken, default=0) + 1
            while True:
                # mkdir decides who gets a number when two trainings start at once.
                with contextlib.suppress(FileExistsError):
                    folder = Path("runs") / f"{name}-{number}"
                    folder.mkdir()
                    return cls(folder)
                number += 1
        except OSError as error:
            raise UsageError(f"cannot write the output folder: {error.strerror}",
                             expected="a folder that you may write", mend="give one with --output",
                             received=str(error.filename)) from None

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open an existing run folder.

        Raises:
            DataError: it is not one.
        """
        run = cls(folder)
        if not run.recipe_file.is_file():
            others = [str(path.parent) for path in sorted(Path("runs").glob("*/recipe.json"))][-3:]
            near = f"the newest here are {', '.join(others)}" if others else "run `hpcai train RECIPE` first"
            raise DataError("not a run folder", expected="a folder with a recipe.json in it", mend=near,
                            received=str(folder))
        return run

    def recipe(self) -> Recipe:
        """Read recipe.json, the resolved recipe of this run."""
        return Recipe.from_json(read_json(self.recipe_file), where=str(self.recipe_file))

    def manifest(self) -> dict:
        """Read manifest.json."""
        return read_json(self.manifest_file)

    def recipe_reference(self) -> str:
        """Return what finds the run's recipe again: its name, or the path of its file.

        Raises:
            DataError: manifest.json doesn't say it.
        """
        reference = self.manifest().get("recipe_reference")
        if not isinstance(reference, str):
            raise DataError(f"{self.manifest_file} names no recipe", expected="a recipe_reference", received=reference)
        return reference

    def data_file(self) -> Path:
        """Return the dataset file that the run was trained on.

        Raises:
            DataError: manifest.json doesn't say it.
        """
        data = self.manifest().get("data")
        if not isinstance(data, str):
            raise DataError(f"{self.manifest_file} names no data file", mend="name it with --data FILE.h5",
                            received=data)
        return Path(data)

    def decision_threshold(self) -> float | None:
        """Return the probability from which on the run answers the second of two classes; None for the likelier one."""
        threshold = read_json(self.result_file).get("decision_threshold") if self.result_file.is_file() else None
        if threshold is not None and not (isinstance(threshold, float) and 0 <= threshold <= 1):
            raise DataError(f"{self.result_file} holds no decision_threshold", expected="a probability or null",
                            received=threshold)
        return threshold

    @contextlib.contextmanager
    def copying(self) -> Iterator[None]:
        """Mark the folder while another run is copied to it: what a kill leaves of that is no run, and in no way."""
        mark = self.folder / _COPYING
        write_bytes(mark, b"")
        yield
        mark.unlink()

    def _remove_part_of_copy(self) -> None:
        mark = self.folder / _COPYING
        if mark.exists():
            # With its recipe the copy was whole.
            if not self.recipe_file.exists():
                shutil.rmtree(self.checkpoints, ignore_errors=True)
            mark.unlink()

    def event(self, kind: str, **values) -> None:
        """Append one line to events.jsonl; what a full disk does not take is left out, and no reason to end."""
        line = json.dumps({"time": round(time.time(), 3), "event": kind, **values}, default=str).encode() + b"\n"
        with contextlib.suppress(OSError), self.events_file.open("ab") as stream:
            if stream.tell():
                with self.events_file.open("rb") as before:
                    before.seek(-1, os.SEEK_END)
                    # A kill or a full disk has left a part of a line.
                    line = line if before.read(1) == b"\n" else b"\n" + line
            stream.write(line)

    def record_failure(self, *, rank: int | None, error: BaseException, exit_code: int) -> None:
        """Write failure.json unless another rank was first: the first failure is the cause, the rest follow from it."""
        document = {"rank": rank, "exit_code": exit_code, "kind": type(error).__name__, "message": str(error),
                    "time": round(time.time(), 3)}
        with contextlib.suppress(OSError), self.failure_file.open("x") as stream:
            json.dump(document, stream)


def read_json(path: Path) -> dict:
    """Read a JSON object.

    Raises:
        DataError: the file is missing or holds none.
    """
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
        return document
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}", expected="a JSON object as hpcai writes it") from None


def write_json(path: Path, document: Mapping) -> None:
    """Write a JSON file whole or not at all."""
    write_bytes(path, (json.dumps(document, indent=2, default=str) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, sync, rename.

    Raises:
        HpcaiError: the disk is full or the folder cannot be written; what was there is still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes files for the owner alone; a result is for whoever may read the folder.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise HpcaiError(f"cannot write {path}: {error.strerror}; what was there is unchanged") from None
