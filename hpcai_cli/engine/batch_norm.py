"""Batch normalization over the examples of all ranks."""

from functools import partial

import keras
import tensorflow as tf

from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.errors import UsageError


def layers_of(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """Return the layers that normalize by the statistics of a batch; frozen ones don't."""
    return [layer for layer in model._flatten_layers(recursive=True)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]


def synchronize(model: keras.Model, ranks: Serial | Horovod) -> None:
    """Let these layers take mean and variance over the examples of all ranks; the model is saved as it was.

    Keras has this for `tf.distribute` alone. Every rank has as many examples in a batch.
    """
    if ranks.size == 1 and not ranks.is_elastic:
        return
    for number, layer in enumerate(layers_of(model)):
        # On the layer and not in a class of its own, which nobody who loads the model would have.
        layer._moments = partial(_moments, layer, ranks, f"batch_norm.{number}")


def _moments(layer: keras.layers.BatchNormalization, ranks: Horovod, name: str, inputs: tf.Tensor,
             mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
    """Return mean and variance, each (channels,), of the examples of all ranks."""
    if mask is not None:
        raise UsageError(f"sync_batch_norm does not know the masked examples of {layer.name}", expected="no masks")
    own = tf.stack(keras.ops.moments(inputs, axes=layer._reduction_axes))
    means, variances = tf.unstack(ranks.stacked(own, name=name), axis=1)
    mean = tf.reduce_mean(means, axis=0)
    # The means' own spread belongs to the variance; E[x^2] - E[x]^2 would lose all digits where it is small.
    return mean, tf.reduce_mean(variances + tf.square(means - mean), axis=0)
