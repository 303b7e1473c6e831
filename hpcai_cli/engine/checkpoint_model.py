"""Opens checkpoints as models: what was trained, with the weights of one step."""

from collections.abc import Callable
from pathlib import Path

import keras

from hpcai_cli.engine import checkpoint, hardware
from hpcai_cli.engine.model import build, restore, settle_statistics
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe


def load(folder: Path, recipe: Recipe, build_model: Callable[[Recipe], keras.Model]) -> keras.Model:
    """Build the model that was trained and give it a checkpoint's weights.

    Raises:
        DataError: the checkpoint does not verify, or is of another model.
    """
    state = checkpoint.read(folder)
    before = keras.config.dtype_policy()
    hardware.set_precision(hardware.choose_precision(recipe.precision)[0])
    try:
        model = build(recipe, build_model)
    finally:
        keras.config.set_dtype_policy(before)
    found = {name: value.shape for name, value in state.arrays.items() if name.startswith("model-")}
    if found != {f"model-{number}": tuple(variable.shape) for number, variable in enumerate(model.variables)}:
        raise DataError(f"checkpoint {folder} is of another model than recipe {recipe.name} builds",
                        expected=f"{len(model.variables)} variables of the same shapes",
                        mend="finish the run and give its folder instead", received=f"{len(found)} variables")
    restore(state.arrays, model)
    settle_statistics(model)
    return model
