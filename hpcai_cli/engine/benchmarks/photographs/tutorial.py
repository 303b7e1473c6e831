"""Tutorial: photographs of dogs and cats to a test accuracy, preprocessing included, against the tutorials' script."""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Figure, median, ratio, run_json
from hpcai_cli.engine.benchmarks.photographs import peer_tutorial_photographs
from hpcai_cli.engine.benchmarks.photographs.sample_photographs import copy_photographs, usable_photographs
from hpcai_cli.engine.raw.splits import share_out
from hpcai_cli.recipe import Recipe

ROUNDS = 2
"""With a seed of its own each: on a few hundred test photographs one training more or less is a matter of luck."""

FEW_EPOCHS = ("batch_size=16", "zoom=0.7", "erase=0", "color=0.2", "dropout=0.3")
"""The recipe's own settings are for 200 epochs; a tenth of them wants more steps and less change of the pictures."""


def measure(recipe: Recipe, photographs: Path, epochs: int) -> Iterator[Figure]:
    """Time whole processes, ours and the script's in turn, on the same training and test photographs."""
    ours, script = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = split_photographs(photographs, recipe, folder / "photographs")
        for number in range(ROUNDS):
            console.note(f"round {number + 1} of {ROUNDS}: hpcai, then the script, {epochs} epochs each")
            ours.append(_ours(folder / "photographs", folder / f"ours-{number}", epochs, number))
            script.append(_script(folder / "photographs", epochs, number))
    seconds, accuracies = zip(*ours, strict=True)
    script_seconds, script_accuracies = zip(*script, strict=True)
    said = f"{epochs} epochs of {counts['train']:,} photographs"
    differences = [mine - other for mine, other in zip(accuracies, script_accuracies, strict=True)]
    yield median("tutorial", f"hpcai preprocess and train, {said}", list(seconds), "s")
    yield median("tutorial", f"the tutorials' script, {said}", list(script_seconds), "s")
    yield ratio("tutorial", "the script's time over ours", list(script_seconds), list(seconds), limit=2)
    yield median("tutorial", f"our accuracy on {counts['test']:,} test photographs", list(accuracies), "share")
    yield median("tutorial", "the script's accuracy on them", list(script_accuracies), "share")
    yield Figure("tutorial", "our accuracy minus the script's, mean", statistics.mean(differences), "share", 0.0,
                 rounds=tuple(differences))


def split_photographs(source: Path, recipe: Recipe, folder: Path) -> dict[str, int]:
    """Copy the photographs that can be used to train/CLASS and test/CLASS, and return how many each split has."""
    with usable_photographs(source, recipe) as splits:
        train = [*splits["train"], *splits.get("validation", [])]
        rows = share_out(np.array([label for _, label in train]), recipe.override({"validation_fraction": "0"}), splits)
        files = {split: [train[row] for row in chosen.tolist()] for split, chosen in rows.items()}
        files.setdefault("test", splits.get("test"))
        for split, chosen in files.items():
            copy_photographs(chosen, folder / split, recipe.class_names)
    return {split: len(chosen) for split, chosen in files.items()}


def _ours(photographs: Path, folder: Path, epochs: int, seed: int) -> tuple[float, float]:
    """Return seconds and test accuracy of the two commands, one after the other."""
    data, started = folder.with_suffix(".h5"), time.perf_counter()
    # No validation split, so that both sides train on the same photographs.
    run_json([PROGRAM, "preprocess", "dogs-vs-cats", "--source", str(photographs), "--output", str(data),
              "--validation-fraction", "0", "--json"])
    settings = [word for setting in (*FEW_EPOCHS, f"seed={seed}") for word in ("--set", setting)]
    result = run_json([PROGRAM, "train", "dogs-vs-cats", "--data", str(data), "--epochs", str(epochs), *settings,
                       "--output", str(folder), "--json"])
    return time.perf_counter() - started, result["metrics"]["accuracy"]


def _script(photographs: Path, epochs: int, seed: int) -> tuple[float, float]:
    result = run_json([sys.executable, peer_tutorial_photographs.__file__, str(photographs), str(epochs), str(seed)])
    return result["seconds"], result["accuracy"]
