"""Structured pruning: whole filters and units are removed, and the model really becomes smaller.

A channel that goes is missing everywhere: its filter, its place in batch normalization, its part of the kernels behind.
Which channels of which layers are the same one is found by numbering them: convolutions and dense layers make new
numbers along the last axis, other layers pass them on, and a residual addition makes equal what it adds (the groups of
DepGraph, arXiv 2301.12900).
"""

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import keras
import numpy as np
from keras import layers

from hpcai_cli.engine.compression import model_cost
from hpcai_cli.engine.model import settle_statistics
from hpcai_cli.errors import DataError, UsageError, printable

LEAST_SHARE = 1 / 8
"""Of each layer's channels at least this share stays."""
MULTIPLES = ((64, 16), (16, 8))
"""Layers of at least so many channels keep a multiple of so many, which fills the registers of processors: at the same
multiply-accumulates dogs-vs-cats was about a tenth faster than with half of these."""
LEAST_STRIDED = 16
"""Channels that stay before and behind a convolution of one pixel with strides: with fewer, oneDNN's gradient of it
writes beyond its memory (TensorFlow 2.21)."""

_PLAIN = {layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D}
_TRANSPOSED = {layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose}
_SEPARABLE = {layers.SeparableConv1D, layers.SeparableConv2D}
_DEPTHWISE = {layers.DepthwiseConv1D, layers.DepthwiseConv2D}
_PRODUCING = _PLAIN | _TRANSPOSED | _SEPARABLE
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
_POINTWISE = {getattr(keras.activations, name) for name in _POINTWISE_NAMES.split()}
"""Activations that treat each number by itself, as softmax does not."""


@dataclass(frozen=True)
class Narrowing:
    """What was removed.

    Attributes:
        macs_before, macs_after: multiply-accumulates of one example.
        channels: filters or units of each layer that lost some, (before, after), by the layer's name; a layer of a
            nested model is `body/name`.
        kept: indices of the channels that stayed in the outputs of each layer that lost some, normalization and the
            like included, by the layer's name.
        left_alone: names of layers of which it is not known how they treat channels; those that go in and come out
            stayed.
    """

    macs_before: int
    macs_after: int
    channels: dict[str, tuple[int, int]]
    kept: dict[str, np.ndarray]
    left_alone: tuple[str, ...]


def narrowed(model: keras.Model, input_shape: tuple[int, ...], *, keep_macs: float,
             protect: tuple[str, ...] = ()) -> tuple[keras.Model, Narrowing]:
    """Return a smaller model with the weights of what is left, to be fine-tuned, and what was removed.

    Args:
        model: with one input and one output; it stays as it is.
        input_shape: of one example, without the batch.
        keep_macs: share of the multiply-accumulates that may stay, in (0, 1).
        protect: names of layers whose filters or units all stay.

    Raises:
        UsageError: the share is out of range, a layer to protect does not exist, or the model cannot be cut that far.
        DataError: the model takes no such inputs, or has weights that are no numbers.
    """
    if not 0 < keep_macs < 1:
        raise UsageError("the share of multiply-accumulates to keep is out of range",
                         expected="a number above 0 and below 1", received=keep_macs)
    graph = _Graph(model, input_shape, protect)
    kept = _choose(graph, keep_macs)
    smaller = _rebuild(model, graph, kept)
    lost = {member.name: np.flatnonzero(kept[graph.roots(member.outputs)]) for member in graph.members.values()
            if member.axes and not kept[graph.roots(member.outputs)].all()}
    channels = {member.name: (len(member.outputs), len(lost[member.name])) for member in graph.producers()
                if member.name in lost}
    return smaller, Narrowing(model_cost.cost_of(model, input_shape).macs,
                              model_cost.cost_of(smaller, input_shape).macs, channels, lost, graph.left_alone())


@dataclass
class _Member:
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


def _axes(member: _Member) -> dict[str, dict[int, np.ndarray]]:
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


class _Graph:
    """The layers of a model, and which of their channels are the same one."""

    def __init__(self, model: keras.Model, input_shape: tuple[int, ...], protect: tuple[str, ...]):
        self._parents = np.zeros(0, np.int64)
        self._fixed, self._numbers, self._makers = [], {}, {}
        self.members: dict[int, _Member] = {}
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
            self.fix(_joined(member.outputs for member in protected))

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return len(self._parents)

    def kernel_axes(self) -> Iterator[tuple[_Member, str, int, np.ndarray]]:
        """Return the layers with the names of their kernels, the axes that have channels, and the channels there."""
        return ((member, kernel, axis, numbers) for member in self.members.values() for kernel in member.positions
                for axis, numbers in member.axes.get(kernel, {}).items())

    def producers(self) -> list[_Member]:
        """Return the layers whose filters or units could be followed."""
        return [member for member in self.members.values() if type(member.layer) in _PRODUCING and len(member.outputs)]

    def roots(self, numbers: np.ndarray) -> np.ndarray:
        """Return for each channel the number that stands for all that are the same one."""
        while not np.array_equal(above := self._parents[numbers], numbers):
            numbers = above
        return numbers

    def free(self) -> np.ndarray:
        """Return the roots of the channels that may go."""
        made = self.roots(_joined(member.outputs for member in self.producers()))
        return np.setdiff1d(made, self.roots(_joined(self._fixed)))

    def left_alone(self) -> tuple[str, ...]:
        """Return the names of layers that were not followed and have a kernel, or stand behind filters or units."""
        made = self.roots(_joined(member.outputs for member in self.producers()))
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
        first, outputs = _joined(inputs[:1]), _joined([] if outputs is None else [outputs])
        member = self.members.setdefault(id(layer), _Member(call.name, layer, first, outputs, {}))
        for kernel, count in model_cost.positions(call).items():
            member.positions[kernel] = member.positions.get(kernel, 0) + count
        if member.inputs is not first and (nested or member.axes or type(layer) is layers.Reshape):
            # A second call has the same weights.
            self.join(member.inputs, first)
            self.join(member.outputs, outputs)
        if type(layer) in _PRODUCING:
            self._makers[id(call.outputs[0])] = member
        elif type(layer) is layers.BatchNormalization and member.axes and id(call.inputs[0]) in self._makers:
            self._makers[id(call.inputs[0])].scale = _scale(layer)


def _joined(arrays) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _scale(layer: layers.BatchNormalization) -> np.ndarray:
    gamma = np.abs(layer.gamma.numpy()) if layer.scale else 1.0
    return gamma / np.sqrt(layer.moving_variance.numpy() + layer.epsilon)


def _followed(graph: _Graph, call: model_cost.Call, inputs: list[np.ndarray]) -> np.ndarray | None:
    """Return the numbers of the channels that a layer puts out, None where that is not known."""
    layer, kind = call.layer, type(call.layer)
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    activation = getattr(layer, "activation", None)
    pointwise = activation is None or activation in _POINTWISE
    if kind in _PASSING or kind is layers.Activation and pointwise:
        return inputs[0]
    if kind in _PRODUCING | _DEPTHWISE and getattr(layer, "groups", 1) == 1:
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


def _merged(graph: _Graph, call: model_cost.Call, inputs: list[np.ndarray]) -> np.ndarray | None:
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


def _choose(graph: _Graph, keep_macs: float) -> np.ndarray:
    """Return which channels stay, bool by number; only the roots count.

    The least important go first, whatever they cost. Importance per cost would cut mainly the first layers, which made
    dogs-vs-cats faster still, but the same short fine-tuning left it 8 to 10 points behind, and cifar10 2 to 4.
    """
    importance = _importance(graph)
    total = _macs(graph, np.ones(len(graph), bool))
    # Where the share is that of a whole number of channels, the product may fall short of it by a digit.
    target = keep_macs * total * (1 + 1e-9)
    widths = [graph.roots(member.outputs) for member in graph.producers()]
    order = _ascending(np.setdiff1d(graph.free(), _joined(_reserved(graph, importance))), importance)

    def stays(count: int) -> np.ndarray:
        kept = np.ones(len(graph), bool)
        kept[order[:count]] = False
        for roots in widths:
            gone = _ascending(roots[~kept[roots]], importance)
            back = (len(gone) - len(roots)) % _multiple(roots)
            kept[gone[max(0, len(gone) - back):]] = True
        return kept

    if not len(order):
        raise UsageError("the model has no filters or units that can be removed", expected="convolutions or dense "
                         "layers before the last one", received=", ".join(graph.left_alone()) or "none")
    least = _macs(graph, stays(len(order))) / total
    if least * total > target:
        raise UsageError("the model cannot be cut to this share of its multiply-accumulates",
                         expected=f"at least {np.ceil(least * 1000) / 1000:.3f}", received=keep_macs)
    kept = stays(bisect.bisect_left(range(len(order)), True,
                                    key=lambda count: _macs(graph, stays(count)) <= target))
    # The last layer that lost channels may have lost more than it had to; others take up what is left.
    for roots in sorted(widths, key=lambda roots: -importance[roots].max()):
        while len(gone := _ascending(roots[~kept[roots]], importance)):
            wider = kept.copy()
            wider[gone[-_multiple(roots):]] = True
            if _macs(graph, wider) > target:
                break
            kept = wider
    return kept


def _ascending(numbers: np.ndarray, importance: np.ndarray) -> np.ndarray:
    return numbers[np.argsort(importance[numbers], kind="stable")]


def _multiple(channels: np.ndarray) -> int:
    return next((multiple for least, multiple in MULTIPLES if len(channels) >= least), 1)


def _reserved(graph: _Graph, importance: np.ndarray) -> Iterator[np.ndarray]:
    """Return the channels of each layer that stay whatever is asked for."""
    for member in graph.producers():
        roots = _ascending(graph.roots(member.outputs), importance)
        yield roots[-max(1, round(len(roots) * LEAST_SHARE)):]
        layer = member.layer
        if max(getattr(layer, "kernel_size", (3,))) == 1 and max(layer.strides) > 1:
            yield roots[-LEAST_STRIDED:]
            yield _ascending(np.unique(graph.roots(member.inputs)), importance)[-LEAST_STRIDED:]


def _importance(graph: _Graph) -> np.ndarray:
    """Return how important each channel is, float64 by number; only the roots count.

    It is the L2 norm of the filter that makes it, times the scale of the batch normalization behind, and the norm of
    the weights that read it, each relative to the mean of its layer, and the mean over the layers that share it (in the
    manner of arXiv 1608.08710 and 2301.12900).
    """
    sums, counts = np.zeros((2, len(graph))), np.zeros((2, len(graph)))
    for member, kernel, axis, numbers in graph.kernel_axes():
        made = numbers is member.outputs
        weights = np.moveaxis(getattr(member.layer, kernel).numpy(), axis, -1)
        norms = np.sqrt(np.sum(np.square(weights), axis=tuple(range(weights.ndim - 1)), dtype=np.float64))
        norms = norms * member.scale if made else norms
        if not np.isfinite(norms).all():
            raise DataError(f"the weights of layer {printable(member.name)} are no finite numbers",
                            expected="a model whose training has not diverged")
        np.add.at(sums[int(made)], graph.roots(numbers), norms / (norms.mean() or 1.0))
        np.add.at(counts[int(made)], graph.roots(numbers), 1)
    return (sums / np.maximum(counts, 1)).sum(axis=0)


def _macs(graph: _Graph, kept: np.ndarray) -> int:
    """Return the multiply-accumulates of one example with the channels that are kept."""
    total = 0
    for member in graph.members.values():
        for kernel, count in member.positions.items():
            axes = member.axes.get(kernel, {}).values()
            others = model_cost.kernel_size(member.layer, kernel) // prod(len(numbers) for numbers in axes)
            total += count * others * prod(int(kept[graph.roots(numbers)].sum()) for numbers in axes)
    return total


def _rebuild(model: keras.Model, graph: _Graph, kept: np.ndarray) -> keras.Model:
    """Return a model like this one with the channels that are kept, and their weights."""
    done = {}

    def staying(numbers: np.ndarray) -> np.ndarray:
        return kept[graph.roots(numbers)]

    def rebuilt(layer: keras.Layer) -> keras.Layer:
        if id(layer) not in done:
            member = graph.members[id(layer)]
            if model_cost.is_nested(layer):
                stay = staying(member.inputs)
                done[id(layer)] = _narrower_model(layer, None if stay.all() else int(stay.sum()), rebuilt)
            else:
                done[id(layer)] = _narrower_layer(layer, int(staying(member.outputs).sum()))
        return done[id(layer)]

    try:
        smaller = rebuilt(model)
    except Exception as error:
        first_line = printable(str(error).strip().split("\n")[0])
        raise UsageError(f"the model cannot be made again with fewer filters: {first_line}",
                         expected="layers that get_config and from_config make again") from error
    for member in graph.members.values():
        new = done[id(member.layer)]
        if new is member.layer or model_cost.is_nested(new):
            continue
        for old, variable in zip(member.layer.variables, new.variables, strict=True):
            value = old.numpy()
            for axis, numbers in member.axes.get(old.name, {}).items():
                value = np.compress(staying(numbers), value, axis)
            variable.assign(value)
    settle_statistics(smaller)
    return smaller


def _narrower_layer(layer: keras.Layer, channels: int) -> keras.Layer:
    """Return a new layer with so many output channels; 0 for one that is not to change."""
    if not isinstance(layer, keras.Layer):
        return layer  # An operation of Keras has no state.
    config = layer.get_config()
    if channels and type(layer) in _PRODUCING:
        config["units" if type(layer) is layers.Dense else "filters"] = channels
    if channels and type(layer) is layers.Reshape and config["target_shape"][-1] != -1:
        config["target_shape"] = (*config["target_shape"][:-1], channels)
    return type(layer).from_config(config)


def _narrower_model(model: keras.Model, channels: int | None, rebuilt: Callable) -> keras.Model:
    """Return a new model of rebuilt layers, its one input with so many channels; None for as many as before."""
    inputs = None
    if channels is not None:
        inputs = keras.tree.map_structure(
            lambda tensor: keras.Input(batch_shape=(*tensor.shape[:-1], channels), dtype=tensor.dtype,
                                       name=tensor.name),
            model.inputs if isinstance(model, keras.Sequential) else model.input)
    smaller = keras.models.clone_model(model, input_tensors=inputs, clone_function=rebuilt)
    if not model.trainable:
        # A clone begins trainable; its layers have their own mark already.
        smaller.trainable = False
    return smaller
