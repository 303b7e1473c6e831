"""Folders, archives and addresses become a folder of files, or one sentence that says why not."""

import errno
import gzip
import hashlib
import io
import os
import shutil
import struct
import tarfile
import threading
import zipfile
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpcai_cli import errors
from hpcai_cli.engine import sources
from hpcai_cli.recipe import Downloads, File

SHARED = Path(__file__).parents[3] / "shared" / "data"
CONTENT = bytes(range(256)) * 4096
"""One megabyte, so that a cut in the middle comes after several packets."""

SHA = hashlib.sha256(CONTENT).hexdigest()


def refused(kind: type, call, *words: str) -> str:
    """Assert that the call fails with this very kind in one line that has all the words."""
    with pytest.raises(errors.HpcaiError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def opened(source, cache: Path, downloads=None) -> dict[str, bytes]:
    """Open the source and return all its files."""
    with sources.open_source(str(source), downloads=downloads, cache=cache) as folder:
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


# ---- Paths ---------------------------------------------------------------------------------------------------------

def test_a_folder_is_taken_as_it_is(tmp_path, cache):
    with sources.open_source(str(tmp_path), downloads=None, cache=cache) as folder:
        assert folder == tmp_path
    assert not cache.exists()


def test_a_missing_path_names_what_is_near(tmp_path, cache, monkeypatch):
    (tmp_path / "my mnist").mkdir()
    refused(errors.DataError, lambda: opened(tmp_path / "my mnits", cache), "there is no my mnits", "but my mnist",
            f"--source '{tmp_path / 'my mnist'}'", "received")
    refused(errors.DataError, lambda: opened(tmp_path / "xyz" / "deep", cache), "there is no xyz", "--source sample")
    refused(errors.DataError, lambda: opened(tmp_path / "a\0b", cache), "there is no")
    refused(errors.DataError, lambda: opened(tmp_path / ("x" * 300), cache), "cannot read the source")
    refused(errors.UsageError, lambda: opened("", cache), "empty")
    monkeypatch.chdir(tmp_path)
    refused(errors.DataError, lambda: opened("downlaod", cache), "`--source download`")
    refused(errors.UsageError, lambda: opened("s3://bucket/mnist", cache), "s3://", "--source FOLDER")


NO_ARCHIVES = {
    "text": (b"hello, world", ["single file and no archive"]),
    "empty": (b"", ["is empty"]),
    "html": (b"<!doctype html><title>404</title>", ["web page"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), ["7z archives are not read"]),
    "one_gzipped_file": (gzip.compress(CONTENT), ["single file and no archive"]),
    "zeros": (bytes(10240), ["holds no files"]),
}


@pytest.mark.parametrize("case", NO_ARCHIVES)
def test_a_single_file_is_no_source(tmp_path, cache, case):
    content, words = NO_ARCHIVES[case]
    (tmp_path / "file.zip").write_bytes(content)
    refused(errors.DataError, lambda: opened(tmp_path / "file.zip", cache), "file.zip", *words)
    assert left(cache) == []


def test_pipes_are_refused_before_they_hang(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe")
    refused(errors.DataError, lambda: opened(tmp_path / "pipe", cache), "pipe")


# ---- Archives ------------------------------------------------------------------------------------------------------

def zip_of(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, mode: str, *members: tarfile.TarInfo, content: bytes = b"abc") -> Path:
    with tarfile.open(path, mode) as archive:
        for member in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_tars_are_told_by_content(tmp_path, cache, mode):
    members = member("a", tarfile.DIRTYPE), member("a/1.jpg"), member("./b/é 2.jpg")
    archive = tar_of(tmp_path / "data.bin", mode, *members)
    before = archive.read_bytes()
    assert opened(archive, cache) == {"a/1.jpg": b"abc", "b/é 2.jpg": b"abc"}
    assert left(cache) == []
    assert archive.read_bytes() == before


def test_zips_and_zips_within(tmp_path, cache):
    inner = zip_of({"train/cat.0.jpg": b"cat"}, tmp_path / "inner").read_bytes()
    archive = zip_of({"train.zip": inner, "test.zip": inner, "test/x": b"1", "a.npz": inner, "sub\\b.txt": b"2",
                      "empty/": b""}, tmp_path / "data")
    assert opened(archive, cache) == {"train/train/cat.0.jpg": b"cat", "test.zip.unpacked/train/cat.0.jpg": b"cat",
                                      "test/x": b"1", "a.npz": inner, "sub/b.txt": b"2"}
    deeper = zip_of({"a.zip": zip_of({"b.zip": inner}, tmp_path / "middle").read_bytes()}, tmp_path / "deeper")
    refused(errors.DataError, lambda: opened(deeper, cache), "nested more than one deep", "a.zip")
    assert left(cache) == []


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:\\x", "\\x"])
def test_names_that_lead_out_are_refused(tmp_path, cache, name):
    archive = zip_of({"good.txt": b"1", name: b"2"}, tmp_path / "data.zip")
    refused(errors.DataError, lambda: opened(archive, cache), "leads out of its folder", "data.zip")
    tar = tar_of(tmp_path / "data.tar", "w", member("good.txt"), member(name))
    refused(errors.DataError, lambda: opened(tar, cache), "leads out of its folder")
    assert left(cache) == []
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link"),
                                            (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "pipe")])
def test_links_and_devices_in_tars_are_refused(tmp_path, cache, kind, word):
    archive = tar_of(tmp_path / "data.tar", "w:gz", member("a"), member("bad", kind, "a"), member("bad/b"))
    refused(errors.DataError, lambda: opened(archive, cache), "'bad'", word)
    assert left(cache) == []


def test_links_in_zips_are_refused(tmp_path, cache):
    info = zipfile.ZipInfo("bad")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(errors.DataError, lambda: opened(tmp_path / "data.zip", cache), "'bad'", "link")


def test_encrypted_zips_are_refused(tmp_path, cache):
    archive = zip_of({"secret.txt": b"1"}, tmp_path / "data.zip")
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    refused(errors.DataError, lambda: opened(archive, cache), "secret.txt", "encrypted", "--source FOLDER")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path, cache):
    tar = tar_of(tmp_path / "data.tar", "w", member("a"), member("a"))
    refused(errors.DataError, lambda: opened(tar, cache), "same name", "a in")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a/b", b"2")
    refused(errors.DataError, lambda: opened(tmp_path / "data.zip", cache), "same name")


@pytest.mark.parametrize("kind", ["zip", "w:gz", "w:xz", "w:bz2"])
def test_bombs_are_refused_while_unpacking(tmp_path, cache, kind, monkeypatch):
    monkeypatch.setattr(sources, "RATIO_FLOOR_BYTES", 2**20)
    zeros = bytes(8 * 2**20)
    archive = (zip_of({"a": zeros}, tmp_path / "bomb") if kind == "zip" else
               tar_of(tmp_path / "bomb", kind, member("a"), content=zeros))
    refused(errors.DataError, lambda: opened(archive, cache), "unpacks to more than", "200 times")
    assert left(cache) == []


def test_a_bomb_within_a_zip_within_a_zip(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(sources, "RATIO_FLOOR_BYTES", 2**20)
    inner = zip_of({"a": bytes(8 * 2**20)}, tmp_path / "inner").read_bytes()
    refused(errors.DataError, lambda: opened(zip_of({"a.zip": inner}, tmp_path / "bomb"), cache), "unpacks to more")


def test_a_zip_that_declares_less_than_it_holds(tmp_path, cache):
    archive = zip_of({"a": bytes(2**20)}, tmp_path / "data.zip")
    content = archive.read_bytes()
    archive.write_bytes(content.replace(struct.pack("<L", 2**20), struct.pack("<L", 10)))
    refused(errors.DataError, lambda: opened(archive, cache), "corrupt")


def test_too_many_members_and_too_large_records(tmp_path, cache, monkeypatch):
    names = {str(number): b"" for number in range(20)}
    tar = tar_of(tmp_path / "data.tar", "w", *(member(name) for name in names))
    monkeypatch.setattr(sources, "MAX_MEMBERS", 19)
    refused(errors.DataError, lambda: opened(zip_of(names, tmp_path / "data.zip"), cache), "too many members", "19")
    refused(errors.DataError, lambda: opened(tar, cache), "too many members")
    monkeypatch.setattr(sources, "MAX_HEADER_BYTES", 900)
    refused(errors.DataError, lambda: opened(tmp_path / "data.zip", cache), "directory that is too large")
    tar = tar_of(tmp_path / "long.tar", "w", member("x" * 2000))
    refused(errors.DataError, lambda: opened(tar, cache), "record that is too large")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2", "zip"])
def test_truncated_archives_are_refused_wherever_they_end(tmp_path, cache, mode):
    content = os.urandom(3000)
    archive = (zip_of({"a": content, "b": content}, tmp_path / "data") if mode == "zip" else
               tar_of(tmp_path / "data", mode, member("a"), member("b"), content=content))
    whole = archive.read_bytes()
    # 3,584 is where the first member of the plain tar ends: tarfile by itself would take that for the whole.
    for size in (600, 3584, 5000, 7168):
        archive.write_bytes(whole[:min(size, len(whole) - 4)])
        refused(errors.DataError, lambda: opened(archive, cache), "truncated or corrupt", "fetch it again")
    assert left(cache) == []


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_damaged_archives_are_refused(tmp_path, cache, mode):
    content = os.urandom(3000)
    archive = (zip_of({"a": content, "b": content}, tmp_path / "data") if mode == "zip" else
               tar_of(tmp_path / "data", mode, member("a"), member("b"), content=content))
    damaged = bytearray(archive.read_bytes())
    damaged[3584:3700] = bytes(116) if mode == "zip" else b"\xff" * 116
    archive.write_bytes(damaged)
    refused(errors.DataError, lambda: opened(archive, cache), "truncated or corrupt")


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "_copy", full)
    archive = zip_of({"a": b"1"}, tmp_path / "data.zip")
    refused(errors.MissingError, lambda: opened(archive, cache), "No space left", "free space")
    assert left(cache) == []


def test_what_the_caller_raises_passes_through(tmp_path, cache):
    archive = zip_of({"a": b"1"}, tmp_path / "data.zip")
    with pytest.raises(OSError, match="mine"), sources.open_source(str(archive), downloads=None, cache=cache):
        raise OSError("mine")
    assert left(cache) == []


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "cache").write_text("a file")
    archive = zip_of({"a": b"1"}, tmp_path / "data.zip")
    refused(errors.MissingError, lambda: opened(archive, tmp_path / "cache"), "cannot write below")


@pytest.mark.skipif(not (SHARED / "petimages.zip").is_file(), reason=f"the real photographs are not in {SHARED}")
def test_the_real_photographs(cache):
    with sources.open_source(str(SHARED / "petimages.zip"), downloads=None, cache=cache) as folder:
        assert sum(path.is_file() for path in folder.rglob("*")) == 1624
    assert left(cache) == []


# ---- Fingerprints --------------------------------------------------------------------------------------------------

def test_the_fingerprint_is_that_of_names_and_contents(tmp_path):
    one = tmp_path / "one"
    (one / "sub").mkdir(parents=True)
    (one / "a").write_bytes(b"1")
    (one / "sub" / "b").write_bytes(b"2")
    mark = sources.fingerprint(one)
    other = tmp_path / "elsewhere" / "two"
    shutil.copytree(one, other)
    os.utime(other / "a", (1, 1))
    (other / "empty").mkdir()
    (other / "sub" / "up").symlink_to(other)
    assert sources.fingerprint(other) == mark
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "a").symlink_to(one / "a")
    (linked / "sub").symlink_to(one / "sub")
    assert sources.fingerprint(linked) == mark
    (one / "a").write_bytes(b"3")
    assert sources.fingerprint(one) != mark
    (other / "a").rename(other / "c")
    assert sources.fingerprint(other) != mark
    refused(errors.DataError, lambda: sources.fingerprint(tmp_path / "none"), "cannot read a folder")


# ---- Downloads -----------------------------------------------------------------------------------------------------

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
    monkeypatch.setattr(sources, "PAUSE_SECONDS", 0.01)
    running = Server()
    yield running
    running.stop()


def fetch(server, target: Path, sha256: str | None = SHA, limit: int = 10**7, name: str = "file.bin") -> bytes:
    sources.download(server.base + name, target, sha256=sha256, limit=limit)
    assert not list(target.parent.glob("*.part*"))
    return target.read_bytes()


def test_a_file_is_fetched_once(server, tmp_path):
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert len(server.requests) == 1
    (tmp_path / "file.bin").write_bytes(b"damaged")
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert len(server.requests) == 2


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("etag", ['"v1"', None])
def test_a_cut_connection_resumes_and_only_the_rest_is_sent(server, tmp_path, etag, length):
    tags = {"etag": etag} if etag else {}
    server.answers = [{"cut": 300_000, **tags}, {**tags, "length": length}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
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
        patch.setattr(sources, "_read", interrupted)
        fetch(server, tmp_path / "file.bin")
    assert (tmp_path / "file.bin.part").stat().st_size == 200_000
    assert not (tmp_path / "file.bin").exists()
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert server.requests[1] == ("/file.bin", "bytes=200000-", '"v1"')
    assert server.sent[1] == len(CONTENT) - 200_000


def test_a_part_that_is_whole_already_is_not_fetched_again(server, tmp_path):
    server.answers = [{"etag": '"v1"', "declared": len(CONTENT) + 1}, {"etag": '"v1"'}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert server.sent == [len(CONTENT), 0]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    server.answers = [{"cut": 300_000}, {"ranges": False}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert server.sent == [300_000, len(CONTENT)]


def test_a_file_that_changed_in_between_starts_again(server, tmp_path):
    old = bytes(len(CONTENT))
    server.answers = [{"body": old, "cut": 300_000, "etag": '"v1"'}, {"etag": '"v2"'}]
    assert fetch(server, tmp_path / "file.bin", sha256=None) == CONTENT
    assert server.requests[1] == ("/file.bin", "bytes=300000-", '"v1"')
    assert server.sent == [300_000, len(CONTENT)]


def test_a_change_that_no_etag_tells_is_noticed_by_the_checksum(server, tmp_path):
    server.answers = [{"body": bytes(len(CONTENT)), "cut": 300_000}, {}, {}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert server.sent == [300_000, len(CONTENT) - 300_000, len(CONTENT)]


def test_without_etag_and_checksum_nothing_is_resumed(server, tmp_path):
    server.answers = [{"cut": 300_000}, {}]
    assert fetch(server, tmp_path / "file.bin", sha256=None) == CONTENT
    assert server.requests[1] == ("/file.bin", None, None)


def test_a_file_that_shrank_starts_again(server, tmp_path):
    server.answers = [{"cut": 300_000, "etag": '"v1"'}, {"body": b"short", "etag": '"v1"'}, {"etag": '"v1"'}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    assert server.requests[2] == ("/file.bin", None, None)


def test_another_range_than_asked_for_is_noticed(server, tmp_path):
    server.answers = [{"cut": 300_000, "etag": '"v1"'}, {"wrong_range": 5, "etag": '"v1"'}, {}]
    assert fetch(server, tmp_path / "file.bin", sha256=None) == CONTENT
    assert server.requests[2] == ("/file.bin", None, None)


def test_a_line_that_breaks_often_still_brings_a_large_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK", 1000)
    server.answers = [{"cut": 100_000}] * 10 + [{}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
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
    ({"body": bytes(10**7 + 1)}, ["10,000,001 bytes", "at most 10,000,000"], 1),
    ({"body": bytes(10**7 + 1), "length": False}, ["more than 10,000,000"], 1),
    ({"cut": 1000, "ranges": False}, ["broke off after 1,000 of 1,048,576"], 4),
])
def test_what_a_server_can_do_wrong(server, tmp_path, answer, words, tries):
    server.answers = [answer]
    (tmp_path / "file.bin").write_bytes(b"what was there")
    refused(errors.MissingError, lambda: fetch(server, tmp_path / "file.bin"), "cannot fetch file.bin", server.base,
            *words)
    assert len(server.requests) == tries
    assert (tmp_path / "file.bin").read_bytes() == b"what was there"
    if "cut" not in answer:
        assert os.listdir(tmp_path) == ["file.bin"]


def test_a_server_error_that_passes(server, tmp_path, capsys):
    server.answers = [{"code": 503, "body": b""}, {"code": 500, "body": b""}, {}]
    assert fetch(server, tmp_path / "file.bin") == CONTENT
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "503" in shown.err
    assert "trying again" in shown.err


def test_a_server_that_is_gone_or_silent(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "TIMEOUT_SECONDS", 0.2)
    release = threading.Event()
    server.answer = lambda request: release.wait(10)
    refused(errors.MissingError, lambda: fetch(server, tmp_path / "file.bin"), "no answer within")
    release.set()
    refused(errors.MissingError, lambda: sources.download("http://127.0.0.1:1/x", tmp_path / "x", sha256=SHA, limit=9),
            "refused")
    refused(errors.MissingError, lambda: sources.download("http://[oops/x", tmp_path / "x", sha256=SHA, limit=9),
            "no valid address")


def test_gzipped_files_are_checked_by_what_they_hold(server, tmp_path):
    for number, body in enumerate((gzip.compress(CONTENT, 1), gzip.compress(CONTENT, 9), CONTENT)):
        server.answers = [{"body": body}]
        assert fetch(server, tmp_path / f"{number}.gz") == body
    for body, word in ((gzip.compress(CONTENT)[:-1], "broken gzip"), (b"\x1f\x8bnonsense", "broken gzip"),
                       (gzip.compress(b"other"), "checksum")):
        server.answers = [{"body": body}]
        refused(errors.MissingError, lambda: fetch(server, tmp_path / "x.gz"), word)


def test_a_disk_that_cannot_be_written_is_no_reason_to_retry(server, tmp_path):
    refused(errors.MissingError, lambda: fetch(server, tmp_path / "none" / "file.bin"), "cannot write below")
    assert len(server.requests) == 1


# ---- Recipes' files and archives from addresses --------------------------------------------------------------------

def recipe_files(*mirrors: str) -> Downloads:
    return Downloads(mirrors, tuple(File(name=f"{name}.gz", sha256=hashlib.sha256(name.encode()).hexdigest(), bytes=999)
                                    for name in "ab"))


BODIES = {f"/{folder}{name}.gz": gzip.compress(name.encode()) for name in "ab" for folder in ("", "good/", "dead/")}


def test_the_mirrors_are_tried_in_turn_and_the_cache_remembers(server, cache):
    server.answers = [{"code": 404, "body": b""}, {"body": BODIES}]
    downloads = recipe_files(server.base + "dead/", server.base + "good/")
    files = opened("download", cache, downloads)
    assert {name: gzip.decompress(content) for name, content in files.items()} == {"a.gz": b"a", "b.gz": b"b"}
    assert [path for path, *_ in server.requests] == ["/dead/a.gz", "/good/a.gz", "/good/b.gz"]
    assert opened("download", cache, downloads) == files
    assert len(server.requests) == 3


def test_an_address_of_a_folder_gives_the_recipes_files(server, cache):
    server.answers = [{"body": BODIES}]
    assert set(opened(server.base, cache, recipe_files("http://127.0.0.1:1/"))) == {"a.gz", "b.gz"}


def test_when_all_mirrors_fail_each_reason_is_named(server, cache):
    server.answers = [{"code": 404, "body": b""}, {"body": b"<html>"}]
    downloads = recipe_files(server.base + "one/", server.base + "two/")
    refused(errors.MissingError, lambda: opened("download", cache, downloads), "no mirror gives a.gz", "one (404",
            "two (it answers with a web page", "--source FOLDER", "a.gz, b.gz", "--source sample")


def test_recipes_without_downloads(server, cache):
    for source in ("download", server.base):
        for downloads in (None, Downloads((), ())):
            refused(errors.UsageError, partial(opened, source, cache, downloads), "no files to download", "sample")


def test_an_address_of_an_archive(server, tmp_path, cache):
    body = zip_of({"a/b.txt": b"1"}, tmp_path / "data.zip").read_bytes()
    server.answers = [{"body": body, "cut": 50, "etag": '"v1"'}, {"body": body, "etag": '"v1"'}]
    assert opened(server.base + "my data.zip?x=1", cache) == {"a/b.txt": b"1"}
    assert server.requests[1][:2] == ("/my%20data.zip?x=1", "bytes=50-")
    assert left(cache) == ["downloads"]
    assert [path.suffix for path in (cache / "downloads").iterdir()] == [".lock"]
    server.answers = [{"body": b"just text"}]
    refused(errors.DataError, lambda: opened(server.base + "data.zip", cache), "no archive", "data.zip")
    server.answers = [{"code": 404, "body": b""}]
    refused(errors.MissingError, lambda: opened(server.base + "data.zip", cache), "404", "data.zip")
    assert left(cache) == ["downloads"]


def test_two_jobs_that_start_together_fetch_once(server, cache):
    server.answers = [{"body": BODIES}]
    downloads, found = recipe_files(server.base), []
    jobs = [threading.Thread(target=lambda: found.append(opened("download", cache, downloads))) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(found) == 4
    assert all(set(files) == {"a.gz", "b.gz"} for files in found)
    assert len(server.requests) == 2
