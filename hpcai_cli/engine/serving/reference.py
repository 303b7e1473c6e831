"""The statistics of the training split that travel with a model, for what a server sees to be compared with."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.quantities import (
    CONFIDENCE_EDGES,
    MOST_BINS,
    MOST_QUANTITIES,
    Bins,
    answered,
    edges_of,
    measured,
    names_of,
)
from hpcai_cli.errors import DataError

SCHEMA = "hpcai.reference/1"
_CHUNK = 1 << 20
"""Numbers of the inputs that are measured at a time."""


def reference_of(inputs: np.ndarray, scores: np.ndarray, *, inputs_kind: str, feature_names: Sequence[str],
                 class_names: Sequence[str], labels: np.ndarray | None = None,
                 threshold: float | None = None) -> dict:
    """Return the statistics of examples and of the model's answers to them, as JSON values.

    Args:
        inputs: as stored, uint8 (n, height, width, channels) or float32 (n, features), n at least 1; may be mapped.
        scores: the task's scores, float32 (m, columns), of these or of other examples.
        inputs_kind: "images" or "features".
        feature_names: of the features in their order; none for images.
        class_names: none for a regression.
        labels: int64 or float32 (m,); they add how right the answers are.
        threshold: of two classes, the probability from which on the second is the answer; None for the likelier one.
    """
    names = names_of(inputs_kind, inputs.shape[1:], feature_names)
    size = max(1, _CHUNK // max(1, math.prod(inputs.shape[1:])))
    seen = np.concatenate([measured(np.asarray(inputs[start:start + size]), inputs_kind)
                           for start in range(0, len(inputs), size)])
    finite = np.isfinite(scores).all(axis=1)
    answers = {"examples": len(scores), "broken": int((~finite).sum())}
    labels = None if labels is None else labels[finite]
    if class_names:
        classes, confidence = answered(scores[finite], threshold)
        bins = np.searchsorted(CONFIDENCE_EDGES, confidence, side="right")
        answers |= {"classes": np.bincount(classes, minlength=len(class_names)).tolist(),
                    "confidence": np.bincount(bins, minlength=len(CONFIDENCE_EDGES) + 1).tolist()}
        if labels is not None and len(labels):
            answers["accuracy"] = float((classes == labels).mean())
    else:
        values = scores[finite].astype(np.float64)
        answers["values"] = _described(["value"], values)[0]
        if labels is not None and len(labels):
            answers["mean_absolute_error"] = float(np.abs(values[:, 0] - labels).mean())
    return {"schema": SCHEMA, "examples": len(inputs), "inputs": _described(names, seen), "answers": answers}


def _described(names: Sequence[str], values: np.ndarray) -> list[dict]:
    """Return name, edges, counts, mean and standard deviation of each quantity of values, float64 (n, quantities)."""
    edges = [edges_of(values[:, place]) for place in range(len(names))]
    found = []
    for place, (name, own, counts) in enumerate(zip(names, edges, Bins(edges).counts(values), strict=True)):
        known = values[np.isfinite(values[:, place]), place]
        mean, deviation = (float(known.mean()), float(known.std())) if len(known) else (0.0, 0.0)
        found.append({"name": name, "edges": own, "counts": counts[:-1].tolist(), "missing": int(counts[-1]),
                      "mean": mean, "std": deviation})
    return found


def checked(artefact: Artefact) -> Mapping | None:
    """Return an artefact's reference; None without any.

    Raises:
        DataError: it is not what `reference_of` makes for such a model.
    """
    reference = artefact.reference
    if reference is None:
        return None
    try:
        wrong = list(_wrong(reference, artefact))
    except (KeyError, TypeError, AttributeError) as error:
        wrong = [f"{type(error).__name__} {error}"]
    if wrong:
        raise DataError(f"the reference statistics in {artefact.folder} cannot be used: {wrong[0]}",
                        expected="what `hpcai deploy export` writes", mend="export the model again")
    return reference


def _wrong(reference: Mapping, artefact: Artefact):
    """Give what a server could not count by."""
    if reference["schema"] != SCHEMA:
        yield f"its schema is not {SCHEMA}"
    entries, answers = list(reference["inputs"]), reference["answers"]
    if len(entries) > MOST_QUANTITIES or len(entries) != len(names_of(artefact.inputs, artefact.input_shape)):
        yield "its quantities are not those of the inputs"
    if artefact.class_names:
        for name, length in (("classes", len(artefact.class_names)), ("confidence", len(CONFIDENCE_EDGES) + 1)):
            if not counts_fit(answers[name], length):
                yield f"its {name} do not fit the model"
    else:
        entries.append(answers["values"])
    for entry in entries:
        edges = entry["edges"]
        numbers = [*edges, entry["mean"], entry["std"]]
        if not isinstance(entry["name"], str) or not isinstance(edges, list) or len(edges) >= MOST_BINS or not all(
                type(number) in (int, float) and math.isfinite(number) for number in numbers):
            yield "a quantity's edges, mean or std are no numbers"
        elif any(low >= high for low, high in zip(edges, edges[1:], strict=False)) or entry["std"] < 0:
            yield "a quantity's edges do not ascend"
        elif not counts_fit([*entry["counts"], entry["missing"]], len(edges) + 2):
            yield "a quantity's counts do not fit its edges"


def counts_fit(counts: object, length: int) -> bool:
    """Tell whether a stranger's counts are that many whole numbers that can be summed."""
    return isinstance(counts, list) and len(counts) == length and all(
        type(count) is int and 0 <= count < 1 << 53 for count in counts)
