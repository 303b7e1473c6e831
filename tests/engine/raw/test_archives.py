"""Archives become a folder of regular files, or one sentence that says why not."""

import gzip
import io
import os
import struct
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from hpcai_cli import console, errors
from hpcai_cli.engine.raw import archives

SHARED = Path(__file__).parents[4] / "shared" / "data"


def refused(kind: type, call, *words: str) -> None:
    """Assert that the call fails with this very kind in one line that has all the words."""
    with pytest.raises(errors.HpcaiError) as caught:
        call()
    assert type(caught.value) is kind, repr(caught.value)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def unpacked(archive: Path) -> dict[str, bytes]:
    """Unpack the archive and return all its files."""
    with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
        folder = Path(temporary, "files")
        archives.unpack(archive, folder, named=str(archive))
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
def test_tars_are_told_by_content(tmp_path, mode):
    members = member("a", tarfile.DIRTYPE), member("a/1.jpg"), member("./b/é 2.jpg")
    archive = tar_of(tmp_path / "data.bin", mode, *members)
    before = archive.read_bytes()
    assert unpacked(archive) == {"a/1.jpg": b"abc", "b/é 2.jpg": b"abc"}
    assert archive.read_bytes() == before


def test_zips_and_zips_within(tmp_path):
    inner = zip_of({"train/cat.0.jpg": b"cat"}, tmp_path / "inner").read_bytes()
    archive = zip_of({"train.zip": inner, "test.zip": inner, "test/x": b"1", "a.npz": inner, "sub\\b.txt": b"2",
                      "empty/": b""}, tmp_path / "data")
    assert unpacked(archive) == {"train/train/cat.0.jpg": b"cat", "test.zip.unpacked/train/cat.0.jpg": b"cat",
                                 "test/x": b"1", "a.npz": inner, "sub/b.txt": b"2"}
    deeper = zip_of({"a.zip": zip_of({"b.zip": inner}, tmp_path / "middle").read_bytes()}, tmp_path / "deeper")
    refused(errors.DataError, lambda: unpacked(deeper), "nested more than one deep", "a.zip")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "..\\x", "C:\\x", "\\x"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    archive = zip_of({"good.txt": b"1", name: b"2"}, tmp_path / "data.zip")
    refused(errors.DataError, lambda: unpacked(archive), "leads out of its folder", "data.zip")
    tar = tar_of(tmp_path / "data.tar", "w", member("good.txt"), member(name))
    refused(errors.DataError, lambda: unpacked(tar), "leads out of its folder")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("kind", "word"), [(tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "link"),
                                            (tarfile.CHRTYPE, "device"), (tarfile.FIFOTYPE, "pipe")])
def test_links_and_devices_in_tars_are_refused(tmp_path, kind, word):
    archive = tar_of(tmp_path / "data.tar", "w:gz", member("a"), member("bad", kind, "a"), member("bad/b"))
    refused(errors.DataError, lambda: unpacked(archive), "'bad'", word)


def test_links_in_zips_are_refused(tmp_path):
    info = zipfile.ZipInfo("bad")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    refused(errors.DataError, lambda: unpacked(tmp_path / "data.zip"), "'bad'", "link")


def test_encrypted_zips_are_refused(tmp_path):
    archive = zip_of({"secret.txt": b"1"}, tmp_path / "data.zip")
    content = bytearray(archive.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    archive.write_bytes(content)
    refused(errors.DataError, lambda: unpacked(archive), "secret.txt", "encrypted", "--source FOLDER")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice_is_refused(tmp_path):
    tar = tar_of(tmp_path / "data.tar", "w", member("a"), member("a"))
    refused(errors.DataError, lambda: unpacked(tar), "same name", "a in")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a/b", b"2")
    refused(errors.DataError, lambda: unpacked(tmp_path / "data.zip"), "same name")


@pytest.mark.parametrize("kind", ["zip", "w:gz", "w:xz", "w:bz2"])
def test_bombs_are_refused_while_unpacking(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FLOOR_BYTES", 2**20)
    zeros = bytes(8 * 2**20)
    archive = (zip_of({"a": zeros}, tmp_path / "bomb") if kind == "zip" else
               tar_of(tmp_path / "bomb", kind, member("a"), content=zeros))
    refused(errors.DataError, lambda: unpacked(archive), "unpacks to more than", "200 times")


def test_a_bomb_within_a_zip_within_a_zip(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "RATIO_FLOOR_BYTES", 2**20)
    inner = zip_of({"a": bytes(8 * 2**20)}, tmp_path / "inner").read_bytes()
    refused(errors.DataError, lambda: unpacked(zip_of({"a.zip": inner}, tmp_path / "bomb")), "unpacks to more")


def test_a_zip_that_declares_less_than_it_holds(tmp_path):
    archive = zip_of({"a": bytes(2**20)}, tmp_path / "data.zip")
    content = archive.read_bytes()
    archive.write_bytes(content.replace(struct.pack("<L", 2**20), struct.pack("<L", 10)))
    refused(errors.DataError, lambda: unpacked(archive), "corrupt")


def test_too_many_members_and_too_large_records(tmp_path, monkeypatch):
    names = {str(number): b"" for number in range(20)}
    tar = tar_of(tmp_path / "data.tar", "w", *(member(name) for name in names))
    monkeypatch.setattr(archives, "MAX_MEMBERS", 19)
    refused(errors.DataError, lambda: unpacked(zip_of(names, tmp_path / "data.zip")), "too many members", "19")
    refused(errors.DataError, lambda: unpacked(tar), "too many members")
    monkeypatch.setattr(archives, "MAX_RECORD_BYTES", 900)
    refused(errors.DataError, lambda: unpacked(tmp_path / "data.zip"), "record that is too large")
    tar = tar_of(tmp_path / "long.tar", "w", member("x" * 2000))
    refused(errors.DataError, lambda: unpacked(tar), "record that is too large")


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2", "zip"])
def test_truncated_archives_are_refused_wherever_they_end(tmp_path, mode):
    content = os.urandom(3000)
    archive = (zip_of({"a": content, "b": content}, tmp_path / "data") if mode == "zip" else
               tar_of(tmp_path / "data", mode, member("a"), member("b"), content=content))
    whole = archive.read_bytes()
    # 3,584 is where the first member of the plain tar ends: tarfile by itself would take that for the whole.
    for size in (600, 3584, 5000, 7168):
        archive.write_bytes(whole[:min(size, len(whole) - 4)])
        refused(errors.DataError, lambda: unpacked(archive), "truncated or corrupt", "fetch it again")


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_damaged_archives_are_refused(tmp_path, mode):
    content = os.urandom(3000)
    archive = (zip_of({"a": content, "b": content}, tmp_path / "data") if mode == "zip" else
               tar_of(tmp_path / "data", mode, member("a"), member("b"), content=content))
    damaged = bytearray(archive.read_bytes())
    damaged[3584:3700] = bytes(116) if mode == "zip" else b"\xff" * 116
    archive.write_bytes(damaged)
    refused(errors.DataError, lambda: unpacked(archive), "truncated or corrupt")


NO_ARCHIVES = {
    "text": (b"hello, world", ["single file and no archive"]),
    "empty": (b"", ["is empty"]),
    "html": (b"<!doctype html><title>404</title>", ["web page"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(600), ["no archive that can be read"]),
    "one_gzipped_file": (gzip.compress(b"x" * 5000), ["single file and no archive"]),
    "zeros": (bytes(10240), ["holds no files"]),
}


@pytest.mark.parametrize("case", NO_ARCHIVES)
def test_a_single_file_is_no_source(tmp_path, case):
    content, words = NO_ARCHIVES[case]
    (tmp_path / "file.zip").write_bytes(content)
    refused(errors.DataError, lambda: unpacked(tmp_path / "file.zip"), "file.zip", *words)


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz"])
def test_progress_goes_once_through_the_archive(tmp_path, monkeypatch, mode):
    positions = []
    monkeypatch.setattr(console.Progress, "update", lambda self, done, text="": positions.append((done, self._total)))
    content = os.urandom(3 * 2**20)
    archive = (zip_of({"a": content, "b": content}, tmp_path / "data") if mode == "zip" else
               tar_of(tmp_path / "data", mode, member("a"), member("b"), content=content))
    unpacked(archive)
    size = archive.stat().st_size
    assert positions == sorted(positions)
    assert {total for _, total in positions} == {size}
    assert 0.9 * size < positions[-1][0] <= size


@pytest.mark.skipif(not (SHARED / "petimages.zip").is_file(), reason=f"the real photographs are not in {SHARED}")
def test_the_real_photographs(tmp_path):
    archives.unpack(SHARED / "petimages.zip", tmp_path / "files", named="photographs")
    assert sum(path.is_file() for path in (tmp_path / "files").rglob("*")) == 1624
