"""Make a Horovod wheel: fetch the published source, leave out what no longer compiles, compile the rest."""

import hashlib
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hpcai_cli import console
from hpcai_cli.engine.environment.long_process import first_error, run_logged
from hpcai_cli.engine.environment.toolchain import Toolchain, parallel_jobs
from hpcai_cli.errors import MissingError

VERSION = "0.28.1"
SDIST = f"horovod-{VERSION}.tar.gz"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

RECORD = "wheel.json"
"""File beside a finished wheel that holds its name and checksum."""

# Each is a file, a text that stands on exactly one line of it, and what to put in that line's place.
# xla_mpi_ops.cc wants headers that TensorFlow has not shipped since 2.19; its operations serve HOROVOD_ENABLE_XLA_OPS=1
# only. https://github.com/horovod/horovod/pull/4302
_PATCHES = (
    ("horovod/tensorflow/CMakeLists.txt", "xla_mpi_ops.cc", ""),
    # Ranks of an elastic job that do not find each other end the whole process (std::terminate), and with it what they
    # keep in memory, when one that comes is slow or dies as it starts. So init() fails instead, which it can, and may
    # be called again.
    ("horovod/common/operations.cc", "global_gloo_context.Initialize(ParseGlooIface());",
     "    try {\n"
     "      global_gloo_context.Initialize(ParseGlooIface());\n"
     "    } catch (const std::exception& failure) {\n"
     '      setenv("HPCAI_HOROVOD_FAILURE", failure.what(), 1);\n'
     "      global_gloo_context.Finalize();\n"
     "      state.initialization_failed = true;\n"
     "      return;\n"
     "    }\n"),
    ("horovod/common/operations.cc", "horovod_global.initialize_flag.clear();",
     "    horovod_global.initialize_flag.clear();\n"
     "    horovod_global.initialization_failed = false;\n"),
)

# TensorFlow 2.21 no longer exports the function that Horovod declares here; a stream's own handle is what it returned.
_GPU_PATCHES = (
    ("horovod/tensorflow/mpi_ops.cc", "// Forward declaration of AsGpuStreamValue",
     '#include "tensorflow/compiler/xla/stream_executor/stream.h"\n'),
    ("horovod/tensorflow/mpi_ops.cc", "GpuStreamHandle AsGpuStreamValue(Stream* stream);",
     "inline GpuStreamHandle AsGpuStreamValue(Stream* stream) {\n"
     "  return static_cast<GpuStreamHandle>(stream->platform_specific_handle().stream);\n}\n"),
)

# Horovod's setup.py is of the time before setuptools 81, and gloo's minimum version of CMake before CMake 4.
_BUILD_TOOLS = ("setuptools<81", "wheel", "packaging", "cmake==3.31.6")


def build_wheel(tools: Toolchain, folder: Path) -> Path:
    """Fetch, patch and compile in a temporary folder, then move the finished wheel and its record into `folder`.

    Args:
        folder: the kind's own; the source archive is kept in its parent, for all kinds.

    Raises:
        MissingError: the network is not there, the source is not the published one, or it does not compile.
    """
    log, sdist = folder / "build.log", folder.parent / SDIST
    log.unlink(missing_ok=True)
    # Horovod's CMake files match this path as a pattern; with a `+` in it, the library lands elsewhere in the wheel.
    if re.search(r"[^\w./-]", str(folder)):
        raise MissingError("Horovod's build does not work in a folder with such a name",
                           expected="letters, digits, `.`, `_` and `-`", mend="set HPCAI_CACHE to another folder",
                           received=str(folder))
    if sdist.exists():
        _verify(sdist)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder) as temporary:
        workshop = Path(temporary)
        run_step([*pip("install"), "--target", str(workshop / "tools"), *_BUILD_TOOLS], log=log,
                 description="fetching the build tools", happened="the build tools could not be fetched",
                 mend="where there is no network, set PIP_FIND_LINKS to a folder with what `pip download "
                      f"{' '.join(map(repr, _BUILD_TOOLS))}` fetches elsewhere")
        environ = build_environment(tools, workshop)
        if not sdist.exists():
            _fetch(sdist, workshop, environ=environ, log=log)
        source = _unpack(sdist, workshop)
        patch(source, patches(tools))
        jobs = parallel_jobs()
        console.note(f"compiling with {jobs} job{'s' * (jobs > 1)} at a time, a few minutes; log: {log}")
        run_step([sys.executable, "setup.py", "bdist_wheel", "-d", str(workshop / "dist")], log=log, folder=source,
                 environ={**environ, "MAKEFLAGS": f"-j{jobs}"}, description="building Horovod",
                 happened="Horovod did not compile", mend="mend what the log names and run the command again")
        (built,) = (workshop / "dist").glob("*.whl")
        record = workshop / RECORD
        record.write_text(json.dumps({"wheel": built.name, "sha256": sha256(built)}))
        # The record goes last: a wheel without one is not trusted.
        os.replace(built, folder / built.name)
        os.replace(record, folder / RECORD)
    return folder / built.name


def build_environment(tools: Toolchain, workshop: Path) -> dict[str, str]:
    """Return the variables of the build; a HOROVOD_* of the user's shell must not change what is built."""
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith("HOROVOD_") or name.startswith("HOROVOD_BUILD_")}
    modules = [str(workshop / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    programs = [str(Path(sys.executable).parent), str(workshop / "tools/bin"), os.environ.get("PATH", os.defpath)]
    environ |= {"PYTHONPATH": os.pathsep.join(modules), "PATH": os.pathsep.join(programs), "TF_CPP_MIN_LOG_LEVEL": "3",
                "HOROVOD_WITH_TENSORFLOW": "1", "HOROVOD_WITHOUT_PYTORCH": "1", "HOROVOD_WITHOUT_MXNET": "1",
                "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_MPI" if tools.mpi else "HOROVOD_WITHOUT_MPI": "1"}
    if tools.nccl:
        # Horovod looks for libnccl.so; pip installs libnccl.so.2 alone. So a folder with the names that it looks for.
        home = workshop / "nccl"
        (home / "lib").mkdir(parents=True)
        (home / "include").symlink_to(tools.nccl.include)
        (home / "lib/libnccl.so").symlink_to(tools.nccl.library)
        environ |= {"HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_HOME": str(home), "HOROVOD_NCCL_LINK": "SHARED",
                    "HOROVOD_CUDA_HOME": str(tools.nccl.cuda_home)}
        # From horovod/tensorflow/ to the library of the pip package beside it, in whatever environment that is.
        place = "$ORIGIN/../../nvidia/nccl/lib" if tools.nccl.from_pip else str(tools.nccl.library.parent)
        environ["LDFLAGS"] = f"{os.environ.get('LDFLAGS', '')} -Wl,-rpath,{place}".strip()
    return environ


def patches(tools: Toolchain) -> tuple[tuple[str, str, str], ...]:
    """Return what is changed in the published source: file, text of the line, the line's replacement."""
    return _PATCHES + _GPU_PATCHES if tools.nccl else _PATCHES


def patch(source: Path, changes: tuple[tuple[str, str, str], ...]) -> None:
    """Replace the named lines.

    Raises:
        MissingError: a line isn't there exactly once.
    """
    for name, text, replacement in changes:
        lines = (source / name).read_text().splitlines(keepends=True)
        places = [number for number, line in enumerate(lines) if text in line]
        if len(places) != 1:
            raise MissingError("Horovod's source cannot be patched", expected=f"one line with `{text}` in {name}",
                               mend=f"use the published source of Horovod {VERSION}", received=f"{len(places)} lines")
        lines[places[0]] = replacement
        (source / name).write_text("".join(lines))


def pip(verb: str) -> list[str]:
    """Return the beginning of a pip command for this Python."""
    return [sys.executable, "-m", "pip", verb, "--disable-pip-version-check", "--no-input"]


def run_step(command: list[str], *, log: Path, description: str, happened: str, mend: str,
             environ: Mapping[str, str] | None = None, folder: Path | None = None) -> None:
    """Run one step with its output in the log; a MissingError quotes the log's first error and ends in its path."""
    code = run_logged(command, log=log, description=description, environ=environ, folder=folder)
    if code != 0:
        raise MissingError(f"{happened} (exit code {code})", mend=f"{mend}; the log says: {first_error(log)}; {log}")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(sdist: Path, workshop: Path, *, environ: Mapping[str, str], log: Path) -> None:
    wanted = workshop / "wanted.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    # pip runs a source's setup.py to learn its name and version: with a hash required, it verifies before it runs.
    run_step([*pip("download"), "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "--require-hashes",
              "-r", str(wanted), "-d", str(workshop)], log=log, environ=environ,
             description="fetching Horovod's source", happened="Horovod's source could not be fetched",
             mend=f"where there is no network, fetch {SDIST} elsewhere (`pip download --no-deps --no-binary=:all: "
                  f"horovod=={VERSION}`) and put it into {sdist.parent}")
    os.replace(workshop / SDIST, sdist)
    _verify(sdist)


def _verify(sdist: Path) -> None:
    checksum = sha256(sdist)
    if checksum != SDIST_SHA256:
        raise MissingError(f"{sdist} is not the published source of Horovod {VERSION}",
                           expected=f"sha256 {SDIST_SHA256}", mend=f"`rm {sdist}` and run the command again",
                           received=checksum)


def _unpack(sdist: Path, workshop: Path) -> Path:
    with tarfile.open(sdist) as archive:
        # Python 3.10 and 3.11 know the filter from 3.10.12 and 3.11.4 on; the checksum was verified anyway.
        archive.extractall(workshop, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return workshop / SDIST.removesuffix(".tar.gz")
