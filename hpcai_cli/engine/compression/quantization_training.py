"""Quantization-aware training (Jacob et al., arXiv 1712.05877): batch norm folded, int8 simulated while training.

    folded(model) -> with_fake_quantization(...) -> training -> convert(kind="int8"), with the ranges that were learned
                                                    training -> without_fake_quantization(...), to save the float model

`folded` gives a model of its own; the ones after it share its variables.
"""

from collections.abc import Callable, Iterable

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from hpcai_cli.engine.model import settle_statistics
from hpcai_cli.errors import UnsuitableError

MOMENTUM = 0.99
"""Of the moving ranges of activations, per training step."""
BATCH_SIZE = 32
"""Examples per forward pass in which ranges are observed."""

_WEIGHTED = (layers.Conv1D, layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)
_PASSING = (layers.MaxPooling2D, layers.GlobalMaxPooling2D, layers.Flatten, layers.Reshape, layers.Permute,
            layers.RepeatVector, layers.Dropout, layers.SpatialDropout2D, layers.GaussianNoise, layers.GaussianDropout,
            layers.ZeroPadding2D, layers.Cropping2D, layers.Identity, layers.ActivityRegularization)
"""Layers whose outputs are some of their inputs, at least in inference: nothing is rounded there once more."""


class _Graph:
    """The calls of layers in a Sequential or Functional model, in an order in which they can be made again; what a
    model within the model calls is among them.

    Attributes:
        nodes: all calls.
    """

    def __init__(self, model: keras.Model):
        if not foldable(model):
            raise UnsuitableError("quantization-aware training cannot look into this model",
                                  expected="a Sequential or Functional model", received=type(model).__name__)
        if isinstance(model, keras.Sequential):
            model = keras.Model(model.inputs, model.outputs, name=model.name)
        self.model = model
        self._own = [node for _, nodes in sorted(model._nodes_by_depth.items(), reverse=True) for node in nodes
                     if not node.is_input]
        self._within = {id(node.operation): _Graph(node.operation) for node in self._own if foldable(node.operation)}
        self.nodes = [*self._own, *(node for graph in self._within.values() for node in graph.nodes)]
        self._ends = {id(tensor) for graph in (self, *self._within.values()) for tensor in graph.model.outputs}

    def calls(self, layer) -> int:
        """Return how often the model calls a layer."""
        return sum(node.operation is layer for node in self.nodes)

    def next(self, node):
        """Return the one call that takes a call's outputs, None where there are none or several."""
        takers = [other for other in self.nodes for tensor in other.input_tensors if tensor is node.outputs[0]]
        return takers[0] if len(takers) == 1 and id(node.outputs[0]) not in self._ends else None

    def rebuilt(self, call: Callable) -> keras.Model:
        """Return a model in which `call(node, *args, **kwargs)` stands for each call; its tensors are the new ones."""
        inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor._keras_history.operation.name)
                  for tensor in self.model.inputs]
        ends = self._through(inputs, call)
        one = len(inputs) == len(ends) == 1
        return keras.Model(*((inputs[0], ends[0]) if one else (inputs, ends)), name=self.model.name)

    def _through(self, inputs: list, call: Callable) -> list:
        made = dict(zip(map(id, self.model.inputs), inputs, strict=True))
        for node in self._own:
            args, kwargs = node.arguments.fill_in(made)
            inner = self._within.get(id(node.operation))
            outputs = inner._through(keras.tree.flatten(args), call) if inner else call(node, *args, **kwargs)
            made |= zip(map(id, node.outputs), keras.tree.flatten(outputs), strict=True)
        return [made[id(tensor)] for tensor in self.model.outputs]


def foldable(model: object) -> bool:
    """Tell whether a model is of a form that `folded` can look into: Sequential with an input, or Functional."""
    # Keras has no public way to ask which layer's outputs go where.
    return model.built if isinstance(model, keras.Sequential) else hasattr(model, "_nodes_by_depth")


def folded(model: keras.Model) -> keras.Model:
    """Return a model of its own with the same outputs in inference, in the form in which TFLite computes int8.

    Batch normalization goes into the convolution or dense layer right before it; where it cannot, it becomes a 1x1
    depthwise convolution, whose weights are quantized per channel as its multiplication would not be. A
    SeparableConv2D becomes its two convolutions, NAME_depthwise and NAME, since what lies between is quantized too. The
    layers of a model within the model become the model's own.

    Raises:
        UnsuitableError: the model is neither Sequential nor Functional.
    """
    graph, copies = _Graph(model), {}
    absorbed = {id(node.operation): following.operation for node in graph.nodes
                if (following := graph.next(node)) and _folds(graph, node.operation, following.operation)}
    gone = {id(norm) for norm in absorbed.values()}

    def call(node, *args, **kwargs):
        layer = node.operation
        if id(layer) in gone:
            return args[0]
        if id(layer) not in copies:
            copies[id(layer)] = _copied(layer, absorbed.get(id(layer)))
        for copy, weights in copies[id(layer)]:
            # What stands for a layer of another class takes no mask and no word on training.
            outputs = copy(*args, **(kwargs if type(copy) is type(layer) else {}))
            args = (outputs,)
            if weights:
                copy.set_weights(weights)
        return outputs

    result = graph.rebuilt(call)
    settle_statistics(result)
    return result


def _folds(graph: _Graph, layer, norm) -> bool:
    kinds = (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D, layers.Dense)
    return (type(layer) in kinds and type(norm) is layers.BatchNormalization
            and layer.activation is keras.activations.linear
            and getattr(layer, "data_format", "channels_last") == "channels_last"
            and graph.calls(layer) == graph.calls(norm) == 1
            and norm.axis in (-1, len(layer.output.shape) - 1))


def _copied(layer, norm) -> list[tuple]:
    """Return the layers, with their weights, that stand for a layer and the batch normalization after it."""
    if not isinstance(layer, keras.Layer):
        return [(layer, None)]
    if type(layer) is layers.SeparableConv2D and layer.data_format == "channels_last":
        return _separated(layer, norm)
    config, weights = layer.get_config(), layer.get_weights()
    if type(layer) is layers.BatchNormalization and len(layer.input.shape) == 4 and layer.axis in (-1, 3):
        scale, offset = _scale_and_offset(layer)
        return [(layers.DepthwiseConv2D(1, name=layer.name, dtype=layer.dtype_policy, trainable=layer.trainable),
                 [scale.reshape(1, 1, -1, 1), offset])]
    if norm is not None:
        weights = _with_norm(weights, norm, depthwise=type(layer) is layers.DepthwiseConv2D)
        config["use_bias"] = True
    return [(type(layer).from_config(config), weights)]


def _separated(layer: layers.SeparableConv2D, norm) -> list[tuple]:
    config = layer.get_config()
    depthwise, pointwise, *bias = layer.get_weights()
    shared = {"dtype": layer.dtype_policy, "trainable": layer.trainable}
    first = layers.DepthwiseConv2D(layer.kernel_size, strides=layer.strides, padding=layer.padding,
                                   depth_multiplier=layer.depth_multiplier, dilation_rate=layer.dilation_rate,
                                   use_bias=False, depthwise_regularizer=config["depthwise_regularizer"],
                                   name=f"{layer.name}_depthwise", **shared)
    weights = [pointwise, *bias] if norm is None else _with_norm([pointwise, *bias], norm)
    second = layers.Conv2D(layer.filters, 1, activation=config["activation"], use_bias=len(weights) == 2,
                           kernel_regularizer=config["pointwise_regularizer"], name=layer.name, **shared)
    return [(first, [depthwise]), (second, weights)]


def _scale_and_offset(norm: layers.BatchNormalization) -> tuple[np.ndarray, np.ndarray]:
    scale = 1 / np.sqrt(norm.moving_variance.numpy() + norm.epsilon)
    if norm.scale:
        scale = scale * norm.gamma.numpy()
    offset = -norm.moving_mean.numpy() * scale
    return scale, offset + norm.beta.numpy() if norm.center else offset


def _with_norm(weights: list[np.ndarray], norm, *, depthwise: bool = False) -> list[np.ndarray]:
    kernel, *bias = weights
    scale, offset = _scale_and_offset(norm)
    # A depthwise kernel has its outputs in its last two axes: inputs and multiples of each.
    kernel = kernel * (scale.reshape(kernel.shape[-2:]) if depthwise else scale)
    return [kernel, offset + (bias[0] * scale if bias else 0)]


class FakeQuantization(layers.Layer):
    """Round activations to the 256 values of a range, which is a moving average in training and fixed in inference.

    The gradient passes inside the range and stops outside (the straight-through estimator). Zero is one of the values.

    Attributes:
        observing: while it is set, the range takes in all that passes, which is not rounded.
    """

    def __init__(self, **settings):
        super().__init__(**settings, autocast=False)
        self.observing = False

    def build(self, shape):
        self.minimum = self.add_weight(name="minimum", shape=(), initializer="zeros", trainable=False, dtype="float32")
        self.maximum = self.add_weight(name="maximum", shape=(), initializer="zeros", trainable=False, dtype="float32")

    def call(self, inputs, training=False):
        values = tf.cast(inputs, tf.float32)
        lowest, highest = self.minimum.value, self.maximum.value
        if self.observing or training:
            seen = tf.minimum(tf.reduce_min(values), 0.0), tf.maximum(tf.reduce_max(values), 0.0)
            if self.observing:
                self.minimum.assign(tf.minimum(lowest, seen[0]))
                self.maximum.assign(tf.maximum(highest, seen[1]))
                return inputs
            lowest = tf.stop_gradient(MOMENTUM * lowest + (1 - MOMENTUM) * seen[0])
            highest = tf.stop_gradient(MOMENTUM * highest + (1 - MOMENTUM) * seen[1])
            self.minimum.assign(lowest)
            self.maximum.assign(highest)
        return tf.cast(tf.quantization.fake_quant_with_min_max_vars(values, lowest, highest), inputs.dtype)

    def compute_output_shape(self, shape):
        return shape


class QuantizedWeights(layers.Layer):
    """Run a layer with its kernel rounded to int8: per output channel, symmetric, from -127 to 127.

    The scale is the channel's largest absolute weight / 127, as TFLite's converter takes it.
    """

    def __init__(self, layer: keras.Layer, **settings):
        super().__init__(name=layer.name, dtype=layer.dtype_policy, **settings)
        self.layer = layer

    def build(self, shape):
        if not self.layer.built:
            self.layer.build(shape)

    def call(self, inputs):
        kernel = self.layer.kernel
        weights = tf.cast(kernel.value, tf.float32)
        depthwise = isinstance(self.layer, layers.DepthwiseConv2D)
        flat = tf.reshape(weights, (-1, int(np.prod(weights.shape[-2:])) if depthwise else weights.shape[-1]))
        largest = tf.stop_gradient(tf.reduce_max(tf.abs(flat), axis=0))
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(flat, -largest, largest, narrow_range=True)
        with keras.StatelessScope([(kernel, tf.reshape(rounded, weights.shape))]):
            return self.layer.call(inputs)

    def compute_output_shape(self, shape):
        return self.layer.compute_output_shape(shape)


def with_fake_quantization(model: keras.Model, calibration: np.ndarray, *,
                           keep_float: Iterable[str] = ()) -> keras.Model:
    """Return the model for training: its own layers, with weights and activations rounded as int8 rounds them.

    Like the converter it leaves what comes before the first layer with weights as it is. The trainable variables are
    the model's own; the ranges are non-trainable ones that each step moves, as it moves batch norm's statistics.

    Args:
        model: what `folded` gives.
        calibration: inputs as stored, (n, ...), from which the ranges of the activations start.
        keep_float: names of layers that are to stay in float32.
    """
    graph, keep_float, ranges = _Graph(model), set(keep_float), []
    # Ids of the new tensors that come after a layer with weights, and of those that int8 holds exactly.
    after, exact = set(), set()

    def rounded(tensor, name: str):
        if id(tensor) in exact or not isinstance(tensor, keras.KerasTensor):
            return tensor
        ranges.append(FakeQuantization(name=f"{name}_range_{len(ranges)}"))
        return ranges[-1](tensor)

    def call(node, *args, **kwargs):
        layer, weighted = node.operation, type(node.operation) in _WEIGHTED
        inner = weighted or any(id(tensor) in after for tensor in keras.tree.flatten(args))
        integer = inner and layer.name not in keep_float
        if integer:
            args = keras.tree.map_structure(lambda tensor: rounded(tensor, f"{layer.name}_input"), args)
        outputs = (QuantizedWeights(layer) if integer and weighted else layer)(*args, **kwargs)
        # TFLite computes a ReLU in the operator before it, which rounds once.
        if integer and not isinstance(layer, _PASSING) and not _is_relu(graph.next(node)):
            outputs = rounded(outputs, layer.name)
        after.update([id(outputs)] if inner else [])
        exact.update([id(outputs)] if integer else [])
        return outputs

    result = graph.rebuilt(call)
    for layer in ranges:
        layer.observing = True
    for start in range(0, len(calibration), BATCH_SIZE):
        result(calibration[start:start + BATCH_SIZE], training=False)
    for layer in ranges:
        layer.observing = False
    return result


def with_one_rounded(model: keras.Model, calibration: np.ndarray, name: str) -> keras.Model:
    """Return the model with a single layer rounded, its inputs, its weights and, after the ReLU behind it, its outputs.

    Args:
        model, calibration: as of `with_fake_quantization`.
    """
    graph = _Graph(model)
    relus = {following.operation.name for node in graph.nodes
             if node.operation.name == name and _is_relu(following := graph.next(node))}
    everything = {node.operation.name for node in graph.nodes}
    return with_fake_quantization(model, calibration, keep_float=everything - relus - {name})


def _is_relu(node) -> bool:
    layer = node.operation if node is not None else None
    if isinstance(layer, layers.Activation):
        return layer.activation in (keras.activations.relu, keras.activations.relu6)
    return (isinstance(layer, layers.ReLU) and layer.max_value in (None, 6)
            and layer.negative_slope == layer.threshold == 0)


def without_fake_quantization(model: keras.Model, *, keep_ranges: bool = False) -> keras.Model:
    """Return the float32 model that was trained, of the same variables, ready to be saved and converted.

    Args:
        keep_ranges: go on rounding the activations, by which a converter learns their ranges.
    """
    def call(node, *args, **kwargs):
        layer = node.operation
        if isinstance(layer, FakeQuantization) and not keep_ranges:
            return args[0]
        return (layer.layer if isinstance(layer, QuantizedWeights) else layer)(*args, **kwargs)

    return _Graph(model).rebuilt(call)


def weighted_layers(model: keras.Model) -> list[str]:
    """Return the names of the layers whose weights int8 rounds."""
    return [layer.name for layer in model.layers if type(layer) in _WEIGHTED]


def is_fake_quantized(model: keras.Model) -> bool:
    """Tell whether a model comes from `with_fake_quantization`."""
    return any(isinstance(layer, FakeQuantization) for layer in model.layers)
