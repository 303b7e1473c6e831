"""Predictions for files: in order, each with its own answer or its own error."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from hpcai_cli.engine import prediction

NAMES = ("dark", "gray", "light")


def run_forward(images):
    """A model that can be done in the head: the brighter the picture, the higher the class."""
    run_forward.shapes.append(tuple(images.shape))
    means = images.numpy().mean(axis=(1, 2, 3))
    return tf.constant(-np.abs(means[:, None] - [20.0, 120.0, 220.0]), tf.float32)


@pytest.fixture(autouse=True)
def shapes():
    run_forward.shapes = []


def predict(names) -> list[dict]:
    return list(prediction.predict_images(names, run_forward=run_forward, shape=(4, 4, 1), class_names=NAMES))


def write(tmp_path, name: str, brightness: int) -> str:
    Image.new("L", (8, 8), brightness).save(tmp_path / name)
    return str(tmp_path / name)


def test_answers_keep_the_order_and_errors_their_lines(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    names = [write(tmp_path, "light.png", 220), str(tmp_path / "text.png"), write(tmp_path, "dark.png", 20),
             str(tmp_path / "missing.png"), write(tmp_path, "gray.png", 120), str(tmp_path / "light.png")]
    answers = predict(names)
    assert [answer["file"] for answer in answers] == names
    assert [answer.get("label") for answer in answers] == ["light", None, "dark", None, "gray", "light"]
    assert answers[1] == {"file": names[1], "error": answers[1]["error"]}
    assert answers[1]["error"].startswith("not an image")
    assert answers[3]["error"].startswith("the file does not exist")
    for number in (0, 2, 4, 5):
        assert set(answers[number]) == {"file", "label", "probability"}
        assert type(answers[number]["probability"]) is float
        assert answers[number]["probability"] == pytest.approx(1)


def test_the_probability_is_that_of_the_label(tmp_path):
    answer, = predict([write(tmp_path, "between.png", 71)])
    scores = np.exp([-51.0, -49.0, -149.0])
    assert answer["label"] == "gray"
    assert answer["probability"] == pytest.approx(scores[1] / scores.sum())


@pytest.mark.parametrize("count", [1, 31, 32, 33, 75])
def test_more_files_than_one_batch(tmp_path, count):
    source = np.random.default_rng(count)
    kinds, names = source.integers(0, 4, count), []
    for number, kind in enumerate(kinds):
        name = str(tmp_path / f"{number}.png")
        names.append(name if kind == 3 else write(tmp_path, f"{number}.png", (20, 120, 220)[kind]))
    answers = predict(names)
    assert [answer["file"] for answer in answers] == names
    assert [answer.get("label", "error") for answer in answers] == [(*NAMES, "error")[kind] for kind in kinds]
    # One shape for all, or TensorFlow would compile again.
    assert set(run_forward.shapes) <= {(prediction.BATCH_SIZE, 4, 4, 1)}


def test_a_batch_without_a_readable_file_asks_no_model(tmp_path):
    assert [set(answer) for answer in predict([str(tmp_path / "missing.png")] * 40)] == [{"file", "error"}] * 40
    assert run_forward.shapes == []
    assert predict([]) == []


def test_answers_come_before_the_names_end(tmp_path):
    """A pipe that never ends gets its answers all the same."""
    name = write(tmp_path, "dark.png", 20)
    answers = prediction.predict_images(itertools.repeat(name), run_forward=run_forward, shape=(4, 4, 1),
                                        class_names=NAMES)
    assert next(answers)["label"] == "dark"
    assert len(run_forward.shapes) == 1
