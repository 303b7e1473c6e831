"""hpcai benchmark inference as a user meets it: a trained run in several formats, and what is refused."""

import json
from pathlib import Path

import pytest

from hpcai_cli.engine import model_file
from hpcai_cli.engine.benchmarks.inference import inference
from hpcai_cli.engine.compression import quantization


def figures_of(done) -> dict[str, dict]:
    assert done.exit_code == 0, done.stderr
    return {figure["name"].split(", ", 1)[1]: figure for figure in json.loads(done.stdout)["figures"]}


@pytest.fixture
def run(hpcai) -> str:
    """A run that was trained for one epoch."""
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "digits.h5").exit_code == 0
    done = hpcai("train", "mnist-mlp", "--data", "digits.h5", "--epochs", 1, "--output", "run")
    assert done.exit_code == 0, done.stderr
    return "run"


def test_a_run_in_several_formats_with_the_accuracy_of_evaluate(hpcai, run, monkeypatch):
    monkeypatch.setattr(inference, "ROUNDS", 1)
    figures = figures_of(hpcai("benchmark", "inference", run, "--formats", "tflite,onnx,tflite-int8", "--batch-sizes",
                               "1,3", "--threads", 1, "--json"))
    evaluated = json.loads(hpcai("evaluate", run, "--json").stdout)["metrics"]["accuracy"]
    for name in ("tflite", "onnx"):
        assert figures[f"{name}: accuracy"]["value"] == pytest.approx(evaluated, abs=0.003)
    assert figures["tflite-int8: accuracy"]["value"] == pytest.approx(evaluated, abs=0.03)
    for name in ("tflite", "onnx", "tflite-int8"):
        assert figures[f"{name}, batch of 3: p50"]["value"] > 0


def test_a_file_of_one_format_stays_one(hpcai, run, monkeypatch):
    monkeypatch.setattr(inference, "ROUNDS", 1)
    Path("run/small.tflite").write_bytes(quantization.convert(model_file.load(Path("run/model.keras")), (28, 28, 1),
                                                              kind="float16"))
    words = ("benchmark", "inference", "run/small.tflite", "--batch-sizes", 2, "--threads", 1)
    refused = hpcai(*words, "--formats", "onnx")
    assert refused.exit_code == 2 and "cannot become another format" in refused.stderr
    # The data of the run may be gone: no accuracy then.
    Path("digits.h5").unlink()
    done = hpcai(*words)
    assert done.exit_code == 0 and "no accuracy" in done.stderr, done.stderr
    assert "Deploy tflite: " in done.stdout and "onnx" not in done.stdout


@pytest.mark.parametrize(("words", "code", "said"), [
    (("--formats", "torch"), 2, "no such format"),
    (("--batch-sizes", "many"), 2, "--batch-sizes"),
    (("--threads", 100_000), 2, "not so many cores"),
    (("minst",), 2, "did you mean `mnist`"),
    (("runs/none",), 3, "not a run folder"),
    (("none.py",), 2, "no such recipe file"),
    (("mnist", "--data", "none.h5"), 3, "none.h5"),
    (("mnist", "--batch-sizes", "1,100000000000"), 4, "GB")])
def test_what_cannot_be_measured_is_said_before_anything_starts(hpcai, words, code, said):
    done = hpcai("benchmark", "inference", *words)
    assert done.exit_code == code and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "opening" not in done.stderr
