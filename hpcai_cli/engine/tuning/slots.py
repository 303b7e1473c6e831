"""Shares of this host's cores and GPUs, trainings that are started on them, and what they tell."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hpcai_cli import last_will, launch, run_lock
from hpcai_cli.engine import machine
from hpcai_cli.errors import EXIT_INTERRUPTED, EXIT_STOPPED, HpcaiError
from hpcai_cli.run import Run, read_json


class Slots:
    """Equal shares of the cores and GPUs that this process may use.

    Args:
        count: how many.
        np: processes of a training.

    Attributes:
        cores: of each.
    """

    def __init__(self, count: int, np: int):
        self.count, self._np = count, np
        self._all, self._gpus = sorted(os.sched_getaffinity(0)), machine.usable_gpus()
        self.cores = max(1, len(self._all) // count)

    def free(self, taken: Sequence[int]) -> int:
        """Return the first share that nobody has."""
        return min(set(range(self.count)) - set(taken))

    def start(self, slot: int, command: Sequence[object], log: Path) -> subprocess.Popen:
        """Start a program on a share; what it says goes to the end of `log`. It gets SIGTERM when this process ends."""
        # Of a job that this search is a part of, a trial is none.
        environment = launch.without_launcher()
        if self._gpus:
            first = slot * self._np
            # Once each: CUDA takes a list that names one twice for an empty one.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(
                self._gpus[number % len(self._gpus)] for number in range(first, first + self._np)))
        first = slot * self.cores % len(self._all)
        cores, ended_by_ours = self._all[first:first + self.cores], last_will.ended_by_ours()

        def prepare() -> None:
            os.sched_setaffinity(0, cores)
            if ended_by_ours:
                ended_by_ours()

        with log.open("ab") as stream:
            return subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL,
                                    stdout=subprocess.DEVNULL, stderr=stream, env=environment, preexec_fn=prepare,
                                    start_new_session=True)


def is_being_trained(run: Run) -> bool:
    """Tell whether a training has the run's folder, such as one whose search was killed and that is just ending."""
    try:
        if run.folder.exists():
            run_lock.check(run.folder)
    except HpcaiError:
        return True
    return False


def was_stopped(code: int) -> bool:
    """Tell whether a training ended because it was asked to, so that it can be gone on with."""
    return code in (EXIT_STOPPED, EXIT_INTERRUPTED, -signal.SIGTERM)


def epochs(events: bytes) -> list[dict]:
    """Return the complete epochs among lines of events.jsonl, of which a kill may have torn one."""
    found = []
    for line in events.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and event.get("event") == "epoch":
            found.append(event)
    return found


def cause(code: int, failure: Path, log: Path) -> str:
    """Say why a training failed: its failure.json, its last words, or the signal that ended it."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", as a kernel without memory does it" if name == "SIGKILL" else "")
    if failure.is_file():
        return str(read_json(failure).get("message", ""))[:500]
    lines = log.read_text(errors="replace").strip().splitlines()
    return (lines or ["no word"])[-1].removeprefix("error: ")[:500]
