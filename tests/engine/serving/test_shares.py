"""Several workers share the clients, also those that keep their connections."""

import contextlib
import http.client
import os
import signal
import socket
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

ASK = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"


def shares(served) -> list[int]:
    """Return how many clients' connections each worker has."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ours = {row[9] for row in rows if int(row[1].partition(":")[2], 16) == served.port}
    found = []
    for pid in served.workers():
        links = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.add(os.readlink(descriptor))
        # One of them is the listening one.
        found.append(sum(f"socket:[{inode}]" in links for inode in ours) - 1)
    return found


@contextlib.contextmanager
def pool(served, count: int):
    with contextlib.ExitStack() as opened:
        clients = [opened.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
                   for _ in range(count)]
        for client in clients:
            client.sendall(ASK)
        for client in clients:
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        yield clients


@pytest.fixture(scope="module")
def served(exports, kit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shares")
    with kit.server(folder, exports.write(folder / "tiny"), "--workers", 2) as served:
        yield served


@pytest.mark.parametrize("count", [2, 8, 40])
def test_clients_that_come_together_go_to_all_workers(served, count):
    fair = []
    # A worker that the system keeps from running for some milliseconds gets no clients then, and rightly so.
    while fair.count(True) < 3 and len(fair) < 10:
        with pool(served, count):
            found = shares(served)
            assert sum(found) == count
            fair.append(min(found) >= count // 4)
        until(lambda: sum(shares(served)) == 0)
    assert fair.count(True) == 3


def test_nobody_waits_for_a_worker_that_does_not_come(served):
    stopped = served.workers()[0]
    os.kill(stopped, signal.SIGSTOP)
    try:
        begun = time.monotonic()
        with pool(served, 40):
            assert time.monotonic() - begun < 5
            assert shares(served) == [0, 40]
    finally:
        os.kill(stopped, signal.SIGCONT)


def test_a_worker_that_replaces_another_finds_clients(exports, kit, serve, tmp_path):
    with serve(exports.write(tmp_path / "tiny"), "--workers", 2) as served, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(contextlib.closing(served.client())) for _ in range(16)]
        ask_all(clients)
        before = served.workers()
        os.kill(before[0], signal.SIGKILL)
        until(lambda: len(set(served.workers()) - {before[0]}) == 2)
        failures = 0

        def is_shared() -> bool:
            nonlocal failures
            failures += ask_all(clients)
            return min(shares(served)) >= 4
        until(is_shared, 20)
        # Those of the one that was killed; who was sent to another worker has lost nothing.
        assert failures <= 16
        assert ask_all(clients) == 0 and sum(shares(served)) == 16


def ask_all(clients: list[http.client.HTTPConnection]) -> int:
    """Ask on every connection, which is opened again where it was closed; return how many got no answer."""
    failures = 0
    for client in clients:
        try:
            client.request("GET", "/v2/health/live")
            assert client.getresponse().read() == b'{"live":true}'
        except (OSError, http.client.HTTPException):
            client.close()
            failures += 1
    return failures


def until(holds, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
