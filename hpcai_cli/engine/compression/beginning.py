"""The model that a step of a compression begins to train with: the one before it, made ready for the step."""

import keras
import numpy as np

from hpcai_cli.engine.compression.plan import Step
from hpcai_cli.engine.compression.pruning import prunable
from hpcai_cli.engine.compression.quantization_training import folded, with_fake_quantization
from hpcai_cli.engine.compression.structured_pruning import narrowed

KINDS = ("prune", "narrow", "aware")
"""Steps that train what the step before left."""


def begun(step: Step, model: keras.Model, calibration: np.ndarray) -> tuple[keras.Model, tuple[str, ...]]:
    """Return the model to train in a step of one of KINDS, and the names of the layers that the step leaves alone.

    Args:
        model: what the step before left.
        calibration: inputs as stored, (n, ...); none where the ranges of the activations come from a checkpoint.

    Raises:
        UnsuitableError: the model is not made for the step.
    """
    if step.kind == "narrow":
        smaller, found = narrowed(model, calibration.shape[1:], keep_macs=step.amount)
        return smaller, found.left_alone
    if step.kind == "prune":
        return model, tuple(prunable(model, step.detail)[1])
    return with_fake_quantization(folded(model), calibration), ()
