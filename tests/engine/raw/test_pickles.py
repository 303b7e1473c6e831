"""Pickles are read without being run: plain data and arrays come back as they were, anything else is refused."""

import contextlib
import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from hpcai_cli.engine.raw import pickles
from hpcai_cli.errors import DataError


def read(folder, content: bytes):
    (folder / "file").write_bytes(content)
    return pickles.read_pickle(folder / "file")


def refused(folder, content: bytes, *words: str) -> None:
    """Assert exit code 3 and one readable line that has the file's name and all the words."""
    with pytest.raises(DataError) as caught:
        read(folder, content)
    text = str(caught.value)
    assert text.isprintable()
    for word in (*words, str(folder / "file")):
        assert word in text, text


@contextlib.contextmanager
def little_memory():
    """Assert that what runs within takes less than 128 MiB, however much the file declares."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", [
    {"a": [1, -2, 2**40, 0.5, True, None, "K\u00e4se", b"\0\xff"], "b": ((), (1,), (1, 2, 3, 4)), "c": {}},
    list(range(3000)),
    {str(number): number for number in range(900)},
])
def test_plain_data_come_back(tmp_path, protocol, value):
    assert read(tmp_path, pickle.dumps(value, protocol)) == value


def test_the_same_object_twice_is_one_object(tmp_path):
    shared = ["text"]
    first, second = read(tmp_path, pickle.dumps([shared, shared], 4))
    assert first is second


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("array", [
    np.arange(12, dtype=np.uint8).reshape(3, 4), np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(5, dtype=">i4"), np.array(7, np.int64), np.zeros((0, 3), np.float32), np.array([True, False]),
    np.arange(8).reshape(2, 2, 2)[:, ::-1],
], ids=str)
def test_arrays_come_back(tmp_path, protocol, array):
    read_back = read(tmp_path, pickle.dumps({"data": array}, protocol))["data"]
    assert read_back.dtype == array.dtype
    np.testing.assert_array_equal(read_back, array)


@pytest.mark.parametrize(("content", "words"), [
    (b"", ["empty"]),
    (b"<html>gone", ["HTML"]),
    (b"\x80", ["no pickle"]),
    (pickle.dumps([1], 0), ["protocol 2 to 5"]),
    (pickle.dumps([1] * 100, 4)[:-1], ["truncated"]),
    (pickle.dumps(np.array([None, "x"], object), 4), ["'O8'"]),
    (pickle.dumps(np.zeros(3, "U5"), 4), ["'U5'"]),
    (pickle.dumps(np.zeros(3, "M8[s]"), 4), ["'M8'"]),
    (pickle.dumps({1: 2}, 4), ["int in the place of a text"]),
    (pickle.dumps({1, 2}, 4), ["EMPTY_SET"]),
    (pickle.dumps(np.zeros(3, np.uint8), 2).replace(b"K\x03\x85", b"K\x04\x85", 1), ["another number of bytes"]),
])
def test_what_is_no_plain_data(tmp_path, content, words):
    refused(tmp_path, content, *words)


class Runs:
    """An object whose pickle calls something when it is loaded."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("hostile", "named"), [
    (Runs(os.mkdir, "proof"), f"{os.mkdir.__module__}.mkdir"),
    (Runs(eval, "__import__('os').mkdir('proof')"), "eval"),
    (Runs(np.load, "proof"), "numpy"),
    (io.BytesIO, "BytesIO"),
])
def test_nothing_is_run(tmp_path, protocol, hostile, named):
    refused(tmp_path, pickle.dumps({"data": np.arange(3), "more": hostile}, protocol), named, "do not trust this file")
    assert not os.path.exists("proof")


NUMPY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"


@pytest.mark.parametrize("content", [
    NUMPY + b"\x8a\x06\0\0\0\0\0\x10\x85U\x01bt R.",  # an array of 2**44 bytes
    b"\x8e" + struct.pack("<Q", 2**40) + b"short.",  # bytes that declare a terabyte
    b"T" + struct.pack("<i", 2**31 - 1) + b"short.",
    b"U\x01aq\x00" + b"h\x00h\x00\x86q\x00" * 500 + b"q\x01}h\x01Ns.",  # a key that takes 2**500 steps to hash
    b"N" * 1_000_001 + b".",
    b"}(" + b"".join(b"X" + struct.pack("<I", 6) + b"%06d" % n + b"N" for n in range(5000)) + b"u.",
    b"\x80\x02" * 50 + b"0000.",
    b"(.",
    b"R.",
    b"b.",
    b"\x82\x01.",  # the registry of extensions
    b"P123\n.",  # something persistent outside the file
    b"ios\nsystem\n(.",
], ids=range(13))
def test_bombs_take_no_memory_and_no_time(tmp_path, content):
    with little_memory():
        refused(tmp_path, b"\x80\x02" + content)


@pytest.mark.parametrize("content", [
    b"\x95" + struct.pack("<Q", 2**40) + b"N.",  # a frame that declares a terabyte
    b"Nr\xff\xff\xff\x7f.",  # a memo of two billion places
    b"]" * 100_000 + b"a" * 99_999 + b".",  # a hundred thousand lists, each in the one before
], ids=["frame", "memo", "nesting"])
def test_what_is_declared_and_not_used_takes_no_memory(tmp_path, content):
    with little_memory():
        read(tmp_path, b"\x80\x02" + content)
