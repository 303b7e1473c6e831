"""Opens checkpoints as models: the recipe's own model with the weights of one step."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from hpcai_cli.engine import checkpoint, hardware
from hpcai_cli.engine.model import build, restore, settle_statistics
from hpcai_cli.errors import DataError, printable
from hpcai_cli.recipe import Recipe


def load(folder: Path, recipe: Recipe, build_model: Callable[[Recipe], keras.Model]) -> keras.Model:
    """Build the recipe's model and give it a checkpoint's weights.

    Raises:
        DataError: the checkpoint does not verify, or is of another model.
    """
    _check_sizes(folder / "arrays.npz")
    try:
        state = checkpoint.read(folder)
    except RecursionError as error:
        raise DataError(f"checkpoint {folder} does not verify: {error}") from None
    before = keras.config.dtype_policy()
    hardware.set_precision(hardware.choose_precision(recipe.precision)[0])
    try:
        model = build(recipe, build_model)
    finally:
        keras.config.set_dtype_policy(before)
    found = {name: value.shape for name, value in state.arrays.items() if name.startswith("model-")}
    if found != {f"model-{number}": tuple(variable.shape) for number, variable in enumerate(model.variables)}:
        # As of a form that compressing made of the model, layer by layer.
        raise DataError(f"checkpoint {folder} is of another model than recipe {recipe.name} builds",
                        expected=f"{len(model.variables)} variables of the same shapes",
                        mend="finish the run and give its folder instead", received=f"{len(found)} variables")
    restore(state.arrays, model)
    settle_statistics(model)
    return model


def _check_sizes(file: Path) -> None:
    """Refuse an array file whose parts would take more memory than the file is long."""
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            for part in archive.infolist():
                if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
                    raise ValueError(f"{part.filename} is packed, which hpcai never does")
                with archive.open(part) as stream:
                    version = np.lib.format.read_magic(stream)
                    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
                        np.lib.format.read_array_header_2_0)
                    shape, _, dtype = read_header(stream)
                if int(np.prod(shape, dtype=object)) * dtype.itemsize > size:
                    raise ValueError(f"{part.filename} says that it is larger than the file")
    except Exception as error:
        raise DataError(f"checkpoint {file.parent} does not verify: {printable(str(error))}",
                        expected="a checkpoint of `hpcai train`") from None
