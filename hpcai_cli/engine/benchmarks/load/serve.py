"""Serve: what the server adds to a model's own time, how much it bears, and how other servers do with the same file.

The server has one half of the cores, the client that sends at constant rates the other. What the machine itself adds,
by its loopback, by waking up and by keeping processes from running, is seen at a bare server that computes nothing.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.load import open_loop, started_server
from hpcai_cli.engine.benchmarks.measure import Figure, Work, mark, median
from hpcai_cli.engine.deployment import formats
from hpcai_cli.engine.serving import artefact as artefacts
from hpcai_cli.engine.serving import runners
from hpcai_cli.errors import HpcaiError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import write_json

ROUNDS = 3
SECONDS = 3.0
"""Of one load."""
QUIET_RATE = 100.0
"""Requests per second at which what the server adds to a call at the same rate is seen alone."""
BEARABLE = 0.98
"""Share of the offered requests that are answered by a server that bears them."""
STEP = 1.25
"""Between two rates that are tried."""
FAR_BELOW = 3.0
"""Milliseconds of p99 under which the next rate is twice as high."""
PEER_LIMITS = {"litserve": 1.5, "mlserver": 1.5, "flask": 15.0}
"""How many times their throughput is promised."""


def measure(recipes: Mapping[str, tuple[Recipe, Callable]], peers: Mapping[str, str]) -> Iterator[Figure | Work]:
    """Start servers of one MNIST model, ours and those of the peers whose Python was given, and load them in turn."""
    server_cores, client_cores = _shares()
    with tempfile.TemporaryDirectory() as place:
        for name in ("dogs-vs-cats", "mnist"):
            folder = Path(place) / name
            example = _write_model(*recipes[name], folder)
            yield from _own(folder, example, server_cores, client_cores)
        if not peers:
            console.note("serve: other servers are left out; give their Python as in --peer litserve=/venv/bin/python")
        for name, python in peers.items():
            yield from _beside(name, python, folder, example, server_cores, client_cores)
        yield from _cold_start(folder, example)


def _shares() -> tuple[set[int], set[int]]:
    cores = sorted(os.sched_getaffinity(0))
    half = max(1, len(cores) // 2)
    return set(cores[:half]), set(cores[half:]) or set(cores)


def _write_model(recipe: Recipe, build_model: Callable, folder: Path) -> np.ndarray:
    """Write an untrained model, which takes as long as a trained one, and return one example."""
    folder.mkdir()
    model, shape = build_model(recipe), recipe.input_shape
    for kind in ("tflite", "keras"):
        formats.write(model, kind, folder, input_shape=shape, dtype=np.uint8)
    write_json(folder / artefacts.DOCUMENT, {
        "schema": artefacts.SCHEMA, "name": recipe.name, "kind": "tflite", "file": "model.tflite",
        "task": "classification", "class_names": list(recipe.class_names), "decision_threshold": None,
        "inputs": "images", "input_shape": list(shape),
        "files": {"model.tflite": {"sha256": artefacts.digest(folder / "model.tflite")}}})
    return np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8)


# ---- Ours ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Round:
    """What one round says of our server, of the model in this process and of the bare server."""

    added: float
    """Milliseconds of a request's median, less those of a call at the same rate."""
    bare: float
    most: float
    """Answers per second."""
    one: float
    """Seconds of a call of the model alone with one example."""
    eight: float
    tail: float
    """p99 over p50."""
    bare_tail: float
    answered: int
    span: tuple[float, float]
    """Of the load under which so many requests were answered."""


def _own(folder: Path, example: np.ndarray, cores: set[int], client_cores: set[int]) -> list[Figure | Work]:
    own = started_server.ours(folder, "--threads", str(len(cores)), "--max-batch", "8")
    bare, rounds = [sys.executable, str(Path(__file__).with_name("bare_server.py")), "{port}"], []
    with started_server.serving(own, cores) as port, started_server.serving(bare, cores) as bare_port:
        while len(rounds) < ROUNDS:
            rounds.append(_round((port, bare_port), folder, example, (cores, client_cores),
                                 min((each.most for each in rounds), default=0.0)))
        bare_most = _throughput(bare_port, _binary_request(folder.name, example), client_cores, near=0.0)

    def told(name: str, value: Callable[[_Round], float], unit: str, **limits) -> Figure:
        return median("serve", f"{folder.name}, {name}", list(map(value, rounds)), unit, **limits)

    name = "one image, binary, one worker"
    return [told(f"{name}: added at the median", lambda each: each.added, "ms", limit=1.0, at_most=True),
            told("the same to a bare server: median", lambda each: each.bare, "ms"),
            told(f"{name}: answers", lambda each: each.most, "1/s"),
            told("calls of the model alone at batch 1", lambda each: 1 / each.one, "1/s"),
            told(f"{name}: answers over these calls", lambda each: each.most * each.one, "ratio", limit=0.8),
            # Behind each other on one core: what nobody could surpass whose server takes the requests off the network.
            told("the same, were the server a bare one", lambda each: each.one / (each.one + 1 / bare_most), "ratio"),
            told(f"{name}: answers over the examples of the model alone at batch 8",
                 lambda each: each.most * each.eight / 8, "ratio", limit=0.7),
            told(f"{name}: p99 over p50 at 70 % of these answers", lambda each: each.tail, "ratio", limit=3.0,
                 at_most=True),
            told("the same rate to a bare server: p99 over p50", lambda each: each.bare_tail, "ratio"),
            Work("serve", f"{folder.name}, {name}, at 70 % of these answers",
                 tuple(each.answered for each in rounds), tuple(each.span for each in rounds))]


def _round(ports: tuple[int, int], folder: Path, example: np.ndarray, cores: tuple[set[int], set[int]],
           near: float) -> _Round:
    """Measure our server and the bare one, by their ports, with the cores of the servers and those of the client."""
    request = _binary_request(folder.name, example)
    one, eight, paced = _in_process(folder, example, cores[0])
    quiet, bare = (_load(port, request, QUIET_RATE, cores[1]).percentile(50) for port in ports)
    most = _throughput(ports[0], request, cores[1], near)
    started = mark()
    busy = _load(ports[0], request, 0.7 * most, cores[1])
    ended = mark()
    bare_busy = _load(ports[1], request, 0.7 * most, cores[1])
    return _Round(quiet - 1000 * paced, bare, most, one, eight, busy.percentile(99) / busy.percentile(50),
                  bare_busy.percentile(99) / bare_busy.percentile(50), len(busy.seconds), (started, ended))


def _in_process(folder: Path, example: np.ndarray, cores: set[int]) -> tuple[float, float, float]:
    """Return the seconds of a call of the model in this process on the server's cores.

    Returns:
        Of one example, call after call; of eight; and of one at the quiet rate, as a server calls it: after a pause a
        core wakes up first, and its caches are no longer the model's. Medians of rounds, and of calls.
    """
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        forward = runners.open_scores(artefacts.Artefact.open(folder), threads=len(cores), trust=True)
        one, eight = (_call_after_call(forward, np.repeat(example, size, axis=0)) for size in (1, 8))
        paced = []
        for _ in range(int(QUIET_RATE)):
            time.sleep(1 / QUIET_RATE)
            started = time.perf_counter()
            forward(example)
            paced.append(time.perf_counter() - started)
        return one, eight, statistics.median(paced)
    finally:
        os.sched_setaffinity(0, before)


def _call_after_call(forward: Callable, batch: np.ndarray) -> float:
    rounds = []
    for _ in range(5):
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < 0.2:
            forward(batch)
            calls += 1
        rounds.append((time.perf_counter() - started) / calls)
    return statistics.median(rounds)


def _cold_start(folder: Path, example: np.ndarray) -> list[Figure]:
    """Time from the start of a server's process to its first answer."""
    request, times = _binary_request(folder.name, example), []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        with started_server.serving(started_server.ours(folder), os.sched_getaffinity(0)) as port:
            outcome = open_loop.drive(port, request, rate=1, seconds=0.01, connections=1)
            if outcome.statuses.get(200) != 1:
                raise HpcaiError("the server did not answer its first request", received=outcome.statuses)
            times.append(time.perf_counter() - started)
    return [median("serve", "start of a server to its first answer, TFLite", times, "s", limit=1.5, at_most=True)]


# ---- Others --------------------------------------------------------------------------------------------------------

def _beside(name: str, python: str, folder: Path, example: np.ndarray, cores: set[int],
            client_cores: set[int]) -> list[Figure]:
    """Load ours and another server in turn, with the same kind of body: JSON, since all of them take it."""
    data = {"instances": example.tolist()}
    path = {"mlserver": "/v2/models/peer/infer"}.get(name, "/predict")
    tensor = {"inputs": [{"name": "images", "shape": list(example.shape), "datatype": "UINT8",
                          "data": example.ravel().tolist()}]}
    headers = {"Content-Type": "application/json"}
    theirs = open_loop.request_of(path, json.dumps(tensor if name == "mlserver" else data).encode(), headers)
    ours = open_loop.request_of("/v2/models/mnist/infer", json.dumps(tensor).encode(), headers)
    command = [python, str(Path(__file__).with_name("peer_servers.py")), name, str(folder / "model.tflite"), "{port}",
               str(len(cores))]
    own = started_server.ours(folder, "--threads", str(len(cores)))
    ratios, rates, mine = [], [], []
    with started_server.serving(own, cores) as our_port, started_server.serving(command, cores) as their_port:
        for _ in range(ROUNDS):
            mine.append(_throughput(our_port, ours, client_cores, near=min(mine, default=0.0)))
            rates.append(_throughput(their_port, theirs, client_cores, near=min(rates, default=0.0)))
            ratios.append(mine[-1] / rates[-1])
    return [median("serve", f"throughput of {name}, JSON", rates, "1/s"),
            median("serve", f"our throughput over that of {name}", ratios, "ratio", limit=PEER_LIMITS[name])]


# ---- Loads ---------------------------------------------------------------------------------------------------------

def _binary_request(name: str, example: np.ndarray) -> bytes:
    head = json.dumps({"inputs": [{"name": "images", "shape": list(example.shape), "datatype": "UINT8",
                                   "parameters": {"binary_data_size": example.nbytes}}],
                       "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}).encode()
    return open_loop.request_of(f"/v2/models/{name}/infer", head + example.tobytes(), {
        "Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))})


def _load(port: int, request: bytes, rate: float, cores: set[int]) -> open_loop.Outcome:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        return open_loop.drive(port, request, rate=rate, seconds=SECONDS)
    finally:
        os.sched_setaffinity(0, before)


def _throughput(port: int, request: bytes, cores: set[int], near: float) -> float:
    """Return the highest rate of answers at a constant rate of requests that the server bears, in 1/s.

    Args:
        near: what an earlier round has found; 0 for the first.
    """
    rate, best = max(20.0, near / 2), 0.0
    while True:
        outcome = _load(port, request, rate, cores)
        best = max(best, outcome.answered)
        if outcome.answered < BEARABLE * outcome.offered or set(outcome.statuses) != {200}:
            return best
        # Far below what it bears, the steps are larger.
        rate *= 2.0 if outcome.percentile(99) < FAR_BELOW else STEP
