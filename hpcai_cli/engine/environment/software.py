"""What of the software is installed, whether it can be loaded, and whether its parts belong together."""

import os
import platform
import shutil
import sys
from importlib import metadata
from pathlib import Path

from hpcai_cli import launch, launchers
from hpcai_cli.engine.environment.finding import REBUILD, Finding, judged
from hpcai_cli.engine.environment.own_process import ending, json_lines, run
from hpcai_cli.engine.environment.toolchain import MPI_PACKAGES, TENSORFLOW, mpi_named, mpi_version, nccl_version
from hpcai_cli.engine.machine import first_output, gpus

_SECONDS = 180

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
def mpi():
    import ctypes, horovod.tensorflow
    paths = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if "/libmpi.so" in line]
    if not paths:
        return {}
    text, length = ctypes.create_string_buffer(1 << 16), ctypes.c_int()
    ctypes.CDLL(paths[0]).MPI_Get_library_version(text, ctypes.byref(length))
    return {"path": paths[0], "version": text.value.decode(errors="replace")}
def cuda():
    import tensorflow
    built = tensorflow.sysconfig.get_build_info()
    return {"cuda": built.get("cuda_version", ""), "cudnn": built.get("cudnn_version", ""),
            "gpus": len(tensorflow.config.list_physical_devices("GPU"))}
for function in (hdf5, tensorflow, keras, horovod, mpi, cuda):
    look(function.__name__, function)
"""


def probe() -> dict[str, dict]:
    """Load everything in a process of its own, so that a broken part shows; return for each `value` or `error`."""
    code, output, errors = run([sys.executable, "-c", _PROBE], seconds=_SECONDS, environ=launch.without_launcher())
    found = {entry["name"]: entry for entry in json_lines(output)}
    why = ending(code, errors)
    for name in ("hdf5", "tensorflow", "keras", "horovod", "mpi", "cuda"):
        if name not in found:
            found[name], why = {"error": f"the import ended the process: {why}"}, "an import before it did"
    return found


def findings(probed: dict[str, dict]) -> list[Finding]:
    """Return what the probe says of each part."""
    return [_python(), _tensorflow(probed), _keras(probed), _h5py(probed), _horovod(probed), _mpi(probed), _slurm(),
            _cuda(probed), _nccl(probed)]


def _python() -> Finding:
    return judged("Python", platform.python_version(), "install Python 3.10 to 3.13",
                  is_well=(3, 10) <= sys.version_info[:2] <= (3, 13))


def _tensorflow(probed: dict) -> Finding:
    version, mend = _version("tensorflow") or _version("tensorflow-cpu"), f"pip install tensorflow=={TENSORFLOW}.0"
    if "error" in probed["tensorflow"]:
        return _broken("TensorFlow", version, probed["tensorflow"]["error"], mend)
    version = version or probed["tensorflow"]["value"]
    known = version.startswith(f"{TENSORFLOW}.")
    return Finding("TensorFlow", "ok" if known else "warning", version, "" if known else mend, required=True)


def _keras(probed: dict) -> Finding:
    version = _version("keras")
    if "error" in probed["keras"]:
        return _broken("Keras", version, probed["keras"]["error"], "pip install 'keras>=3.15,<3.16'")
    backend = probed["keras"]["value"]
    if backend != "tensorflow":
        return Finding("Keras", "missing", f"{version} on {backend}", "export KERAS_BACKEND=tensorflow", required=True)
    return Finding("Keras", "ok", f"{version} on TensorFlow", required=True)


def _h5py(probed: dict) -> Finding:
    version = _version("h5py")
    if "error" in probed["hdf5"]:
        return _broken("h5py", version, probed["hdf5"]["error"], "pip install 'h5py<3.15'")
    return Finding("h5py", "ok", f"{version} with HDF5 {probed['hdf5']['value']}", required=True)


def _horovod(probed: dict) -> Finding:
    version = _version("horovod")
    if not version:
        return Finding("Horovod", "missing", "not installed; one process works without it", REBUILD)
    if "error" in probed["horovod"]:
        return _broken("Horovod", version, probed["horovod"]["error"], REBUILD)
    built = [name for name, is_built in probed["horovod"]["value"].items() if is_built]
    return Finding("Horovod", "ok", f"{version} with {', '.join(built)}", required=True)


def _mpi(probed: dict) -> Finding:
    """Say which MPI starts ranks, and whether it is the one that Horovod loads."""
    starts = mpi_version()
    if not starts:
        return Finding("MPI", "missing", "not installed; Gloo works without it", MPI_PACKAGES)
    if not probed["horovod"].get("value", {}).get("MPI", True):
        return Finding("MPI", "warning", f"{starts}; not built into Horovod", f"{REBUILD} --with-mpi")
    library = probed["mpi"].get("value") or {}
    loaded = mpi_named(library.get("version", ""))
    if not loaded or loaded == starts:
        return Finding("MPI", "ok", f"{starts}{', mpirun and the library of Horovod' if loaded else ''}")
    value = f"mpirun is {starts}, and Horovod loads {loaded} from {library['path']}"
    # Of another make, mpirun starts processes of which each believes that it is alone.
    same_make = loaded.rstrip("0123456789.") == starts.rstrip("0123456789.")
    return Finding("MPI", "warning" if same_make else "missing", value,
                   f"put the mpirun of {loaded} first on PATH, or {REBUILD} --with-mpi")


def _slurm() -> Finding:
    if not shutil.which("srun"):
        return Finding("Slurm", "ok", "not here; mpirun and horovodrun start ranks")
    version = first_output(["srun", "--version"]).strip()
    if not version:
        return Finding("Slurm", "ok", "srun is here, but no cluster answers it")
    has_pmix = launchers.srun_speaks_pmix()
    return judged("Slurm", f"{version}, {'with' if has_pmix else 'without'} PMIx",
                  "hpcai train RECIPE --hosts A:N,B:N --launcher mpirun", is_well=has_pmix)


def _cuda(probed: dict) -> Finding:
    found = probed["cuda"].get("value", {"cuda": "", "cudnn": "", "gpus": 0})
    built = f"CUDA {found['cuda']} and cuDNN {found['cudnn']}" if found["cuda"] else "no CUDA"
    present = len(gpus()) or len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdecimal()])
    if not present:
        return Finding("CUDA", "ok", f"none needed: no GPU; TensorFlow was built with {built}")
    driver = first_output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).split("\n")[0].strip()
    value = (f"TensorFlow was built with {built} and sees {found['gpus']} of {present} GPUs; "
             f"{f'driver {driver}' if driver else 'nvidia-smi does not answer'}")
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    mend = ("install NVIDIA's driver" if not driver else "unset CUDA_VISIBLE_DEVICES" if hidden else
            f"pip install 'tensorflow[and-cuda]=={TENSORFLOW}.0'")
    # Fewer than all may be meant: a scheduler shows each job its own.
    return judged("CUDA", value, mend, is_well=found["gpus"] > 0)


def _nccl(probed: dict) -> Finding:
    version = nccl_version()
    said = version or "not installed"
    if not gpus():
        return Finding("NCCL", "ok", f"none needed: no GPU{f' ({version})' if version else ''}")
    if probed["horovod"].get("value", {}).get("NCCL", False):
        return Finding("NCCL", "ok", f"{said}, built into Horovod")
    return Finding("NCCL", "warning", f"{said}, not built into Horovod: gradients travel through the host's memory",
                   f"{REBUILD} --with-nccl")


def _broken(name: str, version: str, error: str, mend: str) -> Finding:
    value = f"{version} cannot be imported: {error}" if version else "not installed"
    return Finding(name, "missing", value, mend, required=True)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
