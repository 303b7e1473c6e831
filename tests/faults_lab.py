"""Where the fault harness trains: a folder with recipe and data, and trainings as real processes."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults_left import Left

from hpcai_cli import launch

PROGRAM = str(Path(sys.executable).parent / "hpcai")
EVERY = 20
"""Steps between two checkpoints."""
START_SECONDS = 300
"""In which a training begins and ends; the machine may be busy."""
_MARK = "FAULTS_TRIAL"


@dataclass(frozen=True)
class Mark:
    """When a step or a batch of an evaluation began, by time.monotonic()."""

    kind: str
    number: int
    moment: float


class Lab:
    """A folder with the recipe, its data, and the trainings on them.

    Attributes:
        random: what is left to chance; the same for the same seed.
    """

    def __init__(self, folder: Path, seed: int):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder, self.random, self._numbers = folder.resolve(), random.Random(seed), itertools.count(1)
        shutil.copy(Path(__file__).with_name("faults_recipe.py"), self.folder / "faults.py")
        self.hpcai("preprocess", "./faults.py", "--source", "sample", "--output", "data.h5")

    def environment(self) -> dict[str, str]:
        """Return the variables of each process: without a launcher's, with a cache of its own."""
        return {**launch.without_launcher(), "HPCAI_CACHE": str(self.folder / "cache")}

    def hpcai(self, *words: object) -> None:
        """Run a command that is to succeed."""
        done = subprocess.run([PROGRAM, *map(str, words)], cwd=self.folder, env=self.environment(),
                              capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            sys.exit(f"hpcai {' '.join(map(str, words))}: {done.stderr}")

    def train(self, run: str, *words: object, np: int = 1, environment: dict[str, str] | None = None,
              data: str = "data.h5") -> "Trial":
        """Start a training, or go on with it where there is something of it."""
        place = ["--resume", run] if (self.folder / run / "recipe.json").exists() else [
            "--output", run, "./faults.py", "--data", data]
        # Two ranks take half of the batch each, so that they have as many steps as one.
        size = ["--np", np, "--batch-size", 8] if np > 1 else []
        return Trial(self, run, [PROGRAM, "train", *place, *size, "--checkpoint-every", f"{EVERY}steps", *words],
                     np, next(self._numbers), environment or {})

    def whole(self, np: int = 1) -> "Left":
        """Return what a training leaves that nobody disturbs."""
        run = f"whole-{np}"
        if not (self.folder / run / "result.json").exists():
            trial = self.train(run, np=np)
            if trial.wait():
                sys.exit(f"the undisturbed training fails: {trial.said()}")
        return self.left(run)

    def left(self, run: str) -> "Left":
        """Return what a run has in its folder."""
        return Left(self.folder / run)

    def finished(self, run: str, *words: object, np: int = 1) -> list[str]:
        """Go on with a run to its end, and return what is wrong with what it leaves."""
        if (self.folder / run / "result.json").exists():
            return self.left(run).differences(self.whole(np))
        return self.finished_by(self.train(run, *words, np=np))

    def finished_by(self, trial: "Trial") -> list[str]:
        """Wait for the end of a training, and return what is wrong with what it leaves."""
        if code := trial.wait():
            return [f"{trial.run} ends with exit code {code}: {trial.said()[-500:]}"]
        return self.left(trial.run).differences(self.whole(trial.np))


class Trial:
    """A start of `hpcai train`: its processes, what they say and where they are.

    Attributes:
        run: its folder's name.
        np: how many ranks it has.
        process: the one that was started; with several ranks the parent of all.
        began: time.monotonic() of the start.
    """

    def __init__(self, lab: Lab, run: str, words: list[object], np: int, number: int,
                 environment: dict[str, str]):
        self.run, self.np, self._folder = run, np, lab.folder / run
        name = f"{number:04d}-{run.replace('/', '-')}"
        self._name, self._log, self._marks = (lab.folder / f"{name}{kind}" for kind in ("", ".log", ".marks"))
        self._events_before = _size(self._folder / "events.jsonl")
        self.began = time.monotonic()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                list(map(str, words)), cwd=lab.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                env=lab.environment() | {_MARK: str(self._name), "FAULTS_MARKS": str(self._marks)} | environment)

    # ---- What it says ----------------------------------------------------------------------------------------------

    def said(self) -> str:
        """Return its output."""
        return self._log.read_text(errors="replace")

    def events(self, kind: str = "") -> list[dict]:
        """Return the events that it has written, all or those of a kind."""
        with contextlib.suppress(OSError), (self._folder / "events.jsonl").open("rb") as stream:
            stream.seek(self._events_before)
            found = [json.loads(line) for line in stream if line.endswith(b"\n") and line.strip()]
            return [event for event in found if kind in ("", event["event"])]
        return []

    def marks(self, kind: str, rank: int = 0) -> list[Mark]:
        """Return the steps, or batches of evaluations, that a rank has begun."""
        with contextlib.suppress(OSError):
            rows = (line.split() for line in Path(f"{self._marks}.{rank}").read_text().splitlines())
            return [Mark(row[0], int(row[1]), float(row[2])) for row in rows if len(row) == 3 and row[0] == kind]
        return []

    def reached(self, default: int) -> int:
        """Return how far it has come: steps of the training that were begun; the default where it began none."""
        return max((mark.number // self.np + 1 for mark in self.marks("step")), default=default)

    def is_writing(self) -> bool:
        """Tell whether a checkpoint is being written, or was when it was killed."""
        with contextlib.suppress(OSError):
            return any(name.endswith(".part") for name in os.listdir(self._folder / "checkpoints"))
        return False

    # ---- Its processes ---------------------------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Return all processes that came of it, those too whose parent is gone."""
        return [pid for pid, _ in self._found()]

    def rank(self, number: int) -> int:
        """Return the process of a rank.

        Raises:
            LookupError: there is none.
        """
        names = (f"HOROVOD_RANK={number}".encode(), f"OMPI_COMM_WORLD_RANK={number}".encode())
        for pid, environment in self._found():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if any(name in environment for name in names) and PROGRAM.encode() in words[:2]:
                    return pid
        raise LookupError(f"no rank {number}")

    def signal(self, number: int, processes: list[int] | None = None) -> float:
        """Send a signal to some of its processes, to all by default; return when it had been sent."""
        processes = self.processes() if processes is None else processes
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return time.monotonic()

    def kill(self, known: list[int] | None = None) -> None:
        """Kill all of its processes, those first that are known already, and wait until they are gone."""
        self.signal(signal.SIGKILL, known or [])
        while left := self.processes():
            self.signal(signal.SIGKILL, left)
            self._reap()
            time.sleep(0.01)
        self._reap()

    def wait(self, seconds: float = START_SECONDS) -> int | None:
        """Return its exit code, None where it has not ended in time; it is killed then."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def wait_until(self, condition: Callable[[], object], seconds: float = START_SECONDS, pause: float = 0.005) -> bool:
        """Wait for a condition; return whether it came about before the training ended or the time was over."""
        end = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(pause)
        return True

    def _found(self) -> Iterator[tuple[int, list[bytes]]]:
        name = f"{_MARK}={self._name}".encode()
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                environment = Path(f"/proc/{int(entry)}/environ").read_bytes().split(b"\0")
                if name in environment:
                    yield int(entry), environment

    def _reap(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.01)


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):
        return path.stat().st_size
    return 0
