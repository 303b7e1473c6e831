"""The proof that n ranks with batches of b train as one process with batches of n * b does."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine import batch_norm, distributed, hardware
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.job import Request, data_of, fitted
from hpcai_cli.engine.model import adapt, build, is_random_state, settle_statistics
from hpcai_cli.engine.pipeline import Pipeline
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Dataset, Split
from hpcai_cli.engine.task import class_weights
from hpcai_cli.errors import DivergedError, UsageError
from hpcai_cli.recipe import Recipe

STEPS = 5
LIMIT = 1e-6
"""Largest difference, of what the weights have moved. Rounding in float64 left 1.1e-14 on mnist and 2.0e-15 on
mnist-mlp, both with two ranks under mpirun."""


@dataclass
class _Trained:
    """What some steps have made of a model."""

    start: list[np.ndarray]
    losses: list[float] = field(default_factory=list)
    end: list[np.ndarray] = field(default_factory=list)


def prove_here(request: Request) -> dict:
    """Train some steps in these ranks, then in rank 0 alone on the same examples, and compare; nothing is written.

    Both in float64 and without what is random: what is left is the sharing out, the averaging and the update.

    Raises:
        DivergedError: the weights differ by more than rounding.
        UsageError: there is one rank, or the model cannot be copied or stays random.
    """
    ranks = distributed.start()
    if ranks.size == 1:
        raise UsageError("--prove compares several processes with one", expected="--np N, --hosts or a launcher")
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    hardware.set_precision("float32")
    file = Path(distributed.on_rank_zero(ranks, lambda: str(data_of(request))))
    dataset = Dataset(file)
    recipe, changed = _without_chance(fitted(request.recipe, dataset), request)
    split = dataset.split("train")
    original = build(recipe, request.build_model)
    adapt(recipe, original, request.adapt, split.inputs, split.labels)
    model = _exact(original, recipe)
    if batch_norm.layers_of(model):
        batch_norm.synchronize(model, ranks)
        if not recipe.sync_batch_norm:
            changed.append("batch normalization over all processes (set sync_batch_norm for it in training too)")
    console.note(f"proving on {file}: {STEPS} steps in {ranks.size} processes, then in one; {', '.join(changed)}")
    many = _trained(recipe, model, split, ranks, growth=ranks.size)
    distributed.prove_in_step(ranks, model.variables, when=f"after {STEPS} steps")
    return distributed.on_rank_zero(ranks, lambda: _compared(recipe, original, split, ranks.size, many, changed))


def _compared(recipe: Recipe, original: keras.Model, split: Split, size: int, many: _Trained,
              changed: list[str]) -> dict:
    """Train in this process alone, and return the result.

    Raises:
        DivergedError: it differs.
    """
    whole = dataclasses.replace(recipe, batch_size=recipe.batch_size * size)
    alone = _trained(whole, _exact(original, recipe), split, Serial(), growth=size)
    moved, apart = (np.sqrt(sum(np.square(one - other).sum() for one, other in zip(ends, alone.end, strict=True)))
                    for ends in (alone.start, many.end))
    difference = float(apart / moved) if moved else float(apart)
    if not difference <= LIMIT:
        raise DivergedError(f"{size} processes with batches of {recipe.batch_size} do not train as one with batches of "
                            f"{whole.batch_size}: after {len(alone.losses)} steps their weights differ by "
                            f"{difference:.1e} of what they have moved", expected=f"at most {LIMIT:.0e}",
                            received=f"losses {_shown(many.losses)} and {_shown(alone.losses)}")
    return {"schema": "hpcai.proof/1", "command": "train --prove", "run": None, "recipe": recipe.name,
            "world_size": size, "batch_size": recipe.batch_size, "steps": len(alone.losses), "changed": changed,
            "losses": many.losses, "losses_of_one": alone.losses, "limit": LIMIT,
            "metrics": {"largest_difference": difference}}


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)


def _without_chance(recipe: Recipe, request: Request) -> tuple[Recipe, list[str]]:
    """Return the recipe without what differs between ranks on purpose, and words for what was changed.

    Raises:
        UsageError: its gradients are not averaged.
    """
    if recipe.gradient_reduction != "average":
        raise _on_all_ranks(UsageError("Adasum does not average gradients",
                                       expected="gradient_reduction=average for --prove"))
    words, values = ["float64", "no dropout"], {}
    if request.augment:
        words.append("no augmentation")
    if recipe.mixup:
        words, values["mixup"] = [*words, "no mixup"], 0.0
    if recipe.gradient_compression != "none":
        words, values["gradient_compression"] = [*words, "uncompressed gradients"], "none"
    if recipe.accumulation_steps > 1:
        words, values["accumulation_steps"] = [*words, "no accumulation"], 1
    return dataclasses.replace(recipe, **values), words


def _exact(model: keras.Model, recipe: Recipe) -> keras.Model:
    """Return a copy of the model in float64, without dropout and noise.

    Raises:
        UsageError: it cannot be copied, or something random is left.
    """
    def copied(layer: keras.Layer) -> keras.Layer:
        config = layer.get_config()
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = "float64"
        config |= {name: 0.0 for name in ("rate", "stddev") if name in config and _draws(layer)}
        return type(layer).from_config(config)

    try:
        copy = keras.models.clone_model(model, clone_function=copied, recursive=True)
        copy.set_weights(model.get_weights())
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise _on_all_ranks(UsageError(
            f"recipe {recipe.name}: the model cannot be copied layer by layer for --prove",
            expected="a Sequential or functional model of layers with get_config",
            received=f"{type(error).__name__}: {first_line}")) from error
    settle_statistics(copy)
    if random := [variable.path for variable in copy.variables if is_random_state(variable)]:
        raise _on_all_ranks(UsageError(
            f"recipe {recipe.name}: the model draws random numbers that --prove cannot leave out",
            expected="dropout and noise of Keras alone", received=", ".join(random[:5])))
    return copy


def _on_all_ranks(error: UsageError) -> UsageError:
    """Return an error that depends on the recipe alone, which rank 0 tells for all."""
    error.collective = True
    return error


def _draws(layer: keras.Layer) -> bool:
    return any(is_random_state(variable) for variable in layer.variables)


def _trained(recipe: Recipe, model: keras.Model, split: Split, ranks: Serial | Horovod, *, growth: int) -> _Trained:
    """Train the model for some steps.

    Args:
        growth: ranks that the learning rate is scaled by.
    """
    pipeline = Pipeline(split, seed=recipe.seed, rank=ranks.rank, size=ranks.size, batch_size=recipe.batch_size)
    optimizer = build_optimizer(recipe, steps_per_epoch=pipeline.steps_per_epoch, size=growth)
    optimizer.build(model.trainable_variables)
    ranks.broadcast([*model.variables, *optimizer.variables])
    steps = compile_steps(model, optimizer, recipe, ranks, block=next(pipeline.blocks(0)),
                          weight_of_class=class_weights(recipe, split.labels))
    found = _Trained(_values(model))
    for block in pipeline.blocks(0):
        count = min(len(block.examples), STEPS - len(found.losses))
        found.losses += _losses(steps, block, count, recipe)
        if len(found.losses) == STEPS:
            break
    found.end = _values(model)
    return found


def _losses(steps: Callable, block, count: int, recipe: Recipe) -> list[float]:
    sums = steps(tf.constant(block.inputs), tf.constant(block.labels), tf.constant(block.weights),
                 tf.constant([recipe.seed % 2**31, 0], tf.int32), tf.constant(count))
    return sums.numpy()[:count, 0].tolist()


def _values(model: keras.Model) -> list[np.ndarray]:
    return [variable.numpy() for variable in model.variables if "float" in variable.dtype]
