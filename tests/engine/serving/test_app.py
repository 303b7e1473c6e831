"""What the server answers to each address, and how it refuses what it cannot answer."""

import asyncio
import gzip
import io
import json
import re
import zlib

import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import validate
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hpcai_cli.engine.serving.app import Application
from hpcai_cli.engine.serving.metrics import Metrics
from hpcai_cli.engine.serving.models import Models, Place
from hpcai_cli.engine.serving.request_log import RequestLog
from hpcai_cli.engine.serving.settings import Settings

INFER, PREDICT = "/v2/models/tiny/infer", "/v2/models/tiny/predict"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(exports, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    exports.write(folder / "tiny" / "1")
    exports.write(folder / "tiny" / "2", "other")
    exports.write(folder / "shop", "shop")
    return folder


@pytest.fixture
def make(folder, tmp_path):
    """Return what makes an application of some of the models."""
    logs = []

    def application(*names: str, slot: int = 0, **settings) -> Application:
        folders = {name: folder / name for name in names or ("tiny", "shop")}
        state = tmp_path / "state"
        state.mkdir(exist_ok=True)
        options = Settings(tuple(folders), trust=True, **settings)
        place = Place(state, slot, Metrics(list(folders), state, slot))
        models = Models(folders, options, place)
        models.load(strict=True)
        logs.append(RequestLog(str(tmp_path / "requests.log")))
        return Application(models, options, place, logs[-1])
    yield application
    for log in logs:
        log.close()


@pytest.fixture
def app(make):
    return make()


@pytest.fixture
def ask(app, kit):
    """Return what asks the application of both models."""
    return lambda *words, **settings: kit.run(kit.ask(app, *words, **settings))


def picture(seed: int = 0, format: str = "PNG") -> tuple[bytes, np.ndarray]:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue(), pixels[None, :, :, None]


def form(*parts: tuple[str, bytes], end: bool = True) -> tuple[bytes, dict[str, str]]:
    lines = [b'--edge\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n%s\r\n'
             % (name.encode(), content) for name, content in parts]
    return b"".join([*lines, b"--edge--\r\n" if end else b""]), {"Content-Type": "multipart/form-data; boundary=edge"}


# ---- The protocol --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("version", "seed"), [("", 2), ("/versions/1", 1), ("/versions/2", 2)])
def test_infer(ask, kit, version, seed):
    pictures = kit.images(3)
    answer = ask("POST", f"/v2/models/tiny{version}/infer", kit.infer_body(pictures, id="mine"))
    assert answer.status == 200 and answer.json["id"] == "mine"
    assert answer.json["model_version"] == (version[-1:] or "2")
    np.testing.assert_allclose(kit.chances_of(answer.json), kit.expected(pictures, seed), atol=1e-5)


def test_a_body_in_chunks_is_the_same(ask, kit):
    body = kit.infer_body(kit.images(2))
    whole = ask("POST", INFER, body).json
    assert ask("POST", INFER, [body[:7], b"", body[7:40], body[40:]]).json["outputs"] == whole["outputs"]


def test_health_and_metadata(ask, app):
    assert ask("GET", "/v2/health/live").json == {"live": True}
    assert ask("GET", "/v2/health/ready").json == {"ready": True}
    assert ask("GET", "/v2").json["extensions"] == ["binary_tensor_data", "model_repository", "statistics"]
    assert ask("GET", "/v2/models/tiny").json["versions"] == ["1", "2"]
    assert ask("GET", "/v2/models/tiny/versions/1").json["inputs"][0]["shape"] == [-1, 4, 4, 1]
    assert ask("GET", "/v2/models/tiny/ready").status == ask("GET", "/v2/models/shop/versions/1/ready").status == 200
    assert [(one["name"], one["version"]) for one in ask("POST", "/v2/repository/index").json] == \
        [("tiny", "1"), ("tiny", "2"), ("shop", "1")]
    assert ask("HEAD", "/v2/health/ready").status == 200
    app.draining = True
    stopping = ask("GET", "/v2/health/ready")
    assert (stopping.status, stopping.headers["connection"]) == (503, "close")


# ---- For people ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("way", ["form", "several", "raw", "stream"])
def test_predict_takes_images(ask, kit, way):
    (content, pixels), (second, more) = picture(), picture(1)
    body, headers = {"form": form(("image", content)), "raw": (content, {"Content-Type": "image/png"}),
                     "several": form(("image", content), ("note", b"x"), ("image", second)),
                     "stream": (content, {"Content-Type": "application/octet-stream"})}[way]
    answer = ask("POST", PREDICT, body, headers=headers)
    assert answer.status == 200 and (answer.json["model"], answer.json["version"]) == ("tiny", "2")
    wanted = kit.expected(np.concatenate([pixels, more]) if way == "several" else pixels, 2)
    found = [list(one["probabilities"].values()) for one in answer.json["answers"]]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert answer.json["answers"][0]["label"] == ("red", "green", "blue")[wanted[0].argmax()]


@pytest.mark.parametrize("rows", [{"rows": [{"pages": 3, "month": "June"}, {"pages": None, "month": "May"}]},
                                  [{"pages": "3", "month": "June"}, {"pages": "", "month": "May"}]])
def test_predict_takes_rows(ask, rows):
    answer = ask("POST", "/v2/models/shop/predict", json.dumps(rows).encode(), headers=JSON)
    # (pages - 1) + 10 for May + 100 for June; the fill of pages is 2.
    assert answer.json["answers"] == [{"value": 102.0}, {"value": 11.0}]


def test_predict_without_a_name(make, ask, kit):
    content, _ = picture()
    headers = {"Content-Type": "image/png"}
    assert kit.run(kit.ask(make("tiny", slot=1), "POST", "/predict", content, headers)).status == 200
    refused = ask("POST", "/predict", content, headers=headers)
    assert refused.status == 404 and "tiny or shop" in refused.json["error"]


@pytest.mark.parametrize("name", ["/", "/docs"])
def test_pages_are_whole_and_load_nothing(ask, name):
    answer = ask("GET", name)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "unsafe" not in policy
    assert not re.search(rb'(?:src|href)="(?:https?:)?//', answer.body) and b" style=" not in answer.body
    assert not re.search(rb"\son[a-z]+=", answer.body) and b"innerHTML" not in answer.body


# ---- OpenAPI -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token", ["", "a-long-token"])
def test_openapi_is_valid_and_tells_the_truth(make, kit, token):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    app = make(token=token)
    document = kit.run(kit.ask(app, "GET", "/openapi.json", headers=headers)).json
    validate(document)

    def check(schema: str, instance) -> None:
        jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{schema}", **document}).validate(instance)
    body = kit.infer_body(kit.images(2))
    check("tiny.InferRequest", json.loads(body))
    check("tiny.InferAnswer", kit.run(kit.ask(app, "POST", INFER, body, headers)).json)
    predict = document["paths"]["/v2/models/shop/predict"]["post"]
    example = predict["requestBody"]["content"]["application/json"]["example"]
    answer = kit.run(kit.ask(app, "POST", "/v2/models/shop/predict", json.dumps(example).encode(), headers | JSON))
    assert answer.status == 200
    check("shop.Answers", answer.json)
    with pytest.raises(jsonschema.ValidationError):
        check("tiny.InferRequest", {"inputs": []})


# ---- Counting ------------------------------------------------------------------------------------------------------

def test_metrics_add_up_over_workers(make, kit):
    apps = [make(slot=slot) for slot in (0, 1)]
    for app in apps:
        for body in (kit.infer_body(kit.images(3)), b"nothing"):
            kit.run(kit.ask(app, "POST", INFER, body))
        kit.run(kit.ask(app, "GET", "/nowhere"))
    text = kit.run(kit.ask(apps[0], "GET", "/metrics")).body.decode()
    found = {(sample.name, sample.labels.get("model"), sample.labels.get("status"), sample.labels.get("le")):
             sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
    assert found["hpcai_requests_total", "tiny", "200", None] == 2
    assert found["hpcai_requests_total", "tiny", "400", None] == 2
    assert found["hpcai_requests_total", "", "404", None] == 2
    assert found["hpcai_request_seconds_count", "tiny", None, None] == 4
    assert found["hpcai_batch_size_sum", "tiny", None, None] == 6
    assert found["hpcai_batch_size_bucket", "tiny", None, "2.0"] == 0
    assert found["hpcai_batch_size_bucket", "tiny", None, "4.0"] == 2
    assert found["hpcai_requests_in_flight", "", None, None] == 1  # This one.
    assert found["hpcai_examples_queued", "tiny", None, None] == 0


def test_statistics_add_up_over_workers(make, kit):
    apps = [make(slot=slot) for slot in (0, 1)]
    for app in apps:
        kit.run(kit.ask(app, "POST", INFER, kit.infer_body(kit.images(3))))
        kit.run(kit.ask(app, "POST", INFER, b"nothing"))
    path = "/v2/models/tiny/statistics"
    said = kit.run(kit.ask(apps[0], "GET", path)).json
    assert said["answers"]["examples"] == 6 and (said["requests"]["2xx"], said["requests"]["4xx"]) == (2, 2)
    assert kit.run(kit.ask(apps[0], "GET", path, query="since=9e9")).json["answers"]["examples"] == 0
    for query in ("since=", "since=nan", "else=1", "since=1&since=2", "%00"):
        assert kit.run(kit.ask(apps[0], "GET", path, query=query)).status == 400


def test_a_line_for_each_request(make, kit, tmp_path):
    app = make()
    pictures = kit.images(10)
    kit.run(kit.ask(app, "POST", INFER, kit.infer_body(pictures), {"X-Request-Id": "mine-1"}))
    kit.run(kit.ask(app, "POST", INFER, kit.infer_body(pictures[:1], id="of the body")))
    kit.run(kit.ask(app, "GET", "/a\x1b[2J\u202e/b\n", headers={"X-Request-Id": "x\x1b[0m"}))
    app._log.close()
    first, second, third = map(json.loads, (tmp_path / "requests.log").read_text().splitlines())
    assert first.items() >= {"id": "mine-1", "model": "tiny", "version": "2", "method": "POST", "path": INFER,
                             "status": 200, "examples": 10}.items()
    chances = kit.expected(pictures, 2)
    assert [label for label, _ in first["answers"]] == [("red", "green", "blue")[best]
                                                        for best in chances[:8].argmax(axis=1)]
    np.testing.assert_allclose([chance for _, chance in first["answers"]], chances[:8].max(axis=1), atol=1e-4)
    assert 0 < first["milliseconds"] < 10_000 and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", first["time"])
    assert second["id"] == "of the body"
    assert third["path"].isprintable() and re.fullmatch(r"[0-9a-f]+-[0-9a-f]+", third["id"])


def test_a_request_keeps_its_id_where_that_is_harmless(ask):
    assert ask("GET", "/v2", headers={"X-Request-Id": "a.b-C_7:1"}).headers["x-request-id"] == "a.b-C_7:1"
    for given in ("", "x" * 101, "a b", "a\r\nSet-Cookie: x", "é", "<b>"):
        assert ask("GET", "/v2", headers={"X-Request-Id": given}).headers["x-request-id"] != given
    assert ask("GET", "/v2").headers["x-request-id"] != ask("GET", "/v2").headers["x-request-id"]


# ---- Refusals ------------------------------------------------------------------------------------------------------

def refused(answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.body
    assert list(answer.json) == ["error"] and answer.json["error"].isprintable()
    assert answer.headers["content-type"] == "application/json"
    for word in words:
        assert word in answer.json["error"], answer.json


@pytest.mark.parametrize("path", ["", "//", "/v2/models", "/v2/models/", "/v2/models/tiny/", "/v2/models/tiny/infer/",
                                  "/v3", "/v2/models/tiny/versions/1/else", "/docs/", "/../etc/passwd", "/page.html",
                                  "/v2/repository/models/else/load", "/v2/models/else/infer", "/v2/models/tiny%2f",
                                  "/v2/models/tiny/versions/9/infer", "/v2/models/\u202e/infer"])
def test_what_is_not_there(ask, path):
    for method in ("GET", "POST"):
        answer = ask(method, path)
        assert answer.status in (404, 405)
        if answer.status == 405:
            answer = ask("POST" if method == "GET" else "GET", path)
        refused(answer, 404)


@pytest.mark.parametrize(("method", "path", "allowed"), [
    ("GET", INFER, "POST"), ("PUT", PREDICT, "POST"), ("POST", "/v2/health/live", "GET, HEAD"),
    ("DELETE", "/v2/models/tiny", "GET, HEAD"), ("GET", "/v2/repository/index", "POST"), ("POST", "/", "GET, HEAD"),
    ("OPTIONS", "/v2", "GET, HEAD"), ("TRACE", "/metrics", "GET, HEAD")])
def test_other_methods(ask, method, path, allowed):
    answer = ask(method, path)
    refused(answer, 405)
    assert answer.headers["allow"] == allowed


def test_bodies_that_are_too_long_compressed_missing_or_cut_off(make, kit):
    app = make(body_limit=2000)

    def ask(*words, **settings):
        return kit.run(kit.ask(app, *words, **settings))
    refused(ask("POST", INFER, b"x" * 2001), 413, "2,000")
    refused(ask("POST", INFER, [b"x" * 700] * 3), 413)
    refused(ask("POST", INFER, b"", headers={"Content-Length": "99999999999999999999"}), 413)
    for encoding in ("gzip", "br", "deflate, gzip"):
        refused(ask("POST", INFER, gzip.compress(b"{}"), headers={"Content-Encoding": encoding}), 415)
    assert ask("POST", INFER, kit.infer_body(kit.images(1)), headers={"Content-Encoding": "identity"}).status == 200
    refused(ask("POST", INFER, headers={"Content-Length": "0"}), 400)


def test_a_body_without_a_length(app, kit):
    async def scenario():
        sent = []

        async def send(message):
            sent.append(message)
        await app({"type": "http", "method": "POST", "path": INFER, "headers": []}, None, send)
        return sent
    sent = kit.run(scenario())
    assert sent[0]["status"] == 411


def test_a_body_that_does_not_come(make, kit):
    app = make(timeout=0.1)

    async def scenario():
        sent = []

        async def receive():
            if len(sent) < 2:
                await asyncio.sleep(100)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
        await app({"type": "http", "method": "POST", "path": INFER, "headers": [(b"content-length", b"9")]},
                  receive, send)
        return sent
    sent = kit.run(scenario())
    assert sent[0]["status"] == 408 and (b"connection", b"close") in sent[0]["headers"]
    assert b"did not come" in sent[1]["body"]


def test_a_client_that_goes_away(app, kit, tmp_path):
    async def scenario():
        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            pass
        await app({"type": "http", "method": "POST", "path": INFER, "headers": [(b"content-length", b"9")]},
                  receive, send)
    kit.run(scenario())
    app._log.close()
    assert json.loads((tmp_path / "requests.log").read_text().splitlines()[-1])["status"] == 499


@pytest.mark.parametrize(("body", "status"), [
    (b"", 400), (b"{", 400), (b"[" * 100_000, 400), (b'{"a":' * 50_000, 400), (b"NaN", 400), (b'"\xff"', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,4,4,1],"data":[NaN]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,4,4,1],"data":[Infinity]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[-1,4,4,1],"data":[1]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[9223372036854775807,4,4,1],"data":[1]}]}', 413),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[18446744073709551617,4,4,1],"data":[1]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[0,4,4,1],"data":[]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"FP32","shape":[1,4,4,1],"data":[1]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[1,4,4],"data":[1]}]}', 400),
    (b'{"inputs":[{"name":"images","datatype":"UINT8","shape":[2,4,4,1],"data":[1,2,3]}]}', 400)])
def test_requests_that_the_protocol_does_not_know(ask, body, status):
    refused(ask("POST", INFER, body), status)


@pytest.mark.parametrize(("length", "status"), [("x", 400), ("-1", 400), ("99", 400), ("1e1", 400), ("\u00b2", 400)])
def test_lengths_of_the_json_that_cannot_be(ask, length, status):
    refused(ask("POST", INFER, b"{}", headers={"Inference-Header-Content-Length": length}), status)


def test_forms_images_and_rows_that_cannot_be_used(ask):
    content, _ = picture()
    cut, edge = form(("image", content), end=False)
    image, png = {"Content-Type": "image/png"}, form(("image", content))[0]
    cases = [
        (cut, edge, 400), (b"", edge, 400), (b"nothing", edge, 400), (form(("else", content))[0], edge, 400),
        (png, {"Content-Type": "multipart/form-data"}, 400),
        (png, {"Content-Type": "multipart/form-data; boundary=" + "x" * 300}, 400),
        (png.replace(b"Content-Disposition", b"X" * 10_000), edge, 400),
        (form(("image", b"no image"))[0], edge, 415), (content[:60], image, 400), (b"", image, 400),
        (content, {}, 415), (content, {"Content-Type": "text/html"}, 415), (b'{"rows": []}', JSON, 415),
        (bomb(), image, 413), (form(*[("image", content)] * 1025)[0], edge, 413)]
    for body, headers, status in cases:
        refused(ask("POST", PREDICT, body, headers=headers), status)
    rows = [(b"[]", 400), (b"{}", 400), (b'[{"pages": 1}]', 400), (b'[{"pages": "x", "month": "May"}]', 400),
            (b"7", 400), (b'{"rows": [[1]]}', 400), (b"null", 400), (b'[{"pages": 1, "month": {}}]', 400)]
    for body, status in rows:
        refused(ask("POST", "/v2/models/shop/predict", body, headers=JSON), status)
    refused(ask("POST", "/v2/models/shop/predict", content, headers=image), 415)


def bomb() -> bytes:
    """Return a PNG of a few bytes that says that it has 100,000 times 100,000 pixels."""
    content = bytearray(picture()[0])
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def test_a_failing_model_is_no_secret_and_tells_none(app, ask, kit):
    def fail(inputs):
        raise ValueError("/secret/path")
    app._models.find("tiny").batcher._scores = fail
    answer = ask("POST", INFER, kit.infer_body(kit.images(1)))
    refused(answer, 500)
    assert "secret" not in answer.json["error"]


def test_an_unforeseen_failure_is_told_in_the_log(app, ask, kit, tmp_path):
    app._handlers["server"] = None
    refused(ask("GET", "/v2"), 500)
    app._log.close()
    assert "TypeError" in (tmp_path / "requests.log").read_text()


def test_a_token(make, kit):
    app = make(token="a-long-token")

    def ask(path: str, *values: str, method: str = "GET"):
        return kit.run(kit.ask(app, method, path, headers=dict(zip(["Authorization"], values, strict=False))))
    for path in ("/v2", "/metrics", "/openapi.json", "/v2/models/tiny", "/v2/models/tiny/statistics", "/nowhere"):
        for values in ((), ("a-long-token",), ("Bearer",), ("Bearer a-long-toke",), ("Bearer a-long-token2",),
                       ("Basic a-long-token",), ("Bearer é",), ("Bearer a-long-token, Bearer x",)):
            answer = ask(path, *values)
            refused(answer, 401)
            assert answer.headers["www-authenticate"] == "Bearer"
    for path in (INFER, PREDICT, "/v2/repository/index", "/v2/repository/models/tiny/load"):
        refused(ask(path, method="POST"), 401)
    for value in ("Bearer a-long-token", "bearer  a-long-token"):
        assert ask("/v2", value).status == 200
    for path in ("/v2/health/live", "/v2/health/ready", "/", "/docs"):
        assert ask(path).status == 200


def test_loading_on_request(make, kit, exports, tmp_path):
    exports.write(tmp_path / "own" / "1")
    app = make("tiny", slot=2)
    app._models._folders["tiny"] = tmp_path / "own"
    path = "/v2/repository/models/tiny/load"
    assert kit.run(kit.ask(app, "POST", path)).json == {}
    (tmp_path / "own" / "current").write_text("9")
    refused(kit.run(kit.ask(app, "POST", path, b"{}")), 400, "names a version that is not there")
