"""What one host says of itself, so that hosts can be compared: versions, cores, memory, the clock."""

import json
import platform
import time
from importlib import metadata

from hpcai_cli import __version__
from hpcai_cli.engine.machine import cores, memory_bytes

PACKAGES = {"TensorFlow": "tensorflow", "Keras": "keras", "Horovod": "horovod"}
"""By the name that people know, what pip calls them."""


def facts() -> dict:
    """Return this host's: `versions`, `cores`, `memory` and `memory_free` in bytes, `time` in Unix seconds."""
    versions = {"hpcai": __version__, "Python": platform.python_version()}
    for name, package in PACKAGES.items():
        try:
            versions[name] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    memory, free = memory_bytes()
    return {"versions": versions, "cores": cores(), "memory": memory, "memory_free": free, "time": time.time()}


if __name__ == "__main__":
    print(json.dumps(facts()))
