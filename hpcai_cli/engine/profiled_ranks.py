"""The ranks of a job that is to be profiled, ready for Horovod's timeline."""

import os
from pathlib import Path

from hpcai_cli import console
from hpcai_cli.engine import distributed
from hpcai_cli.engine.distributed import Horovod, Serial


def join() -> Serial | Horovod:
    """Join the job as `distributed.start` does, so that a timeline can be written later."""
    # Horovod looks at this only when it starts. A user's own value is refused later, with the request's other faults.
    os.environ.setdefault("HOROVOD_TIMELINE", "DYNAMIC")
    ranks = distributed.start()
    if ranks.size > 1 and ranks.rank == 0:
        _calm_timeline_writer()
    return ranks


def _calm_timeline_writer() -> None:
    """Let Horovod's timeline writer run only when nobody else wants its core.

    It looks for work without a pause, from Horovod's start to its end, and would take its share of the cores that the
    ranks compute on. It is the last thread that Horovod starts.
    """
    def age(thread: Path) -> tuple[int, int]:
        return int((thread / "stat").read_text().rpartition(")")[2].split()[19]), int(thread.name)

    try:
        newest = max(Path("/proc/self/task").iterdir(), key=age)
        os.sched_setscheduler(int(newest.name), os.SCHED_IDLE, os.sched_param(0))
    except OSError as error:
        console.note(f"the timeline's writer takes a core beside rank 0: {error}")
