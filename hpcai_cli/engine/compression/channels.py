"""The channels of a network: which of them, in which layers, are the same one.

Channels are numbered along the last axis: convolutions and dense layers make new numbers, other layers pass them on,
and a residual addition makes equal what it adds (the groups of DepGraph, arXiv 2301.12900).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import keras
import numpy as np
from keras import layers

from hpcai_cli.engine.compression import model_cost
from hpcai_cli.errors import UsageError

_PLAIN = {layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D}
_TRANSPOSED = {layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose}
_SEPARABLE = {layers.SeparableConv1D, layers.SeparableConv2D}
_DEPTHWISE = {layers.DepthwiseConv1D, layers.DepthwiseConv2D}
PRODUCING = _PLAIN | _TRANSPOSED | _SEPARABLE
_MERGING = {layers.Add, layers.Average, layers.Maximum, layers.Minimum, layers.Multiply, layers.Subtract}
_PASSING_NAMES = """
    ActivityRegularization AlphaDropout AveragePooling1D AveragePooling2D AveragePooling3D CenterCrop Cropping1D
    Cropping2D Cropping3D Dropout ELU GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D
    GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D Identity LeakyReLU MaxPooling1D
    MaxPooling2D MaxPooling3D PReLU ReLU RepeatVector Resizing SpatialDropout1D SpatialDropout2D SpatialDropout3D
    UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""
_PASSING = {getattr(layers, name) for name in _PASSING_NAMES.split()}
"""Layers that treat each channel by itself and leave it in its place."""
_POINTWISE_NAMES = """
    celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid mish relu relu6
    selu sigmoid silu soft_shrink softplus softsign squareplus tanh tanh_shrink threshold
"""
POINTWISE = {getattr(keras.activations, name) for name in _POINTWISE_NAMES.split()}
"""Activations that treat each number by itself, as softmax does not."""


@dataclass
class Member:
    """A layer of the graph, or a nested model, with the numbers of its channels."""

    name: str
    layer: keras.Layer
    inputs: np.ndarray
    """int64 (channels,), those of its first input."""
    outputs: np.ndarray
    """int64 (channels,), those of its first output; empty where they could not be followed."""
    positions: dict[str, int]
    """By how many numbers each weight of a kernel is multiplied, in all calls."""
    scale: np.ndarray | float = 1.0
    """By what the batch normalization behind it multiplies its outputs."""
    axes: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)
    """The channels along the axes of each variable that has such axes."""

    def __post_init__(self):
        if len(self.outputs):
            self.axes = _axes(self)


def _axes(member: Member) -> dict[str, dict[int, np.ndarray]]:
    layer, kind, last = member.layer, type(member.layer), {-1: member.outputs}
    if kind in _PLAIN:
        return {"kernel": {-2: member.inputs, -1: member.outputs}, "bias": last}
    if kind in _TRANSPOSED:
        return {"kernel": {-1: member.inputs, -2: member.outputs}, "bias": last}
    if kind in _DEPTHWISE:
        return {"kernel": {-2: member.inputs}, "bias": last}
    if kind in _SEPARABLE:
        middle = np.repeat(member.inputs, layer.depth_multiplier)
        return {"depthwise_kernel": {-2: member.inputs}, "pointwise_kernel": {-2: middle, -1: member.outputs},
                "bias": last}
    return {weight.name: last for weight in getattr(layer, "weights", [])
            if kind in (layers.BatchNormalization, layers.PReLU) and weight.shape[-1] == len(member.outputs)}


class Graph:
    """The layers of a model, and which of their channels are the same one."""

    def __init__(self, model: keras.Model, input_shape: tuple[int, ...], protect: tuple[str, ...]):
        self._parents = np.zeros(0, np.int64)
        self._fixed, self._numbers, self._makers = [], {}, {}
        self.members: dict[int, Member] = {}
        # Kept, because tensors are known by their identities.
        self._calls = model_cost.calls(model, input_shape)
        for call in self._calls:
            self._add(call)
        for tensor in self._calls[-1].outputs:
            self.fix(self._numbers_of(tensor))
        for name in protect:
            protected = [member for member in self.producers() if f"{member.name}/".startswith(f"{name}/")]
            if not protected:
                raise UsageError("the model has no such layer to protect", received=name,
                                 expected="one of " + ", ".join(member.name for member in self.producers()))
            self.fix(joined(member.outputs for member in protected))

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return len(self._parents)

    def kernel_axes(self) -> Iterator[tuple[Member, str, int, np.ndarray]]:
        """Return the layers with the names of their kernels, the axes that have channels, and the channels there."""
        return ((member, kernel, axis, numbers) for member in self.members.values() for kernel in member.positions
                for axis, numbers in member.axes.get(kernel, {}).items())

    def producers(self) -> list[Member]:
        """Return the layers whose filters or units could be followed."""
        return [member for member in self.members.values() if type(member.layer) in PRODUCING and len(member.outputs)]

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """Return for each channel the number that stands for all that are the same one."""
        while not np.array_equal(above := self._parents[numbers], numbers):
            numbers = above
        return numbers

    def free(self) -> np.ndarray:
        """Return the roots of the channels that may go."""
        made = self.roots(joined(member.outputs for member in self.producers()))
        return np.setdiff1d(made, self.roots(joined(self._fixed)))

    def left_alone(self) -> tuple[str, ...]:
        """Return the names of layers that were not followed and have a kernel, or stand behind filters or units."""
        made = self.roots(joined(member.outputs for member in self.producers()))
        return tuple(member.name for member in self.members.values()
                     if not len(member.outputs) and not model_cost.is_nested(member.layer)
                     and (np.isin(self.roots(member.inputs), made).any()
                          or any("kernel" in weight.name for weight in getattr(member.layer, "weights", []))))

    def new(self, count: int) -> np.ndarray:
        """Return numbers for channels that are nowhere else."""
        numbers = np.arange(len(self._parents), len(self._parents) + count)
        self._parents = np.concatenate([self._parents, numbers])
        return numbers

    def join(self, numbers: np.ndarray, others: np.ndarray) -> None:
        """Make channels the same ones as others, one by one."""
        for pair in zip(numbers, others, strict=True):
            roots = self.roots(np.array(pair))
            self._parents[roots.max()] = roots.min()

    def fix(self, numbers: np.ndarray) -> None:
        """Let channels stay."""
        self._fixed.append(numbers)

    def _numbers_of(self, tensor: keras.KerasTensor) -> np.ndarray:
        """Return the numbers of a tensor's channels; those of one that nothing known has made stay."""
        if id(tensor) not in self._numbers:
            channels = tensor.shape[-1] if len(tensor.shape) > 1 else None
            self._numbers[id(tensor)] = self.new(channels or 0)
            self.fix(self._numbers[id(tensor)])
        return self._numbers[id(tensor)]

    def _add(self, call: model_cost.Call) -> None:
        layer, nested = call.layer, model_cost.is_nested(call.layer)
        inputs = [self._numbers_of(tensor) for tensor in call.inputs]
        outputs = None if nested else _followed(self, call, inputs)
        if outputs is not None:
            self._numbers[id(call.outputs[0])] = outputs
        elif not nested or len(inputs) != 1:
            for numbers in (*inputs, *(self._numbers_of(tensor) for tensor in call.outputs)):
                self.fix(numbers)
        first, outputs = joined(inputs[:1]), joined([] if outputs is None else [outputs])
        member = self.members.setdefault(id(layer), Member(call.name, layer, first, outputs, {}))
        for kernel, count in model_cost.positions(call).items():
            member.positions[kernel] = member.positions.get(kernel, 0) + count
        if member.inputs is not first and (nested or member.axes or type(layer) is layers.Reshape):
            # A second call has the same weights.
            self.join(member.inputs, first)
            self.join(member.outputs, outputs)
        if type(layer) in PRODUCING:
            self._makers[id(call.outputs[0])] = member
        elif type(layer) is layers.BatchNormalization and member.axes and id(call.inputs[0]) in self._makers:
            self._makers[id(call.inputs[0])].scale = _scale(layer)


def joined(arrays) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _scale(layer: layers.BatchNormalization) -> np.ndarray:
    gamma = np.abs(layer.gamma.numpy()) if layer.scale else 1.0
    return gamma / np.sqrt(layer.moving_variance.numpy() + layer.epsilon)


def _followed(graph: Graph, call: model_cost.Call, inputs: list[np.ndarray]) -> np.ndarray | None:
    """Return the numbers of the channels that a layer puts out, None where that is not known."""
    layer, kind = call.layer, type(call.layer)
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    activation = getattr(layer, "activation", None)
    pointwise = activation is None or activation in POINTWISE
    if kind in _PASSING or kind is layers.Activation and pointwise:
        return inputs[0]
    if kind in PRODUCING | _DEPTHWISE and getattr(layer, "groups", 1) == 1:
        outputs = np.repeat(inputs[0], layer.depth_multiplier) if kind in _DEPTHWISE else graph.new(
            call.outputs[0].shape[-1])
        if not pointwise:
            graph.fix(outputs)
        return outputs
    if kind is layers.BatchNormalization and layer.axis in (-1, len(call.inputs[0].shape) - 1):
        return inputs[0]
    if kind is layers.Rescaling and np.ndim(layer.scale) == np.ndim(layer.offset) == 0:
        return inputs[0]
    if kind in (layers.Flatten, layers.Reshape):
        return _reshaped(call, inputs[0])
    return _merged(graph, call, inputs)


def _reshaped(call: model_cost.Call, numbers: np.ndarray) -> np.ndarray | None:
    shape = call.outputs[0].shape[1:]
    if shape[-1:] == (len(numbers),):
        return numbers
    # Channels are the last axis: all of the first position, then all of the second.
    return np.tile(numbers, shape[0] // len(numbers)) if len(shape) == 1 and len(numbers) else None


def _merged(graph: Graph, call: model_cost.Call, inputs: list[np.ndarray]) -> np.ndarray | None:
    layer, rank = call.layer, len(call.outputs[0].shape)
    if type(layer) is layers.Concatenate and layer.axis in (-1, rank - 1):
        return np.concatenate(inputs)
    if type(layer) not in _MERGING and type(layer) is not layers.Concatenate:
        return None
    widest = max(inputs, key=len)
    for numbers in inputs:
        if len(numbers) == len(widest):
            graph.join(widest, numbers)
        else:
            # One channel for all of the others.
            graph.fix(numbers)
    return widest
