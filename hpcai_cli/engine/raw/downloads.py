"""Fetches files over HTTP: resumed after a break, checked, never half in place."""

import fcntl
import gzip
import hashlib
import http.client
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from hpcai_cli import console
from hpcai_cli.engine.raw.idx import looks_like_html
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.recipe import Downloads

MAX_ARCHIVE_BYTES = 64 * 2**30
"""Largest archive that is fetched from an address."""

TIMEOUT_SECONDS = 30.0
"""Silence on a connection after which it counts as broken."""

ATTEMPTS = 4
PAUSE_SECONDS = 1.0
"""Pause after the first failed attempt; each further pause is twice as long."""

_CHUNK = 2**20
_TRANSIENT_CODES = {408, 416, 425, 429, 500, 502, 503, 504}


class _Unfetched(Exception):
    """An address does not give the file; the text is the short reason."""


class _Interrupted(_Unfetched):
    """It may give the file, or the rest of it, a little later."""


def download_files(source: str, downloads: Downloads | None, cache: Path) -> Path:
    """Bring all files of a recipe into a folder of the cache, each from the first mirror that gives it.

    Args:
        source: `download` for the recipe's own mirrors, else the address of one mirror.

    Raises:
        UsageError: the recipe has no files.
        MissingError: no mirror gives a file, or the cache cannot be written.
    """
    if not downloads or not downloads.files or source == "download" and not downloads.mirrors:
        raise UsageError("this recipe has no files to download", expected="a recipe with `downloads`",
                         mend="use `--source FOLDER`, `--source ARCHIVE` or `--source sample`", received=source)
    mirrors = list(downloads.mirrors) if source == "download" else [source]
    # The key holds the checksums: another version of a recipe's data gets a folder of its own.
    with _cache_entry(cache, "\n".join(f"{file.name} {file.sha256}" for file in downloads.files)) as folder:
        folder.mkdir(exist_ok=True)
        for file in downloads.files:
            reasons = []
            for mirror in tuple(mirrors):
                try:
                    _fetch(f"{mirror.rstrip('/')}/{urllib.parse.quote(file.name)}", folder / file.name,
                           sha256=file.sha256.lower(), limit=file.bytes)
                    break
                except _Unfetched as error:
                    reasons.append(f"{mirror.split('://')[-1].rstrip('/')} ({error})")
                    # The next file starts with a mirror that works: a dead one costs its time-outs once.
                    mirrors.append(mirrors.pop(0))
            else:
                wanted = ", ".join(known.name for known in downloads.files)
                raise MissingError(f"no mirror gives {file.name}: {', '.join(reasons)}",
                                   mend=f"use `--source FOLDER` with the files {wanted}, or `--source sample`")
    return folder


def download_archive(url: str, target: Path, cache: Path, *, what: str = "the archive",
                     mend: str = "fetch it yourself and use `--source FILE`") -> None:
    """Fetch one archive; what a broken download leaves stays in the cache, to be resumed.

    Args:
        what: what the file is to the user, for messages.
        mend: what helps where it cannot be fetched.

    Raises:
        MissingError: the address does not give it, or the cache or the target cannot be written.
    """
    try:
        with _cache_entry(cache, url) as shared:
            _fetch(url, shared, sha256="", limit=MAX_ARCHIVE_BYTES)
            # It has no checksum, so the next call must not take it for what the address gives by then.
            os.replace(shared, target)
    except _Unfetched as error:
        raise MissingError(f"cannot fetch {what}: {error}", mend=mend, received=url) from error


def stream_sha256(stream: BinaryIO) -> str:
    """Return the SHA-256 of what is left in a stream, in hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """Turn a full disk or a folder without permission into a MissingError."""
    try:
        yield
    except OSError as error:
        raise MissingError(f"cannot write below {folder} ({error.strerror or error})",
                           expected="a cache folder with free space", received=str(error.filename or folder)) from error


@contextmanager
def _cache_entry(cache: Path, key: str) -> Iterator[Path]:
    """Yield a path that this process alone writes to: jobs that share a cache start together."""
    path = cache / "downloads" / hashlib.sha256(key.encode()).hexdigest()[:16]
    with writing_below(cache):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                console.note("waiting for another process that downloads the same files")
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                console.note(f"{path.parent} has no file locks: start one download at a time")
            yield path


# ---- One file ------------------------------------------------------------------------------------------------------

def _fetch(url: str, target: Path, *, sha256: str, limit: int) -> None:
    """Fetch one file, resuming what an earlier call left, verify it, and only then put it in its place.

    The checksum is of the content, of the unpacked one where a single file is packed (.gz, but not .tar.gz); a target
    that has it is not fetched again. Empty takes whatever comes. The limit is in bytes.
    """
    part = target.with_name(f"{target.name}.part")
    if sha256 and target.is_file() and _has_checksum(target, sha256, target.name):
        return
    _receive_patiently(url, part, limit=limit, checked=bool(sha256))
    if sha256 and not _has_checksum(part, sha256, target.name):
        _discard(part)
        raise _Unfetched(f"its file is broken or another one: its checksum is not {sha256[:12]}...")
    os.replace(part, target)
    _discard(part)


def _has_checksum(path: Path, sha256: str, name: str) -> bool:
    packed = name.endswith(".gz") and not name.endswith(".tar.gz")
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            return stream_sha256(file) == sha256
    except (EOFError, gzip.BadGzipFile, zlib.error):
        return False


def _receive_patiently(url: str, part: Path, *, limit: int, checked: bool) -> None:
    """Receive the file with a few attempts."""
    failures = 0
    while True:
        before = _size(part)
        try:
            return _receive(url, part, limit=limit, checked=checked)
        except _Interrupted as error:
            # A line that breaks every now and then is no reason to give up a large file, one that stands still is.
            failures = 1 if _size(part) - before >= _CHUNK else failures + 1
            if failures >= ATTEMPTS:
                raise
            pause = PAUSE_SECONDS * 2 ** (failures - 1)
            console.note(f"{url}: {error}; trying again in {pause:.0f} s")
            time.sleep(pause)
        except _Unfetched:
            _discard(part)
            raise


def _receive(url: str, part: Path, *, limit: int, checked: bool) -> None:
    """Receive the file, or the rest of it, in one attempt."""
    record = _record(part)
    known_url, _, version = record.read_text(errors="replace").partition("\n") if record.exists() else ("", "", "")
    # Without ETag and date only the checksum can tell two versions apart; without that too, start again.
    offset = _size(part) if known_url == url and (version or checked) else 0
    with _request(url, offset, version, part) as response:
        offset, total = _position(response, offset, version, part)
        console.note(f"downloading {url}" + (f" from byte {offset:,} on" if offset else ""))
        with (open(part, "ab" if offset else "wb") as file,
              console.progress(f"downloading {part.stem}", total=total, unit="bytes", done=offset) as shown):
            record.write_text(f"{url}\n{_version(response) or (version if offset else '')}")
            size = offset
            while chunk := _read(response):
                size += len(chunk)
                if max(size, total or 0) > limit:
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


def _record(part: Path) -> Path:
    """Return the file that tells from which address and version a partial file is."""
    return part.with_name(f"{part.name}.from")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _record(part).unlink(missing_ok=True)


# ---- One answer ----------------------------------------------------------------------------------------------------

def _request(url: str, offset: int, version: str, part: Path) -> http.client.HTTPResponse:
    headers = {"User-Agent": "hpcai", "Accept-Encoding": "identity"}
    if offset:
        headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": version} if version else {})
    try:
        quoted = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
        return urllib.request.urlopen(urllib.request.Request(quoted, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # there is nothing behind what was received: the file has changed
            _discard(part)
        kind = _Interrupted if error.code in _TRANSIENT_CODES else _Unfetched
        raise kind(f"{error.code} {error.reason}".strip()) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise _Unfetched(f"no valid address: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        # urllib wraps what happens before the request is out, and nothing after that.
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        lasting = isinstance(cause, (socket.gaierror, ssl.SSLCertVerificationError))
        raise (_Unfetched if lasting else _Interrupted)(_reason(cause)) from error


def _position(response, offset: int, version: str, part: Path) -> tuple[int, int | None]:
    """Return where the answer's first byte belongs and the size of the whole file, None where it is not told."""
    if response.status == 206:
        told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", "").strip())
        same_version = not version or _version(response) in ("", version)
        if offset and told and int(told[1]) == offset and same_version:
            return offset, int(told[2])
        _discard(part)
        raise _Interrupted("it sends another part or version of its file than was asked for")
    if response.status != 200:
        raise _Unfetched(f"it answers with status {response.status}")
    length = response.headers.get("Content-Length", "").strip()
    # The answer is the whole file, also where a part was asked for.
    return 0, int(length) if length.isdecimal() else None


def _version(response) -> str:
    """Return the strong ETag or the date: If-Range takes no weak ETag (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _read(response) -> bytes:
    """Read what has arrived. Failures of the network stay apart from those of the disk, which no retry mends."""
    try:
        return response.read1(_CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error


def _reason(error: object) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT_SECONDS:.0f} s"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
