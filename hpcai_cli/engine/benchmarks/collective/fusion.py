"""Which fusion threshold and which cycle time of Horovod suit the gradients of a model on this host."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from hpcai_cli import console, launchers
from hpcai_cli.engine.benchmarks.collective import rank_jobs
from hpcai_cli.engine.benchmarks.collective.collective_report import NAME, size_text
from hpcai_cli.engine.benchmarks.measure import Figure, Table, interval, median, ratio
from hpcai_cli.engine.model import build, moving_statistics
from hpcai_cli.errors import HpcaiError
from hpcai_cli.recipe import Recipe

PASSES, ROUNDS = 2, 5
"""Ranks are started so often with each setting, and measure so many rounds each time."""
DEFAULT_THRESHOLD = 128 << 20
CYCLES = (0.25, 1.0, 4.0)
"""Milliseconds between two looks for work."""
AS_STARTED = "as hpcai starts its ranks"


def shapes_of(recipe: Recipe, build_model: Callable) -> list[tuple[int, ...]]:
    """Return the shapes of all that a training step of the recipe averages over the ranks: gradients and statistics."""
    model = build(recipe, build_model)
    return [tuple(variable.shape) for variable in (*model.trainable_variables, *moving_statistics(model))]


def measure(np: int, shapes: Sequence[Sequence[int]]) -> Iterator[Figure | Table]:
    """Start ranks with each setting of a small grid, and without any, and say which is best."""
    settings = _settings(4 * sum(map(math.prod, shapes)))
    task = {"shapes": [list(shape) for shape in shapes], "rounds": ROUNDS}
    seconds: dict[str, list[float]] = {}
    transport, failure = "", None
    try:
        for number in range(PASSES):
            for name, environment in settings.items():
                console.note(f"pass {number + 1} of {PASSES}: {name} ...")
                for record in rank_jobs.records(launchers.local(np), task, environment):
                    seconds.setdefault(name, []).extend(record["seconds"])
                    transport = record["transport"]
    except (KeyboardInterrupt, HpcaiError) as error:
        failure = error
    for name, values in seconds.items():
        yield median(NAME, f"step, {name}, {np} ranks, {transport}", [1e3 * value for value in values], "ms")
    if failure is not None:
        raise failure
    said = f"{np} ranks, {transport}"
    yield ratio(NAME, f"step as hpcai starts its ranks over the best setting's, {said}", seconds[AS_STARTED],
                seconds[_best(seconds)])
    verdict = verdict_of(seconds)
    console.note(f"fusion threshold and cycle time: {verdict}")
    yield Table(NAME, f"Fusion threshold and cycle time, {said}: {verdict}",
                ("setting", "ms a step", "from", "to", "HOROVOD_FUSION_THRESHOLD", "HOROVOD_CYCLE_TIME"),
                tuple(_row(name, values, settings[name]) for name, values in seconds.items()))


def _settings(total: int) -> dict[str, dict[str, str]]:
    """Return the variables of each setting by its name.

    Args:
        total: bytes of all gradients; thresholds above them are all the same.
    """
    thresholds = {"no fusion": 0, f"fusion of {size_text(total // 4096 * 1024)}": total // 4096 * 1024,
                  "all in one": DEFAULT_THRESHOLD}
    found = {AS_STARTED: {}}
    for said, threshold in thresholds.items():
        for cycle in CYCLES:
            found[f"{said}, cycles of {cycle:g} ms"] = {"HOROVOD_FUSION_THRESHOLD": str(threshold),
                                                        "HOROVOD_CYCLE_TIME": f"{cycle:g}"}
    return found


def verdict_of(seconds: Mapping[str, Sequence[float]]) -> str:
    """Say which setting is best and by how much, and whether that is more than chance.

    Args:
        seconds: of each setting the rounds' seconds a step; `AS_STARTED` is among them.
    """
    best = _best(seconds)
    if best == AS_STARTED:
        return "none was better than what hpcai sets"
    gain = statistics.median(seconds[AS_STARTED]) / statistics.median(seconds[best]) - 1
    said = f"{best}: steps {gain:.1%} faster than {AS_STARTED}"
    if interval(seconds[best])[1] >= interval(seconds[AS_STARTED])[0]:
        return f"{said}, which may be chance: the intervals overlap"
    return said


def _best(seconds: Mapping[str, Sequence[float]]) -> str:
    return min(seconds, key=lambda name: statistics.median(seconds[name]))


def _row(name: str, values: Sequence[float], environment: Mapping[str, str]) -> tuple:
    low, high = interval(values)
    return (name, 1e3 * statistics.median(values), 1e3 * low, 1e3 * high,
            environment.get("HOROVOD_FUSION_THRESHOLD", ""), environment.get("HOROVOD_CYCLE_TIME", ""))
