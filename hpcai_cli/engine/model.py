"""A recipe's model: built, checked against the data, its variables in a fixed order."""

from collections.abc import Callable

import keras
import numpy as np

from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe


def build(recipe: Recipe, build_model: Callable[[Recipe], keras.Model]) -> keras.Model:
    """Build the recipe's model from its seed.

    Raises:
        UsageError: the function fails, or gives something else than a model from input_shape to the task's scores.
    """
    keras.utils.set_random_seed(recipe.seed)
    try:
        model = build_model(recipe)
    except HpcaiError:
        raise
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise UsageError(f"recipe {recipe.name}: build_model fails", expected="a Keras model",
                         received=f"{type(error).__name__}: {first_line}") from error
    if not isinstance(model, keras.Model):
        raise UsageError(f"recipe {recipe.name}: build_model gives no model", expected="a keras.Model",
                         received=type(model).__name__)
    try:
        # A model without an Input is built by its first example; one with another Input says so here.
        outputs = model(np.zeros((2, *recipe.input_shape), np.float32), training=False)
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise UsageError(f"recipe {recipe.name}: the model does not take its input_shape {recipe.input_shape}",
                         received=f"{type(error).__name__}: {first_line}") from error
    shape = tuple(outputs.shape)[1:] if keras.ops.is_tensor(outputs) else type(outputs).__name__
    sizes = task_of(recipe).output_sizes()
    if shape not in [(size,) for size in sizes]:
        raise UsageError(f"recipe {recipe.name}: the model gives outputs of another shape",
                         expected=" or ".join(f"({size},)" for size in sizes) + (
                             ", the number" if recipe.task == "regression" else ", one logit per class"),
                         received=shape)
    if not model.trainable_variables:
        raise UsageError(f"recipe {recipe.name}: the model has nothing to train", expected="trainable weights")
    return model


def adapt(recipe: Recipe, model: keras.Model, function: Callable | None, inputs: np.ndarray,
          labels: np.ndarray) -> None:
    """Let the recipe fit what its model takes from the training split or elsewhere: statistics, pretrained weights.

    Raises:
        UsageError: the function fails.
    """
    if function is None:
        return
    try:
        function(model, inputs, labels, recipe)
    except HpcaiError:
        raise
    except Exception as error:
        first_line = str(error).strip().split("\n")[0]
        raise UsageError(f"recipe {recipe.name}: adapt fails", expected="a change of the model's weights",
                         received=f"{type(error).__name__}: {first_line}") from error


def settle_statistics(model: keras.Model) -> None:
    """Let layers that keep something beside their variables compute it again, after the variables were assigned."""
    for layer in model._flatten_layers(recursive=True):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def moving_statistics(model: keras.Model) -> list[keras.Variable]:
    """Return what a step changes without a gradient, as batch normalization's means; not what is frozen, which may be
    a whole pretrained network."""
    frozen = {id(variable) for layer in model._flatten_layers(recursive=True) if not layer.trainable
              for variable in layer.variables}
    return [variable for variable in model.non_trainable_variables
            if "float" in variable.dtype and id(variable) not in frozen]


def is_random_state(variable: keras.Variable) -> bool:
    """Tell whether a variable is the state of a random generator (dropout), which differs between ranks on purpose."""
    # By the name that keras.random.SeedGenerator gives it: its type differs between backends and releases.
    return variable.name == "seed_generator_state"


def spread_random_state(model: keras.Model, rank: int) -> None:
    """Give each rank its own dropout masks, derived from rank 0's state, which is the one that checkpoints hold."""
    for variable in model.variables:
        if is_random_state(variable):
            state = variable.numpy()
            state[0] = (int(state[0]) + rank * 0x9E3779B9) % 2**32
            variable.assign(state)


def named_variables(model: keras.Model,
                    optimizer: keras.optimizers.Optimizer | None = None) -> dict[str, keras.Variable]:
    """Return all state of model and optimizer, named by kind and number as in checkpoints."""
    return {f"{kind}-{number}": variable
            for kind, owner in (("model", model), ("optimizer", optimizer)) if owner is not None
            for number, variable in enumerate(owner.variables)}


def arrays(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> dict[str, np.ndarray]:
    """Return all state of model and optimizer as arrays, as checkpoints hold them."""
    return {name: variable.numpy() for name, variable in named_variables(model, optimizer).items()}


def restore(values: dict[str, np.ndarray], model: keras.Model,
            optimizer: keras.optimizers.Optimizer | None = None) -> None:
    """Give model and, where asked, optimizer the values that `arrays` returned.

    Raises:
        DataError: they belong to another model.
    """
    for name, variable in named_variables(model, optimizer).items():
        value = values.get(name)
        check_fits(name, variable, value, tuple(variable.shape))
        variable.assign(value)


def check_fits(name: str, variable: keras.Variable, value: np.ndarray | None, shape: tuple[int, ...]) -> None:
    """Check that a checkpoint holds a variable, in this shape.

    Raises:
        DataError: it doesn't.
    """
    if value is None or tuple(value.shape) != shape:
        raise DataError(f"the checkpoint is of another {name.partition('-')[0]}: {variable.path} does not fit",
                        expected=f"shape {shape}", mend="resume with the recipe that the run began with",
                        received=None if value is None else tuple(value.shape))
