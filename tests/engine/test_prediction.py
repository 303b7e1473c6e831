"""Predictions for files: in order, each with its own answer or its own error."""

import itertools

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine import prediction

NAMES = ("dark", "gray", "light")


def run_forward(images):
    """A model that can be done in the head: the brighter the picture, the higher the class."""
    run_forward.shapes.append(tuple(images.shape))
    means = images.mean(axis=(1, 2, 3))
    return -np.abs(means[:, None] - [20.0, 120.0, 220.0]).astype(np.float32)


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


# ---- Thresholds and numbers ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("threshold", "label", "probability"), [(None, "no", 0.7), (0.25, "yes", 0.3),
                                                                 (0.3001, "no", 0.7)])
def test_a_threshold_decides_and_the_probability_stays_that_of_the_label(tmp_path, threshold, label, probability):
    logit = np.log(0.3 / 0.7)
    answers = prediction.predict_images(
        [write(tmp_path, "a.png", 1)], shape=(4, 4, 1), class_names=("no", "yes"), threshold=threshold,
        run_forward=lambda images: np.array([[0.0, logit]] * len(images), np.float32))
    assert list(answers) == [{"file": str(tmp_path / "a.png"), "label": label,
                              "probability": pytest.approx(probability, rel=1e-5)}]


def test_a_picture_can_be_given_a_number(tmp_path):
    answers = prediction.predict_images(
        [write(tmp_path, "a.png", 7), "none.png"], shape=(4, 4, 1), class_names=(),
        run_forward=lambda images: images.astype(np.float32).mean(axis=(1, 2)) * 2)
    first, second = answers
    assert first == {"file": str(tmp_path / "a.png"), "value": 14.0}
    assert set(second) == {"file", "error"}


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_an_answer_that_is_no_number_is_an_error(tmp_path, score):
    name = write(tmp_path, "a.png", 7)
    for names, scores in ((("no", "yes"), [[0.0, 1.0], [score, score]]), ((), [[1.0], [score]])):
        answers = prediction.predict_images([name, name], shape=(4, 4, 1), class_names=names,
                                            run_forward=lambda images, scores=scores: np.array(scores, np.float32))
        first, second = answers
        assert "error" not in first
        assert set(second) == {"file", "error"} and "which is no number" in second["error"]


# ---- Rows ----------------------------------------------------------------------------------------------------------

COLUMNS = [{"name": "a", "kind": "number", "fill": 0.0, "offset": 0.0, "mean": 0.0, "deviation": 1.0, "missing": 0},
           {"name": "b", "kind": "category", "categories": ["x", "y"], "missing": 0}]
DETAILS = {"columns": COLUMNS, "features": ["a", "b=x", "b=y"], "header": True, "names": ["a", "b", "y"],
           "label": {"name": "y", "task": "regression", "classes": []}}


def predict_rows(*files, class_names=()) -> list[dict]:
    seen = []

    def forward(inputs):
        seen.append(inputs.shape[0])
        numbers = inputs[:, :1] + 100 * inputs[:, 1:2] + 1000 * inputs[:, 2:3]
        return numbers if not class_names else np.concatenate([numbers, np.zeros_like(numbers)], axis=1)

    found = list(prediction.predict_rows(map(str, files), run_forward=forward, details=DETAILS,
                                         class_names=class_names))
    assert set(seen) <= {prediction.BATCH_SIZE}
    return found


def test_each_row_of_each_file_has_its_line(tmp_path):
    (tmp_path / "one.csv").write_text("b,a\nx,1\ny,2.5\n")
    (tmp_path / "two.csv").write_text("a;b\n3;x\n")
    one, two = str(tmp_path / "one.csv"), str(tmp_path / "two.csv")
    assert predict_rows(one, two) == [{"file": one, "row": 1, "value": 101.0}, {"file": one, "row": 2, "value": 1002.5},
                                      {"file": two, "row": 1, "value": 103.0}]


def test_a_row_that_cannot_be_read_has_its_error_and_the_rest_goes_on(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,x\nmany,x\n3,x,7,8\n4,y\n")
    found = predict_rows(tmp_path / "rows.csv", class_names=("low", "high"))
    assert [answer["row"] for answer in found] == [1, 2, 3, 4]
    assert [answer.get("label") for answer in found] == ["low", None, None, "low"]
    assert found[1]["error"].startswith("line 3: column 'a' holds 'many', which is no number")
    assert found[2]["error"].startswith("line 4: ")
    assert set(found[1]) == {"file", "row", "error"}


def test_a_file_without_a_column_or_that_is_none_has_one_line(tmp_path):
    (tmp_path / "lacks.csv").write_text("a,c\n1,x\n")
    (tmp_path / "good.csv").write_text("a,b\n1,x\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "picture.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
    files = [tmp_path / name for name in ("lacks.csv", "good.csv", "none.csv", "empty.csv", "picture.csv")]
    found = predict_rows(*files)
    assert [answer["file"] for answer in found] == list(map(str, files))
    assert [set(answer) for answer in found] == [{"file", "error"}, {"file", "row", "value"}, *[{"file", "error"}] * 3]
    assert found[0]["error"].startswith("the rows lack the column 'b'")


@pytest.mark.parametrize("count", [1, 32, 33, 100])
def test_more_rows_than_one_batch(tmp_path, count):
    (tmp_path / "rows.csv").write_text("a,b\n" + "".join(f"{number},{'xy'[number % 2]}\n" for number in range(count)))
    found = predict_rows(tmp_path / "rows.csv")
    assert [answer["value"] for answer in found] == [number + (100, 1000)[number % 2] for number in range(count)]
    assert [answer["row"] for answer in found] == list(range(1, count + 1))


def test_a_number_beyond_float32_counts_as_missing_as_in_training(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\n1,x\n1e60,x\n2,y\n")
    assert [answer["value"] for answer in predict_rows(tmp_path / "rows.csv")] == [101, 100, 1002]
