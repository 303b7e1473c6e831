"""What a training has left in its folder, and in what it differs from what another one has left."""

import csv
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine import checkpoint
from hpcai_cli.errors import DataError

TIMES = ("seconds", "images_per_second")


class Left:
    """What a training has left in its folder."""

    def __init__(self, folder: Path):
        self._folder = folder

    def broken(self) -> list[str]:
        """Return what is wrong with the checkpoints that were taken."""
        found = []
        for path in (self._folder / "checkpoints").glob("step-*"):
            try:
                checkpoint.read(path)
            except DataError as error:
                found.append(f"{self._folder.name}: {error}")
        return found

    def newest(self) -> checkpoint.State | None:
        """Return the newest checkpoint, None where there is none."""
        try:
            return checkpoint.newest(self._folder / "checkpoints")[0]
        except DataError:
            return None

    def history(self) -> list[dict]:
        """Return the rows of history.csv without times."""
        with (self._folder / "history.csv").open() as stream:
            return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(stream)]

    def model(self) -> dict[str, np.ndarray]:
        """Return the weights in model.keras by name."""
        found = {}
        with zipfile.ZipFile(self._folder / "model.keras") as archive, (
                archive.open("model.weights.h5")) as stream, h5py.File(stream) as file:
            file.visititems(lambda name, item: (
                found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None))
        return found

    def metrics(self) -> dict:
        """Return what result.json says, without times."""
        metrics = json.loads((self._folder / "result.json").read_text())["metrics"]
        return {name: value for name, value in metrics.items() if name not in TIMES}

    def differences(self, other: "Left") -> list[str]:
        """Return in what this run, which has ended, differs from one that nobody disturbed."""
        found, ours, theirs = [], self.newest(), other.newest()
        if apart := _apart(ours.arrays if ours else {}, theirs.arrays):
            found.append(f"{self._folder.name}: checkpoint differs in {apart}")
        found += [f"{self._folder.name}: {each}" for each in self._miscounted(ours)] if ours else []
        return self.broken() + found + self.differences_of_result(other)

    def differences_of_result(self, other: "Left") -> list[str]:
        """Return the same of a run that has no checkpoints."""
        found = []
        if apart := _apart(self.model(), other.model()):
            found.append(f"model.keras differs in {apart}")
        for what, read in (("history.csv", Left.history), ("result.json", Left.metrics)):
            try:
                if read(self) != read(other):
                    found.append(f"{what} differs")
            except OSError as error:
                found.append(str(error))
        return [f"{self._folder.name}: {each}" for each in found]

    def _miscounted(self, state: checkpoint.State) -> list[str]:
        """Return what is wrong with the model's own count of the images that it was given."""
        # The mean over the ranks, of which each has its share of the images.
        ranks = json.loads((self._folder / "manifest.json").read_text())["world_size"]
        counts = set(np.unique(state.arrays["model-0"] * ranks).tolist())
        return [] if counts == {0.0, float(state.epoch)} else [f"images were given {sorted(counts)} times"]


def _apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> str:
    """Return the names of the arrays that differ, or are not in both."""
    return ", ".join(sorted(name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs
                            or not np.array_equal(ours[name], theirs[name])))
