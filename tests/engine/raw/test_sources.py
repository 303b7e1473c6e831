"""What the user named becomes a folder of files that is gone afterwards, or one sentence that says why not."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hpcai_cli import errors
from hpcai_cli.engine.raw import archives, sources
from hpcai_cli.recipe import Downloads, File


def refused(kind: type, call, *words: str) -> None:
    """Assert that the call fails with this very kind in one line that has all the words."""
    with pytest.raises(errors.HpcaiError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def zip_of(files: dict[str, bytes], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opened(source, cache: Path) -> dict[str, bytes]:
    """Open the source and return all its files."""
    with sources.open_source(str(source), downloads=None, cache=cache) as folder:
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
    refused(errors.DataError, lambda: opened(tmp_path / "my mnits", cache), "there is no my mnits",
            f"--source '{tmp_path / 'my mnist'}'", "received")
    refused(errors.DataError, lambda: opened(tmp_path / "xyz" / "deep", cache), "there is no xyz", "--source sample")
    refused(errors.DataError, lambda: opened(tmp_path / "a\0b", cache), "there is no")
    refused(errors.DataError, lambda: opened(tmp_path / ("x" * 300), cache), "cannot read the source")
    refused(errors.UsageError, lambda: opened("", cache), "empty")
    monkeypatch.chdir(tmp_path)
    refused(errors.DataError, lambda: opened("downlaod", cache), "`--source download`")
    refused(errors.UsageError, lambda: opened("s3://bucket/mnist", cache), "s3://", "--source FOLDER")


def test_pipes_are_refused_before_they_hang(tmp_path, cache):
    os.mkfifo(tmp_path / "pipe")
    refused(errors.DataError, lambda: opened(tmp_path / "pipe", cache), "pipe")


# ---- Archives ------------------------------------------------------------------------------------------------------

def test_an_archive_leaves_nothing_behind(tmp_path, cache):
    archive = zip_of({"a/b.txt": b"1"}, tmp_path / "data.zip")
    assert opened(archive, cache) == {"a/b.txt": b"1"}
    assert left(cache) == []
    assert archive.exists()
    archive.write_bytes(archive.read_bytes()[:-30])
    refused(errors.DataError, lambda: opened(archive, cache), "truncated or corrupt", "data.zip")
    assert left(cache) == []


def test_an_address_of_an_archive(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    zip_of({"a/b.txt": b"1"}, tmp_path / "my data.zip")
    (tmp_path / "text.zip").write_text("just text")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        try:
            assert opened(f"{address}my data.zip", cache) == {"a/b.txt": b"1"}
            refused(errors.DataError, lambda: opened(f"{address}text.zip", cache), "no archive", "text.zip")
            refused(errors.MissingError, lambda: opened(f"{address}none.zip", cache), "404", "none.zip")
        finally:
            server.shutdown()
    assert left(cache) == ["downloads"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives, "_copy", full)
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


@pytest.mark.skipif(not Path("/proc/self/ns/pid").exists(), reason="only Linux tells containers' process numbers apart")
def test_what_a_killed_process_left_goes_with_the_next_call(tmp_path, cache):
    archive = zip_of({"a": b"1"}, tmp_path / "data.zip")
    code = ("import pathlib, sys, time\nfrom hpcai_cli.engine.raw import sources\n"
            "with sources.open_source(sys.argv[1], downloads=None, cache=pathlib.Path(sys.argv[2])):\n"
            "    print('open', flush=True)\n    time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code, archive, cache], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        assert opened(archive, cache) == {"a": b"1"}
        assert len(left(cache)) == 1
        process.send_signal(signal.SIGKILL)
    assert len(left(cache)) == 1
    assert opened(archive, cache) == {"a": b"1"}
    assert left(cache) == []


# ---- Single tables, downloads of one archive -----------------------------------------------------------------------

@contextmanager
def serving(folder: Path, monkeypatch):
    """Serve a folder over HTTP and give its address."""
    monkeypatch.setenv("no_proxy", "*")
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@pytest.mark.parametrize("name", ["houses.csv", "HOUSES.CSV", "a b.tsv", "iris.data", "x.txt", "houses.csv.gz",
                                  "# of houses?.csv"])
def test_a_table_stands_alone_in_its_folder(tmp_path, cache, name):
    (tmp_path / "no #1").mkdir()
    (tmp_path / "no #1" / name).write_bytes(b"a,b\n1,2\n")
    (tmp_path / "no #1" / "other.csv").write_bytes(b"x\n")
    assert opened(tmp_path / "no #1" / name, cache) == {name: b"a,b\n1,2\n"}
    assert left(cache) == []
    assert (tmp_path / "no #1" / name).exists()


def test_a_table_of_the_working_folder(tmp_path, cache, monkeypatch):
    (tmp_path / "houses.csv").write_bytes(b"a\n1\n")
    monkeypatch.chdir(tmp_path)
    assert opened("houses.csv", cache) == {"houses.csv": b"a\n1\n"}
    refused(errors.DataError, lambda: opened("house.csv", cache), "there is no house.csv", "houses.csv")


def test_a_table_has_the_same_fingerprint_wherever_it_lies(tmp_path, cache):
    marks = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "houses.csv").write_bytes(b"a\n1\n")
        with sources.open_source(str(tmp_path / folder / "houses.csv"), downloads=None, cache=cache) as here:
            marks.append(sources.fingerprint(here))
    assert marks[0] == marks[1]


def test_an_address_of_a_table(tmp_path, cache, monkeypatch):
    (tmp_path / "houses.csv").write_bytes(b"a\n1\n")
    (tmp_path / "gone.csv").write_text("<!DOCTYPE html><html>moved</html>")
    with serving(tmp_path, monkeypatch) as address:
        for tail in ("houses.csv", "houses.csv?raw=true", "houses.csv#top"):
            assert opened(address + tail, cache) == {"houses.csv": b"a\n1\n"}
        refused(errors.MissingError, lambda: opened(f"{address}gone.csv", cache), "web page (HTML)")
    assert left(cache) == ["downloads"]


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_recipe_s_only_archive_is_unpacked_and_kept_packed(tmp_path, cache, monkeypatch, kind):
    folder = tmp_path / "raw"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.bin").write_bytes(b"12")
    packed = Path(shutil.make_archive(str(tmp_path / "data"), {"zip": "zip", "tar.gz": "gztar"}[kind], folder))
    content = packed.read_bytes()
    with serving(tmp_path, monkeypatch) as address:
        recipe = Downloads((address,), (File(packed.name, hashlib.sha256(content).hexdigest(), 10**6),))
        for _ in range(2):
            with sources.open_source("download", downloads=recipe, cache=cache) as here:
                files = {path.relative_to(here).as_posix(): path.read_bytes()
                         for path in here.rglob("*") if path.is_file()}
            assert files == {"sub/a.bin": b"12"}
            assert left(cache) == ["downloads"]
    # The archive itself stays, so that the second time needs no network.
    with sources.open_source("download", downloads=recipe, cache=cache) as here:
        assert (here / "sub" / "a.bin").exists()
    assert next(cache.rglob(packed.name)).read_bytes() == content


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
