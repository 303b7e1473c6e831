"""Writes a Keras model as a file of each kind that can be deployed, which takes inputs as they are stored."""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from hpcai_cli import console
from hpcai_cli.engine.compression import quantization
from hpcai_cli.errors import HpcaiError, MissingError, UnsuitableError, printable
from hpcai_cli.run import write_bytes

OPSET = 18
"""Of ONNX; the newest that tf2onnx 1.17 writes, and older than what ONNX Runtime of the last two years reads."""
FILES = {"keras": "model.keras", "tflite": "model.tflite", "onnx": "model.onnx", "saved_model": "saved_model"}
"""File or folder of each kind in an export."""


def write(model: keras.Model, kind: str, folder: Path, *, input_shape: tuple[int, ...], dtype: np.dtype) -> Path:
    """Write a model into a folder and return its file, or the folder of a SavedModel.

    Args:
        kind: one of FILES.
        dtype: of the inputs as stored.

    Raises:
        UnsuitableError: the model has what the format lacks.
        MissingError: a package is missing that writes the format.
    """
    path = folder / FILES[kind]
    try:
        with console.quiet():
            _WRITERS[kind](model, path, tuple(input_shape), dtype)
    except (HpcaiError, MemoryError, OSError):
        raise
    except Exception as error:
        first_line = printable(str(error).strip().split("\n")[0])
        raise UnsuitableError(f"the model cannot be written as {kind}: {type(error).__name__}: {first_line}",
                              expected="layers that the format has", mend="try another --format") from error
    return path


def _keras(model: keras.Model, path: Path, shape: tuple, dtype) -> None:
    model.save(path)


def _tflite(model: keras.Model, path: Path, shape: tuple, dtype) -> None:
    write_bytes(path, quantization.convert(model, shape, kind="float32"))


def _saved_model(model: keras.Model, path: Path, shape: tuple, dtype) -> None:
    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", lambda inputs: model(tf.cast(inputs, tf.float32), training=False),
                         input_signature=[tf.TensorSpec((None, *shape), dtype, name="inputs")])
    archive.write_out(str(path), verbose=False)


def _onnx(model: keras.Model, path: Path, shape: tuple, dtype) -> None:
    try:
        import onnx
        import tf2onnx
    except ImportError as error:
        raise MissingError("writing ONNX files needs packages of their own", expected="onnx and tf2onnx",
                           mend="run `pip install 'hpcai[onnx]'`", received=error.name or str(error)) from None
    # Keras' own export leaves the variables of some layers as inputs of the graph.
    function = quantization.frozen(quantization.in_float32(model), shape, dtype)
    given, taken = function.inputs[0].name, function.outputs[0].name
    graph, _ = tf2onnx.convert.from_graph_def(function.graph.as_graph_def(), input_names=[given],
                                              output_names=[taken], opset=OPSET)
    onnx.checker.check_model(graph)
    write_bytes(path, graph.SerializeToString())


_WRITERS: dict[str, Callable] = {"keras": _keras, "tflite": _tflite, "onnx": _onnx, "saved_model": _saved_model}
