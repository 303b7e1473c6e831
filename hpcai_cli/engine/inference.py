"""Opens whatever holds a trained model, and gives its inference as one function of NumPy arrays."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import checkpoint_model, evaluation, machine, model_file
from hpcai_cli.engine.compression import beginning
from hpcai_cli.engine.compression.plan import Step
from hpcai_cli.engine.serving import runners
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError, printable
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run


@dataclass(frozen=True)
class Opened:
    """A model that is ready to answer."""

    run: Run
    """The run folder that says recipe, classes, data and threshold."""
    recipe: Recipe
    """That run's recipe."""
    file: Path
    """The file or folder that the model was read from."""
    kind: str
    """keras, tflite, onnx or saved_model."""
    forward: Callable[[np.ndarray], np.ndarray]
    """Inputs as stored (b, *input_shape), any b -> the task's scores, float32 (b, columns)."""


def open_model(path: Path, *, like: Path | None = None, trust: bool = False,
               find_recipe: Callable | None = None) -> Opened:
    """Open a run folder, trained or compressed, a checkpoint, or a .keras, .tflite, .onnx or SavedModel.

    Args:
        like: the run folder that says recipe, classes and data; the nearest one at or above the path when None.
        trust: load classes and operations of your own, only for files that you made: they can run code.
        find_recipe: `catalog.find`, which finds a recipe's functions; without it a checkpoint cannot be opened, and
            classes of your own are known only where they were registered before.

    Raises:
        DataError: there is no model, it is broken or unsafe, or it does not fit the recipe.
        MissingError: a package is missing that this kind of file needs.
    """
    kind, file = _kind_of(path)
    run = _run_of(path, like)
    recipe = run.recipe()
    if not recipe.input_shape or not task_of(recipe).columns:
        raise DataError(f"{run.recipe_file} leaves shape or classes open", expected="the recipe.json of a training",
                        received=f"input_shape {recipe.input_shape}, num_classes {recipe.num_classes}")
    if kind in ("keras", "checkpoint"):
        if kind == "checkpoint":
            model = checkpoint_model.load(file, recipe, _build_function(run, trust, find_recipe))
        else:
            if trust and find_recipe:
                # Classes of the user's own are registered by the module that defines them.
                find_recipe(run.recipe_reference())
            model = model_file.load(file, trust=trust)
        _check_model(model, file, recipe)
        return Opened(run, recipe, file, "keras", evaluation.forward(model, recipe))
    with console.quiet():
        forward = runners.scores_of(kind, file, input_shape=recipe.input_shape, columns=task_of(recipe).columns,
                                    owner=f"recipe {recipe.name}", threads=machine.cores(), trust=trust)
    forward(np.zeros((1, *recipe.input_shape), np.uint8 if recipe.inputs == "images" else np.float32))
    return Opened(run, recipe, file, kind, forward)


# ---- What and where it is ------------------------------------------------------------------------------------------

def _kind_of(path: Path) -> tuple[str, Path]:
    """Return the kind of model that a path names, and its file or folder."""
    run = Run(path)
    if run.recipe_file.is_file():
        # A compressed run may keep the model that its TFLite file was made of.
        return ("tflite", run.tflite_file) if run.tflite_file.is_file() else ("keras", run.model_file)
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return "saved_model", path
        if re.fullmatch(r"step-\d{8,}", path.name):
            return "checkpoint", path
    elif path.suffix.lower() in (".keras", ".tflite", ".onnx"):
        if not path.is_file():
            raise DataError("the model file does not exist", expected="a file", received=str(path))
        return path.suffix.lower()[1:], path
    if path.is_file():
        raise DataError("this is no kind of model file that hpcai opens", received=str(path),
                        expected="a run folder, a checkpoint, a .keras, .tflite or .onnx file, or a SavedModel folder")
    Run.open(path)
    raise AssertionError(path)


def _run_of(path: Path, like: Path | None) -> Run:
    """Return the run that a model belongs to: `like`, or the nearest at or above the path."""
    if like is not None:
        return Run.open(like)
    here = Path(os.path.abspath(path))
    for folder in (here, *here.parents):
        if (folder / "recipe.json").is_file():
            return Run(folder if path.is_absolute() else Path(os.path.relpath(folder)))
    raise DataError("the model lies in no run folder", expected="a folder at or above it with a recipe.json",
                    mend="name the run whose recipe it has with --like RUN", received=str(path))


# ---- Keras and checkpoints -----------------------------------------------------------------------------------------

def _build_function(run: Run, trust: bool, find_recipe: Callable | None) -> Callable[[Recipe], keras.Model]:
    step = run.manifest().get("compression_step", {})
    if isinstance(step, dict) and step.get("kind") in beginning.KINDS:
        return lambda recipe: _begun(run, step, recipe, trust)
    reference = run.recipe_reference()
    if (reference.endswith(".py") or "/" in reference) and not trust:
        # The run folder may be a stranger's, and so the file that it names.
        raise DataError(f"the checkpoint's model is built by the code in {printable(reference)}",
                        expected="a recipe of hpcai's own", mend="if the file is your own, add --trust-model")
    found = find_recipe and find_recipe(reference).function("build_model")
    if not found:
        raise DataError("a checkpoint holds no model, and its recipe builds none", received=reference)
    return found


def _begun(run: Run, step: dict, recipe: Recipe, trust: bool) -> keras.Model:
    """Return the model that a step of a compression trained, with the weights that it began with."""
    try:
        before = Run(run.folder / run.manifest()["compressed_from"]).model_file
        step = Step(**step)
    except (KeyError, TypeError) as error:
        raise DataError(f"{run.manifest_file} does not say what the model was made from: {error}",
                        expected="the manifest of `hpcai compress`") from None
    return beginning.begun(step, model_file.load(before, trust=trust), np.zeros((0, *recipe.input_shape)))[0]


def _check_model(model: keras.Model, file: Path, recipe: Recipe) -> None:
    """Ask the model about one example: Keras' own check of shapes lets some pass that it cannot take."""
    try:
        outputs = model(np.zeros((1, *recipe.input_shape), np.float32), training=False)
    except Exception as error:
        raise DataError(f"{file} does not take the examples of recipe {recipe.name}: {_first_line(error)}",
                        expected=f"inputs of shape {recipe.input_shape}") from error
    _check_outputs(tuple(getattr(outputs, "shape", ())), 1, file, recipe)


def _check_outputs(shape: tuple, count: int, file: Path, recipe: Recipe) -> None:
    sizes = task_of(recipe).output_sizes()
    if shape not in [(count, size) for size in sizes]:
        raise DataError(f"{file} gives other outputs than recipe {recipe.name} has", received=shape,
                        expected=" or ".join(f"({count}, {size})" for size in sizes))


def _first_line(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).split("\n")[0])
