"""What the server's fuzzer sends: questions whose answers are known, and requests that are wrong somewhere."""

import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from fuzz import mutated
from PIL import Image

IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")
_METHODS = ("GET", "GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "PATCH", "DELETE", "TRACE", "CONNECT", "QUERY",
            "get", "P\0ST", "")
_PATHS = ("/v2/models/tiny/infer", "/v2/models/tiny/predict", "/v2/models/shop/predict", "/v2/models/plain/predict",
          "/v2/models/shop/infer", "/v2/models/tiny/versions/1/infer", "/v2/models/tiny/versions/%31/infer",
          "/v2/models/%ff/infer", "/v2/models//infer", "/v2/models/tiny/", "/v2/models/tiny/ready", "/predict", "/",
          "/docs", "/metrics", "/openapi.json", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready?x=%zz",
          "/v2/repository/index", "/v2/repository/models/shop/load", "/v2/repository/models/none/load",
          "/v2/models/tiny/statistics?since=1", "/v2/models/tiny/statistics?since=1e999",
          "/v2/models/shop/statistics?since=%00&since", "*", "//", "/%00", "/\xff", "http://a/v2", "http://a:b@[::1/v2",
          "/../../etc/passwd", "/v2/models/..%2f..%2fetc/infer", "/" + "a" * 5000, "/?" + "a=b&" * 2000,
          "/v2/models/" + "tiny/" * 1000)
_VALUES = (None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e308, 1e-320, float("nan"), float("-inf"), 2**31, 2**63 - 1,
           2**63, 2**64, 10**40, "", "a", "1", "nan", "1e999", "9" * 2000, "\0", "\ud800", "\u202e", "é" * 70, "<b>",
           "images", "UINT8", "FP32", "BYTES", [], [[]], [None], {}, {"a": {}}, [0] * 48, [[[[0]] * 4] * 4],
           [1, 4, 4, 1], [2**62, 4, 4, 1], [-1, 4, 4, 1], [1, 4, 4, 1, 1], [1, 3], [1.0, 3])
_NAMES = ("", "data", "shape", "inputs", "outputs", "parameters", "id", "name", "binary_data_size",
          "binary_data_output", "classification", "shared_memory_region", "rows", "pages", "month", "__proto__",
          "\ud800")
_HEADERS = ("Content-Encoding: gzip", "Content-Encoding: identity", "Content-Encoding:", "Expect: 100-continue",
            "Expect: 200-ok", "Upgrade: h2c", "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x",
            "Connection: keep-alive", "TE: trailers", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity",
            "Content-Length: 3", "X-Request-Id: \xff", "X-Request-Id: mine", "Authorization: Bearer x",
            "Range: bytes=0-", ": x", "no colon", "A: " + "b" * 20_000, "A: b\r\n" * 150, " folded: x", "A: b\0c",
            "Accept: " + "*/*," * 500, "Cookie: a=b", "Forwarded: for=x", "Host: x")
_KINDS = ("application/json", "image/png", "image/x", "application/octet-stream", "text/plain; charset=x", "\xff", "",
          "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=" + "x" * 300)


@dataclass(frozen=True)
class Question:
    """A valid request and what tells its answer from a wrong one."""

    content: bytes
    judge: Callable[[dict, bytes], str]
    """From the answer's headers and body to what is wrong with it, empty where it is right."""


@dataclass(frozen=True)
class Case:
    """What is sent on one connection: pieces with a short pause between them."""

    pieces: tuple[bytes, ...]
    leaves: bool
    """The client goes away without reading."""


# ---- Valid requests ------------------------------------------------------------------------------------------------

def question(source: random.Random, kit) -> Question:
    """Return one of the valid requests; kit are the functions of the serving tests' conftest.py."""
    pictures = kit.images(source.randint(1, 3), source.randrange(10**6))
    kind = source.choice((_asked_in_json, _asked_in_binary, _asked_for_pictures, _asked_for_rows))
    return kind(source, kit, pictures)


def _asked_in_json(source, kit, pictures) -> Question:
    name = f"q{source.randrange(10**9)}"
    body = kit.infer_body(pictures, id=name)

    def judge(headers: dict, content: bytes) -> str:
        said = json.loads(content)
        return _compared(kit, kit.chances_of(said), pictures) if said["id"] == name else f"it is for {said['id']}"
    return Question(_framed("POST /v2/models/tiny/infer", ["Content-Type: application/json"], body,
                            chunked=source.random() < 0.3, source=source), judge)


def _asked_in_binary(source, kit, pictures) -> Question:
    head = json.dumps(_binary_document(pictures.shape)).encode()

    def judge(headers: dict, content: bytes) -> str:
        length = int(headers["inference-header-content-length"])
        found = np.frombuffer(content[length:length + 12 * len(pictures)], "<f4").reshape(-1, 3)
        return _compared(kit, found, pictures)
    return Question(_framed("POST /v2/models/tiny/infer", [f"Inference-Header-Content-Length: {len(head)}"],
                            head + pictures.tobytes(), chunked=source.random() < 0.3, source=source), judge)


def _asked_for_pictures(source, kit, pictures) -> Question:
    files = [_file(Image.fromarray(picture[..., 0]), source.choice(("PNG", "BMP", "TIFF"))) for picture in pictures]

    def judge(headers: dict, content: bytes) -> str:
        rows = [list(answer["probabilities"].values()) for answer in json.loads(content)["answers"]]
        return _compared(kit, np.array(rows), pictures)
    return Question(_framed("POST /v2/models/tiny/predict", ["Content-Type: multipart/form-data; boundary=edge"],
                            _form(files), chunked=source.random() < 0.3, source=source), judge)


def _asked_for_rows(source, kit, pictures) -> Question:
    pages = [source.randrange(100) for _ in pictures]

    def judge(headers: dict, content: bytes) -> str:
        found = [answer["value"] for answer in json.loads(content)["answers"]]
        return "" if found == [page - 1 + 100 for page in pages] else f"{found} for {pages}"
    body = json.dumps([{"pages": page, "month": "June"} for page in pages]).encode()
    return Question(_framed("POST /v2/models/shop/predict", ["Content-Type: application/json"], body), judge)


def _compared(kit, found: np.ndarray, pictures: np.ndarray) -> str:
    wanted = kit.expected(pictures)
    is_right = found.shape == wanted.shape and np.allclose(found, wanted, atol=1e-5)
    return "" if is_right else f"{found.tolist()} where {wanted.tolist()} is right"


def _binary_document(shape: tuple) -> dict:
    return {"inputs": [{"name": "images", "datatype": "UINT8", "shape": list(shape),
                        "parameters": {"binary_data_size": int(np.prod(shape))}}],
            "parameters": {"binary_data_output": True}}


# ---- What is wrong -------------------------------------------------------------------------------------------------

def case(seed: int, number: int, kit) -> Case:
    """Return one case, a function of seed and number alone."""
    source = random.Random(f"server/{seed}/{number}")
    count = source.choice((1,) * 9 + (3,))
    content = b"".join(_strange(source, kit) if source.random() < 0.9 else question(source, kit).content
                       for _ in range(count))
    if source.random() < 0.1:
        content = mutated(source, [content])
    cuts = sorted(source.randrange(len(content) + 1) for _ in range(source.choice((0, 0, 0, 1, 3))))
    pieces = tuple(content[start:stop] for start, stop in zip((0, *cuts), (*cuts, len(content)), strict=True))
    return Case(pieces, source.random() < 0.05)


def _strange(source: random.Random, kit) -> bytes:
    """Return a request that is wrong in one place, or in several."""
    kind, body, headers = source.choice((_infer, _infer, _binary, _rows, _pictures, _noise))(source, kit)
    method, path = ("POST", _path_of(source, kind)) if source.random() < 0.7 else (
        source.choice(_METHODS), source.choice(_PATHS))
    headers = [f"Host: {source.choice(('a', 'a', 'a', '', 'a:b', '[::1]'))}", *headers]
    headers += [source.choice(_HEADERS) for _ in range(source.choice((0, 0, 0, 0, 1, 2)))]
    if source.random() < 0.8:
        headers.append("Connection: close")
    source.shuffle(headers)
    versions = ("HTTP/1.1",) * 80 + ("HTTP/1.0", "HTTP/2.0", "HTTP/9.9", "http/1.1", "")
    framing = source.random()
    if framing < 0.12:
        headers.append("Transfer-Encoding: chunked")
        body = _chunked(source, body, broken=source.random() < 0.3)
    elif framing < 0.2:
        said = source.choice((len(body) + 5, max(0, len(body) - 5), "x", 10**25, "+1", -1))
        headers.append(f"Content-Length: {said}")
    elif framing < 0.96:
        headers.append(f"Content-Length: {len(body)}")
    lines = "".join(f"{line}\r\n" for line in headers)
    return f"{method} {path} {source.choice(versions)}\r\n{lines}\r\n".encode("latin-1") + body


def _path_of(source, kind: str) -> str:
    return {"rows": source.choice(("/v2/models/shop/predict", "/v2/models/plain/predict")),
            "pictures": source.choice(("/v2/models/tiny/predict", "/predict"))}.get(kind, "/v2/models/tiny/infer")


def _infer(source, kit) -> tuple[str, bytes, list[str]]:
    document = json.loads(kit.infer_body(kit.images(source.randint(1, 2)), id="a", parameters={}, outputs=[
        {"name": "label", "parameters": {"binary_data": False}}, {"name": "probabilities"}]))
    return "infer", _text(source, document), ["Content-Type: application/json"]


def _binary(source, kit) -> tuple[str, bytes, list[str]]:
    head = _text(source, _binary_document((2, 4, 4, 1)))
    length = source.choice((len(head),) * 6 + (0, 1, len(head) + 1, -1, "x", 10**30, "", "1_0"))
    return "infer", head + source.randbytes(source.choice((32, 32, 32, 0, 31, 33, 5000))), [
        f"Inference-Header-Content-Length: {length}"]


def _rows(source, kit) -> tuple[str, bytes, list[str]]:
    document = source.choice(([{"pages": 3, "month": "May"}], {"rows": [{"pages": "3", "month": "x"}, {"pages": None}]},
                              {"rows": [[1, 2.5, -3], [0, 0, 0]]}, {"pages": 1e30, "month": 2.0}))
    return "rows", _text(source, json.loads(json.dumps(document))), ["Content-Type: application/json"]


def _pictures(source, kit) -> tuple[str, bytes, list[str]]:
    size = source.choice((1, 4, 40))
    image = Image.frombytes("L", (size, size), source.randbytes(size * size))
    files = [_file(image, source.choice(IMAGE_FORMATS)) for _ in range(source.choice((1, 1, 2, 30)))]
    files = [mutated(source, [file]) if source.random() < 0.5 else file for file in files]
    if source.random() < 0.4:
        return "pictures", files[0], [f"Content-Type: {source.choice(_KINDS)}"]
    form = _form(files, source.choice(("image",) * 6 + ("", "x", 'a"b', "\xff" * 9000)))
    return "pictures", mutated(source, [form]) if source.random() < 0.3 else form, [
        "Content-Type: " + source.choice(("multipart/form-data; boundary=edge",) * 5 + _KINDS)]


def _noise(source, kit) -> tuple[str, bytes, list[str]]:
    body = source.choice((b"", b"null", b"[" * 3000, b'{"a":' * 3000, b'"' * 100, b" " * 70_000, b"7" * 30_000,
                          source.randbytes(source.randrange(3000)), b"[" + b"0," * 60_000 + b"0]", bytes(2 << 20)))
    return source.choice(("infer", "rows", "pictures")), body, [f"Content-Type: {source.choice(_KINDS)}"]


def _text(source, document) -> bytes:
    """Return a document as JSON after some of its values were changed, and then perhaps some of its letters."""
    holder = [document]
    for _ in range(source.choice((0, 1, 1, 2, 3))):
        _spoil(source, holder)
    text = json.dumps(holder[0]).encode()
    return mutated(source, [text], is_text=True) if source.random() < 0.2 else text


def _spoil(source, holder: list) -> None:
    """Replace, remove, rename or wrap one value; each level is as likely as the others, however wide it is."""
    place, key = holder, 0
    while isinstance(place[key], (dict, list)) and place[key] and source.random() < 0.85:
        place = place[key]
        key = source.choice(list(place)) if isinstance(place, dict) else source.randrange(len(place))
    act = source.random()
    if act < 0.65 or place is holder:
        place[key] = json.loads(json.dumps(source.choice(_VALUES)))
    elif act < 0.8:
        del place[key]
    elif isinstance(place, dict):
        place[source.choice(_NAMES)] = place[key] if act < 0.9 else place.pop(key)
    else:
        place[key] = [place[key]] if act < 0.9 else {"a": place[key]}


# ---- Forms, chunks, files --------------------------------------------------------------------------------------------

def _framed(target: str, headers: list[str], body: bytes, *, chunked: bool = False, source=None) -> bytes:
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    lines = "".join(f"{line}\r\n" for line in ("Host: a", *headers, framing))
    return f"{target} HTTP/1.1\r\n{lines}\r\n".encode() + (_chunked(source, body) if chunked else body)


def _chunked(source, body: bytes, *, broken: bool = False) -> bytes:
    made, start = [], 0
    while start < len(body):
        size = min(len(body) - start, source.choice((1, 7, 300, 65_536)) if len(body) < 5000 else 65_536)
        said = size
        if broken and source.random() < 0.3:
            said = source.choice((size + 1, max(0, size - 1), -size, "x", 10**20))
        extension = source.choice(("", "", "", ";a=b", ";" + "c" * 3000))
        said = f"{said:x}" if isinstance(said, int) else said
        made.append(f"{said}{extension}\r\n".encode() + body[start:start + size] + b"\r\n")
        start += size
    ends = (b"", b"0\r\n", b"0\r\nA: b\r\n" * 200) if broken else (b"0\r\n\r\n", b"0\r\nA: b\r\n\r\n")
    return b"".join(made) + source.choice(ends)


def _form(files: list[bytes], name: str = "image") -> bytes:
    head = f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n\r\n'.encode("latin-1")
    return b"".join(head + file + b"\r\n" for file in files) + b"--edge--\r\n"


def _file(image: Image.Image, kind: str) -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()
