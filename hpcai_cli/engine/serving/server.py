"""Serves exported models over HTTP: `python -m hpcai_cli.engine.serving.server FOLDER...`."""

import argparse
import fcntl
import math
import os
import resource
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hpcai_cli.engine.serving.settings import Settings, token_of
from hpcai_cli.errors import HpcaiError, MissingError, UsageError

PACKAGES = ("httptools", "numpy", "orjson", "PIL", "prometheus_client", "python_multipart", "uvicorn", "uvloop")
"""What a server of any kind of model imports."""
_BACKLOG = 2048
_FILES = 8192
"""Descriptors of a process: connections, mostly."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code; SIGHUP loads what has changed on disk."""
    try:
        return serve(settings_of(argv))
    except HpcaiError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def serve(settings: Settings) -> int:
    """Serve until a signal ends it, and return the exit code.

    Raises:
        HpcaiError: a model, the port, a certificate or a folder cannot be used.
    """
    _check_packages()
    with _listening(settings) as listener:
        # Threads of numpy's library would not survive the fork, and a server of small models has no use for them.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        # After the port, since this takes a moment.
        from hpcai_cli.engine.serving.model_folders import named
        from hpcai_cli.engine.serving.supervisor import Supervisor

        _allow_files()
        _check_files(settings)
        folders = named(settings.models)
        with _state(settings.state) as state:
            for path in state.glob("metrics-*.bin"):
                path.unlink()
            return Supervisor(settings, folders, listener, state).run()


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise MissingError("the server needs packages of its own", expected=", ".join(PACKAGES),
                           mend="run `pip install 'hpcai[serve]'`, or for a bundle `pip install -r requirements.txt`",
                           received=f"no {', '.join(missing)}")


def settings_of(argv: Sequence[str] | None) -> Settings:
    """Return the settings of a command line; argparse ends the process with code 2 for a wrong one.

    Raises:
        UsageError: the token's file cannot be used.
    """
    given = vars(_parser().parse_args(argv))
    token_file, delay = given.pop("token_file"), given.pop("max_delay_ms")
    return Settings(**{**given, "models": tuple(given["models"]), "max_delay": delay / 1000,
                       "token": token_of(token_file) if token_file else ""})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hpcai-serve", description=__doc__.partition(":")[0] + ".")
    add, default = parser.add_argument, Settings(())
    add("models", nargs="+", metavar="FOLDER", help="export, or folder of its versions 1, 2, ...; or NAME=FOLDER")
    add("--host", default=default.host, help="address to listen on (%(default)s)")
    add("--port", type=_whole(0, 65535), default=default.port, help="0 takes a free one (%(default)s)")
    add("--workers", type=_whole(1, 256), default=default.workers, help="processes that answer (%(default)s)")
    add("--threads", type=_whole(0, 1024), default=default.threads,
        help="of a model in each worker; 0 shares the cores out (%(default)s)")
    add("--max-batch", type=_whole(1, 4096), default=default.max_batch,
        help="examples that a model gets at once, at most (%(default)s)")
    add("--max-delay-ms", type=_number(0, 10_000), default=0.0, help="for which a free model waits for more (0)")
    add("--timeout", type=_number(0.1, 3600), default=default.timeout,
        help="seconds in which a request must have come, and then be answered (%(default)s)")
    add("--body-limit", type=_whole(1024, 1 << 30), default=default.body_limit, help="bytes of a body (%(default)s)")
    add("--token-file", default="", help="file with what requests must bear")
    add("--tls-cert", default="", help="certificates as PEM, for HTTPS")
    add("--tls-key", default="", help="their private key")
    add("--log-file", default="", help="where a line per request goes (stderr)")
    add("--state", default="", help="folder for metrics and statistics (a temporary one)")
    add("--trust-model", dest="trust", action="store_true",
        help="open model files without the checks against what runs code")
    return parser


def _whole(least: int, most: int):
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most}, received: {text}")
        return value
    return read


def _number(least: float, most: float):
    def read(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise argparse.ArgumentTypeError(f"expected {least:g} to {most:g}, received: {text}")
        return value
    return read


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind the port first of all: that it is taken is told before anything is loaded."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise UsageError(f"the address is none of this machine: {error.strerror}", received=settings.host) from None
    family, kind, protocol, _, address = found[0]
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError as error:
            raise MissingError(f"cannot listen on {settings.host}, port {settings.port}: {error.strerror}",
                               mend="choose another one with --port, or 0 for any that is free") from None
        listener.setblocking(False)
        yield listener


def _check_files(settings: Settings) -> None:
    """Find out before the start what else every worker would fail with."""
    if settings.tls_cert or settings.tls_key:
        import ssl

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key or None)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot use the certificate or its key: {error}", expected="PEM files that belong to "
                             "each other", received=f"{settings.tls_cert} {settings.tls_key}") from None
    if settings.log_file:
        try:
            open(settings.log_file, "ab").close()
        except OSError as error:
            raise UsageError(f"cannot write the log: {error.strerror}", received=settings.log_file) from None


def _allow_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _state(folder: str) -> Iterator[Path]:
    """Give the folder for metrics and statistics, which belongs to one server at a time."""
    if not folder:
        with tempfile.TemporaryDirectory(prefix="hpcai-serve-") as made:
            yield Path(made)
        return
    path = Path(folder).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise UsageError(f"cannot use the folder for metrics and statistics: {error.strerror}",
                         received=folder) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError("another server uses the folder for metrics and statistics",
                             mend="give another one with --state", received=folder) from None
        yield path


if __name__ == "__main__":
    sys.exit(main())
