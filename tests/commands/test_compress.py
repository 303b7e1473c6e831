"""hpcai compress as a user meets it: a run of the sample's digits, every kind of step, the gates, and going on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine import model_file
from hpcai_cli.engine.compression import inference_cost, plan, search


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Train once for all tests here."""
    from typer.testing import CliRunner

    from hpcai_cli.main import app

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCAI_CACHE", str(folder / "cache"))
        data = folder / "digits.h5"
        for words in (["preprocess", "mnist", "--source", "sample", "--output", str(data)],
                      ["train", "mnist", "--data", str(data), "--set", "width=4", "--epochs", "12", "--output",
                       str(folder / "run")]):
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, done.stderr
    return folder / "run"


@pytest.fixture
def run(run_folder, monkeypatch) -> Path:
    shutil.copytree(run_folder, "run")
    # Few rounds: what is tested here is not how steady the clock is.
    monkeypatch.setattr(inference_cost, "ROUNDS", 1)
    monkeypatch.setattr(inference_cost, "SECONDS", 0.01)
    return Path("run")


def report_of(done) -> dict:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def form(report: dict, name: str) -> dict:
    return next(row for row in report["forms"] if row["name"] == name)


def test_int8_is_smaller_and_goes_through_evaluate_and_predict(hpcai, run):
    report = report_of(hpcai("compress", run, "--quantize", "int8", "--max-drop", "0.05", "--json"))
    assert report["schema"] == "hpcai.compress/1"
    assert [row["name"] for row in report["forms"]][:2] == ["original", "float32"]
    small = form(report, Path(report["chosen"]).name)
    assert small["bytes"] < 0.6 * form(report, "float32")["bytes"]
    assert small["drop"] <= 0.05
    low, high = small["interval"]
    assert low <= small["metrics"]["accuracy"] <= high
    assert all(row["latency_ms"]["1"] > 0 and row["peak_memory_mb"] > 50 for row in report["forms"])
    assert (Path(report["chosen"]) / "compression.png").read_bytes()[:4] == b"\x89PNG"

    judged = hpcai("evaluate", report["chosen"], "--json")
    assert judged.exit_code == 0, judged.stderr
    assert json.loads(judged.stdout)["metrics"]["accuracy"] == pytest.approx(small["metrics"]["accuracy"])
    Image.fromarray(np.zeros((28, 28), np.uint8)).save("digit.png")
    said = json.loads(hpcai("predict", report["chosen"], "digit.png", "--json").stdout)
    assert set(said) == {"file", "label", "probability"}


@pytest.mark.long
def test_pruned_weights_are_zero_in_the_file_and_pack_well(hpcai, run):
    report = report_of(hpcai("compress", run, "--prune", "0.8", "--epochs", "4", "--json"))
    pruned, packed = form(report, "prune_0.8"), form(report, "prune_0.8-float32")
    assert pruned["sparsity"] == pytest.approx(0.8, abs=0.01)
    assert packed["bytes_gzipped"] < 0.6 * form(report, "float32")["bytes_gzipped"]
    assert pruned["macs"] == form(report, "original")["macs"]


@pytest.mark.long
def test_the_same_command_gives_the_same_weights(hpcai, run):
    found = []
    for _ in range(2):
        report_of(hpcai("compress", run, "--prune", "0.5", "--epochs", "2", "--json"))
        found.append(model_file.load(run / "compressed" / "prune_0.5" / "model.keras").get_weights())
        shutil.rmtree(run / "compressed")
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.long
def test_filters_really_go(hpcai, run):
    report = report_of(hpcai("compress", run, "--prune", "0.5", "--pattern", "filters", "--epochs", "3", "--json"))
    narrow, original = form(report, "narrow_0.5"), form(report, "original")
    assert narrow["macs"] <= 0.5 * original["macs"]
    assert narrow["parameters"] < original["parameters"]
    assert narrow["bytes"] < original["bytes"]
    narrow = run / "compressed" / "narrow_0.5"
    newest = report_of(hpcai("evaluate", sorted(narrow.glob("checkpoints/step-*"))[-1], "--json"))
    assert newest["metrics"]["accuracy"] == pytest.approx(form(report, "narrow_0.5")["metrics"]["accuracy"], abs=0.1)


@pytest.mark.long
def test_a_chain_of_all_steps_leaves_each_in_a_folder_of_its_own(hpcai, run):
    words = ["compress", run, "--distill", "width=3", "--prune", "0.5", "--quantize", "int8", "--aware", "--epochs",
             "3", "--json"]
    report = report_of(hpcai(*words))
    folders = {path.name for path in (run / "compressed").iterdir()}
    assert {"distil_width=3", "distil_width=3-prune_0.5", "distil_width=3-prune_0.5-aware",
            "distil_width=3-prune_0.5-aware-int8"} <= folders
    # What was pruned stays pruned through the training under quantization, and a narrower student has fewer weights.
    assert form(report, "distil_width=3-prune_0.5-aware-int8")["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert form(report, "float32")["parameters"] > 1.5 * report["forms"][-1]["parameters"]
    # A checkpoint has the shape of what the step trained, not that of the recipe's own model.
    aware = run / "compressed" / "distil_width=3-prune_0.5-aware"
    newest = report_of(hpcai("evaluate", sorted(aware.glob("checkpoints/step-*"))[-1], "--json"))
    int8 = form(report, "distil_width=3-prune_0.5-aware-int8")["metrics"]["accuracy"]
    assert newest["metrics"]["accuracy"] == pytest.approx(int8, abs=0.03)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("model.*")}
    again = report_of(hpcai(*words))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("model.*")} == before
    assert again["metrics"] == report["metrics"]


@pytest.mark.long
def test_a_student_of_the_same_shapes_begins_with_the_teachers_weights(hpcai, run):
    report = report_of(hpcai("compress", run, "--distill", "dropout=0.1", "--epochs", "1", "--learning-rate", "1e-9",
                             "--json"))
    assert form(report, "distil_dropout=0.1")["drop"] == pytest.approx(0, abs=0.005)
    narrower = report_of(hpcai("compress", run, "--distill", "width=3", "--epochs", "1", "--learning-rate", "1e-9",
                               "--json"))
    assert form(narrower, "distil_width=3")["drop"] > 0.3


@pytest.mark.long
def test_a_student_of_a_table_is_fitted_to_the_data_as_its_teacher_was(hpcai):
    for words in (["preprocess", "shoppers", "--source", "sample", "--output", "visits.h5"],
                  ["train", "shoppers", "--data", "visits.h5", "--epochs", "2", "--output", "visits"],
                  ["compress", "visits", "--distill", "units=16", "--epochs", "2"]):
        done = hpcai(*words)
        assert done.exit_code == 0, done.stderr
    teacher, student = (model_file.load(Path(folder, "model.keras")) for folder in (
        "visits", "visits/compressed/distil_units=16"))
    assert student.count_params() < teacher.count_params()
    np.testing.assert_allclose(student.get_layer("bins").mean, teacher.get_layer("bins").mean, rtol=1e-5)


@pytest.mark.long
def test_a_form_that_was_killed_before_its_first_checkpoint_is_made_all_the_same(hpcai, run):
    report_of(hpcai("compress", run, "--prune", "0.5", "--epochs", "1", "--json"))
    made = run / "compressed" / "prune_0.5"
    for name in ("result.json", "model.keras"):
        (made / name).unlink()
    checkpoints = list((made / "checkpoints").iterdir())
    shutil.copytree(checkpoints[0], made / "checkpoints" / ".step-00000001.host.1.part")
    for checkpoint in checkpoints:
        (checkpoint / "arrays.npz").write_bytes(b"torn")
    report = report_of(hpcai("compress", run, "--prune", "0.5", "--epochs", "1", "--json"))
    assert form(report, "prune_0.5")["sparsity"] == pytest.approx(0.5, abs=0.02)


@pytest.mark.long
def test_other_settings_do_not_replace_what_is_there_unasked(hpcai, run):
    report_of(hpcai("compress", run, "--prune", "0.5", "--epochs", "1", "--json"))
    refused = hpcai("compress", run, "--prune", "0.5", "--epochs", "2")
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert hpcai("compress", run, "--prune", "0.5", "--epochs", "2", "--force").exit_code == 0


@pytest.mark.long
def test_a_model_that_is_converted_already_is_refused(hpcai, run):
    report = report_of(hpcai("compress", run, "--quantize", "float16", "--json"))
    again = hpcai("compress", report["chosen"], "--quantize", "int8")
    assert again.exit_code == 3
    assert "holds a TFLite model" in again.stderr


def test_a_manifest_without_what_it_should_say_is_refused(hpcai, run):
    for name in ("recipe_reference", "data"):
        manifest = json.loads((run / "manifest.json").read_text())
        del manifest[name]
        (run / "manifest.json").write_text(json.dumps(manifest))
        done = hpcai("compress", run, "--quantize", "int8")
        assert done.exit_code == 3, done.stderr
        (run / "manifest.json").write_text(json.dumps(manifest | {name: "mnist"}))


@pytest.mark.long
def test_a_bound_that_no_form_holds_is_exit_code_5(hpcai, run, monkeypatch):
    """Pruned to almost nothing and hardly trained afterwards, no form is as good as it was."""
    monkeypatch.setattr(plan, "MILDER", (0.99,))
    done = hpcai("compress", run, "--prune", "0.97", "--epochs", "1", "--learning-rate", "1e-6", "--max-drop", "0.01",
                 "--json")
    assert done.exit_code == 5, done.stderr
    report = json.loads(done.stdout)
    assert report["chosen"] is None
    assert "loses" in report["failed"]
    assert len(report["forms"]) == 4


@pytest.mark.long
def test_a_network_that_tflite_lacks_something_for_is_pruned_all_the_same(hpcai, run):
    Path("lanczos.py").write_text('''"""Digits made smaller."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="lanczos", summary="digits made smaller", input_shape=(28, 28, 1), num_classes=10, dataset="mnist",
                epochs=2)


def build_model(recipe):
    import keras
    from keras import layers

    return keras.Sequential([keras.Input(recipe.input_shape), layers.Resizing(9, 9, interpolation="lanczos3"),
                             layers.Flatten(), layers.Dense(32, activation="relu"), layers.Dense(10)])
''')
    data = json.loads((run / "manifest.json").read_text())["data"]
    done = hpcai("train", "./lanczos.py", "--data", data, "--output", "lanczos")
    assert done.exit_code == 0, done.stderr
    pruned = hpcai("compress", "lanczos", "--prune", "0.5", "--json")
    assert [row["name"] for row in report_of(pruned)["forms"]] == ["original", "prune_0.5"]
    assert "cannot be converted to float32 TFLite" in pruned.stderr
    assert hpcai("compress", "lanczos", "--quantize", "int8").exit_code == 2


@pytest.mark.long
def test_a_milder_form_is_taken_where_the_asked_one_does_not_hold(hpcai, run, monkeypatch):
    monkeypatch.setattr(plan, "MILDER", (0.01,))
    report = report_of(hpcai("compress", run, "--prune", "0.97", "--epochs", "1", "--learning-rate", "1e-6",
                             "--max-drop", "0.02", "--json"))
    assert Path(report["chosen"]).name == "prune_0.01"
    assert "prune_0.97 loses" in report["notes"][0]
    assert "the first that holds" in report["notes"][0]


@pytest.mark.long
def test_a_target_is_met_by_the_mildest_form(hpcai, run):
    sizes = {row["name"]: row["bytes"] for row in report_of(
        hpcai("compress", run, "--quantize", "float16", "--json"))["forms"]}
    most = sizes["float16"] - 1
    report = report_of(hpcai("compress", run, "--target", f"size={most}B", "--json"))
    tried = [row for row in report["forms"] if "float32" not in row["name"]]
    assert [row["bytes"] <= most for row in tried] == [False] * (len(tried) - 1) + [True]
    assert report["chosen"] == tried[-1]["folder"]


@pytest.mark.long
def test_an_impossible_target_is_exit_code_5(hpcai, run):
    done = hpcai("compress", run, "--quantize", "float16", "--prune", "0.5", "--epochs", "1", "--target", "size=10B")
    assert done.exit_code == 5
    assert "size" in done.stderr and "10 is asked for" in done.stderr


@pytest.mark.long
def test_a_network_that_cannot_be_cut_that_far_is_exit_code_5_and_said_in_the_report(hpcai, run):
    done = hpcai("compress", run, "--target", "macs=0.001%", "--json")
    assert done.exit_code == 5, done.stderr
    report = json.loads(done.stdout)
    assert "cannot be made" in report["failed"] and "multiply-accumulates" in report["failed"]
    assert [row["name"] for row in report["forms"]] == ["original", "float32"]
    assert json.loads((run / "compressed" / "compression.json").read_text())["chosen"] is None


@pytest.mark.long
def test_the_layers_that_int8_harms_most_stay_in_float_where_the_bound_asks_for_it(hpcai, run, monkeypatch):
    monkeypatch.setattr(search, "forms", lambda asked: [(plan.Step("int8"),), (plan.Step("int8", 0.5, "float"),)])
    monkeypatch.setattr(search._Search, "_why_not",
                        lambda self, form: None if form[-1].amount else "loses something on the test split")
    report = report_of(hpcai("compress", run, "--quantize", "int8", "--max-drop", "0.5", "--json"))
    chosen, = [row for row in report["forms"] if row["folder"] == report["chosen"]]
    whole, = [row for row in report["forms"] if row["name"] == "int8"]
    assert chosen["name"] == "int8_0.5_float"
    assert chosen["left_alone"] and not whole["left_alone"]
    assert chosen["bytes"] > whole["bytes"]


@pytest.mark.parametrize(("words", "code", "said"), [
    (("none", "--quantize", "int8"), 3, "not a run folder"),
    (("run",), 2, "nothing to do"),
    (("unfinished", "--quantize", "int8"), 3, "hpcai train --resume unfinished"),
    (("run", "--prune", "2"), 2, "between 0 and 1"),
    (("run", "--quantize", "int4"), 2, "float16, dynamic, int8"),
    (("run", "--target", "speed=3"), 2, "size=200KB"),
    (("run", "--distill", "width=none"), 2, "width"),
    (("run", "--distill", "cifar10"), 2, "other examples"),
    (("run", "--quantize", "int8", "--data", "none.h5"), 3, "hpcai preprocess"),
])
def test_wrong_words_end_in_one_sentence(hpcai, run, words, code, said):
    shutil.copytree(run, "unfinished")
    Path("unfinished/model.keras").unlink()
    done = hpcai("compress", *words)
    assert done.exit_code == code, done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not Path("run/compressed").exists()
