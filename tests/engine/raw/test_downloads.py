"""A recipe's files and archives come from real HTTP servers, whatever those do."""

import gzip
import hashlib
import os
import threading
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpcai_cli import errors
from hpcai_cli.engine.raw import downloads
from hpcai_cli.recipe import Downloads, File

CONTENT = bytes(range(256)) * 4096
"""One megabyte, so that a cut in the middle comes after several packets."""

SHA = hashlib.sha256(CONTENT).hexdigest()


def refused(kind: type, call, *words: str) -> None:
    """Assert that the call fails with this very kind in one line that has all the words."""
    with pytest.raises(errors.HpcaiError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


class Server:
    """A real HTTP server; `answers` is consumed one per request, the last one stays."""

    def __init__(self):
        self.answers: list[dict] = [{}]
        self.requests: list[tuple[str, str | None, str | None]] = []
        """Path, Range and If-Range of each request."""
        self.sent: list[int] = []
        """Bytes of body sent for each request."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                # A client that has seen enough hangs up.
                with suppress(ConnectionError):
                    outer.answer(self)

            def log_message(self, *_):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.base = f"http://127.0.0.1:{self._http.server_port}/"

    def answer(self, request) -> None:
        """Send what is asked for, as the current answer says: body, code, etag, ranges, cut, wrong_range, length."""
        how = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        wanted, condition = request.headers.get("Range"), request.headers.get("If-Range")
        self.requests.append((request.path, wanted, condition))
        body = how.get("body", CONTENT)
        body = body[request.path] if isinstance(body, dict) else body
        start, code = 0, how.get("code", 200)
        if wanted and how.get("ranges", True) and code == 200 and condition in (None, how.get("etag")):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            code = 206 if start < len(body) else 416
        request.send_response(code)
        if code == 206:
            first = start + how.get("wrong_range", 0)
            request.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        elif code == 416:
            request.send_header("Content-Range", f"bytes */{len(body)}")
        if "etag" in how:
            request.send_header("ETag", how["etag"])
        if "location" in how:
            request.send_header("Location", how["location"])
        rest = b"" if code == 416 else body[start:]
        if how.get("length", True):
            request.send_header("Content-Length", str(how.get("declared", len(rest))))
        request.end_headers()
        rest = rest[:how.get("cut", len(rest))]
        self.sent.append(len(rest))
        request.wfile.write(rest)

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.01)
    running = Server()
    yield running
    running.stop()


def fetch(server, cache: Path, sha256: str = SHA, name: str = "file.bin") -> bytes:
    """Fetch a recipe's only file, or an archive where there is no checksum, and return its content."""
    if sha256:
        recipe = Downloads((server.base,), (File(name, sha256, 10**7),))
        target = downloads.download_files("download", recipe, cache) / name
    else:
        target = cache / "archive"
        downloads.download_archive(server.base + name, target, cache)
    assert not list(cache.rglob("*.part*"))
    return target.read_bytes()


# ---- One file ------------------------------------------------------------------------------------------------------

def test_a_file_is_fetched_once(server, tmp_path):
    assert fetch(server, tmp_path) == CONTENT
    assert fetch(server, tmp_path) == CONTENT
    assert len(server.requests) == 1
    next(tmp_path.rglob("file.bin")).write_bytes(b"damaged")
    assert fetch(server, tmp_path) == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_cut_connection_resumes_and_only_the_rest_is_sent(server, tmp_path, etag, length):
    tags = {"etag": etag} if etag else {}
    server.answers = [{"cut": 300_000, **tags}, {**tags, "length": length}]
    assert fetch(server, tmp_path) == CONTENT
    assert server.requests == [("/file.bin", None, None), ("/file.bin", "bytes=300000-", etag)]
    assert server.sent == [300_000, len(CONTENT) - 300_000]


def test_a_later_process_resumes_what_ctrl_c_left(server, tmp_path, monkeypatch):
    reads = []

    def interrupted(response):
        if reads:
            raise KeyboardInterrupt
        reads.append(1)
        return response.read(200_000)

    server.answers = [{"etag": '"v1"'}]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads, "_read", interrupted)
        fetch(server, tmp_path)
    assert next(tmp_path.rglob("file.bin.part")).stat().st_size == 200_000
    assert not list(tmp_path.rglob("file.bin"))
    assert fetch(server, tmp_path) == CONTENT
    assert server.requests[1] == ("/file.bin", "bytes=200000-", '"v1"')
    assert server.sent[1] == len(CONTENT) - 200_000


def test_a_part_with_nothing_behind_it_is_fetched_again(server, tmp_path):
    server.answers = [{"etag": '"v1"', "declared": len(CONTENT) + 1}, {"etag": '"v1"'}]
    assert fetch(server, tmp_path) == CONTENT
    assert server.sent == [len(CONTENT), 0, len(CONTENT)]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.answers = [{"cut": 300_000}, {"ranges": False}]
    assert fetch(server, tmp_path) == CONTENT
    assert server.sent == [300_000, len(CONTENT)]


def test_a_file_that_changed_in_between_starts_again(server, tmp_path):
    old = bytes(len(CONTENT))
    server.answers = [{"body": old, "cut": 300_000, "etag": '"v1"'}, {"etag": '"v2"'}]
    assert fetch(server, tmp_path, sha256="") == CONTENT
    assert server.requests[1] == ("/file.bin", "bytes=300000-", '"v1"')
    assert server.sent == [300_000, len(CONTENT)]


def test_a_change_that_no_etag_tells_is_noticed_by_the_checksum(server, tmp_path):
    server.answers = [{"body": bytes(len(CONTENT)), "cut": 300_000}, {}]
    refused(errors.MissingError, lambda: fetch(server, tmp_path), "its checksum is not")
    assert fetch(server, tmp_path) == CONTENT
    assert server.sent == [300_000, len(CONTENT) - 300_000, len(CONTENT)]


def test_without_etag_and_checksum_nothing_is_resumed(server, tmp_path):
    server.answers = [{"cut": 300_000}, {}]
    assert fetch(server, tmp_path, sha256="") == CONTENT
    assert server.requests[1] == ("/file.bin", None, None)


def test_a_file_that_shrank_starts_again(server, tmp_path):
    server.answers = [{"cut": 300_000, "etag": '"v1"'}, {"body": b"short", "etag": '"v1"'}, {"etag": '"v1"'}]
    assert fetch(server, tmp_path) == CONTENT
    assert server.requests[2] == ("/file.bin", None, None)


def test_another_range_than_asked_for_is_noticed(server, tmp_path):
    server.answers = [{"cut": 300_000, "etag": '"v1"'}, {"wrong_range": 5, "etag": '"v1"'}, {}]
    assert fetch(server, tmp_path, sha256="") == CONTENT
    assert server.requests[2] == ("/file.bin", None, None)


def test_a_line_that_breaks_often_still_brings_a_large_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_CHUNK", 1000)
    server.answers = [{"cut": 100_000}] * 10 + [{}]
    assert fetch(server, tmp_path) == CONTENT
    assert sum(server.sent) == len(CONTENT)


@pytest.mark.parametrize(("answer", "words", "tries"), [
    ({"code": 404, "body": b""}, ["404"], 1),
    ({"code": 403, "body": b""}, ["403"], 1),
    ({"code": 500, "body": b""}, ["500"], 4),
    ({"code": 503, "body": b""}, ["503"], 4),
    ({"code": 204, "body": b""}, ["status 204"], 1),
    ({"code": 302, "body": b"", "location": "file:///etc/passwd"}, ["302"], 1),
    ({"body": b"<!DOCTYPE html><html>gone</html>"}, ["web page (HTML)"], 1),
    ({"body": CONTENT[:-1] + b"x"}, ["checksum", SHA[:12]], 1),
    ({"body": bytes(10**7 + 1)}, ["more than 10,000,000"], 1),
    ({"body": bytes(10**7 + 1), "length": False}, ["more than 10,000,000"], 1),
    ({"cut": 1000, "ranges": False}, ["broke off after 1,000 of 1,048,576"], 4),
])
def test_what_a_server_can_do_wrong(server, tmp_path, answer, words, tries):
    fetch(server, tmp_path)
    there = next(tmp_path.rglob("file.bin"))
    there.write_bytes(b"what was there")
    server.requests.clear()
    server.answers = [answer]
    refused(errors.MissingError, lambda: fetch(server, tmp_path), "no mirror gives file.bin: 127.0.0.1:", *words)
    assert len(server.requests) == tries
    assert there.read_bytes() == b"what was there"
    if "cut" not in answer:
        assert os.listdir(there.parent) == ["file.bin"]


def test_a_server_error_that_passes(server, tmp_path, capsys):
    server.answers = [{"code": 503, "body": b""}, {"code": 500, "body": b""}, {}]
    assert fetch(server, tmp_path) == CONTENT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "503" in shown.err
    assert "trying again" in shown.err


def test_a_server_that_is_gone_or_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT_SECONDS", 0.2)
    release = threading.Event()
    server.answer = lambda request: release.wait(10)
    refused(errors.MissingError, lambda: fetch(server, tmp_path), "no answer within")
    release.set()
    for url, word in (("http://127.0.0.1:1/x", "refused"), ("http://[oops/x", "no valid address")):
        refused(errors.MissingError, partial(downloads.download_archive, url, tmp_path / "x", tmp_path), word)


def test_gzipped_files_are_checked_by_what_they_hold(server, tmp_path):
    for number, body in enumerate((gzip.compress(CONTENT, 1), gzip.compress(CONTENT, 9))):
        server.answers = [{"body": body}]
        assert fetch(server, tmp_path, name=f"{number}.gz") == body
    for body in (gzip.compress(CONTENT)[:-1], b"\x1f\x8bnonsense", gzip.compress(b"other"), CONTENT):
        server.answers = [{"body": body}]
        refused(errors.MissingError, lambda: fetch(server, tmp_path, name="x.gz"), "broken or another one", SHA[:12])


def test_a_packed_archive_is_checked_as_it_is(server, tmp_path):
    packed = gzip.compress(CONTENT)
    server.answers = [{"body": packed}]
    digest = hashlib.sha256(packed).hexdigest()
    for _ in range(2):
        assert fetch(server, tmp_path, sha256=digest, name="data.tar.gz") == packed
    assert len(server.requests) == 1
    # What is in it is another thing than what it is.
    refused(errors.MissingError, lambda: fetch(server, tmp_path, name="other.tar.gz"), "broken or another one")


def test_what_a_file_is_to_the_user_is_in_the_message(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.01)
    with pytest.raises(errors.MissingError, match="^cannot fetch the weights: Connection refused; train without; "
                                                  "received: 'http://127.0.0.1:1/x'$"):
        downloads.download_archive("http://127.0.0.1:1/x", tmp_path / "x", tmp_path, what="the weights",
                                   mend="train without")


def test_a_disk_that_cannot_be_written_is_no_reason_to_retry(server, tmp_path):
    target = tmp_path / "none" / "archive"
    refused(errors.MissingError, lambda: downloads.download_archive(server.base, target, tmp_path),
            "cannot write below")
    assert len(server.requests) == 1


# ---- Recipes' files, archives --------------------------------------------------------------------------------------

def recipe_files(*mirrors: str) -> Downloads:
    return Downloads(mirrors, tuple(File(name=f"{name}.gz", sha256=hashlib.sha256(name.encode()).hexdigest(), bytes=999)
                                    for name in "ab"))


BODIES = {f"/{folder}{name}.gz": gzip.compress(name.encode()) for name in "ab" for folder in ("", "good/", "dead/")}


def fetched(source: str, recipe: Downloads | None, cache: Path) -> dict[str, bytes]:
    return {path.name: gzip.decompress(path.read_bytes())
            for path in downloads.download_files(source, recipe, cache).iterdir()}


def test_the_mirrors_are_tried_in_turn_and_the_cache_remembers(server, tmp_path):
    server.answers = [{"code": 404, "body": b""}, {"body": BODIES}]
    recipe = recipe_files(server.base + "dead/", server.base + "good/")
    for _ in range(2):
        assert fetched("download", recipe, tmp_path) == {"a.gz": b"a", "b.gz": b"b"}
        assert [path for path, *_ in server.requests] == ["/dead/a.gz", "/good/a.gz", "/good/b.gz"]


def test_an_address_of_a_folder_gives_the_recipes_files(server, tmp_path):
    server.answers = [{"body": BODIES}]
    assert set(fetched(server.base, recipe_files("http://127.0.0.1:1/"), tmp_path)) == {"a.gz", "b.gz"}


def test_when_all_mirrors_fail_each_reason_is_named(server, tmp_path):
    server.answers = [{"code": 404, "body": b""}, {"body": b"<html>"}]
    recipe = recipe_files(server.base + "one/", server.base + "two/")
    refused(errors.MissingError, lambda: fetched("download", recipe, tmp_path), "no mirror gives a.gz", "one (404",
            "two (it answers with a web page", "--source FOLDER", "a.gz, b.gz", "--source sample")


def test_recipes_without_downloads(server, tmp_path):
    for source in ("download", server.base):
        for recipe in (None, Downloads((), ())):
            refused(errors.UsageError, partial(fetched, source, recipe, tmp_path), "no files to download", "sample")


def test_an_archive_is_resumed_and_never_reused(server, tmp_path):
    server.answers = [{"cut": 50, "etag": '"v1"'}, {"etag": '"v1"'}, {"body": b"of today"}]
    assert fetch(server, tmp_path, sha256="", name="my data.zip?x=1") == CONTENT
    assert server.requests[1][:2] == ("/my%20data.zip?x=1", "bytes=50-")
    assert [path.suffix for path in (tmp_path / "downloads").iterdir()] == [".lock"]
    assert fetch(server, tmp_path, sha256="", name="my data.zip?x=1") == b"of today"
    server.answers = [{"code": 404, "body": b""}]
    refused(errors.MissingError, lambda: fetch(server, tmp_path, sha256="", name="x.zip"), "404", "/x.zip")


def test_two_jobs_that_start_together_fetch_once(server, tmp_path):
    server.answers = [{"body": BODIES}]
    recipe, found = recipe_files(server.base), []
    jobs = [threading.Thread(target=lambda: found.append(fetched("download", recipe, tmp_path))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert found == [{"a.gz": b"a", "b.gz": b"b"}] * 4
    assert len(server.requests) == 2
