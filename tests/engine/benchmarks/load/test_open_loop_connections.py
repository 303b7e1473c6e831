"""What the open-loop client tells of each answer, and what it does when a server closes connections or goes away."""

import contextlib
import socket
import threading

import pytest

from hpcai_cli.engine.benchmarks.load import open_loop

pytestmark = pytest.mark.alone


@pytest.fixture
def serve():
    """Return what starts a server and returns its port.

    It answers each request on a connection as a function says, closes the connection after so many answers, and is gone
    after so many clients.
    """
    listeners = []

    def start(answer, *, most: float = float("inf"), clients: float = float("inf")) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def accept() -> None:
            taken = 0
            with listener, contextlib.suppress(OSError):
                while taken < clients:
                    made, _ = listener.accept()
                    taken += 1
                    threading.Thread(target=talk, args=(made,), daemon=True).start()

        def talk(made: socket.socket) -> None:
            with made, contextlib.suppress(OSError):
                count = 0
                while count < most and (asked := made.recv(4096)) and (said := answer(asked, count)):
                    made.sendall(said)
                    count += 1
        threading.Thread(target=accept, daemon=True).start()
        return listener.getsockname()[1]
    yield start
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def answered(body: bytes = b"", status: int = 200, *lines: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 %d X" % status, b"Content-Length: %d" % len(body), *lines, b"", body])


def test_requests_take_turns_and_each_answer_is_told(serve):
    port, heard = serve(lambda asked, _: answered(asked[:1])), []
    outcome = open_loop.drive(port, [b"a\r\n", b"b\r\n", b"c\r\n"], rate=200, seconds=0.3, connections=4,
                              heard=heard.append)
    assert outcome.statuses == {200: 60} and outcome.offered == 200 and len(outcome.seconds) == 60
    assert sorted(answer.number for answer in heard) == [*range(60)]
    assert all(answer.content.endswith(b"abc"[answer.number % 3:][:1]) for answer in heard)
    assert sum(answer.is_first for answer in heard) == len({answer.port for answer in heard}) == 4


@pytest.mark.parametrize(("way", "unanswered"), [("in words", 0), ("while idle", 3), ("in silence", 10)])
def test_a_connection_that_the_server_closes_is_opened_again(serve, way, unanswered):
    def answer(asked: bytes, count: int) -> bytes:
        if count == 2 and way != "while idle":
            return answered(b"", 200, b"Connection: close") if way == "in words" else b""
        return answered()
    heard = []
    outcome = open_loop.drive(serve(answer, most=3), b"a", rate=100, seconds=0.3, connections=1, heard=heard.append)
    assert sum(outcome.statuses.values()) == 30 and len({answer.port for answer in heard}) == 10
    # A request may be on its way while the server closes.
    assert outcome.statuses.get(0, 0) <= unanswered
    assert way != "in silence" or [answer.status for answer in heard[:6]] == [200, 200, 0, 200, 200, 0]


def test_a_server_that_goes_away_has_not_taken_what_comes_later(serve):
    port = serve(lambda asked, count: answered(), most=5, clients=1)
    heard = []
    outcome = open_loop.drive(port, b"a", rate=100, seconds=0.2, connections=1, heard=heard.append)
    assert outcome.statuses == {200: 5, 0: 15}
    lost = [answer for answer in heard if not answer.status]
    assert sum(answer.is_first and not answer.content for answer in lost) >= 14
