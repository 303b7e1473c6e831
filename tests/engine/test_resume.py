"""Stopping and resuming: equal, bit for bit, to never having stopped."""

import csv
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from hpcai_cli.engine import augmentation, checkpoint, pipeline, training
from hpcai_cli.engine.compression.pruning import MagnitudePruning
from hpcai_cli.engine.step import build_optimizer
from hpcai_cli.errors import EXIT_STOPPED, DataError, StoppedEarly

STEPS = 13
"""In an epoch of the tiny training."""
TIMES = ("seconds", "images_per_second")
START = 1
"""Looks at the wish to stop before the first step."""
BLOCKS = 8
"""Looks in the first epoch, one before each block; a wish that is found there ends the first step of the block."""
VALIDATION = 3
"""Looks in the validation, which is one batch: before it with the other ranks, before it alone, and behind it."""
FIRST_EPOCH = START + BLOCKS + VALIDATION + 1
"""All looks up to the second epoch; the last one is when the epoch has ended."""


class StopAfter:
    """A wish to stop that comes when it was looked at so many times, as a signal would come in the middle."""

    def __init__(self, looks: int):
        self.looks = looks

    @property
    def received(self) -> str:
        self.looks -= 1
        return "SIGTERM" if self.looks < 0 else ""

    def tell(self, function) -> None:
        """Nobody is told: this wish is looked for."""


def history(tiny, run: str) -> list[dict]:
    with (tiny.folder / run / "history.csv").open() as stream:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(stream)]


def arrays(tiny, run: str) -> dict:
    return checkpoint.newest(tiny.folder / run / "checkpoints")[0].arrays


def assert_same(tiny, run: str, other: str = "whole") -> None:
    assert history(tiny, run) == history(tiny, other)
    ours, theirs = arrays(tiny, run), arrays(tiny, other)
    assert list(ours) == list(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for one, another in zip(tiny.weights(run), tiny.weights(other), strict=True):
        np.testing.assert_array_equal(one, another)


def stopped_at(tiny, looks: int, run: str = "stopped", **settings) -> StoppedEarly:
    with pytest.raises(StoppedEarly) as caught:
        training.train(tiny.job(run, stop=StopAfter(looks), **settings), resume=False)
    return caught.value


def noise(images, seed):
    """An augmentation that is different for each step and rank."""
    images = tf.cast(images, tf.float32)
    return images + tf.random.stateless_uniform(tf.shape(images), seed, -20, 20)


def moved(images, seed):
    """The augmentations of the built-in recipes, one after the other."""
    images = augmentation.warp(images, seed, zoom=(0.8, 1.0), rotation=5.0)
    images = augmentation.shift(images, seed, pixels=1)
    return augmentation.erase(augmentation.color(images, seed, brightness=0.1), seed, share=0.2)


@pytest.mark.parametrize("settings", [
    {},
    {"dropout": 0.5},
    {"dropout": 0.5, "augment": noise, "optimizer": "sgd", "warmup_epochs": 1.5, "clip_norm": 0.5, "seed": 2**32 - 1},
    {"optimizer": "lamb", "accumulation_steps": 2, "weight_decay": 0.01},
    {"mixup": 0.4, "augment": moved, "dropout": 0.3, "class_weights": "balanced", "best_by": "accuracy"},
    {"mixup": 0.4, "accumulation_steps": 2, "label_smoothing": 0.1},
], ids=["plain", "dropout", "everything random", "accumulation", "mixup and augmentation", "mixup and accumulation"])
def test_stopped_in_the_middle_of_an_epoch_and_resumed(tiny, monkeypatch, settings):
    steps = 7 if "accumulation_steps" in settings else tiny.steps
    error = stopped_at(tiny, FIRST_EPOCH + 3, **settings)
    state, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    assert state.epoch == 1
    assert steps < state.step < 2 * steps
    assert 0 < state.cursor < 200
    assert error.exit_code == EXIT_STOPPED
    assert str(error).startswith(f"stopped by SIGTERM after step {state.step}; the checkpoint is written; continue "
                                 f"with `hpcai train --resume {tiny.folder / 'stopped'}`")
    assert not (tiny.folder / "stopped" / "model.keras").exists()
    training.train(tiny.job("stopped", **settings), resume=True)
    # The undisturbed run gathers and trains its steps in other portions, which must change nothing either.
    monkeypatch.setattr(pipeline, "BLOCK_BYTES", 1 << 20)
    training.train(tiny.job("whole", **settings), resume=False)
    assert_same(tiny, "stopped")
    assert [event["event"] for event in tiny.events("stopped")][:8] == [
        "started", "first_step", "epoch", "checkpoint", "checkpoint", "stopped", "resumed", "first_step"]


@pytest.mark.parametrize("looks", [FIRST_EPOCH + 4, 2 * FIRST_EPOCH + 3], ids=["before", "in"])
def test_stopped_around_the_final_epochs_or_while_weights_go(tiny, looks):
    """Two augmentations and a pruning that is half done: the step's number alone says what comes next."""
    def job(run: str, **more) -> training.Job:
        made = tiny.job(run, augment=moved, final_share=0.5, **more)
        made.final_augment = noise
        made.prune = lambda model, steps: MagnitudePruning(model, sparsity=0.6, steps=steps)
        return made

    training.train(job("whole"), resume=False)
    with pytest.raises(StoppedEarly):
        training.train(job("stopped", stop=StopAfter(looks)), resume=False)
    training.train(job("stopped"), resume=True)
    assert_same(tiny, "stopped")
    kernels = [weights for weights in tiny.weights("stopped") if weights.ndim > 1]
    assert sum((weights == 0).sum() for weights in kernels) / sum(weights.size for weights in kernels) == pytest.approx(
        0.6, abs=0.01)


def test_stopped_again_and_again(tiny):
    training.train(tiny.job("whole", dropout=0.3), resume=False)
    stopped_at(tiny, 3, dropout=0.3)
    stops = 1
    while stops < 50:
        try:
            training.train(tiny.job("stopped", stop=StopAfter(6), dropout=0.3), resume=True)
            break
        except StoppedEarly:
            stops += 1
    assert 4 < stops < 20
    assert_same(tiny, "stopped")


@pytest.mark.parametrize(("looks", "place"), [
    (0, (0, 0, 0)), (START, (1, 0, 16)), (START + BLOCKS - 1, (STEPS, 0, 200)), (START + BLOCKS, (STEPS, 0, 200)),
    (START + BLOCKS + 2, (STEPS, 0, 200)), (START + BLOCKS + VALIDATION, (STEPS, 1, 0))],
    ids=["before the first step", "in it", "in the last one", "in the validation", "at its end", "after the epoch"])
def test_stopped_in_every_phase(tiny, looks, place):
    training.train(tiny.job("whole", epochs=2), resume=False)
    stopped_at(tiny, looks, epochs=2)
    state, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    assert (state.step, state.epoch, state.cursor) == place
    training.train(tiny.job("stopped", epochs=2), resume=True)
    assert_same(tiny, "stopped")


@pytest.mark.parametrize("looks", [FIRST_EPOCH - 1, FIRST_EPOCH, FIRST_EPOCH + 2],
                         ids=["after the last epoch", "before the test", "behind it"])
def test_stopped_when_only_the_result_is_missing(tiny, looks):
    training.train(tiny.job("whole", epochs=1), resume=False)
    stopped_at(tiny, looks, epochs=1)
    assert not (tiny.folder / "stopped" / "result.json").exists()
    result = training.train(tiny.job("stopped", epochs=1), resume=True)
    assert (result["steps"], result["epochs"]) == (STEPS, 1)
    assert_same(tiny, "stopped")


def test_early_stopping_goes_on_where_it_was(tiny):
    data = tiny.data("wrong.h5", wrong_validation=True)
    settings = {"data": data, "epochs": 9, "early_stopping_patience": 2}
    whole = training.train(tiny.job("whole", **settings), resume=False)
    stopped_at(tiny, FIRST_EPOCH + 3, **settings)
    resumed = training.train(tiny.job("stopped", **settings), resume=True)
    assert (resumed["best_epoch"], resumed["epochs"]) == (whole["best_epoch"], whole["epochs"]) == (1, 3)
    assert_same(tiny, "stopped")


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(tiny, capsys):
    training.train(tiny.job("whole"), resume=False)
    stopped_at(tiny, FIRST_EPOCH + 3)
    newest = max((tiny.folder / "stopped" / "checkpoints").iterdir())
    (newest / "arrays.npz").write_bytes(b"")
    training.train(tiny.job("stopped"), resume=True)
    said = capsys.readouterr().err
    assert f"passed over: checkpoint {newest.name} does not verify" in said
    assert f"resuming at step {tiny.steps}, epoch 2 of 4" in said
    assert_same(tiny, "stopped")


def test_a_finished_run_stays_as_it_is(tiny):
    first = training.train(tiny.job("run"), resume=False)
    shutil.copytree(tiny.folder / "run", tiny.folder / "whole")
    again = training.train(tiny.job("run"), resume=True)
    assert_same(tiny, "run")
    for result in (first, again):
        result["metrics"].pop("seconds")
    assert again == first


def test_more_epochs_than_at_first_go_on(tiny):
    training.train(tiny.job("run", schedule="constant", epochs=2), resume=False)
    training.train(tiny.job("run", schedule="constant", epochs=4), resume=True)
    training.train(tiny.job("whole", schedule="constant", epochs=4), resume=False)
    assert_same(tiny, "run")


def test_other_data_and_another_model_are_refused(tiny):
    stopped_at(tiny, FIRST_EPOCH + 3)
    before = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")[0].step
    other = tiny.data("other.h5", wrong_validation=True)
    with pytest.raises(DataError, match="the dataset file is not the one that the run began with"):
        training.train(tiny.job("stopped", data=other), resume=True)
    with pytest.raises(DataError, match="the checkpoint is of another optimizer"):
        training.train(tiny.job("stopped", optimizer="sgd", momentum=0.5), resume=True)
    with pytest.raises(DataError, match="no checkpoint in .*; train anew without --resume"):
        training.train(tiny.job("empty"), resume=True)
    assert checkpoint.newest(tiny.folder / "stopped" / "checkpoints")[0].step == before


# ---- Resumed with something else -----------------------------------------------------------------------------------

def learning_rates(tiny, run: str) -> list[float]:
    return [float(row["learning_rate"]) for row in history(tiny, run)]


def scheduled(tiny, **settings) -> list[float]:
    """Return the schedule's learning rates at the ends of the epochs of a job with these settings."""
    recipe = tiny.job("unused", **settings).recipe
    steps = -(-200 // recipe.batch_size)
    optimizer = build_optimizer(recipe, steps_per_epoch=steps, size=1)
    found = []
    for epoch in range(recipe.epochs):
        optimizer.iterations.assign((epoch + 1) * steps)
        found.append(float(optimizer.learning_rate))
    return found


@pytest.mark.parametrize(("looks", "batch_size"), [
    (3, 7), (3, 100), (6, 33), (FIRST_EPOCH + 3, 100), (FIRST_EPOCH - 1, 200), (2 * FIRST_EPOCH + 1, 10)])
def test_another_batch_size_keeps_the_schedule_and_sees_each_example_once(tiny, looks, batch_size):
    settings = {"warmup_epochs": 0.5, "epochs": 3}
    stopped_at(tiny, looks, **settings)
    state, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    before = learning_rates(tiny, "stopped")
    assert before == pytest.approx(scheduled(tiny, **settings)[:state.epoch], rel=1e-5)
    result = training.train(tiny.job("stopped", batch_size=batch_size, **settings), resume=True)
    assert result["epochs"] == 3
    after = learning_rates(tiny, "stopped")
    assert after == pytest.approx(before + scheduled(tiny, batch_size=batch_size, **settings)[state.epoch:],
                                  rel=1e-5, abs=1e-9)
    assert after[-1] == pytest.approx(0, abs=1e-9)
    last, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    steps = -(-(200 - state.cursor) // batch_size) + (2 - state.epoch) * -(-200 // batch_size)
    assert last.step == state.step + steps
    assert [row["epoch"] for row in history(tiny, "stopped")] == ["1", "2", "3"]


def test_each_example_once_also_in_the_epoch_of_the_change(tiny):
    """Counted by what the model is given: the model sums up the brightness of all that it is trained on."""
    def build_model(recipe):
        class Counter(layers.Layer):
            def build(self, shape):
                self.seen = self.add_weight(shape=(), initializer="zeros", trainable=False, name="seen")

            def call(self, images, training=False):
                if training:
                    self.seen.assign_add(tf.reduce_sum(images))
                return images

        return keras.Sequential([keras.Input(recipe.input_shape), Counter(), layers.Rescaling(1 / 255),
                                 layers.Flatten(), layers.Dense(3, name="answer")])

    # 200 examples, in batches that divide them, so that no padding is seen.
    settings = {"build_model": build_model, "epochs": 2, "batch_size": 20}
    stopped_at(tiny, 4, **settings)
    state, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    assert 0 < state.cursor < 200
    training.train(tiny.job("stopped", **settings | {"batch_size": 10}), resume=True)
    images = tiny.job("stopped", **settings).dataset.split("train").inputs
    last, _ = checkpoint.newest(tiny.folder / "stopped" / "checkpoints")
    seen = max(float(array) for name, array in last.arrays.items() if name.startswith("model") and array.shape == ())
    assert seen == pytest.approx(2 * float(images.sum()), rel=1e-3)


def test_another_figure_to_choose_by(tiny):
    stopped_at(tiny, FIRST_EPOCH + 3)
    result = training.train(tiny.job("stopped", best_by="accuracy"), resume=True)
    best = max(history(tiny, "stopped"), key=lambda row: float(row["validation_accuracy"]))
    assert result["metrics"]["validation_accuracy"] == float(best["validation_accuracy"])
