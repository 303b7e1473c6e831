"""The Open Inference Protocol v2 (KServe, Triton) as functions: bodies to arrays, scores to bodies."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import orjson

from hpcai_cli import __version__
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.tensors import RequestError, binary_tensor, packed, parse_json, shown, tensor

HEADER_LENGTH = "Inference-Header-Content-Length"
"""HTTP header with the bytes of JSON in a body that goes on with binary data."""
LONGEST_ID = 128
"""Characters of a request's id."""
DATATYPES = {"images": "UINT8", "features": "FP32"}
_ELSEWHERE = ("classification", "shared_memory_region")
"""Parameters of Triton that would change what is read or answered, so that they cannot be passed over."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    most_bytes: int = 32 << 20
    """Bytes of a body, unpacked."""
    most_examples: int = 1024
    """Examples in one request."""
    most_pixels: int = 64_000_000
    """Width times height of an image file, read from its header."""


LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class InferRequest:
    """What a body of the protocol asks for."""

    id: str
    """As the client gave it, or empty."""
    inputs: np.ndarray
    """As stored: uint8 (n, height, width, channels) or finite float32 (n, features); C-contiguous, may be read-only."""
    outputs: tuple[str, ...]
    """Names in the order in which they are wanted."""
    binary: frozenset[str]
    """Those of them that are given as binary data."""


def parse_infer(artefact: Artefact, body: bytes, header_length: str | None, limits: Limits = LIMITS) -> InferRequest:
    """Read and check the body of an inference request; an image in binary is not copied.

    Protocol: https://github.com/kserve/open-inference-protocol, and for the binary data
    https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md

    Args:
        header_length: value of the header Inference-Header-Content-Length; None where there is none.

    Raises:
        RequestError: 413 for more than the limits, 400 for whatever else the model cannot take.
    """
    if len(body) > limits.most_bytes:
        raise RequestError(413, f"the body has {len(body):,} bytes; expected at most {limits.most_bytes:,}")
    start = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) < 12
                and int(header_length) <= len(body)):
            raise RequestError(400, f"the header {HEADER_LENGTH} is not the length of the JSON; expected 0 to "
                               f"{len(body)}; received: {shown(header_length)}")
        start = int(header_length)
    document = parse_json(body[:start])
    if type(document) is not dict:
        raise RequestError(400, f"the JSON is no inference request; expected an object; received: {shown(document)}")
    name = document.get("id", "")
    if type(name) is not str or len(name) > LONGEST_ID or not name.isprintable():
        raise RequestError(400, f"the id cannot be used; expected at most {LONGEST_ID} printable characters; "
                           f"received: {shown(name)}")
    outputs, binary = _requested(output_names(artefact), document)
    return InferRequest(name, _read_input(artefact, document, body, start, limits), outputs, binary)


def render_infer(artefact: Artefact, request: InferRequest, scores: np.ndarray, *, version: str,
                 request_id: str) -> tuple[bytes, dict[str, str]]:
    """Return the body and the HTTP headers that answer a request.

    Args:
        scores: float32 (n, columns), the logits of a classification or the number of a regression.
        request_id: the id of the answer where the client gave none; empty for no id.

    Raises:
        RequestError: 500 where a score is no number, for which JSON has no word.
    """
    check_scores(artefact, scores)
    names = artefact.class_names
    chances = probabilities(scores) if names else scores
    outputs, parts = [], []
    for name in request.outputs:
        output = {"name": name, "datatype": "BYTES" if name == "label" else "FP32", "shape": [*chances.shape]}
        if name == "label":
            output["shape"] = [len(scores)]
            data = [names[place] for place in winners(artefact, scores, chances)]
        else:
            data = np.ascontiguousarray(chances, np.float32).reshape(-1)
        if name in request.binary:
            parts.append(packed(data) if name == "label" else data.astype("<f4", copy=False).tobytes())
            output["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            output["data"] = data
        outputs.append(output)
    said = {"model_name": artefact.name, "model_version": version, "outputs": outputs}
    if answered := request.id or request_id:
        said["id"] = answered
    head = orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)
    if not parts:
        return head, {"Content-Type": "application/json"}
    return b"".join((head, *parts)), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def check_scores(artefact: Artefact, scores: np.ndarray) -> None:
    """Raise RequestError, 500, where one of the scores (n, columns) is no number."""
    assert scores.ndim == 2 and scores.shape[1] == artefact.columns, scores.shape
    if not np.isfinite(scores).all():
        raise RequestError(500, "the model's answer is no number")


def probabilities(scores: np.ndarray) -> np.ndarray:
    """Return the softmax of finite logits (n, classes) in float64, rounded as `hpcai predict` does it."""
    shifted = scores.astype(np.float64) - scores.max(axis=1, keepdims=True)
    return np.exp(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def winners(artefact: Artefact, scores: np.ndarray, chances: np.ndarray) -> list[int]:
    """Return the column of each row's answer, by the logits and their probabilities, both (n, classes)."""
    threshold = artefact.decision_threshold
    return (scores.argmax(axis=1) if threshold is None else (chances[:, 1] >= threshold).astype(int)).tolist()


def server_metadata(extensions: Iterable[str]) -> dict:
    """Return what the protocol says of a server at /v2."""
    return {"name": "hpcai", "version": __version__, "extensions": [*extensions]}


def model_metadata(artefact: Artefact, versions: Iterable[str]) -> dict:
    """Return what the protocol says of a model; -1 stands for the number of examples."""
    inputs = {"name": artefact.inputs, "datatype": DATATYPES[artefact.inputs], "shape": [-1, *artefact.input_shape]}
    outputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} if name == "label" else
               {"name": name, "datatype": "FP32", "shape": [-1, artefact.columns]} for name in output_names(artefact)]
    return {"name": artefact.name, "versions": [*versions], "platform": artefact.kind, "inputs": [inputs],
            "outputs": outputs}


def output_names(artefact: Artefact) -> tuple[str, ...]:
    """Return the names of the tensors that a model answers."""
    return ("probabilities", "label") if artefact.document["class_names"] else ("value",)


# ---- Parts of a request ----------------------------------------------------------------------------------------------


def _requested(known: tuple[str, ...], document: dict) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the outputs that are wanted and those of them that are wanted in binary."""
    all_binary = _flag(_parameters(document, "the request"), "binary_data_output", False)
    wanted = document.get("outputs", [])
    if type(wanted) is not list:
        raise RequestError(400, f"the outputs are no list; received: {shown(wanted)}")
    if not wanted:
        return known, frozenset(known if all_binary else ())
    names, binary = [], set()
    for output in wanted:
        name = output.get("name") if type(output) is dict else None
        if type(name) is not str or name not in known or name in names:
            why = "is asked for twice" if name in names else "does not exist"
            raise RequestError(400, f"an output {why}; expected {' or '.join(known)}, each once; "
                               f"received: {shown(name)}")
        names.append(name)
        if _flag(_parameters(output, f"the output {name!r}"), "binary_data", all_binary):
            binary.add(name)
    return tuple(names), frozenset(binary)


def _read_input(artefact: Artefact, document: dict, body: bytes, start: int, limits: Limits) -> np.ndarray:
    """Return the one input tensor, from its JSON or from the bytes of the body from `start` on."""
    given, name, datatype = document.get("inputs"), artefact.inputs, DATATYPES[artefact.inputs]
    if type(given) is not list or len(given) != 1 or type(given[0]) is not dict:
        raise RequestError(400, f"the inputs are not the model's; expected one tensor, {name!r}; "
                           f"received: {shown(given)}")
    entry = given[0]
    for key, expected in (("name", name), ("datatype", datatype)):
        if entry.get(key) != expected:
            raise RequestError(400, f"the input's {key} is not the model's; expected {expected!r}; "
                               f"received: {shown(entry.get(key))}")
    shape = _read_shape(entry.get("shape"), artefact.input_shape, limits)
    parameters = _parameters(entry, f"the input {name!r}")
    if ("binary_data_size" in parameters) == ("data" in entry):
        raise RequestError(400, "the input needs either data or the parameter binary_data_size")
    if "data" in entry:
        if start != len(body):
            raise RequestError(400, f"{len(body) - start:,} bytes behind the JSON belong to no input")
        return tensor(entry["data"], shape, datatype)
    size = parameters["binary_data_size"]
    if type(size) is not int or size != len(body) - start:
        raise RequestError(400, f"binary_data_size is not the length of what follows the JSON; expected "
                           f"{len(body) - start}; received: {shown(size)}")
    return binary_tensor(body, start, shape, datatype)


def _read_shape(shape: object, example: tuple[int, ...], limits: Limits) -> tuple[int, ...]:
    """Return the shape that a request gives, which is (n, *example) with an n within the limits."""
    if (type(shape) is not list or len(shape) != len(example) + 1 or {*map(type, shape)} != {int}
            or tuple(shape[1:]) != example or shape[0] < 1):
        raise RequestError(400, f"the input's shape is not the model's; expected [n, {', '.join(map(str, example))}] "
                           f"with n from 1 to {limits.most_examples}; received: {shown(shape)}")
    if shape[0] > limits.most_examples:
        raise RequestError(413, f"the request has too many examples; expected at most {limits.most_examples:,}; "
                           f"received: {shape[0]:,}")
    return tuple(shape)


def _parameters(entry: dict, where: str) -> dict:
    """Return the parameters of an object of the request, all of which may be passed over."""
    found = entry.get("parameters", {})
    if type(found) is not dict:
        raise RequestError(400, f"the parameters of {where} are no object; received: {shown(found)}")
    for name in _ELSEWHERE:
        if name in found:
            raise RequestError(400, f"the parameter {name!r} of {where} is not supported here")
    return found


def _flag(parameters: dict, name: str, otherwise: bool) -> bool:
    value = parameters.get(name, otherwise)
    if type(value) is not bool:
        raise RequestError(400, f"the parameter {name!r} is neither true nor false; received: {shown(value)}")
    return value
