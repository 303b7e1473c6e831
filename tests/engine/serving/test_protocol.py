"""The Open Inference Protocol: what Triton's own client sends is understood, what strangers send is refused."""

import copy
import json
import random
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import orjson
import pytest
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from hpcai_cli.engine.serving.artefact import DOCUMENT, Artefact
from hpcai_cli.engine.serving.protocol import (
    HEADER_LENGTH,
    InferRequest,
    Limits,
    model_metadata,
    parse_infer,
    render_infer,
    server_metadata,
)
from hpcai_cli.engine.serving.tensors import MOST_JSON_VALUES, RequestError, packed

NAMES = ["cat", "Dachshund, größer", "鳥"]


def made(folder, **settings) -> Artefact:
    document = {"schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite",
                "task": "classification", "class_names": NAMES, "decision_threshold": None, "inputs": "images",
                "input_shape": [2, 3, 1], "files": {"model.tflite": {"sha256": "0" * 64, "bytes": 1}}} | settings
    (folder / DOCUMENT).write_text(json.dumps(document))
    return Artefact.open(folder)


@pytest.fixture
def images(tmp_path) -> Artefact:
    return made(tmp_path)


@pytest.fixture
def rows(tmp_path) -> Artefact:
    return made(tmp_path, task="regression", class_names=[], inputs="features", input_shape=[3])


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 2, 3, 1), dtype=np.uint8)


def body_of(**settings) -> dict:
    """Return a request for two images that holds, changed as told."""
    return {"name": "images", "shape": [2, 2, 3, 1], "datatype": "UINT8", "data": [*range(12)]} | settings


def asked(*inputs: dict, **settings) -> bytes:
    return orjson.dumps({"inputs": [*inputs] or [body_of()], **settings})


def refused(artefact, body: bytes, header_length=None, *, status=400, words=(), limits=None) -> str:
    with pytest.raises(RequestError) as caught:
        parse_infer(artefact, body, header_length, limits or Limits())
    message = caught.value.message
    assert (caught.value.status, str(caught.value)) == (status, message)
    assert message.isprintable() and len(message) < 1000
    for word in words:
        assert word in message, message
    return message


# ---- Requests that hold ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("binary_answer", [True, False, None])
def test_what_tritons_client_sends_and_reads(images, binary, binary_answer):
    given = InferInput("images", [4, 2, 3, 1], "UINT8")
    given.set_data_from_numpy(pixels(4), binary_data=binary)
    wanted = None if binary_answer is None else [
        InferRequestedOutput("label", binary_data=binary_answer), InferRequestedOutput("probabilities", binary_answer)]
    body, length = InferenceServerClient.generate_request_body([given], wanted, request_id="seven", priority=3)
    request = parse_infer(images, body, None if length is None else str(length))
    np.testing.assert_array_equal(request.inputs, pixels(4))
    assert (request.inputs.dtype, request.inputs.flags.c_contiguous, request.id) == (np.uint8, True, "seven")
    assert request.outputs == (("probabilities", "label") if wanted is None else ("label", "probabilities"))

    scores = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    answer, headers = render_infer(images, request, scores, version="3", request_id="other")
    # The client asks for all outputs in binary where it names none.
    assert (HEADER_LENGTH in headers) == (binary_answer is not False)
    length = headers.get(HEADER_LENGTH)
    assert headers["Content-Type"] == ("application/json" if length is None else "application/octet-stream")
    read = InferenceServerClient.parse_response_body(answer, header_length=length and int(length))
    said = read.get_response()
    assert (said["model_name"], said["model_version"], said["id"]) == ("tiny", "3", "seven")
    assert [output["name"] for output in said["outputs"]] == list(request.outputs)
    exact = np.exp(scores.astype(np.float64))
    chances = read.as_numpy("probabilities")
    assert (chances.dtype, chances.shape) == (np.float32, (4, 3))
    np.testing.assert_allclose(chances, exact / exact.sum(1, keepdims=True), rtol=1e-6)
    labels = [name.decode() if isinstance(name, bytes) else name for name in read.as_numpy("label").tolist()]
    assert labels == [NAMES[place] for place in scores.argmax(1)]
    assert len(set(labels)) > 1


@pytest.mark.parametrize("binary", [True, False])
def test_rows_of_numbers_and_the_number_of_a_regression(rows, binary):
    sent = np.array([[1.5, -2, 3e38], [0, 1e-30, 7]], np.float32)
    given = InferInput("features", [2, 3], "FP32").set_data_from_numpy(sent, binary_data=binary)
    # Ids of all lengths put the numbers at all places that memory has.
    for name in ("a", "ab", "abc", "abcd"):
        body, length = InferenceServerClient.generate_request_body([given], request_id=name)
        request = parse_infer(rows, body, length and str(length))
        np.testing.assert_array_equal(request.inputs, sent)
        assert request.inputs.dtype == np.float32 and request.inputs.flags.aligned
    answer, headers = render_infer(rows, request, np.float32([[0.1], [-3e38]]), version="1", request_id="")
    read = InferenceServerClient.parse_response_body(answer, header_length=int(headers[HEADER_LENGTH]))
    np.testing.assert_array_equal(read.as_numpy("value"), np.float32([[0.1], [-3e38]]))


def test_json_is_read_flat_and_nested_and_its_numbers_come_back_exactly(images, rows):
    for data in (pixels(2).tolist(), pixels(2).ravel().tolist()):
        request = parse_infer(images, asked(body_of(data=data)), None)
        np.testing.assert_array_equal(request.inputs, pixels(2))
    assert (request.outputs, request.binary, request.id) == (("probabilities", "label"), frozenset(), "")
    # What float32 rounds to its largest number is that number.
    tensor = {"name": "features", "shape": [1, 3], "datatype": "FP32", "data": [[3.4028235e38, 1, 2**64 - 1]]}
    request = parse_infer(rows, asked(tensor), None)
    np.testing.assert_array_equal(request.inputs, np.float32([[3.4028235e38, 1, 2**64]]))
    scores = np.float32([[0.1]])
    said = orjson.loads(render_infer(rows, request, scores, version="1", request_id="from the server")[0])
    assert said == {"model_name": "tiny", "model_version": "1", "id": "from the server", "outputs": [
        {"name": "value", "datatype": "FP32", "shape": [1, 1], "data": [0.1]}]}
    assert "id" not in orjson.loads(render_infer(rows, request, scores, version="1", request_id="")[0])


def test_an_image_in_binary_is_not_copied(images):
    head = asked({"name": "images", "shape": [2, 2, 3, 1], "datatype": "UINT8", "parameters": {"binary_data_size": 12}})
    body = head + pixels(2).tobytes()
    inputs = parse_infer(images, body, str(len(head))).inputs
    assert np.shares_memory(inputs, np.frombuffer(body, np.uint8))


def test_each_output_says_for_itself_whether_it_is_binary(images):
    outputs = [{"name": "label"}, {"name": "probabilities", "parameters": {"binary_data": False, "unknown": 1}}]
    request = parse_infer(images, asked(parameters={"binary_data_output": True, "timeout": 7}, outputs=outputs), None)
    assert (request.outputs, request.binary) == (("label", "probabilities"), {"label"})
    answer, headers = render_infer(images, request, np.eye(2, 3, dtype=np.float32), version="1", request_id="x")
    read = InferenceServerClient.parse_response_body(answer, header_length=int(headers[HEADER_LENGTH]))
    assert [name.decode() for name in read.as_numpy("label")] == NAMES[:2]
    assert read.as_numpy("probabilities").shape == (2, 3)
    assert "data" in read.get_output("probabilities") and "data" not in read.get_output("label")
    assert parse_infer(images, asked(outputs=[]), None).outputs == ("probabilities", "label")


def test_texts_in_binary():
    assert packed(["", "größe"]) == struct.pack("<I", 0) + struct.pack("<I", 7) + "größe".encode()


def test_the_threshold_decides_between_two_classes(tmp_path):
    model = made(tmp_path, class_names=["no", "yes"], decision_threshold=0.25)
    request = parse_infer(model, asked(outputs=[{"name": "label"}]), None)
    # Probabilities of the second class: a quarter, and a little less than that.
    scores = np.log(np.float32([[0.74, 0.26], [0.76, 0.24]]))
    said = orjson.loads(render_infer(model, request, scores, version="1", request_id="")[0])
    assert said["outputs"] == [{"name": "label", "datatype": "BYTES", "shape": [2], "data": ["yes", "no"]}]


def test_large_logits_and_answers_that_are_no_numbers(images):
    request = parse_infer(images, asked(body_of(shape=[1, 2, 3, 1], data=[0] * 6)), None)
    said = orjson.loads(render_infer(images, request, np.float32([[-3e38, 3e38, 0]]), version="1", request_id="")[0])
    assert said["outputs"][0]["data"] == [0, 1, 0]
    for score in (np.nan, np.inf, -np.inf):
        with pytest.raises(RequestError, match="the model's answer is no number") as caught:
            render_infer(images, request, np.float32([[0, score, 0]]), version="1", request_id="")
        assert caught.value.status == 500


def test_metadata(images, tmp_path):
    assert model_metadata(images, ["1", "2"]) == {
        "name": "tiny", "versions": ["1", "2"], "platform": "tflite",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 2, 3, 1]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
                    {"name": "label", "datatype": "BYTES", "shape": [-1]}]}
    number = made(tmp_path, task="regression", class_names=[], inputs="features", input_shape=[3])
    said = model_metadata(number, ["1"])
    assert said["inputs"] == [{"name": "features", "datatype": "FP32", "shape": [-1, 3]}]
    assert said["outputs"] == [{"name": "value", "datatype": "FP32", "shape": [-1, 1]}]
    said = server_metadata(["binary_tensor_data"])
    assert (said["name"], said["extensions"], "version" in said) == ("hpcai", ["binary_tensor_data"], True)


# ---- Requests that are refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000, b"\xff\xfe", b'{"id": "\xff"}',
    b'{"inputs": [NaN]}', b"Infinity", b"-Infinity", b"1e999", b'{"id": "\\ud800"}', b"{} {}", b"\x1f\x8b\x08\0"])
def test_what_is_no_json(images, body):
    refused(images, body, words=["the body is no JSON"])


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e39", b"-1e300"])
def test_numbers_that_are_none(rows, number):
    good = b'{"inputs":[{"name":"features","shape":[1,3],"datatype":"FP32","data":[1,%s,2]}]}'
    assert parse_infer(rows, good % b"1e38", None).inputs.shape == (1, 3)
    refused(rows, good % number)


@pytest.mark.parametrize("document", [
    [], "text", 5, None, {}, {"inputs": []}, {"inputs": {}}, {"inputs": [5]}, {"inputs": [[]]},
    {"inputs": [body_of(), body_of()]}, {"inputs": [body_of()] * 50_000}])
def test_anything_but_one_input(images, document):
    refused(images, orjson.dumps(document))


@pytest.mark.parametrize(("settings", "words"), [
    ({"name": "features"}, ["name", "'images'", "'features'"]), ({"name": None}, ["name"]), ({"name": ["images"]}, []),
    ({"datatype": "FP32"}, ["datatype", "'UINT8'", "'FP32'"]), ({"datatype": "uint8"}, []), ({"datatype": 7}, []),
    ({"datatype": "\x1b[31m" + "x" * 10_000}, ["x1b"]),
])
def test_an_input_that_is_not_the_models(images, settings, words):
    refused(images, asked(body_of(**settings)), words=words)


@pytest.mark.parametrize("shape", [
    None, 12, "2,2,3,1", [], [2], [12], [2, 2, 3], [2, 2, 3, 1, 1], [1, 2, 2, 3, 1], [2, 3, 2, 1], [0, 2, 3, 1],
    [-1, 2, 3, 1], [-2, -2, 3, 1], [2, -2, -3, 1], [2.0, 2, 3, 1], [2, 2, 3, True], ["2", 2, 3, 1], [[2], 2, 3, 1],
    [2, 2, 3, None], [2**62, 2, 3, 1], [2**32, 2**32, 3, 1], [2**63, 2, 2**63, 1], [2, 2, 3, 2**64 - 1],
    [0] * 100_000, {"2": 2}])
def test_shapes_that_cannot_be(images, shape):
    binary = {"name": "images", "datatype": "UINT8", "shape": shape, "parameters": {"binary_data_size": 12}}
    head = asked(binary)
    many = type(shape) is list and shape[:1] == [2**62]
    for body, length in ((asked(body_of(shape=shape)), None), (head + bytes(12), str(len(head)))):
        refused(images, body, length, status=413 if many else 400, words=["examples" if many else "shape"])


def test_a_request_without_examples(images):
    head = asked({"name": "images", "datatype": "UINT8", "shape": [0, 2, 3, 1], "parameters": {"binary_data_size": 0}})
    refused(images, head, str(len(head)), words=["n from 1 to 1024"])
    refused(images, asked(body_of(shape=[0, 2, 3, 1], data=[])), words=["n from 1 to 1024"])


def test_no_memory_is_taken_for_what_is_only_declared(images):
    head = asked({"name": "images", "datatype": "UINT8", "shape": [1024, 2, 3, 1],
                  "parameters": {"binary_data_size": 2**40}})
    nested = asked(body_of(shape=[1024, 2, 3, 1], data=[[[[1]]]]))
    # One long text among many makes NumPy take its length for each.
    texts = asked(body_of(shape=[1000, 2, 3, 1], data=["x" * 100_000, *["y"] * 5999]))
    tracemalloc.start()
    try:
        for body, length in ((head, str(len(head))), (nested, None), (texts, None)):
            refused(images, body, length)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("data", [
    None, 5, "AAAA", {}, [], [*range(11)], [*range(13)], [0] * 10**6, [[0] * 6], [[0] * 6] * 2, [[[0] * 3] * 2] * 2,
    [[[[0]] * 3] * 2], [[[[0]] * 3] * 2] * 3, [[[[0], [0]], [[0]] * 3]] * 2, [[[[0]] * 3, [[0]] * 2]] * 2,
    [*range(11), 256], [*range(11), -1], [*range(11), 2**63], [*range(11), 1.0], [*range(11), 0.5], [*range(11), True],
    [*range(11), "1"], [*range(11), None], [*range(11), [1]], [[1], *range(11)], [*range(11), {}]])
def test_data_that_is_not_what_its_shape_and_type_say(images, data):
    refused(images, asked(body_of(data=data)), words=["the data"])


def test_features_that_are_no_numbers(rows):
    for cell in (True, None, "1", [1], {}, "NaN"):
        refused(rows, asked({"name": "features", "shape": [1, 3], "datatype": "FP32", "data": [1, cell, 2]}),
                words=["the data"])
    for number in (np.nan, np.inf, -np.inf):
        head = asked({"name": "features", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}})
        refused(rows, head + np.float32([1, number, 2]).tobytes(), str(len(head)), words=["finite"])


@pytest.mark.parametrize("length", ["", "-1", "+5", "1e2", "0x10", "5.0", "x", "9" * 30, "9" * 5000, "٣", "1_0", " 5",
                                    "\n5", "201", "0", "3"])
def test_headers_that_are_not_the_length_of_the_json(images, length):
    refused(images, asked()[:200].ljust(200), length)


@pytest.mark.parametrize(("size", "behind"), [
    (12, 11), (12, 13), (11, 11), (13, 13), (0, 0), (-12, 12), (12.0, 12), ("12", 12), (None, 12), (True, 12),
    (2**63, 12), (2**64 - 1, 0), ([], 12)])
def test_binary_data_of_another_length(images, size, behind):
    head = asked({"name": "images", "shape": [2, 2, 3, 1], "datatype": "UINT8",
                  "parameters": {"binary_data_size": size}})
    refused(images, head + bytes(behind), str(len(head)))
    refused(images, head, None)


def test_data_and_binary_data_exclude_each_other(images):
    both = asked(body_of(parameters={"binary_data_size": 12}))
    refused(images, both + bytes(12), str(len(both)), words=["either data or"])
    neither = asked({"name": "images", "shape": [2, 2, 3, 1], "datatype": "UINT8"})
    refused(images, neither, words=["either data or"])
    refused(images, asked() + b"more", str(len(asked())), words=["4 bytes behind the JSON"])


@pytest.mark.parametrize(("settings", "words"), [
    ({"outputs": [{"name": "logits"}]}, ["probabilities or label", "'logits'"]), ({"outputs": {}}, ["no list"]),
    ({"outputs": "label"}, []), ({"outputs": [5]}, []), ({"outputs": [{"name": ["label"]}]}, []),
    ({"outputs": None}, []),
    ({"outputs": [{"name": "label"}] * 2}, ["twice"]), ({"outputs": [{"name": "label"}] * 10**5}, ["twice"]),
    ({"outputs": [{"name": "label", "parameters": 1}]}, ["'label'"]),
    ({"outputs": [{"name": "label", "parameters": {"binary_data": 1}}]}, ["neither true nor false"]),
    ({"outputs": [{"name": "label", "parameters": {"classification": 3}}]}, ["'classification'", "not supported"]),
    ({"outputs": [{"name": "label", "parameters": {"shared_memory_region": "x"}}]}, ["not supported"]),
    ({"parameters": []}, ["parameters"]), ({"parameters": {"binary_data_output": "yes"}}, ["'yes'"]),
    ({"id": 5}, ["id"]), ({"id": None}, ["id"]), ({"id": "x" * 129}, ["128"]), ({"id": "a\r\nSet-Cookie: b"}, ["id"])])
def test_what_else_is_asked_for_wrongly(images, settings, words):
    refused(images, asked(**settings), words=words)


def test_what_is_too_large(images):
    limits = Limits(most_bytes=2000, most_examples=3)
    assert len(parse_infer(images, asked(body_of(shape=[3, 2, 3, 1], data=[0] * 18)), None, limits).inputs) == 3
    refused(images, asked(body_of(shape=[4, 2, 3, 1], data=[0] * 24)), status=413, words=["3", "4"], limits=limits)
    refused(images, b" " * 2001, status=413, words=["2,001", "2,000"], limits=limits)


@pytest.mark.parametrize("unit", [b"[],", b"{},", b"0.5,", b'"ab",', b'{"a":[]},'])
def test_json_that_would_take_far_more_memory_than_bytes(images, unit):
    body = b"[" + unit * ((32 << 20) // len(unit) - 1) + b"0]"
    tracemalloc.start()
    try:
        refused(images, body, status=413, words=["values"])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert body.count(b",") > MOST_JSON_VALUES


# ---- Bodies by chance ------------------------------------------------------------------------------------------------

CELLS = (None, True, False, 0, 1, -1, 2, 12, 255, 256, 2**31, 2**63, 2**64 - 1, 0.5, 1e308, -1e-300, "", "images",
         "features", "UINT8", "FP32", "label", "value", "1", "\0", "x" * 300, [], {}, [[]], [0] * 12, {"name": "label"},
         [2, 2, 3, 1], [1, 3], {"binary_data_size": 12}, {"binary_data": True})
PIECES = (b"NaN", b"1e999", b"[" * 2000, b"]", b"{", b"}", b",", b'"', b"\\", b"\xff", b"\0", b"-", b"9" * 40, b"0",
          b"\\ud800", b"true", b"null", b" ")


def places(node, found) -> list:
    """Return every place in a document where a value can be exchanged."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        found.append((node, key))
        if isinstance(value, (dict, list)):
            places(value, found)
    return found


def changed(source: random.Random, document: dict) -> bytes:
    """Return a request with a few values exchanged, left out or added."""
    document = copy.deepcopy(document)
    for _ in range(source.choice((0, 1, 1, 1, 2))):
        node, key = source.choice(places(document, []) or [({}, "")])
        what, cell = source.random(), copy.deepcopy(source.choice(CELLS))
        if what < 0.7:
            node[key] = cell
        elif what < 0.85 and node:
            del node[key]
        elif isinstance(node, dict):
            node[source.choice(("data", "parameters", "id", "outputs", "shape", "new"))] = cell
        else:
            node.append(cell)
    return orjson.dumps(document)


def mutated(source: random.Random, head: bytes) -> bytes:
    for _ in range(source.choice((0, 0, 0, 1, 2))):
        place, size = source.randrange(len(head) + 1), source.choice((0, 0, 1, 5))
        head = head[:place] + source.choice(PIECES) + head[place + size:]
    return head


def test_bodies_by_chance_are_refused_or_answered(tmp_path_factory):
    models = [made(tmp_path_factory.mktemp("images")),
              made(tmp_path_factory.mktemp("rows"), task="regression", class_names=[], inputs="features",
                   input_shape=[3])]
    numbers = {"name": "features", "shape": [1, 3], "datatype": "FP32", "data": [1.5, 2, 3]}
    binary = [{key: value for key, value in tensor.items() if key != "data"} | {"parameters": {"binary_data_size": 12}}
              for tensor in (body_of(), numbers)]
    good = [{"id": "a", "inputs": [tensor], "parameters": {"binary_data_output": True}, "outputs": [
        {"name": "label" if tensor["name"] == "images" else "value", "parameters": {"binary_data": False}}]}
        for tensor in (body_of(), numbers, *binary)]
    source, counts = random.Random(0), {"refused": 0, "answered": 0, "answered from binary data": 0}
    for _ in range(6000):
        document = source.choice(good)
        head = mutated(source, changed(source, document))
        behind = source.randbytes(source.choice((0, 11, 13, *[12 if document in good[2:] else 0] * 9)))
        length = source.choice((None, "0", "-1", str(len(head) + 1), *[str(len(head))] * 9))
        model = source.choice((*models, *[models[good.index(document) % 2]] * 6))
        try:
            request = parse_infer(model, head + behind, length, Limits(most_examples=100))
        except RequestError as error:
            assert error.status in (400, 413) and error.message.isprintable() and len(error.message) < 1000
            counts["refused"] += 1
            continue
        check(model, request)
        counts["answered from binary data" if behind else "answered"] += 1
    assert min(counts.values()) > 200, counts


def check(model: Artefact, request: InferRequest) -> None:
    """Assert that a request is one that a runtime and the answer can rely on."""
    inputs = request.inputs
    assert inputs.dtype == (np.uint8 if model.inputs == "images" else np.float32)
    assert inputs.shape[1:] == model.input_shape and 1 <= len(inputs) <= 100
    assert inputs.flags.c_contiguous and inputs.flags.aligned and np.isfinite(inputs).all()
    assert request.outputs and request.binary <= set(request.outputs) and isinstance(request.id, str)
    scores = np.zeros((len(inputs), model.columns), np.float32)
    answer, headers = render_infer(model, request, scores, version="1", request_id="x")
    said = orjson.loads(answer[:int(headers.get(HEADER_LENGTH, len(answer)))])
    assert [output["name"] for output in said["outputs"]] == list(request.outputs)


def test_the_room_starts_without_the_frameworks():
    code = ("import sys; import hpcai_cli.engine.serving.protocol, hpcai_cli.engine.serving.examples; "
            "print([name for name in ('tensorflow', 'keras', 'pandas', 'rich', 'typer') if name in sys.modules])")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout.strip() == "[]"
