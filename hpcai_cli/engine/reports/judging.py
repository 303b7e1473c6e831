"""An evaluation from the question to the files: open, check, compute on all ranks, write on one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import distributed, evaluation, hardware, inference
from hpcai_cli.engine.reports import bootstrap, comparison, conditions, files, report, robustness, slices
from hpcai_cli.engine.reports.files import SCHEMA
from hpcai_cli.engine.store import Dataset, Split, check_fits
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe


@dataclass(frozen=True)
class Question:
    """What the user asked for."""

    model: Path
    like: Path | None = None
    data: Path | None = None
    split: str = "test"
    compare: Path | None = None
    by: str = ""
    robustness: bool = False
    output: Path | None = None
    trust: bool = False
    find_recipe: Callable | None = None
    """`catalog.find`, by which a checkpoint's model is built."""
    required: tuple[conditions.Condition, ...] = ()


@dataclass(frozen=True)
class _Opened:
    """What the question is about, found and checked."""

    ours: inference.Opened
    theirs: inference.Opened | None
    recipe: Recipe
    dataset: Dataset
    split: Split
    folder: Path


def evaluate(question: Question) -> dict:
    """Judge a model, write the report, and return what metrics.json holds, on every rank.

    Raises:
        DataError: the model or the data cannot be read or don't belong together, or a score is no number.
        UsageError: the question names what the data or the report don't have.
    """
    with console.quiet():
        ranks = distributed.start()
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    held = []
    # Rank 0 looks first: what is wrong with a file is then said once, and by no rank that others wait for.
    distributed.on_rank_zero(ranks, lambda: held.append(_open(question)))
    opened = held[0] if held else _open(question)
    ours = _scores(opened, opened.ours, opened.split, ranks, "evaluating")
    theirs = _scores(opened, opened.theirs, opened.split, ranks, "the other") if opened.theirs else None
    robust = _robustness(opened, ours, ranks) if question.robustness else None

    def write() -> dict:
        document = _document(question, opened, ours, theirs, robust)
        files.write(opened.folder, document, opened.recipe, opened.split, ours)
        return document

    # All scores are gathered, so that one rank has what the figures are made of.
    document = distributed.on_rank_zero(ranks, write)
    ranks.stop()
    return document


def figures(document: dict) -> dict[str, float]:
    """Return all figures of a report that a condition can name."""
    found = dict(document["metrics"])
    intervals = dict(document["intervals"])
    if "comparison" in document:
        found["difference"] = document["comparison"]["difference"]
        intervals["difference"] = document["comparison"]["interval"]
        if "mcnemar" in document["comparison"]:
            found["p_value"] = document["comparison"]["mcnemar"]["p_value"]
    if "robustness" in document:
        found[f"robust_{document['robustness']['metric']}"] = document["robustness"]["mean"]
    for name, (low, high) in intervals.items():
        found |= {f"{name}_low": low, f"{name}_high": high}
    return found


def _open(question: Question) -> _Opened:
    ours = _model(question, question.model)
    dataset = Dataset(question.data or ours.run.data_file())
    recipe = _fitted(ours, dataset, question.model)
    split, theirs = dataset.split(question.split), None
    _check_names(question, recipe)
    if question.by:
        slices.check(question.by, dataset, recipe)
    if question.robustness:
        robustness.check(dataset, recipe)
    if question.compare:
        theirs = _comparable(question, dataset, recipe)
    return _Opened(ours, theirs, recipe, dataset, split, files.folder_of(
        question.model, ours.run, question.split, question.output))


def _comparable(question: Question, dataset: Dataset, recipe: Recipe) -> inference.Opened:
    theirs = _model(question, question.compare)
    try:
        other = _fitted(theirs, dataset, question.compare)
    except DataError as error:
        raise DataError(f"{question.compare} cannot answer the same examples: {error}") from None
    if (other.task, other.class_names) != (recipe.task, recipe.class_names):
        raise DataError(f"{question.compare} answers another question", expected=f"a {recipe.task}",
                        received=other.task)
    if theirs.run.manifest().get("data_fingerprint") != dataset.fingerprint:
        console.note(f"{question.compare} was trained on another data file, and may have seen these examples there")
    return theirs


def _model(question: Question, path: Path) -> inference.Opened:
    return inference.open_model(path, like=question.like, trust=question.trust, find_recipe=question.find_recipe)


def _fitted(opened: inference.Opened, dataset: Dataset, model: Path) -> Recipe:
    """Return a model's recipe with what it leaves to the data, after checking that the data are of its kind."""
    recipe, manifest = check_fits(dataset, opened.recipe, training=False), opened.run.manifest()
    if list(dataset.class_names) != manifest.get("class_names"):
        raise DataError("the data file names other classes than the run was trained on",
                        expected=", ".join(manifest.get("class_names", [])), received=", ".join(dataset.class_names))
    columns, trained = (slices.columns_of(details, recipe.input_shape[-1])
                        for details in (dataset.details, manifest.get("data_details", {})))
    if columns and trained and columns != trained:
        # The same feature would mean two things, and the figures would be wrong without a word.
        apart = [name for name in dict.fromkeys([*trained, *columns]) if trained.get(name) != columns.get(name)]
        raise DataError(f"{dataset.path} encodes its columns otherwise than the data that {model} was trained on",
                        expected="the same columns and categories", mend="give the file that it was trained on",
                        received=", ".join(apart))
    return recipe


def _check_names(question: Question, recipe: Recipe) -> None:
    names, bounded = list(evaluation.metric_names(recipe)), list(bootstrap.names_with_intervals(recipe))
    robust = f"robust_{evaluation.main_metric(recipe)}"
    compared = ["difference", *(["p_value"] if recipe.task == "classification" else [])]
    elsewhere = {robust: "--robustness", **dict.fromkeys(
        [*compared, "difference_low", "difference_high"], "--compare MODEL")}
    names += [robust] if question.robustness else []
    if question.compare:
        names, bounded = [*names, *compared], [*bounded, "difference"]
    conditions.check_names(question.required, names, bounded, elsewhere)


def _scores(opened: _Opened, model: inference.Opened, split: Split | robustness.CorruptedSplit, ranks,
            what: str) -> np.ndarray:
    with console.progress(what, total=-(-len(split) // ranks.size),
                          unit="images" if opened.recipe.inputs == "images" else "rows") as shown:
        scores = evaluation.scores_of(model.forward, split, ranks, columns=task_of(opened.recipe).columns,
                                      on_batch=shown.update)
    try:
        report.check_finite(scores)
    except DataError as error:
        # Every rank has gathered the same scores.
        error.collective = True
        raise
    return scores


def _robustness(opened: _Opened, scores: np.ndarray, ranks) -> dict:
    threshold = opened.ours.run.decision_threshold()
    clean = evaluation.figures(opened.recipe, scores, opened.split.labels, threshold)
    return robustness.robustness(opened.recipe, opened.split, lambda split: _scores(
        opened, opened.ours, split, ranks, f"{split.corruption} {split.setting:g}"), clean, threshold)


def _document(question: Question, opened: _Opened, ours: np.ndarray, theirs: np.ndarray | None,
              robust: dict | None) -> dict:
    recipe, split, threshold = opened.recipe, opened.split, opened.ours.run.decision_threshold()
    labels = np.asarray(split.labels)
    document = {"schema": SCHEMA, "command": "evaluate", "run": str(opened.ours.run.folder),
                "model": str(question.model), "format": opened.ours.kind, "folder": str(opened.folder),
                "data": str(opened.dataset.path), "split": question.split, "examples": len(split),
                "decision_threshold": threshold, **report.report(recipe, ours, labels, threshold)}
    if question.by:
        document |= {"by": question.by, "slices": slices.slices(question.by, opened.dataset, split, recipe, ours,
                                                                threshold)}
    if theirs is not None:
        document["comparison"] = {"model": str(question.compare), "format": opened.theirs.kind, **comparison.compare(
            recipe, labels, (ours, threshold), (theirs, opened.theirs.run.decision_threshold()))}
    return document | ({"robustness": robust} if robust else {})
