"""Unpacks archives from strangers: regular files only, nothing outside the folder, sizes bounded while unpacking."""

import bz2
import errno
import gzip
import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from hpcai_cli import console
from hpcai_cli.engine.raw.idx import looks_like_html
from hpcai_cli.errors import DataError, HpcaiError, printable

MAX_MEMBERS = 2_000_000
"""Files and folders in one archive; ImageNet has 1.4 million."""

MAX_UNPACKED_BYTES = 512 * 2**30
MAX_RATIO = 200
"""Unpacked bytes for each byte of the archive. Images reach 5, tables 30, a bomb 1,000 and more."""

RATIO_FLOOR_BYTES = 64 * 2**20
"""Any archive may unpack to this much: small ones of repetitive text reach high ratios honestly."""

MAX_RECORD_BYTES = 256 * 2**20
"""Largest single piece of an archive's own records (a zip's directory, a tar's extended header) taken into memory."""

_CHUNK = 2**20
_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
_ZIP_KINDS = {0: "file", stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFLNK: "link"}
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, struct.error, EOFError, OSError,
                   ValueError, OverflowError, NotImplementedError, RuntimeError, MemoryError)
"""What the standard library raises on broken or hostile archives."""

_Member = tuple[str, str, Callable[[], BinaryIO]]
"""Name; `file`, `folder` or what it is instead; what opens its content."""


def unpack(archive: Path, folder: Path, *, named: str) -> None:
    """Unpack the regular files of a zip or a plain or compressed tar, and those of the zips right within it.

    Args:
        folder: a new one; where this call fails, it holds a part of the files.
        named: what the user calls the archive, for messages.

    Raises:
        DataError: the archive is none, is broken, or is refused as a whole because a part of it is unsafe.
        OSError: the folder cannot be written.
    """
    try:
        _unpack_all(archive, folder)
    except HpcaiError as error:
        raise type(error)(str(error), received=named) from error
    except _ARCHIVE_ERRORS as error:
        if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
            raise DataError("two members of the archive have the same name", expected="each name once",
                            received=f"{printable(Path(error.filename).name)} in {named}") from error
        if isinstance(error, OSError) and error.filename == str(archive):
            raise DataError(f"cannot read the archive ({error.strerror})", received=named) from error
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise
        raise DataError(f"the archive is truncated or corrupt ({printable(str(error)) or type(error).__name__})",
                        expected="a whole archive", mend="fetch it again", received=named) from error


class _Budget:
    """What an archive may still unpack to, counted while unpacking: declared sizes lie."""

    def __init__(self, archive: Path):
        self.limit = min(MAX_UNPACKED_BYTES, max(RATIO_FLOOR_BYTES, MAX_RATIO * archive.stat().st_size))
        self.bytes, self.members = self.limit, MAX_MEMBERS
        self.zips: list[Path] = []
        """Zips found inside, to be unpacked in their turn."""

    def take(self, *, members: int = 0, bytes: int = 0) -> None:
        self.members -= members
        self.bytes -= bytes
        if self.members < 0:
            raise DataError("the archive has too many members", expected=f"at most {MAX_MEMBERS:,}")
        if self.bytes < 0:
            raise _too_large(self.limit)


def _unpack_all(archive: Path, folder: Path) -> None:
    budget = _Budget(archive)
    console.note(f"unpacking {archive.name}, {archive.stat().st_size:,} bytes")
    _unpack_one(archive, folder, budget)
    # Kaggle packs train.zip and test.zip into one zip.
    inner_zips, budget.zips = budget.zips, []
    for inner in inner_zips:
        target = inner.with_suffix("")
        _unpack_one(inner, inner.with_name(f"{inner.name}.unpacked") if target.exists() else target, budget)
        inner.unlink()
        if budget.zips:
            raise DataError("archives are nested more than one deep", expected="a zip within an archive at most",
                            mend=f"unpack {printable(inner.name)} yourself and use `--source FOLDER`")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise DataError("the archive holds no files", expected="at least one regular file")


def _unpack_one(archive: Path, folder: Path, budget: _Budget) -> None:
    with (open(archive, "rb") as file,
          console.progress(f"unpacking {archive.name}", total=archive.stat().st_size, unit="bytes") as shown):
        head = file.read(64)
        file.seek(0)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            members = _zip_members(_BoundedStream(file, budget.limit))
        else:
            plain = next((opener(file) for magic, opener in _COMPRESSIONS.items() if head.startswith(magic)), file)
            members = _tar_members(_BoundedStream(plain, budget.limit), head)
        for name, kind, opened in members:
            budget.take(members=1)
            path = _safe_path(name, folder)
            if kind == "folder":
                path.mkdir(parents=True, exist_ok=True)
            elif kind == "file":
                with opened() as stream:
                    _copy(stream, path, budget, lambda: shown.update(file.tell()))
            else:
                raise DataError(f"{printable(name)!r} in the archive is a {kind}",
                                expected="regular files and folders only",
                                mend="do not trust this archive, or pack the files themselves")


def _safe_path(name: str, folder: Path) -> Path:
    """Return where a member goes, refusing names that lead out of the folder. Old Windows tools write backslashes."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match(r"[A-Za-z]:[\\/]", name) or ".." in parts or "\0" in name:
        raise DataError(f"{printable(name)!r} in the archive leads out of its folder",
                        expected="relative names without ..", mend="do not trust this archive")
    return folder.joinpath(*(part for part in parts if part not in ("", ".")))


def _copy(stream: BinaryIO, path: Path, budget: _Budget, show: Callable[[], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b""
    with open(path, "xb") as file:
        while chunk := stream.read(_CHUNK):
            budget.take(bytes=len(chunk))
            head = head or chunk[:4]
            file.write(chunk)
            show()
    # By name too: a numpy .npz is a zip that no one wants unpacked.
    if path.suffix.lower() == ".zip" and head == b"PK\x03\x04":
        budget.zips.append(path)


def _zip_members(stream: "_BoundedStream") -> Iterator[_Member]:
    with zipfile.ZipFile(stream) as opened:
        for info in opened.infolist():
            if info.flag_bits & 0x1:
                raise DataError(f"{printable(info.filename)!r} in the archive is encrypted",
                                expected="files without a password",
                                mend="unpack it yourself and use `--source FOLDER`")
            kind = _ZIP_KINDS.get(stat.S_IFMT(info.external_attr >> 16), "device or a pipe")
            if kind == "file" and info.filename.endswith(("/", "\\")):
                kind = "folder"
            yield info.filename, kind, partial(opened.open, info)


def _tar_members(stream: "_BoundedStream", head: bytes) -> Iterator[_Member]:
    with _opened_tar(stream, head) as opened:
        while (member := opened.next()) is not None:
            # TarFile keeps every member for random access, which would add up over a million of them.
            opened.members.clear()
            kind = ("file" if member.isreg() else "folder" if member.isdir() else
                    "link" if member.issym() or member.islnk() else "device or a pipe")
            yield member.name, kind, partial(opened.extractfile, member)
    # tarfile takes a damaged header for the end. The true end is a block of zeros, and reading on checks the checksum.
    if stream.last != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end is missing")
    while stream.read(_CHUNK):
        pass


def _opened_tar(stream: "_BoundedStream", head: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode="r:")
    except tarfile.ReadError as error:
        # tarfile wraps what zlib says about a damaged first block.
        if "zlib" in str(error):
            raise
        what = ("the file is empty" if not head else "the file is a web page (HTML)" if looks_like_html(head) else
                "the source is a single file and no archive that can be read")
        raise DataError(what, expected="a folder, or a zip, tar, tar.gz, tar.bz2 or tar.xz archive",
                        mend="put the files into a folder and use `--source FOLDER`") from error


class _BoundedStream:
    """What zipfile and tarfile read from; an error where they would hold in memory or unpack more than is allowed."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._stream, self._limit = stream, limit
        self.tell, self.seekable = stream.tell, stream.seekable
        self.last = b""
        """What the last call of read returned."""

    def read(self, size: int = -1) -> bytes:
        # Without a size, zipfile reads at most the last 64 KiB. A hostile tar header leads to other negative sizes.
        if not -1 <= size <= MAX_RECORD_BYTES:
            raise DataError("the archive declares a record that is too large", expected=f"{MAX_RECORD_BYTES:,} bytes")
        self.last = self._stream.read(size)
        if self.tell() > self._limit:
            raise _too_large(self._limit)
        return self.last

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        if position > self._limit:
            raise _too_large(self._limit)
        return self._stream.seek(position, whence)


def _too_large(limit: int) -> DataError:
    return DataError(f"the archive unpacks to more than {limit:,} bytes",
                     expected=f"at most {MAX_RATIO} times its size, or {RATIO_FLOOR_BYTES:,} bytes",
                     mend="unpack it yourself and use `--source FOLDER` if you trust it")
