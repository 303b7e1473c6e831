"""Runs model files of every kind as one function, from examples as they are stored to scores.

Each kind's library is loaded when a file of it is opened, so that a server of TFLite or ONNX models never loads
TensorFlow.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from hpcai_cli.engine.serving import sandbox
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.errors import DataError, HpcaiError, printable

LARGEST_FILE = 2**31 - 1
"""Bytes of a file that is read as a whole; TFLite and ONNX can hold no more."""


LARGEST_BATCH = 256
"""Examples that a model answers at once; more are answered in parts."""


def open_scores(artefact: Artefact, *, threads: int, trust: bool = False, tried: bool = False,
                most: int = LARGEST_BATCH) -> Callable[[np.ndarray], np.ndarray]:
    """Open an exported model, as `scores_of` does; what it returns is for one thread at a time.

    Raises:
        DataError: the file is broken, or has what is not allowed.
        MissingError: its library is not installed.
    """
    return scores_of(artefact.kind, artefact.file, input_shape=artefact.input_shape, columns=artefact.columns,
                     owner=f"the export of {artefact.name}", threads=threads, trust=trust, tried=tried, most=most)


def scores_of(kind: str, file: Path, *, input_shape: tuple[int, ...], columns: int, owner: str, threads: int,
              trust: bool = False, tried: bool = False,
              most: int = LARGEST_BATCH) -> Callable[[np.ndarray], np.ndarray]:
    """Open a model file and return its inference.

    Inputs as stored, (b, *input_shape) for any b, uint8 or float32 -> scores, float32 (b, columns): a logit per class,
    or the one number of a regression.

    Args:
        kind: tflite, onnx, saved_model or keras.
        columns: of two classes the model itself may have one output, the logit of the second.
        owner: whose examples these are, as errors name it.
        trust: leave out the checks against files that run code, and the trial in a process of its own.
        tried: leave out the trial alone: the file has passed one, was made here, or this process is there for it.
        most: examples that a model is tried with at once, and a TFLite model is run with.

    Raises:
        DataError: the file is broken, or has what is not allowed; later, it does not fit what it is given.
        MissingError: its library is not installed.
    """
    shape = tuple(input_shape)
    try:
        # What is tried is what runs, whoever writes to the file meanwhile.
        model = _content(file) if kind in _READ else file
        if not (trust or tried):
            _check(kind, model)
            sandbox.try_out(partial(_opened, kind, shape, 1, False, most), model, shape, (1, most), _NAMES[kind])
        outputs_of = _opened(kind, shape, threads, trust, most, model)
    except DataError as error:
        # Some name the file themselves.
        raise error if str(file) in str(error) else DataError(f"{file}: {error}") from None
    return _scored(outputs_of, file, columns, owner)


# ---- Kinds ---------------------------------------------------------------------------------------------------------

_NAMES = {"tflite": "TFLite", "onnx": "ONNX", "saved_model": "SavedModel", "keras": "Keras"}
_READ = ("tflite", "onnx")
"""Kinds that are opened from a file's content; the others are opened by their library."""


def _check(kind: str, model: bytes | Path) -> None:
    """Refuse what is not allowed without running anything."""
    if kind == "tflite":
        from hpcai_cli.engine import tflite_file as library
    elif kind == "onnx":
        from hpcai_cli.engine import onnx_file as library
    elif kind == "saved_model":
        from hpcai_cli.engine import saved_model_file as library
    else:
        from hpcai_cli.engine import model_file as library
    library.check(model)


def _opened(kind: str, shape: tuple[int, ...], threads: int, trust: bool, most: int, model: bytes | Path) -> Callable:
    if kind == "tflite":
        return _tflite(model, threads, most)
    if kind == "onnx":
        return _onnx(model, shape, threads)
    return _saved_model(model, shape, trust) if kind == "saved_model" else _keras(model, trust)


def _tflite(content: bytes, threads: int, most: int) -> Callable:
    from hpcai_cli.engine import tflite_file

    return tflite_file.runner(content, threads=threads, most=most)


def _onnx(content: bytes, shape: tuple[int, ...], threads: int) -> Callable:
    from hpcai_cli.engine import onnx_file

    return _fed(*onnx_file.runner(content, threads=threads), shape)


def _saved_model(folder: Path, shape: tuple[int, ...], trust: bool) -> Callable:
    from hpcai_cli.engine import saved_model_file

    return _fed(*saved_model_file.runner(folder, trust=trust), shape)


def _keras(file: Path, trust: bool) -> Callable:
    import tensorflow as tf

    from hpcai_cli.engine import model_file

    model = model_file.load(file, trust=trust)
    compiled = tf.function(lambda inputs: tf.cast(model(inputs, training=False), tf.float32), reduce_retracing=True)
    return lambda inputs: compiled(tf.constant(inputs)).numpy()


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise DataError("it is larger than a model of its kind can be", expected=f"at most {LARGEST_FILE} bytes",
                            received=file.stat().st_size)
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"it cannot be read: {error.strerror}") from None


# ---- What goes in and out ------------------------------------------------------------------------------------------

def _fed(run: Callable, shape: tuple, dtype: np.dtype, wanted: tuple[int, ...]) -> Callable:
    """Give a model examples as it takes them: in its type, in batches of its size where it has one.

    Args:
        shape, dtype: what the model declares of its inputs; None in the shape stands for any size.
        wanted: the examples' shape.

    Raises:
        DataError: it takes other examples.
    """
    if len(shape) != 1 + len(wanted) or any(dim not in (None, size) for dim, size in zip(shape[1:], wanted,
                                                                                         strict=True)):
        raise DataError("it takes other inputs", expected=f"(any, {', '.join(map(str, wanted))})",
                        received=f"({', '.join('any' if dim is None else str(dim) for dim in shape)})")
    size = shape[0]

    def outputs_of(inputs: np.ndarray) -> np.ndarray:
        if not np.can_cast(inputs.dtype, dtype, "same_kind"):
            raise DataError("it takes inputs of another type", expected=f"{inputs.dtype}", received=f"{dtype}")
        inputs = inputs.astype(dtype, copy=False)
        if size is None:
            return run(inputs)
        parts = []
        for start in range(0, len(inputs), size):
            part = inputs[start:start + size]
            parts.append(run(np.resize(part, (size, *part.shape[1:])))[:len(part)])
        return np.concatenate(parts)
    return outputs_of


def _scored(outputs_of: Callable, file: Path, columns: int, owner: str) -> Callable:
    """Bring what a model gives into the form of scores."""
    sizes = (2, 1) if columns == 2 else (columns,)

    def forward(inputs: np.ndarray) -> np.ndarray:
        try:
            outputs = np.asarray(outputs_of(inputs))
        except HpcaiError as error:
            raise DataError(f"{file} does not fit {owner}: {error}") from None
        except Exception as error:
            first_line = printable((str(error).strip() or type(error).__name__).split("\n")[0])
            raise DataError(f"{file} fails to answer {len(inputs)} examples of {owner}: {first_line}") from error
        if outputs.shape not in [(len(inputs), size) for size in sizes]:
            raise DataError(f"{file} gives other outputs than {owner} has", received=outputs.shape,
                            expected=" or ".join(f"({len(inputs)}, {size})" for size in sizes))
        if outputs.dtype.kind != "f":
            raise DataError(f"{file} gives no scores", expected="numbers of a float type", received=outputs.dtype)
        outputs = outputs.astype(np.float32, copy=False)
        # The softmax over (0, z) is the sigmoid of z: one form for whatever comes after.
        return outputs if outputs.shape[1] == columns else np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    return forward
