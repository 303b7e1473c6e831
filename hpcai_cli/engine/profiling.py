"""Profiles chosen steps of a training: TensorBoard's trace, Horovod's timeline, and how long each part takes."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tensorflow as tf

from hpcai_cli import launch
from hpcai_cli.engine import distributed, machine, profile_files, profile_summary
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.pipeline import Block
from hpcai_cli.engine.timed_ranks import TimedRanks
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import write_bytes, write_json

KEPT = 200
"""Blocks before the chosen ones that are remembered, the last of them."""
FEWEST_BEFORE = 3
"""Blocks before the chosen ones whose median tells how long a step takes without a trace."""


@dataclass
class _Times:
    """Seconds of some steps on one rank, as Python sees them; compute is with what it waits for the other ranks."""

    examples: list[int]
    """Of each step; the loop leaves those that were trained."""
    input: float = 0.0
    compute: float = 0.0
    python: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.examples)

    @property
    def step_seconds(self) -> float:
        return (self.input + self.compute + self.python) / self.steps


class Profiler:
    """Profiles the blocks of steps that cover those asked for.

    Steps run in blocks that are compiled together, so that a profile begins and ends between two blocks. The first
    block of a training is never among them: it warms up, and the proof that the ranks are in step follows it.

    Args:
        asked: first and last step, counted from 1.
        folder: where everything is written, by rank 0.
        ranks: the job's, from `profiled_ranks.join`.
        recipe: what is trained.
        threads: threads of each rank.

    Attributes:
        result: what was measured, once the steps are over; the same on every rank. See `profile_summary`.
    """

    def __init__(self, asked: tuple[int, int], folder: Path, ranks: Serial | Horovod, recipe: Recipe, threads: int):
        self._asked, self._folder, self._ranks, self._recipe, self._threads = asked, folder, ranks, recipe, threads
        self._timed = TimedRanks(ranks) if ranks.size > 1 else None
        self._earliest: int | None = None
        self._active, self._first = False, 0
        self._before: deque[_Times] = deque(maxlen=KEPT)
        self._times: list[_Times] = []
        self._block, self._mark, self._pending = _Times([]), 0.0, None
        self.result: dict | None = None

    @property
    def step_ranks(self) -> "Serial | Horovod | TimedRanks":
        """Return the ranks to compile the step with."""
        return self._timed or self._ranks

    # ---- Around the training loop ----------------------------------------------------------------------------------

    def watched(self, steps: Callable, blocks: Iterator[Block], at, per_block: int) -> tuple[Callable, Iterator[Block]]:
        """Return the compiled steps and an epoch's blocks so that they are timed, and traced where that was asked.

        Args:
            at: the training's position, which the loop keeps up to date.
            per_block: steps in a whole block.

        Raises:
            UsageError: a run that was resumed has passed the steps already.
        """
        if self._earliest is None:
            self._earliest = at.step + 1
            self._check_ahead(at.step)
        return partial(self._call, steps, at), self._blocks(blocks, at, per_block)

    def _blocks(self, blocks: Iterator[Block], at, per_block: int) -> Iterator[Block]:
        while True:
            self._begin_or_end(at.step, per_block)
            self._mark = time.perf_counter()
            block = next(blocks, None)
            if block is None:
                return
            self._block = _Times(block.examples)
            # Before it has run, since the loop doesn't come back after the one in which a signal arrives.
            (self._times if self._active else self._before).append(self._block)
            yield block
            # The loop comes back for the next one: what it did since the call was Python.
            self._block.python = self._lap()

    def _check_ahead(self, step: int) -> None:
        first, last = self._asked
        if step >= last:
            error = UsageError(f"the run is at step {step:,} already", expected="later steps to profile",
                               received=f"{first}-{last}")
            error.collective = True
            raise error

    def _call(self, steps: Callable, at, *arguments) -> tf.Tensor:
        # Gathered by the pipeline, and copied to TensorFlow by the loop.
        self._block.input = self._lap()
        with tf.profiler.experimental.Trace("train", step_num=at.step + 1, _r=1):
            sums = steps(*arguments)
            # The loop waits for the same, one block behind, so that an accelerator has always something to do.
            self._wait()
        self._pending = sums
        self._block.compute = self._lap()
        return sums

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.numpy()
        self._pending = None

    def _lap(self) -> float:
        """Return the seconds since the last mark, and set a new one."""
        before, self._mark = self._mark, time.perf_counter()
        return self._mark - before

    # ---- The chosen steps ------------------------------------------------------------------------------------------

    def _begin_or_end(self, step: int, per_block: int) -> None:
        first, last = self._asked
        if self._active and step >= last:
            self.close()
        elif not self._active and self.result is None and step >= max(self._earliest, first - per_block):
            self._begin(step)

    def _begin(self, step: int) -> None:
        self._wait()
        self._active, self._first = True, step + 1
        if self._ranks.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
        # All ranks trace, or rank 0 would be slower than the others; only rank 0 writes.
        tf.profiler.experimental.start(str(self._folder))
        if self._timed:
            # Nothing may be on its way when the timeline begins, and nothing set out before it has begun.
            self._ranks.barrier()
            self._ranks.operations.start_timeline(str(self._folder / profile_summary.TIMELINE))
            self._ranks.barrier()
            self._timed.seconds.assign(0.0)
        self._cores_before = _core_seconds()

    def close(self) -> None:
        """End the profile if it has begun, and write what it found; every rank calls it at the same point."""
        if not self._active:
            return
        self._wait()
        self._active = False
        cores = _core_seconds() - self._cores_before
        waited = float(self._timed.seconds.numpy()) if self._timed else 0.0
        if self._timed:
            self._ranks.operations.stop_timeline()
        tf.profiler.experimental.stop(save=self._ranks.rank == 0)
        self._times = [block for block in self._times if block.steps]
        if self._times:
            self._measure(cores, waited)

    def _measure(self, cores: np.ndarray, waited: float) -> None:
        steps = sum(block.steps for block in self._times)
        input, compute, python = (sum(getattr(block, name) for block in self._times)
                                  for name in ("input", "compute", "python"))
        rows = self._ranks.gather(np.array([[input, compute - waited, waited, python]]) / steps)
        busy, starved = self._ranks.gather(cores.reshape(1, 2)).mean(axis=0) / (input + compute + python)
        found = {
            "asked": list(self._asked), "steps": [self._first, self._first + steps - 1], "blocks": len(self._times),
            "per_call": steps / len(self._times),
            "step_ms": 1e3 * float(rows.mean(axis=0).sum()), "step_ms_before": self._step_ms_before(),
            "ranks_ms": (1e3 * rows).tolist(), "gradient_bytes": self._timed.gradient_bytes if self._timed else 0,
            "busy_cores": float(busy), "starved_cores": float(starved)}
        # Only rank 0 has the files; what it reads in them decides for all.
        self.result = distributed.on_rank_zero(self._ranks, lambda: self._written(found, steps))

    def _step_ms_before(self) -> float | None:
        """Return how long a step took before the profile began; None where there were too few."""
        # The first one of a training warms up.
        usual = [block.step_seconds for block in list(self._before)[1:]]
        return 1e3 * float(np.median(usual)) if len(usual) >= FEWEST_BEFORE else None

    def _written(self, found: dict, steps: int) -> dict:
        """Add what the files tell, write summary.md and summary.json, and return all of it."""
        sent = profile_files.messages(self._folder / profile_summary.TIMELINE) if self._timed else None
        found |= {"folder": str(self._folder), "transfer_ms": sent and 1e3 * sent.seconds / steps,
                  "messages": sent and sent.count / steps,
                  "operations_ms": {name: 1e3 * seconds / steps for name, seconds in
                                    profile_files.operations(self._folder).items()}}
        found = profile_summary.complete(found, self._job())
        write_json(self._folder / "summary.json", found)
        write_bytes(self._folder / "summary.md", profile_summary.text(found).encode())
        return found

    def _job(self) -> profile_summary.Job:
        return profile_summary.Job(
            size=self._ranks.size, local_size=self._ranks.local_size, cores=os.cpu_count() or 1, threads=self._threads,
            gpus=len(tf.config.list_physical_devices("GPU")), batch_size=self._recipe.batch_size,
            accumulation_steps=self._recipe.accumulation_steps, precision=self._recipe.precision,
            instruction_sets=machine.instruction_sets(), launcher=launch.place().launcher)


def _core_seconds() -> np.ndarray:
    """Return for how long this process' threads have had a core, and for how long they wanted one, float64 (2,)."""
    found = np.zeros(2)
    for thread in Path("/proc/self/task").iterdir():
        try:
            # The timeline's writer always wants one.
            if os.sched_getscheduler(int(thread.name)) != os.SCHED_IDLE:
                found += [int(word) * 1e-9 for word in (thread / "schedstat").read_text().split()[:2]]
        except OSError:
            continue
    return found
