"""Starts ranks that measure something together, and passes on what rank 0 writes as soon as it is there."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcai_cli.engine.benchmarks.collective import collective_ranks
from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.errors import HpcaiError
from hpcai_cli.launch import REGISTER_VARIABLE

_WAIT_SECONDS = 0.2
_OWN_WORDS = re.compile(r"error: .*|\w+Error: .*")


def records(launcher: Sequence[str | Path], task: Mapping, environment: Mapping[str, str]) -> Iterator[dict]:
    """Yield what the ranks of one job measure, by `collective_ranks.records`; however it ends, the ranks end with it.

    Args:
        launcher: the words that start them, as `rank_processes.launcher_words` returns them.
        task: what to measure, JSON values.
        environment: variables that they get beside ours.

    Raises:
        HpcaiError: a rank failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    with tempfile.TemporaryDirectory(prefix="hpcai-") as name:
        folder = Path(name)
        (folder / "task.json").write_text(json.dumps(task))
        (folder / "records").touch()
        # Open MPI refuses root; a `random.py` in the working folder must not be taken for Python's own.
        environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                   "PYTHONSAFEPATH": "1", REGISTER_VARIABLE: name, **environment}
        words = [*launcher, sys.executable, "-m", collective_ranks.__name__, folder / "task.json",
                 folder / "records"]
        with (folder / "said").open("wb") as said, _sigterm_interrupts():
            process = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stdout=said,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            try:
                yield from _written(process, folder / "records")
            finally:
                end_group(process)
        if process.returncode != 0:
            raise HpcaiError("the ranks of the benchmark failed", mend="run `hpcai doctor`",
                             received=_last_words(folder / "said"))


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


def _last_words(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if re.search(r"\w", line)]
    # Launchers have much to say after a rank's own words: our errors, and what ends a traceback.
    own = [match[0] for match in map(_OWN_WORDS.search, lines) if match]
    return (own or lines[-1:] or ["nothing"])[0]


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM, by which a batch system ends a job, do what Ctrl-C does; ranks would outlive us otherwise."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
