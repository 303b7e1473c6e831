"""Jobs of `hpcai benchmark scaling`: this program again, in some ranks, on cores of their own."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcai_cli import launch, rank_processes
from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks import results
from hpcai_cli.engine.benchmarks.measure import PROGRAM, Table
from hpcai_cli.engine.benchmarks.scaling.scaling_results import JobSteps
from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.errors import HpcaiError


def cores_of_a_rank(sizes: Sequence[int]) -> tuple[int, list[int]]:
    """Return how many cores each rank gets, the same in all jobs, and the cores that there are.

    The largest job that has a core for each rank takes them all.
    """
    mine = sorted(os.sched_getaffinity(0))[:machine.cores()]
    return len(mine) // max((size for size in sizes if size <= len(mine)), default=len(mine)), mine


def packed(job: JobSteps) -> Table:
    """Return what a job has measured as `run` takes it out of its result."""
    return Table("scaling", "steps as measured", ("job",), ((job.to_json(),),))


def run(size: int, cores: list[int], words: Sequence[str]) -> JobSteps:
    """Run `hpcai benchmark scaling --here` in so many ranks on these cores, and return what it has measured.

    Args:
        words: further words of its command line.

    Raises:
        HpcaiError: it failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="hpcai-") as name:
        output, said = Path(name) / "steps", Path(name) / "said"
        command = [*(rank_processes.launcher_words(size) if size > 1 else ()), PROGRAM, "benchmark", "scaling",
                   "--here", *words, "--output", output, "--json"]
        # The ranks share out these cores as those of `hpcai train --np` do. Open MPI refuses root.
        environment = {**os.environ, launch.REGISTER_VARIABLE: name, "OMPI_ALLOW_RUN_AS_ROOT": "1",
                       "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        with said.open("wb") as stream, sigterm_interrupts():
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                       stderr=stream, preexec_fn=lambda: os.sched_setaffinity(0, cores),
                                       start_new_session=True)
            try:
                process.wait()
            finally:
                # However this ends: ranks that went on would be in the way of whatever comes next.
                end_group(process)
        if process.returncode != 0:
            raise HpcaiError(f"a job of {size} rank{'s' if size > 1 else ''} failed with exit code "
                             f"{process.returncode}", received=_first_error(said))
        return JobSteps.from_json(results.read(output)["tables"][0]["rows"][0][0])


def _first_error(said: Path) -> str:
    lines = said.read_text(errors="replace").splitlines()
    # Launchers have much to say after a rank's own words.
    return next((line[line.index("error: "):] for line in lines if "error: " in line), (lines or ["nothing"])[-1])


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, by which a batch system ends a job, do what Ctrl-C does, so that the ranks end with this process."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
