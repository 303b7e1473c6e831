"""Brings what the user named, a folder, an archive or an address, to a local folder of files."""

import difflib
import hashlib
import os
import re
import shlex
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpcai_cli.engine.raw.archives import unpack
from hpcai_cli.engine.raw.downloads import download_archive, download_files, stream_sha256, writing_below
from hpcai_cli.errors import DataError, UsageError
from hpcai_cli.recipe import Downloads


@contextmanager
def open_source(source: str, *, downloads: Downloads | None, cache: Path) -> Iterator[Path]:
    """Yield a folder with the files that `source` names; what had to be unpacked is removed afterwards.

    Args:
        source: a folder; an archive (zip, tar, tar.gz, tar.bz2, tar.xz, told by content); `download` for the recipe's
            mirrors (a folder of that name is `./download`); a CSV file; an http(s) address that ends in / for the
            recipe's files below it; an http(s) address of one archive or CSV file.
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
        folder = download_files(source, downloads, cache)
        names = [file.name for file in downloads.files]
        if len(names) != 1 or not names[0].endswith((".zip", ".tar.gz")):
            yield folder
            return
        source, scheme = str(folder / names[0]), None
    path = None if scheme else _existing_path(source)
    if path and path.is_dir():
        yield path
        return
    table = _table_name(source)
    with _temporary_folder(cache) as folder:
        if not path:
            download_archive(source, folder / (table or "archive"), cache)
        if table:
            # Alone in a folder, whatever lies beside it.
            if path:
                (folder / table).symlink_to(path.resolve())
            yield folder
            return
        with writing_below(cache):
            unpack(path or folder / "archive", folder / "files", named=source)
            (folder / "archive").unlink(missing_ok=True)
        yield folder / "files"


def _table_name(source: str) -> str:
    """Return the file name of a source that is a single table by its name, else nothing."""
    # In a path the two signs are letters like any other.
    name = (re.sub(r"[?#].*", "", source) if "://" in source else source).rpartition("/")[2]
    return name if re.search(r"\.(csv|tsv|txt|data)(\.gz)?$", name, re.I) else ""


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
                content = stream_sha256(file)
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
        raise _nothing_there(path, source) from None
    except OSError as error:
        raise DataError(f"cannot read the source ({error.strerror})", received=source) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise DataError("the source is a device, a pipe or a socket", expected="a folder or an archive",
                        received=source)
    return path


def _nothing_there(path: Path, source: str) -> DataError:
    """Name what is near a path that does not exist."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    name = path.relative_to(parent).parts[0]
    names = sorted(os.listdir(parent)) if os.access(parent, os.R_OK) else []
    # A bare word may be a misspelt one of the two that name no path.
    words = ["download", "sample"] if path.name == source else []
    close = difflib.get_close_matches(name, names + words, n=1, cutoff=0.5)
    mends = [f"`--source {found if found in words else shlex.quote(str(parent / found))}`" for found in close]
    return DataError(f"there is no {name} in {parent}", expected="a folder, an archive or an address", received=source,
                     mend=f"use {mends[0] if mends else '`--source download` or `--source sample`'}")


@contextmanager
def _temporary_folder(cache: Path) -> Iterator[Path]:
    """Yield a new folder that is removed afterwards, and remove those of processes that were killed."""
    # A process number says nothing on another machine or in another container, which may share the cache.
    numbering = Path("/proc/self/ns/pid")
    prefix = f"unpacked-{socket.gethostname()}-{numbering.stat().st_ino if numbering.exists() else 0}-"
    with writing_below(cache):
        cache.mkdir(parents=True, exist_ok=True)
        for leftover in cache.glob(f"{prefix}*"):
            if numbering.exists() and not Path("/proc", leftover.name.split("-")[-2]).exists():
                shutil.rmtree(leftover, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
