"""An exported model as it lies on disk: one folder with the model's file, what it takes and what its answers mean.

Nothing in this room imports TensorFlow, Keras or pandas where it begins, since a server is to answer soon after it was
started, and bundles (deployment/bundle.py) take the room with them to machines that have neither.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hpcai_cli.errors import DataError, printable

DOCUMENT = "artefact.json"
SCHEMA = "hpcai.artefact/1"
KINDS = ("tflite", "onnx", "saved_model", "keras")
LARGEST_DOCUMENT = 64 << 20
"""Bytes of artefact.json, and of what it refers to, that are read."""
_MOST_NUMBERS = 1 << 28
"""In one example."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Of a model, as it stands in addresses."""


@dataclass(frozen=True)
class Artefact:
    """What artefact.json says of an exported model."""

    folder: Path
    document: Mapping
    """artefact.json as it is: `name`, `kind`, `file`, `task`, `class_names`, `decision_threshold`, `inputs`,
    `input_shape`, `files` (SHA-256 and bytes by name) and, where they exist, `encoding`, `reference`, `serving`."""

    @classmethod
    def open(cls, folder: Path) -> "Artefact":
        """Read and check artefact.json; the files beside it are not opened.

        Raises:
            DataError: there is none, or it is not what an export writes.
        """
        path = folder / DOCUMENT
        try:
            if path.stat().st_size > LARGEST_DOCUMENT:
                raise ValueError(f"it has more than {LARGEST_DOCUMENT:,} bytes")
            document = json.loads(path.read_text())
            _check(document)
        except FileNotFoundError:
            raise DataError("this is no exported model", expected=f"a folder with {DOCUMENT}, as `hpcai deploy export` "
                            "makes it", received=str(folder)) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot use {path}: {printable(str(error))}",
                            expected="what `hpcai deploy export` writes") from None
        return cls(folder, document)

    def verify(self) -> None:
        """Compare every file with its SHA-256.

        Raises:
            DataError: a file is missing, is not the one that was exported, or is not listed.
        """
        here = self.folder.resolve()
        for name, said in self.document["files"].items():
            path = self.folder / name
            # A link could make any file of this machine part of the export, and a pipe or a device may have no end.
            if os.path.lexists(path) and not (path.is_file() and path.resolve().is_relative_to(here)):
                raise DataError(f"{path} is no plain file of the export", expected="a whole export")
            try:
                found = digest(path)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}", expected="a whole export") from None
            if found != said["sha256"]:
                raise DataError(f"{path} is not the file that was exported", expected=f"SHA-256 {said['sha256']}",
                                mend="export the model again", received=found)
        if self.file.is_dir():
            there = {str(path.relative_to(self.folder)) for path in self.file.rglob("*") if not path.is_dir()}
            if extra := there - set(self.document["files"]):
                raise DataError(f"{self.file} holds files that were not exported", expected="a whole export",
                                received=", ".join(sorted(extra)[:8]))

    @property
    def name(self) -> str:
        """Name of the model in addresses."""
        return self.document["name"]

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.document["kind"]

    @property
    def file(self) -> Path:
        """The model's file, or folder where it is a SavedModel."""
        return self.folder / self.document["file"]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example: (height, width, channels) of images, (features,) of rows."""
        return tuple(self.document["input_shape"])

    @property
    def inputs(self) -> str:
        """"images", uint8 in [0, 255], or "features", float32."""
        return self.document["inputs"]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the scores' columns; none for a regression."""
        return tuple(self.document["class_names"])

    @property
    def columns(self) -> int:
        """Columns of the scores: a logit per class, or the one number of a regression."""
        return len(self.class_names) or 1

    @property
    def decision_threshold(self) -> float | None:
        """Of two classes the probability from which on the second is the answer; None for the likelier one."""
        return self.document["decision_threshold"]

    @property
    def encoding(self) -> Mapping | None:
        """How a table's columns become features, as raw/table_encoding.py tells it; None for images."""
        return self.document.get("encoding")

    @cached_property
    def reference(self) -> Mapping | None:
        """Statistics of the training split's inputs and of the model's answers (statistics.py); None without any."""
        path = self.folder / "reference.json"
        if "reference.json" not in self.document["files"]:
            return None
        try:
            if path.stat().st_size > LARGEST_DOCUMENT:
                raise ValueError(f"it has more than {LARGEST_DOCUMENT:,} bytes")
            return json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"cannot use {path}: {printable(str(error))}", mend="export the model again") from None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else \
            hashlib.sha256(file.read()).hexdigest()


def _check(document: object) -> None:
    """Raise ValueError unless this is what an export writes."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    shape, names = document.get("input_shape"), document.get("class_names")
    threshold, files = document.get("decision_threshold"), document.get("files")
    size = 1
    for dim in shape if isinstance(shape, list) and len(shape) in (1, 3) else [0]:
        size = size * dim if type(dim) is int and 0 < dim <= _MOST_NUMBERS else 0
    rules = {
        "name": isinstance(document.get("name"), str) and NAME.fullmatch(document["name"]),
        "kind": document.get("kind") in KINDS,
        "task": document.get("task") in ("classification", "regression"),
        "inputs": document.get("inputs") in ("images", "features"),
        "input_shape": 0 < size <= _MOST_NUMBERS and (len(shape) == 3) == (document.get("inputs") == "images"),
        "class_names": isinstance(names, list) and all(map(_is_text, names))
                       and (len(names) >= 2) == (document.get("task") == "classification") and len(names) != 1,
        "decision_threshold": threshold is None or (type(threshold) in (int, float) and 0 <= threshold <= 1),
        "files": isinstance(files, dict) and all(
            _inside(name) and isinstance(said, dict) and re.fullmatch(r"[0-9a-f]{64}", str(said.get("sha256")))
            for name, said in files.items()),
        "encoding": isinstance(document.get("encoding") or {}, dict),
    }
    if wrong := [name for name, holds in rules.items() if not holds]:
        raise ValueError(f"its {', '.join(wrong)} cannot be")
    file = document.get("file")
    if not isinstance(file, str) or not any(name == file or name.startswith(f"{file}/") for name in files):
        raise ValueError("its file is not among its files")


def _is_text(name: object) -> bool:
    """Tell whether it can stand in an answer: JSON can hold halves of signs that UTF-8 cannot."""
    return isinstance(name, str) and not re.search("[\ud800-\udfff]", name)


def _inside(name: str) -> bool:
    """Tell whether a file's name stays in the folder, and can stand in a message."""
    return name.isprintable() and all(part not in ("", ".", "..") for part in name.split("/"))
