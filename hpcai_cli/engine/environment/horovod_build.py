"""Build Horovod for the TensorFlow that is installed, keep the wheel, install it."""

import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpcai_cli import console
from hpcai_cli.cache import cache_folder
from hpcai_cli.engine.environment.horovod_wheel import RECORD, VERSION, build_wheel, patches, pip, run_step, sha256
from hpcai_cli.engine.environment.toolchain import TENSORFLOW, Toolchain, toolchain
from hpcai_cli.errors import HpcaiError, MissingError

_RUN_TIME_NEEDS = {"cloudpickle": "cloudpickle", "psutil": "psutil", "yaml": "pyyaml", "packaging": "packaging"}


@dataclass(frozen=True)
class BuildResult:
    """What came of a build."""

    action: str
    """`installed already`, `installed from the cache` or `built and installed`."""
    version: str
    mpi: str
    """The MPI that is built in, as one word; empty without."""
    nccl: str
    """The NCCL version that is built in; empty without."""
    wheel: Path
    seconds: float


def build(*, with_mpi: bool | None, with_nccl: bool) -> BuildResult:
    """Build and install Horovod, or install the wheel of an earlier build, or do nothing where it is in place.

    Args:
        with_mpi: None builds MPI in where its compiler is found.

    Raises:
        MissingError: the machine lacks something, the source cannot be fetched, or the build fails.
    """
    started = time.monotonic()
    tools = toolchain(with_mpi=with_mpi, with_nccl=with_nccl)
    _tell(tools)
    folder = cache_folder() / "horovod" / _key(tools)
    with _termination_raises(), _lock(folder):
        wheel = _cached_wheel(folder)
        if wheel and _installed_checksum() == sha256(wheel) and import_failure() == "":
            action = "installed already"
        else:
            action = "installed from the cache" if wheel else "built and installed"
            wheel = wheel or build_wheel(tools, folder)
            _install(wheel, folder / "install.log")
    seconds = time.monotonic() - started
    console.note(f"Horovod {VERSION}: {action} ({seconds:.0f} s)")
    return BuildResult(action, VERSION, tools.mpi, tools.nccl.version if tools.nccl else "", wheel, seconds)


def import_failure() -> str:
    """Return why Horovod cannot be imported by a fresh Python, empty when it can."""
    code = ("try:\n    import horovod.tensorflow\n"
            "except BaseException as error:\n    raise SystemExit(f'{type(error).__name__}: {error}')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace",
                          env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}, check=False)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "Error: " in line]
    return lines[-1] if lines else f"exit code {done.returncode}"


def _tell(tools: Toolchain) -> None:
    console.note(f"Horovod {VERSION} for TensorFlow {tools.tensorflow}: Gloo; "
                 f"{tools.mpi or 'no MPI'} ({tools.why_mpi}); "
                 f"{f'NCCL {tools.nccl.version} (--with-nccl)' if tools.nccl else 'no NCCL (--with-nccl adds it)'}")
    if not tools.tensorflow.startswith(f"{TENSORFLOW}."):
        console.note(f"warning: the build was tried with TensorFlow {TENSORFLOW}; {tools.tensorflow} may not compile")


def _key(tools: Toolchain) -> str:
    """Name all that a wheel depends on; a home folder may be shared by machines of several kinds."""
    changes = hashlib.sha256(repr(patches(tools)).encode()).hexdigest()[:6]
    key = "-".join(part for part in (
        VERSION, changes, f"tensorflow{tools.tensorflow}", sysconfig.get_config_var("SOABI"),
        "".join(platform.libc_ver()), tools.mpi or "nompi", f"nccl{tools.nccl.version}" if tools.nccl else "") if part)
    return re.sub(r"[^\w.-]", "_", key)


def _install(wheel: Path, log: Path) -> None:
    log.unlink(missing_ok=True)
    happened = f"{wheel.name} could not be installed"
    run_step([*pip("install"), "--no-deps", "--no-index", "--force-reinstall", str(wheel)], log=log,
             description="installing Horovod", happened=happened, mend="give pip an environment that it may write to")
    importlib.invalidate_caches()
    missing = [package for module, package in _RUN_TIME_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        run_step([*pip("install"), *missing], log=log, description="installing what Horovod needs",
             happened=f"what Horovod needs could not be installed: {', '.join(missing)}",
             mend=f"`pip install {' '.join(missing)}` shows why")
    failure = import_failure()
    if failure:
        # Otherwise the next call would take the same wheel again.
        (wheel.parent / RECORD).unlink()
        raise MissingError("Horovod was installed and cannot be imported", received=failure,
                           mend="mend what the message names and run the command again, which then builds anew")


def _cached_wheel(folder: Path) -> Path | None:
    """Return the wheel whose checksum is the recorded one."""
    try:
        record = json.loads((folder / RECORD).read_text())
        wheel = folder / Path(record["wheel"]).name
        return wheel if sha256(wheel) == record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _installed_checksum() -> str:
    """Return the checksum of the wheel that Horovod was installed from; pip records it as PEP 610 says."""
    try:
        text = metadata.distribution("horovod").read_text("direct_url.json")
        archive = json.loads(text or "{}").get("archive_info", {})
    except (metadata.PackageNotFoundError, ValueError):
        return ""
    return archive.get("hashes", {}).get("sha256", "") or archive.get("hash", "").removeprefix("sha256=")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one build of a kind run at a time, and clear what a killed one left behind."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / "lock", "w")  # noqa: SIM115 - it stays open as long as the lock is held
    except OSError as error:
        raise MissingError(f"the cache folder cannot be written ({error.strerror})",
                           mend="set HPCAI_CACHE to a folder of your own", received=str(folder)) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.note("another build of the same Horovod is under way; waiting for it")
            fcntl.flock(stream, fcntl.LOCK_EX)
        for leftover in folder.glob("building-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that the compilers end and the temporary folder goes, as with Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        with suppress(TypeError):  # None: the handler was not set from Python
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    # What `make horovod` needs, without the examination that `hpcai doctor --build-horovod` goes on with.
    try:
        build(with_mpi=None, with_nccl=False)
    except HpcaiError as failure:
        sys.exit(f"error: {failure}")
