"""The server's pages in a real browser: a picture dropped, a row typed is answered, and nothing foreign runs."""

import io
import itertools
import json
import queue
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CLASSES = ("red", "green", "blue")
OUTSIDE = "OUTSIDE"
"""Stands for the address of a server that the page must not ask."""
HOSTILE = (f'<img src="{OUTSIDE}/image" onerror="document.title=1">',
           f'<script src="{OUTSIDE}/script"></script><script>document.body.innerHTML="gone"</script>', "long" * 25)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


class Browser:
    """One page of Chromium, told what to do by the DevTools protocol over two pipes: no driver, no port.

    Attributes:
        events: what the browser has told of since they were last cleared.
    """

    def __init__(self, folder: Path):
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}", "--remote-debugging-pipe")
        # Chromium reads its orders from descriptor 3 and answers on 4.
        moved = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        self._process = subprocess.Popen(["sh", "-c", moved, "sh", CHROMIUM, *flags], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE)
        self._numbers, self._messages, self._about, self.events = itertools.count(1), queue.Queue(), {}, []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self._about = {"sessionId": self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters) -> dict:
        """Give an order and return its result."""
        number = next(self._numbers)
        order = {"id": number, "method": method, "params": parameters, **self._about}
        self._process.stdin.write(json.dumps(order).encode() + b"\0")
        self._process.stdin.flush()
        while (said := self._messages.get(timeout=60)).get("id") != number:
            self.events.append(said)
        assert "error" not in said, (method, said)
        return said["result"]

    def open(self, url: str) -> None:
        self.do("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str):
        """Return what JavaScript in the page gives."""
        said = self.do("Runtime.evaluate", expression=expression, returnByValue=True,
                       awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def until(self, expression: str):
        """Wait until JavaScript in the page gives something, and return it."""
        end = time.monotonic() + 30
        while not (found := self.value(expression)):
            assert time.monotonic() < end, (expression, self.value("document.body.innerText"))
            time.sleep(0.02)
        return found

    def center(self, selector: str) -> dict[str, float]:
        x, y = self.value("(box => [box.x + box.width / 2, box.y + box.height / 2])"
                          f"(document.querySelector('{selector}').getBoundingClientRect())")
        return {"x": x, "y": y}

    def click(self, selector: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **self.center(selector))

    def type(self, selector: str, text: str) -> None:
        """Type in the place of what is there."""
        self.click(selector)
        self.value(f"document.querySelector('{selector}').select()")
        self.do("Input.insertText", text=text)

    def pick(self, *files: Path) -> None:
        node = self.do("Runtime.evaluate", expression="document.querySelector('#file')")["result"]["objectId"]
        self.do("DOM.setFileInputFiles", files=list(map(str, files)), objectId=node)

    def drop(self, *files: Path) -> None:
        data = {"items": [], "files": list(map(str, files)), "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.do("Input.dispatchDragEvent", type=kind, data=data, **self.center("#drop"))

    def close(self) -> None:
        self.do("Browser.close")
        self._process.wait(30)
        self._reader.join()
        self._process.stdin.close()
        self._process.stdout.close()

    def _read(self) -> None:
        rest = b""
        while chunk := self._process.stdout.read1(1 << 16):
            *whole, rest = (rest + chunk).split(b"\0")
            for message in whole:
                self._messages.put(json.loads(message))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def outside():
    """Serve on loopback and yield the address and the paths that were asked for."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_error(404)

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", seen
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def address(tmp_path_factory, exports, kit, outside):
    folder = tmp_path_factory.mktemp("served")
    exports.write(folder / "models" / "tiny")
    exports.write(folder / "models" / "shop", "shop")
    exports.write(folder / "models" / "hostile", class_names=[name.replace(OUTSIDE, outside[0]) for name in HOSTILE])
    with kit.server(folder, folder / "models") as served:
        yield f"http://127.0.0.1:{served.port}"


@pytest.fixture
def visit(browser, address):
    """Return what opens a page; whatever it asks for must be of this server, and its code must not fail."""
    places = [address]

    def go(path: str = "/", model: str = "", at: str = address, width: int = 1000) -> Browser:
        places.append(at)
        browser.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(at + path)
        if model:
            browser.until("document.querySelector('#model').value")
            browser.value(f"at('model').value = '{model}'; at('model').dispatchEvent(new Event('change'))")
            browser.until(f"document.title === '{model}'")
        return browser

    browser.events.clear()
    yield go
    requests = [event["params"]["request"]["url"] for event in browser.events
                if event.get("method") == "Network.requestWillBeSent"]
    assert requests and all(url.removeprefix("blob:").startswith((*places, "data:,")) for url in requests)
    broken = [event for event in browser.events if event.get("method") == "Runtime.exceptionThrown"]
    assert not broken and "Content Security Policy" not in json.dumps(browser.events)


def picture(name: str, seed: int) -> tuple[Path, np.ndarray]:
    """Write a picture of the model's own size; return its file and the image, (1, 4, 4, 1)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return Path(name).absolute(), pixels[None, ..., None]


def shown(browser: Browser, count: int = 1) -> list[dict]:
    """Return the answers on the page, once there are so many: what is said, and the rows below it."""
    browser.until(f"document.querySelectorAll('.label, .value').length === {count}")
    return browser.value("""[...document.querySelectorAll(".answer")].map(box => ({
        said: box.querySelector(".label, .value").textContent, pictures: box.querySelectorAll("img").length,
        rows: [...box.querySelectorAll(".row")].map(row =>
            [row.firstChild.textContent, row.lastChild.textContent])}))""")


def expected(kit, image: np.ndarray) -> dict:
    chances = kit.expected(image)[0]
    order = np.argsort(-chances)
    return {"said": CLASSES[order[0]], "pictures": 1,
            "rows": [[CLASSES[place], f"{100 * chances[place]:.1f} %"] for place in order]}


@pytest.mark.parametrize("bring", [Browser.pick, Browser.drop])
def test_a_picture_that_is_picked_or_dropped_is_answered(visit, kit, bring):
    (first, one), (second, other) = picture("one.png", 1), picture("other.png", 2)
    browser = visit(model="tiny")
    bring(browser, first)
    assert shown(browser) == [expected(kit, one)]
    # Each of several stands with its own answer, and the next question takes their place.
    bring(browser, second, first)
    assert shown(browser, 2) == [expected(kit, other), expected(kit, one)]
    assert browser.value("at('took').textContent").startswith("· version 1 · ")


def test_a_picture_that_only_the_server_can_read(visit, kit):
    content = io.BytesIO()
    _, image = picture("one.png", 1)
    Image.fromarray(image[0, ..., 0]).save(content, "TIFF")
    Path("one.tiff").write_bytes(content.getvalue())
    browser = visit(model="tiny")
    browser.pick(Path("one.tiff").absolute())
    assert shown(browser) and browser.until("!document.querySelector('.answer img')")
    assert shown(browser) == [expected(kit, image) | {"pictures": 0}]


def test_names_of_a_stranger_are_text(visit, outside):
    at, seen = outside
    browser = visit(model="hostile")
    browser.pick(picture("one.png", 1)[0])
    (answer,) = shown(browser)
    names = {name.replace(OUTSIDE, at) for name in HOSTILE}
    assert answer["said"] in names and {name for name, _ in answer["rows"]} == names
    assert browser.value("[document.title, document.scripts.length, document.images.length]") == ["hostile", 1, 1]
    visit("/docs").until("document.querySelectorAll('details').length > 20")
    assert browser.value("[document.scripts.length, document.images.length]") == [1, 0]
    assert browser.value("document.body.textContent").count("<script src=") > 0 and not seen


def test_what_would_load_from_outside_is_kept_from_it(browser, address, outside):
    at, seen = outside
    load = """new Promise(done => {
        const made = document.createElement("NAME");
        made.onload = () => done("came");
        made.onerror = () => done("failed");
        made.src = "FROM";
        document.body.append(made);
    })"""
    browser.open(address)
    for name in ("img", "script"):
        assert browser.value(load.replace("NAME", name).replace("FROM", f"{at}/kept")) == "failed"
    assert browser.value(f"fetch('{at}/kept').then(() => 'came', () => 'failed')") == "failed"
    browser.value("""const made = document.createElement("script");
        made.textContent = "document.title = 'ran'";
        document.body.append(made)""")
    assert not seen and browser.until("document.title") != "ran"
    # The same does ask the server where a page allows it.
    Path("free.html").write_text("<p>")
    browser.open(Path("free.html").absolute().as_uri())
    assert browser.value(load.replace("NAME", "img").replace("FROM", f"{at}/asked")) == "failed" and seen == ["/asked"]


def test_a_row_that_is_typed_is_answered(visit):
    browser = visit(model="shop")
    assert json.loads(browser.until("at('rows').value")) == {"rows": [{"pages": 2.0, "month": "May"}]}
    browser.click("#ask")
    assert shown(browser) == [{"said": "11", "pictures": 0, "rows": []}]
    browser.type("#rows", '[{"pages": 3, "month": "June"}, {"pages": "", "month": "May"}]')
    browser.click("#ask")
    assert [answer["said"] for answer in shown(browser, 2)] == ["102", "11"]
    browser.type("#rows", '{"pages": "<img src=x onerror=document.title=1>", "month": "May"}')
    browser.click("#ask")
    said = browser.until("at('error').textContent")
    assert "column 'pages' holds '<img src=x onerror=document.title=1>', which is no number" in said
    assert browser.value("[document.title, document.images.length, document.querySelectorAll('.answer').length]") == [
        "shop", 0, 0]


def test_what_the_server_refuses_is_told(visit):
    Path("text.png").write_text("hello")
    browser = visit(model="tiny")
    browser.pick(Path("text.png").absolute())
    assert browser.until("at('error').textContent") == "this is not an image; expected PNG, JPEG, BMP, GIF, WEBP, TIFF"
    browser.pick(picture("one.png", 1)[0])
    assert shown(browser) and browser.value("at('error').textContent") == ""


def test_a_server_with_a_token_that_then_goes_away(visit, exports, serve, tmp_path, kit):
    Path("token").write_text("a-long-token")
    with serve(exports.write(tmp_path / "tiny"), "--token-file", Path("token").absolute()) as served:
        at = f"http://127.0.0.1:{served.port}"
        for path, is_open in (("/docs", "document.querySelector('#paths details')"), ("/", "!at('drop').hidden")):
            browser = visit(path, at=at)
            assert "does not bear the server's token" in browser.until("at('error').textContent")
            browser.type("#token", "another-token")
            browser.click("#locked button")
            browser.until("!at('locked').hidden && at('error').textContent")
            browser.type("#token", "a-long-token")
            browser.do("Input.dispatchKeyEvent", type="char", text="\r")
            browser.until(f"!!({is_open})")
            assert browser.value("at('locked').hidden && !at('error').textContent")
        file, image = picture("one.png", 1)
        browser.drop(file)
        assert shown(browser) == [expected(kit, image)]
        assert served.stop() == 0
        browser.drop(file)
        assert browser.until("at('error').textContent") == "the server does not answer"


def test_the_interface_is_told(visit):
    browser = visit("/docs")
    told = browser.until("[...document.querySelectorAll('summary code')].map(one => one.textContent).join('\\n')")
    assert {"GET /v2/health/ready", "POST /v2/models/tiny/infer", "POST /v2/models/shop/predict", "GET /metrics",
            "POST /v2/repository/models/shop/load"} <= set(told.splitlines())
    browser.click("summary")
    assert browser.until("document.querySelector('details').open && document.querySelector('details pre').innerText")


@pytest.mark.parametrize(("path", "model"), [("/", "hostile"), ("/", "shop"), ("/docs", "")])
def test_narrow_screens(visit, path, model):
    browser = visit(path, model, width=320)
    if model == "hostile":
        browser.pick(picture("one.png", 1)[0])
        shown(browser)
        assert browser.value("document.querySelector('progress').clientWidth") > 60
    elif not model:
        browser.until("document.querySelectorAll('details').length > 20")
        browser.value("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.value("document.documentElement.scrollWidth") <= 320
