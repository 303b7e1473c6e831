"""What Horovod is built with: compilers, MPI, CUDA and NCCL, as found on this machine."""

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpcai_cli.engine.machine import cores, first_output, memory_bytes
from hpcai_cli.errors import MissingError

TENSORFLOW = "2.21"
"""The TensorFlow release for which the build is known to compile, as setup.cfg asks for it."""

MPI_PACKAGES = "apt-get install openmpi-bin libopenmpi-dev"

_NCCL_PACKAGE = "nvidia-nccl-cu12"
_BYTES_PER_JOB = 2 * 1024**3  # One compiler process over TensorFlow's headers takes up to this much.


@dataclass(frozen=True)
class Nccl:
    """An installed NCCL and the CUDA toolkit that compiles for it."""

    version: str
    cuda_home: Path
    include: Path
    library: Path
    """The shared library to link with."""
    from_pip: bool


@dataclass(frozen=True)
class Toolchain:
    """What a build will use."""

    tensorflow: str
    """Version."""
    mpi: str
    """Name and version as one word, `openmpi4.1.4`; empty when MPI is not built in."""
    why_mpi: str
    nccl: Nccl | None


def toolchain(*, with_mpi: bool | None, with_nccl: bool) -> Toolchain:
    """Find all that a build needs.

    Raises:
        MissingError: something is missing; names everything at once.
    """
    problems = list(_common_problems())
    has_mpi = bool(shutil.which("mpicxx"))
    if with_mpi and not has_mpi:
        problems.append(f"no MPI compiler mpicxx ({MPI_PACKAGES})")
    nccl = None
    if with_nccl:
        found = list(_nccl_problems())
        problems += found
        nccl = None if found else _nccl()
    if problems:
        raise MissingError(f"Horovod cannot be built here: {'; '.join(problems)}",
                           mend="install what is named in brackets, then `hpcai doctor --build-horovod`")
    if with_mpi is None:
        why = "mpicxx was found" if has_mpi else f"no mpicxx was found: {MPI_PACKAGES}"
    else:
        why = "as asked for"
    return Toolchain(tensorflow_version() or "", mpi_version() if has_mpi and with_mpi is not False else "", why, nccl)


def tensorflow_version() -> str | None:
    """Return the version of the installed TensorFlow, without importing it."""
    for name in ("tensorflow", "tensorflow-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def mpi_version() -> str:
    """Return name and version of the installed MPI as one word, such as `openmpi4.1.4`; empty where none is."""
    for command in (["mpirun", "--version"], ["mpicxx", "-show"]):
        if name := mpi_named(first_output(command)):
            return name
    return "mpi" if shutil.which("mpicxx") else ""


def mpi_named(text: str) -> str:
    """Return name and version of the MPI that a text is about, as one word; empty where it names none."""
    version = re.search(r"\d+(?:\.\d+)+", text)
    for mark, name in (("Open MPI", "openmpi"), ("openmpi", "openmpi"), ("Intel", "intelmpi"), ("HYDRA", "mpich"),
                       ("MPICH", "mpich"), ("mpich", "mpich")):
        if mark in text:
            return name + (version.group() if version else "")
    return ""


def nccl_version() -> str:
    """Return the version of the installed NCCL, empty where there is none."""
    if files := _nccl_files():
        text = (files[0] / "nccl.h").read_text(errors="replace")
        return ".".join(re.findall(r"#define\s+NCCL_(?:MAJOR|MINOR|PATCH)\s+(\d+)", text)[:3])
    try:
        # Without its header it still carries what TensorFlow sends.
        return metadata.version(_NCCL_PACKAGE)
    except metadata.PackageNotFoundError:
        return ""


def parallel_jobs() -> int:
    """Return how many compilers may run at once without running out of memory."""
    available = memory_bytes()[1]
    return max(1, min(cores(), available // _BYTES_PER_JOB if available else 2))


def _common_problems() -> Iterator[str]:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield f"Python {sys.version.split()[0]} (install Python 3.10 to 3.13)"
    compiler = os.environ.get("CXX", "").split()
    if not any(shutil.which(name) for name in (compiler[:1] or ["c++", "g++", "clang++"])):
        yield f"no C++ compiler{' ' + compiler[0] if compiler else ''} (apt-get install g++)"
    if not shutil.which("make"):
        yield "no make (apt-get install make)"
    if tensorflow_version() is None:
        yield f"no TensorFlow (pip install tensorflow=={TENSORFLOW}.0)"
    if importlib.util.find_spec("pip") is None:
        yield "no pip in this Python (python -m ensurepip)"


def _nccl_problems() -> Iterator[str]:
    if _cuda_home() is None:
        yield "no CUDA compiler nvcc (install the CUDA toolkit, or set HOROVOD_CUDA_HOME to its folder)"
    if _nccl_files() is None:
        yield f"no NCCL with header and library (pip install {_NCCL_PACKAGE}, or apt-get install libnccl-dev)"


def _nccl() -> Nccl:
    return Nccl(nccl_version(), _cuda_home(), *_nccl_files())


def _cuda_home() -> Path | None:
    on_path = shutil.which("nvcc")
    candidates = [os.environ.get("HOROVOD_CUDA_HOME"), os.environ.get("CUDA_HOME"), "/usr/local/cuda",
                  Path(on_path).resolve().parents[1] if on_path else None]
    return next((Path(home) for home in candidates if home and (Path(home) / "bin/nvcc").is_file()), None)


def _nccl_files() -> tuple[Path, Path, bool] | None:
    """Return the include folder, the library and whether pip installed them.

    `HOROVOD_NCCL_HOME` goes first, then the package that `tensorflow[and-cuda]` brings, whose library TensorFlow itself
    loads, then the system.
    """
    homes = [(os.environ.get("HOROVOD_NCCL_HOME"), False), (_nccl_package(), True), ("/usr", False)]
    for home, from_pip in homes:
        if not home or not (Path(home) / "include/nccl.h").is_file():
            continue
        # Debian keeps libraries in lib/x86_64-linux-gnu; pip ships libnccl.so.2 only.
        found = [path for folder in ("lib", "lib64") for pattern in ("libnccl.so", "*/libnccl.so", "libnccl.so.2")
                 for path in sorted((Path(home) / folder).glob(pattern))]
        if found:
            return Path(home) / "include", found[0], from_pip
    return None


def _nccl_package() -> Path | None:
    try:
        files = metadata.files(_NCCL_PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()).parents[1] for file in files if file.name == "nccl.h"), None)
