"""Scaling: weak and strong, over numbers of ranks, with a model that is drawn on to more than there are here.

Each size is a job of its own: this program again, pinned to as many cores as its ranks need, which measures steps in
its ranks (scaling_ranks). Under a launcher it measures the job that it was started in, and no other.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hpcai_cli import console, host_check, launch, launchers
from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.engine.benchmarks.scaling import scaling_jobs, scaling_projection, scaling_results, scaling_trainings
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps
from hpcai_cli.errors import MissingError, UsageError
from hpcai_cli.launchers import Ranks
from hpcai_cli.recipe import Recipe

ROUNDS = 2
"""Jobs of each size, in turn; each measures each step several times."""
LARGE = 16
"""Batches of a large step, and the least that strong scaling shares out."""
SMALL = 16
"""A small step has one of so many parts of a batch; it tells the model what a step costs beside its images."""
RANKS_PER_CORE = 4
"""More than that is refused."""
RANK_BYTES = 900_000_000
"""Memory of a rank: TensorFlow, and the networks of all sizes of steps."""


@dataclass(frozen=True)
class Subject:
    """What is trained."""

    recipe: Recipe
    reference: str
    """What finds the recipe again."""
    build_model: Callable
    augment: Callable | None
    data: Path


@dataclass(frozen=True)
class Request:
    """What is measured."""

    sizes: tuple[int, ...] = ()
    """Numbers of ranks; by default the powers of two up to the cores, or that of the job that this process is in."""
    mode: str = "both"
    """weak, strong or both."""
    most: int = 1024
    """Up to how many ranks the model is drawn."""
    total: int = 0
    """Images a step of the whole job in strong scaling; by default LARGE batches, or more until all sizes divide."""
    seconds: float = 0.2
    """How long each kind of step is measured at a time."""
    here: bool = False
    """Whether this process is one of a job that the benchmark has started."""
    on: Ranks | None = None
    """The largest job, where what starts its ranks was chosen."""


def measure(subject: Subject, request: Request) -> Iterator[Figure | Table | Curves]:
    """Check what can be checked before the start, and return what is measured as it comes.

    Raises:
        DataError: the data don't fit the recipe.
        MissingError: Horovod, a second core, or memory is missing.
        UsageError: numbers of ranks that this host lacks, or images that they don't divide or the data don't have.
    """
    with console.quiet():
        from hpcai_cli.engine.store import Dataset, check_fits

    place, dataset = launch.place(), Dataset(subject.data)
    check_fits(dataset, subject.recipe)
    if place.size > 1 and not request.here and request.sizes:
        raise UsageError(f"{place.launcher} has started {place.size} processes already", expected="no --np",
                         mend=f"leave it out, or start `hpcai` without {place.launcher}",
                         received=",".join(map(str, request.sizes)))
    if place.size > 1 or request.here:
        plan = _Plan.of(subject, request, (place.size,))
        return _job_itself(subject, plan) if request.here else _in_this_job(subject, plan)
    on = request.on
    if on and on.hosts:
        sizes = request.sizes or _sizes_on(on)
        _check_hosts(on, sizes)
        host_check.check(on, [subject.data.absolute()])
    else:
        sizes = request.sizes or _default_sizes()
        _check_ranks(max(sizes))
    plan = _Plan.of(subject, request, sizes)
    _check_images(plan, dataset.split("train").inputs, on)
    return _in_jobs(subject, plan, on or launchers.local(max(sizes)))


@dataclass(frozen=True)
class _Plan:
    """The request with all that follows from it."""

    sizes: tuple[int, ...]
    mode: str
    most: int
    total: int
    weak: tuple[int, ...]
    """Images a step and rank."""
    small: int
    seconds: float

    @classmethod
    def of(cls, subject: Subject, request: Request, sizes: tuple[int, ...]) -> "_Plan":
        """Settle what the request leaves open.

        Raises:
            UsageError: the ranks don't divide the images of strong scaling.
        """
        batch, multiple = subject.recipe.batch_size, math.lcm(*sizes)
        total = request.total or -(-LARGE // multiple) * multiple * batch
        if any(total % size for size in sizes):
            raise UsageError(f"{total} images a step cannot be shared out evenly",
                             expected=f"a multiple of {multiple}", received=total)
        return cls(sizes, request.mode, request.most, total, (batch, LARGE * batch),
                   max(1, batch // SMALL), request.seconds)

    @property
    def series(self) -> list[scaling_results.Series]:
        return scaling_results.series(self.mode, self.sizes, self.weak, self.total)

    @property
    def fitted(self) -> set[int]:
        """Images of the steps that the model is fitted to."""
        return {self.small, *self.weak}

    def images(self, ranks: int) -> set[int]:
        """Return the images a rank takes in the steps of a job of so many ranks."""
        return self.fitted | ({self.total // ranks} if self.mode != "weak" else set())


# ---- What is there -------------------------------------------------------------------------------------------------

def _default_sizes() -> tuple[int, ...]:
    cores = machine.cores()
    if cores < 2:
        raise MissingError("scaling needs a second core", expected="two cores or more",
                           mend="give --np 1,2 to let ranks share one", received=cores)
    return tuple(2**power for power in range(cores.bit_length()))


def _check_ranks(most: int) -> None:
    cores = machine.cores()
    if most > RANKS_PER_CORE * cores:
        raise UsageError(f"this host has {cores} cores for {most} ranks",
                         expected=f"at most {RANKS_PER_CORE * cores} ranks, {RANKS_PER_CORE} a core",
                         mend="start more on several hosts, as in `horovodrun -np 8 -H a:4,b:4 hpcai benchmark "
                              "scaling`", received=most)
    if most > 1:
        launch.require_horovod(most)


def _sizes_on(on: Ranks) -> tuple[int, ...]:
    """Return the ranks of one host, of two, four and so on, and of all."""
    count, slots = len(on.hosts), on.hosts[0].slots
    return tuple(sorted({slots * number for number in (*(2**power for power in range(count.bit_length())), count)}))


def _check_hosts(on: Ranks, sizes: tuple[int, ...]) -> None:
    slots = {host.slots for host in on.hosts}
    if len(slots) > 1 or any(size % min(slots) for size in sizes):
        raise UsageError("each host has to take the same number of ranks, and each job whole hosts, so that a rank has "
                         "the same cores in all jobs", received=",".join(map(str, on.hosts)),
                         expected=f"--np with multiples of {min(slots)}" if len(slots) == 1 else "equal numbers")


def _check_images(plan: _Plan, inputs, on: Ranks | None) -> None:
    """Check that the data have, and memory holds, what a step takes; `inputs` are the training split's."""
    images, most = plan.total // plan.sizes[0], max(plan.sizes)
    if plan.mode != "weak" and images > len(inputs):
        raise UsageError(f"a step of {images:,} images a rank is more than the training split has",
                         expected=f"--total-images of at most {len(inputs) * plan.sizes[0]}", received=plan.total)
    memory = machine.memory_bytes()[1]
    # A step's images lie in the pipeline's buffer and in TensorFlow's.
    here = on.hosts[0].slots if on and on.hosts else most
    needed = max(min(size, here) * (RANK_BYTES + 2 * max(plan.images(size)) * inputs[:1].nbytes) for size in plan.sizes)
    if memory and needed > memory:
        raise MissingError(f"{here} ranks need about {needed / 1e9:.1f} GB of memory", expected="memory for each rank",
                           mend="give a smaller --np or --total-images", received=f"{memory / 1e9:.1f} GB free")


# ---- Jobs ----------------------------------------------------------------------------------------------------------

def _job_itself(subject: Subject, plan: _Plan) -> Iterator[Table]:
    """Yield what the ranks of this job measure, for the process that started them."""
    yield scaling_jobs.packed(_measure_here(subject, plan))


def _in_this_job(subject: Subject, plan: _Plan) -> Iterator[Figure | Table | Curves]:
    yield from _told({plan.sizes[0]: _measure_here(subject, plan)}, plan)


def _measure_here(subject: Subject, plan: _Plan) -> JobSteps:
    with console.quiet():
        from hpcai_cli.engine import distributed
        from hpcai_cli.engine.benchmarks.scaling import scaling_ranks

        ranks = distributed.start()
    found = scaling_ranks.measure(subject.recipe, subject.build_model, subject.augment, subject.data,
                                  scaling_projection.kinds(plan.images(ranks.size)), ranks, plan.seconds)
    ranks.stop()
    return found


def _in_jobs(subject: Subject, plan: _Plan, on: Ranks) -> Iterator[Figure | Table | Curves]:
    share, cores = scaling_jobs.cores_of_a_rank(plan.sizes)
    words = ["--recipe", subject.reference, "--data", str(subject.data.absolute()), "--mode", plan.mode,
             "--total-images", str(plan.total), "--seconds", str(plan.seconds)]
    jobs: dict[int, JobSteps] = {}
    try:
        for number in range(ROUNDS):
            for size in plan.sizes:
                console.note(f"round {number + 1} of {ROUNDS}: steps of {size} rank{'s' if size > 1 else ''}")
                enough = cores[:size * share] if size * share <= len(cores) else cores
                # The ranks share out these cores as those of `hpcai train --np` do.
                found = scaling_jobs.run(on.first(size), () if on.hosts else enough, words)
                jobs[size] = jobs[size].joined(found) if size in jobs else found
    except KeyboardInterrupt:
        # What was measured is kept, where there is anything to compare.
        if len(jobs) == len(plan.sizes):
            yield from _told(jobs, plan)
        raise
    yield from _told(jobs, plan)
    own = max((size for size in plan.sizes if size * share <= len(cores)), default=1)
    if own > 1 and plan.mode != "strong" and not on.hosts:
        ours = [cores[rank * share:(rank + 1) * share] for rank in range(own)]
        yield from scaling_trainings.measure(subject.reference, subject.data, subject.recipe.batch_size, ours)


def _told(jobs: dict[int, JobSteps], plan: _Plan) -> Iterator[Figure | Table | Curves]:
    for size, job in jobs.items():
        if not job.own_cores:
            console.note(f"{size} ranks share cores here: oversubscribed; their figures judge nothing")
    yield from scaling_results.found(jobs, plan.series)
    yield from scaling_projection.found(jobs, plan.series, plan.fitted, plan.most)
