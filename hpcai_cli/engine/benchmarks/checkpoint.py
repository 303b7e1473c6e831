"""Checkpoint: what saving a training takes of its throughput, and what the proofs and heartbeats of ranks take.

With one every 30 seconds, as the ratio is reported, a round would have to last for minutes. So each round trains the
same steps by the training's own loop, once with some checkpoints close together and once with none: the difference,
over their number, is what one costs, whatever part of it was spent in the loop, on the disk's thread or in waiting. The
ratio is that of a training that pays it every 30 seconds.

Proofs that the ranks are in step, and heartbeats, take too little to show between two rounds of a machine that is never
quite still. They are timed where they happen, on the slowest rank, which the others wait for: a proof by the clock, the
heartbeats by the clock in the loop and by the processor in their thread. Alone a training has no heartbeats.
"""

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from hpcai_cli.cadence import Cadence
from hpcai_cli.engine import hardware
from hpcai_cli.engine.benchmarks.measure import Figure, interleaved, median
from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.distributed import Horovod, Serial
from hpcai_cli.engine.feeding import Pause, run_blocks
from hpcai_cli.engine.keeping import Keeper
from hpcai_cli.engine.model import build, is_random_state
from hpcai_cli.engine.pipeline import Pipeline
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Dataset
from hpcai_cli.engine.training import prove_finite
from hpcai_cli.engine.training_job import Job
from hpcai_cli.pulse import Pulse
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import Run

EVERY = 30.0
"""Seconds between two checkpoints of the training that is spoken of."""
ROUNDS = 9
SECONDS = 4.0
"""Of one round."""
CHECKPOINTS = 3
"""In a round that has some."""
HEARTBEAT = 5.0
"""Seconds; with the default of 30 there are fewer beats."""
LIMIT, PROOF_LIMIT = 0.965, 0.005


def measure(data: Path, recipe: Recipe, build_model: Callable, ranks: Serial | Horovod) -> Iterator[Figure]:
    """Measure what a checkpoint costs a training of the recipe.

    Args:
        data: a dataset file that fits it.
    """
    hardware.set_up(local_rank=ranks.local_rank, local_size=ranks.local_size)
    hardware.set_precision("float32")
    # Beside what the benchmark keeps: a temporary folder may be memory, which takes a checkpoint as no disk does.
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".checkpoint-") as folder, Pulse(HEARTBEAT) as pulse:
        pulse.begin()
        training = _Training(Job(recipe, Run(Path(folder)), Dataset(data), ranks, build_model, pulse=pulse))
        training.run(CHECKPOINTS)
        found = interleaved(ROUNDS, kept=lambda: training.run(CHECKPOINTS), alone=lambda: training.run(0))
        size = sum(file.stat().st_size for file in Path(folder).glob("checkpoints/*/arrays.npz")) / 1e6
    name, pairs = recipe.name, list(zip(found["kept"], found["alone"], strict=True))
    costs = [(kept["seconds"] - alone["seconds"]) / kept["checkpoints"] for kept, alone in pairs]
    proofs = [kept["proof"] / kept["checkpoints"] for kept, _ in pairs]
    yield median("checkpoint", f"{name}: loop without checkpoints",
                 [training.examples / alone["seconds"] for _, alone in pairs], "samples/s")
    if ranks.rank == 0:
        yield Figure("checkpoint", f"{name}: those that stay", size, "MB")
    yield median("checkpoint", f"{name}: what one costs the training", [1000 * cost for cost in costs], "ms")
    yield median("checkpoint", f"{name}: of it in the loop, proof, snapshot and waiting",
                 [1000 * kept["saving"] / kept["checkpoints"] for kept, _ in pairs], "ms")
    yield median("checkpoint", f"{name}: throughput with one every {EVERY:g} s, against none",
                 [EVERY / (EVERY + cost) for cost in costs], "ratio", limit=LIMIT)
    yield median("checkpoint", f"{name}: the proof at each, that the ranks are in step",
                 [1000 * each for each in proofs], "ms")
    beats = [each["beats"] / each["seconds"] for pair in pairs for each in pair]
    if ranks.size > 1:
        yield median("checkpoint", f"{name}: share of the time in heartbeats", beats, "ratio")
    yield Figure("checkpoint", f"{name}: share of the time in proofs and heartbeats",
                 statistics.median(proofs) / EVERY + statistics.median(beats), "ratio", PROOF_LIMIT, at_most=True)


class _Training:
    """The loop of `hpcai train` over endless epochs, with its keeper of checkpoints.

    Attributes:
        examples: that a round trains, over all ranks.
    """

    def __init__(self, job: Job):
        self._job, recipe, split = job, job.recipe, job.dataset.split("train")
        pipeline = Pipeline(split, batch_size=recipe.batch_size * recipe.accumulation_steps, seed=recipe.seed,
                            rank=job.replicas.rank, size=job.replicas.size)
        self._endless = (block for epoch in range(1_000_000) for block in pipeline.blocks(epoch)
                         if len(block.examples) == pipeline.steps_per_block)
        self._model = build(recipe, job.build_model)
        self._optimizer = build_optimizer(recipe, steps_per_epoch=pipeline.steps_per_epoch, size=job.replicas.size)
        self._optimizer.build(self._model.trainable_variables)
        job.replicas.broadcast(self._model, self._optimizer)
        self._weights = [variable for variable in (*self._model.variables, *self._optimizer.variables)
                         if not is_random_state(variable)]
        self._steps = compile_steps(self._model, self._optimizer, recipe, job.replicas, block=next(self._endless),
                                    wishes=job.wishes)
        self._blocks, self._round, self._at = 2, 0, Position()
        self._spent, self._clocks = {"proof": 0.0, "beats": 0.0}, []
        self.run(0)
        # All ranks the same number, or the collective operations would wait for ever.
        seconds = float(np.max(job.ranks.gather(np.array([[self.run(0)["seconds"]]])))) / self._blocks
        self._blocks = max(2 * (CHECKPOINTS + 1), int(SECONDS / seconds))
        self._round = self._blocks * pipeline.steps_per_block
        self.examples = self._round * pipeline.global_batch_size
        job.replicas.prove = self._timed(job.replicas.prove, "proof")
        job.pulse.mark = self._timed(job.pulse.mark, "beats")
        # The thread that beats; alone there is none.
        self._clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threading.enumerate()
                        if thread.name == "pulse"]

    def _timed(self, function: Callable, name: str) -> Callable:
        def timed(*given, **how) -> None:
            started = time.perf_counter()
            function(*given, **how)
            self._spent[name] += time.perf_counter() - started
        return timed

    def run(self, checkpoints: int) -> dict:
        """Train for a round with so many checkpoints; return its seconds, those of saving, proofs and heartbeats."""
        job, at, saved, saving = self._job, self._at, 0, 0.0
        cadence = Cadence(seconds=0, steps=self._round // (checkpoints + 1) + 1 if checkpoints else 0)
        keeper = Keeper(job.run, cadence, job.ranks, job.replicas, job.wishes, job.limit, at=at, model=self._model,
                        optimizer=self._optimizer, fingerprint=job.dataset.fingerprint, weights=self._weights,
                        is_kept=False, pulse=job.pulse)
        blocks = islice(self._endless, self._blocks)
        job.ranks.barrier()
        self._spent = {"proof": 0.0, "beats": -sum(map(time.clock_gettime, self._clocks))}
        started, pause = time.perf_counter(), Pause.SAVE
        while pause is Pause.SAVE:
            pause = run_blocks(job, at, self._steps, blocks, keeper.is_due)
            if pause is Pause.SAVE:
                begun = time.perf_counter()
                prove_finite(job, self._model, at)
                keeper.save()
                saved, saving = saved + 1, saving + time.perf_counter() - begun
        seconds = time.perf_counter() - started
        self._spent["beats"] += sum(map(time.clock_gettime, self._clocks))
        # The last one was written while the rest of the round went on, as others are.
        keeper.finish()
        spent = {"seconds": seconds, "saving": saving, **self._spent}
        slowest = np.max(job.ranks.gather(np.array([list(spent.values())])), axis=0).tolist()
        return dict(zip(spent, slowest, strict=True)) | {"checkpoints": saved}
