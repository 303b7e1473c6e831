"""Joins labels that came later with a server's request log: how right the answers were."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from hpcai_cli.engine.deployment.delayed_labels import CONFLICTING, labels_of, lines_of
from hpcai_cli.engine.serving.artefact import Artefact

Z_95 = 1.959963984540054
_USED = object()
"""Stands in place of a label whose answer was found."""


def live_accuracy(artefact: Artefact, labels: Path, logs: Sequence[Path], *, version: str | None = None,
                  since: float | None = None) -> dict:
    """Return how right a server's answers were, as JSON values.

    A classification has `accuracy` with its Wilson `interval` (95 %) and `classes`, a regression
    `mean_absolute_error` with its interval, and `mean_error`; both have `examples` and `counts` of what could not be
    joined: ids of the labels file that the log lacks (`unknown`), that have two labels (`conflicting`) or one twice
    (`duplicate_labels`), labels that the model cannot answer (`foreign_labels`), labelled requests without an answer,
    ids that were asked again (the first answer counts), answers without a label, and unreadable lines of both.

    Args:
        labels: a CSV file with the columns id and label. The i-th of several examples of one request is ID/i, from 0;
            the log tells the first ones only (request_log.py).
        logs: JSON lines with `id`, `model`, `version`, `answers` (one per example) and `time` (Unix or ISO 8601), in
            the order of time.
        version: of the model; None for all of them.
        since: Unix time; None for all that the logs hold.

    Raises:
        DataError: a file cannot be read, has no such columns, or there are too many labels.
    """
    counts: Counter = Counter()
    known = labels_of(labels, artefact.class_names, counts)
    found = _Numbers() if not artefact.class_names else _Classes(artefact.class_names)
    for path in logs:
        for line in lines_of(path):
            request = _request(line)
            if request is None:
                counts["unreadable_requests"] += 1
            elif request.get("model") == artefact.name and version in (None, str(request.get("version"))) and (
                    since is None or _seconds(request.get("time")) >= since):
                _join(request, known, found, counts)
    counts["unknown"] = sum(label is not _USED and label is not CONFLICTING for label in known.values())
    names = ("requests", "labels", "unknown", "conflicting", "duplicate_labels", "foreign_labels", "without_answer",
             "asked_again", "without_label", "unreadable_labels", "unreadable_requests", "unreadable_answers")
    return {"examples": found.examples, **found.figures(), "counts": {name: counts[name] for name in names}}


def wilson(right: int, count: int) -> list[float] | None:
    """Return the 95 % interval of a share; None without examples.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).
    """
    if not count:
        return None
    share, square = right / count, Z_95 * Z_95 / count
    middle = (share + square / 2) / (1 + square)
    half = Z_95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return [max(0.0, middle - half), min(1.0, middle + half)]


class _Classes:
    """Counts answers by class."""

    def __init__(self, names: Sequence[str]):
        self.examples = 0
        self._places = {name: place for place, name in enumerate(names)}
        self._asked, self._answered, self._right = ([0] * len(names) for _ in range(3))

    def add(self, label: int, answer: object) -> bool:
        """Count an answer, [class, probability] or a mapping with `label`; return whether it is one."""
        given = answer.get("label") if isinstance(answer, dict) else answer[0] if isinstance(
            answer, list) and answer else None
        place = self._places.get(given) if isinstance(given, str) else None
        if place is None:
            return False
        self.examples += 1
        self._asked[label] += 1
        self._answered[place] += 1
        self._right[label] += place == label
        return True

    def figures(self) -> dict:
        right = sum(self._right)
        rows = zip(self._places, self._asked, self._answered, self._right, strict=True)
        return {"accuracy": right / self.examples if self.examples else None,
                "interval": wilson(right, self.examples),
                "classes": [{"name": name, "examples": asked, "answered": answered, "right": own,
                             "recall": own / asked if asked else None, "interval": wilson(own, asked),
                             "precision": own / answered if answered else None}
                            for name, asked, answered, own in rows]}


class _Numbers:
    """Sums the errors of a regression."""

    def __init__(self):
        self.examples, self._errors, self._sizes, self._squares = 0, 0.0, 0.0, 0.0

    def add(self, label: float, answer: object) -> bool:
        """Count an answer, a number or a mapping with `value`; return whether it is one."""
        value = answer.get("value") if isinstance(answer, dict) else answer
        if type(value) not in (int, float) or not abs(value) < 1e150:
            return False
        self.examples += 1
        self._errors += value - label
        self._sizes += abs(value - label)
        self._squares += (value - label) ** 2
        return True

    def figures(self) -> dict:
        if not self.examples:
            return {"mean_absolute_error": None, "interval": None, "mean_error": None}
        mean = self._sizes / self.examples
        half = Z_95 * math.sqrt(max(0.0, self._squares / self.examples - mean * mean) / self.examples)
        return {"mean_absolute_error": mean, "interval": [max(0.0, mean - half), mean + half],
                "mean_error": self._errors / self.examples}


def _join(request: Mapping, known: dict, found: _Classes | _Numbers, counts: Counter) -> None:
    """Compare the answers of one request with their labels."""
    counts["requests"] += 1
    answers, identity = request.get("answers"), request["id"]
    if not isinstance(answers, list) or not answers:
        counts["without_answer"] += known.get(identity) is not None
        return
    for place, answer in enumerate(answers):
        name = identity if len(answers) == 1 else f"{identity}/{place}"
        label = known.get(name)
        if label is None:
            counts["without_label"] += 1
        elif label is _USED:
            counts["asked_again"] += 1
        elif label is not CONFLICTING:
            if found.add(label, answer):
                known[name] = _USED
            else:
                counts["unreadable_answers"] += 1


def _request(line: bytes | None) -> dict | None:
    """Return a line of the log, None where it is none; lines on other things than requests have no id."""
    try:
        request = json.loads(line or b"")
    except (ValueError, RecursionError):
        return None
    return request | {"id": str(request.get("id", ""))} if isinstance(request, dict) else None


def _seconds(time: object) -> float:
    """Return a time of the log as Unix time; one that cannot be read lies before all others."""
    if type(time) in (int, float):
        return time
    try:
        told = datetime.fromisoformat(str(time).replace("Z", "+00:00"))
        return (told if told.tzinfo else told.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return -math.inf
