"""A training: it learns, twice the same, keeps the best epoch, and ends with a word where it cannot go on."""

import csv
import json
import math
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from hpcai_cli.engine import checkpoint, evaluation, training
from hpcai_cli.errors import DivergedError


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_it_learns_and_twice_the_same(tiny):
    first = training.train(tiny.job("first", dropout=0.2), resume=False)
    second = training.train(tiny.job("second", dropout=0.2), resume=False)
    third = training.train(tiny.job("third", dropout=0.2, seed=1), resume=False)
    histories = [checkpoint.newest(tiny.folder / name / "checkpoints")[0].history for name in ("first", "second")]
    assert [row["epoch"] for row in histories[0]] == [1, 2, 3, 4]
    for name in ("loss", "validation_loss"):
        losses = [row[name] for row in histories[0]]
        assert losses == [row[name] for row in histories[1]]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.8 * losses[0]
    assert first["metrics"]["accuracy"] > 0.7
    assert same(tiny.weights("first"), tiny.weights("second"))
    assert not same(tiny.weights("first"), tiny.weights("third"))
    ours, others = ({name: value for name, value in result["metrics"].items() if name not in TIMES}
                    for result in (first, second))
    assert ours == others
    assert third["metrics"]["loss"] != first["metrics"]["loss"]


TIMES = ("seconds", "images_per_second")


def test_the_result_is_what_the_model_file_gives(tiny):
    job = tiny.job()
    result = training.train(job, resume=False)
    split = job.dataset.split("test")
    model = keras.saving.load_model(job.run.model_file)
    scores = model(np.array(split.inputs), training=False).numpy()
    loss, accuracy = evaluation.loss_and_accuracy(scores, split.labels)
    assert result["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
    assert result["metrics"]["accuracy"] == accuracy
    assert json.loads(job.run.result_file.read_text()) == result
    assert (result["schema"], result["epochs"], result["steps"]) == ("hpcai.train/1", 4, 4 * tiny.steps)
    assert (result["parameters"], result["world_size"], result["test_examples"]) == (243, 1, 70)
    with job.run.history_file.open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["validation_loss"]) == result["metrics"]["validation_loss"]
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0, abs=1e-6)
    assert not [name for name in os.listdir(job.run.folder) if name.endswith(".part") or name.startswith(".")]


def harmful_after(step: int):
    """From that step on the training sees negatives of the images: what it has learned gets worse."""
    return lambda images, seed: tf.where(seed[1] >= step, 255 - images, images)


def test_the_best_epoch_by_validation_loss_is_what_the_model_holds(tiny):
    job = tiny.job(augment=harmful_after(3 * tiny.steps), epochs=6, schedule="constant")
    result = training.train(job, resume=False)
    history = checkpoint.newest(job.run.checkpoints)[0].history
    losses = [row["validation_loss"] for row in history]
    assert losses[5] > 1.5 * losses[2] and min(losses) == losses[2]
    assert result["best_epoch"] == 3
    assert result["metrics"]["validation_loss"] == losses[2]
    assert result["metrics"]["train_loss"] == history[2]["loss"]
    kept = checkpoint.at_step(job.run.checkpoints, 3 * tiny.steps)
    assert same(tiny.weights(), [value for name, value in kept.arrays.items() if name.startswith("model-")
                                 and value.dtype == np.float32])
    assert sorted(os.listdir(job.run.checkpoints)) == [f"step-{tiny.steps * epoch:08d}" for epoch in (3, 5, 6)]


def test_it_ends_when_patience_does(tiny):
    """Learning makes the loss on wrong labels grow, so that the first epoch stays the best."""
    job = tiny.job(data=tiny.data("wrong.h5", wrong_validation=True), epochs=9, early_stopping_patience=2)
    result = training.train(job, resume=False)
    assert (result["best_epoch"], result["epochs"], result["steps"]) == (1, 3, 3 * tiny.steps)
    kept = checkpoint.at_step(job.run.checkpoints, tiny.steps)
    assert same(tiny.weights()[:2], [kept.arrays["model-0"], kept.arrays["model-1"]])


@pytest.mark.parametrize("without", [("validation",), ("validation", "test")])
def test_without_a_validation_split_the_last_epoch_counts(tiny, without):
    job = tiny.job(data=tiny.data("less.h5", without=without), epochs=2)
    result = training.train(job, resume=False)
    assert result["best_epoch"] == 2
    assert "validation_loss" not in result["metrics"]
    assert ("accuracy" in result["metrics"]) == ("test" not in without)
    assert math.isfinite(result["metrics"]["train_loss"])
    state = checkpoint.newest(job.run.checkpoints)[0]
    assert same(tiny.weights()[:2], [state.arrays["model-0"], state.arrays["model-1"]])


def test_accumulation_and_augmentation_train_too(tiny):
    result = training.train(tiny.job(accumulation_steps=2, epochs=2, augment=harmful_after(0), label_smoothing=0.1),
                            resume=False)
    assert result["steps"] == 2 * 7
    history = checkpoint.newest(tiny.folder / "run" / "checkpoints")[0].history
    assert history[1]["loss"] < history[0]["loss"]


def test_the_final_epochs_train_on_other_examples(tiny):
    job = tiny.job(augment=lambda images, seed: tf.zeros_like(images), epochs=4, final_share=0.5, learning_rate=0.05)
    job.final_augment = lambda images, seed: tf.cast(images, tf.float32)
    training.train(job, resume=False)
    history = checkpoint.newest(job.run.checkpoints)[0].history
    # Blank pictures have one answer for all; then come the real ones.
    assert [row["loss"] > 1.06 for row in history] == [True, True, False, False]


def test_no_epoch_before_the_first_choice_is_the_best(tiny):
    job = tiny.job(data=tiny.data("wrong.h5", wrong_validation=True), epochs=4)
    # The better the training, the worse it is on wrong labels.
    job.first_choice = 3
    assert training.train(job, resume=False)["best_epoch"] == 3


def linear(recipe):
    return keras.Sequential([keras.Input(recipe.input_shape), layers.Flatten(), layers.Dense(3)])


def test_a_loss_that_is_no_number_ends_the_training_and_names_the_step(tiny):
    def augment(images, seed):
        return tf.where(seed[1] >= 2 * tiny.steps + 4, math.nan, tf.cast(images, tf.float32) / 255)

    job = tiny.job(augment=augment, build_model=linear)
    with pytest.raises(DivergedError) as caught:
        training.train(job, resume=False)
    assert str(caught.value).startswith(f"the loss is nan at step {2 * tiny.steps + 5}; expected a finite number")
    assert "learning_rate" in str(caught.value)
    assert caught.value.exit_code == 6
    state, passed = checkpoint.newest(job.run.checkpoints)
    assert (state.epoch, passed) == (2, [])
    assert all(np.isfinite(value).all() for value in state.arrays.values())
    assert not job.run.model_file.exists()
    assert not job.run.result_file.exists()


@pytest.mark.parametrize(("without", "size", "words"), [
    ((), 3e38, "weights in .* are no numbers"), (("validation",), 3e38, "weights in .* are no numbers"),
    ((), 1e36, "validation loss is nan")])
def test_a_model_that_is_ruined_by_the_last_step_is_not_saved(tiny, without, size, words):
    """The loss of a step is that of the weights before its update: it alone would let the model through."""
    job = tiny.job(data=tiny.data("less.h5", without=without), build_model=linear, batch_size=200, epochs=1,
                   optimizer="sgd", learning_rate=size, momentum=0.0, schedule="constant")
    with pytest.raises(DivergedError, match=f"{words} after step 1; expected a finite number.*learning_rate") as caught:
        training.train(job, resume=False)
    assert caught.value.exit_code == 6
    assert not job.run.checkpoints.exists()
    assert not job.run.model_file.exists()


def test_events_are_json_and_tell_the_story(tiny):
    training.train(tiny.job(epochs=2), resume=False)
    events = tiny.events()
    # A checkpoint is written beside the next epoch, and told when it is on the disk.
    told = [event["event"] for event in events if event["event"] != "checkpoint"]
    assert told == ["started", "first_step", "epoch", "epoch", "finished"]
    checkpoints = [event for event in events if event["event"] == "checkpoint"]
    assert [event["step"] for event in checkpoints] == [tiny.steps, 2 * tiny.steps]
    ends = [event for event in events if event["event"] == "epoch"]
    assert all(events.index(end) < events.index(kept) for end, kept in zip(ends, checkpoints, strict=True))
    assert events[-1]["event"] == "finished"
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
    assert events[0] == {"time": events[0]["time"], "event": "started", "step": 0, "epoch": 0, "cursor": 0,
                         "world_size": 1}
    assert events[1]["step"] == 1
    assert {"loss", "accuracy", "validation_loss", "learning_rate", "seconds", "images_per_second"} < set(events[2])


def test_tensorboard_s_files_where_they_are_asked_for(tiny):
    pytest.importorskip("tensorboard")
    training.train(tiny.job("with", tensorboard=True, epochs=1), resume=False)
    training.train(tiny.job("without", epochs=1), resume=False)
    assert list((tiny.folder / "with" / "tensorboard").glob("events.out.*"))
    assert not (tiny.folder / "without" / "tensorboard").exists()
