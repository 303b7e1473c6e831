"""Bounded statistics of what a server sees: counted by each worker in a file of its own, and summed over the files."""

import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hpcai_cli.engine.serving import counts_file
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES, Bins, answered, measured
from hpcai_cli.engine.serving.reference import reference_of
from hpcai_cli.engine.serving.statistics_layout import FASTEST, LATENCY_EDGES, PER_DECADE, STATUSES, Layout
from hpcai_cli.errors import DataError

__all__ = ["Recorder", "files_of", "merged", "path_of", "reference_of"]

SCHEMA = "hpcai.statistics/1"
SLOT_SECONDS = 3600.0
INPUTS_PER_SECOND = 500.0
"""Inputs that a worker looks at; answers are counted all of them."""
NUMBERS_PER_SECOND = 4e6
"""The same in pixels or features: large pictures are looked at less often, so that it costs some percent of a core."""
NUMBERS_PER_BATCH = 1 << 18
"""The same in one batch, so that none waits for more than a millisecond."""
_MOST_DEVIATIONS = 1e6
"""How far from the reference's mean, in its standard deviations, a value counts in the live mean."""


class Recorder:
    """Counts what one process of a server takes and answers, in a file of fixed size; threads may share it.

    Inputs are looked at up to INPUTS_PER_SECOND, in bursts of a second's worth at most; of a batch that is too large,
    rows at even distances are taken. For the means and deviations, sums are kept of the distances from the reference's.

    Args:
        file: of this process alone; what it holds of the same model is added to.
        slot_seconds: length of the slots of time that `merged` can tell apart; the file reaches back 24 of them.

    Raises:
        DataError: the file is another model's, or none of this kind.
        HpcaiError: the disk is full or the folder cannot be written.
    """

    def __init__(self, artefact: Artefact, file: Path, *, slot_seconds: float = SLOT_SECONDS):
        self._layout, self._kind = Layout(artefact), artefact.inputs
        self._threshold, self._classes = artefact.decision_threshold, bool(artefact.class_names)
        self._memory, self._slots = counts_file.mapped(
            file, key=self._layout.key, words=self._layout.words, slot_seconds=slot_seconds)
        self._slot_seconds, self._number = slot_seconds, counts_file.NEVER
        self._now = self._sums = self._slots[0]
        size = math.prod(artefact.input_shape)
        self._rate, self._most = max(1.0, min(INPUTS_PER_SECOND, NUMBERS_PER_SECOND / size)), NUMBERS_PER_BATCH // size
        self._left, self._looked = self._rate, time.monotonic()
        self._first = {name: place.start for name, place in self._layout.places.items()}
        self._lock = threading.Lock()

    def record(self, inputs: np.ndarray, scores: np.ndarray) -> None:
        """Count a batch.

        Args:
            inputs: as stored, uint8 (n, height, width, channels) or float32 (n, features).
            scores: the task's scores, float32 (n, columns); rows that are no finite numbers count as broken.
        """
        first, count = self._first, len(scores)
        finite = np.isfinite(scores)
        if not finite.all():
            scores = scores[finite.all(axis=1)]
        places, values = self._answers(scores)
        step = self._step(len(inputs)) if self._layout.inputs else 0
        if step:
            seen = measured(inputs[::step], self._kind)
            places = np.concatenate([places, (self._layout.input_bins.places(seen) + first["inputs"]).ravel()])
        with self._lock:
            self._turn()
            now = self._now
            np.add.at(now, places, 1)
            now[first["answers"]] += count
            if len(scores) < count:
                now[first["broken"]] += count - len(scores)
            if step:
                now[first["watched"]] += len(seen)
                self._add(seen, slice(0, seen.shape[1]))
            if values is not None:
                self._add(values, slice(-1, None))

    def answered(self, status: int, seconds: float) -> None:
        """Count one answered request: its HTTP status and, of those that went well, the time that it took."""
        kind = status // 100
        with self._lock:
            self._turn()
            self._now[self._first["statuses"] + (kind if 1 <= kind < len(STATUSES) else 0)] += 1
            # A refusal takes no time; many of them would hide how long the others wait.
            if kind in (2, 3):
                self._now[self._first["latency"] + _latency_bin(seconds)] += 1

    def close(self) -> None:
        """Let go of the file; nothing can be counted afterwards."""
        with self._lock:
            self._now = self._sums = self._slots = None
            self._memory.close()

    def _answers(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the places that answers count in, int64, and the values of a regression, float64 (n, 1)."""
        if self._classes:
            classes, confidence = answered(scores, self._threshold)
            sure = np.searchsorted(_CONFIDENCE, confidence, side="right")
            return np.concatenate([classes + self._first["classes"], sure + self._first["confidence"]]), None
        values = scores.astype(np.float64)
        return (self._layout.value_bins.places(values) + self._first["values"]).ravel(), values

    def _add(self, values: np.ndarray, which: slice) -> None:
        """Add the distances of values, float64 (n, quantities), from the reference's means, and their squares."""
        apart = (values - self._layout.means[which]) / self._layout.deviations[which]
        apart = apart.clip(-_MOST_DEVIATIONS, _MOST_DEVIATIONS)
        sums = np.add.reduce(apart)
        if np.isnan(sums).any():
            apart[np.isnan(apart)] = 0
            sums = np.add.reduce(apart)
        self._sums[0, which] += sums
        self._sums[1, which] += np.add.reduce(apart * apart)

    def _step(self, count: int) -> int:
        """Return at which distance rows of a batch are looked at, 0 for none, and take them from what is left."""
        with self._lock:
            now = time.monotonic()
            self._left = min(self._rate, self._left + (now - self._looked) * self._rate)
            self._looked = now
            taken = min(count, int(self._left), max(1, self._most))
            if not taken:
                return 0
            step = -(-count // taken)
            self._left -= -(-count // step)
            return step

    def _turn(self) -> None:
        """Go to the slot of the present time, which is emptied where it is one of long ago."""
        number = int(time.time() // self._slot_seconds)
        if number != self._number:
            now = self._slots[number % counts_file.SLOTS]
            if now[0] != number:
                # Killed here, the slot counts as empty, and is emptied again.
                now[0] = counts_file.NEVER
                now[1:] = 0
                now[0] = number
            self._now, self._number = now, number
            self._sums = now[self._layout.places["sums"]].view(np.float64).reshape(2, -1)


_CONFIDENCE = np.array(CONFIDENCE_EDGES)


def _latency_bin(seconds: float) -> int:
    if not seconds > FASTEST:
        return 0
    return min(int(math.log10(min(seconds, 1e9) / FASTEST) * PER_DECADE) + 1, len(LATENCY_EDGES))


def path_of(artefact: Artefact, folder: Path, worker: int) -> Path:
    """Return where a worker counts: of each model, and each of its references, in a file of its own."""
    return folder / f"statistics-{artefact.name}-{Layout(artefact).key.hex()[:12]}-{worker}.bin"


def files_of(artefact: Artefact, folder: Path) -> list[Path]:
    """Return the files of all workers that counted for this model."""
    return sorted(folder.glob(f"statistics-{artefact.name}-{Layout(artefact).key.hex()[:12]}-*.bin"))


def merged(artefact: Artefact, files: Iterable[Path], *, since: float | None = None) -> dict:
    """Return the sum over the workers' files as JSON values.

    Args:
        since: Unix time; slots of time that were over then are left out. None reaches as far back as one file does
            from the newest slot of all, so that a worker that ended days ago is not mixed with the others.

    Raises:
        DataError: a file is another model's, or broken.
    """
    layout, rows, newest = Layout(artefact), [], -math.inf
    for path in files:
        try:
            slot_seconds, slots = counts_file.read(path, key=layout.key, words=layout.words)
        except FileNotFoundError:
            continue  # A worker's that was just replaced.
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        for slot in slots[slots[:, 0] != counts_file.NEVER]:
            if (slot[:layout.places["sums"].start] < 0).any():
                raise DataError(f"{path} holds counts that cannot be", mend="delete it")
            rows.append((float(slot[0]) * slot_seconds, slot_seconds, slot))
            newest = max(newest, rows[-1][0] + slot_seconds)
    rows = [(start, length, slot) for start, length, slot in rows if
            start + length > (newest - counts_file.SLOTS * length if since is None else since)]
    whole = np.zeros(layout.words, np.int64)
    sums = np.zeros((2, len(layout.means)))
    for _, _, slot in rows:
        whole += slot
        sums += slot[layout.places["sums"]].view(np.float64).reshape(2, -1)
    return {"schema": SCHEMA, "model": artefact.name, "reference": layout.key.hex(), "since": since,
            "from": min((start for start, _, _ in rows), default=None),
            "to": max((start + length for start, length, _ in rows), default=None), **_told(layout, whole, sums)}


def _told(layout: Layout, whole: np.ndarray, sums: np.ndarray) -> dict:
    counts = {name: whole[place].tolist() for name, place in layout.places.items()}
    inputs = _quantities(layout.inputs, layout.input_bins, whole[layout.places["inputs"]], sums)
    values = _quantities(layout.values, layout.value_bins, whole[layout.places["values"]], sums[:, len(layout.inputs):])
    answers = {"examples": counts["answers"][0], "broken": counts["broken"][0]}
    if values:
        answers["values"] = values[0]
    else:
        answers |= {"classes": counts["classes"], "confidence": counts["confidence"]}
    return {"inputs": {"examples": counts["watched"][0], "quantities": inputs}, "answers": answers,
            "requests": dict(zip(STATUSES, counts["statuses"], strict=True)), "latency": counts["latency"]}


def _quantities(entries: Sequence[Mapping], bins: Bins, counts: np.ndarray, sums: np.ndarray) -> list[dict]:
    """Return name, counts, mean and standard deviation of each quantity."""
    found = []
    for place, entry in enumerate(entries):
        *held, missing = counts[bins.starts[place]:bins.starts[place + 1]].tolist()
        known = sum(held)
        apart, squares = (float(total) / known if known else math.nan for total in sums[:, place])
        deviation, spread = entry["std"] or 1.0, squares - apart * apart
        told = {"mean": entry["mean"] + apart * deviation, "std": math.sqrt(max(spread, 0.0)) * deviation}
        found.append({"name": entry["name"], "counts": held, "missing": missing,
                      **{name: value if math.isfinite(value) else None for name, value in told.items()}})
    return found
