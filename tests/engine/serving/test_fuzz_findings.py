"""What tests/fuzz_server.py found, each as a case of its own."""

import contextlib
import socket

import pytest


@pytest.fixture(scope="module")
def served(exports, kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    with kit.server(folder, exports.write(folder / "tiny")) as served:
        yield served


@pytest.mark.parametrize("method", ["HEAD", "PUT"])
def test_a_refusal_comes_at_once_and_is_not_lost_to_what_is_broken_behind_it(served, method):
    with socket.create_connection(("127.0.0.1", served.port), timeout=3) as client:
        client.sendall(f"{method} /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        assert client.recv(4096).startswith(b"HTTP/1.1 405 ")
    for _ in range(50):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
            client.sendall(f"{method} /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
            with contextlib.suppress(ConnectionError):
                client.sendall(b"no length\r\n")
            assert client.recv(4096).startswith((b"HTTP/1.1 405 ", b"HTTP/1.1 400 "))
