"""A training small enough for a test: three kinds of 4x4 images, a network of a few units, a second or less."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine import pipeline, store, training
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run

COUNTS = {"train": 200, "validation": 60, "test": 70}
STEPS = 13
"""Steps in an epoch: 200 examples in batches of 16, the last of them padded."""
TWO_STEPS = 2 * 16 * 16
"""Bytes of two steps' examples."""


def tiny_examples(count: int, seed: int) -> dict[str, np.ndarray]:
    """The kind of an image is the row that is brighter than the noise."""
    source = np.random.default_rng(seed)
    labels = source.integers(0, 3, count)
    images = source.integers(0, 120, (count, 4, 4, 1), dtype=np.uint8)
    images[np.arange(count), labels] += 60
    return {"images": images, "labels": labels}


def tiny_model(recipe: Recipe) -> keras.Model:
    return keras.Sequential([
        keras.Input(recipe.input_shape), layers.Rescaling(1 / 255), layers.Flatten(),
        layers.Dense(12, activation="relu"), layers.Dropout(recipe.options["dropout"]),
        layers.Dense(recipe.num_classes, dtype="float32")])


class Tiny:
    """Makes jobs in one folder. Two jobs of the same folder name are the same run."""

    steps = STEPS

    def __init__(self, folder: Path):
        self.folder = folder

    def data(self, name: str = "tiny.h5", *, without: tuple[str, ...] = (), wrong_validation: bool = False) -> Path:
        """Write the dataset file; in a wrong validation split every label is another than it should be."""
        splits = {split: tiny_examples(count, seed) for seed, (split, count) in enumerate(COUNTS.items())
                  if split not in without}
        if wrong_validation:
            splits["validation"]["labels"] = (splits["validation"]["labels"] + 1) % 3
        store.write(self.folder / name, splits, recipe="tiny", class_names=("a", "b", "c"), source_fingerprint=name,
                    options={})
        return self.folder / name

    def job(self, run: str = "run", *, data: Path | None = None, build_model=tiny_model, augment=None, stop=None,
            tensorboard: bool = False, **settings) -> training.Job:
        recipe = Recipe(name="tiny", summary="", input_shape=(4, 4, 1), num_classes=3, batch_size=16, epochs=4,
                        learning_rate=0.02, options={"dropout": 0.0})
        recipe = recipe.override({name: str(value) for name, value in settings.items()})
        (self.folder / run).mkdir(exist_ok=True)
        extra = {"stop": stop} if stop else {}
        return training.Job(recipe, Run(self.folder / run), store.Dataset(data or self.data()), Serial(), build_model,
                            augment, tensorboard=tensorboard, **extra)

    def weights(self, run: str = "run") -> list[np.ndarray]:
        """Return the weights in model.keras, without the generators' states."""
        return keras.saving.load_model(self.folder / run / "model.keras", compile=False).get_weights()

    def events(self, run: str = "run") -> list[dict]:
        return [json.loads(line) for line in (self.folder / run / "events.jsonl").read_text().splitlines()]


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> Tiny:
    # An epoch is several blocks, as it is with real data, so that there is something to stop between.
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", TWO_STEPS)
    return Tiny(tmp_path)


@pytest.fixture
def power_meter(tmp_path) -> Iterator[Path]:
    """The file of a power meter that reads 200 W fifty times a second while the test runs."""
    path, ended = tmp_path / "watts.txt", threading.Event()
    path.write_text("")

    def write() -> None:
        with path.open("a", buffering=1) as stream:
            while not ended.wait(0.02):
                stream.write(f"{time.time():.4f} 200\n")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.2)
        yield path
    finally:
        ended.set()
        writer.join()
