"""The files of a report: where they lie, what is drawn, and that all of them belong to the same report."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hpcai_cli.engine.reports import page, plots
from hpcai_cli.engine.store import Split
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run, read_json, write_bytes, write_json

SCHEMA = "hpcai.evaluate/1"


def folder_of(model: Path, run: Run, split: str, output: Path | None) -> Path:
    """Return where a report goes: each model of a run, and each split, has a place of its own.

    RUN/evaluation/ is the run's own on the test split. Other files of the run have a folder in it, by their path, and
    splits one in theirs. A model outside of the run has its folder beside it.

    Raises:
        UsageError: `output` holds something else than a report.
    """
    if output is not None:
        before = output / "metrics.json"
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
        if taken and not (before.is_file() and read_json(before).get("schema") == SCHEMA):
            raise UsageError("the output folder is not empty", expected="a new or empty folder, or one with a report",
                             mend="give another --output", received=str(output))
        return output
    here, home = model.absolute(), run.folder.absolute()
    if here == home:
        place = run.evaluation
    elif here.is_relative_to(home):
        place = run.evaluation / here.relative_to(home)
    else:
        place = model.parent / f"{model.name}-evaluation"
    return place if split == "test" else place / split


def write(folder: Path, document: dict, recipe: Recipe, split: Split, scores: np.ndarray) -> None:
    """Write metrics.json, report.html and the pictures; a picture of an earlier report would be taken for this one's.

    Raises:
        HpcaiError: the folder cannot be written.
    """
    drawn = pictures(document, recipe, split, scores)
    for name, content in drawn.items():
        write_bytes(folder / f"{name}.png", content)
    write_bytes(folder / "report.html", page.page(document, drawn).encode("utf-8", "replace"))
    write_json(folder / "metrics.json", document)
    for name in page.CAPTIONS.keys() - drawn.keys():
        with contextlib.suppress(FileNotFoundError):
            (folder / f"{name}.png").unlink()


def pictures(document: dict, recipe: Recipe, split: Split, scores: np.ndarray) -> dict[str, bytes]:
    """Draw all that a report has something to draw of; PNG by name."""
    drawn: dict[str, Callable[[], bytes]] = {}
    if recipe.task == "regression":
        drawn["residuals"] = lambda: plots.residuals(scores[:, 0], np.asarray(split.labels),
                                                     document["residuals"]["histogram"])
    else:
        drawn |= {"confusion": lambda: plots.confusion(document["confusion"], recipe.class_names),
                  "reliability": lambda: plots.reliability(document["calibration"])}
    if "curves" in document:
        drawn["curves"] = lambda: plots.curves(document["curves"])
    if recipe.inputs == "images" and split.inputs.dtype == np.uint8 and len(split.inputs.shape) == 4:
        drawn["hardest"] = lambda: plots.contact_sheet(*_sheet(document["hardest"], split))
    if "robustness" in document:
        drawn["robustness"] = lambda: plots.robustness(document["robustness"])
    return {name: draw() for name, draw in drawn.items()}


def _sheet(rows: list[dict], split: Split) -> tuple[np.ndarray, list[str]]:
    images = np.empty((len(rows), *split.inputs.shape[1:]), split.inputs.dtype)
    split.gather(np.array([row["row"] for row in rows]), images, np.empty(len(rows), split.labels.dtype))
    return images, [f"{row['label']} -> {row['predicted']}\n{row['probability']:.1%}" if "probability" in row else
                    f"{row['label']:.4g} -> {row['predicted']:.4g}" for row in rows]
