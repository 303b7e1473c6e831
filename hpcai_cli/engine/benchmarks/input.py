"""Input: shuffled batches from the dataset file, against memcpy of the same bytes and h5py's fancy indexing."""

import tempfile
from pathlib import Path

import h5py
import numpy as np

from hpcai_cli.engine import store
from hpcai_cli.engine.benchmarks.measure import Figure, Setting, interleaved, median, rate, ratio
from hpcai_cli.engine.pipeline import Pipeline, epoch_order

ROUNDS = 7
BATCH_SIZE = 64
FANCY_BATCHES = 8
"""h5py's fancy indexing is measured on so many batches only; a whole epoch of it would take minutes."""
PHOTOGRAPHS = 10_000
"""Made-up images of 64x64x3 bytes, 123 MB: more than a processor's caches hold."""


def measure(setting: Setting) -> list[Figure]:
    """Read the training split of MNIST and one of small photographs."""
    with tempfile.TemporaryDirectory() as folder:
        made_up = Path(folder) / "photographs.h5"
        generator = np.random.default_rng(0)
        store.write(made_up, {"train": {"images": generator.integers(0, 256, (PHOTOGRAPHS, 64, 64, 3), np.uint8),
                                        "labels": np.zeros(PHOTOGRAPHS, np.int64)}},
                    recipe="photographs", class_names=("0", "1"), source_fingerprint="", options={})
        # MNIST's rows are so short (784 bytes) that finding the next one in memory takes as long as copying it: that
        # figure has no limit to hold, and stands here to be seen.
        return [*_measure("64x64x3", made_up, memcpy_limit=0.5), *_measure("MNIST", setting.data, memcpy_limit=None)]


def _measure(name: str, path: Path, memcpy_limit: float | None) -> list[Figure]:
    dataset = store.Dataset(path)
    split = dataset.split("train")
    pipeline = Pipeline(split, batch_size=BATCH_SIZE, seed=0)
    order = epoch_order(len(split), seed=0, epoch=0)
    epochs = iter(range(10_000))

    def ours() -> int:
        return sum(sum(block.examples) for block in pipeline.blocks(next(epochs)))

    def memcpy() -> int:
        buffer = np.empty((BATCH_SIZE, *split.inputs.shape[1:]), split.inputs.dtype)
        whole = len(split) // BATCH_SIZE * BATCH_SIZE
        for start in range(0, whole, BATCH_SIZE):
            np.copyto(buffer, split.inputs[start:start + BATCH_SIZE])
        return whole

    with h5py.File(path, "r", locking=False) as file:
        inputs, labels = (file[f"train/{kind}"] for kind in (dataset.inputs_name, "labels"))

        def fancy() -> int:
            for number in range(FANCY_BATCHES):
                rows = np.sort(order[number * BATCH_SIZE:(number + 1) * BATCH_SIZE])
                inputs[rows], labels[rows]
            return FANCY_BATCHES * BATCH_SIZE

        for warm_up in (ours, memcpy, fancy):
            warm_up()
        rates = interleaved(ROUNDS, ours=lambda: rate(ours), memcpy=lambda: rate(memcpy), fancy=lambda: rate(fancy))
    return [median("input", f"{name}: shuffled batches of 64", rates["ours"], "images/s"),
            ratio("input", f"{name}: against memcpy of the same bytes", rates["ours"], rates["memcpy"],
                  limit=memcpy_limit),
            ratio("input", f"{name}: against h5py fancy indexing", rates["ours"], rates["fancy"], limit=25)]
