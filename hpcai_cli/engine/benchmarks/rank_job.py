"""A job of several ranks that a benchmark starts: it ends with the block that waits for it, and says why it failed."""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpcai_cli.engine.environment.long_process import end_group
from hpcai_cli.errors import HpcaiError
from hpcai_cli.signals import sigterm_interrupts

_OWN_WORDS = re.compile(r"error: .*|\w+Error: .*")


@contextmanager
def started(words: Sequence[str | Path], what: str, folder: Path, *, environment: Mapping[str, str] | None = None,
            cores: Sequence[int] = ()) -> Iterator[subprocess.Popen]:
    """Run a command line while the block lasts, which should wait for its end.

    Args:
        words: the command line, with those that start several ranks.
        what: its name in an error.
        folder: one for what the ranks say.
        environment: variables that they get beside ours.
        cores: those that they share out among them; all when empty.

    Raises:
        HpcaiError: a rank failed.
        KeyboardInterrupt: Ctrl-C, or SIGTERM.
    """
    # A `random.py` in the working folder must not be taken for Python's own.
    environ = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
    mine = list(cores) or os.sched_getaffinity(0)
    with (folder / "said").open("w+b") as said, sigterm_interrupts():
        process = subprocess.Popen(words, env=environ, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   preexec_fn=lambda: os.sched_setaffinity(0, mine), start_new_session=True)
        try:
            yield process
        finally:
            # However this ends: ranks that went on would be in the way of whatever comes next.
            end_group(process)
        if process.returncode != 0:
            said.seek(0)
            raise HpcaiError(f"{what} failed with exit code {process.returncode}", mend="run `hpcai doctor`",
                             received=_first_words(said.read().decode(errors="replace")))


def _first_words(text: str) -> str:
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    # Launchers have much to say after a rank's own words: our errors, and what ends a traceback.
    own = [match[0] for match in map(_OWN_WORDS.search, lines) if match]
    return (own or lines[-1:] or ["nothing"])[0]
