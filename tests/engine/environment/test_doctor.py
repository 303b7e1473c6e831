"""What the doctor finds on this machine, and on one where something is broken."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from hpcai_cli.engine.machine import cores, memory_bytes

HOROVOD = importlib.util.find_spec("horovod") is not None


def examine(*, environ: dict[str, str] | None = None) -> dict[str, dict]:
    """Run the examination in a process of its own, so that a broken environment can be given to it."""
    code = ("import dataclasses, json, sys; from hpcai_cli.engine.environment import doctor; "
            "print(json.dumps([dataclasses.asdict(finding) for finding in doctor.examine()])); "
            "assert not {'tensorflow', 'horovod', 'h5py', 'numpy'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=290,
                          env={**os.environ, **(environ or {})}, check=True)
    return {finding["name"]: finding for finding in json.loads(done.stdout.splitlines()[-1])}


def shadow(folder, module: str, text: str) -> dict[str, str]:
    """Put a broken module before the installed one."""
    (folder / f"{module}.py").write_text(text)
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.long
@pytest.mark.skipif(not HOROVOD, reason="Horovod is not installed: hpcai doctor --build-horovod")
def test_two_processes_reduce_and_train_over_every_transport_that_is_built_in():
    found = examine()
    assert found["TensorFlow"]["status"] == "ok"
    assert found["Horovod"]["status"] in ("ok", "warning")
    built = [transport for transport in ("gloo", "mpi") if transport in found["Horovod"]["value"].lower()]
    assert built
    for transport in built:
        allreduce, step = found[f"allreduce, {transport}"], found[f"training step, {transport}"]
        assert allreduce["status"] == step["status"] == "ok", (allreduce, step)
        assert 1e-6 < allreduce["metrics"][f"allreduce_latency_seconds_{transport}"] < 10
        assert allreduce["metrics"][f"allreduce_bytes_per_second_{transport}"] > 1e6
        assert "the weights that one process comes to" in step["value"]
        assert 0 < step["metrics"][f"training_step_loss_{transport}"] < 10
    if len(built) == 2:
        assert "is faster for gradients" in found["transport"]["value"]
        assert found["MPI"]["status"] == "ok" and "the library of Horovod" in found["MPI"]["value"]


def test_a_broken_tensorflow_is_named_and_the_rest_still_examined(tmp_path):
    found = examine(environ=shadow(tmp_path, "tensorflow", "raise ImportError('libcudnn is not what it was')"))
    assert found["TensorFlow"]["status"] == "missing"
    assert "ImportError: libcudnn is not what it was" in found["TensorFlow"]["value"]
    assert found["TensorFlow"]["mend"].startswith("pip install tensorflow==")
    assert found["h5py"]["status"] == "ok"
    assert found["cores"]["value"].startswith(f"{cores()} for this process of ")
    for part in ("MPI", "Slurm", "CUDA", "NCCL", "memory", "file locking", "interfaces", "threads"):
        assert found[part]["value"]
    if HOROVOD:
        assert found["allreduce"]["status"] == "missing"


def test_an_import_that_kills_the_process_is_told_from_the_ones_before_it(tmp_path):
    found = examine(environ=shadow(tmp_path, "tensorflow", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"))
    assert found["h5py"]["status"] == "ok"
    assert "killed by SIGILL" in found["TensorFlow"]["value"]
    assert "an import before it did" in found["Keras"]["value"]


def test_memory_is_what_the_system_says():
    total, available = memory_bytes()
    assert 0 < available <= total <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
