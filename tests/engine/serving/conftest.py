"""Exports that are quick to make, whose answers a test can foretell; servers of them in processes of their own."""

import asyncio
import contextlib
import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

SHAPE = (4, 4, 1)
CLASSES = ("red", "green", "blue")
START_SECONDS = 60


def weights(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.01, (16, 3)).astype(np.float32)


def expected(images: np.ndarray, seed: int = 1) -> np.ndarray:
    """Return the probabilities that the tiny model gives, (n, 3)."""
    scores = images.reshape(len(images), 16).astype(np.float64) @ weights(seed)
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    return chances / chances.sum(axis=1, keepdims=True)


def converted(function, shape: tuple, dtype=tf.uint8) -> bytes:
    concrete = tf.function(function, input_signature=[tf.TensorSpec((None, *shape), dtype)]).get_concrete_function()
    return tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert()


def tiny(seed: int) -> bytes:
    matrix = weights(seed)
    return converted(lambda images: tf.reshape(tf.cast(images, tf.float32), (-1, 16)) @ matrix, SHAPE)


def slow() -> bytes:
    """Some milliseconds for each image: convolutions over a large picture made of it."""
    kernel = np.random.default_rng(0).normal(0, 0.05, (3, 3, 8, 8)).astype(np.float32)

    def run(images):
        large = tf.tile(tf.image.resize(tf.cast(images, tf.float32), (160, 160)), (1, 1, 1, 8))
        for _ in range(4):
            large = tf.nn.relu(tf.nn.conv2d(large, kernel, 1, "SAME"))
        return tf.reduce_mean(large, (1, 2))[:, :3]
    return converted(run, SHAPE)


def table() -> bytes:
    return converted(lambda rows: tf.reduce_sum(rows * [[1.0, 10.0, 100.0]], 1, keepdims=True), (3,), tf.float32)


TABLE = {
    "name": "shop", "task": "regression", "class_names": [], "inputs": "features", "input_shape": [3],
    "encoding": {"columns": [
        {"name": "pages", "kind": "number", "offset": 1.0, "fill": 2.0, "missing": False},
        {"name": "month", "kind": "category", "categories": ["May", "June"], "missing": False}]}}


@pytest.fixture(scope="session")
def contents() -> dict[str, bytes]:
    return {"tiny": tiny(1), "other": tiny(2), "slow": slow(), "shop": table()}


@dataclass
class Exports:
    """Writes exports."""

    contents: dict[str, bytes]

    def write(self, folder: Path, model: str = "tiny", **settings) -> Path:
        """Write an export; files first, so that a server never sees one that is half there."""
        content = self.contents[model]
        document = {
            "schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite",
            "task": "classification", "class_names": list(CLASSES), "decision_threshold": None, "inputs": "images",
            "input_shape": list(SHAPE),
            "files": {"model.tflite": {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}},
            **(TABLE if model == "shop" else {}), **settings}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.tflite").write_bytes(content)
        (folder / "artefact.json").write_text(json.dumps(document))
        return folder


@pytest.fixture(scope="session")
def exports(contents) -> Exports:
    return Exports(contents)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def infer_body(pictures: np.ndarray, **settings) -> bytes:
    return json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": list(pictures.shape),
                                   "data": pictures.ravel().tolist()}], **settings}).encode()


def chances_of(answer: dict) -> np.ndarray:
    output = next(output for output in answer["outputs"] if output["name"] == "probabilities")
    return np.array(output["data"]).reshape(output["shape"])


# ---- An application in this process --------------------------------------------------------------------------------

@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


async def ask(app, method: str, path: str, body: bytes | list[bytes] = b"", headers: dict | None = None,
              query: str = "") -> Answer:
    """Bring a request to an ASGI application as a server would; a list is a body in chunks."""
    chunks = body if isinstance(body, list) else [body]
    lines = [(name.lower().encode(), str(value).encode("latin-1")) for name, value in (headers or {}).items()]
    if isinstance(body, list):
        lines.append((b"transfer-encoding", b"chunked"))
    elif method == "POST" and not any(name == b"content-length" for name, _ in lines):
        lines.append((b"content-length", b"%d" % len(body)))
    waiting = [{"type": "http.request", "body": chunk, "more_body": place + 1 < len(chunks)}
               for place, chunk in enumerate(chunks)]
    sent = []

    async def receive():
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await app({"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": lines},
              receive, send)
    start = sent[0]
    return Answer(start["status"], {name.decode().lower(): value.decode() for name, value in start["headers"]},
                  b"".join(message.get("body", b"") for message in sent[1:]))


# ---- A server in a process of its own ------------------------------------------------------------------------------

class Served:
    """A running server and its clients."""

    def __init__(self, process: subprocess.Popen, log: Path, tls: bool):
        self.process, self.log, self.port, self.tls = process, log, 0, tls

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            for line in self.log.read_text(errors="replace").splitlines():
                if line.startswith("ready: "):
                    self.port = int(line.rpartition(":")[2])
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no server: {self.log.read_text(errors='replace')[-2000:]}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def lines(self) -> list[dict]:
        """Return the lines of the request log."""
        return [json.loads(line) for line in self.said().splitlines() if line.startswith("{")]

    def client(self, timeout: float = 20) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def ask(self, method: str, path: str, body=None, headers: dict | None = None, timeout: float = 20) -> Answer:
        """Ask on a connection of its own."""
        with contextlib.closing(self.client(timeout)) as client:
            client.request(method, path, body, headers or {})
            answer = client.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "hpcai_cli.engine.serving.server", *map(str, words)]


@contextlib.contextmanager
def server(folder: Path, *words: object, trust: bool = True):
    """Start a server on a free port, and end it; trust leaves out the trial of the model, which takes a second."""
    log = folder / "server.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command(*words, "--port", 0, *(["--trust-model"] if trust else [])), stderr=file,
                                   stdout=file, stdin=subprocess.DEVNULL, cwd=folder, env=os.environ.copy())
    served = Served(process, log, "--tls-cert" in words)
    try:
        served.wait_until_ready()
        yield served
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def serve(tmp_path):
    """Return what starts a server in the test's folder."""
    return lambda *words, **settings: server(tmp_path, *words, **settings)


def run(coroutine, seconds: float = 60):
    """Run a coroutine in a loop of its own, for a bounded time."""
    return asyncio.run(asyncio.wait_for(coroutine, seconds))


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """Return the functions above, which test modules cannot import from here."""
    return SimpleNamespace(shape=SHAPE, images=images, infer_body=infer_body, expected=expected, chances_of=chances_of,
                           ask=ask, run=run, server=server, command=command)
