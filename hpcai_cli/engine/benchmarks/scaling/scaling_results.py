"""What `hpcai benchmark scaling` makes of measured steps: rates, efficiency, communication, the slowest rank."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table, median, ratio


@dataclass(frozen=True)
class Kind:
    """One kind of step."""

    of: str
    """`recipe` or `made-up`."""
    units: int
    """What one rank does in a step: images, or products of two matrices."""
    bytes: int
    """Size of the gradients; 0 where the recipe decides."""


@dataclass(frozen=True)
class Measured:
    """How long one kind of step took."""

    kind: Kind
    averaged: bool
    """Whether the gradients were averaged over the ranks."""
    seconds: list[list[float]]
    """Of a step: for each round that of each rank."""

    def slowest(self) -> list[float]:
        """Return for each round the seconds of the slowest rank."""
        return [max(each) for each in self.seconds]

    def by_rank(self) -> list[float]:
        """Return for each rank the median of its seconds."""
        return [statistics.median(each) for each in zip(*self.seconds, strict=True)]


@dataclass(frozen=True)
class JobSteps:
    """What a job of some ranks has measured."""

    names: list[str]
    """Of each rank: its number, host and cores."""
    own_cores: bool
    """Whether no core belongs to two ranks."""
    steps: list[Measured]

    def find(self, images: int, *, averaged: bool) -> Measured:
        """Return the recipe's steps of so many images a rank."""
        averaged = averaged and len(self.names) > 1
        return next(step for step in self.steps if step.kind.of == "recipe" and step.kind.units == images
                    and step.averaged == averaged)

    def joined(self, later: "JobSteps") -> "JobSteps":
        """Return the rounds of both."""
        steps = [Measured(one.kind, one.averaged, one.seconds + other.seconds)
                 for one, other in zip(self.steps, later.steps, strict=True)]
        return JobSteps(later.names, self.own_cores and later.own_cores, steps)

    def to_json(self) -> dict:
        """Return it as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: dict) -> "JobSteps":
        """Return what `to_json` has given."""
        steps = [Measured(Kind(**row["kind"]), row["averaged"], row["seconds"]) for row in document["steps"]]
        return cls(document["names"], document["own_cores"], steps)


@dataclass(frozen=True)
class Series:
    """One way to grow: the same images for each rank (weak), or for the whole job (strong)."""

    name: str
    images: Mapping[int, int]
    """Images of one rank in a step, by the number of ranks."""

    def images_at(self, ranks: int) -> float:
        """Return the images of one rank in a step of any number of ranks."""
        if len(set(self.images.values())) == 1 and not self.is_strong:
            return next(iter(self.images.values()))
        measured = next(iter(self.images))
        return self.images[measured] * measured / ranks

    @property
    def is_strong(self) -> bool:
        """Tell whether the job's images stay the same."""
        return self.name.startswith("strong")


def series(mode: str, sizes: tuple[int, ...], weak: tuple[int, ...], total: int) -> list[Series]:
    """Return what is measured.

    Args:
        mode: weak, strong or both.
        weak: images a step and rank.
        total: images a step of the whole job, which all sizes divide.
    """
    found = []
    if mode != "strong":
        found += [Series(f"weak, {images:,} images a step and rank", dict.fromkeys(sizes, images)) for images in weak]
    if mode != "weak":
        found.append(Series(f"strong, {total:,} images a step", {size: total // size for size in sizes}))
    return found


def baseline(jobs: Mapping[int, JobSteps], one: Series) -> list[float]:
    """Return for each round the images per second of one rank of the smallest job, without averaging."""
    smallest = min(jobs)
    return [one.images[smallest] / seconds
            for seconds in jobs[smallest].find(one.images[smallest], averaged=False).slowest()]


def rates(job: JobSteps, images: int, *, averaged: bool = True) -> list[float]:
    """Return for each round the images per second of the whole job."""
    return [len(job.names) * images / seconds for seconds in job.find(images, averaged=averaged).slowest()]


def found(jobs: Mapping[int, JobSteps], many: list[Series]) -> Iterator[Figure | Table | Curves]:
    """Yield what the steps say, each series with its table and its picture.

    Efficiency is against the ranks of the smallest job, without averaging; `unconnected` that of these same ranks
    without averaging; `slower by` what the slowest rank computes longer than the mean. Of ranks that share cores there
    is a row, and no figure.
    """
    for one in many:
        each = [(size, jobs[size]) for size in sorted(jobs)]
        base = baseline(jobs, one)
        for size, job in each:
            if job.own_cores:
                yield from _figures(size, job, one, base, is_first=size == min(jobs))
        yield Table("scaling", f"Scaling, {one.name}",
                    ("ranks", "images/s", "efficiency", "unconnected", "communication", "slowest rank", "slower by",
                     "cores"),
                    tuple(_row(size, job, one, base) for size, job in each))
        measured = tuple((size, statistics.median(rates(job, one.images[size]))) for size, job in each)
        first = statistics.median(base)
        yield Curves("scaling", f"Scaling, {one.name}", "ranks", "images/s",
                     {"measured": measured, "ideal": tuple((size, size * first) for size, _ in measured)})


def _figures(size: int, job: JobSteps, one: Series, base: list[float], *, is_first: bool) -> Iterator[Figure]:
    images, said = one.images[size], f"{one.name}: {size} rank{'s' if size > 1 else ''}"
    rate = rates(job, images)
    yield median("scaling", said, rate, "images/s")
    if size > 1:
        ideal = [size * each for each in base]
        yield ratio("scaling", f"{said}, efficiency", rate, ideal)
        if not is_first:
            yield ratio("scaling", f"{said}, unconnected", rates(job, images, averaged=False), ideal)
        yield median("scaling", f"{said}, communication", _communication(job, images), "share")


def _communication(job: JobSteps, images: int) -> list[float]:
    """Return for each round which share of a step averaging took, beyond waiting for the slowest rank."""
    whole, alone = (job.find(images, averaged=averaged).slowest() for averaged in (True, False))
    return [1 - without / seconds for seconds, without in zip(whole, alone, strict=True)]


def _row(size: int, job: JobSteps, one: Series, base: list[float]) -> tuple:
    images = one.images[size]
    first, rate, apart = (statistics.median(values) for values in (
        base, rates(job, images), rates(job, images, averaged=False)))
    alone = job.find(images, averaged=False).by_rank()
    slowest = max(range(size), key=alone.__getitem__)
    return (size, rate, rate / size / first, apart / size / first,
            statistics.median(_communication(job, images)) if size > 1 else None,
            job.names[slowest], alone[slowest] / statistics.mean(alone) - 1 if size > 1 else None,
            "own" if job.own_cores else "shared")
