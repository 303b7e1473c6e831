"""TFLite model files: what is in them, and running them; files from strangers are checked and tried first."""

import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import numpy as np

from hpcai_cli import console
from hpcai_cli.errors import DataError, printable

LARGEST = 2**31 - 1
"""Bytes: the offsets in a flatbuffer have 32 bits."""
MOST_TENSORS = 100_000
LARGEST_TENSOR = 1 << 32
"""Bytes that a tensor of one example may declare."""
LARGEST_BATCH = 256
"""Examples that run at once where nothing else is asked, so that what was tried holds for any number of them."""
_FORBIDDEN = {"CUSTOM", "CALL", "CALL_ONCE", "IF", "WHILE", "VAR_HANDLE", "READ_VARIABLE", "ASSIGN_VARIABLE",
              "DELEGATE"}
"""Code of others, other graphs, and memory between two calls: no model of ours has them."""
_CANNOT = "this TFLite model cannot be run: "


class Operator:
    """One operator of a TFLite model.

    Attributes:
        kind: such as CONV_2D.
        output: name of its first output tensor.
        is_float: whether that is float32.
        layers: for each Keras layer that became part of it the names from the outermost layer to that one.
    """

    def __init__(self, kind: str, model, operator):
        graph = model.Subgraphs(0)
        tensor = graph.Tensors(operator.Outputs(0))
        self.kind, self.output, self.is_float = kind, _name(tensor), tensor.Type() == 0
        given = [graph.Tensors(place) for place in np.atleast_1d(operator.InputsAsNumpy()) if place >= 0]
        constants = [_name(tensor) for tensor in given if model.Buffers(tensor.Buffer()).DataLength()]
        # The model's last operator is called Identity; its weights still tell where they are from.
        names = [self.output] if "/" in self.output else constants
        paths = (_layers(part) for name in names for part in name.split(";"))
        self.layers = [path for path in dict.fromkeys(paths) if path]


def _layers(name: str) -> tuple[str, ...]:
    """Return the names of the layers in an operation's name: Keras enters each layer's scope twice, and TensorFlow
    numbers the second, so that `model_1/conv2d_3_1/convolution` is of the layer conv2d_3."""
    scopes = (re.fullmatch(r"(.+)_\d+", part) for part in name.split("/")[1:-1])
    return tuple(scope[1] for scope in scopes if scope)


def operators(content: bytes) -> Iterator[Operator]:
    """Yield the operators of a model in their order."""
    schema = _schema()
    kinds = {number: kind for kind, number in vars(schema.BuiltinOperator).items() if not kind.startswith("_")}
    model = schema.Model.GetRootAs(content)
    graph = model.Subgraphs(0)
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        code = model.OperatorCodes(operator.OpcodeIndex())
        # Files from before 2020 have the number in the older, smaller field only.
        yield Operator(kinds[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())], model, operator)


def _is_light() -> bool:
    """Tell whether the runtime without TensorFlow is taken: it loads sooner, but is not to stand beside the other."""
    if "tensorflow" in sys.modules:
        return False
    with suppress(ImportError):
        import ai_edge_litert  # noqa: F401
        return True
    return False


def _schema():
    """Return the module that reads the format."""
    if _is_light():
        from ai_edge_litert import schema_py_generated
    else:
        from tensorflow.lite.python import schema_py_generated
    return schema_py_generated


def _interpreter(content: bytes, threads: int):
    if _is_light():
        from ai_edge_litert import interpreter as library
    else:
        from tensorflow import lite as library
    return library.Interpreter(model_content=content, num_threads=threads)


def _name(tensor) -> str:
    return (tensor.Name() or b"").decode(errors="replace")


def runner(content: bytes, *, threads: int, most: int = LARGEST_BATCH) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from inputs as stored, (b, ...) for any b, to the model's float32 outputs, (b, columns).

    Inputs of type uint8 are given to a uint8 model as they are; else quantized inputs and outputs are converted by the
    model's own scales.

    Args:
        most: examples that run at once; of more, so many at a time.

    Raises:
        DataError: the content is broken, foreign or not safe to run; later, inputs have another shape or type.
    """
    check(content)
    return _Runner(content, threads, most)


def check(content: bytes) -> None:
    """Refuse what is no TFLite model of plain operators, without running anything.

    Raises:
        DataError: what is wrong.
    """
    try:
        if not 8 <= len(content) <= LARGEST or content[4:8] != b"TFL3":
            raise ValueError("it does not begin like one")
        _check_graph(content)
    except DataError:
        raise
    # The generated reader of flatbuffers raises whatever numpy and struct do.
    except Exception as error:
        raise DataError(f"this is no TFLite model: {printable(str(error))}", expected="a model.tflite") from None


def _check_graph(content: bytes) -> None:
    model = _schema().Model.GetRootAs(content)
    if model.SubgraphsLength() != 1:
        raise ValueError(f"it has {model.SubgraphsLength()} graphs, where one is expected")
    graph = model.Subgraphs(0)
    if max(graph.TensorsLength(), graph.OperatorsLength(), model.OperatorCodesLength()) > MOST_TENSORS:
        raise ValueError("it has more tensors than any real model")
    if (graph.InputsLength(), graph.OutputsLength()) != (1, 1):
        raise ValueError(f"it has {graph.InputsLength()} inputs and {graph.OutputsLength()} outputs, where one of each "
                         "is expected")
    for number in range(graph.TensorsLength()):
        _check_tensor(model, graph.Tensors(number))
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        places = [*np.atleast_1d(operator.InputsAsNumpy()), *np.atleast_1d(operator.OutputsAsNumpy())]
        if not operator.OutputsLength() or not all(-1 <= place < graph.TensorsLength() for place in places):
            raise ValueError("an operator names a tensor that is not there")
        if not 0 <= operator.OpcodeIndex() < model.OperatorCodesLength():
            raise ValueError("an operator is of no kind")
    for operator in operators(content):
        if operator.kind in _FORBIDDEN:
            raise ValueError(f"it has the operator {operator.kind}, which may not be run")


def _check_tensor(model, tensor) -> None:
    shape = [int(dim) for dim in np.atleast_1d(tensor.ShapeAsNumpy())] if tensor.ShapeLength() else []
    declared = int(np.prod([max(dim, 1) for dim in shape], dtype=object))
    if any(dim < 0 for dim in shape) or len(shape) > 8 or declared > LARGEST_TENSOR:
        raise ValueError(f"the tensor {_name(tensor)!r} has the shape {shape}")
    if not 0 <= tensor.Buffer() < model.BuffersLength():
        raise ValueError(f"the tensor {_name(tensor)!r} is not in the file")
    scales = tensor.Quantization()
    if scales is None or not scales.ScaleLength():
        return
    count, axis = scales.ScaleLength(), scales.QuantizedDimension()
    if scales.ZeroPointLength() != count or count > 1 and not (0 <= axis < len(shape) and shape[axis] == count):
        raise ValueError(f"the tensor {_name(tensor)!r} has {count} scales for the shape {shape}")


def _unusable(reason: object) -> DataError:
    # What a trial says is such a sentence already.
    first_line = str(reason).strip().split("\n")[0].removeprefix(_CANNOT).removesuffix("; expected a model.tflite")
    return DataError(f"{_CANNOT}{printable(first_line)}", expected="a model.tflite")


@contextmanager
def silence() -> Iterator[None]:
    """Keep away what converter and interpreter have to say, as that TFLite may move to another package some day."""
    with console.quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Runner:
    """An interpreter whose input is resized to whatever batch comes.

    Attributes:
        shape, dtype: of one example as it is fed.
    """

    def __init__(self, content: bytes, threads: int, most: int):
        self._content, self._threads, self._most, self._fixed = content, threads, most, False
        given = self._open()
        self._place, self._scale, self.shape = given["index"], given["quantization"], tuple(given["shape"][1:].tolist())
        # Images stay as they are stored; whatever else is quantized is given in its own unit.
        self._quantized = given["dtype"] if given["dtype"] in (np.int8, np.int16) else None
        self.dtype = np.dtype(np.float32 if self._quantized else given["dtype"])
        if self._batch < 1 or self.dtype not in (np.float32, np.uint8):
            raise DataError("the TFLite model takes other inputs than images or numbers",
                            expected="uint8 or float32 (batch, ...)",
                            received=f"{given['dtype'].__name__} {tuple(given['shape'])}")

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        if inputs.shape[1:] != self.shape or self.dtype == np.uint8 != inputs.dtype:
            raise DataError("the TFLite model takes other inputs than these",
                            expected=f"{self.dtype} (n, {', '.join(map(str, self.shape))})",
                            received=f"{inputs.dtype} {inputs.shape}")
        values = inputs.astype(self.dtype, copy=False)
        if self._quantized:
            bounds, (scale, zero) = np.iinfo(self._quantized), self._scale
            values = np.clip(np.rint(values / (scale or 1)) + zero, bounds.min, bounds.max).astype(self._quantized)
        outputs = [self._part(values[start:start + self._most]) for start in range(0, len(values), self._most)]
        return np.concatenate(outputs)

    def _part(self, values: np.ndarray) -> np.ndarray:
        if not self._fixed:
            try:
                return self._outputs(values)
            except (RuntimeError, ValueError):
                # A shape within the model holds its own batch size: it takes as many as that, again and again.
                self._open()
                self._fixed = True
        size, parts = self._batch, []
        for start in range(0, len(values), size):
            part = values[start:start + size]
            padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            try:
                parts.append(self._outputs(padded)[:len(part)])
            except (RuntimeError, ValueError) as error:
                raise _unusable(error) from None
        return np.concatenate(parts)

    def _open(self) -> dict:
        try:
            with silence():
                self._interpreter = _interpreter(self._content, self._threads)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise _unusable(error) from None
        given = self._interpreter.get_input_details()[0]
        self._batch = int(given["shape"][0]) if len(given["shape"]) else 0
        return given

    def _outputs(self, values: np.ndarray) -> np.ndarray:
        if len(values) != self._batch:
            with silence():
                self._interpreter.resize_tensor_input(self._place, values.shape, strict=False)
                self._interpreter.allocate_tensors()
            self._batch = len(values)
        self._interpreter.set_tensor(self._place, values)
        self._interpreter.invoke()
        taken = self._interpreter.get_output_details()[0]
        outputs = self._interpreter.get_tensor(taken["index"])
        if outputs.shape[:1] != (len(values),):
            raise ValueError(f"{len(values)} inputs give outputs of the shape {outputs.shape}")
        scale, zero = taken["quantization"]
        return (outputs.astype(np.float32) - zero) * np.float32(scale) if scale else outputs.astype(np.float32)
