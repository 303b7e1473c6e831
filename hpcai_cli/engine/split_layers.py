"""Dense layers of which each rank of a group holds a part, and what passes between these ranks within a step.

Source: Megatron-LM, arXiv 1909.08053, section 3. Of two dense layers in a row the first is split by the columns of its
kernel, the second by rows: what is between them stays split, and one sum over the ranks in each direction is all that
passes.
"""

import contextlib

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from hpcai_cli.engine.distributed import Horovod


class Exchange:
    """What the ranks that share a model tell each other.

    Each operation has a name of its own, the same on all ranks. The names that Horovod would make up hold those of
    Keras' layers, whose numbers differ where one rank has built more models than another: ranks would wait for ever.

    Args:
        members: the ranks that share the model, this one among them.

    Attributes:
        part: which part of the model this rank holds.
        parts: how many there are.
    """

    def __init__(self, ranks: Horovod, members: list[int]):
        self._operations, self._process_set = ranks.operations, ranks.process_set(members)
        self.part, self.parts = members.index(ranks.rank), len(members)

    def total(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sum over the ranks, of the tensor's shape and dtype."""
        # Gloo does not add bfloat16, and sums of rounded parts would be further from the whole.
        summed = self._operations.allreduce(_widened(tensor), op=self._operations.Sum, name=f"hpcai_{name}",
                                            process_set=self._process_set, ignore_name_scope=True)
        return tf.cast(summed, tensor.dtype)

    def joined(self, tensor: tf.Tensor, axis: int, name: str) -> tf.Tensor:
        """Return the parts of all ranks one behind the other along an axis."""
        order = list(range(len(tensor.shape)))
        # Horovod joins along the first axis; swapping the two twice changes nothing.
        order[0], order[axis] = order[axis], order[0]
        rows = self._operations.allgather(_widened(tf.transpose(tensor, order)), name=f"hpcai_{name}",
                                          process_set=self._process_set, ignore_name_scope=True)
        whole = tf.cast(tf.transpose(rows, order), tensor.dtype)
        return tf.ensure_shape(whole, [size if place != axis % len(order) or size is None else size * self.parts
                                       for place, size in enumerate(tensor.shape)])

    def own(self, whole, axis: int):
        """Return this rank's part along an axis of an array or a tensor."""
        size = whole.shape[axis] // self.parts
        place = [slice(None)] * len(whole.shape)
        place[axis] = slice(self.part * size, (self.part + 1) * size)
        return whole[tuple(place)]

    # ---- Forward, with what belongs to it backward -----------------------------------------------------------------

    def enter(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Return what all ranks hold alike as the input of their parts; its gradient is the sum of theirs."""
        @tf.custom_gradient
        def entered(same):
            return tf.identity(same), lambda gradient: self.total(gradient, f"{name}_enter")
        return entered(tensor)

    def leave(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Return the sum of what the ranks' parts give, alike on all; so is its gradient, which is each part's."""
        @tf.custom_gradient
        def left(partial):
            return self.total(partial, f"{name}_leave"), lambda gradient: gradient
        return left(tensor)

    def gather(self, tensor: tf.Tensor, name: str) -> tf.Tensor:
        """Return what the ranks' parts give one behind the other along the last axis, alike on all ranks."""
        @tf.custom_gradient
        def gathered(part):
            # Behind it all ranks compute the same, so that each has the gradient of its part already.
            return self.joined(part, -1, f"{name}_gather"), lambda gradient: self.own(gradient, -1)
        return gathered(tensor)


def _widened(tensor: tf.Tensor) -> tf.Tensor:
    return tf.cast(tensor, tf.float32) if tensor.dtype in (tf.bfloat16, tf.float16) else tensor


class ColumnDense(layers.Dense):
    """A dense layer with some of its columns, and as many outputs."""

    def call(self, inputs, training=None):
        """Map (batch, ..., inputs) to this part's (batch, ..., units / parts)."""
        return super().call(self.exchange.enter(inputs, self.place), training=training)


class GatheredDense(ColumnDense):
    """The same, where what follows needs all outputs."""

    def call(self, inputs, training=None):
        """Map (batch, ..., inputs) to (batch, ..., units)."""
        return self.exchange.gather(super().call(inputs, training=training), self.place)


class RowDense(layers.Dense):
    """A dense layer with some of its rows, behind one with the same columns."""

    def call(self, inputs, training=None):
        """Map this part's (batch, ..., inputs / parts) to (batch, ..., units)."""
        outputs = self.exchange.leave(keras.ops.matmul(inputs, self.kernel), self.place)
        if self.bias is not None:
            outputs = keras.ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)


class PartDropout(layers.Dropout):
    """Dropout between two such layers: its part of the mask that the whole layer would draw."""

    def call(self, inputs, training=False):
        """Map (batch, ..., width / parts) to the same shape."""
        if not training or self.rate == 0:
            return inputs
        # All ranks draw the same mask, so that their generators stay the same and dropout does as on whole models.
        shape = tf.concat([tf.shape(inputs)[:-1], [inputs.shape[-1] * self.exchange.parts]], axis=0)
        mask = keras.random.dropout(tf.ones(shape, inputs.dtype), self.rate, seed=self.seed_generator)
        width = inputs.shape[-1]
        return inputs * mask[..., self.exchange.part * width:(self.exchange.part + 1) * width]


AXES = {ColumnDense: {"kernel": 1, "bias": 0}, GatheredDense: {"kernel": 1, "bias": 0}, RowDense: {"kernel": 0},
        PartDropout: {}}
"""The axes along which the weights of such layers are split."""


class _PartOfPenalty:
    """A regularizer on a part of a weight: the mean of its values over the ranks is the whole's, the gradient its own.

    Args:
        whole: sums over the weights one by one, as L1 and L2 do.
    """

    def __init__(self, whole: keras.Regularizer, parts: int):
        self._whole, self._parts = whole, parts

    def __call__(self, weights):
        penalty = self._whole(weights)
        return penalty + tf.stop_gradient((self._parts - 1) * penalty)


def split(layer: keras.Layer, kind: type, exchange: Exchange, place: str) -> None:
    """Turn a layer of a model into one of AXES that holds this rank's part of its weights.

    It stays the same object, so that the model's graph, the layers' names and the order of the variables, by which
    checkpoints know them, stay too.

    Args:
        place: a name for what passes between the ranks, the same on all of them and of this layer alone.
    """
    for name, axis in AXES[kind].items():
        whole = getattr(layer, name)
        if whole is not None:
            penalty = whole.regularizer and _PartOfPenalty(whole.regularizer, exchange.parts)
            _replace(layer, name, exchange.own(whole.numpy(), axis), penalty)
    layer.__class__, layer.exchange, layer.place = kind, exchange, place
    if kind is RowDense:
        layer.input_spec = keras.InputSpec(min_ndim=2, axes={-1: layer.kernel.shape[0]})


def make_whole(layer: keras.Layer, values: dict[str, np.ndarray]) -> None:
    """Turn a layer that was split into what it was, with these weights, by their names in AXES."""
    layer.__class__ = layers.Dense if isinstance(layer, layers.Dense) else layers.Dropout
    for name, value in values.items():
        _replace(layer, name, value, getattr(layer, f"{name}_regularizer"))
    if isinstance(layer, layers.Dense):
        layer.input_spec = keras.InputSpec(min_ndim=2, axes={-1: layer.kernel.shape[0]})
    del layer.exchange, layer.place


def weights_of(layer: keras.Layer) -> dict[str, keras.Variable]:
    """Return the weights of a layer that are split, by their names in AXES."""
    found = {name: getattr(layer, name) for name in AXES[type(layer)]}
    return {name: variable for name, variable in found.items() if variable is not None}


def _replace(layer: keras.Layer, name: str, value: np.ndarray, regularizer) -> None:
    """Give a layer another variable in the place of one of its weights."""
    old = getattr(layer, name)
    with contextlib.ExitStack() as scopes:
        for scope in old.path.split("/")[:-1]:
            scopes.enter_context(keras.name_scope(scope))
        new = keras.Variable(value, dtype=old.dtype, trainable=old.trainable, name=old.name)
    new.regularizer = regularizer
    # Keras has no public way to do this; it does the same where it quantizes a layer.
    variables = list(layer._trainable_variables)
    for variable in variables:
        layer._untrack_variable(variable)
    layer._tracker.unlock()
    for variable in variables:
        layer._track_variable(new if variable is old else variable)
    setattr(layer, "_kernel" if name == "kernel" else name, new)
    layer._tracker.lock()
