"""hpcai evaluate: figures on other data, conditions on them, thresholds that the run chose."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn import metrics

from hpcai_cli.engine import store


def write_data(path: str, splits: dict, names: tuple[str, ...] = ("no", "yes")) -> Path:
    store.write(Path(path), {split: {"features": inputs, "labels": labels} for split, (inputs, labels) in
                             splits.items()}, recipe="two", class_names=names, source_fingerprint=path, options={})
    return Path(path)


TWO = '''"""Two classes, one logit."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="two", summary="for tests", inputs="features", input_shape=(3,), num_classes=2,
                class_names=("no", "yes"), epochs=3, learning_rate=0.05, decision_threshold="f1", best_by="roc_auc")


def load(source, recipe):
    return {}


def build_model(recipe):
    import keras

    return keras.Sequential([keras.Input(recipe.input_shape), keras.layers.Normalization(), keras.layers.Dense(1)])


def adapt(model, inputs, labels, recipe):
    model.layers[0].adapt(inputs)
'''


def examples(count: int, seed: int, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    labels = (source.random(count) < share).astype(np.int64)
    inputs = (source.normal(size=(count, 3)) * [1, 20, 0.1] + labels[:, None] * [1, 20, 0] + [5, 0, 100])
    return inputs.astype(np.float32), labels


@pytest.fixture
def trained(hpcai):
    """Train a small binary run with a threshold of its own; return its data's splits."""
    Path("two.py").write_text(TWO)
    splits = {"train": examples(300, 0), "validation": examples(120, 1), "test": examples(150, 2)}
    write_data("two.h5", splits)
    done = hpcai("train", "./two.py", "--data", "two.h5", "--output", "run", "--json")
    assert done.exit_code == 0, done.stderr
    return splits, json.loads(done.stdout)


def by_hand(inputs: np.ndarray) -> np.ndarray:
    """Return the probability of the second class, from the numbers in model.keras alone."""
    import keras

    model = keras.saving.load_model("run/model.keras", compile=False)
    mean, variance = (model.layers[0].get_weights()[place].ravel() for place in (0, 1))
    kernel, bias = model.layers[1].get_weights()
    logits = (inputs - mean) / np.sqrt(variance) @ kernel[:, 0] + bias[0]
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def test_the_threshold_and_the_figures_are_those_of_scikit_learn(hpcai, trained):
    splits, result = trained
    threshold = result["decision_threshold"]
    (validation, truth), (inputs, labels) = splits["validation"], splits["test"]
    candidates = by_hand(validation)
    best = max(metrics.f1_score(truth, candidates >= candidate) for candidate in candidates)
    assert metrics.f1_score(truth, candidates >= threshold - 1e-6) == pytest.approx(best)
    done = hpcai("evaluate", "run", "--json")
    assert done.exit_code == 0, done.stderr
    document, probabilities = json.loads(done.stdout), by_hand(inputs)
    assert document["decision_threshold"] == threshold
    assert document["metrics"]["roc_auc"] == pytest.approx(metrics.roc_auc_score(labels, probabilities), abs=1e-4)
    assert document["metrics"]["f1"] == pytest.approx(metrics.f1_score(labels, probabilities >= threshold), abs=1e-6)
    assert document["metrics"]["loss"] == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-3)
    for name in ("loss", "accuracy", "roc_auc", "average_precision", "f1"):
        assert result["metrics"][name] == pytest.approx(document["metrics"][name]), name


def test_the_statistics_are_of_the_training_split_and_travel_in_the_model(trained):
    """Seen in model.keras with Keras alone: mean and variance of the training split, of no other."""
    import keras

    inputs, _ = trained[0]["train"]
    layer = keras.saving.load_model("run/model.keras", compile=False).layers[0]
    np.testing.assert_allclose(layer(inputs), (inputs - inputs.mean(axis=0)) / inputs.std(axis=0), atol=1e-3)
    with h5py.File("two.h5") as file:
        rows = file["train/features"][:]
    np.testing.assert_array_equal(rows, inputs)


def test_a_condition_on_a_figure_without_a_value_is_said(hpcai, trained):
    one_class = examples(30, 5, share=0.0)
    write_data("one.h5", {"train": trained[0]["train"], "test": one_class})
    done = hpcai("evaluate", "run", "--data", "one.h5", "--json")
    assert done.exit_code == 0, done.stderr
    assert "roc_auc" not in json.loads(done.stdout)["metrics"]
    done = hpcai("evaluate", "run", "--data", "one.h5", "--require", "roc_auc>=0.5", "--require", "accuracy>=0")
    assert done.exit_code == 3
    assert done.stderr.splitlines()[-1].startswith("error: roc_auc has no value on the test split")


def test_conditions_on_figures_of_two_classes(hpcai, trained):
    assert hpcai("evaluate", "run", "--require", "roc_auc>=0.5", "--require", "f1>0").exit_code == 0
    done = hpcai("evaluate", "run", "--require", "roc_auc>=1.1")
    assert done.exit_code == 5 and "where roc_auc>=1.1 is required" in done.stderr
    done = hpcai("evaluate", "run", "--require", "r2>=0")
    assert done.exit_code == 2 and "--require knows no 'r2'" in done.stderr


@pytest.mark.parametrize(("settings", "words"), [
    (["decision_threshold=f1", "best_by=loss"], "both classes in the validation split"),
    (["decision_threshold=half", "best_by=roc_auc"], "both classes in the validation split")])
def test_what_is_decided_on_the_validation_split_needs_both_classes_there(hpcai, settings, words):
    Path("two.py").write_text(TWO)
    write_data("one.h5", {"train": examples(60, 0), "validation": examples(20, 1, share=0.0), "test": examples(9, 2)})
    done = hpcai("train", "./two.py", "--data", "one.h5", *[word for pair in settings for word in ("--set", pair)])
    assert done.exit_code == 2
    assert words in done.stderr
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize(("splits", "words"), [
    (("train", "test"), "decision_threshold=f1 is chosen on a validation split, which the data lack")])
def test_a_threshold_needs_a_validation_split(hpcai, splits, words):
    Path("two.py").write_text(TWO)
    write_data("two.h5", {split: examples(60, 0) for split in splits})
    done = hpcai("train", "./two.py", "--data", "two.h5")
    assert done.exit_code == 2 and words in done.stderr


def test_an_adapt_that_fails_ends_the_training_in_one_sentence(hpcai):
    Path("two.py").write_text(TWO.replace("model.layers[0].adapt(inputs)", "inputs['a']"))
    write_data("two.h5", {split: examples(60, seed) for seed, split in enumerate(("train", "validation", "test"))})
    done = hpcai("train", "./two.py", "--data", "two.h5", "--output", "run")
    assert done.exit_code == 2
    assert "recipe two: adapt fails; expected a change of the model's weights" in done.stderr.splitlines()[-1]


def test_adapt_is_called_once_also_where_the_training_is_resumed(hpcai):
    Path("two.py").write_text(TWO.replace("    model.layers[0]", "    print('adapting', len(inputs), len(labels))\n"
                                          "    model.layers[0]"))
    write_data("two.h5", {split: examples(60, seed) for seed, split in enumerate(("train", "validation", "test"))})
    done = hpcai("train", "./two.py", "--data", "two.h5", "--output", "run", "--epochs", 1, "--set",
                 "schedule=constant")
    assert done.stdout.count("adapting 60 60") == 1, done.stderr
    done = hpcai("train", "--resume", "run", "--epochs", 2)
    assert done.exit_code == 0, done.stderr
    assert "adapting" not in done.stdout


# ---- The report, a comparison, slices, robustness -------------------------------------------------------------------

def answered(done) -> dict:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def test_the_report_is_three_kinds_of_files_that_say_the_same(hpcai, trained):
    document = answered(hpcai("evaluate", "run", "--json"))
    folder = Path(document["folder"])
    assert folder == Path("run/evaluation")
    assert json.loads((folder / "metrics.json").read_text()) == document
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion.png", "curves.png", "metrics.json", "reliability.png", "report.html"]
    page = (folder / "report.html").read_text()
    for name, value in document["metrics"].items():
        assert name in page and f"{value:.4f}" in page
    shown = hpcai("evaluate", "run").stdout
    low, high = document["intervals"]["roc_auc"]
    assert low < document["metrics"]["roc_auc"] < high
    assert f"{low:.4f} to {high:.4f}" in shown


def test_another_split_does_not_overwrite_the_test_split(hpcai, trained):
    test = answered(hpcai("evaluate", "run", "--json"))
    other = answered(hpcai("evaluate", "run", "--split", "validation", "--json"))
    assert json.loads(Path("run/evaluation/metrics.json").read_text()) == test
    assert json.loads(Path("run/evaluation/validation/metrics.json").read_text()) == other
    elsewhere = answered(hpcai("evaluate", "run", "--output", "there", "--json"))
    assert elsewhere["metrics"] == test["metrics"] and Path("there/report.html").is_file()
    done = hpcai("evaluate", "run", "--split", "holdout")
    assert done.exit_code == 3 and "has no holdout split; expected one of train, validation, test" in done.stderr


def test_a_checkpoint_and_a_model_file_have_the_same_report_elsewhere(hpcai, trained):
    run = answered(hpcai("evaluate", "run", "--json"))
    file = answered(hpcai("evaluate", "run/model.keras", "--json"))
    assert file["metrics"] == run["metrics"] and file["folder"] == "run/evaluation/model.keras"
    Path("model.keras").write_bytes(Path("run/model.keras").read_bytes())
    moved = answered(hpcai("evaluate", "model.keras", "--like", "run", "--json"))
    assert moved["metrics"] == run["metrics"] and moved["folder"] == "model.keras-evaluation"
    newest = sorted(Path("run/checkpoints").iterdir())[-1]
    kept = answered(hpcai("evaluate", newest, "--trust-model", "--json"))
    assert 0 < kept["metrics"]["accuracy"] <= 1 and kept["folder"] == f"run/evaluation/checkpoints/{newest.name}"
    assert json.loads(Path("run/evaluation/metrics.json").read_text()) == run


def test_two_runs_on_the_same_examples(hpcai, trained):
    splits, _ = trained
    worse = hpcai("train", "./two.py", "--data", "two.h5", "--output", "worse", "--set", "learning_rate=1e-9")
    assert worse.exit_code == 0, worse.stderr
    asked = ("evaluate", "run", "--compare", "worse")
    document = answered(hpcai(*asked, "--json"))
    one, other = document["metrics"], answered(hpcai("evaluate", "worse", "--json"))["metrics"]
    found = document["comparison"]
    assert found["difference"] == pytest.approx(one["accuracy"] - other["accuracy"])
    assert found["differences"]["loss"]["theirs"] == pytest.approx(other["loss"])
    names, labels = ("no", "yes"), splits["test"][1]
    only = [sum(row["answer"] == row["label"] for row in found["changed"]),
            sum(row["other_answer"] == row["label"] for row in found["changed"])]
    assert only == [found["mcnemar"]["only_ours_right"], found["mcnemar"]["only_theirs_right"]]
    assert all(row["label"] == names[labels[row["row"]]] for row in found["changed"])
    assert "McNemar" in Path("run/evaluation/report.html").read_text()
    assert "McNemar" in hpcai(*asked).stdout
    assert hpcai(*asked, "--require", "difference_high>=-1", "--require", "p_value<=1").exit_code == 0
    done = hpcai(*asked, "--require", "difference_low>=1")
    assert done.exit_code == 5 and "where difference_low>=1 is required" in done.stderr
    hpcai("evaluate", "run")
    assert "comparison" not in json.loads(Path("run/evaluation/metrics.json").read_text())


def test_a_run_on_other_data_cannot_be_compared(hpcai, trained):
    assert hpcai("train", "linear-regression", "--epochs", 1, "--output", "line").exit_code == 0
    done = hpcai("evaluate", "run", "--compare", "line")
    assert done.exit_code == 3 and "line cannot answer the same examples" in done.stderr
    done = hpcai("evaluate", "run", "--require", "difference>=0")
    assert done.exit_code == 2 and "knows no 'difference' without --compare MODEL" in done.stderr
    assert not Path("run/evaluation").exists()


def test_a_model_that_gives_no_numbers_is_named(hpcai, trained):
    import keras

    model = keras.saving.load_model("run/model.keras", compile=False)
    model.layers[1].set_weights([np.full_like(weight, np.nan) for weight in model.layers[1].get_weights()])
    model.save("run/model.keras")
    done = hpcai("evaluate", "run")
    assert done.exit_code == 3
    assert "no finite numbers for 150 of 150 examples, first for row 0" in done.stderr.splitlines()[-1]
    assert not Path("run/evaluation").exists()


def test_slices_of_classes_and_a_condition_on_an_interval(hpcai, trained):
    document = answered(hpcai("evaluate", "run", "--by", "class", "--json", "--require", "accuracy_low>=0"))
    assert [(row["name"], row["count"]) for row in document["slices"]] == [
        (row["name"], row["support"]) for row in document["classes"]]
    done = hpcai("evaluate", "run", "--by", "colour")
    assert done.exit_code == 2 and "--by knows no column 'colour'; expected one of class" in done.stderr
    done = hpcai("evaluate", "run", "--require", "accuracy_high<0.01", "--require", "loss_low>100")
    assert done.exit_code == 5 and "; loss_low is " in done.stderr
    done = hpcai("evaluate", "run", "--robustness")
    assert done.exit_code == 2 and "--robustness corrupts pictures" in done.stderr


def test_a_table_by_its_columns(hpcai):
    source = np.random.default_rng(0)
    rows = [f"{value:.3f},{source.choice(['red', 'blue'])},{'yes' if value > 0 else 'no'}"
            for value in source.normal(size=200)]
    Path("rows.csv").write_text("x,kind,label\n" + "\n".join(rows) + "\n")
    Path("fewer.csv").write_text("x,kind,label\n" + "\n".join(rows).replace("blue", "green") + "\n")
    for name in ("rows", "fewer"):
        done = hpcai("preprocess", "table", "--source", f"{name}.csv", "--output", f"{name}.h5", "--set", "label=label")
        assert done.exit_code == 0, done.stderr
    assert hpcai("train", "table", "--data", "rows.h5", "--output", "run", "--epochs", 2).exit_code == 0
    document = answered(hpcai("evaluate", "run", "--by", "kind", "--json"))
    assert {row["name"] for row in document["slices"]} == {"red", "blue"}
    assert sum(row["count"] for row in document["slices"]) == document["examples"]
    assert len(answered(hpcai("evaluate", "run", "--by", "x", "--json"))["slices"]) == 4
    done = hpcai("evaluate", "run", "--data", "fewer.h5")
    assert done.exit_code == 3 and "encodes its columns otherwise" in done.stderr


def test_pictures_and_their_robustness(hpcai):
    assert hpcai("train", "mnist-mlp", "--epochs", 1, "--output", "digits").exit_code == 0
    document = answered(hpcai("evaluate", "digits", "--robustness", "--json", "--require", "robust_accuracy>=0.1"))
    assert len(document["robustness"]["rows"]) == 12
    assert document["robustness"]["clean"] == document["metrics"]["accuracy"]
    assert {"hardest.png", "robustness.png"} <= {path.name for path in Path("digits/evaluation").iterdir()}
    assert document["metrics"]["accuracy"] <= document["metrics"]["top_5_accuracy"]
    hpcai("evaluate", "digits")
    assert not Path("digits/evaluation/robustness.png").exists()
