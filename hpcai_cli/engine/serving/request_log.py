"""A line of JSON for each request, written by a thread of its own, so that a slow disk or pipe delays no answer."""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timezone

import numpy as np
import orjson

from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.protocol import probabilities, winners
from hpcai_cli.errors import printable

MOST_ANSWERS = 8
"""Answers of a request that its line tells."""
_MOST_WAITING = 10_000
"""Lines that wait for a slow disk; what comes on top is counted and left out."""
_FEW_CLASSES = 20
_PIPE_BYTES = 4096
"""Lines in one write; what is longer could be mixed with other workers' lines in a pipe."""


class RequestLog:
    """Writes lines to stderr or to the end of a file.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str = ""):
        # A descriptor of its own: libraries that are kept quiet have stderr led elsewhere for a moment.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640) if path else os.dup(2)
        self._waiting: deque[bytes] = deque()
        self._left_out = 0
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="request log", daemon=True)
        self._thread.start()

    def request(self, said: dict, artefact: Artefact | None = None, scores: np.ndarray | None = None) -> None:
        """Tell of a request; `time`, and the answers that the scores mean, are added."""
        if len(self._waiting) >= _MOST_WAITING:
            self._left_out += 1
            return
        # Made here and not in the thread, which would take the interpreter from the requests for many lines at a time.
        self._waiting.append(_line(said, artefact, scores))
        if not self._wake.is_set():
            self._wake.set()

    def event(self, text: str) -> None:
        """Tell of something that is no request."""
        self.request({"event": printable(text)})

    def close(self) -> None:
        """Write what waits."""
        self._closed = True
        self._wake.set()
        self._thread.join(2)

    def _work(self) -> None:
        while not (self._closed and not self._waiting):
            self._wake.wait()
            # What comes in the next moment is written together.
            time.sleep(0 if self._closed else 0.02)
            self._wake.clear()
            lines, size = [], 0
            while self._waiting:
                line = self._waiting.popleft()
                if size + len(line) > _PIPE_BYTES and lines:
                    self._write(lines)
                    lines, size = [], 0
                lines.append(line)
                size += len(line)
            self._write(lines)
            if self._left_out:
                left_out, self._left_out = self._left_out, 0
                self.event(f"{left_out} lines were left out")

    def _write(self, lines: Sequence[bytes]) -> None:
        content = b"".join(lines)
        try:
            while content:
                content = content[os.write(self._file, content):]
        except OSError:
            return  # The disk is full, or nobody reads: requests go on.


def _line(said: dict, artefact: Artefact | None, scores: np.ndarray | None) -> bytes:
    said = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **said}
    try:
        if artefact is not None and scores is not None:
            said["answers"] = _answers(artefact, scores[:MOST_ANSWERS])
        return orjson.dumps(said, option=orjson.OPT_APPEND_NEWLINE)
    except (TypeError, ValueError, OverflowError) as error:
        return orjson.dumps({"event": f"a line could not be written: {error}"}, option=orjson.OPT_APPEND_NEWLINE)


def _answers(artefact: Artefact, scores: np.ndarray) -> list:
    """Return [label, probability] or the number of each row of the scores (n, columns)."""
    names = artefact.class_names
    if not names:
        return [round(value, 6) for value in scores[:, 0].tolist()]
    if artefact.decision_threshold is None and len(names) <= _FEW_CLASSES:
        return [_answer(names, row) for row in scores.tolist()]
    chances = probabilities(scores)
    return [[names[best], round(row[best], 4)]
            for best, row in zip(winners(artefact, scores, chances), chances.tolist(), strict=True)]


def _answer(names: Sequence[str], row: list[float]) -> list:
    # For a few numbers, plain Python is quicker than arrays.
    best = max(row)
    return [names[row.index(best)], round(1 / sum(math.exp(score - best) for score in row), 4)]
