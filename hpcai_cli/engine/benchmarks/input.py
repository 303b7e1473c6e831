"""Input: shuffled batches from the dataset file, against memcpy of the same bytes and h5py's fancy indexing."""

import h5py
import numpy as np

from hpcai_cli.engine.benchmarks.measure import Figure, Setting, interleaved, median, rate, ratio
from hpcai_cli.engine.pipeline import Pipeline, epoch_order
from hpcai_cli.engine.store import Dataset

ROUNDS = 7
BATCH_SIZE = 64
FANCY_BATCHES = 8
"""h5py's fancy indexing is measured on so many batches only; a whole epoch of it would take minutes."""


def measure(setting: Setting) -> list[Figure]:
    """Read an epoch of the training split in each way."""
    split = Dataset(setting.data).split("train")
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

    with h5py.File(setting.data, "r", locking=False) as file:
        inputs, labels = (file[f"train/{name}"] for name in (Dataset(setting.data).inputs_name, "labels"))

        def fancy() -> int:
            for number in range(FANCY_BATCHES):
                rows = np.sort(order[number * BATCH_SIZE:(number + 1) * BATCH_SIZE])
                inputs[rows], labels[rows]
            return FANCY_BATCHES * BATCH_SIZE

        for warm_up in (ours, memcpy, fancy):
            warm_up()
        rates = interleaved(ROUNDS, ours=lambda: rate(ours), memcpy=lambda: rate(memcpy), fancy=lambda: rate(fancy))
    return [median("input", "shuffled batches of 64", rates["ours"], "images/s"),
            ratio("input", "against memcpy of the same bytes", rates["ours"], rates["memcpy"], limit=0.5),
            ratio("input", "against h5py fancy indexing", rates["ours"], rates["fancy"], limit=25)]
