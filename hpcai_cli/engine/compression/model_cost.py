"""What a Keras model costs: parameters, multiply-accumulates and zeros in its kernels, layer by layer."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod

import keras
import numpy as np
from keras import layers

from hpcai_cli.errors import DataError, printable

_DENSE = {layers.Dense}
_CONVOLUTIONS = {layers.Conv1D, layers.Conv2D, layers.Conv3D, layers.DepthwiseConv1D, layers.DepthwiseConv2D}
_TRANSPOSED = {layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose}
_SEPARABLE = {layers.SeparableConv1D, layers.SeparableConv2D}
_WITHOUT_KERNEL = """
    Activation ActivityRegularization Add AlphaDropout Average AveragePooling1D AveragePooling2D AveragePooling3D
    BatchNormalization CategoryEncoding CenterCrop Concatenate Cropping1D Cropping2D Cropping3D Dropout ELU Embedding
    Flatten GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
    GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization Identity LayerNormalization LeakyReLU
    Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum Multiply Normalization Permute PReLU ReLU
    RMSNormalization RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation RandomTranslation RandomZoom
    RepeatVector Rescaling Reshape Resizing Softmax SpatialDropout1D SpatialDropout2D SpatialDropout3D Subtract
    UnitNormalization UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D
"""
"""Classes of Keras that multiply nothing by a kernel; an embedding looks its rows up."""


@dataclass(frozen=True)
class Call:
    """One call of a layer in a model's graph; the shapes are those of one example behind a batch of unknown size.

    Attributes:
        name: the layer's, behind those of the models it is nested in: `body/conv`.
        layer: the layer, or an operation of Keras, or a nested model.
    """

    name: str
    layer: keras.Layer
    inputs: tuple[keras.KerasTensor, ...]
    outputs: tuple[keras.KerasTensor, ...]


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs; the attributes as in `Cost`."""

    name: str
    kind: str
    """Its class."""
    output_shape: tuple[int | None, ...]
    """Of one example, without the batch; of its first output, and its first call where it is shared."""
    parameters: int
    macs: int
    """Of all its calls, where it is shared."""
    sparsity: float | None
    """None where it has no kernel."""


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    A multiply-accumulate (mac) is one product of a weight of a kernel and its addition. Those of one example are
    counted, and those at borders padded with zeros like all others. Biases, normalization, activations, pooling and
    element-wise layers are not: they are a small part, and mostly fused into the rest.
    """

    parameters: int
    """Numbers in all weights, batch normalization's moving statistics included."""
    macs: int
    sparsity: float
    """Share of zeros in all kernels, in [0, 1]."""
    layers: tuple[LayerCost, ...]
    """In the order in which they are called."""
    uncounted: tuple[str, ...]
    """Names of layers that multiply in a way not known here; their macs are given as 0."""


def cost_of(model: keras.Model, input_shape: tuple[int, ...]) -> Cost:
    """Count what a built model costs.

    Args:
        input_shape: of one example, without the batch; it decides where the model's own height and width are open.

    Raises:
        DataError: the model takes no inputs of this shape.
    """
    first, macs = {}, {}
    for call in calls(model, input_shape):
        if not is_nested(call.layer):
            first.setdefault(id(call.layer), call)
            macs[id(call.layer)] = macs.get(id(call.layer), 0) + sum(
                count * kernel_size(call.layer, kernel) for kernel, count in positions(call).items())
    rows, zeros, numbers = [], 0, 0
    for key, call in first.items():
        empty, size = _zeros(call.layer)
        zeros, numbers = zeros + empty, numbers + size
        weights = getattr(call.layer, "weights", [])
        shape = tuple(call.outputs[0].shape[1:]) if call.outputs else ()
        rows.append(LayerCost(call.name, type(call.layer).__name__, shape, sum(_size(weight) for weight in weights),
                              macs[key], empty / size if size else None))
    return Cost(sum(_size(weight) for weight in model.weights), sum(macs.values()), zeros / numbers if numbers else 0.0,
                tuple(rows), tuple(call.name for call in first.values() if not _is_known(call.layer)))


def calls(model: keras.Model, input_shape: tuple[int, ...]) -> list[Call]:
    """Return the calls of all layers in their order, and of nested models after the layers within them; the last is the
    model itself, which is not changed.

    Raises:
        DataError: the model takes no inputs of this shape.
    """
    inputs = model.inputs if getattr(model, "inputs", None) else [keras.KerasTensor((None, *input_shape))]
    expected = tuple(inputs[0].shape[1:])
    if len(inputs) != 1 or len(expected) != len(input_shape) or any(
            size not in (None, given) for size, given in zip(expected, input_shape, strict=True)):
        raise DataError("the model takes other inputs", received=input_shape,
                        expected=" and ".join(str(tuple(tensor.shape[1:])) for tensor in inputs))
    found = []
    try:
        _call(found, "", model, keras.KerasTensor((None, *input_shape), dtype=inputs[0].dtype))
    except Exception as error:
        first_line = printable(str(error).strip().split("\n")[0])
        raise DataError(f"the shapes within the model cannot be told for inputs of {tuple(input_shape)}: {first_line}",
                        expected="a size of inputs that the model takes") from error
    # Names begin below the model itself, which is the last.
    return [replace(call, name=call.name[len(model.name) + 1:] or model.name) for call in found]


def is_nested(layer: keras.Layer) -> bool:
    """Tell whether a layer is a model whose own layers are known."""
    return isinstance(layer, (keras.Sequential, keras.Function))


def positions(call: Call) -> dict[str, int]:
    """Return by how many numbers of one example each weight of a kernel is multiplied, by the kernels' names."""
    kind = type(call.layer)
    if kind in _DENSE:
        return {"kernel": prod(call.outputs[0].shape[1:-1])}
    if kind in _CONVOLUTIONS:
        return {"kernel": _pixels(call.layer, call.outputs[0])}
    if kind in _TRANSPOSED:
        # Each number that comes in is spread by the whole kernel.
        return {"kernel": _pixels(call.layer, call.inputs[0])}
    if kind in _SEPARABLE:
        pixels = _pixels(call.layer, call.outputs[0])
        return {"depthwise_kernel": pixels, "pointwise_kernel": pixels}
    return {}


def kernel_size(layer: keras.Layer, kernel: str) -> int:
    """Return how many weights one of a layer's kernels has."""
    return _size(getattr(layer, kernel))


def _call(found: list[Call], prefix: str, layer: keras.Layer, *arguments, **keywords) -> object:
    """Give a layer symbolic inputs and take note of it, after the layers within it; return its outputs."""
    name = prefix + layer.name
    call = partial(_call, found, f"{name}/")
    if isinstance(layer, keras.Sequential):
        outputs = arguments[0]
        for part in layer.layers:
            outputs = call(part, outputs)
    elif isinstance(layer, keras.Function):
        outputs = layer._run_through_graph(arguments[0], operation_fn=lambda part: partial(call, part))
    else:
        # Not layer(...), which would give the layer of the model another node.
        outputs = layer.compute_output_spec(*arguments, **keywords)
    found.append(Call(name, layer, tuple(_tensors((arguments, keywords))), tuple(_tensors(outputs))))
    return outputs


def _tensors(structure: object) -> Iterator[keras.KerasTensor]:
    return (item for item in keras.tree.flatten(structure) if isinstance(item, keras.KerasTensor))


def _pixels(layer: keras.Layer, tensor: keras.KerasTensor) -> int:
    shape = tensor.shape[1:]
    return prod(shape[:-1] if layer.data_format == "channels_last" else shape[1:])


def _size(weight: keras.Variable) -> int:
    return prod(weight.shape)


def _zeros(layer: keras.Layer) -> tuple[int, int]:
    """Return how many weights of a layer's kernels are zero, and how many there are."""
    kernels = [weight for weight in getattr(layer, "weights", []) if "kernel" in weight.name
               or weight.name == "embeddings"]
    return (sum(_size(weight) - int(np.count_nonzero(weight.numpy())) for weight in kernels),
            sum(_size(weight) for weight in kernels))


def _is_known(layer: keras.Layer) -> bool:
    kind = type(layer)
    return kind in _DENSE | _CONVOLUTIONS | _TRANSPOSED | _SEPARABLE or (
        kind.__name__ in _WITHOUT_KERNEL.split() and getattr(layers, kind.__name__, None) is kind)
