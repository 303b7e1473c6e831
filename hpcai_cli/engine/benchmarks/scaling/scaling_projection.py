"""The model of a step of `hpcai benchmark scaling`: fitted, checked on sizes left out, drawn on to more ranks."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from hpcai_cli import console
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.engine.benchmarks.scaling import projection
from hpcai_cli.engine.benchmarks.scaling.projection import Costs, Observation
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps, Kind, Series, baseline, rates

PRODUCTS = (16, 32, 64)
"""Products of two matrices in a made-up step; of the one in the middle nothing is fitted."""
BYTES = (1 << 16, 1 << 20, 1 << 22, 1 << 23)
"""Gradients of a made-up step; of the last but one nothing is fitted."""
LIMIT = 0.10


@dataclass(frozen=True)
class _Known:
    """A measured step, and whether it is left out of the fit that is checked."""

    of: str
    left_out: bool
    step: Observation


def kinds(images: set[int]) -> list[Kind]:
    """Return the steps that a job measures: the recipe's of so many images, and the made-up ones."""
    return [*(Kind("recipe", each, 0) for each in sorted(images)),
            *(Kind("made-up", products, size) for products in PRODUCTS for size in BYTES)]


def found(jobs: Mapping[int, JobSteps], many: list[Series], fitted: set[int], most: int
          ) -> Iterator[Figure | Table | Curves]:
    """Yield how far the model is off where it was not fitted, and what it says of up to `most` ranks.

    The model is of each step's fastest round; figures and tables of what was measured are medians.

    Args:
        jobs: by their number of ranks; those whose ranks share cores say nothing.
        fitted: images of one rank in the steps that are fitted, of those with averaging only the fewest.
    """
    jobs = {size: job for size, job in jobs.items() if job.own_cores}
    if max(jobs, default=1) == 1:
        return
    known = _known(jobs, fitted)
    yield from _checked(known)
    costs = _fit(known)["recipe"]
    yield Figure("scaling", "model: latency of averaging between two ranks", costs.latency * 1e3, "ms")
    if costs.transfer > 0:
        yield Figure("scaling", "model: bytes that a rank sends", 1e-9 / costs.transfer, "GB/s")
    size = next(each.step.bytes for each in known if each.of == "recipe")
    console.note("projected as if all ranks were connected as these are; where distances double is the hopeful line, a "
                 "ring the cautious one")
    for one in many:
        yield from _drawn(one, jobs, costs, size, most)


def _known(jobs: Mapping[int, JobSteps], fitted: set[int]) -> list[_Known]:
    several = sorted(size for size in jobs if size > 1)
    # With two such sizes the larger is told from the smaller; one alone is needed for the fit.
    left_out_ranks = several[-1] if len(several) > 1 else None
    found = []
    for size, job in jobs.items():
        for measured in job.steps:
            kind = measured.kind
            inner = (kind.units == PRODUCTS[1] or kind.bytes == BYTES[-2] if kind.of == "made-up"
                     else kind.units not in fitted or measured.averaged and kind.units != min(fitted))
            # The fastest round: whatever else runs on a machine adds to a step, and is no part of what it costs.
            found.append(_Known(kind.of, inner or size == left_out_ranks, Observation(
                size, kind.units, kind.bytes, measured.averaged, min(measured.slowest()))))
    return found


def _fit(known: list[_Known]) -> dict[str, Costs]:
    """Take the time of a byte from the made-up steps, which have several sizes of gradients, and the rest of each kind
    of steps from itself."""
    averaging = projection.fit([each.step for each in known if each.of == "made-up"])
    recipe = [each.step for each in known if each.of == "recipe"]
    return {"made-up": averaging, "recipe": projection.fit(recipe, averaging.algorithm, averaging.transfer)}


def _checked(known: list[_Known]) -> Iterator[Figure | Table]:
    costs = _fit([each for each in known if not each.left_out])
    rows, worst = [], {}
    for each in known:
        if each.left_out:
            error = projection.errors(costs[each.of], [each.step])[0]
            worst[each.of] = max(worst.get(each.of, 0.0), abs(error))
            rows.append((each.of, each.step.ranks, each.step.units, each.step.bytes, each.step.averaged,
                         each.step.seconds * 1e3, each.step.seconds * (1 + error) * 1e3, error))
    yield Table("scaling", "The model on sizes that were left out of its fit",
                ("steps", "ranks", "images or products", "bytes", "averaged", "measured, ms", "model, ms", "error"),
                tuple(rows))
    for of, error in worst.items():
        yield Figure("scaling", f"model: largest error on {of} steps left out", error, "share", LIMIT, at_most=True)


def _drawn(one: Series, jobs: Mapping[int, JobSteps], costs: Costs, size: int, most: int) -> Iterator[Table | Curves]:
    """Yield the projection of one series; strong scaling ends where each rank has one image."""
    measured_first = statistics.median(baseline(jobs, one))
    smallest = min(jobs)
    # By the model too, so that its error on the first size does not look like a gain or a loss.
    first = one.images_at(smallest) / costs.seconds(smallest, one.images_at(smallest), size, averaged=False)
    last = min(most, round(one.images_at(1))) if one.is_strong else most
    if last <= max(jobs):
        return
    sizes = projection.sizes_up_to(last, sorted(jobs))
    images = {ranks: one.images_at(ranks) for ranks in sizes}
    by_algorithm = {name: projection.projected(costs.with_algorithm(name), sizes, images, size)
                    for name in projection.GROWTH}
    rows = [(ranks, "measured too" if ranks in jobs else "projected",
             *(value for said in by_algorithm.values() for value in (
                 said[ranks]["rate"], said[ranks]["rate"] / ranks / first, said[ranks]["communication"])))
            for ranks in sizes]
    columns = [f"{what}, {name}" for name in by_algorithm for what in ("images/s", "efficiency", "communication")]
    yield Table("scaling", f"Projection, not measured: {one.name}", ("ranks", "this size", *columns),
                tuple(rows))
    lines = {"measured": tuple((ranks, statistics.median(rates(job, one.images[ranks])) / ranks / measured_first)
                               for ranks, job in sorted(jobs.items())),
             **{f"projected, {name}": tuple((ranks, said[ranks]["rate"] / ranks / first) for ranks in sizes)
                for name, said in by_algorithm.items()},
             "ideal": ((sizes[0], 1.0), (sizes[-1], 1.0))}
    yield Curves("scaling", f"Projection, not measured: {one.name}", "ranks", "efficiency", lines, "x")
