"""The training loop: the file to open first."""

import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import NoReturn

import keras
import numpy as np

from hpcai_cli import console
from hpcai_cli.engine import autotune, batch_norm, checkpoint, elastic, evaluation, history
from hpcai_cli.engine.checkpoint import Position
from hpcai_cli.engine.distributed import Serial, on_rank_zero
from hpcai_cli.engine.feeding import Pause, run_blocks
from hpcai_cli.engine.keeping import Keeper
from hpcai_cli.engine.learning_rates import ChangingRates
from hpcai_cli.engine.model import (
    adapt,
    build,
    settle_statistics,
    spread_random_state,
)
from hpcai_cli.engine.pipeline import Pipeline
from hpcai_cli.engine.step import build_optimizer, compile_steps
from hpcai_cli.engine.store import Split
from hpcai_cli.engine.task import class_weights, task_of
from hpcai_cli.engine.timed_ranks import LagWatch
from hpcai_cli.engine.training_job import Job
from hpcai_cli.errors import DataError, DivergedError, HpcaiError, StoppedEarly
from hpcai_cli.recipe import Recipe
from hpcai_cli.run import write_bytes, write_json


def train(job: Job, *, resume: bool) -> dict:
    """Train to the end and return the result, the same on every rank.

    Raises:
        StoppedEarly: a signal asked for the end; a checkpoint was written first.
        DivergedError: the loss is no number, or the ranks fell out of step.
        DataError: the checkpoint or the data don't belong to this run.
    """
    recipe, replicas, crew = job.recipe, job.replicas, job.crew
    if recipe.gradient_reduction == "adasum":
        job.ranks.require_adasum()
    started = crew.started if crew else time.monotonic()
    if job.energy:
        job.energy.start()
    split = job.dataset.split("train")
    pipeline = Pipeline(job.teacher.joined(split) if job.teacher else split, seed=recipe.seed, rank=replicas.rank,
                        size=replicas.size, batch_size=recipe.batch_size * recipe.accumulation_steps,
                        is_elastic=crew is not None)
    built, at = _set_up(job, pipeline, resume=resume)
    keeper, watch, final_epoch = built.keeper, built.watch, recipe.epochs - round(recipe.final_share * recipe.epochs)
    board = history.Board(job.run.tensorboard if job.tensorboard and job.ranks.rank == 0 else None)

    # ---- Train.
    total, first, done = len(split) * recipe.epochs, at.step + 1, at.epoch * len(split) + at.cursor
    with console.progress("training", total=total, unit=history.unit(recipe), done=done) as shown, keeper:
        def after_block() -> bool:
            if at.step == first:
                # The second proof: gradients really are averaged, or the first step sets the ranks apart.
                replicas.prove(built.weights, when="after the first step")
                _event(job, "first_step", step=at.step)
                # It warms up, which nobody else waits for again.
                watch.restart(at.step)
            shown.update(at.epoch * len(split) + at.cursor, lambda: history.status(recipe, at.epoch, at.sums))
            if crew:
                crew.after_block(at, job.wishes)
            return keeper.is_due()

        def stop_here() -> NoReturn:
            _stop(job, at, keeper, samples=at.epoch * len(split) + at.cursor - done)

        _ask_for_pause(job, at)
        if _anyone_stopped(job):
            stop_here()
        while at.epoch < recipe.epochs and not _out_of_patience(recipe, at):
            blocks = pipeline.blocks(at.epoch, at.cursor, single_first=at.step + 1 == first)
            chosen = built.final_steps if at.epoch >= final_epoch else built.steps
            if job.profiler:
                chosen, blocks = job.profiler.watched(chosen, blocks, at, pipeline.steps_per_block)
            watch.restart(at.step)
            pause = Pause.SAVE
            while pause in (Pause.SAVE, Pause.COMMIT):
                started_again = time.monotonic()
                pause = run_blocks(job, at, chosen, blocks, after_block)
                at.seconds += time.monotonic() - started_again
                if pause is not Pause.COMMIT:
                    prove_finite(job, built.model, at)
                if pause is Pause.SAVE:
                    keeper.save()
                if crew:
                    crew.commit(at, built.variables, if_due=pause is Pause.END)
                    if pause in (Pause.SAVE, Pause.COMMIT):
                        crew.look_for_hosts(job.wishes)
            own_ms = watch.own_ms(at.step)
            if pause is Pause.STOP:
                stop_here()
            try:
                row = _finish_epoch(job, at, built.optimizer, built.validate)
            except evaluation.AbandonedError:
                stop_here()
            if own_ms:
                _event(job, "ranks", epoch=row["epoch"], own_step_ms=own_ms)
            board.write(row, at.step)
            if crew:
                crew.commit(at, built.variables)
            keeper.after_epoch(is_last=at.epoch == recipe.epochs or _out_of_patience(recipe, at))
            shown.line(history.sentence(recipe, row))
            _ask_for_pause(job, at)
            if _anyone_stopped(job):
                stop_here()

    # ---- Choose the best epoch, judge it on the test split, write the result.
    board.close()
    keeper.finish()
    if job.profiler:
        job.profiler.close()
    if at.best and at.best["step"] != at.step:
        keeper.restore_best()
        settle_statistics(built.model)
    try:
        return _finish(job, at, built.model, seconds=time.monotonic() - started, samples=at.epoch * len(split) - done)
    except evaluation.AbandonedError:
        _stop(job, at, keeper, samples=at.epoch * len(split) - done)


def _set_up(job: Job, pipeline: Pipeline, *, resume: bool) -> tuple[elastic.Built, Position]:
    """Build everything, or take what a rank of an elastic job has built before, and return it with its place.

    Rank 0's values count, or those of the ranks that go on in an elastic job.
    """
    recipe, ranks, replicas, crew = job.recipe, job.ranks, job.replicas, job.crew
    is_recalled = crew is not None and crew.holder is not None
    counts = {"steps_per_epoch": pipeline.steps_per_epoch, "size": replicas.size}
    built = crew.built if crew else None
    if built:
        model, optimizer, rates = built.model, built.optimizer, built.rates
        replicas.split(model, recipe.input_shape)
        rates.follow(**counts)
    else:
        model, split = build(recipe, job.build_model), job.dataset.split("train")
        if not resume and not is_recalled:
            on_rank_zero(ranks, lambda: adapt(recipe, model, job.adapt, split.inputs, split.labels))
        replicas.split(model, recipe.input_shape)
        rates = ChangingRates(recipe, **counts) if crew else None
        optimizer = build_optimizer(recipe, **counts, schedule=rates)
        optimizer.build(model.trainable_variables)
        replicas.attach(model, optimizer)
    at = _placed(job, pipeline, model, optimizer, resume=resume, is_recalled=is_recalled)
    if recipe.sync_batch_norm and not built:
        batch_norm.synchronize(model, ranks)
    built = built or _compiled(job, pipeline, model, optimizer, rates)
    replicas.prove(built.weights, when="at the start")
    built.watch.forget()
    if is_recalled:
        crew.tell(at)
    _event(job, "elastic" if is_recalled else "resumed" if resume else "started", step=at.step, epoch=at.epoch,
           cursor=at.cursor, world_size=ranks.size, **(crew.news if is_recalled else {}))
    built.keeper = Keeper(job.run, job.cadence, ranks, replicas, job.wishes, job.limit, at=at, model=model,
                          optimizer=optimizer, fingerprint=job.dataset.fingerprint, weights=built.weights,
                          is_kept=resume and not is_recalled, pulse=job.pulse, before=built.keeper)
    job.wishes.begin()
    job.stop.tell(lambda: job.wishes.stop.assign(1.0))
    if crew:
        crew.built = built
        if is_recalled:
            built.keeper.take_over()
        crew.commit(at, built.variables)
    return built, at


def _placed(job: Job, pipeline: Pipeline, model, optimizer, *, resume: bool, is_recalled: bool) -> Position:
    """Give every rank the values that count, and return where they stand."""
    if is_recalled:
        at = Position(**job.crew.recall([*model.variables, *optimizer.variables]))
    else:
        # The resumed state comes before the broadcast, and only to rank 0: a checkpoint is read once, not n times.
        at = Position(**on_rank_zero(job.ranks, lambda: vars(_resumed(job, model, optimizer)) if resume else {}))
    # Counted from the epoch's end, since its rest may take another number of steps than this job's size would have.
    left = len(job.dataset.split("train")) - at.cursor
    place = (at.epoch + 1) * pipeline.steps_per_epoch - -(-left // pipeline.global_batch_size)
    if place != at.step or is_recalled:
        # The schedule counts steps of this job's size, which need not be that of the job that wrote the checkpoint.
        getattr(optimizer, "inner_optimizer", optimizer).iterations.assign(place)
    if not is_recalled:
        job.replicas.broadcast(model, optimizer)
    settle_statistics(model)
    spread_random_state(model, job.replicas.rank)
    return at


def _compiled(job: Job, pipeline: Pipeline, model, optimizer, rates: ChangingRates | None) -> elastic.Built:
    """Compile what the loop calls, which stays the same when ranks of an elastic job meet again."""
    recipe, replicas = job.recipe, job.replicas
    # Ranks that share a model wait for each other within a step, which the watch would take for work of their own.
    watch = LagWatch(job.ranks if replicas.parts == 1 else Serial(),
                     job.profiler.step_ranks if job.profiler else replicas)
    compiled = partial(compile_steps, model, optimizer, recipe, watch.step_ranks, block=next(pipeline.blocks(0)),
                       weight_of_class=class_weights(recipe, job.dataset.split("train").labels), teacher=job.teacher,
                       pruning=job.prune and job.prune(model, pipeline.steps_per_epoch * recipe.epochs),
                       wishes=job.wishes)
    steps = compiled(augment=job.augment)
    final_steps = compiled(augment=job.final_augment) if recipe.final_share and job.final_augment else steps
    return elastic.Built(model, optimizer, rates, steps, final_steps, _validator(job, model), watch)


def _resumed(job: Job, model, optimizer) -> Position:
    """Restore the newest checkpoint that verifies, on rank 0, and return where it stands."""
    state, passed = checkpoint.newest(job.run.checkpoints)
    for reason in passed:
        console.note(f"passed over: {reason}")
    if state.fingerprint != job.dataset.fingerprint:
        raise DataError("the dataset file is not the one that the run began with",
                        expected=f"fingerprint {state.fingerprint[:12]}", received=job.dataset.fingerprint[:12])
    job.replicas.restore(state.arrays, model, optimizer)
    # Only now: a resume that is refused leaves the run's own description as it was.
    job.describe()
    console.note(f"resuming at step {state.step}, epoch {state.epoch + 1} of {job.recipe.epochs}")
    if state.best and state.best["step"] != state.step:
        try:
            checkpoint.at_step(job.run.checkpoints, state.best["step"])
        except DataError as error:
            console.note(f"the best epoch so far, {state.best['epoch']}, cannot be chosen any more: {error}")
            state.best = {}
    return state.position


def _validator(job: Job, model) -> Callable[[], dict]:
    if "validation" not in job.dataset.splits:
        return dict
    split, run_forward = job.dataset.split("validation"), evaluation.forward(model, job.recipe)
    return lambda: evaluation.figures(job.recipe, _scores(job, run_forward, split), split.labels)


def _scores(job: Job, run_forward: Callable, split: Split) -> np.ndarray:
    # Ranks that share a model compute together, and none can leave out its part.
    stop = evaluation.Stop(is_agreed=lambda: _anyone_stopped(job),
                           is_asked=lambda: job.replicas.parts == 1 and bool(job.stop.received))
    return evaluation.scores_of(run_forward, split, job.replicas, columns=task_of(job.recipe).columns, stop=stop,
                                on_batch=lambda _: job.pulse.mark())


def prove_finite(job: Job, model: keras.Model, at: Position) -> None:
    """Check the weights, since the loss of the last step is that of the weights before its update.

    Raises:
        DivergedError: they hold something else than numbers; no checkpoint is written of them.
    """
    ruined = [variable.path for variable in model.variables
              if "float" in variable.dtype and not np.isfinite(variable.numpy()).all()]
    if job.replicas.on_any_rank(bool(ruined)):
        place = ruined[0] if ruined else "another rank's part of the model"
        raise _diverged(f"the weights in {place} are no numbers after step {at.step}", "not finite")


def _diverged(happened: str, received: object) -> DivergedError:
    return DivergedError(happened, expected="a finite number", received=received,
                         mend="lower the steps with `--set learning_rate=...` or set clip_norm")


def _finish_epoch(job: Job, at: Position, optimizer, validate) -> dict:
    """Close the epoch's accounts: history, the best epoch so far, the position of the next.

    Raises:
        AbandonedError: a rank was asked to stop during the validation; nothing has changed.
    """
    count = len(job.dataset.split("train"))
    measure, best_by = task_of(job.recipe).measure, f"validation_{job.recipe.best_by}"
    row = {"epoch": at.epoch + 1, "loss": at.sums[0] / count, measure: at.sums[1] / count}
    row |= {f"validation_{name}": value for name, value in validate().items()}
    if "validation_loss" in row:
        if not math.isfinite(row["validation_loss"]):
            raise _diverged(f"the validation loss is {row['validation_loss']} after step {at.step}",
                            row["validation_loss"])
        # Every rank has gathered the same numbers; rank 0's count all the same, since the decision must be one.
        sign = -1 if job.recipe.best_by == "loss" else 1
        # From the history: a resumed run may choose by another figure than it began with.
        better = row["epoch"] >= job.first_choice and (
            not at.best or sign * row[best_by] > sign * at.history[at.best["epoch"] - 1][best_by])
        if job.ranks.broadcast_json(better):
            at.best = {"epoch": row["epoch"], "step": at.step, best_by: row[best_by]}
    row |= {"learning_rate": float(optimizer.learning_rate), "seconds": round(at.seconds, 3),
            "images_per_second": round(count / at.seconds, 1)}
    at.history.append(row)
    # Each once, also where ranks were lost or resumed with another number.
    examples = at.sums[2]
    assert examples == count, f"{examples} of {count} examples"
    at.epoch, at.cursor, at.sums, at.seconds = at.epoch + 1, 0, [0.0, 0.0, 0], 0.0
    _event(job, "epoch", **row, examples=examples)
    return row


def _out_of_patience(recipe: Recipe, at: Position) -> bool:
    patience = recipe.early_stopping_patience
    return bool(patience and at.best and at.epoch - at.best["epoch"] >= patience)


def _ask_for_pause(job: Job, at: Position) -> None:
    if job.until_epoch and job.until_epoch <= at.epoch < job.recipe.epochs:
        job.stop.ask(f"--until-epoch {job.until_epoch}")


def _anyone_stopped(job: Job) -> bool:
    """Tell whether any rank was asked to stop since its last step, as during validation."""
    return bool(job.ranks.gather(np.array([bool(job.stop.received)])).any())


def _measured(job: Job, samples: int) -> dict:
    """Return what was measured beside the training, where that was asked for; `samples` were trained meanwhile."""
    found = {}
    if job.profiler:
        job.profiler.close()
        found["profile"] = job.profiler.result
    if job.energy:
        found["energy"] = job.energy.finish(samples)
    if job.autotune_log:
        found["autotune"] = autotune.found(job.autotune_log, job.run.folder / "autotune.csv")
    return found


def _stop(job: Job, at: Position, keeper: Keeper, *, samples: int) -> NoReturn:
    """Save the training and end it.

    Raises:
        StoppedEarly: always, where there is something to go on from.
        HpcaiError: there is not.
    """
    keeper.save()
    reason = keeper.finish()
    if reason and not keeper.is_resumable:
        error = HpcaiError(reason)
        error.collective = True
        raise error
    asked = job.stop.received or "a signal on another rank"
    _event(job, "stopped", step=at.step, signal=asked, **_measured(job, samples))
    saved = f"{reason}; an older one is there" if reason else "the checkpoint is written"
    raise StoppedEarly(f"stopped by {asked} after step {at.step}; {saved}",
                       mend=f"continue with `hpcai train --resume {job.run.folder}`")


def _finish(job: Job, at: Position, model, *, seconds: float, samples: int) -> dict:
    """Evaluate the chosen weights on the test split, write model.keras and result.json."""
    recipe, metrics = job.recipe, {}
    last = at.history[-1] if at.history else {}
    chosen = at.history[at.best["epoch"] - 1] if at.best else last
    run_forward, threshold = evaluation.forward(model, recipe), None
    if recipe.decision_threshold == "f1":
        split = job.dataset.split("validation")
        threshold = evaluation.best_threshold(_scores(job, run_forward, split), split.labels)
    if "test" in job.dataset.splits:
        split = job.dataset.split("test")
        metrics |= evaluation.figures(recipe, _scores(job, run_forward, split), split.labels, threshold)
    metrics |= {f"train_{name}": chosen[name] for name in ("loss", task_of(recipe).measure) if name in chosen}
    metrics |= {name: value for name, value in chosen.items() if name.startswith("validation_")}
    metrics |= {"images_per_second": last.get("images_per_second"), "seconds": round(seconds, 3)}
    measured = _measured(job, samples)
    if measured.get("energy", {}).get("joules") is not None:
        metrics |= {name: measured["energy"][name] for name in ("joules", "joules_per_sample")}
    result = {"schema": "hpcai.train/1", "command": "train", "run": str(job.run.folder), "metrics": metrics,
              "recipe": recipe.name, "decision_threshold": threshold, "epochs": at.epoch,
              "best_epoch": chosen.get("epoch"), "steps": at.step, "world_size": job.ranks.size,
              "parameters": job.replicas.parameters, "test_examples": len(job.dataset.splits.get("test", ())),
              **measured}

    job.replicas.join(model)

    def write() -> None:
        # Named so that Keras takes it for its own format; written whole or not at all.
        temporary = job.run.folder / f".{os.getpid()}.keras"
        try:
            job.finished(model).save(temporary)
            write_bytes(job.run.model_file, temporary.read_bytes())
        finally:
            temporary.unlink(missing_ok=True)
        # Beside the checkpoints it was written too, where these could be.
        history.write_history(job.run, at.history)
        write_json(job.run.result_file, result)
        job.run.failure_file.unlink(missing_ok=True)
        _event(job, "finished", **metrics)

    with job.pulse.slow():
        on_rank_zero(job.ranks, write)
    return result


def _event(job: Job, kind: str, **values) -> None:
    if job.ranks.rank == 0:
        job.run.event(kind, **values)
