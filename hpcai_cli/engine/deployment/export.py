"""Exports a run's model: written, proven equal on real examples by the process that will serve it, then delivered."""

import contextlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli import __version__, console
from hpcai_cli.engine import inference, machine, model_file
from hpcai_cli.engine.deployment import formats, model_card, parity, repository
from hpcai_cli.engine.serving import artefact as artefacts
from hpcai_cli.engine.serving import statistics
from hpcai_cli.engine.serving.trial import Trial, latencies
from hpcai_cli.engine.store import Dataset, check_fits
from hpcai_cli.errors import GateError, MissingError, UnsuitableError, UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import write_bytes, write_json

EXAMPLES = 10_000
"""Examples of the test split that parity is judged on, at most: the first ones, or all."""
REFERENCE_EXAMPLES = 10_000
"""Examples of the training split that live inputs are compared with, at most, evenly spread over it."""
AUTOMATIC = ("tflite", "onnx", "saved_model")
"""Kinds among which the fastest is chosen, where none is named."""


@dataclass(frozen=True)
class Order:
    """What the user asked for."""

    model: Path
    """A run folder, trained or compressed."""
    kind: str = "auto"
    output: Path | None = None
    """Folder of the export; below the run's exports/ when None."""
    into: Path | None = None
    """A repository of versions, to which this is added as the next one, instead of `output`."""
    data: Path | None = None
    name: str = ""
    tolerance: float = parity.TOLERANCE
    force: bool = False
    trust: bool = False
    find_recipe: Callable | None = None


@dataclass(frozen=True)
class _Source:
    """The model that is exported, and the examples on which it answers."""

    opened: inference.Opened
    recipe: Recipe
    inputs: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    reference: dict
    data_fingerprint: str


def export(order: Order) -> dict:
    """Export a model and return the document of its export: where it is, its parity, what answering costs.

    Raises:
        GateError: it does not answer as its model does; what was there before is still there.
        DataError: the model or the data cannot be read, or don't belong together.
        UsageError: the format cannot be had of this model, or there is an export already.
        MissingError: a package is missing that writes or reads the format.
    """
    opened = inference.open_model(order.model, trust=order.trust, find_recipe=order.find_recipe)
    kinds = _kinds(order, opened)
    name = order.name or opened.recipe.name.replace("_", "-")
    if not artefacts.NAME.fullmatch(name):
        raise UsageError("this cannot be a model's name", expected="letters, digits, dots and hyphens", received=name)
    target = repository.next_version(order.into / name) if order.into else (
        order.output or opened.run.exports / order.kind)
    _check_target(target, order.force)
    source = _source(order, opened)
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        made = {kind: Path(stack.enter_context(tempfile.TemporaryDirectory(
            dir=target.parent, prefix=f".{target.name}-"))) / "export" for kind in kinds}
        reports, costs = _judged(stack, order, source, name, made)
        best = min(costs, key=lambda kind: costs[kind]["milliseconds"]["1"])
        choice = {"measured": costs, "chosen": best}
        _finish(source, made[best], reports[best], choice)
        repository.deliver(made[best], target, force=order.force)
    if order.into:
        repository.set_current(target.parent, target.name)
    return {"schema": "hpcai.export/1", "command": "deploy export", "run": str(opened.run.folder), "name": name,
            "folder": str(target), "format": best, "metrics": reports[best]["metrics"], "parity": reports[best],
            "serving": choice}


def _judged(stack: contextlib.ExitStack, order: Order, source: _Source, name: str,
            made: dict[str, Path]) -> tuple[dict, dict]:
    """Write each format into its folder, and return parity reports and costs of those that agree with their model.

    Raises:
        GateError: none does. Of a single format, whatever is wrong with it.
    """
    trials, reports = {}, {}
    for kind, folder in made.items():
        try:
            trial, reports[kind] = _make(order, source, kind, name, folder)
            trials[kind] = stack.enter_context(trial)
        except (UnsuitableError, MissingError, GateError) as error:
            if len(made) == 1:
                raise
            console.note(f"{kind} is left out: {error}")
    if not reports:
        raise GateError("no format agrees with its model", expected=", ".join(made), mend="see the lines above")
    console.note("timing")
    found = latencies(list(trials.values()))
    return reports, {kind: {"milliseconds": times, **trial.cost}
                     for (kind, trial), times in zip(trials.items(), found, strict=True)}


def _check_target(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not (target / artefacts.DOCUMENT).is_file():
        # Whatever else it is, --force is not to throw it away.
        raise UsageError("the folder holds something else than an export", expected="a new folder",
                         received=str(target))
    if not force:
        raise UsageError("there is an export already", expected="a new folder", received=str(target),
                         mend="replace it with --force")


def _kinds(order: Order, opened: inference.Opened) -> tuple[str, ...]:
    """Return the formats to make."""
    if order.kind != "auto" and order.kind not in formats.FILES:
        raise UsageError("there is no such format", expected=", ".join(["auto", *formats.FILES]), received=order.kind)
    if opened.kind == "keras":
        return AUTOMATIC if order.kind == "auto" else (order.kind,)
    if order.kind not in ("auto", opened.kind):
        raise UsageError(f"the model in {order.model} is {opened.kind} and cannot become another format",
                         expected=f"--format {opened.kind}", received=order.kind)
    return (opened.kind,)


def _source(order: Order, opened: inference.Opened) -> _Source:
    """Gather the examples that the export is judged on, and what the model answers to them."""
    dataset = Dataset(order.data or opened.run.data_file())
    recipe = check_fits(dataset, opened.recipe, training=False)
    if opened.run.manifest().get("data_fingerprint") != dataset.fingerprint:
        console.note(f"{dataset.path} is not the file that the run was trained on")
    inputs, labels = _rows(dataset.split("test"), EXAMPLES, spread=False)
    scores = _scores(opened, inputs)
    seen, _ = _rows(dataset.split("train"), REFERENCE_EXAMPLES, spread=True)
    details = opened.run.manifest().get("data_details") or {}
    # The answers are those to examples that it did not learn from: of its own it is surer than it will ever be again.
    reference = statistics.reference_of(
        seen, scores, inputs_kind=recipe.inputs, class_names=recipe.class_names, labels=labels,
        threshold=opened.run.decision_threshold(),
        feature_names=details.get("features") or [f"feature {number}" for number in range(recipe.input_shape[-1])])
    return _Source(opened, recipe, inputs, labels, scores, reference, dataset.fingerprint)


def _rows(split, most: int, *, spread: bool) -> tuple[np.ndarray, np.ndarray]:
    count = min(len(split), most)
    rows = np.linspace(0, len(split) - 1, count).astype(np.int64) if spread else np.arange(count)
    inputs = np.empty((count, *split.inputs.shape[1:]), split.inputs.dtype)
    labels = np.empty(count, split.labels.dtype)
    split.gather(rows, inputs, labels)
    return inputs, labels


def _scores(opened: inference.Opened, inputs: np.ndarray) -> np.ndarray:
    size = 250
    return np.concatenate([opened.forward(inputs[start:start + size]) for start in range(0, len(inputs), size)])


def _make(order: Order, source: _Source, kind: str, name: str, folder: Path) -> tuple[Trial, dict]:
    """Write one format into a folder, and return the process that has opened it, and its parity report."""
    opened, recipe = source.opened, source.recipe
    folder.mkdir()
    if opened.kind == "keras":
        model = model_file.load(opened.file, trust=order.trust)
        file = formats.write(model, kind, folder, input_shape=recipe.input_shape, dtype=source.inputs.dtype)
    else:
        file = folder / formats.FILES[kind]
        (shutil.copytree if opened.file.is_dir() else shutil.copyfile)(opened.file, file)
    write_json(folder / "reference.json", source.reference)
    write_json(folder / artefacts.DOCUMENT, _document(source, kind, name, file.name, folder))
    console.note(f"{kind}: comparing {len(source.labels):,} answers")
    trial = Trial(folder, source.inputs, threads=machine.cores(), trust=order.trust)
    try:
        report = parity.compare(recipe, source.labels, source.scores, trial.scores, tolerance=order.tolerance,
                                threshold=opened.run.decision_threshold())
        parity.require(report, kind)
    except BaseException:
        trial.__exit__()
        raise
    return trial, report


def _document(source: _Source, kind: str, name: str, file: str, folder: Path) -> dict:
    """Return artefact.json for what lies in the folder so far."""
    recipe, run = source.recipe, source.opened.run
    details = run.manifest().get("data_details") or {}
    encoding = {key: details[key] for key in ("columns", "features", "label", "header", "names") if key in details}
    channels = {1: "gray", 3: "RGB"}.get(recipe.input_shape[-1], "")
    return {
        "schema": artefacts.SCHEMA, "name": name, "kind": kind, "file": file, "hpcai": __version__,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "recipe": recipe.name, "task": recipe.task,
        "class_names": list(recipe.class_names), "decision_threshold": run.decision_threshold(),
        "inputs": recipe.inputs, "input_shape": list(recipe.input_shape),
        "preprocessing": f"decoded, turned upright, {channels}, resized bilinearly with antialiasing; scaling is in "
                         "the model" if recipe.inputs == "images" else
                         "columns encoded as `encoding` says" if encoding else "none",
        "outputs": "logits" if recipe.task == "classification" else "numbers",
        "data_fingerprint": source.data_fingerprint, **({"encoding": encoding} if encoding else {}),
        "files": {path.relative_to(folder).as_posix(): {"sha256": artefacts.digest(path), "bytes": path.stat().st_size}
                  for path in sorted(folder.rglob("*")) if path.is_file() and path.name != artefacts.DOCUMENT}}


def _finish(source: _Source, folder: Path, report: dict, choice: dict) -> None:
    """Write what is said of the model beside it, and list all files."""
    write_json(folder / "parity.json", report)
    document = json.loads((folder / artefacts.DOCUMENT).read_text())
    write_bytes(folder / "MODEL_CARD.md", model_card.text(
        source.opened.run, source.recipe, document, report, choice["measured"][choice["chosen"]]).encode())
    document = _document(source, document["kind"], document["name"], document["file"], folder) | {"serving": choice}
    write_json(folder / artefacts.DOCUMENT, document)
    artefacts.Artefact.open(folder).verify()
