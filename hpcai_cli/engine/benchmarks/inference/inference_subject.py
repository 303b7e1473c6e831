"""What the inference benchmark measures: a run's trained model with its data, or a recipe's untrained one."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import keras
import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import inference, machine, model_file
from hpcai_cli.engine.benchmarks.inference.inference_candidate import EXAMPLES
from hpcai_cli.engine.compression.quantization import CALIBRATION_EXAMPLES
from hpcai_cli.engine.store import Dataset, check_fits
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.recipe import Recipe


@dataclass(frozen=True)
class Subject:
    """A model and its examples."""

    recipe: Recipe
    """With the shape and the classes that it leaves to the data."""
    model: keras.Model | None
    """Of which the files are written; None for a file that is measured as it is."""
    file: Path | None
    """That file."""
    kind: str
    """tflite, onnx or saved_model for that file, else keras."""
    inputs: np.ndarray
    """Examples that are timed, as stored, (n, *input_shape)."""
    calibration: np.ndarray
    """Examples from which int8 takes its ranges, (n, *input_shape)."""
    run: Path | None = None
    """The trained run; None for an untrained model, which has no accuracy."""
    data: Path | None = None
    """Dataset file whose test split is answered; None without any."""
    labels: np.ndarray | None = None
    """Of its first EXAMPLES examples."""
    threshold: float | None = None
    trust: bool = False


def of_run(path: Path, data: Path | None, most: int, *, trust: bool, find_recipe: Callable) -> Subject:
    """Open a trained model, and the data that it was trained on or those that were given.

    Args:
        most: examples of the largest batch.

    Raises:
        DataError: model or data are missing or broken, or don't belong together.
        MissingError: the batch does not fit into memory.
    """
    opened = inference.open_model(path, trust=trust, find_recipe=find_recipe)
    model = model_file.load(opened.file, trust=trust) if opened.kind == "keras" else None
    dataset = Dataset(data) if data else _data_of(opened)
    recipe = check_fits(dataset, opened.recipe, training=False) if dataset else opened.recipe
    _check_memory(recipe, model, most)
    labels = dataset and np.array(dataset.split("test").labels[:EXAMPLES])
    return Subject(recipe, model, None if model else opened.file, opened.kind, *_examples(recipe, dataset, most), path,
                   dataset and dataset.path.absolute(), labels, opened.run.decision_threshold(), trust)


def of_recipe(recipe: Recipe, build_model: Callable[[Recipe], keras.Model], data: Path | None, most: int) -> Subject:
    """Build a recipe's model, which answers as fast as a trained one.

    Args:
        data: dataset file for shape, classes and examples; random ones where there is none.
        most: examples of the largest batch.

    Raises:
        UsageError: the recipe leaves its shape to the data, and there are none.
        DataError: the data are missing, broken or another recipe's.
        MissingError: the batch does not fit into memory.
    """
    dataset = Dataset(data) if data else None
    if dataset:
        recipe = check_fits(dataset, recipe, training=False)
    if not recipe.input_shape or recipe.task == "classification" and not recipe.num_classes:
        raise UsageError(f"recipe {recipe.name} takes shape and classes from the data", expected="--data FILE.h5")
    model = build_model(recipe)
    _check_memory(recipe, model, most)
    return Subject(recipe, model, None, "keras", *_examples(recipe, dataset, most))


def _data_of(opened: inference.Opened) -> Dataset | None:
    path = opened.run.data_file()
    if path.is_file():
        return Dataset(path)
    console.note(f"the run's data {path} are gone: no accuracy; name them with --data FILE.h5")
    return None


def _examples(recipe: Recipe, dataset: Dataset | None, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return examples to be timed and examples to calibrate with."""
    if dataset is None:
        made = _random(recipe, max(most, CALIBRATION_EXAMPLES))
        return made[:most], made[:CALIBRATION_EXAMPLES]
    test, train = dataset.split("test"), dataset.split("train")
    count = min(len(test), most)
    inputs = np.empty((count, *test.inputs.shape[1:]), test.inputs.dtype)
    test.gather(np.arange(count), inputs, np.empty(count, test.labels.dtype))
    rows = np.linspace(0, len(train) - 1, min(len(train), CALIBRATION_EXAMPLES)).astype(np.int64)
    calibration = np.empty((len(rows), *train.inputs.shape[1:]), train.inputs.dtype)
    train.gather(rows, calibration, np.empty(len(rows), train.labels.dtype))
    return np.resize(inputs, (most, *inputs.shape[1:])), calibration


def _random(recipe: Recipe, count: int) -> np.ndarray:
    source, shape = np.random.default_rng(0), (count, *recipe.input_shape)
    if recipe.inputs == "images":
        return source.integers(0, 256, shape, dtype=np.uint8)
    return source.normal(size=shape).astype(np.float32)


def _check_memory(recipe: Recipe, model: keras.Model | None, most: int) -> None:
    """Refuse a batch whose two largest tensors would not fit into the memory that is free."""
    largest = sorted([prod(recipe.input_shape), *_sizes(model)])[-2:]
    needed, free = 4 * most * sum(largest), machine.memory_bytes()[1]
    if free and needed > free:
        raise MissingError(f"a batch of {most:,} examples takes {needed / 1e9:,.1f} GB at least",
                           expected=f"no more than the {free / 1e9:,.1f} GB that are free",
                           mend="give smaller --batch-sizes", received=most)


def _sizes(model: keras.Model | None) -> list[int]:
    """Return how many numbers of one example each layer gives, as far as that is known."""
    if model is None:
        return []
    shapes = [getattr(layer.output, "shape", None) for layer in model._flatten_layers(recursive=True)
              if getattr(layer, "_inbound_nodes", ())]
    return [prod(shape[1:]) for shape in shapes if shape and None not in shape[1:]]
