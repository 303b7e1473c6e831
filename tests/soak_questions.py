"""What the soak asks: two versions of a model, requests of several kinds, and the answers that are right."""

import io
import itertools
import json
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson
from PIL import Image

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.load.open_loop import Answer, request_of
from hpcai_cli.engine.serving import artefact as artefacts
from hpcai_cli.engine.serving import runners
from hpcai_cli.engine.serving.protocol import HEADER_LENGTH, probabilities
from hpcai_cli.run import write_bytes, write_json

SHAPE = (28, 28, 1)
QUESTIONS = 64
MODELS = 2
NEAR = 1e-5
"""How far a right answer may be from the known one: another runtime adds in another order."""
APART = 100 * NEAR
"""How far two different answers are at least, so that one in place of the other is found."""
_MOST_TOLD = 5
_HEADER = HEADER_LENGTH.lower().encode() + b": "


def write_models(folder: Path) -> None:
    """Write exports 0, 1, ... of a small network for images like MNIST's, each with other weights."""
    with console.quiet():
        import keras

        from hpcai_cli.engine.deployment import formats

        layers = keras.layers
        for number in range(MODELS):
            keras.utils.set_random_seed(number)
            model = keras.Sequential([
                layers.Input(SHAPE), layers.Rescaling(1 / 255), layers.Conv2D(32, 3, activation="relu"),
                layers.Conv2D(64, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(), layers.Dense(10)])
            place = folder / str(number)
            place.mkdir(parents=True)
            formats.write(model, "tflite", place, input_shape=SHAPE, dtype=np.uint8)
            write_json(place / artefacts.DOCUMENT, {
                "schema": artefacts.SCHEMA, "name": "mnist", "kind": "tflite", "file": "model.tflite",
                "task": "classification", "class_names": [str(digit) for digit in range(10)],
                "decision_threshold": None, "inputs": "images", "input_shape": list(SHAPE),
                "files": {"model.tflite": {"sha256": artefacts.digest(place / "model.tflite")}}})


class Repository:
    """A folder with two versions of the model, which every change alters.

    One change goes back to the version before, the next one delivers a new version, so that models are opened and let
    go of as well. Odd versions are of model 1, even ones of model 0.
    """

    def __init__(self, folder: Path, models: Path):
        self.folder, self._models, self._newest, self._is_back = folder, models, 0, False
        self._times: list[list[float]] = []
        for _ in range(2):
            self._deliver()
        self._answers_from(2)

    def change(self) -> None:
        """Make another version the current one; a server takes note when it is told to."""
        self._is_back = not self._is_back
        if self._is_back:
            self._answers_from(self._newest - 1)
        else:
            self._deliver()
            shutil.rmtree(self.folder / str(self._newest - 2))
            self._answers_from(self._newest)

    def is_loaded(self) -> None:
        """Take note that from now on nothing but the current version answers."""
        self._times[-2][2] = time.perf_counter()

    def allowed(self, sent: float, came: float) -> set[int]:
        """Return the versions that may answer what was sent and answered at these moments."""
        return {version for version, since, until in self._times[-3:] if since <= came and sent <= until}

    def _deliver(self) -> None:
        self._newest += 1
        place, whole = self.folder / f"coming-{self._newest}", self.folder / str(self._newest)
        shutil.copytree(self._models / str(self._newest % MODELS), place)
        document = json.loads((place / artefacts.DOCUMENT).read_text())
        write_json(place / artefacts.DOCUMENT, {**document, "version": self._newest})
        place.rename(whole)

    def _answers_from(self, version: int) -> None:
        write_bytes(self.folder / "current", str(version).encode())
        self._times.append([version, time.perf_counter(), float("inf")])


class Questions:
    """Requests and what each model answers to them.

    Attributes:
        requests: as they go over the wire.
    """

    def __init__(self, models: Path):
        source = np.random.default_rng(0)
        # Coarse patterns: to a network, fine noise is the same grey everywhere.
        pictures = [np.kron(source.integers(0, 256, (1 + place % 8, 4, 4, 1), dtype=np.uint8),
                            np.ones((1, 7, 7, 1), np.uint8)) for place in range(QUESTIONS)]
        kinds = itertools.cycle((_binary, _binary, _as_json, _binary, _binary, _binary, _picture, _as_json))
        self.requests = [kind(f"question-{place}", images)
                         for place, (kind, images) in enumerate(zip(kinds, pictures, strict=False))]
        self._known = []
        for number in range(MODELS):
            scores = runners.open_scores(artefacts.Artefact.open(models / str(number)), threads=1, trust=True)
            self._known.append([probabilities(scores(images)) for images in pictures])
        rows = np.concatenate([row for known in self._known for row in known])
        distances = np.abs(rows[:, None] - rows).max(axis=2)[np.triu_indices(len(rows), 1)]
        assert distances.min() > APART, "two answers are too much alike"

    def problem(self, answer: Answer, versions: set[int]) -> str:
        """Return what is wrong with an answer of status 200, or nothing."""
        place = answer.number % len(self.requests)
        head, _, body = answer.content.partition(b"\r\n\r\n")
        head = head.lower()
        try:
            version, name, chances = _read(head, body)
        except (ValueError, KeyError, TypeError) as error:
            return f"an answer cannot be read: {type(error).__name__}: {error}: {answer.content[:300]}"
        if version not in versions:
            return f"version {version} answered; expected {' or '.join(map(str, sorted(versions)))}"
        if name != f"question-{place}":
            return f"question {place} got the answer to {name}"
        known = self._known[version % MODELS][place]
        if chances.shape != known.shape or not np.abs(chances - known).max() < NEAR:
            return f"question {place} got a wrong answer of version {version}"
        return ""


@dataclass
class Tally:
    """What became of the requests of a load; told of each answer."""

    questions: Questions
    repository: Repository
    statuses: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    unanswered: list[Answer] = field(default_factory=list)
    untaken: int = 0
    """Unanswered, the first on their connections, and without a byte: no server had them."""
    sent: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """From when a request was sent until its answer of status 200."""

    def __call__(self, answer: Answer) -> None:
        self.statuses[answer.status] += 1
        self.sent.append(answer.sent)
        problem = ""
        if answer.status == 200:
            self.seconds.append(answer.came - answer.sent)
            problem = self.questions.problem(answer, self.repository.allowed(answer.sent, answer.came))
        elif answer.status == 503:
            head, found, after = answer.content.lower().partition(b"\r\nretry-after: ")
            if not (found and after.split(b"\r\n", 1)[0].isdigit()):
                problem = f"a refusal without Retry-After: {head[:300]}"
        elif answer.status:
            problem = f"unforeseen: {answer.content[:300]}"
        elif answer.is_first and not answer.content:
            self.untaken += 1
        else:
            self.unanswered.append(answer)
        if problem and len(self.problems) < _MOST_TOLD:
            self.problems.append(problem)


def _read(head: bytes, body: bytes) -> tuple[int, str, np.ndarray]:
    """Return the version, the name of the question and the probabilities (n, classes) of an answer."""
    if _HEADER in head:
        size = int(head.partition(_HEADER)[2].split(b"\r\n", 1)[0])
        said, data = orjson.loads(body[:size]), np.frombuffer(body, "<f4", offset=size)
        return int(said["model_version"]), said["id"], data.reshape(said["outputs"][0]["shape"])
    said = orjson.loads(body)
    if "answers" in said:
        return int(said["version"]), said["id"], np.array([[*one["probabilities"].values()] for one in said["answers"]])
    output = said["outputs"][0]
    return int(said["model_version"]), said["id"], np.array(output["data"]).reshape(output["shape"])


def _binary(name: str, images: np.ndarray) -> bytes:
    head = json.dumps({"id": name, "inputs": [{"name": "images", "shape": list(images.shape), "datatype": "UINT8",
                                               "parameters": {"binary_data_size": images.nbytes}}],
                       "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}]}).encode()
    return request_of("/v2/models/mnist/infer", head + images.tobytes(), {
        "Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))})


def _as_json(name: str, images: np.ndarray) -> bytes:
    body = {"id": name, "inputs": [{"name": "images", "shape": list(images.shape), "datatype": "UINT8",
                                    "data": images.ravel().tolist()}]}
    return request_of("/v2/models/mnist/infer", json.dumps(body).encode(), {"Content-Type": "application/json"})


def _picture(name: str, images: np.ndarray) -> bytes:
    parts = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "PNG")
        parts.append(b'--edge\r\nContent-Disposition: form-data; name="image"; filename="digit.png"\r\n'
                     b"Content-Type: image/png\r\n\r\n" + file.getvalue() + b"\r\n")
    return request_of("/v2/models/mnist/predict", b"".join(parts) + b"--edge--\r\n", {
        "Content-Type": "multipart/form-data; boundary=edge", "X-Request-Id": name})
