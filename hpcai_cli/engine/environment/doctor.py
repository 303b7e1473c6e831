"""What is installed on this machine, what works, and the line that mends what does not."""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

from hpcai_cli import console, launch
from hpcai_cli.cache import cache_folder
from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.engine.environment.toolchain import MPI_PACKAGES, TENSORFLOW, mpi_version
from hpcai_cli.engine.machine import cores, gpus, instruction_sets, memory_bytes

REBUILD = "hpcai doctor --build-horovod"

_TIMEOUT_SECONDS = 180

# Each line is printed before the next import is tried: when one kills the process (an illegal instruction on an old
# processor), the lines so far tell which.
_PROBE = """
import json
def look(name, function):
    try:
        found = {"value": function()}
    except BaseException as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    print(json.dumps({"name": name, **found}), flush=True)
def hdf5():
    import h5py
    return h5py.version.hdf5_version
def tensorflow():
    import tensorflow
    return tensorflow.__version__
def keras():
    import keras
    return keras.backend.backend()
def horovod():
    import horovod.tensorflow as hvd
    return {"Gloo": hvd.gloo_built(), "MPI": hvd.mpi_built(), "NCCL": bool(hvd.nccl_built())}
for function in (hdf5, tensorflow, keras, horovod):
    look(function.__name__, function)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: str
    """`ok`, `warning` (works, but not as well as it could) or `missing` (absent or broken)."""
    value: str
    mend: str = ""
    """The command that mends it; empty when there is nothing to mend."""
    metric: tuple[str, float] | None = None
    """Name and number for scripts, where the value is a number."""
    required: bool = False
    """Without it a training run cannot work here."""


def examine() -> list[Finding]:
    """Look at everything that a job needs; nothing is imported into this process, so that a broken part shows."""
    console.note("importing TensorFlow and Horovod in a process of their own ...")
    probe = _probe()
    horovod = _horovod(probe)
    findings = [_python(), _tensorflow(probe), _keras(probe), _h5py(probe), horovod, _mpi(probe)]
    if _version("horovod"):
        findings += _allreduces(probe)
    return [*findings, *_machine(), _cache()]


def _probe() -> dict[str, dict]:
    code, output, errors = _run([sys.executable, "-c", _PROBE], seconds=_TIMEOUT_SECONDS)
    found = {entry["name"]: entry for entry in map(_json_line, output.splitlines()) if entry}
    why = _ending(code, errors)
    for name in ("hdf5", "tensorflow", "keras", "horovod"):
        if name not in found:
            found[name], why = {"error": f"the import ended the process: {why}"}, "an import before it did"
    return found


def _python() -> Finding:
    supported = (3, 10) <= sys.version_info[:2] <= (3, 13)
    return Finding("Python", "ok" if supported else "warning", platform.python_version(),
                   "" if supported else "install Python 3.10 to 3.13")


def _tensorflow(probe: dict) -> Finding:
    version, mend = _version("tensorflow") or _version("tensorflow-cpu"), f"pip install tensorflow=={TENSORFLOW}.0"
    if "error" in probe["tensorflow"]:
        return _broken("TensorFlow", version, probe["tensorflow"]["error"], mend, required=True)
    version = version or probe["tensorflow"]["value"]
    known = version.startswith(f"{TENSORFLOW}.")
    return Finding("TensorFlow", "ok" if known else "warning", version, "" if known else mend, required=True)


def _keras(probe: dict) -> Finding:
    version = _version("keras")
    if "error" in probe["keras"]:
        return _broken("Keras", version, probe["keras"]["error"], "pip install 'keras>=3.15,<3.16'", required=True)
    backend = probe["keras"]["value"]
    if backend != "tensorflow":
        return Finding("Keras", "missing", f"{version} on {backend}", "export KERAS_BACKEND=tensorflow", required=True)
    return Finding("Keras", "ok", f"{version} on TensorFlow", required=True)


def _h5py(probe: dict) -> Finding:
    version = _version("h5py")
    if "error" in probe["hdf5"]:
        return _broken("h5py", version, probe["hdf5"]["error"], "pip install 'h5py<3.15'", required=True)
    return Finding("h5py", "ok", f"{version} with HDF5 {probe['hdf5']['value']}", required=True)


def _horovod(probe: dict) -> Finding:
    version = _version("horovod")
    if not version:
        return Finding("Horovod", "missing", "not installed; one process works without it", REBUILD)
    if "error" in probe["horovod"]:
        return _broken("Horovod", version, probe["horovod"]["error"], REBUILD, required=True)
    built = [name for name, is_built in probe["horovod"]["value"].items() if is_built]
    value = f"{version} with {', '.join(built)}"
    if gpus() and "NCCL" not in built:
        return Finding("Horovod", "warning", f"{value}; GPUs without NCCL", f"{REBUILD} --with-nccl", required=True)
    return Finding("Horovod", "ok", value, required=True)


def _mpi(probe: dict) -> Finding:
    version = mpi_version()
    if not version:
        return Finding("MPI", "missing", "not installed; Gloo works without it", MPI_PACKAGES)
    if not probe["horovod"].get("value", {}).get("MPI", True):
        return Finding("MPI", "warning", f"{version}; not built into Horovod", f"{REBUILD} --with-mpi")
    return Finding("MPI", "ok", version)


def _allreduces(probe: dict) -> list[Finding]:
    if "error" in probe["horovod"]:
        return [Finding("allreduce", "missing", "not tried: Horovod cannot be imported", REBUILD, required=True)]
    built = probe["horovod"]["value"]
    commands = {}
    if built["Gloo"]:
        commands["gloo"] = [sys.executable, "-m", "horovod.runner.launch", "--gloo", "--disable-cache", "-np", "2"]
    if built["MPI"]:
        commands["mpi"] = ["mpirun", *_mpirun_options(), "-np", "2"]
    return [_allreduce(transport, command) for transport, command in commands.items()]


def _allreduce(transport: str, command: Sequence[str]) -> Finding:
    """Run the check in two processes and read rank 0's line."""
    console.note(f"running an allreduce between two processes over {transport} ...")
    code, output, errors = _run([*command, sys.executable, "-m", "hpcai_cli.engine.environment.allreduce_check"],
                                seconds=_TIMEOUT_SECONDS)
    results = [entry for entry in map(_json_line, output.splitlines()) if entry]
    if code == 0 and results:
        seconds = results[0]["seconds"]
        return Finding(f"allreduce, {transport}", "ok", f"2 processes, 1 MB in {1000 * seconds:.1f} ms",
                       metric=(f"allreduce_seconds_{transport}", seconds), required=True)
    # horovodrun reports a rank's failure among its own lines; the rank's words say more.
    ranks = [line for line in (output + errors).splitlines() if "error: " in line]
    return Finding(f"allreduce, {transport}", "missing", f"fails: {ranks[0] if ranks else _ending(code, errors)}",
                   f"{REBUILD}{' --with-mpi' if transport == 'mpi' else ''}", required=True)


def _mpirun_options() -> list[str]:
    if not mpi_version().startswith("openmpi"):
        return []
    # Open MPI refuses root unless told, and counts cores as slots; two processes bound to one core would crawl.
    return [*(["--allow-run-as-root"] if os.geteuid() == 0 else []), "--oversubscribe", "--bind-to", "none"]


def _machine() -> list[Finding]:
    total, available = memory_bytes()
    names = gpus()
    return [
        Finding("CPU", "ok", instruction_sets()),
        Finding("cores", "ok", f"{cores()} for this process", metric=("cores", cores())),
        Finding("memory", "ok", f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB of it free",
                metric=("memory_bytes", total)),
        Finding("GPUs", "ok", f"{len(names)}: {', '.join(sorted(set(names)))}" if names else "none",
                metric=("gpus", len(names))),
    ]


def _cache() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return Finding("cache folder", "ok", str(folder))
    except OSError as error:
        return Finding("cache folder", "warning", f"{folder} cannot be written: {error.strerror}",
                       "export HPCAI_CACHE=FOLDER")


def _broken(name: str, version: str, error: str, mend: str, *, required: bool) -> Finding:
    value = f"{version} cannot be imported: {error}" if version else "not installed"
    return Finding(name, "missing", value, mend, required=required)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _run(command: Sequence[str], *, seconds: float) -> tuple[int, str, str]:
    """Run a command as if no launcher had started this process; return exit code, stdout and stderr."""
    environ = launch.without_launcher() | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, errors="replace", env=environ, start_new_session=True)
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    try:
        output, errors = process.communicate(timeout=seconds)
        return process.returncode, output, errors
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {seconds:.0f} s"
    finally:
        end_group(process)


def _ending(code: int, errors: str) -> str:
    """Say how a process ended: its last words, or the signal that ended it."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {code}"


def _json_line(line: str) -> dict:
    """Read a line of JSON, which horovodrun prefixes with `[0]<stdout>:`; empty for any other line."""
    start = line.find("{")
    try:
        return json.loads(line[start:]) if start >= 0 else {}
    except ValueError:
        return {}
