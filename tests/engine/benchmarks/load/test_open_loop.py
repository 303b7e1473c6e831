"""The open-loop client counts what it sent and what came back, and sees a queue that a closed loop would not."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hpcai_cli.engine.benchmarks.load import open_loop
from hpcai_cli.errors import HpcaiError

pytestmark = pytest.mark.alone


@pytest.fixture
def server():
    """Answer each path: /slow after 0.2 s, /refused with 503, /gone by closing."""
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/gone":
                self.close_connection = True
                return
            if self.path == "/slow":
                with lock:
                    time.sleep(0.2)
            self.send_response(503 if self.path == "/refused" else 200)
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *words):
            pass

    lock = threading.Lock()
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running.server_port
    running.shutdown()
    running.server_close()


def driven(port: int, path: str, **asked) -> open_loop.Outcome:
    return open_loop.drive(port, open_loop.request_of(path, b"body", {"X-A": "b"}), **asked)


def test_all_that_is_sent_is_answered(server):
    outcome = driven(server, "/quick", rate=50, seconds=1, connections=4)
    assert outcome.statuses == {200: 50} and len(outcome.seconds) == 50
    assert outcome.offered == 50 and outcome.answered == pytest.approx(50, rel=0.2)


def test_the_time_in_the_queue_counts(server):
    # One second of work for each second: five of ten are due before the first answers are there.
    outcome = driven(server, "/slow", rate=10, seconds=1, connections=2)
    assert outcome.statuses == {200: 10}
    assert outcome.percentile(99) > 700
    assert outcome.answered == pytest.approx(5, rel=0.3)


def test_other_answers_and_none(server):
    assert driven(server, "/refused", rate=20, seconds=0.5, connections=2).statuses == {503: 10}
    assert driven(server, "/gone", rate=20, seconds=0.5, connections=2).statuses == {0: 10}


def test_nobody_there():
    with pytest.raises(HpcaiError, match="nothing answers on port 1"):
        driven(1, "/", rate=1, seconds=1)
