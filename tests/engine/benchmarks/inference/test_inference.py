"""Formats in processes of their own: they answer as the model does, and what to deploy follows from the figures."""

import os
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from hpcai_cli.engine.benchmarks.inference import inference, inference_formats, inference_subject
from hpcai_cli.engine.benchmarks.inference.inference import Measured, choice
from hpcai_cli.engine.benchmarks.inference.inference_candidate import Candidate, Task
from hpcai_cli.engine.benchmarks.inference.inference_files import Files, bytes_of
from hpcai_cli.engine.benchmarks.measure import Curves, Figure, Table
from hpcai_cli.errors import DataError, HpcaiError, MissingError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(6, 6, 1), num_classes=3, class_names=("a", "b", "c"))


def build(recipe: Recipe) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input(recipe.input_shape)
    hidden = keras.layers.Conv2D(8, 3, activation="relu")(keras.layers.Rescaling(1 / 255)(inputs))
    return keras.Model(inputs, keras.layers.Dense(recipe.num_classes)(keras.layers.Flatten()(hidden)))


@pytest.fixture(scope="module")
def subject() -> inference_subject.Subject:
    return inference_subject.of_recipe(RECIPE, build, None, 4)


# ---- What is asked for ---------------------------------------------------------------------------------------------

def test_formats_batch_sizes_and_threads_are_read():
    assert inference_formats.parse_formats("tflite, onnx,tflite") == ("tflite", "onnx")
    assert inference_formats.parse_batch_sizes("32,1,8,1") == (1, 8, 32)
    assert inference_formats.checked_threads(0) >= 1
    for text in ("", "tflite,", "keras,torch"):
        with pytest.raises(UsageError, match="no such format"):
            inference_formats.parse_formats(text)
    for text in ("", "0", "1,", "8-1", "-3,1"):
        with pytest.raises(UsageError, match="--batch-sizes"):
            inference_formats.parse_batch_sizes(text)
    with pytest.raises(UsageError, match="not so many cores"):
        inference_formats.checked_threads(10_000)


def test_batches_past_memory_are_said_before_they_are_made():
    with pytest.raises(MissingError, match=r"a batch of 10,000,000,000 examples takes .* GB"):
        inference_subject.of_recipe(RECIPE, build, None, 10**10)


def test_a_recipe_that_leaves_its_shape_to_the_data_needs_them():
    with pytest.raises(UsageError, match="--data"):
        inference_subject.of_recipe(replace(RECIPE, input_shape=()), build, None, 1)


def test_a_file_of_one_format_becomes_no_other(subject):
    file = replace(subject, model=None, file=Path("model.tflite"), kind="tflite")
    assert inference.names_for(file, None) == inference.names_for(file, ("tflite",)) == ("tflite",)
    assert inference.names_for(subject, None) == inference_formats.USUAL
    with pytest.raises(UsageError, match="cannot become another format"):
        inference.names_for(file, ("tflite", "onnx"))


# ---- Formats in processes ------------------------------------------------------------------------------------------

def test_each_format_is_measured_and_what_is_missing_is_left_out(subject, monkeypatch, capsys):
    monkeypatch.setattr(inference, "ROUNDS", 1)
    # A model that no format but Keras' own can hold is none here: its file is what is missing.
    written = Files.file
    monkeypatch.setattr(Files, "file", lambda files, name: Path("/nothing/model.onnx") if name == "onnx"
                        else written(files, name))
    found = list(inference.measure(subject, names=("function", "tflite", "onnx"), batch_sizes=(1, 4), threads=1))
    assert "onnx is left out" in capsys.readouterr().err
    figures = {each.name: each.value for each in found if isinstance(each, Figure)}
    assert {name.split(", ", 1)[1] for name in figures} == {
        f"{name}{what}" for name in ("function", "tflite")
        for what in (", batch of 1: p50", ", batch of 4: p50", ": most examples")}
    assert all(value > 0 for value in figures.values())
    left_out, *by_size, decision = (each for each in found if isinstance(each, Table))
    assert [row[0] for row in left_out.rows] == ["onnx"] and "/nothing/model.onnx" in left_out.rows[0][1]
    for table in by_size:
        assert [row[0] for row in table.rows] == ["function", "tflite"]
        for _, p50, p90, p99, rate, calls in table.rows:
            assert calls >= 3 and rate > 0 and (calls < 100 or p50 <= p90 <= p99)
    assert {row[0] for row in decision.rows} == {"function", "tflite"} and "Deploy " in decision.title
    assert {row[0]: row[5] for row in decision.rows} == {"function": None, "tflite": None}
    memory = {row[0]: row[7] for row in decision.rows}
    assert 20 < memory["tflite"] < memory["function"]
    curves, = (each for each in found if isinstance(each, Curves))
    assert set(curves.lines) == {"function", "tflite"} and [x for x, _ in curves.lines["tflite"]] == [1, 4]


def test_files_are_written_once_and_int8_is_smaller(subject, tmp_path):
    files = Files(subject.model, tmp_path, subject.calibration)
    sizes = {name: bytes_of(files.file(name)) for name in ("tflite", "tflite-int8", "onnx", "onnx-int8")}
    assert all(size > 0 for size in sizes.values())
    moments = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert all(files.file(name).exists() for name in sizes)
    assert moments == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    kinds = {node.op_type for node in __import__("onnx").load(files.file("onnx-int8")).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds


def test_a_process_answers_with_as_many_threads_and_cores(subject, tmp_path):
    file = Files(subject.model, tmp_path, subject.calibration).file("tflite")
    with Candidate(Task("tflite", file, RECIPE.input_shape, 3, 1, (1, 4)), subject.inputs) as candidate:
        process = candidate._process.pid
        assert len(os.sched_getaffinity(process)) == 1
        times = candidate.times(4)
        assert len(times) >= 3 and all(time > 0 for time in times)
        assert candidate.scores is None and candidate.cost["open_seconds"] > 0
        candidate._process.kill()
        with pytest.raises(DataError, match="exit status -9"):
            candidate.times(1)
    assert not Path(f"/proc/{process}").exists()


def test_a_broken_file_is_told_in_one_line(tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"nothing")
    with pytest.raises(DataError, match="TFLite"):
        Candidate(Task("tflite", tmp_path / "model.tflite", (2,), 3, 1, (1,)), np.zeros((1, 2), np.float32))


def test_where_nothing_can_be_measured_it_fails(subject, monkeypatch):
    monkeypatch.setattr(Files, "file", lambda files, name: Path("/nothing/model.onnx"))
    with pytest.raises(HpcaiError, match="no format can be measured"):
        list(inference.measure(subject, names=("onnx",), batch_sizes=(1,), threads=1))


# ---- What to deploy ------------------------------------------------------------------------------------------------

def measured(name: str, milliseconds: float, *, size: int = 100, metric: float | None = None,
             large: float | None = None) -> Measured:
    """A format whose rounds lie within 1 % of its time; `large` is that of a batch of 32."""
    rounds = {1: [[milliseconds * (1 + 0.005 * number)] * 100 for number in range(-2, 3)]}
    if large:
        rounds[32] = [[large] * 100] * 5
    return Measured(name, size, {"open_seconds": 1.0, "peak_memory_mb": 1.0}, metric, rounds)


@pytest.mark.parametrize(("found", "chosen"), [
    ([measured("function", 2.0), measured("tflite", 1.0)], "tflite"),
    # Equally fast: the smaller one.
    ([measured("onnx", 1.0), measured("tflite", 1.01, size=50)], "tflite"),
    ([measured("onnx", 1.0), measured("tflite", 1.2, size=50)], "onnx"),
    # None that hpcai serves: keras and onnx-int8.
    ([measured("keras", 0.1), measured("onnx-int8", 0.2), measured("function", 2.0)], "function"),
    # One that has lost more than a hundredth of accuracy.
    ([measured("tflite", 1.0, metric=0.99), measured("tflite-int8", 0.5, metric=0.97)], "tflite"),
    ([measured("tflite", 1.0, metric=0.99), measured("tflite-int8", 0.5, metric=0.985)], "tflite-int8")])
def test_the_smallest_of_those_that_answer_soonest_is_deployed(subject, found, chosen):
    assert choice(subject, found, 1).startswith(f"Deploy {chosen}: ")


def test_the_sentence_names_the_command_and_what_gives_most(subject):
    run = replace(subject, run=Path("runs/tiny-1"))
    found = [measured("tflite-int8", 0.5, metric=0.985, large=16.0), measured("onnx", 1.0, metric=0.99, large=4.0)]
    said = choice(run, found, 1)
    assert said == ("Deploy tflite-int8: 0.5 ms for a batch of 1, accuracy 0.9850 (onnx gives most, 8,000/s in batches "
                    "of 32); hpcai compress runs/tiny-1 --quantize int8")
    assert choice(subject, found, 1).endswith("untrained, so that accuracy is for a RUN to tell")


def test_the_error_of_a_regression_may_grow_by_a_hundredth(subject):
    regression = replace(subject, recipe=replace(RECIPE, task="regression", num_classes=0, class_names=()))
    worse = [measured("tflite", 1.0, metric=2.0), measured("tflite-int8", 0.5, metric=2.03)]
    assert choice(regression, worse, 1).startswith("Deploy tflite: ")
    same = [measured("tflite", 1.0, metric=2.0), measured("tflite-int8", 0.5, metric=2.01)]
    assert choice(regression, same, 1).startswith("Deploy tflite-int8: ")
    assert "mean absolute error 2.0100" in choice(regression, same, 1)
