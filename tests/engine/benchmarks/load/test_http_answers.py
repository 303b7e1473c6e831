"""Answers of HTTP are whole when they are: by length, in chunks, with the connection's end."""

import pytest

from hpcai_cli.engine.benchmarks.load.http_answers import head_of


def whole_at(answer: bytes) -> int | None:
    """Return after how many bytes an answer is whole while the connection is open."""
    for count in range(len(answer) + 1):
        head = head_of(answer[:count])
        if head is not None and head.is_whole(answer[:count]):
            return count
    return None


def answer(*lines: bytes, body: bytes = b"", version: bytes = b"1.1", status: int = 200) -> bytes:
    return b"\r\n".join([b"HTTP/%b %d OK" % (version, status), *lines, b"", body])


@pytest.mark.parametrize("said", [
    answer(b"Content-Length: 5", body=b"hello"),
    answer(b"Inference-Header-Content-Length: 2", b"content-length:5 ", body=b"hello"),
    answer(b"Content-Length: 0"),
    answer(b"Transfer-Encoding: chunked", body=b"5\r\nhello\r\n0\r\n\r\n"),
    answer(b"transfer-encoding: gzip, chunked", body=b"a;x=y\r\n0\r\n\r\n12345\r\n1\r\n.\r\n0\r\nTrailer: 1\r\n\r\n"),
    answer(b"Server: x", status=204),
    answer(b"Content-Length: 7", status=304)])
def test_an_answer_is_whole_with_its_last_byte(said):
    assert whole_at(said) == len(said)
    assert head_of(said).is_whole(said + b"HTTP/1.1 200 the next")


def test_without_a_length_it_ends_with_the_connection():
    said = answer(b"Server: x", body=b"hello")
    assert whole_at(said) is None
    assert head_of(said).is_last and head_of(said).is_whole(said, ended=True)


@pytest.mark.parametrize(("said", "is_last"), [
    (answer(b"Content-Length: 0"), False),
    (answer(b"Content-Length: 0", b"Connection: Close"), True),
    (answer(b"Content-Length: 0", version=b"1.0"), True),
    (answer(b"Content-Length: 0", b"connection: Keep-Alive", version=b"1.0"), False)])
def test_whether_the_connection_stays_open(said, is_last):
    assert head_of(said).is_last is is_last


@pytest.mark.parametrize("said", [b"SSH-2.0-x\r\n", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\x15\x03\x01"])
def test_what_is_no_answer(said):
    with pytest.raises(ValueError):
        head_of(said)


@pytest.mark.parametrize("chunks", [b"zz\r\n", b"-5\r\nhello\r\n"])
def test_what_are_no_chunks(chunks):
    said = answer(b"Transfer-Encoding: chunked", body=chunks)
    with pytest.raises(ValueError):
        head_of(said).is_whole(said)
