"""Starts ranks that measure something together, and passes on what rank 0 writes as soon as it is there."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from hpcai_cli.engine.benchmarks import rank_job
from hpcai_cli.engine.benchmarks.collective import collective_ranks
from hpcai_cli.launchers import Ranks

_WAIT_SECONDS = 0.2


def records(ranks: Ranks, task: Mapping, environment: Mapping[str, str]) -> Iterator[dict]:
    """Yield what the ranks of one job measure, by `collective_ranks.records`; however it ends, the ranks end with it.

    Args:
        ranks: how many, and what starts them.
        task: what to measure, JSON values.
        environment: variables that they get beside ours.

    Raises:
        HpcaiError: a rank failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="hpcai-") as name:
        folder, place = Path(name), Path(name) / "ranks"
        (folder / "task.json").write_text(json.dumps(task))
        (folder / "records").touch()
        place.mkdir()
        words = [*ranks.words(), sys.executable, "-m", collective_ranks.__name__, folder / "task.json",
                 folder / "records"]
        environ = ranks.environment() | environment
        with rank_job.started(words, "a job of the benchmark", place, environment=environ) as process:
            yield from _written(process, folder / "records")


def _written(process: subprocess.Popen, path: Path) -> Iterator[dict]:
    begun = ""
    with path.open() as stream:
        while True:
            is_over = process.poll() is not None
            for line in stream:
                begun += line
                if begun.endswith("\n"):
                    yield json.loads(begun)
                    begun = ""
            if is_over:
                return
            time.sleep(_WAIT_SECONDS)
