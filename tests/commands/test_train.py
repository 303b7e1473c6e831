"""hpcai train, evaluate and predict as a user meets them, on the built-in sample, in this process."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def trained(hpcai):
    """A run that was trained on the sample; short, since what is tested is the command line."""
    done = hpcai("train", "mnist-mlp", "--epochs", "4", "--output", "run", "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_train_without_data_takes_the_sample_and_says_so(hpcai):
    done = hpcai("train", "mnist-mlp", "--epochs", "1")
    assert done.exit_code == 0
    assert "built-in sample" in done.stderr
    assert "hpcai evaluate runs/mnist-mlp-1" in done.stdout


def test_the_run_folder_holds_what_later_verbs_need(trained):
    assert trained["schema"] == "hpcai.train/1"
    assert trained["metrics"]["accuracy"] > 0.8
    assert {path.name for path in Path("run").iterdir()} == {
        "recipe.json", "manifest.json", "events.jsonl", "history.csv", "checkpoints", "model.keras", "result.json"}
    assert json.loads(Path("run/recipe.json").read_text())["epochs"] == 4
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert manifest["recipe_reference"] == "mnist-mlp"
    assert manifest["versions"]["tensorflow"].startswith("2.")
    assert manifest["precision_reason"]
    assert len(Path("run/history.csv").read_text().splitlines()) == 5


def test_the_default_sample_is_written_once(hpcai, trained):
    again = hpcai("train", "mnist-mlp", "--epochs", "1", "--output", "other")
    assert again.exit_code == 0
    assert "reading sample" not in again.stderr


@pytest.mark.parametrize(("words", "code", "said"), [
    (("nope",), 2, "hpcai recipes list"),
    ((), 2, "train needs a recipe"),
    (("mnist", "--data", "none.h5"), 3, "hpcai preprocess"),
    (("mnist", "--set", "epoch=3"), 2, "epochs"),
    (("mnist", "--set", "width"), 2, "key=value"),
    (("mnist", "--epochs", "0"), 2, "at least 1"),
    (("mnist", "--batch-size", "0"), 2, "at least 1"),
    (("mnist", "--learning-rate", "nan"), 2, "finite"),
    (("mnist", "--set", "architecture=huge"), 2, "one of compact, tutorial"),
    (("--resume", "none"), 3, "not a run folder"),
    (("mnist", "--from", "none.toml"), 3, "--from"),
])
def test_wrong_words_end_in_one_sentence(hpcai, words, code, said):
    done = hpcai("train", *words)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1


def test_data_that_does_not_fit_the_recipe_is_refused_before_a_folder_is_made(hpcai):
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "digits.h5").exit_code == 0
    assert hpcai("recipes", "copy", "mnist-mlp", "wide.py").exit_code == 0
    text = Path("wide.py").read_text()
    Path("wide.py").write_text(text.replace("input_shape=(28, 28, 1)", "input_shape=(32, 32, 3)"))
    done = hpcai("train", "./wide.py", "--data", "digits.h5")
    assert done.exit_code == 3
    assert "(28, 28, 1)" in done.stderr and "(32, 32, 3)" in done.stderr
    assert not Path("runs").exists()


def test_an_output_that_holds_something_is_left_alone(hpcai):
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("years of work")
    done = hpcai("train", "mnist", "--output", "full")
    assert done.exit_code == 2
    assert [path.name for path in Path("full").iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_resumed_to_the_same_result(hpcai, trained):
    again = hpcai("train", "--resume", "run", "--json")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["metrics"]["accuracy"] == trained["metrics"]["accuracy"]


def test_evaluate_writes_its_report_and_gates(hpcai, trained):
    done = hpcai("evaluate", "run", "--require", "accuracy>=0.5", "--require", "loss<=5", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["metrics"]["accuracy"] == pytest.approx(trained["metrics"]["accuracy"])
    assert np.sum(document["confusion"]) == document["examples"] == 359
    assert json.loads(Path("run/evaluation/metrics.json").read_text()) == document
    with Image.open("run/evaluation/confusion.png") as picture:
        picture.verify()
    failed = hpcai("evaluate", "run", "--require", "accuracy>=1.01")
    assert failed.exit_code == 5
    assert "accuracy" in failed.stdout, "the figures are shown all the same"


@pytest.mark.parametrize(("words", "code", "said"), [
    (("run", "--require", "accurcy>=0.9"), 2, "perhaps 'accuracy'"),
    (("run", "--require", "accuracy about 0.9"), 2, "accuracy>=0.99"),
    (("run", "--split", "holdout"), 3, "train, validation, test"),
    (("run", "--data", "none.h5"), 3, "hpcai preprocess"),
    (("nowhere",), 3, "not a run folder"),
])
def test_evaluate_with_wrong_words(hpcai, trained, words, code, said):
    done = hpcai("evaluate", *words)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr


def test_predict_reports_an_unreadable_file_in_its_line_and_goes_on(hpcai, trained):
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("black.png")
    with open("broken.png", "w") as stream:
        stream.write("no picture")
    done = hpcai("predict", "run", "-", "--json", stdin="broken.png\nblack.png\nmissing.png\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["file"] for line in lines] == ["broken.png", "black.png", "missing.png"]
    assert "error" in lines[0] and "error" in lines[2]
    assert lines[1]["label"] in "0123456789"
    assert 0 < lines[1]["probability"] <= 1
    assert done.exit_code == 3


def test_predict_before_the_training_ended_says_how_to_end_it(hpcai, trained):
    Path("run/model.keras").unlink()
    done = hpcai("predict", "run", "black.png")
    assert done.exit_code == 3
    assert "hpcai train --resume run" in done.stderr
