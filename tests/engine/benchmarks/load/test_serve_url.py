"""Any server of the Open Inference Protocol: what it says of its models, what it is sent, what becomes of that."""

import json
import socket
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tritonclient.http import InferenceServerClient, InferInput

from hpcai_cli.engine.benchmarks.load import protocol_client, protocol_requests, serve_url
from hpcai_cli.engine.benchmarks.load.protocol_client import TYPES, Model, Server, Tensor, server_at
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.errors import DataError, HpcaiError, UsageError

HERE = Server(protocol_client.Address("127.0.0.1", 1), "127.0.0.1:1")


@pytest.fixture
def serve():
    """Return what starts a server that answers as a function of method, path, headers and body does, and its URL."""
    started = []

    def start(answer, *, version: str = "HTTP/1.1", chunked: bool = False) -> str:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = version

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, said = answer(self.command, self.path, self.headers, body)
                content = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", len(content))))
                self.end_headers()
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content) if chunked else content)

            do_GET = do_POST

            def log_message(self, *words):
                pass
        running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        started.append(running)
        return f"http://127.0.0.1:{running.server_port}"
    yield start
    for running in started:
        running.shutdown()
        running.server_close()


class Protocol:
    """Answers as a server of one model does, and keeps the bodies that it was asked with."""

    def __init__(self, *inputs: dict, extensions: tuple = (), prefix: str = "", status: int = 200):
        self.inputs, self.extensions, self.prefix, self.status = inputs, extensions, prefix, status
        self.asked: list[tuple[dict, bytes]] = []

    def __call__(self, method, path, headers, body):
        path = path.removeprefix(self.prefix)
        if (method, path) == ("GET", "/v2/models/m"):
            return 200, {"name": "m", "inputs": self.inputs, "outputs": []}
        if (method, path) == ("GET", "/v2"):
            return 200, {"name": "other", "extensions": self.extensions}
        if (method, path) == ("POST", "/v2/models/m/infer"):
            self.asked.append((dict(headers), body))
            return self.status, {"error": "it is full"} if self.status != 200 else {"outputs": []}
        return 404, {"error": "no such thing"}


def asked(**changed) -> serve_url.Asked:
    return serve_url.Asked(**{"model": "m", "seconds": 0.1, "connections": 2, "batch": 1, "tensors": "auto",
                              "shapes": (), **changed})


IMAGES = {"name": "images", "datatype": "UINT8", "shape": [-1, 2, 2, 1]}


# ---- What it is sent -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("datatype", sorted(set(TYPES) - {"BF16", "BYTES"}))
def test_a_binary_request_is_the_one_of_tritons_own_client(datatype):
    model = Model("m", (Tensor("a", datatype, (-1, 3)), Tensor("b", "FP32", (2, -1))), True)
    requests = protocol_requests.requests_for(HERE, model, shapes={"b": (2, 4)}, batch=5, binary=True)
    assert len(set(requests)) > 1
    head, _, body = requests[0].partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"inference-header-content-length: ")[2].split(b"\r\n")[0])
    document, rest = json.loads(body[:length]), body[length:]
    sizes = [each["parameters"]["binary_data_size"] for each in document["inputs"]]
    assert sum(sizes) == len(rest)
    arrays = [np.frombuffer(part, TYPES[each["datatype"]]).reshape(each["shape"]) for part, each in
              zip((rest[:sizes[0]], rest[sizes[0]:]), document["inputs"], strict=True)]
    assert [array.shape for array in arrays] == [(5, 3), (2, 4)]
    theirs = []
    for tensor, array in zip(model.inputs, arrays, strict=True):
        theirs.append(InferInput(tensor.name, array.shape, tensor.datatype))
        theirs[-1].set_data_from_numpy(array, binary_data=True)
    # Without wanted outputs it asks for binary ones, as ours does.
    content, their_length = InferenceServerClient.generate_request_body(theirs)
    assert json.loads(content[:their_length]) == document and content[their_length:] == rest


def test_texts_are_packed_as_tritons_own_client_does_it():
    model = Model("m", (Tensor("a", "BYTES", (3,)),), True)
    body = protocol_requests.requests_for(HERE, model, shapes={}, batch=1, binary=True)[0].partition(b"\r\n\r\n")[2]
    packed, texts = body[body.rindex(b"}") + 1:], []
    while packed:
        size = int.from_bytes(packed[:4], "little")
        texts.append(packed[4:4 + size])
        packed = packed[4 + size:]
    theirs = InferInput("a", (3,), "BYTES")
    theirs.set_data_from_numpy(np.array(texts, object), binary_data=True)
    content, length = InferenceServerClient.generate_request_body([theirs])
    assert len(texts) == 3 and body.endswith(content[length:])


@pytest.mark.parametrize("datatype", sorted(set(TYPES) - set(protocol_requests.BINARY_ONLY)))
def test_json_holds_as_many_values_as_the_shape_says(datatype):
    model = Model("m", (Tensor("a", datatype, (-1, 2, 3)),), False)
    request = protocol_requests.requests_for(HERE, model, shapes={}, batch=4, binary=False)[0]
    entry, = json.loads(request.partition(b"\r\n\r\n")[2])["inputs"]
    assert entry["shape"] == [4, 2, 3] and len(entry["data"]) == 24 and entry["datatype"] == datatype
    kind = {"BYTES": str, "BOOL": bool}.get(datatype, float if datatype.startswith("FP") else int)
    assert {type(value) for value in entry["data"]} == {kind}


@pytest.mark.parametrize(("tensor", "given", "words"), [
    (Tensor("a", "FP32", (-1, -1)), {}, "leaves the shape of the input a open"),
    (Tensor("a", "FP32", (-1, 3)), {"shapes": {"a": (2, 4)}}, "another shape"),
    (Tensor("a", "FP32", (-1, 3)), {"shapes": {"b": (2, 3)}}, "no such input"),
    (Tensor("a", "FP32", (3,)), {"batch": 2}, "one example at a time"),
    (Tensor("a", "FP32", (-1, 10**12)), {}, "takes"),
    (Tensor("a", "UINT8", (-1, 10**4)), {"batch": 10**6}, "takes"),
    (Tensor("a", "BF16", (2,)), {}, "JSON has no numbers")])
def test_requests_that_cannot_be_made(tensor, given, words):
    with pytest.raises(UsageError, match=words):
        protocol_requests.requests_for(HERE, Model("m", (tensor,), True),
                                       **{"shapes": {}, "batch": 1, "binary": False, **given})


# ---- What a server says --------------------------------------------------------------------------------------------

def test_binary_is_taken_where_the_server_offers_it(serve):
    for extensions, kind in (((), "application/json"), (("binary_tensor_data",), "application/octet-stream")):
        protocol = Protocol(IMAGES, extensions=extensions)
        asked().of(serve(protocol), "", None)
        (headers, _), = protocol.asked
        assert headers["Content-Type"] == kind


def test_a_path_before_the_protocols_and_a_token(serve):
    protocol = Protocol(IMAGES, prefix="/inference")
    load = asked(batch=3).of(f"{serve(protocol)}/inference/", "secret-token", None)
    (headers, body), = protocol.asked
    assert headers["Authorization"] == "Bearer secret-token" and headers["Host"] == load.server.host
    assert json.loads(body)["inputs"][0]["shape"] == [3, 2, 2, 1]


@pytest.mark.parametrize("inputs", [[], [{}], "images", [{**IMAGES, "datatype": "FLOAT"}], [{**IMAGES, "shape": None}],
                                    [{**IMAGES, "shape": [-2]}], [{**IMAGES, "shape": [1e999]}],
                                    [{**IMAGES, "name": 1}]])
def test_metadata_that_do_not_say_what_a_model_takes(serve, inputs):
    protocol = Protocol()
    protocol.inputs = inputs
    with pytest.raises(DataError, match="does not say what the model m takes"):
        asked().of(serve(protocol), "", None)


def test_other_servers_and_other_models(serve):
    with pytest.raises(DataError, match="does not speak the Open Inference Protocol"):
        asked().of(serve(lambda *_: (200, b"<html>")), "", None)
    with pytest.raises(DataError, match="does not speak the Open Inference Protocol"):
        asked().of(serve(lambda *_: (404, b"<html>")), "", None)
    with pytest.raises(UsageError, match=r"no such model.*no such thing"):
        asked(model="n").of(serve(Protocol(IMAGES)), "", None)
    for token, words in (("", "request without a token"), ("wrong-token", "token")):
        with pytest.raises(HpcaiError, match=f"refuses the {words}.*--token-file") as refused:
            asked().of(serve(lambda *_: (401, {"error": "who are you"})), token, None)
        assert "wrong-token" not in str(refused.value)


def test_nobody_and_something_else_listen():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def greet() -> None:
            made, _ = listener.accept()
            with made:
                made.recv(1000)
                made.sendall(b"SSH-2.0-OpenSSH\r\n")
        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(DataError, match="does not speak HTTP"):
            asked().of(f"http://127.0.0.1:{port}", "", None)
    with pytest.raises(HpcaiError, match=f"nobody answers at 127.0.0.1:{port}"):
        asked().of(f"http://127.0.0.1:{port}", "", None)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://a", "http://", "http://a:b", "http://a/?b", "http://a\n",
                                 "http://me:word@a"])
def test_what_is_no_address(url):
    with pytest.raises(UsageError, match="no server's address"):
        server_at(url)


def test_a_refused_request_is_told_in_the_servers_words(serve):
    with pytest.raises(DataError, match=r"it is full.*received: 503"):
        asked().of(serve(Protocol(IMAGES, status=503)), "", None)


# ---- What is measured ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", [{}, {"chunked": True}, {"version": "HTTP/1.0"}])
def test_constant_rates_are_kept_and_all_answers_counted(serve, way, monkeypatch):
    monkeypatch.setattr(serve_url, "START", 40)
    protocol = Protocol(IMAGES)
    load = asked(seconds=0.25).of(serve(protocol, **way), "", None)
    found = list(serve_url.measure(load, [40, 80]))
    figures = {each.name: each for each in found if isinstance(each, Figure)}
    assert len(figures) == 6 and all(each.value > 0 and len(each.rounds) == 3 for each in figures.values())
    table, = (each for each in found if isinstance(each, Table))
    assert [row[0] for row in table.rows] == [40, 80] and {row[-1] for row in table.rows} == {""}
    assert [row[2] <= row[3] <= row[4] for row in table.rows] == [True, True]
    curves, = (each for each in found if isinstance(each, Curves))
    assert set(curves.lines) == {"p50", "p90", "p99"}
    # One to try, and then warm-up and three rounds of both.
    assert len(protocol.asked) == 1 + 10 + 3 * (10 + 20)
    assert len({body for _, body in protocol.asked}) == protocol_requests.DIFFERENT


def test_without_rates_it_finds_what_the_server_bears(serve, monkeypatch):
    monkeypatch.setattr(serve_url, "ROUNDS", 1)
    protocol, lock, moments = Protocol(IMAGES), threading.Lock(), deque()

    def answer(*request):
        # It takes twelve requests in each 0.3 s, which are 40 in a second, and refuses more.
        with lock:
            now = time.monotonic()
            while moments and moments[0] < now - 0.3:
                moments.popleft()
            if len(moments) >= 12:
                return 503, {"error": "full"}
            moments.append(now)
        return protocol(*request)
    found = list(serve_url.measure(asked(seconds=0.3).of(serve(answer), "", None), ()))
    ramp, rounds = (each for each in found if isinstance(each, Table))
    offered = [row[0] for row in ramp.rows]
    assert offered == sorted(offered) and len(offered) >= 4 and "503: " in ramp.rows[-1][-1]
    figures = {each.name.partition(", ")[2] or each.name: each for each in found if isinstance(each, Figure)}
    most = next(figure for name, figure in figures.items() if name.endswith("is borne"))
    assert 10 < most.value < 60
    assert len(rounds.rows) == len(serve_url.SHARES) + 1
    assert {"at 90% of these answers: p99", "at 90% of these answers: p50", "at saturation: answers"} <= set(figures)


def test_a_server_that_ends_leaves_no_number_that_is_none(serve):
    protocol = Protocol(IMAGES)
    load = asked().of(serve(protocol), "", None)
    protocol.status = 500
    found = list(serve_url.measure(load, [50]))
    table, = (each for each in found if isinstance(each, Table))
    assert table.rows[0][1:5] == (0.0, None, None, None) and table.rows[0][-1] == "500: 15"
    assert not any(isinstance(each, (Figure, Curves)) for each in found)
