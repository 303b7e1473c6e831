"""Random requests of what a model takes by the Open Inference Protocol v2, in JSON or with binary tensors.

Binary tensors: https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from hpcai_cli.engine.benchmarks.load.open_loop import request_of
from hpcai_cli.engine.benchmarks.load.protocol_client import TYPES, Model, Server, Tensor
from hpcai_cli.errors import UsageError, printable

BINARY_ONLY = ("FP16", "BF16")
"""Datatypes that JSON has no numbers for."""
DIFFERENT = 16
"""Requests, so that a server that remembers answers is not measured by one."""
MOST_BYTES = 256 << 20
"""Of all requests together."""


def requests_for(server: Server, model: Model, *, shapes: Mapping[str, Sequence[int]], batch: int,
                 binary: bool) -> list[bytes]:
    """Return different requests with random inputs, as they go over the wire.

    Whole numbers are from 0 to 99 (UINT8: to 255), others normally distributed.

    Args:
        shapes: by name of an input, where the server leaves its shape open.
        batch: examples in a request, where an input begins with any number of them.
        binary: whether tensors are bytes behind the JSON, not numbers in it.

    Raises:
        UsageError: a shape is open, is not the server's, or takes more than MOST_BYTES, or a datatype is none of JSON.
    """
    if unknown := set(shapes) - {tensor.name for tensor in model.inputs}:
        raise UsageError("the model has no such input", expected=", ".join(tensor.name for tensor in model.inputs),
                         received=", ".join(sorted(unknown)))
    if not binary and (kept := [tensor.datatype for tensor in model.inputs if tensor.datatype in BINARY_ONLY]):
        raise UsageError("JSON has no numbers of this datatype", expected="--tensors binary", received=kept[0])
    if batch > 1 and not any(tensor.shape[:1] == (-1,) for tensor in model.inputs):
        raise UsageError("the model takes one example at a time", expected="--batch-size 1", received=batch)
    full = {tensor: _full_shape(tensor, shapes.get(tensor.name), batch) for tensor in model.inputs}
    # A number takes at most some twenty characters.
    size = sum(prod(shape) * (np.dtype(TYPES[tensor.datatype]).itemsize if binary else 20)
               for tensor, shape in full.items())
    if size > MOST_BYTES:
        raise UsageError(f"a request takes {size / 1e6:,.0f} MB", expected=f"at most {MOST_BYTES / 1e6:,.0f}",
                         mend="give a smaller --batch-size or --shape",
                         received=", ".join(f"{tensor.name} {list(shape)}" for tensor, shape in full.items()))
    source, path = np.random.default_rng(0), f"{server.path}/v2/models/{urllib.parse.quote(model.name, safe='')}/infer"
    made = []
    for _ in range(max(1, min(DIFFERENT, MOST_BYTES // max(size, 1)))):
        body, headers = _body({tensor: _values(tensor.datatype, shape, source) for tensor, shape in full.items()},
                              binary)
        made.append(request_of(path, body, {**headers, **server.headers()}, server.host))
    return made


def _full_shape(tensor: Tensor, given: Sequence[int] | None, batch: int) -> tuple[int, ...]:
    shape = tensor.shape
    if given is None:
        given = (batch, *shape[1:]) if shape[:1] == (-1,) else shape
        if -1 in given:
            raise UsageError(f"the server leaves the shape of the input {printable(tensor.name)} open",
                             expected=f"--shape {printable(tensor.name)}=N,N,...", received=list(shape))
    if len(given) != len(shape) or any(own not in (-1, size) for own, size in zip(shape, given, strict=True)):
        raise UsageError(f"the input {printable(tensor.name)} has another shape", expected=str(list(shape)),
                         received=list(given))
    return tuple(given)


def _values(datatype: str, shape: tuple[int, ...], source: np.random.Generator) -> np.ndarray:
    kind = TYPES[datatype]
    if datatype == "BF16":
        return (source.normal(size=shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if datatype == "BYTES":
        return np.array([f"text {number}" for number in source.integers(0, 100, prod(shape))], object).reshape(shape)
    if datatype.startswith("FP"):
        return source.normal(size=shape).astype(kind)
    return source.integers(0, 2 if datatype == "BOOL" else 256 if datatype == "UINT8" else 100, shape).astype(kind)


def _body(values: Mapping[Tensor, np.ndarray], binary: bool) -> tuple[bytes, dict[str, str]]:
    """Return a body and its headers."""
    inputs, parts = [], []
    for tensor, array in values.items():
        entry = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(array.shape)}
        if binary:
            parts.append(_packed(array))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        inputs.append(entry)
    if not binary:
        return json.dumps({"inputs": inputs}).encode(), {"Content-Type": "application/json"}
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return b"".join((head, *parts)), {"Content-Type": "application/octet-stream",
                                      "Inference-Header-Content-Length": str(len(head))}


def _packed(array: np.ndarray) -> bytes:
    if array.dtype != np.object_:
        return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    # Each text behind its length.
    texts = [text.encode() for text in array.ravel()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)
