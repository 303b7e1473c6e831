"""Any CSV file, by the command line alone: a class, a number, and what is said of a label that is not named."""

import json

from sklearn.datasets import load_diabetes


def test_the_wines_are_told_apart(hpcai):
    assert hpcai("preprocess", "table", "--source", "sample", "--output", "wine.h5").exit_code == 0
    done = hpcai("train", "table", "--data", "wine.h5", "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["accuracy"] > 0.9


def test_a_number_is_predicted_in_its_own_unit(hpcai, tmp_path):
    # A tenfold label shows whether the model minds the unit.
    frame = load_diabetes(as_frame=True, scaled=False).frame
    frame["target"] *= 1000
    frame.to_csv(tmp_path / "diabetes.csv", index=False, sep=";", decimal=",")
    settings = ("--set", "task=regression")
    done = hpcai("preprocess", "table", "--source", tmp_path, "--output", "d.h5", "--set", "label=target", *settings)
    assert done.exit_code == 0, done.stderr
    done = hpcai("train", "table", "--data", "d.h5", *settings, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["r2"] > 0.15


def test_the_label_has_to_be_named(hpcai, tmp_path):
    (tmp_path / "data.csv").write_text("a,y\n1,2\n")
    done = hpcai("preprocess", "table", "--source", tmp_path)
    assert done.exit_code == 2
    assert "--set label=COLUMN" in done.stderr
