"""Opens ONNX files, which may come from strangers: a file refers to nothing outside it and has standard operators only.

ONNX lets a tensor name another file, or a place in memory, as where its values are, and some operators of ONNX
Runtime's own open files.
"""

from collections.abc import Callable, Iterable

import numpy as np

from hpcai_cli.errors import DataError, MissingError, printable

DOMAINS = {"", "ai.onnx", "ai.onnx.ml"}
"""Where the operators that the standard defines are from."""
PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
"""What runs a model, the first of them that is installed and finds its device; each takes over what the one before
lacks."""
TYPES = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}
"""Inputs that stored examples can become."""


def runner(content: bytes, *, threads: int) -> tuple[Callable[[np.ndarray], np.ndarray], tuple, np.dtype]:
    """Return the model's inference, inputs (b, ...) -> outputs, and shape and type of what it takes.

    In the shape None stands for any size.

    Raises:
        DataError: the file is broken, or has what is not allowed.
        MissingError: onnx or onnxruntime is not installed.
    """
    model = check(content)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    # Its own format is another door, which nothing has checked.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        # Written again, so that what runs is what was checked, however the two would read the same bytes.
        session = onnxruntime.InferenceSession(model.SerializeToString(), options,
                                               providers=providers_of(onnxruntime.get_available_providers()))
        if (len(session.get_inputs()), len(session.get_outputs())) != (1, 1):
            raise ValueError(f"it has the inputs {', '.join(given.name for given in session.get_inputs())} and "
                             f"{len(session.get_outputs())} outputs")
        (given,), (taken,) = session.get_inputs(), session.get_outputs()
        if given.type not in TYPES:
            raise ValueError(f"it takes {given.type}, where uint8 or float32 is expected")
    except Exception as error:
        raise _unusable(error) from None
    shape = tuple(dim if isinstance(dim, int) and dim > 0 else None for dim in given.shape)
    return lambda inputs: session.run([taken.name], {given.name: inputs})[0], shape, TYPES[given.type]


def check(content: bytes):
    """Return the model in a file that refers to nothing outside it and has standard operators only, an onnx.ModelProto.

    Raises:
        DataError: the file is broken, or has what is not allowed.
        MissingError: onnx or onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingError("ONNX files need packages of their own", expected="onnx and onnxruntime",
                           mend="run `pip install 'hpcai[onnx]'`", received=error.name or str(error)) from None
    try:
        model = onnx.load_model_from_string(content)
        _check(model)
        onnx.checker.check_model(model)
        return model
    except Exception as error:
        raise _unusable(error) from None


def _unusable(error: Exception) -> DataError:
    first_line = (str(error).strip() or type(error).__name__).split("\n")[0]
    return DataError(f"this ONNX file cannot be used: {printable(first_line)}",
                     expected="one input, one output, standard operators and all weights in the file")


def providers_of(available: Iterable[str]) -> list[str]:
    """Return those of PROVIDERS that are available, in their order."""
    return [name for name in PROVIDERS if name in set(available)]


def _check(model) -> None:
    """Refuse values outside the file and operators that are not the standard's, in every graph within the model."""
    own = {(function.domain, function.name) for function in model.functions}
    pending = [model]
    while pending:
        message = pending.pop()
        kind = message.DESCRIPTOR.name
        if kind == "TensorProto":
            if message.data_location or message.external_data:
                raise ValueError(f"its tensor {message.name!r} is outside the file")
            continue
        if kind == "NodeProto" and message.domain not in DOMAINS and (message.domain, message.op_type) not in own:
            raise ValueError(f"it has the operator {message.domain}.{message.op_type}, which is not the standard's")
        for field, value in message.ListFields():
            if field.message_type is not None:
                pending += [value] if hasattr(value, "DESCRIPTOR") else value
