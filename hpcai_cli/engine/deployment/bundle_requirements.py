"""The packages of others that a bundle needs, at the versions that are installed here."""

import platform
import sys
from collections.abc import Iterable
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from hpcai_cli.errors import MissingError

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""What the versions were chosen for, and so what the container has."""
SERVER_PACKAGES = ("numpy", "pillow", "orjson", "uvicorn", "uvloop", "httptools", "python-multipart",
                   "prometheus-client")
EDGE_PACKAGES = ("numpy", "pillow", "orjson")
"""What the program for small devices needs."""
LIBRARIES = {"tflite": ("ai-edge-litert",), "onnx": ("onnx", "onnxruntime"), "saved_model": ("tensorflow", "keras"),
             "keras": ("tensorflow", "keras")}
"""What runs a kind of model."""


def pinned(names: Iterable[str]) -> str:
    """Return a requirements.txt of packages and of all that they need in turn, each at the version installed here.

    Raises:
        MissingError: one of them is not installed.
    """
    versions, waiting, seen = {}, [Requirement(name) for name in names], set()
    while waiting:
        wanted = waiting.pop()
        name, extras = canonicalize_name(wanted.name), frozenset(wanted.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise MissingError("a bundle pins what is installed here, and a package is not", expected=name,
                               mend="run `pip install 'hpcai[serve,onnx]'`") from None
        # A build for one machine (1.2+local) is on no index.
        versions[name] = Version(distribution.version).public
        for text in distribution.requires or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                waiting.append(needed)
    header = f"# As installed with Python {PYTHON} on {platform.system()}.\n"
    return header + "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
