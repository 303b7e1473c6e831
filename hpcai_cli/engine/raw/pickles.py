"""Reads plain data and numpy arrays from a pickle without running it.

A pickle is a program: Python's own machine imports what it names and calls it. The one below knows containers, numbers,
texts and arrays; nothing in a file is imported or called, and no size in a file is believed.
"""

import math
import pickletools
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hpcai_cli.engine.raw.idx import looks_like_html
from hpcai_cli.errors import DataError

MAX_BYTES = 256 * 2**20
"""Largest pickle that is read. CIFAR-100's training half, the largest of the family, has 155 MB."""

MAX_OPCODES = 1_000_000
"""Steps of one pickle. CIFAR-100's training half takes 300,000."""

MAX_KEYS = 1000
"""Entries of one dictionary: keys can be chosen so that each new one collides with all before it."""

_DTYPES = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
           "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "MARK": lambda: _MARK}


class _Array:
    """An array that the pickle has announced but not filled yet, and the array once it has."""

    values: np.ndarray | None = None


class _Dtype:
    """A dtype: a name such as u1, and the byte order that a second step sets."""

    def __init__(self, name: object):
        self.name, self.order = _text(name), "<"

    def numpy(self) -> np.dtype:
        name = self.name.lstrip("|<>=")
        if name not in _DTYPES or self.order not in ("|", "<", ">", "="):
            raise ValueError(f"an array has the type {self.name[:20]!r}, where plain numbers are read")
        return np.dtype(self.order + name)


class _Global(str):
    """The name of something importable, which is never imported."""


_NDARRAY, _DTYPE, _ENCODE = _Global("numpy.ndarray"), _Global("numpy.dtype"), _Global("_codecs.encode")
_BYTES = _Global("__builtin__.bytes")
_RECONSTRUCT = {_Global(f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")}
_FROM_BUFFER = {_Global(f"numpy.{core}.numeric._frombuffer") for core in ("core", "_core")}
ALLOWED = {_NDARRAY, _DTYPE, _ENCODE, _BYTES} | _RECONSTRUCT | _FROM_BUFFER
"""All names that a file may hold; each stands for a few lines below."""


def read_pickle(path: Path) -> object:
    """Read a pickle of protocol 2 to 5, as Python 2 or 3 wrote it.

    Returns:
        Dictionaries, lists, tuples, numbers, texts (Python 2's byte strings as latin-1 texts), bytes, and read-only
        arrays of numbers.

    Raises:
        DataError: the file is no pickle, broken, too large, or holds anything else; nothing of it has been run.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise DataError("the pickle is too large", expected=f"at most {MAX_BYTES:,} bytes",
                        received=f"{size:,} in {path}")
    if not size:
        raise _broken("the file is empty", path)
    with open(path, "rb") as file:
        head = file.read(64)
        file.seek(0)
        if looks_like_html(head):
            raise _broken("the file is a web page (HTML), as a dead mirror or a login page sends it", path)
        if not re.match(rb"\x80[\x02-\x05]", head):
            raise _broken("the file is no pickle of protocol 2 to 5", path)
        try:
            return _Machine(path).run(_Clipped(file, size))
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise _broken(f"the pickle is truncated, damaged or holds more than numbers, texts and arrays ({error})",
                          path) from None


class _Clipped:
    """A file whose reads are cut to what is there: Python takes the memory for a read before it knows."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size, self.readline = file, size, file.readline

    def read(self, count: int) -> bytes:
        return self.file.read(count if count < 65_536 else min(count, self.size - self.file.tell()))


class _Machine:
    """The stack and the memo of one pickle that is being read."""

    def __init__(self, path: Path):
        self.path, self.stack, self.memo = path, [], {}

    def run(self, content: "_Clipped") -> object:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if number >= MAX_OPCODES:
                raise ValueError(f"it has more than {MAX_OPCODES:,} steps")
            if opcode.name == "STOP":
                return _plain(self.stack.pop())
            self.step(opcode.name, argument)
            del argument  # not to hold two large texts at a time
        raise ValueError("its end is missing")

    def step(self, name: str, argument) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            stack.append(tuple(self.take(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("APPEND", "APPENDS"):
            items = self.take(1) if name == "APPEND" else self.marked()
            _typed(stack[-1], list).extend(_plain(item) for item in items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.take(2) if name == "SETITEM" else self.marked()
            _set_items(_typed(stack[-1], dict), items)
        elif name == "GLOBAL":
            self.name(*argument.split(" ", 1))
        elif name == "STACK_GLOBAL":
            self.name(*self.take(2))
        elif name == "REDUCE":
            function, arguments = self.take(2)
            stack.append(_called(_typed(function, _Global), _typed(arguments, tuple)))
        elif name == "BUILD":
            target, state = self.take(2)
            stack.append(_built(target, _typed(state, tuple)))
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it uses {name}")

    def take(self, count: int) -> list:
        if len(self.stack) < count:
            raise ValueError("its stack is empty")
        items = self.stack[len(self.stack) - count:]
        del self.stack[len(self.stack) - count:]
        return items

    def marked(self) -> list:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def name(self, module: object, name: object) -> None:
        named = _Global(f"{_text(module)}.{_text(name)}")
        if named not in ALLOWED:
            raise DataError(f"the pickle names {str(named)[:80]!r}, which a reader of pickles would import and run",
                            expected="numbers, texts, lists, dictionaries and numpy arrays only",
                            mend="do not trust this file", received=str(self.path))
        self.stack.append(named)


def _called(function: _Global, arguments: tuple) -> object:
    """Return what a call stands for, without calling it."""
    if function == _DTYPE:
        return _Dtype(arguments[0])
    if function in _RECONSTRUCT:
        return _Array()
    if function == _ENCODE and arguments[1:] == ("latin1",):
        return _text(arguments[0]).encode("latin-1")
    if function == _BYTES and not arguments:
        return b""
    if function in _FROM_BUFFER:
        content, dtype, shape, order = arguments
        return _filled(_Array(), shape, dtype, order == "F", content)
    raise ValueError(f"it calls {function}")


def _built(target: object, state: tuple) -> object:
    """Finish a dtype or an array with the state that numpy wrote for it."""
    if isinstance(target, _Dtype):
        target.order = _text(state[1])
        return target
    _, shape, dtype, is_fortran, content = state
    return _filled(_typed(target, _Array), shape, dtype, is_fortran, content)


def _filled(array: _Array, shape: object, dtype: object, is_fortran: object, content: object) -> _Array:
    if isinstance(content, str):
        content = content.encode("latin-1")
    kind, shape = _typed(dtype, _Dtype).numpy(), _typed(shape, tuple)
    if len(shape) > 8 or not all(isinstance(size, int) and 0 <= size <= MAX_BYTES for size in shape):
        raise ValueError("an array has an impossible shape")
    if not isinstance(content, bytes | bytearray) or math.prod(shape) * kind.itemsize != len(content):
        raise ValueError(f"an array of {kind} {shape} has another number of bytes")
    array.values = np.frombuffer(bytes(content), kind).reshape(shape, order="F" if is_fortran else "C")
    return array


def _set_items(target: dict, items: list) -> None:
    if len(items) % 2 or len(target) + len(items) // 2 > MAX_KEYS:
        raise ValueError(f"a dictionary has half an entry, or more than {MAX_KEYS:,}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # A tuple as a key could take forever to hash, holding the same tuple twice at each level.
        target[key.decode("latin-1") if isinstance(key, bytes) else _text(key)] = _plain(value)


def _plain(value: object) -> object:
    """Put the array in the place of what it was built in; the machine's own things are no values."""
    if isinstance(value, _Array) and value.values is not None:
        return value.values
    if value is _MARK or isinstance(value, _Array | _Dtype | _Global):
        raise ValueError("it holds something unfinished")
    return value


def _typed(value: object, kind: type):
    if not isinstance(value, kind):
        raise ValueError(f"it has {type(value).__name__} in the place of {kind.__name__}".replace("_", ""))
    return value


def _text(value: object) -> str:
    # A _Global is a str too, and no text of the file's.
    if type(value) is not str:
        raise ValueError(f"it has {type(value).__name__} in the place of a text")
    return value


def _broken(what: str, path: Path) -> DataError:
    return DataError(what, expected="a pickle of numbers, texts and arrays", mend="fetch the file again",
                     received=str(path))
