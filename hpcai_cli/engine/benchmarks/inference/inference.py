"""Inference: latency and throughput by batch size of one model in every format, with its accuracy beside them.

The formats take turns, each in a process of its own on the same cores.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import evaluation
from hpcai_cli.engine.benchmarks.inference.inference_candidate import Candidate, Task
from hpcai_cli.engine.benchmarks.inference.inference_files import Files, bytes_of
from hpcai_cli.engine.benchmarks.inference.inference_formats import FORMATS, USUAL
from hpcai_cli.engine.benchmarks.inference.inference_subject import Subject
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table, Work, interleaved, interval, median
from hpcai_cli.engine.task import task_of
from hpcai_cli.errors import DataError, HpcaiError, MissingError, UnsuitableError, UsageError

ROUNDS = 5
FEWEST = 100
"""Calls from which on there are percentiles beside the median."""
MOST_LOSS = 0.01
"""By which a format may be worse than the best one and still be deployed: accuracy, or share of a mean error."""


@dataclass
class Measured:
    """What was measured of one format."""

    name: str
    bytes: int
    """On disk."""
    cost: Mapping[str, float]
    """open_seconds and peak_memory_mb."""
    metric: float | None
    """Accuracy, or mean absolute error of a regression; None without data."""
    rounds: dict[int, list[list[float]]] = field(default_factory=dict)
    """By batch size the milliseconds of each call, round by round."""
    spans: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """By batch size when each round was."""

    def medians(self, size: int) -> list[float]:
        """Return the median milliseconds of each round."""
        return [float(np.median(times)) for times in self.rounds[size]]

    def p50(self, size: int) -> float:
        """Return the median of these."""
        return float(np.median(self.medians(size)))

    def percentile(self, size: int, share: float) -> float | None:
        """Return the milliseconds within which such a share of all calls ended; None of too few calls."""
        calls = np.concatenate(self.rounds[size])
        return float(np.percentile(calls, share)) if len(calls) >= FEWEST else None

    def rates(self, size: int) -> list[float]:
        """Return the examples per second of each round."""
        return [1000 * size * len(times) / sum(times) for times in self.rounds[size]]

    def rate(self, size: int) -> float:
        """Return the median of these."""
        return float(np.median(self.rates(size)))

    def work(self, name: str) -> Work:
        """Return the examples of the best batch size, and when they were answered."""
        size = self.best_size()
        return Work("inference", name, tuple(size * len(times) for times in self.rounds[size]),
                    tuple(self.spans[size]))

    def best_size(self) -> int:
        """Return the batch size with the most examples per second."""
        return max(self.rounds, key=self.rate)


def names_for(subject: Subject, asked: Sequence[str] | None) -> tuple[str, ...]:
    """Return the formats to measure: those that were asked for, or the usual ones.

    Raises:
        UsageError: the model is a file of another format already.
    """
    if subject.kind == "keras":
        return tuple(asked or USUAL)
    if asked and set(asked) != {subject.kind}:
        raise UsageError(f"the model is {subject.kind} and cannot become another format", received=", ".join(asked),
                         expected=f"--formats {subject.kind}")
    return (subject.kind,)


def measure(subject: Subject, *, names: Sequence[str], batch_sizes: Sequence[int],
            threads: int) -> Iterator[Figure | Table | Curves | Work]:
    """Measure one model in several formats.

    Args:
        names: of FORMATS; those that the model or this environment lacks are left out with a note.
        batch_sizes: ascending.
        threads: of each format, and the cores that it may use.

    Raises:
        HpcaiError: no format can be measured.
    """
    title = f"{subject.recipe.name} on {threads} {'thread' if threads == 1 else 'threads'}"
    with ExitStack() as stack:
        opened, left_out = _opened(stack, subject, names, batch_sizes, threads)
        found = [measured for measured, _ in opened.values()]
        if left_out:
            yield Table("inference", f"{title}: left out", ("format", "why"), tuple(left_out.items()))
        yield from _accuracies(subject, title, found)
        for size in batch_sizes:
            rounds = interleaved(ROUNDS, **{name: partial(candidate.times, size)
                                            for name, (_, candidate) in opened.items()})
            for measured in found:
                measured.rounds[size] = rounds[measured.name]
                measured.spans[size] = rounds.spans[measured.name]
                yield median("inference", f"{title}, {measured.name}, batch of {size}: p50", measured.medians(size),
                             "ms")
            yield _by_format(title, size, found)
    for measured in found:
        yield median("inference", f"{title}, {measured.name}: most examples",
                     measured.rates(measured.best_size()), "1/s")
        yield measured.work(f"{title}, {measured.name}, batch of {measured.best_size()}")
    lines = {measured.name: tuple((float(size), measured.p50(size)) for size in batch_sizes)
             for measured in found}
    yield Curves("inference", f"{title}: latency by batch size", "examples in a batch", "ms, median", lines, "xy")
    yield _decision(subject, title, found, batch_sizes[0])


# ---- Before the clock runs -----------------------------------------------------------------------------------------

def _opened(stack: ExitStack, subject: Subject, names: Sequence[str], sizes: Sequence[int],
            threads: int) -> tuple[dict[str, tuple[Measured, Candidate]], dict[str, str]]:
    """Write each format, and start the process that has opened it; return these, and why others are left out."""
    folder, opened, left_out = Path(stack.enter_context(tempfile.TemporaryDirectory())), {}, {}
    files = Files(subject.model, folder, subject.calibration)
    for name in names:
        console.note(f"{name}: opening" + (" and answering the test split" if subject.data else ""))
        try:
            file = files.file(name) if subject.model else subject.file.absolute()
            # What was written here was made of a model that has passed the checks.
            task = Task(name, file, subject.recipe.input_shape, task_of(subject.recipe).columns, threads,
                        tuple(sizes), subject.data, subject.trust or subject.model is not None)
            candidate = stack.enter_context(Candidate(task, subject.inputs))
        except (UnsuitableError, MissingError, DataError) as error:
            left_out[name] = str(error)
            console.note(f"{name} is left out: {error}")
            continue
        opened[name] = Measured(name, bytes_of(file), candidate.cost, _metric(subject, candidate.scores)), candidate
    if not opened:
        raise HpcaiError("no format can be measured", expected=", ".join(names), mend="see the lines above")
    return opened, left_out


def _metric(subject: Subject, scores: np.ndarray | None) -> float | None:
    if scores is None:
        return None
    figures = evaluation.figures(subject.recipe, scores, subject.labels, subject.threshold)
    return figures[evaluation.main_metric(subject.recipe)]


# ---- What was found ------------------------------------------------------------------------------------------------

def _accuracies(subject: Subject, title: str, found: Sequence[Measured]) -> Iterator[Figure]:
    metric = evaluation.main_metric(subject.recipe)
    for measured in found:
        if measured.metric is not None:
            yield Figure("inference", f"{title}, {measured.name}: {metric.replace('_', ' ')}", measured.metric,
                         "ratio" if metric == "accuracy" else "")


def _by_format(title: str, size: int, found: Sequence[Measured]) -> Table:
    rows = [(each.name, each.p50(size), each.percentile(size, 90), each.percentile(size, 99),
             each.rate(size), sum(map(len, each.rounds[size]))) for each in found]
    return Table("inference", f"{title}, batch of {size}: milliseconds of a call",
                 ("format", "p50", "p90", "p99", "examples/s", "calls"), tuple(rows))


def _decision(subject: Subject, title: str, found: Sequence[Measured], size: int) -> Table:
    """Return the table that decides what to deploy, which its title says."""
    metric = evaluation.main_metric(subject.recipe).replace("_", " ")
    rows = []
    for each in sorted(found, key=lambda each: each.p50(size)):
        best = each.best_size()
        rows.append((each.name, each.p50(size), each.percentile(size, 99), each.rate(best), best,
                     each.metric, round(each.bytes / 1e6, 3), round(each.cost["peak_memory_mb"]),
                     round(each.cost["open_seconds"], 2)))
    return Table("inference", f"{title}, a batch of {size}, and the batch with most examples/s. "
                 f"{choice(subject, found, size)}",
                 ("format", "p50 ms", "p99 ms", "most/s", "batch", metric, "file MB", "memory MB", "opens in s"),
                 tuple(rows))


def choice(subject: Subject, found: Sequence[Measured], size: int) -> str:
    """Say in one sentence what to deploy: of the formats that answer soonest, the smallest.

    Formats that hpcai cannot serve, and those that have lost more than MOST_LOSS, are none to be deployed. Two answer
    as soon where the intervals of their medians overlap.
    """
    able = [each for each in found if _is_able(subject, each, found)]
    if not able:
        return "None of these can be deployed as it is"
    first = min(able, key=lambda each: each.p50(size))
    limit = interval(first.medians(size))[1]
    chosen = min((each for each in able if interval(each.medians(size))[0] <= limit), key=lambda each: each.bytes)
    most = max(able, key=lambda each: each.rate(each.best_size()))
    said = f"Deploy {chosen.name}: {chosen.p50(size):.3g} ms for a batch of {size}"
    if chosen.metric is not None:
        said += f", {evaluation.main_metric(subject.recipe).replace('_', ' ')} {chosen.metric:.4f}"
    if most is not chosen:
        best = most.best_size()
        said += f" ({most.name} gives most, {most.rate(best):,.0f}/s in batches of {best})"
    command = FORMATS[chosen.name].command
    if subject.run and subject.model:
        said += f"; {command.format(run=subject.run)}"
    return said if subject.run else f"{said}; untrained, so that accuracy is for a RUN to tell"


def _is_able(subject: Subject, measured: Measured, found: Sequence[Measured]) -> bool:
    if subject.model and not FORMATS[measured.name].command:
        return False
    metrics = [each.metric for each in found if each.metric is not None]
    if not metrics:
        return True
    if evaluation.main_metric(subject.recipe) == "accuracy":
        return measured.metric >= max(metrics) - MOST_LOSS
    return measured.metric <= min(metrics) * (1 + MOST_LOSS)
