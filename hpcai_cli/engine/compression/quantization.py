"""Converts a Keras model to TFLite, in float32, float16 or int8."""

from collections.abc import Iterable

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli.engine.compression.plan import CONVERSIONS
from hpcai_cli.engine.compression.quantization_training import (
    foldable,
    folded,
    is_fake_quantized,
    without_fake_quantization,
)
from hpcai_cli.engine.model import settle_statistics
from hpcai_cli.engine.tflite_file import operators, silence
from hpcai_cli.errors import DataError, HpcaiError, UnsuitableError, UsageError

CALIBRATION_EXAMPLES = 300
"""Examples that calibration looks at, at most: more change no range worth mentioning."""

_WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "BATCH_MATMUL", "TRANSPOSE_CONV", "CONV_3D"}
_MOVING = {"QUANTIZE", "DEQUANTIZE", "CAST", "SHAPE", "STRIDED_SLICE", "PACK", "RESHAPE"}
"""Operators that compute nothing with their values."""


def convert(model: keras.Model, input_shape: tuple[int, ...], *, kind: str, calibration: np.ndarray | None = None,
            keep_float: Iterable[str] = ()) -> bytes:
    """Convert a model to TFLite: inputs as stored, (any, *input_shape), to float32 outputs.

    Images enter as uint8, features as float32, or as the type of `calibration`. What comes before the first layer with
    weights (Rescaling, Normalization) computes in float32, so that the inputs lose nothing: an int8 model quantizes
    after it. Weights are quantized per output channel and symmetrically, activations per tensor.

    Args:
        kind: "float32"; "float16", which halves the weights; "dynamic", int8 weights and activations that are quantized
            as they come; "int8", int8 weights and activations.
        calibration: for "int8", examples as stored, (n, *input_shape), from which the ranges of the activations are
            taken; a fake-quantized model (quantization_training.py) brings its own.
        keep_float: for "int8", names of layers that go on in float32; a fake-quantized model was told before.

    Raises:
        DataError: the calibration data do not fit the model.
        UsageError: the model has what TFLite lacks, or has no layer of a name in keep_float.
    """
    assert kind in CONVERSIONS and (kind != "int8" or calibration is not None or is_fake_quantized(model)), kind
    shape = tuple(input_shape)
    if calibration is not None and (calibration.shape[1:] != shape or not len(calibration)):
        raise DataError("the calibration data have another shape than the model's inputs",
                        expected=f"(n, {', '.join(map(str, shape))})", received=calibration.shape)
    dtype = calibration.dtype if calibration is not None else np.uint8 if len(shape) == 3 else np.float32
    keep_float = tuple(keep_float)
    if unknown := set(keep_float) - {layer.name for layer in model._flatten_layers(recursive=True)}:
        raise UsageError("the model has no such layer to keep in float", expected="names of layers",
                         received=", ".join(sorted(unknown)))
    with silence():
        try:
            return _converted(model, shape, dtype, kind, calibration, keep_float)
        except (HpcaiError, MemoryError, OSError):
            raise
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            raise UnsuitableError(f"the model cannot be converted to {kind} TFLite", expected="layers that TFLite has",
                                  received=f"{type(error).__name__}: {first_line}") from error


def _converted(model: keras.Model, shape: tuple[int, ...], dtype, kind: str, calibration, keep_float) -> bytes:
    learned = is_fake_quantized(model)
    if learned:
        # The converter rounds the weights itself, and takes the ranges of the activations from the model.
        model = without_fake_quantization(model, keep_ranges=kind == "int8")
    model = in_float32(model)
    if kind == "int8" and not learned and foldable(model):
        # Batch norm that no convolution can take would be rounded with one scale for all channels.
        model = folded(model)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen(model, shape, dtype)])
    converter.exclude_conversion_metadata = True
    if kind == "int8" and not learned:
        return _int8(converter, calibration, keep_float)
    if kind != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "float16":
        converter.target_spec.supported_types = [tf.float16]
    return converter.convert()


def frozen(model: keras.Model, shape: tuple[int, ...], dtype):
    """Return a concrete function of inputs as stored, (any, *shape), whose weights are constants."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    function = tf.function(lambda inputs: model(tf.cast(inputs, tf.float32), training=False), autograph=False,
                           input_signature=[tf.TensorSpec((None, *shape), dtype)])
    # Variables of Keras 3 would become variables of the TFLite model, which are empty there and give NaN.
    return convert_variables_to_constants_v2(function.get_concrete_function())


def in_float32(model: keras.Model) -> keras.Model:
    """Return the model, or where it computes in another type a copy that computes in float32."""
    if all(layer.compute_dtype == "float32" for layer in model._flatten_layers(recursive=True)):
        return model

    def copy(layer):
        return type(layer).from_config(layer.get_config() | {"dtype": "float32"})

    copied = keras.models.clone_model(model, clone_function=copy)
    copied.set_weights(model.get_weights())
    settle_statistics(copied)
    return copied


def _int8(converter: tf.lite.TFLiteConverter, calibration: np.ndarray, keep_float: Iterable[str]) -> bytes:
    # The only way to name operators that stay in float; QuantizationDebugger, the public one, wants a second model
    # that it can compare with. TensorFlow is pinned.
    from tensorflow.lite.python.convert import mlir_quantize

    rows = np.linspace(0, len(calibration) - 1, min(len(calibration), CALIBRATION_EXAMPLES)).astype(int)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([calibration[row:row + 1]] for row in rows)
    converter._experimental_calibrate_only = True
    calibrated = converter.convert()
    found = list(operators(calibrated))
    first = next((number for number, operator in enumerate(found) if operator.kind in _WEIGHTED), len(found))
    keep_float = {*keep_float, *(f"{name}_depthwise" for name in keep_float)}
    stay = [operator.output for number, operator in enumerate(found)
            if number < first or any(keep_float.intersection(path) for path in operator.layers)]
    return mlir_quantize(calibrated, denylisted_nodes=stay)


def left_in_float(content: bytes) -> list[str]:
    """Return the names of the layers of an int8 model that compute in float32, but for the scaling of its inputs."""
    found = list(operators(content))
    first = next((number for number, operator in enumerate(found) if operator.kind in _WEIGHTED), 0)
    names = [path[-1] for operator in found[first:] if operator.is_float and operator.kind not in _MOVING
             for path in operator.layers]
    return list(dict.fromkeys(names))
