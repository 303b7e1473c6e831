"""Keeps a training: decides with all ranks when a checkpoint is due, takes the snapshot and hands it to the writer."""

import time

import keras

from hpcai_cli import console
from hpcai_cli.cadence import Cadence
from hpcai_cli.engine import checkpoint, history
from hpcai_cli.engine.checkpoint import Position, State
from hpcai_cli.engine.checkpoint_writer import Writer
from hpcai_cli.engine.distributed import Horovod, Serial, on_rank_zero
from hpcai_cli.engine.replicas import Replicas
from hpcai_cli.engine.step import Wishes
from hpcai_cli.errors import HpcaiError
from hpcai_cli.pulse import Pulse
from hpcai_cli.run import Run
from hpcai_cli.time_limit import TimeLimit


class Keeper:
    """The checkpoints of a training, of which rank 0 writes and all ranks know when.

    Args:
        at: where the training is, which the loop keeps up to date.
        fingerprint: the dataset's.
        weights: variables that all ranks should hold alike.
        is_kept: whether `at` was read from a checkpoint.
        before: this rank's own before the ranks of an elastic job met again; it may still be writing.
    """

    def __init__(self, run: Run, cadence: Cadence, ranks: Serial | Horovod, replicas: Replicas, wishes: Wishes,
                 limit: TimeLimit, *, at: Position, fingerprint: str, model: keras.Model,
                 optimizer: keras.optimizers.Optimizer, weights: list[keras.Variable], is_kept: bool, pulse: Pulse,
                 before: "Keeper | None" = None):
        self._run, self._cadence, self._ranks, self._replicas = run, cadence, ranks, replicas
        self._wishes, self._limit, self._at, self._fingerprint = wishes, limit, at, fingerprint
        self._model, self._optimizer, self._weights, self._pulse = model, optimizer, weights, pulse
        self._kept = self._place() if is_kept else None
        self._kept_step, self._kept_time = at.step, time.monotonic()
        self._looked, self._looked_step = time.monotonic(), at.step
        self._writer = before._writer if before else None
        if self._writer is None and ranks.rank == 0:
            self._writer = Writer(run.checkpoints, cadence.keep, written=self._written, failed=self._failed)

    def is_due(self) -> bool:
        """Tell after a block whether a checkpoint is due by its steps; one that is due by time is wished for here."""
        now = time.monotonic()
        if self._writer:
            step_seconds = (now - self._looked) / max(1, self._at.step - self._looked_step)
            self._limit.saving = 1.0 + self._writer.seconds + 2 * step_seconds
            is_late = self._cadence.seconds and now - self._kept_time >= self._cadence.seconds
            if is_late and not self._writer.is_busy:
                self._wishes.save.assign(1.0)
        self._looked, self._looked_step = now, self._at.step
        return bool(self._cadence.steps) and self._at.step - self._kept_step >= self._cadence.steps

    def after_epoch(self, *, is_last: bool) -> None:
        """Save what an epoch has made, where that is due."""
        is_best = self._at.best.get("step") == self._at.step
        if is_last or is_best or self._at.epoch % self._cadence.epochs == 0:
            self.save()

    def save(self) -> None:
        """Prove that the ranks are in step, and let rank 0 write a checkpoint, unless there is one of this place."""
        self._wishes.save.assign(0.0)
        if self._kept == self._place():
            return
        # All ranks wait for a disk that is slower than that, and know that they do.
        self.finish()
        self._replicas.prove(self._weights, when=f"at the checkpoint of step {self._at.step}")
        arrays = self._replicas.arrays(self._model, self._optimizer)
        self._kept, self._kept_step, self._kept_time = self._place(), self._at.step, time.monotonic()
        if self._writer:
            self._writer.write(State(**self._at.copied(), fingerprint=self._fingerprint, arrays=arrays))

    def take_over(self) -> None:
        """See that there is the best epoch's checkpoint, after ranks of an elastic job met again: the rank that was to
        write it may be gone."""
        step, best = self._at.best.get("step"), self._at.best.get("epoch")
        if step is None or on_rank_zero(self._ranks, lambda: self._writer.has(step)):
            return
        if step == self._at.step:
            self.save()
            return
        console.note(f"the best epoch so far, {best}, cannot be chosen any more: its checkpoint was lost with a "
                     "process")
        self._at.best = {}

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait for what is on its way to the disk, but not where other ranks of an elastic job wait for this one."""
        if self._writer and (kind is None or issubclass(kind, HpcaiError)):
            self._writer.finish()

    def finish(self) -> str:
        """Wait until all is on the disk; return why the last checkpoint is not, alike on every rank."""
        with self._pulse.slow():
            return on_rank_zero(self._ranks, lambda: str(self._writer.finish() or ""))

    @property
    def is_resumable(self) -> bool:
        """Whether there is any checkpoint, alike on every rank."""
        return on_rank_zero(self._ranks, lambda: checkpoint.exists(self._run.checkpoints))

    def restore_best(self) -> None:
        """Give the model the weights of the best epoch."""
        step = self._at.best["step"]
        with self._pulse.slow():
            on_rank_zero(self._ranks, lambda: self._replicas.restore(self._writer.arrays_of_best(step), self._model))
            self._replicas.broadcast(self._model)

    def _place(self) -> tuple[int, int, int]:
        return self._at.step, self._at.epoch, self._at.cursor

    def _written(self, state: State) -> None:
        history.write_history(self._run, state.history)
        self._run.event("checkpoint", step=state.step)

    def _failed(self, state: State, reason: str) -> None:
        console.note(f"{reason}; the training goes on")
        self._run.event("checkpoint_failed", step=state.step, reason=reason)
