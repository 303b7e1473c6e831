"""Train: the loop of `hpcai train` against its own compiled step on one constant batch, and against Keras' fit."""

import tempfile
import time
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine import hardware
from hpcai_cli.engine.benchmarks.measure import Figure, Setting, interleaved, median, ratio
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.model import build
from hpcai_cli.engine.pipeline import Pipeline
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.training import Job, Position, run_blocks
from hpcai_cli.run import Run

ROUNDS = 9
STEPS = {"mnist": 150, "mnist-mlp": 1_500}
"""Steps of one round, about a second and a half each."""
FIT_ROUNDS = 3
LIMITS = {"mnist": 0.97, "mnist-mlp": 0.90}


def measure(setting: Setting) -> list[Figure]:
    """Measure both recipes, each in float32 and in this process."""
    hardware.set_up(local_rank=0, local_size=1)
    hardware.set_precision("float32")
    dataset = Dataset(setting.data)
    return [figure for name in STEPS for figure in _measure_recipe(name, *setting.recipes[name], dataset)]


def _measure_recipe(name: str, recipe, build_model, dataset: Dataset) -> list[Figure]:
    split = dataset.split("train")
    pipeline = Pipeline(split, batch_size=recipe.batch_size, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(recipe, Run(Path(folder)), dataset, Serial(), build_model)
        trainer = _Trainer(job, pipeline)
        blocks = STEPS[name] // pipeline.steps_per_block
        images = blocks * pipeline.steps_per_block * recipe.batch_size
        endless = (block for epoch in range(10_000) for block in pipeline.blocks(epoch)
                   if len(block.examples) == pipeline.steps_per_block)
        first = next(endless)
        constant = [tf.constant(array) for array in (first.inputs, first.labels, first.weights)]
        constant += [tf.constant([0, 0], tf.int32), tf.constant(0.0), tf.constant(len(first.examples))]

        def loop() -> float:
            started, at = time.perf_counter(), Position()
            with console.progress(f"{name}, loop", total=None, unit="images") as shown:
                run_blocks(job, at, trainer.steps, islice(endless, blocks),
                           lambda: shown.update(at.step * recipe.batch_size))
            return images / (time.perf_counter() - started)

        def constant_batch() -> float:
            started = time.perf_counter()
            for _ in range(blocks):
                sums = trainer.steps(*constant)
            sums.numpy()
            return images / (time.perf_counter() - started)

        loop(), constant_batch()
        rates = interleaved(ROUNDS, loop=loop, constant=constant_batch)
        epochs = _against_fit(job, pipeline, trainer)
    return [median("train", f"{name}: loop", rates["loop"], "images/s"),
            ratio("train", f"{name}: against one constant batch", rates["loop"], rates["constant"],
                  limit=LIMITS[name]),
            ratio("train", f"{name}: an epoch against Keras' fit", epochs["ours"], epochs["fit"], limit=0.99)]


class _Trainer:
    """A model, its optimizer and its compiled steps; the steps alone would lose the optimizer's variables."""

    def __init__(self, job: Job, pipeline: Pipeline):
        self.model = build(job.recipe, job.build_model)
        self.optimizer = build_optimizer(job.recipe, steps_per_epoch=pipeline.steps_per_epoch, size=1)
        self.optimizer.build(self.model.trainable_variables)
        self.steps = compile_steps(self.model, self.optimizer, job.recipe, job.ranks, block=next(pipeline.blocks(0)))


def _against_fit(job: Job, pipeline: Pipeline, trainer: _Trainer) -> dict[str, list[float]]:
    """Time whole epochs: ours from the mapped file, fit's from arrays in memory, as a plain script has them."""
    split = job.dataset.split("train")
    images, labels = np.array(split.inputs), np.array(split.labels)
    model = build(job.recipe, job.build_model)
    model.compile(build_optimizer(job.recipe, steps_per_epoch=pipeline.steps_per_epoch, size=1),
                  keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(images[:640], labels[:640], batch_size=job.recipe.batch_size, verbose=0)
    epochs = iter(range(1, 1_000))

    def ours() -> float:
        started = time.perf_counter()
        run_blocks(job, Position(), trainer.steps, pipeline.blocks(next(epochs)), lambda: None)
        return len(labels) / (time.perf_counter() - started)

    def fit() -> float:
        started = time.perf_counter()
        model.fit(images, labels, batch_size=job.recipe.batch_size, verbose=0)
        return len(labels) / (time.perf_counter() - started)

    return interleaved(FIT_ROUNDS, ours=ours, fit=fit)
