"""Tensors as bodies carry them: JSON lists and binary data, checked before they are anything else."""

import math
from collections.abc import Mapping
from itertools import chain

import numpy as np
import orjson

from hpcai_cli.errors import printable

MOST_JSON_VALUES = 2_000_000
"""In one body. Three bytes of JSON can take over seventy in memory, so that the bytes alone bound too little."""


class RequestError(Exception):
    """A request that gets no answer, told by an HTTP status and one sentence."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def parse_json(content: bytes) -> object:
    """Read JSON: UTF-8, no NaN or Infinity, at most 1,024 levels and MOST_JSON_VALUES values.

    Raises:
        RequestError: 400 where it is none, 413 where it is too large.
    """
    # A value takes a byte or more, so that the usual body needs no counting.
    if len(content) > MOST_JSON_VALUES and sum(map(content.count, (b",", b"[", b"{"))) > MOST_JSON_VALUES:
        raise RequestError(413, f"the JSON has more than {MOST_JSON_VALUES:,} values; expected fewer examples, or "
                           "their numbers as binary data")
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is no JSON: {printable(str(error))}") from None


def tensor(data: object, shape: tuple[int, ...], datatype: str) -> np.ndarray:
    """Return the numbers of JSON lists, nested as a shape is or flat, as uint8 or float32 of that shape.

    Args:
        datatype: UINT8 for whole numbers in [0, 255], FP32 for numbers that float32 holds.

    Raises:
        RequestError: 400 where they are not that.
    """
    numbers = _flat(data, shape)
    kinds = set(map(type, numbers))
    if datatype == "UINT8":
        try:
            if kinds != {int}:
                raise ValueError
            return np.frombuffer(bytes(numbers), np.uint8).reshape(shape)
        except ValueError:
            raise RequestError(400, "the data does not fit UINT8; expected whole numbers from 0 to 255") from None
    if not kinds <= {int, float}:
        raise RequestError(400, "the data does not fit FP32; expected numbers only")
    with np.errstate(over="ignore"):
        array = np.array(numbers, np.float64).astype(np.float32).reshape(shape)
    return _finite(array)


def binary_tensor(body: bytes, start: int, shape: tuple[int, ...], datatype: str) -> np.ndarray:
    """Return what lies in a body from `start` on as uint8 or float32 of a shape; uint8 is not copied.

    Raises:
        RequestError: 400 where there are not as many bytes as the shape says, or numbers that are not finite.
    """
    needed = math.prod(shape) * (1 if datatype == "UINT8" else 4)
    if len(body) - start != needed:
        raise RequestError(400, f"the binary data is not as long as the shape says; expected {needed:,} bytes behind "
                           f"the JSON; received: {len(body) - start:,}")
    if datatype == "UINT8":
        return np.frombuffer(body, np.uint8, offset=start).reshape(shape)
    # Behind JSON of any length, the numbers may lie where a processor does not read floats.
    return _finite(np.require(np.frombuffer(body, "<f4", offset=start), np.float32, "A").reshape(shape))


def packed(texts: list[str]) -> bytes:
    """Return texts as a BYTES tensor: of each its length in four bytes, little-endian, and its UTF-8."""
    encoded = [text.encode() for text in texts]
    return b"".join(len(text).to_bytes(4, "little") + text for text in encoded)


def shown(value: object) -> str:
    """Return a value of a request as it can stand in a message, at a cost that does not grow with it."""
    if type(value) is list:
        scalars = len(value) <= 8 and not {list, dict} & {*map(type, value)}
        return f"[{', '.join(map(shown, value))}]" if scalars else f"a list of {len(value):,}"
    if type(value) is dict:
        return f"an object of {len(value):,}"
    return printable(repr(value[:80] if type(value) is str else value))


def _flat(data: object, shape: tuple[int, ...]) -> list:
    """Return the elements of nested or flat lists, as many as the shape says."""
    if type(data) is not list:
        raise RequestError(400, f"the data is no list; received: {shown(data)}")
    if data and type(data[0]) is list:
        level = [data]
        for dim in shape:
            if {*map(type, level)} != {list} or {*map(len, level)} != {dim}:
                raise RequestError(400, f"the data is not nested as the shape says; expected {shown([*shape])}, or a "
                                   f"flat list of {math.prod(shape):,} numbers")
            level = list(chain.from_iterable(level))
        return level
    if len(data) != math.prod(shape):
        raise RequestError(400, f"the data is not as long as the shape says; expected {math.prod(shape):,} numbers; "
                           f"received: {len(data):,}")
    return data


def _finite(array: np.ndarray) -> np.ndarray:
    if not np.isfinite(array).all():
        raise RequestError(400, "the data holds what is no finite float32; expected finite numbers only")
    return array
