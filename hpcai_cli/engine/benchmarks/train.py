"""Train: the loop of `hpcai train`, where its time goes, how near it is to its limits, and Keras' fit beside it."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli.engine import hardware
from hpcai_cli.engine.benchmarks import step_times
from hpcai_cli.engine.benchmarks.measure import Figure, Table, Work, interleaved, median, ratio
from hpcai_cli.engine.benchmarks.surroundings import peak_memory_mb
from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.feeding import run_blocks
from hpcai_cli.engine.model import build
from hpcai_cli.engine.pipeline import Block, Pipeline
from hpcai_cli.engine.step import build_optimizer
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.training_job import Job
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run

ROUNDS = 9
SECONDS = 1.5
"""Of one round."""
FIT_ROUNDS = 3
LIMITS = {"mnist": 0.97, "mnist-mlp": 0.90}
"""Of the loop against one constant batch, for the recipes that promise it."""
_COMPUTE = {"float32": tf.float32, "mixed_bfloat16": tf.bfloat16, "mixed_float16": tf.float16}


def measure(data: Path, recipes: Mapping[str, tuple[Recipe, Callable]], precisions: tuple[str, ...],
            ranks: Serial | Horovod) -> Iterator[Figure | Table]:
    """Measure each recipe in each precision; alone also against Keras' fit.

    Args:
        recipes: recipe and build_model by name; the dataset fits all of them.
        precisions: Keras' dtype policies.
    """
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    dataset = Dataset(data)
    for name, (recipe, build_model) in recipes.items():
        for number, precision in enumerate(precisions):
            hardware.set_precision(precision)
            said = name if number == 0 else f"{name}, {precision}"
            with tempfile.TemporaryDirectory() as folder:
                job = Job(recipe, Run(Path(folder)), dataset, ranks, build_model)
                loop = _Loop(job)
                yield from _measure_loop(said, loop, precision, LIMITS.get(name) if number == 0 and ranks.size == 1
                                         else None)
                if number == 0 and ranks.size == 1:
                    epochs = _against_fit(job, loop)
                    yield ratio("train", f"{name}: an epoch against Keras' fit", epochs["ours"], epochs["fit"],
                                limit=0.99)
    hardware.set_precision("float32")
    yield Figure("train", "peak memory of this process", peak_memory_mb(), "MB")


class _Loop:
    """The loop of `hpcai train` over endless epochs, and a clock on each of its parts."""

    def __init__(self, job: Job):
        self.job, split = job, job.dataset.split("train")
        self.pipeline = Pipeline(split, batch_size=job.recipe.batch_size, seed=0, rank=job.ranks.rank,
                                 size=job.ranks.size)
        self._endless = (block for epoch in range(1_000_000) for block in self.pipeline.blocks(epoch)
                         if len(block.examples) == self.pipeline.steps_per_block)
        first = next(self._endless)
        self.trainer = step_times.Trainer(job.recipe, job.build_model, first, job.ranks)
        self.alone = self.trainer if job.ranks.size == 1 else step_times.Trainer(job.recipe, job.build_model, first)
        self.trainer.constant_seconds(2)
        # All ranks the same number, or the collective operations would wait for ever.
        seconds = float(np.max(job.ranks.gather(np.array([[self.trainer.constant_seconds(2)]]))))
        self.blocks = max(2, int(SECONDS / (seconds * self.pipeline.steps_per_block)))
        self.steps = self.blocks * self.pipeline.steps_per_block

    def run(self) -> dict:
        """Train for a round; return its seconds, those for input and in the steps, and those of each block."""
        spent, each, at = {"input": 0.0, "compute": 0.0}, [], Position()

        def timed(blocks: Iterable[Block]) -> Iterator[Block]:
            while True:
                started = time.perf_counter()
                block = next(blocks, None)
                spent["input"] += time.perf_counter() - started
                if block is None:
                    return
                yield block

        def steps(*given):
            started = time.perf_counter()
            sums = self.trainer.steps(*given)
            spent["compute"] += time.perf_counter() - started
            return sums

        def after_block() -> None:
            each.append(time.perf_counter())

        started = time.perf_counter()
        run_blocks(self.job, at, steps, timed(islice(self._endless, self.blocks)), after_block)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, **spent, "blocks": np.diff([started, *each]).tolist()}


def _measure_loop(name: str, loop: _Loop, precision: str, limit: float | None) -> Iterator[Figure | Table | Work]:
    recipe, ranks = loop.job.recipe, loop.job.ranks
    works = {"loop": loop.run, "constant": lambda: loop.trainer.constant_seconds(loop.blocks),
             "product": lambda: step_times.product_rate(_COMPUTE[precision])}
    if ranks.size > 1:
        works["alone"] = lambda: loop.alone.constant_seconds(loop.blocks)
    loop.run()
    found = interleaved(ROUNDS, **works)
    batch = recipe.batch_size * ranks.size
    rates = [loop.steps * batch / each["seconds"] for each in found["loop"]]
    yield median("train", f"{name}: loop", rates, "samples/s")
    if ranks.size == ranks.local_size:
        # The energy is this host's; of a job on several hosts it would be a part.
        yield found.work("train", "loop", f"{name}: loop", loop.steps * batch)
    yield ratio("train", f"{name}: against one constant batch", rates, [batch / each for each in found["constant"]],
                limit=limit)
    per_step = 1000 / loop.pipeline.steps_per_block
    for percent in (50, 99):
        yield median("train", f"{name}: time of a step, p{percent}",
                     [float(np.percentile(each["blocks"], percent)) * per_step for each in found["loop"]], "ms")
    flops = loop.trainer.flops(recipe.input_shape, recipe.batch_size)
    yield ratio("train", f"{name}: model FLOP utilization, against a matrix product in {precision}",
                [flops * loop.steps / each["seconds"] for each in found["loop"]], found["product"])
    yield Table("train", f"{name}: where the time of a step goes", ("part", "ms", "share"), tuple(_parts(loop, found)))


def _parts(loop: _Loop, found: Mapping) -> Iterator[tuple[str, float, float]]:
    """Yield name, milliseconds a step and share of each part, medians over the rounds."""
    whole, given, compute = (1000 / loop.steps * float(np.median([each[part] for each in found["loop"]]))
                             for part in ("seconds", "input", "compute"))
    communication = 0.0
    if loop.job.ranks.size > 1:
        apart = np.subtract(found["constant"], found["alone"])
        communication = min(compute, max(0.0, 1000 * float(np.median(apart))))
    parts = {"input": given, "compute": compute - communication, "communication": communication,
             "Python": max(0.0, whole - given - compute)}
    for name, milliseconds in parts.items():
        yield name, milliseconds, milliseconds / whole


def _against_fit(job: Job, loop: _Loop) -> dict[str, list[float]]:
    """Time whole epochs: ours from the mapped file, fit's from arrays in memory, as a plain script has them."""
    split = job.dataset.split("train")
    images, labels = np.array(split.inputs), np.array(split.labels)
    model = build(job.recipe, job.build_model)
    model.compile(build_optimizer(job.recipe, steps_per_epoch=loop.pipeline.steps_per_epoch, size=1),
                  keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    model.fit(images[:640], labels[:640], batch_size=job.recipe.batch_size, verbose=0)
    epochs = iter(range(1, 1_000))

    def ours() -> float:
        started = time.perf_counter()
        run_blocks(job, Position(), loop.trainer.steps, loop.pipeline.blocks(next(epochs)), lambda: None)
        return len(labels) / (time.perf_counter() - started)

    def fit() -> float:
        started = time.perf_counter()
        model.fit(images, labels, batch_size=job.recipe.batch_size, verbose=0)
        return len(labels) / (time.perf_counter() - started)

    return interleaved(FIT_ROUNDS, ours=ours, fit=fit)
