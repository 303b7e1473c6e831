"""When checkpoints are written, and what a disk that takes none does to a training."""

import shutil
import threading
import time

import numpy as np
import pytest

from hpcai_cli.cadence import Cadence
from hpcai_cli.engine import checkpoint, continuation, training
from hpcai_cli.engine.checkpoint_writer import Writer
from hpcai_cli.errors import HpcaiError, StoppedEarly
from hpcai_cli.recipe import Recipe
from hpcai_cli.signals import StopRequest


def trained(tiny, run: str, cadence: Cadence, **settings) -> list[int]:
    """Train, and return the steps of which a checkpoint was written."""
    job = tiny.job(run, **settings)
    job.cadence = cadence
    training.train(job, resume=False)
    return [event["step"] for event in tiny.events(run) if event["event"] == "checkpoint"]


def kept(tiny, run: str) -> list[str]:
    return sorted(path.name for path in (tiny.folder / run / "checkpoints").iterdir())


def test_how_often_changes_no_bit_and_how_many_stay(tiny):
    # A block is two steps, but for the first one: what is due is written behind it.
    assert trained(tiny, "epochs", Cadence(seconds=0), epochs=2) == [13, 26]
    assert trained(tiny, "steps", Cadence(steps=5, seconds=0, keep=4), epochs=2) == [5, 11, 13, 19, 25, 26]
    assert trained(tiny, "time", Cadence(seconds=1e-6), epochs=2)[-1] == 26
    best = checkpoint.newest(tiny.folder / "steps" / "checkpoints")[0].best["step"]
    assert {f"step-{step:08d}" for step in (13, 19, 25, 26, best)} >= set(kept(tiny, "steps")) >= {
        f"step-{step:08d}" for step in (19, 25, 26)}
    for run in ("steps", "time"):
        for one, other in zip(tiny.weights("epochs"), tiny.weights(run), strict=True):
            np.testing.assert_array_equal(one, other)


def test_fewer_than_one_each_epoch_still_has_the_best_and_the_last(tiny):
    data = tiny.data("wrong.h5", wrong_validation=True)
    # Labels of which none is right: the first epoch is the best one.
    assert trained(tiny, "run", Cadence(epochs=3, seconds=0), data=data, epochs=5) == [13, 39, 65]


def test_a_disk_that_takes_nothing_does_not_end_the_training(tiny, capsys):
    training.train(tiny.job("whole"), resume=False)
    data = tiny.data("wrong.h5", wrong_validation=True)
    for run, settings in (("run", {}), ("wrong", {"data": data})):
        job = tiny.job(run, **settings)
        # In the place of the folder there is a file.
        job.run.checkpoints.touch()
        result = training.train(job, resume=False)
        assert result["epochs"] == 4
        failed = [event for event in tiny.events(run) if event["event"] == "checkpoint_failed"]
        # That of the best epoch is tried again with each one after it.
        assert [event["step"] for event in failed][:1] == [13]
        assert "cannot write the checkpoint of step 13" in capsys.readouterr().err
    assert result["best_epoch"] == 1
    for one, other in zip(tiny.weights("whole"), tiny.weights("run"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stop_that_can_save_nothing_says_so(tiny):
    stop = StopRequest()
    job = tiny.job("run", stop=stop)
    job.run.checkpoints.touch()
    stop.ask("SIGTERM")
    with pytest.raises(HpcaiError, match="cannot write the checkpoint of step 0") as caught:
        training.train(job, resume=False)
    assert caught.value.exit_code == 1


def test_a_stop_that_finds_the_disk_full_goes_on_from_an_older_one(tiny, monkeypatch):
    stop = StopRequest()
    job = tiny.job("run", stop=stop)
    save = checkpoint.save

    def full_from_then_on(folder, state, **how):
        if state.step > 13:
            raise HpcaiError(f"cannot write the checkpoint of step {state.step}: No space left on device")
        made = save(folder, state, **how)
        stop.ask("SIGTERM")
        return made

    monkeypatch.setattr(checkpoint, "save", full_from_then_on)
    with pytest.raises(StoppedEarly, match="No space left on device; an older one is there; continue") as caught:
        training.train(job, resume=False)
    assert caught.value.exit_code == 75
    monkeypatch.undo()
    training.train(tiny.job("run"), resume=True)
    training.train(tiny.job("whole"), resume=False)
    for one, other in zip(tiny.weights("whole"), tiny.weights("run"), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_best_epoch_whose_checkpoint_is_gone_is_named(tiny, capsys):
    data = tiny.data("wrong.h5", wrong_validation=True)
    training.train(tiny.job("run", data=data, epochs=3), resume=False)
    shutil.rmtree(tiny.folder / "run" / "checkpoints" / "step-00000013")
    result = training.train(tiny.job("run", data=data, epochs=4), resume=True)
    assert result["best_epoch"] == 4
    assert "the best epoch so far, 1, cannot be chosen any more: checkpoint step-00000013" in capsys.readouterr().err


def test_the_training_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    let_go, save, written = threading.Event(), checkpoint.save, []
    monkeypatch.setattr(checkpoint, "save", lambda *given, **how: (let_go.wait(30), save(*given, **how)))
    writer = Writer(tmp_path, 2, written=lambda state: written.append(state.step), failed=lambda *_: None)
    state = checkpoint.State(7, 1, fingerprint="abc", arrays={"model-0": np.arange(3.0)})
    started = time.monotonic()
    writer.write(state)
    assert writer.is_busy
    assert time.monotonic() - started < 10
    let_go.set()
    assert writer.finish() is None
    assert (written, writer.is_busy) == ([7], False)
    assert checkpoint.newest(tmp_path)[0].step == 7


RECIPE = Recipe(name="some", summary="", input_shape=(1,), num_classes=2, epochs=4, batch_size=8, learning_rate=0.1,
                learning_rate_scaling="linear")
FACTS = {"world_size": 2, "threads_per_rank": 1, "precision": "float32", "tensor_parallel": 1}
VERSIONS = {"tensorflow": "2.21.0"}


@pytest.mark.parametrize(("settings", "facts", "expected"), [
    ({}, {}, []),
    ({"epochs": 9}, {}, ["the cosine schedule ends after 9 epochs in place of 4", "another number of epochs"]),
    ({"batch_size": 16}, {}, ["a step takes 32 examples in place of 16", "peak stays 0.2", "another batch_size"]),
    ({"batch_size": 16}, {"world_size": 1, "threads_per_rank": 2},
     ["peak is 0.1 in place of 0.2, by learning_rate_scaling=linear", "another world_size, threads_per_rank, "
      "batch_size"]),
    ({"learning_rate": 0.5}, {}, ["peak is 1 in place of 0.2", "another learning_rate"]),
])
def test_what_follows_is_said(settings, facts, expected):
    after = RECIPE.override({name: str(value) for name, value in settings.items()})
    found = continuation.what_follows(RECIPE, after, {**FACTS, "versions": VERSIONS}, FACTS | facts, VERSIONS)
    assert len(found) == len(expected), found
    for words, sentence in zip(expected, found, strict=True):
        assert words in sentence


def test_other_packages_are_said_too():
    found = continuation.what_follows(RECIPE, RECIPE, {**FACTS, "versions": {"tensorflow": "2.20.0"}}, FACTS, VERSIONS)
    assert found == ["the weights will not be bit for bit those of a run that was never stopped: another tensorflow"]
