"""Servers in processes of their own and real clients: what is hostile, what dies, what changes, what stops."""

import contextlib
import hashlib
import http.client
import json
import os
import random
import re
import resource
import signal
import socket
import ssl
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from hpcai_cli.engine.serving import server

pytestmark = pytest.mark.alone

INFER = "/v2/models/tiny/infer"
FORESEEN = {200, 400, 401, 404, 405, 408, 411, 413, 415, 431, 503}


@pytest.fixture(scope="module")
def shared(exports, kit, tmp_path_factory):
    """A server of two workers for the tests that leave it as it is."""
    folder = tmp_path_factory.mktemp("shared")
    exports.write(folder / "tiny")
    exports.write(folder / "shop", "shop")
    with kit.server(folder, folder / "tiny", folder / "shop", "--workers", 2, "--timeout", 1.5) as served:
        yield served
        assert served.process.poll() is None
        assert "ended:" not in served.said()


class Load:
    """Clients that ask for answers they know, one request after the other, until they are told to stop.

    Attributes:
        failed: what went wrong, one line each.
        right: answers by the model's seed.
    """

    def __init__(self, served, kit, clients: int = 4, path: str = INFER):
        self._served, self._kit, self._path = served, kit, path
        self._stop = threading.Event()
        self.failed, self.right, self.closed = [], {1: 0, 2: 0}, 0
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def wait_for(self, answers: int, seed: int = 1, failures: int = 0) -> None:
        wanted, end = self.right[seed] + answers, time.monotonic() + 30
        while self.right[seed] < wanted and time.monotonic() < end and len(self.failed) <= failures:
            time.sleep(0.01)
        assert self.right[seed] >= wanted, self.failed

    def _ask(self, number: int) -> None:
        with contextlib.closing(self._served.client()) as client:
            self._ask_with(client, random.Random(number), number)

    def _ask_with(self, client, source: random.Random, number: int) -> None:
        while not self._stop.is_set() and len(self.failed) < 5:
            pictures = self._kit.images(source.randint(1, 3), source.randrange(10**6))
            name, fresh = f"{number}-{source.randrange(10**9)}", client.sock is None
            try:
                client.request("POST", self._path, self._kit.infer_body(pictures, id=name))
                answer = client.getresponse()
                content = answer.read()
                if answer.status != 200:
                    self.failed.append(f"{answer.status}: {content[:200]}")
                    continue
                self._compare(content, pictures, name)
                if answer.getheader("connection") == "close":
                    self.closed += 1
            except Exception as error:
                # On a new connection, a server that has gone resets or refuses: nothing was taken.
                gone = fresh and isinstance(error, ConnectionError)
                self.failed.append("refused" if gone else f"{type(error).__name__}: {error}")
                client.close()
                if gone:
                    return

    def _compare(self, content: bytes, pictures: np.ndarray, name: str) -> None:
        said = json.loads(content)
        for seed in self.right:
            found = self._kit.chances_of(said)
            if said["id"] == name and found.shape == (len(pictures), 3) and np.allclose(
                    found, self._kit.expected(pictures, seed), atol=1e-5):
                self.right[seed] += 1
                return
        self.failed.append(f"{name} got {content[:200]}")


def raw(served, content: bytes, *, seconds: float = 10) -> bytes:
    """Send bytes and return all that comes until the server closes, or so many seconds after the last of it."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=seconds) as client:
        with contextlib.suppress(OSError):
            client.sendall(content)
        return received(client)


def received(client: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while piece := client.recv(65536):
            found += piece
    return found


def until(holds, seconds: float = 10, pause: float = 0.01):
    """Wait for what holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(pause)
    return found


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- Clients -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("binary", [False, True])
def test_tritons_client_unchanged(shared, kit, binary):
    with contextlib.closing(InferenceServerClient(f"127.0.0.1:{shared.port}")) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
        assert client.get_server_metadata()["name"] == "hpcai"
        assert client.get_model_metadata("tiny")["inputs"][0]["shape"] == [-1, 4, 4, 1]
        assert [one["name"] for one in client.get_model_repository_index()] == ["tiny", "shop"]
        client.load_model("tiny")
        pictures = kit.images(5)
        given = InferInput("images", pictures.shape, "UINT8")
        given.set_data_from_numpy(pictures, binary_data=binary)
        wanted = [InferRequestedOutput(name, binary_data=binary) for name in ("probabilities", "label")]
        answer = client.infer("tiny", [given], outputs=wanted, request_id="mine")
        assert answer.get_response()["id"] == "mine"
        chances = kit.expected(pictures)
        np.testing.assert_allclose(answer.as_numpy("probabilities"), chances, atol=1e-5)
        assert [str(label.decode() if isinstance(label, bytes) else label) for label in answer.as_numpy("label")] == \
            [("red", "green", "blue")[best] for best in chances.argmax(axis=1)]


def test_no_answer_is_mixed_up_while_others_go_away_and_fail(shared, kit):
    stop = threading.Event()

    def disturb(number: int) -> None:
        source = random.Random(number)
        body = kit.infer_body(kit.images(2))
        whole = b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s" % (INFER.encode(), len(body), body)
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", shared.port), 5) as client:
                client.sendall(whole[:source.randrange(len(whole))] if source.random() < 0.5 else whole)
                if source.random() < 0.5:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    disturbers = [threading.Thread(target=disturb, args=(number,)) for number in range(2)]
    for thread in disturbers:
        thread.start()
    try:
        with Load(shared, kit, clients=6) as load:
            load.wait_for(500)
    finally:
        stop.set()
        for thread in disturbers:
            thread.join(10)
    assert not load.failed


def test_requests_in_a_row_on_one_connection_are_answered_in_their_order(shared, kit):
    pictures = [kit.images(1, seed) for seed in range(20)]
    bodies = [kit.infer_body(one, id=f"row-{seed}") for seed, one in enumerate(pictures)]
    sent = b"".join(b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n%s\r\n%s" % (
        INFER.encode(), len(body), b"Connection: close\r\n" if place == 19 else b"", body)
        for place, body in enumerate(bodies))
    answers = re.findall(rb'"id":"row-(\d+)"', raw(shared, sent))
    assert answers == [b"%d" % seed for seed in range(20)]


# ---- Hostile clients -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("content", "status"), [
    (b"nothing\r\n\r\n", 400), (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400), (b"GET\r\n\r\n", 400),
    (b"GET / HTTP/9.9\r\n\r\n", 400), (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: a\r\nA b: c\r\n\r\n", 400), (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n" % INFER.encode(), 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab" % INFER.encode(), 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode(), 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" % INFER.encode(), 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" % INFER.encode(), 400),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % INFER.encode(), 411),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n" % INFER.encode(), 413),
    (b"POST %s HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 99999999\r\n\r\n" % INFER.encode(), 413),
    (b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 40_000), 431),
    (b"GET / HTTP/1.1\r\nHost: a\r\nX: %s\r\n\r\n" % (b"a" * 400_000), 431),
    (b"GET / HTTP/1.1\r\n%s\r\n" % (b"X: y\r\n" * 500), 431),
    (b"GET /nowhere HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", 404),
    (b"GET http://else/v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", 200),
    (b"GET /v2 HTTP/1.0\r\n\r\n", 200),
])
def test_what_is_no_request_is_refused_in_words(shared, content, status):
    answer = raw(shared, content)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert int(answer.split()[1]) == status, answer[:300]
    assert status == 200 or re.fullmatch(rb'\{"error":"[^\x00-\x1f]+"\}', body), body
    assert b"application/json" in head


def test_nothing_behind_what_is_broken_is_answered_and_nothing_before_it_is_lost(shared):
    good = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = raw(shared, good + b"broken\r\n\r\n" + good)
    assert answer.startswith(b"HTTP/1.1 200") and answer.count(b"HTTP/1.1") == 1 and answer.endswith(b'{"live":true}')


def test_headers_behind_a_body_count_for_nothing(shared):
    answer = raw(shared, b"POST /v2/repository/index HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                 b"Transfer-Encoding: chunked\r\n\r\n0\r\nX-Request-Id: smuggled\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200") and b"smuggled" not in answer


@pytest.mark.parametrize("chunked", [False, True])
def test_a_slow_sender_is_told(shared, chunked):
    with socket.create_connection(("127.0.0.1", shared.port), timeout=15) as client:
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 1000"
        client.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\n%s\r\n\r\n" % (INFER.encode(), kind))
        begun = time.monotonic()
        client.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - begun < 10:
            client.sendall(b"1\r\nx\r\n" if chunked else b"x")
            with contextlib.suppress(TimeoutError):
                answer = client.recv(65536)
        assert answer.startswith(b"HTTP/1.1 408") and b'{"error":' in answer
        assert 1 < time.monotonic() - begun < 6


def test_a_head_that_does_not_come_ends_the_connection(shared):
    begun = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda content: raw(shared, content, seconds=20), (b"", b"GET / HT", b"\r\n\r\n")))
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
    assert time.monotonic() - begun < 18


def test_a_long_body_is_refused_while_it_is_sent(shared):
    chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
    with socket.create_connection(("127.0.0.1", shared.port), timeout=15) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" % INFER.encode())
        sent = 0
        with contextlib.suppress(OSError):
            for _ in range(400):
                client.sendall(chunk)
                sent += len(chunk)
        answer = received(client)
    assert answer.startswith(b"HTTP/1.1 413") and sent > 16 << 20


def test_who_goes_away_is_counted_as_such(shared, kit):
    body = kit.infer_body(kit.images(1))
    for number in range(5):
        with socket.create_connection(("127.0.0.1", shared.port), timeout=5) as client:
            client.sendall(b"POST %s HTTP/1.1\r\nHost: a\r\nX-Request-Id: gone-%d\r\nContent-Length: %d\r\n\r\n%s"
                           % (INFER.encode(), number, len(body), body[:20]))
    found = until(lambda: [one for one in shared.lines() if one.get("id", "").startswith("gone-")][4:] and
                  [one["status"] for one in shared.lines() if one.get("id", "").startswith("gone-")])
    assert found == [499] * 5


@pytest.mark.parametrize("seed", range(int(os.environ.get("HPCAI_FUZZ_ROUNDS", "1"))))
def test_whatever_is_sent_is_answered_as_foreseen(shared, kit, seed):
    source, count = random.Random(seed), 1000
    good = kit.infer_body(kit.images(1))
    statuses = {}
    with ThreadPoolExecutor(16) as pool:
        for sent, answer in pool.map(lambda content: (content, raw(shared, content, seconds=2)),
                                     [strange(source, good) for _ in range(count)]):
            for status in map(int, re.findall(rb"HTTP/1\.1 (\d+) ", answer)):
                statuses[status] = statuses.get(status, 0) + 1
                assert status in FORESEEN | {100}, (sent, answer)
    assert {200, 400, 404, 405, 411, 415} <= set(statuses)
    with Load(shared, kit) as load:
        load.wait_for(20)
    assert not load.failed


def strange(source: random.Random, good: bytes) -> bytes:
    """Return a request that is wrong somewhere, or several places."""
    method = source.choice(["GET", "POST", "POST", "POST", "PUT", "HEAD", "OPTIONS", "PATCH", "TRACE", "QUERY", "get",
                            ""])
    path = source.choice([INFER, INFER, "/v2/models/tiny/predict", "/v2/models/shop/predict", "/v2/models/shop/infer",
                          "/predict", "/", "/docs", "/metrics", "/openapi.json", "/v2", "/v2/repository/index",
                          "/v2/models/tiny/statistics?since=1", "/v2/repository/models/shop/load", "*", "//", "/%00",
                          "/v2/models/%ff/infer", "/v2/models/tiny/versions/%31/infer", "/v2/health/ready?x=%zz"])
    if source.random() < 0.2:
        path = mutated(source, path.encode()).decode("latin-1")
    body = source.choice([good, good, b"", b"{}", b"[]", b"null", b"[" * 2000, b'{"rows":[{"pages":1,"month":"May"}]}',
                          source.randbytes(source.randrange(2000)), b"--edge\r\n\r\n\r\n--edge--\r\n"])
    if source.random() < 0.4:
        body = mutated(source, body)
    kinds = ["application/json", "image/png", "multipart/form-data; boundary=edge", "multipart/form-data",
             "application/octet-stream", "text/plain; charset=x", "\xff"]
    headers = [f"Host: {source.choice(['a', '', 'a:b', '[::1]'])}", "Connection: close"]
    if source.random() < 0.6:
        headers.append(f"Content-Type: {source.choice(kinds)}")
    if source.random() < 0.3:
        headers.append(f"Inference-Header-Content-Length: {source.choice([0, 1, len(body), -1, 'x', 10**30])}")
    if source.random() < 0.15:
        headers.append(f"Content-Encoding: {source.choice(['gzip', 'identity', '', 'br'])}")
    if source.random() < 0.1:
        headers.append(source.choice(["Expect: 100-continue", "Upgrade: h2c", "Connection: upgrade", "TE: trailers",
                                      "X-Request-Id: \xff", "Authorization: Bearer x", "Range: bytes=0-", ": x"]))
    length = source.random()
    if length < 0.75:
        headers.append(f"Content-Length: {len(body)}")
    elif length < 0.85:
        headers.append("Transfer-Encoding: chunked")
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if source.random() < 0.8 else body
    elif length < 0.95:
        headers.append(f"Content-Length: {source.choice([len(body) + 5, max(0, len(body) - 5), 'x', 10**25, '+1'])}")
    head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{line}\r\n" for line in headers) + "\r\n"
    content = head.encode("latin-1") + body
    return mutated(source, content) if source.random() < 0.1 else content


def mutated(source: random.Random, content: bytes) -> bytes:
    changed = bytearray(content or b"x")
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(changed))
        if source.random() < 0.5:
            changed[place] = source.randrange(256)
        else:
            changed[place:place + source.randrange(8)] = source.randbytes(source.randrange(8)) or b"x"
        changed = changed or bytearray(b"x")
    return bytes(changed)


# ---- Load ----------------------------------------------------------------------------------------------------------

def test_three_times_the_load_is_refused_in_part_and_the_rest_answered_soon(exports, kit, serve, tmp_path):
    with serve(exports.write(tmp_path / "slow", "slow", name="tiny"), "--max-batch", 4, "--threads", 1) as served:
        # Full batches, so that what the server bears is what one client after the other gets.
        body = kit.infer_body(kit.images(4))
        served.ask("POST", INFER, body)
        begun = time.monotonic()
        for _ in range(10):
            served.ask("POST", INFER, body)
        rate = 3 * 10 / (time.monotonic() - begun)
        waits, refusals, late = flooded(served, body, rate)
        while not late and len(refusals) < len(waits) / 4 and rate < 2_000:
            # Something else ran while it was timed: it bears more than that.
            rate *= 2
            waits, refusals, late = flooded(served, body, rate)
        assert not late and len(waits) > 10 and len(refusals) > len(waits) / 4
        assert np.percentile(waits, 99) < 4
        assert served.ask("POST", INFER, body).status == 200


def flooded(served, body: bytes, rate: float) -> tuple[list[float], list[float], list]:
    """Ask for three seconds; return the seconds of answers and of refusals, and what was neither."""
    waits, refusals, others, begun = [], [], [], time.monotonic()

    def one(number: int) -> None:
        time.sleep(max(0, begun + number / rate - time.monotonic()))
        started = time.monotonic()
        answer = served.ask("POST", INFER, body)
        if answer.status == 200:
            waits.append(time.monotonic() - started)
        elif answer.status == 503 and int(answer.headers["retry-after"]) >= 1:
            refusals.append(time.monotonic() - started)
        else:
            others.append(answer)
    with ThreadPoolExecutor(128) as pool:
        list(pool.map(one, range(int(3 * rate))))
    return waits, refusals, others


def test_more_connections_than_a_worker_holds(exports, kit, serve, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this process may not open as many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    try:
        with serve(exports.write(tmp_path / "tiny")) as served, contextlib.ExitStack() as opened:
            clients = [opened.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))
                       for _ in range(1020)]
            statuses = []
            for client in clients:
                client.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
                statuses.append(client.recv(4096).split()[1])
            assert statuses == [b"200"] * 1000 + [b"503"] * 20
            opened.close()
            until(lambda: answers(served))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---- Workers that die ----------------------------------------------------------------------------------------------

def test_a_killed_worker_is_replaced_and_only_its_own_requests_fail(exports, kit, serve, tmp_path):
    with serve(exports.write(tmp_path / "tiny"), "--workers", 2) as served:
        with Load(served, kit) as load:
            load.wait_for(50)
            before = served.workers()
            os.kill(before[0], signal.SIGKILL)
            begun = time.monotonic()
            until(lambda: len(set(served.workers()) - set(before)) == 1 and not alive(before[0]), 2)
            replaced = (set(served.workers()) - set(before)).pop()
            # It answers: nobody else is left to.
            os.kill(before[1], signal.SIGSTOP)
            try:
                until(lambda: answers(served), 5)
                assert time.monotonic() - begun < 5
            finally:
                os.kill(before[1], signal.SIGCONT)
            load.wait_for(100, failures=4)
        # Each client had one request at most in its hands.
        assert len(load.failed) <= 4 and replaced in served.workers()
        assert "ended: signal SIGKILL; starting another" in served.said()
        metrics = served.ask("GET", "/metrics").body.decode()
        counted = float(re.search(r'hpcai_requests_total{model="tiny",status="200"} (\S+)', metrics)[1])
        # What the killed one had counted is not lost.
        assert abs(counted - load.right[1]) <= 4


def answers(served) -> bool:
    with contextlib.suppress(OSError):
        return served.ask("GET", "/v2/health/ready", timeout=0.3).status == 200
    return False


@pytest.mark.parametrize("turns", [0, 20_000])
def test_a_worker_whose_model_hangs_is_replaced(exports, kit, serve, tmp_path, turns):
    """A model that is quick runs in the event loop, which then hangs too; one that is slow has a thread."""
    @tf.function(input_signature=[tf.TensorSpec((None, *kit.shape), tf.uint8)])
    def hang_on_white(images):
        """Answer, and never come to an end where a picture is all white."""
        hangs = tf.reduce_all(images == 255)
        images = tf.while_loop(lambda turn, images: hangs | (turn < turns), lambda turn, images: (turn + 1, images),
                               [0, images])[1]
        return {"scores": tf.reshape(tf.cast(images, tf.float32), (-1, 16))[:, :3]}

    module = tf.Module()
    module.call = hang_on_white
    saved = tmp_path / "hanging" / "saved_model"
    tf.saved_model.save(module, str(saved), signatures=module.call)
    files = {file.relative_to(saved.parent).as_posix(): {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
             for file in saved.rglob("*") if file.is_file()}
    export = exports.write(saved.parent, kind="saved_model", file="saved_model", files=files)
    with serve(export, "--timeout", 0.5) as served:
        before = served.workers()
        white = kit.infer_body(np.full((1, *kit.shape), 255, np.uint8))
        if turns:
            assert served.ask("POST", INFER, white, timeout=60).status == 504
        else:
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                assert served.ask("POST", INFER, white, timeout=60).status == 504
        until(lambda: "ended: a model ran for longer than any request waits; starting another" in served.said(), 60)
        until(lambda: not any(map(alive, before)) and answers(served), 60)
        assert served.ask("POST", INFER, kit.infer_body(np.zeros((1, *kit.shape), np.uint8))).status == 200
        assert not any(map(alive, before))


def test_workers_do_not_outlive_their_parent(exports, serve, tmp_path):
    with serve(exports.write(tmp_path / "tiny"), "--workers", 2) as served:
        workers = served.workers()
        served.process.kill()
        served.process.wait()
        until(lambda: not any(map(alive, workers)))


@pytest.mark.parametrize("damage", ["file", "document", "folder"])
def test_a_bad_model_ends_the_start(exports, kit, tmp_path, damage):
    export = exports.write(tmp_path / "tiny")
    if damage == "file":
        (export / "model.tflite").write_bytes(b"nothing")
    elif damage == "document":
        (export / "artefact.json").write_text("{}")
    done = subprocess.run(kit.command(tmp_path / "nowhere" if damage == "folder" else export, "--port", 0),
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_was_tried_out_is_served(exports, serve, kit, tmp_path):
    with serve(exports.write(tmp_path / "tiny"), trust=False) as served, Load(served, kit) as load:
        load.wait_for(5)


def test_a_worker_that_cannot_start_again_does_not_end_the_others(exports, serve, kit, tmp_path):
    export = exports.write(tmp_path / "tiny")
    with serve(export, "--workers", 2) as served:
        (export / "artefact.json").write_text("{}")
        os.kill(served.workers()[0], signal.SIGKILL)
        until(lambda: served.said().count("starting another") >= 3)
        assert answers(served)
        exports.write(export)
        until(lambda: len(served.workers()) == 2)
        # Nobody is left who answers, and nobody can start.
        (export / "artefact.json").write_text("{}")
        for pid in served.workers():
            # One that had not opened the export yet has ended by itself.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert served.process.wait(30) == 3


def test_what_the_command_line_gets_wrong(exports, kit, tmp_path):
    export = exports.write(tmp_path / "tiny")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "short").write_text("abc")
        for words, code, said in [
                ((export, "--port", taken.getsockname()[1]), 4, "choose another one with --port"),
                ((export, "--host", "no.such.name.invalid"), 2, "none of this machine"),
                ((export, "--port", 0, "--token-file", tmp_path / "short"), 2, "openssl rand"),
                ((export, "--port", 0, "--token-file", tmp_path / "none"), 2, "cannot read the token"),
                ((export, "--port", 0, "--tls-cert", tmp_path / "short"), 2, "cannot use the certificate"),
                ((export, "--port", 0, "--log-file", tmp_path / "no" / "log"), 2, "cannot write the log"),
                ((export, f"tiny={export}", "--port", 0), 2, "the same name"),
                ((export, "--port", 99_999), 2, "expected 0 to 65535"), ((), 2, "FOLDER")]:
            done = subprocess.run(kit.command(*words), capture_output=True, text=True, timeout=60)
            assert (done.returncode, said in done.stderr) == (code, True), done.stderr


# ---- Reloading -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["signal", "request"])
def test_a_reload_under_load_loses_nothing(exports, kit, serve, tmp_path, way):
    exports.write(tmp_path / "tiny" / "1")
    with serve(tmp_path / "tiny", "--workers", 2) as served, Load(served, kit) as load:
        load.wait_for(50)
        exports.write(tmp_path / "tiny" / "2", "other")
        if way == "request":
            assert served.ask("POST", "/v2/repository/models/tiny/load").status == 200
            # From here on every worker has it.
            chances = kit.expected(kit.images(1), 2)
            for _ in range(20):
                answer = served.ask("POST", INFER, kit.infer_body(kit.images(1)))
                np.testing.assert_allclose(kit.chances_of(answer.json), chances, atol=1e-5)
        else:
            served.process.send_signal(signal.SIGHUP)
        load.wait_for(50, seed=2)
        (tmp_path / "tiny" / "current").write_text("1")
        served.process.send_signal(signal.SIGHUP)
        load.wait_for(50)
        (tmp_path / "tiny" / "3").mkdir()
        (tmp_path / "tiny" / "3" / "artefact.json").write_text("{}")
        refused = served.ask("POST", "/v2/repository/models/tiny/load")
        assert refused.status == 400 and "version 3" in refused.json["error"]
        assert "not loaded: model tiny, version 3" in served.said()
        load.wait_for(50)
    assert not load.failed and not load.closed


# ---- Stopping ------------------------------------------------------------------------------------------------------

def test_sigterm_under_load_finishes_what_was_taken(exports, kit, serve, tmp_path):
    exports.write(tmp_path / "tiny")
    slow = exports.write(tmp_path / "slow", "slow")
    with serve(tmp_path / "tiny", f"slow={slow}", "--workers", 2, "--max-batch", 4) as served:
        found = []

        def ask_slowly() -> None:
            found.append(served.ask("POST", "/v2/models/slow/infer", kit.infer_body(kit.images(60)), timeout=60))
        slowly = threading.Thread(target=ask_slowly)
        with Load(served, kit) as load:
            load.wait_for(50)
            slowly.start()
            time.sleep(0.2)
            begun = time.monotonic()
            assert served.stop() == 0
            assert time.monotonic() - begun < 35
        slowly.join(60)
        assert [answer.status for answer in found] == [200]
        assert set(load.failed) == {"refused"} and load.closed


def test_a_second_signal_ends_it_at_once(exports, kit, serve, tmp_path):
    with serve(exports.write(tmp_path / "slow", "slow"), "--max-batch", 1) as served:
        body = kit.infer_body(kit.images(1000))
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
            client.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
                           % (len(body), body))
            time.sleep(0.5)
            workers = served.workers()
            served.process.send_signal(signal.SIGINT)
            time.sleep(0.7)
            assert served.process.poll() is None
            assert served.stop(signal.SIGINT, 3) == 1 and not any(map(alive, workers))


def test_nothing_is_left_behind(exports, kit, serve, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with serve(exports.write(tmp_path / "tiny")) as served:
        assert len(list((tmp_path / "temporary").glob("hpcai-serve-*"))) == 1
        assert served.stop() == 0
    assert list((tmp_path / "temporary").glob("hpcai-serve-*")) == []


def test_statistics_stay_in_the_folder_that_is_given(exports, kit, serve, tmp_path):
    words = (exports.write(tmp_path / "tiny"), "--state", tmp_path / "state", "--log-file", tmp_path / "requests.log")
    for count in (3, 6):
        with serve(*words) as served:
            served.ask("POST", INFER, kit.infer_body(kit.images(3)))
            assert served.ask("GET", "/v2/models/tiny/statistics").json["answers"]["examples"] == count
            assert 'status="200"} 1.0' in served.ask("GET", "/metrics").body.decode()
            other = subprocess.run(kit.command(*words, "--port", 0), capture_output=True, text=True, timeout=60)
            assert other.returncode == 2 and "another server uses" in other.stderr
            assert served.stop() == 0
    assert (tmp_path / "requests.log").read_text().count('"path":"/v2/models/tiny/infer"') == 2


# ---- Token and TLS -------------------------------------------------------------------------------------------------

def test_a_token_and_tls(exports, kit, serve, tmp_path):
    (tmp_path / "token").write_text("a-long-token\n")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
                    "subjectAltName=IP:127.0.0.1"], cwd=tmp_path, check=True, capture_output=True)
    with serve(exports.write(tmp_path / "tiny"), "--token-file", tmp_path / "token", "--tls-cert",
               tmp_path / "cert.pem", "--tls-key", tmp_path / "key.pem") as served:
        assert "ready: https://127.0.0.1:" in served.said()
        trusting = ssl.create_default_context(cafile=tmp_path / "cert.pem")

        def status(headers: str) -> bytes:
            with socket.create_connection(("127.0.0.1", served.port), 10) as plain, \
                    trusting.wrap_socket(plain, server_hostname="127.0.0.1") as client:
                client.sendall(f"GET /v2 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n".encode())
                return received(client).split()[1]
        assert status("Authorization: Bearer a-long-token\r\n") == b"200"
        assert status("Authorization: Bearer a-long-tokem\r\n") == status("") == b"401"
        # Plain HTTP comes to nothing, and no harm.
        assert not raw(served, b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert status("Authorization: Bearer a-long-token\r\n") == b"200"
        assert "a-long-token" not in served.said()


def test_without_its_packages_it_says_what_installs_them(monkeypatch, capsys):
    monkeypatch.setattr(server, "PACKAGES", (*server.PACKAGES, "no_such_package"))
    assert server.main(["anything", "--port", "0"]) == 4
    assert "run `pip install 'hpcai[serve]'`" in capsys.readouterr().err
