"""Finds the export that a path means: itself, the newest of a run, that of a bundle, or versions of one."""

from pathlib import Path

from hpcai_cli.engine.serving import model_folders
from hpcai_cli.engine.serving.artefact import DOCUMENT, Artefact
from hpcai_cli.errors import DataError
from hpcai_cli.run import Run


def servable(path: Path) -> Path:
    """Return the folder of an export, or of its versions, or of several models.

    Raises:
        DataError: the path is a run that was not exported.
    """
    run = Run(path)
    if run.recipe_file.is_file():
        exports = [file.parent for file in run.exports.glob(f"[!.]*/{DOCUMENT}")]
        if not exports:
            raise DataError("the run was not exported", expected="an export", received=str(path),
                            mend=f"make one with `hpcai deploy export {path}`")
        return max(exports, key=lambda folder: (folder / DOCUMENT).stat().st_mtime)
    return path / "model" if (path / "model" / DOCUMENT).is_file() else path


def artefact_at(path: Path) -> Artefact:
    """Return the export that a path means, of several versions the current one.

    Raises:
        DataError: there is none.
    """
    folder = servable(path)
    found = model_folders.versions(folder)
    return Artefact.open(found["1"] if found == {"1": folder} else found[model_folders.current(folder, found)])
