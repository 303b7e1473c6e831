"""Brings what the user named, a folder, an archive or an address, to a local folder of files."""

import bz2
import difflib
import errno
import fcntl
import gzip
import hashlib
import http.client
import json
import lzma
import os
import re
import shlex
import shutil
import socket
import ssl
import stat
import struct
import tarfile
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hpcai_cli import console
from hpcai_cli.engine.idx import looks_like_html
from hpcai_cli.errors import DataError, HpcaiError, MissingError, UsageError

MAX_MEMBERS = 2_000_000
"""Files and folders in one archive; ImageNet has 1.4 million."""

MAX_UNPACKED_BYTES = 512 * 2**30
MAX_RATIO = 200
"""Unpacked bytes for each byte of the archive. Images reach 5, tables 30, a bomb 1,000 and more."""

RATIO_FLOOR_BYTES = 64 * 2**20
"""Any archive may unpack to this much: small ones of repetitive text reach high ratios honestly."""

MAX_ARCHIVE_BYTES = 64 * 2**30
"""Largest archive that is fetched from an address."""

MAX_HEADER_BYTES = 256 * 2**20
"""Largest single piece of an archive's own records (a zip's directory, a tar's extended header) taken into memory."""

TIMEOUT_SECONDS = 30.0
"""Silence on a connection after which it counts as broken."""

ATTEMPTS = 4
PAUSE_SECONDS = 1.0
"""Pause after the first failed attempt; each further pause is twice as long."""

_CHUNK = 2**20
_TRANSIENT_CODES = {408, 425, 429, 500, 502, 503, 504}
_FOREIGN = {b"7z\xbc\xaf": "7z", b"Rar!": "RAR", b"\x28\xb5\x2f\xfd": "Zstandard"}
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}


# ---- What the user named -------------------------------------------------------------------------------------------

@contextmanager
def open_source(source: str, *, downloads, cache: Path) -> Iterator[Path]:
    """Yield a folder with the files that `source` names; what had to be unpacked is removed afterwards.

    Args:
        source: a folder; an archive (zip, tar, tar.gz, tar.bz2, tar.xz, told by content); `download` for the recipe's
            mirrors (a folder of that name is `./download`); an http(s) address that ends in / for the recipe's files
            below it; an http(s) address of one archive.
        downloads: the recipe's `Downloads`, None where it has none.
        cache: folder for downloads, which stay, and for unpacked archives, which do not.

    Raises:
        UsageError: the recipe has no downloads, or the kind of address is unknown.
        DataError: nothing is there, or the archive is none, broken or unsafe.
        MissingError: no mirror gives the files, or the cache cannot be written.
    """
    scheme = re.match(r"([a-z][a-z0-9+.-]*)://", source, re.I)
    if scheme and scheme[1].lower() not in ("http", "https"):
        raise UsageError(f"addresses with {scheme[1]}:// are not fetched", expected="http:// or https://, or a path",
                         mend="fetch the files yourself and use `--source FOLDER`", received=source)
    if source == "download" or scheme and source.endswith("/"):
        yield _download_files(source, downloads, Path(cache))
    elif scheme:
        archive = _download_archive(source, Path(cache))
        with _unpacked(archive, Path(cache), named=source, remove=True) as folder:
            yield folder
    else:
        path = _existing_path(source)
        if path.is_dir():
            yield path
        else:
            with _unpacked(path, Path(cache), named=source, remove=False) as folder:
                yield folder


def fingerprint(folder: Path) -> str:
    """Compute the SHA-256 over the sorted relative names and the contents of the regular files below a folder.

    Links are followed, so that a folder of links has the fingerprint of what it shows; place and times do not count.
    """
    def unreadable(error):
        raise DataError(f"cannot read a folder ({error.strerror})", received=str(error.filename))

    files = []
    for here, subfolders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        # A link to this folder or to one further up would never end.
        here_and_above = {Path(here).resolve(), *Path(here).resolve().parents}
        subfolders[:] = [name for name in subfolders if Path(here, name).resolve() not in here_and_above]
        files += [path for name in names if (path := Path(here, name)).is_file()]
    digest = hashlib.sha256()
    for name, path in sorted((os.fsencode(path.relative_to(folder).as_posix()), path) for path in files):
        try:
            with open(path, "rb") as file:
                content = _sha256(file)
        except OSError as error:
            raise DataError(f"cannot read a file ({error.strerror})", received=str(path)) from error
        digest.update(hashlib.sha256(name).digest() + bytes.fromhex(content))
    return digest.hexdigest()


def _existing_path(source: str) -> Path:
    """Return the path if a folder or a regular file is there, else say what is."""
    if not source.strip():
        raise UsageError("the source is empty", expected="a folder, an archive, an address, download or sample",
                         received=source)
    path = Path(os.path.expanduser(source))
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        mode = 0
    except OSError as error:
        raise DataError(f"cannot read the source ({error.strerror})", received=source) from error
    if stat.S_ISDIR(mode) or stat.S_ISREG(mode):
        return path
    if mode:
        raise DataError("the source is a device, a pipe or a socket", expected="a folder or an archive",
                        received=source)
    parent, name = path.parent, path.name
    while not parent.is_dir():
        parent, name = parent.parent, parent.name
    try:
        names = sorted(os.listdir(parent))
    except OSError:
        names = []
    # A bare word may be a misspelt one of the two that name no path.
    words = ["download", "sample"] if path.name == source else []
    close = difflib.get_close_matches(name, names + words, n=3, cutoff=0.5)
    shown = ", ".join([known for known in close if known in names] or names[:5]) or "nothing"
    mend = f"`--source {close[0] if close[0] in words else shlex.quote(str(parent / close[0]))}`" if close else \
        "`--source download` or `--source sample`"
    raise DataError(f"there is no {name} in {parent}, but {shown}", expected="a folder, an archive or an address",
                    mend=f"use {mend}", received=source)


# ---- Downloads -----------------------------------------------------------------------------------------------------

class _Unfetched(Exception):
    """An address does not give the file; the text is the short reason."""


class _Interrupted(_Unfetched):
    """It may give the file, or the rest of it, a little later."""


def download(url: str, target: Path, *, sha256: str | None, limit: int) -> None:
    """Fetch one file, resuming what an earlier attempt left in `target.part`.

    Args:
        sha256: of the content, of the unpacked content where the target's name ends in .gz. A target that has it
            already is not fetched again. None takes whatever comes.
        limit: largest size in bytes that is accepted.

    Raises:
        MissingError: the address does not give the file, or the target cannot be written.
    """
    target = Path(target)
    try:
        with _writing(target.parent):
            _fetch(url, target, sha256=sha256, limit=limit)
    except _Unfetched as error:
        raise MissingError(f"cannot fetch {target.name}: {error}", mend="try again later or use `--source FOLDER`",
                           received=url) from error


def _download_files(source: str, downloads, cache: Path) -> Path:
    """Bring all files of a recipe into a folder of the cache, each from the first mirror that gives it."""
    if not downloads or not downloads.files or source == "download" and not downloads.mirrors:
        raise UsageError("this recipe has no files to download", expected="a recipe with `downloads`",
                         mend="use `--source FOLDER`, `--source ARCHIVE` or `--source sample`", received=source)
    mirrors = list(downloads.mirrors) if source == "download" else [source]
    # The key holds the checksums: another version of a recipe's data gets a folder of its own.
    key = hashlib.sha256("\n".join(f"{file.name} {file.sha256}" for file in downloads.files).encode()).hexdigest()[:16]
    folder = cache / "downloads" / key
    with _writing(cache):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder.with_suffix(".lock")):
            for file in downloads.files:
                worked = _fetch_from_any(mirrors, file, folder, [wanted.name for wanted in downloads.files])
                # The next file starts where this one came from: a dead mirror costs its time-outs once.
                mirrors.sort(key=lambda mirror, worked=worked: mirror != worked)
    return folder


def _fetch_from_any(mirrors: Sequence[str], file, folder: Path, wanted: Sequence[str]) -> str:
    """Fetch one file and return the mirror that gave it."""
    reasons = []
    for mirror in mirrors:
        try:
            _fetch(f"{mirror.rstrip('/')}/{urllib.parse.quote(file.name)}", folder / file.name,
                   sha256=file.sha256, limit=file.bytes)
            return mirror
        except _Unfetched as error:
            reasons.append(f"{re.sub('^https?://', '', mirror).rstrip('/')} ({error})")
    raise MissingError(f"no mirror gives {file.name}: {', '.join(reasons)}",
                       mend=f"use `--source FOLDER` with the files {', '.join(wanted)}, or `--source sample`")


def _download_archive(url: str, cache: Path) -> Path:
    """Fetch one archive. It has no known checksum, so one from an earlier day is never taken for today's."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    target = cache / "downloads" / key
    try:
        with _writing(cache):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target.with_suffix(".lock")):
                _fetch(url, target, sha256=None, limit=MAX_ARCHIVE_BYTES)
                # Out of the way of another process that fetches the same address while this one unpacks.
                own = Path(tempfile.mkdtemp(prefix="archive-", dir=cache)) / "archive"
                os.replace(target, own)
    except _Unfetched as error:
        raise MissingError(f"cannot fetch the archive: {error}", mend="fetch it yourself and use `--source FILE`",
                           received=url) from error
    return own


def _fetch(url: str, target: Path, *, sha256: str | None, limit: int) -> None:
    """Fetch, verify, and only then put the file in its place; raise _Unfetched."""
    packed = target.name.endswith(".gz")
    if sha256 and target.is_file() and _content_sha256(target, packed, limit) == sha256.lower():
        return
    part = target.with_name(f"{target.name}.part")
    for _ in range(2):
        resumed = _receive_patiently(url, part, limit=limit, checked=bool(sha256))
        found = _content_sha256(part, packed, limit) if sha256 else None
        if not sha256 or found == sha256.lower():
            os.replace(part, target)
            _discard(part)
            return
        _discard(part)
        # The two halves may come from two versions of the file: a whole one deserves one more try.
        if not resumed:
            break
    if not found:
        raise _Unfetched("its file is a broken gzip file, or unpacks to far more than expected")
    raise _Unfetched(f"its file has the checksum {found[:12]}..., expected {sha256[:12]}...")


def _receive_patiently(url: str, part: Path, *, limit: int, checked: bool) -> bool:
    """Receive with a few attempts; return whether any of them continued an earlier one."""
    failures, resumed = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            return _receive(url, part, limit=limit, checked=checked) or resumed
        except _Interrupted as error:
            after = part.stat().st_size if part.exists() else 0
            resumed = resumed or after > 0
            # A line that breaks every now and then is no reason to give up a large file, one that stands still is.
            failures = 1 if after - before >= _CHUNK else failures + 1
            if failures >= ATTEMPTS:
                raise
            pause = PAUSE_SECONDS * 2 ** (failures - 1)
            console.note(f"{url}: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)
        except _Unfetched:
            _discard(part)
            raise


def _receive(url: str, part: Path, *, limit: int, checked: bool) -> bool:
    """Receive the file, or the rest of it, in one attempt; return whether it was the rest."""
    offset, validator = _resumable(part, url, checked)
    response = _request(url, offset, validator, part)
    if response is None:
        return True
    with response:
        offset, total = _check_answer(response, offset, validator, part)
        kept = validator if offset else ""
        if total is not None and total > limit:
            raise _Unfetched(f"its file has {total:,} bytes, expected at most {limit:,}")
        console.note(f"downloading {url}" + (f" from byte {offset:,} on" if offset else ""))
        description = f"downloading {part.name.removesuffix('.part')}"
        with (open(part, "ab" if offset else "wb") as file,
              console.progress(description, total=total, unit="bytes") as shown):
            _state(part).write_text(json.dumps({"url": url, "validator": _validator(response) or kept}))
            size = offset
            while chunk := _read(response):
                size += len(chunk)
                if size > limit:
                    raise _Unfetched(f"its file has more than {limit:,} bytes")
                file.write(chunk)
                shown.update(size)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and size != total:
        raise _Interrupted(f"the connection broke off after {size:,} of {total:,} bytes")
    with open(part, "rb") as file:
        if looks_like_html(file.read(64)):
            raise _Unfetched("it answers with a web page (HTML)")
    return offset > 0


def _request(url: str, offset: int, validator: str, part: Path):
    """Return the opened answer, None where the partial file turns out to be whole already."""
    headers = {"User-Agent": "hpcai", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        return urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:
            if error.headers.get("Content-Range", "").strip() == f"bytes */{offset}":
                return None
            _discard(part)
            raise _Interrupted("its file has changed") from error
        kind = _Interrupted if error.code in _TRANSIENT_CODES else _Unfetched
        raise kind(f"{error.code} {error.reason}".strip()) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise _Unfetched(f"no valid address: {error}") from error
    except urllib.error.URLError as error:
        lasting = isinstance(error.reason, (socket.gaierror, ssl.SSLCertVerificationError))
        raise (_Unfetched if lasting else _Interrupted)(_reason(error.reason)) from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _check_answer(response, offset: int, validator: str, part: Path) -> tuple[int, int | None]:
    """Return where the answer's first byte belongs and the size of the whole file, None where it is not told."""
    if response.status == 206:
        told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        changed = validator and _validator(response) not in ("", validator)
        if not offset or not told or int(told[1]) != offset or changed:
            _discard(part)
            raise _Interrupted("its file has changed" if changed else "it sends another part than was asked for")
        return offset, int(told[2]) + 1 if told[3] == "*" else int(told[3])
    if response.status != 200:
        raise _Unfetched(f"it answers with status {response.status}")
    length = response.headers.get("Content-Length", "").strip()
    # From here on the answer is the whole file, also where a part was asked for.
    return 0, int(length) if length.isdecimal() else None


def _read(response) -> bytes:
    """Read what has arrived. Failures of the network stay apart from those of the disk, which no retry mends."""
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _resumable(part: Path, url: str, checked: bool) -> tuple[int, str]:
    """Return how many bytes can be kept, and the ETag or date of the version that they belong to."""
    try:
        state = json.loads(_state(part).read_text())
        size = part.stat().st_size
    except (OSError, ValueError):
        return 0, ""
    # Without ETag and date only the checksum can tell two versions apart; without that too, start again.
    if not isinstance(state, dict) or state.get("url") != url or not (state.get("validator") or checked):
        return 0, ""
    return size, str(state.get("validator") or "")


def _validator(response) -> str:
    """Return the strong ETag or the date: If-Range takes no weak ETag (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _reason(error) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS:.0f} s"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


def _content_sha256(path: Path, packed: bool, limit: int) -> str:
    """Return the SHA-256 of the content, unpacked where it should be and is gzipped; "" for a broken gzip stream."""
    with open(path, "rb") as file:
        packed = packed and file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            return _sha256(file)
        try:
            with gzip.open(file) as stream:
                return _sha256(stream, limit * MAX_RATIO)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return ""


def _sha256(stream: BinaryIO, limit: int | None = None) -> str:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        size += len(chunk)
        if limit is not None and size > limit:
            return ""
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Tell a full disk or a folder without permission in one sentence."""
    try:
        yield
    except OSError as error:
        raise MissingError(f"cannot write below {folder} ({error.strerror or error})",
                           expected="a cache folder with free space", received=str(error.filename or folder)) from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Keep two jobs that start together on a shared cache from writing into the same partial file."""
    with open(lock, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note("waiting for another process that downloads the same files")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            console.note(f"{lock.parent} has no file locks: start one download at a time")
        yield


# ---- Archives ------------------------------------------------------------------------------------------------------

class _Budget:
    """What an archive may still unpack to, counted while unpacking: declared sizes lie."""

    def __init__(self, archive: Path):
        self.bytes = min(MAX_UNPACKED_BYTES, max(RATIO_FLOOR_BYTES, MAX_RATIO * archive.stat().st_size))
        self.limit = self.bytes
        self.members = 0
        self.zips: list[Path] = []
        """Zips found inside, to be unpacked in their turn."""

    def take_member(self) -> None:
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise DataError("the archive has too many members", expected=f"at most {MAX_MEMBERS:,}")

    def take_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise _too_large(self.limit)


class _BoundedStream:
    """A seekable stream for tarfile that ends with an error rather than unpack or hold more than is allowed."""

    def __init__(self, stream: BinaryIO, limit: int):
        self._stream, self._limit = stream, limit
        self.last = b""
        """What the last call of read returned."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise DataError("the archive declares a record that is too large", expected=f"{MAX_HEADER_BYTES:,} bytes")
        self.last = self._stream.read(size)
        if self._stream.tell() > self._limit:
            raise _too_large(self._limit)
        return self.last

    def seek(self, position: int) -> int:
        if position > self._limit:
            raise _too_large(self._limit)
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()


@contextmanager
def _unpacked(archive: Path, cache: Path, *, named: str, remove: bool) -> Iterator[Path]:
    """Yield a temporary folder with the regular files of an archive, or refuse the whole of it.

    Args:
        remove: whether the archive itself was only brought here to be unpacked.
    """
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="unpacked-", dir=cache))
    try:
        try:
            _extract(archive, folder)
        except (HpcaiError, *_ARCHIVE_ERRORS) as error:
            raise _unsafe_or_broken(error, archive, cache, named) from error
        finally:
            if remove:
                shutil.rmtree(archive.parent, ignore_errors=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


_ARCHIVE_ERRORS = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, struct.error, EOFError, OSError,
                   ValueError, OverflowError, NotImplementedError, RuntimeError, MemoryError)
"""What the standard library raises on broken or hostile archives."""


def _unsafe_or_broken(error: Exception, archive: Path, cache: Path, named: str) -> HpcaiError:
    """Turn what unpacking raised into the sentence for the user."""
    if isinstance(error, HpcaiError):
        return type(error)(str(error), received=named)
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError):
        return DataError("two members of the archive have the same name", expected="each name once",
                         received=f"{Path(error.filename).name} in {named}")
    if isinstance(error, OSError) and error.filename == str(archive):
        return DataError(f"cannot read the archive ({error.strerror})", received=named)
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return MissingError(f"cannot unpack into {cache} ({error.strerror})",
                            expected="a cache folder with free space", received=named)
    return DataError(f"the archive is truncated or corrupt ({error or type(error).__name__})",
                     expected="a whole archive", mend="fetch it again", received=named)


def _extract(archive: Path, folder: Path) -> None:
    budget = _Budget(archive)
    console.note(f"unpacking {archive.name}, {archive.stat().st_size:,} bytes")
    with open(archive, "rb") as file:
        head = file.read(64)
        file.seek(0)
        if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            _extract_zip(archive, folder, budget)
        else:
            _extract_tar(_plain(file, head), head, folder, budget)
    # Kaggle packs train.zip and test.zip into one zip.
    for inner in list(budget.zips):
        budget.zips.clear()
        target = inner.with_suffix("")
        _extract_zip(inner, inner.with_name(f"{inner.name}.unpacked") if target.exists() else target, budget)
        inner.unlink()
        if budget.zips:
            raise DataError("archives are nested more than one deep", expected="a zip within an archive at most",
                            mend=f"unpack {inner.name} yourself and use `--source FOLDER`")
    if not any(path.is_file() for path in folder.rglob("*")):
        raise DataError("the archive holds no files", expected="at least one regular file")


def _extract_zip(archive: Path, folder: Path, budget: _Budget) -> None:
    with open(archive, "rb") as file, zipfile.ZipFile(_BoundedZip(file)) as opened:
        for info in opened.infolist():
            budget.take_member()
            path = _safe_path(info.filename, folder)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.flag_bits & 0x1:
                raise DataError(f"{info.filename!r} in the archive is encrypted", expected="files without a password",
                                mend="unpack it yourself and use `--source FOLDER`")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise _not_regular(info.filename, "link" if kind == stat.S_IFLNK else "device or a pipe")
            if info.filename.endswith(("/", "\\")):
                path.mkdir(parents=True, exist_ok=True)
            else:
                with opened.open(info) as stream:
                    _copy(stream, path, budget)


def _extract_tar(plain: BinaryIO, head: bytes, folder: Path, budget: _Budget) -> None:
    stream = _BoundedStream(plain, budget.limit)
    with _opened_tar(stream, head) as opened:
        while (member := opened.next()) is not None:
            # TarFile keeps every member for random access, which would add up over a million of them.
            opened.members.clear()
            budget.take_member()
            path = _safe_path(member.name, folder)
            if not (member.isreg() or member.isdir()):
                raise _not_regular(member.name, "link" if member.issym() or member.islnk() else "device or a pipe")
            # Python before 3.10.12 has no filters; the checks above stand by themselves there.
            if hasattr(tarfile, "data_filter"):
                tarfile.data_filter(member, str(folder))
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
            else:
                _copy(opened.extractfile(member), path, budget)
    # tarfile takes a damaged header for the end. The true end is a block of zeros, and reading on checks the checksum.
    if stream.last != bytes(tarfile.BLOCKSIZE):
        raise EOFError("its end is missing")
    while stream.read(_CHUNK):
        pass


def _opened_tar(stream: _BoundedStream, head: bytes) -> tarfile.TarFile:
    try:
        return tarfile.open(fileobj=stream, mode="r:")
    except tarfile.ReadError as error:
        # tarfile wraps what zlib says about a damaged first block.
        if "zlib" in str(error):
            raise
        raise _no_archive(head) from error


class _BoundedZip:
    """A file for zipfile, which reads the whole directory at once, as large as the archive declares it."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.seek, self.tell, self.close = file.seek, file.tell, file.close
        self.seekable = file.seekable

    def read(self, size: int = -1) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise DataError("the archive declares a directory that is too large",
                            expected=f"at most {MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _plain(file: BinaryIO, head: bytes) -> BinaryIO:
    """Return the stream without its compression, which its first bytes tell."""
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(file)
    if head.startswith(b"\xfd7zXZ\0"):
        return lzma.open(file)
    if head.startswith(b"BZh"):
        return bz2.open(file)
    return file


def _safe_path(name: str, folder: Path) -> Path:
    """Return where a member goes, refusing names that lead out of the folder. Old Windows tools write backslashes."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match(r"[A-Za-z]:[\\/]", name) or ".." in parts or "\0" in name:
        raise DataError(f"{name!r} in the archive leads out of its folder", expected="relative names without ..",
                        mend="do not trust this archive")
    return folder.joinpath(*(part for part in parts if part not in ("", ".")))


def _copy(stream: BinaryIO, path: Path, budget: _Budget) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = b""
    with open(path, "xb") as file:
        while chunk := stream.read(_CHUNK):
            budget.take_bytes(len(chunk))
            head = head or chunk[:4]
            file.write(chunk)
    # By name too: a numpy .npz is a zip that no one wants unpacked.
    if path.suffix.lower() == ".zip" and head == b"PK\x03\x04":
        budget.zips.append(path)


def _no_archive(head: bytes) -> DataError:
    foreign = next((name for magic, name in _FOREIGN.items() if head.startswith(magic)), None)
    what = ("the file is empty" if not head else
            "the file is a web page (HTML)" if looks_like_html(head) else
            f"{foreign} archives are not read" if foreign else "the source is a single file and no archive")
    return DataError(what, expected="a folder, or a zip, tar, tar.gz, tar.bz2 or tar.xz archive",
                     mend="put the files into a folder and use `--source FOLDER`")


def _not_regular(name: str, what: str) -> DataError:
    return DataError(f"{name!r} in the archive is a {what}", expected="regular files and folders only",
                     mend="do not trust this archive, or pack the files themselves")


def _too_large(limit: int) -> DataError:
    return DataError(f"the archive unpacks to more than {limit:,} bytes",
                     expected=f"at most {MAX_RATIO} times its size, or {RATIO_FLOOR_BYTES:,} bytes",
                     mend="unpack it yourself and use `--source FOLDER` if you trust it")
