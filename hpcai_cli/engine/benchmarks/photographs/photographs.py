"""Photographs: an epoch's input from the dataset file against Keras' readers of folders; training with augmentation."""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.keras.preprocessing.image import ImageDataGenerator

from hpcai_cli import console
from hpcai_cli.engine import hardware
from hpcai_cli.engine.benchmarks.measure import Figure, interleaved, median, rate, ratio
from hpcai_cli.engine.benchmarks.photographs.sample_photographs import photograph_folder
from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.feeding import run_blocks
from hpcai_cli.engine.model import build
from hpcai_cli.engine.pipeline import Block, Pipeline
from hpcai_cli.engine.raw import preprocessing
from hpcai_cli.engine.raw.image_files import find_image_files
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.training_job import Job
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run

COUNT = 1_600
BATCH_SIZE = 32
ROUNDS = 5
EPOCHS = 10
"""Of our input in one round, which is over too soon to be timed alone."""
STEPS = 20
"""Of training in one round, a few seconds."""


def measure(recipe: Recipe, build_model: Callable, augment: Callable, own: Path | None) -> Iterator[Figure]:
    """Preprocess once, read epochs of the same photographs three ways, then train with and without augmentation."""
    # All photographs in one split, as the peers have them.
    recipe = recipe.override({"test_fraction": "0", "validation_fraction": "0"})
    hardware.set_up(local_rank=0, local_size=1)
    with photograph_folder(own, recipe, COUNT) as photographs, tempfile.TemporaryDirectory() as name:
        data = Path(name) / "photographs.h5"
        started = time.perf_counter()
        preprocessing.preprocess(
            recipe, load=lambda source, recipe: find_image_files(source, shape=recipe.input_shape,
                                                                 class_names=recipe.class_names),
            sample=None, downloads=None, source=str(photographs), output=data)
        seconds = time.perf_counter() - started
        dataset, policy = Dataset(data), keras.config.dtype_policy().name
        yield from _input(recipe, dataset, photographs, seconds)
        precision, _ = hardware.choose_precision(recipe.precision)
        try:
            hardware.set_precision(precision)
            job = Job(recipe, Run(Path(name)), dataset, Serial(), build_model, partial(augment, recipe=recipe))
            yield from _training(job, precision)
        finally:
            hardware.set_precision(policy)


def _input(recipe: Recipe, dataset: Dataset, photographs: Path, seconds: float) -> list[Figure]:
    """Read whole epochs of shuffled batches, and do nothing with them."""
    pipeline = Pipeline(dataset.split("train"), batch_size=BATCH_SIZE, seed=0)
    epochs, (height, width, _) = iter(range(10_000)), recipe.input_shape
    # Both tell how many files they have found on the standard output, which is for our results.
    with redirect_stdout(sys.stderr):
        generator = ImageDataGenerator(rescale=1 / 255).flow_from_directory(
            photographs, target_size=(height, width), batch_size=BATCH_SIZE, class_mode="binary", seed=0)
        folder = keras.utils.image_dataset_from_directory(
            photographs, image_size=(height, width), batch_size=BATCH_SIZE, label_mode="binary", seed=0)

    def ours() -> int:
        return sum(sum(block.examples) for _ in range(EPOCHS) for block in pipeline.blocks(next(epochs)))

    def image_data_generator() -> int:
        return sum(len(labels) for _, labels in islice(generator, len(generator)))

    def image_dataset() -> int:
        return sum(len(labels) for _, labels in folder)

    for warm_up in (ours, image_dataset):
        warm_up()
    rates = interleaved(ROUNDS, ours=lambda: rate(ours), generator=lambda: rate(image_data_generator),
                        folder=lambda: rate(image_dataset))
    count = len(dataset.split("train"))
    epochs_paid = [seconds * each / count for each in rates["generator"]]
    return [median("photographs", f"shuffled batches of {BATCH_SIZE} from the dataset file", rates["ours"], "images/s"),
            ratio("photographs", "against ImageDataGenerator.flow_from_directory", rates["ours"], rates["generator"],
                  limit=20),
            ratio("photographs", "against image_dataset_from_directory", rates["ours"], rates["folder"], limit=10),
            median("photographs", "preprocessing, in epochs of ImageDataGenerator's input", epochs_paid, "epochs",
                   limit=2, at_most=True)]


def _training(job: Job, precision: str) -> list[Figure]:
    """Train from the file with augmentation, and the same step without it on one constant batch of what it gives."""
    recipe = job.recipe
    pipeline = Pipeline(job.dataset.split("train"), batch_size=recipe.batch_size, seed=0)
    endless = (block for epoch in range(10_000) for block in pipeline.blocks(epoch)
               if len(block.examples) == pipeline.steps_per_block)
    first, seed = next(endless), tf.constant([0, 0], tf.int32)
    blocks = max(1, STEPS // pipeline.steps_per_block)
    images = blocks * pipeline.steps_per_block * recipe.batch_size
    augmented = Block(np.stack([job.augment(tf.constant(batch), seed).numpy() for batch in first.inputs]),
                      first.labels.copy(), first.weights, first.examples)
    model = build(recipe, job.build_model)
    optimizer = build_optimizer(recipe, steps_per_epoch=pipeline.steps_per_epoch, size=1)
    optimizer.build(model.trainable_variables)
    steps = compile_steps(model, optimizer, recipe, job.ranks, block=first, augment=job.augment)
    plain_steps = compile_steps(model, optimizer, recipe, job.ranks, block=augmented)
    constant = [*map(tf.constant, (augmented.inputs, augmented.labels, augmented.weights)), seed,
                tf.constant(len(augmented.examples))]

    def loop() -> float:
        started, at = time.perf_counter(), Position()
        with console.progress("training with augmentation", total=images, unit="images") as shown:
            run_blocks(job, at, steps, islice(endless, blocks), lambda: shown.update(at.cursor))
        return images / (time.perf_counter() - started)

    def constant_batch() -> float:
        started = time.perf_counter()
        for _ in range(blocks):
            sums = plain_steps(*constant)
        sums.numpy()
        return images / (time.perf_counter() - started)

    loop(), constant_batch()
    rates = interleaved(ROUNDS, loop=loop, constant=constant_batch)
    size = "x".join(map(str, augmented.inputs.shape[2:4]))
    return [median("photographs", f"training with augmentation, {precision}", rates["loop"], "images/s"),
            ratio("photographs", f"against one constant batch of {size}", rates["loop"], rates["constant"], limit=0.95)]
