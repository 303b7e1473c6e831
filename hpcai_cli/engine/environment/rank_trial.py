"""What ranks try together for `hpcai doctor`, however they were started: an allreduce and a training step."""

import dataclasses
import math
import os
import select
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console, launch
from hpcai_cli.engine import distributed, hardware, model
from hpcai_cli.engine.benchmarks.collective import collectives
from hpcai_cli.engine.benchmarks.collective.collective_report import size_text
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.environment.finding import REBUILD, Finding
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.errors import DivergedError, HpcaiError, MissingError
from hpcai_cli.recipe import Recipe

SECONDS = 100
"""Within which the ranks, once they have loaded TensorFlow, have to come to a result."""
_SMALL, _LARGE = 4, 16 << 20
_ROUNDS = 5
_BATCH, _CLASSES, _INPUTS = 8, 3, 16
_TOLERANCE = 1e-4


def findings() -> list[Finding]:
    """Join the other ranks, try both, and return what came of it, the same on all ranks.

    Raises:
        HpcaiError: the ranks don't find each other, or this one fails alone.
    """
    threading.Thread(target=_watch, daemon=True).start()
    ranks = distributed.start()
    if ranks.size == 1:
        raise HpcaiError("this check was started alone", expected="several ranks under horovodrun, mpirun or srun")
    threads = hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    found = [_tried("allreduce", lambda: _allreduce(ranks)),
             _tried("training step", lambda: _training_step(ranks, threads))]
    ranks.stop()
    return found


def _tried(name: str, trial: Callable[[], tuple[str, dict[str, float]]]) -> Finding:
    try:
        value, metrics = trial()
    except HpcaiError as error:
        # One that all ranks have raised alike lets them go on together; a rank's own has to end the job.
        if not error.collective:
            raise
        return Finding(name, "missing", f"fails: {error}", REBUILD, required=True)
    return Finding(name, "ok", value, metrics=metrics, required=True)


def _watch() -> None:
    """End this process when there is no result in time, or nobody who would hear it.

    A rank that waits for another one, in MPI or in Gloo, waits for ever, and what has started it may be gone or on
    another host.
    """
    listeners, deadline = select.poll(), time.monotonic() + SECONDS
    # What people have started themselves may write wherever they like.
    for descriptor in (1, 2) if launch.STARTED_VARIABLE in os.environ else ():
        listeners.register(descriptor, 0)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, event in listeners.poll(1000 * left):
            if event & (select.POLLERR | select.POLLHUP):
                os._exit(HpcaiError.exit_code)
            listeners.unregister(descriptor)
    console.fail(str(MissingError(
        f"the ranks came to no result within {SECONDS} s", expected="each host to reach all ports of the others",
        mend="name the interface that leads to them with --interface")))
    os._exit(MissingError.exit_code)


# ---- Allreduce -----------------------------------------------------------------------------------------------------

def _allreduce(ranks: Horovod) -> tuple[str, dict[str, float]]:
    """Reduce little and much, each verified, and tell latency and bus bandwidth (as nccl-tests define it)."""
    small, large = (collectives.measure_point(ranks, "allreduce", size, _ROUNDS) for size in (_SMALL, _LARGE))
    latency = statistics.median(small.seconds)
    bandwidth = 1e9 * statistics.median(large.bus_bandwidths)
    said = (f"{ranks.size} ranks over {large.transport}: {size_text(_SMALL)} in {1e6 * latency:,.0f} us, "
            f"{size_text(_LARGE)} at {bandwidth / 1e9:.2f} GB/s")
    return said, {"allreduce_latency_seconds": latency, "allreduce_bytes_per_second": bandwidth}


# ---- Training step -------------------------------------------------------------------------------------------------

def _training_step(ranks: Horovod, threads: int) -> tuple[str, dict[str, float]]:
    """Train one step together, each rank on rows of its own, and compare with one process on the rows of all.

    Raises:
        DivergedError: the ranks hold other weights than each other or than that process; on all ranks.
    """
    hardware.set_precision("float32")
    recipe = Recipe(name="doctor", summary="one step", input_shape=(_INPUTS,), num_classes=_CLASSES,
                    batch_size=_BATCH, optimizer="sgd", momentum=0.0, learning_rate=0.1, learning_rate_scaling="none",
                    schedule="constant")
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((ranks.size * _BATCH, _INPUTS)).astype(np.float32)
    labels = generator.integers(_CLASSES, size=len(rows))
    mine = slice(ranks.rank * _BATCH, (ranks.rank + 1) * _BATCH)
    # Each rank draws other weights: they are the same only if rank 0's reach all.
    weights, loss = _trained(dataclasses.replace(recipe, seed=ranks.rank), ranks, rows[mine], labels[mine])
    distributed.prove_in_step(ranks, weights, when="after a training step")
    expected, alone = _trained(recipe, Serial(), rows, labels)
    off = max(float(np.abs(one.numpy() - other.numpy()).max()) for one, other in zip(weights, expected, strict=True))
    is_right = math.isfinite(loss) and off < _TOLERANCE and abs(loss - alone) < _TOLERANCE
    # All ranks end together: one that went on would wait for the others for ever.
    if not ranks.gather(np.array([is_right])).all():
        raise DivergedError("a training step gives another result in several processes than in one",
                            expected=f"loss {alone:.6f} and the same weights", mend=f"run `{REBUILD}`",
                            received=f"loss {loss:.6f}, weights that are off by up to {off:.2g}")
    said = "1 thread" if threads == 1 else f"{threads} threads"
    return (f"{ranks.size} ranks of {said}: loss {loss:.4f}, all with the weights that one process comes to",
            {"training_step_loss": loss})


def _trained(recipe: Recipe, ranks: Serial | Horovod, rows: np.ndarray,
             labels: np.ndarray) -> tuple[Sequence[keras.Variable], float]:
    """Build a model, train it for one step as `training.train` does, and return its variables and the mean loss."""
    network = model.build(recipe, _build_model)
    optimizer = build_optimizer(recipe, steps_per_epoch=1, size=ranks.size)
    optimizer.build(network.trainable_variables)
    ranks.broadcast([*network.variables, *optimizer.variables])
    block = Block(rows[None], labels[None], np.full((1, len(rows)), 1 / len(rows), np.float32), [len(rows)])
    steps = compile_steps(network, optimizer, recipe, ranks, block=block)
    sums = steps(tf.constant(block.inputs), tf.constant(block.labels), tf.constant(block.weights),
                 tf.constant([0, ranks.rank], tf.int32), tf.constant(1))
    return network.variables, float(sums[0, 0])


def _build_model(recipe: Recipe) -> keras.Model:
    return keras.Sequential([keras.Input(recipe.input_shape), keras.layers.Dense(16, activation="relu"),
                             keras.layers.Dense(recipe.num_classes)])
