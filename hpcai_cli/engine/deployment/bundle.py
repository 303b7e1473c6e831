"""Bundles: a folder that runs an exported model on a machine that has neither this project nor its training."""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from hpcai_cli.engine.deployment import bundle_files
from hpcai_cli.engine.deployment.bundle_requirements import EDGE_PACKAGES, LIBRARIES, SERVER_PACKAGES, pinned
from hpcai_cli.engine.deployment.bundle_sources import sources
from hpcai_cli.engine.serving.artefact import DOCUMENT, Artefact, digest
from hpcai_cli.engine.serving.trial import Trial
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.run import write_bytes

SUMS = "SHA256SUMS"
"""For `sha256sum -c`."""
SERVER, EDGE_RUNNER = "hpcai_cli.engine.serving.server", "hpcai_cli.engine.deployment.edge_runner"
"""The modules that bundles run."""


def write_bundle(artefact: Artefact, output: Path, *, edge: bool = False) -> Path:
    """Write a folder with an exported model and all that answers with it, and return the folder.

    Args:
        output: the new folder, which appears when it is whole.
        edge: with a program that answers for files, for small devices, in place of the server.

    Raises:
        UsageError: there is something already, or the model is of a kind that small devices do not run.
        DataError: the export is not whole, or its model cannot be run on a small device.
        MissingError: a package that the bundle needs is not installed here, so that its version is not known.
    """
    if edge and artefact.kind != "tflite":
        raise UsageError("a bundle for small devices has a TFLite model", expected="an export of kind tflite",
                         mend="make one with `hpcai deploy export RUN --format tflite`", received=artefact.kind)
    if os.path.lexists(output):
        raise _taken(output)
    artefact.verify()
    if edge:
        _try_out(artefact)
    start, packages = (EDGE_RUNNER, EDGE_PACKAGES) if edge else (SERVER, SERVER_PACKAGES)
    requirements = pinned((*packages, *LIBRARIES[artefact.kind]))
    with _appearing(output) as folder:
        _copy_model(artefact, folder / "model")
        for name, file in sources(start, artefact.kind).items():
            write_bytes(folder / "lib" / name, file.read_bytes())
        write_bytes(folder / "requirements.txt", requirements.encode())
        sums = {path.relative_to(folder).as_posix(): digest(path) for path in folder.rglob("*") if path.is_file()}
        # Another model, source or version makes another image, which a cluster then rolls out.
        tag = hashlib.sha256("".join(sorted(sums.values())).encode()).hexdigest()[:12]
        texts = bundle_files.edge_texts(artefact) if edge else bundle_files.server_texts(artefact, tag=tag)
        _write_texts(folder, texts)
        sums |= {name: digest(folder / name) for name in texts}
        write_bytes(folder / SUMS, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())
    return output


def _try_out(artefact: Artefact) -> None:
    """Run the model here, in a process that it may crash: a small device does without, for the sake of its time."""
    dtype = np.uint8 if artefact.inputs == "images" else np.float32
    with Trial(artefact.folder, np.zeros((1, *artefact.input_shape), dtype), threads=1):
        pass


def _copy_model(artefact: Artefact, folder: Path) -> None:
    """Copy artefact.json and the files that it lists; whatever else lies there is not part of the export."""
    for name in (DOCUMENT, *artefact.document["files"]):
        # SHA256SUMS would need a notation of its own for them.
        if not name.isprintable() or "\\" in name:
            raise DataError("a file's name in the export cannot be written in a list", expected="printable names",
                            received=name)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artefact.folder / name, folder / name)


def _write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        write_bytes(folder / name, text.encode())
        if text.startswith("#!"):
            path = folder / name
            # Whoever may read it may run it.
            path.chmod(path.stat().st_mode | (path.stat().st_mode & 0o444) >> 2)


@contextlib.contextmanager
def _appearing(output: Path) -> Iterator[Path]:
    """Give a folder with a temporary name, and the name `output` once it is filled.

    Raises:
        UsageError: there is something of that name by then, or the folder cannot be made.
        HpcaiError: what is in it cannot be written.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    except OSError as error:
        raise UsageError(f"cannot write the bundle: {error.strerror}", expected="a folder that you may write",
                         received=str(output)) from None
    try:
        yield folder
        # mkdtemp makes a folder for the owner alone.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        if os.path.lexists(output):
            raise _taken(output)
        folder.rename(output)
    except OSError as error:
        raise HpcaiError(f"cannot write the bundle {output}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _taken(output: Path) -> UsageError:
    return UsageError("there is something already where the bundle is to be", expected="a new folder",
                      mend="give another --output", received=str(output))
