"""Jobs of `hpcai benchmark scaling`: this program again, in some ranks, on cores of their own."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks import rank_job, results
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Table
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps
from hpcai_cli.launchers import Ranks


def cores_of_a_rank(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Return how many cores each rank gets, the same in all jobs, and the cores that there are.

    The largest job that has a core for each rank takes them all.
    """
    mine = sorted(os.sched_getaffinity(0))[:machine.cores()]
    return len(mine) // max((size for size in sizes if size <= len(mine)), default=len(mine)), mine


def packed(job: JobSteps) -> Table:
    """Return what a job has measured as `run` takes it out of its result."""
    return Table("scaling", "steps as measured", ("job",), ((job.to_json(),),))


def run(ranks: Ranks, cores: Sequence[int], words: Sequence[str]) -> JobSteps:
    """Run `hpcai benchmark scaling --here` in ranks, and return what it has measured.

    Args:
        cores: of this host, which they share out among them; all of each host when empty.
        words: further words of its command line.

    Raises:
        HpcaiError: it failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    # Rank 0 may be on another host, which sees this folder as well.
    with tempfile.TemporaryDirectory(prefix=".hpcai-", dir="." if ranks.hosts else None) as name:
        output, place = Path(name).absolute() / "steps", Path(name) / "ranks"
        place.mkdir()
        alone = ranks.np == 1 and not ranks.hosts
        command = [*(() if alone else ranks.words()), PROGRAM, "benchmark", "scaling", "--here", *words, "--output",
                   output, "--json"]
        what = f"a job of {ranks.np} rank{'s' if ranks.np > 1 else ''}"
        with rank_job.started(command, what, place, environment=ranks.environment(), cores=cores) as process:
            process.wait()
        return JobSteps.from_json(results.read(output)["tables"][0]["rows"][0][0])
