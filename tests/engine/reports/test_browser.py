"""The page in a real browser: its pictures show, and what a stranger named a class loads and runs nothing."""

import io
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine.reports import page, report
from hpcai_cli.recipe import Recipe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
COLOR = (12, 200, 99)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")


@pytest.fixture
def requests_seen():
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


def browse(*words: str) -> bytes:
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={Path('profile').absolute()}",
             "--hide-scrollbars", "--virtual-time-budget=3000")
    done = subprocess.run([CHROMIUM, *flags, *words], capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def written(names: tuple[str, str]) -> str:
    """Write a page with one picture in a color of its own and return its address."""
    source = np.random.default_rng(1)
    scores, labels = source.normal(size=(60, 2)).astype(np.float32), source.integers(0, 2, 60)
    found = report.report(Recipe(name="two", summary="", num_classes=2, class_names=names), scores, labels)
    picture = io.BytesIO()
    Image.new("RGB", (300, 200), COLOR).save(picture, "PNG")
    Path("report.html").write_text(page.page(
        {"model": names[0], "data": names[1], "split": "test", "examples": 60, "format": "keras",
         "decision_threshold": None, **found}, {"confusion": picture.getvalue()}), encoding="utf-8")
    return Path("report.html").absolute().as_uri()


def test_the_pictures_show(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    browse(f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,4000", written(("cat", "dog")))
    with Image.open("shot.png") as shot:
        pixels = np.asarray(shot.convert("RGB"), int)
    assert (np.abs(pixels - COLOR).max(axis=2) < 4).sum() > 300 * 200 / 2
    # There is more than the picture: dark letters on a light ground.
    assert (pixels.max(axis=2) < 100).sum() > 1000


def test_hostile_names_load_and_run_nothing(tmp_path, monkeypatch, requests_seen):
    monkeypatch.chdir(tmp_path)
    address, seen = requests_seen
    hostile = (f'"><img src={address}/image onerror="document.title=1">',
               f'<script src="{address}/script"></script><script>document.body.innerHTML="gone"</script>')
    shown = browse("--dump-dom", written(hostile)).decode()
    assert seen == []
    assert "<script" not in shown and "<title>1</title>" not in shown
    # What a script would have replaced is still there.
    assert shown.count("<table>") >= 2
    # The server does answer the browser: a page that does ask for something is seen to.
    Path("asks.html").write_text(f'<img src="{address}/asked">')
    browse("--dump-dom", Path("asks.html").absolute().as_uri())
    assert "/asked" in seen
