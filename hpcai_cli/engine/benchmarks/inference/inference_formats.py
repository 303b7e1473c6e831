"""The ways to run a model that the inference benchmark compares; no framework in here."""

from collections.abc import Mapping
from dataclasses import dataclass

from hpcai_cli.engine import machine
from hpcai_cli.errors import UsageError


@dataclass(frozen=True)
class Format:
    """One way to run a model."""

    file: str
    """Kind of its file: keras, saved_model, tflite or onnx."""
    conversion: str = "float32"
    """Of TFLite or ONNX, what the weights become."""
    command: str = ""
    """What makes a served model of a run; empty for what cannot be served."""


_EXPORT = "hpcai deploy export {run} --format "
_COMPRESS = "hpcai compress {run} --quantize "
FORMATS: Mapping[str, Format] = {
    "keras-predict": Format("keras"),
    "keras": Format("keras"),
    "function": Format("keras", command=_EXPORT + "keras"),
    "saved_model": Format("saved_model", command=_EXPORT + "saved_model"),
    "tflite": Format("tflite", command=_EXPORT + "tflite"),
    "tflite-float16": Format("tflite", "float16", _COMPRESS + "float16"),
    "tflite-dynamic": Format("tflite", "dynamic", _COMPRESS + "dynamic"),
    "tflite-int8": Format("tflite", "int8", _COMPRESS + "int8"),
    "onnx": Format("onnx", command=_EXPORT + "onnx"),
    "onnx-int8": Format("onnx", "int8"),
}
"""By name: `keras-predict` is model.predict, `keras` a call of the model, `function` such a call in a tf.function."""
USUAL = ("keras-predict", "keras", "function", "saved_model", "tflite", "tflite-int8", "onnx", "onnx-int8")


def parse_formats(text: str) -> tuple[str, ...]:
    """Read names of formats such as `function,tflite`.

    Raises:
        UsageError: there is none of a name.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        raise UsageError("there is no such format to measure", expected=", ".join(FORMATS),
                         received=", ".join(unknown))
    return names


def parse_batch_sizes(text: str) -> tuple[int, ...]:
    """Read batch sizes such as `1,8,32`, and return them in their order.

    Raises:
        UsageError: they are none.
    """
    try:
        sizes = sorted({int(part) for part in text.split(",")})
        if sizes[0] < 1:
            raise ValueError
        return tuple(sizes)
    except ValueError:
        raise UsageError("cannot read --batch-sizes", expected="numbers such as 1,8,32", received=text) from None


def checked_threads(threads: int) -> int:
    """Return a number of threads, for 0 as many as there are cores.

    Raises:
        UsageError: there are not so many cores.
    """
    cores = machine.cores()
    if threads > cores:
        raise UsageError("this machine has not so many cores", expected=f"--threads of at most {cores}",
                         received=threads)
    return threads or cores
