"""hpcai predict: an answer for each picture or row, an error where there is none."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROWS = "x,y,kind,label\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Train three small runs once, by the command line: pictures, rows with two classes, rows with a number."""
    from typer.testing import CliRunner

    from hpcai_cli.main import app

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCAI_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        source = np.random.default_rng(0)
        x, kind = source.normal(size=200), source.choice(["red", "blue"], 200)
        rows = [f"{a:.3f},{a * 2 + 1:.3f},{b},{'yes' if a > 0 else 'no'}" for a, b in zip(x, kind, strict=True)]
        Path("rows.csv").write_text(ROWS + "\n".join(rows) + "\n")

        def hpcai(*words):
            done = CliRunner().invoke(app, list(map(str, words)))
            assert done.exit_code == 0, done.stderr

        hpcai("train", "mnist-mlp", "--epochs", 1, "--output", "digits")
        for name, settings in (("classes", ["label=label", "drop=y"]), ("numbers", ["label=y", "task=regression",
                                                                                     "drop=label"])):
            chosen = [word for setting in settings for word in ("--set", setting)]
            hpcai("preprocess", "table", "--source", "rows.csv", "--output", f"{name}.h5", *chosen)
            hpcai("train", "table", "--data", f"{name}.h5", "--output", name, "--epochs", 12, *chosen[-4:][:2]
                  if name == "numbers" else ())
    return {name: folder / name for name in ("digits", "classes", "numbers")}


def lines(done) -> list[dict]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_picture_and_what_is_none(hpcai, runs):
    Image.new("L", (28, 28), 0).save("digit.png")
    Path("text.png").write_text("hello")
    done = hpcai("predict", runs["digits"], "digit.png", "text.png", "digit.png", "--json")
    assert done.exit_code == 3
    first, second, third = lines(done)
    assert set(first) == {"file", "label", "probability"} and first == third
    assert set(second) == {"file", "error"}
    assert done.stderr.splitlines()[-1] == ("error: 1 file has no answer; expected images; "
                                            "the lines above say why")


def test_names_come_through_a_pipe(hpcai, runs):
    Image.new("L", (28, 28), 0).save("digit.png")
    done = hpcai("predict", runs["digits"], "-", "--json", stdin="digit.png\n\ndigit.png\n")
    assert done.exit_code == 0
    assert [answer["file"] for answer in lines(done)] == ["digit.png"] * 2


def test_each_row_has_its_class(hpcai, runs):
    Path("new.csv").write_text("kind,x\nred,2.5\nblue,-2.5\n")
    done = hpcai("predict", runs["classes"], "new.csv", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    found = lines(done)
    assert [(answer["file"], answer["row"], answer["label"]) for answer in found] == [
        ("new.csv", 1, "yes"), ("new.csv", 2, "no")]
    assert all(0.5 <= answer["probability"] <= 1 for answer in found)
    shown = hpcai("predict", runs["classes"], "new.csv").stdout.splitlines()
    assert [line.rpartition(" (")[0] for line in shown] == ["new.csv:1: yes", "new.csv:2: no"]


def test_each_row_has_its_number(hpcai, runs):
    Path("new.csv").write_text("x,kind\n0.5,red\n-0.5,blue\n")
    done = hpcai("predict", runs["numbers"], "new.csv", "--json")
    assert done.exit_code == 0, done.stderr
    found = [answer["value"] for answer in lines(done)]
    assert found[0] == pytest.approx(2, abs=0.7) and found[1] == pytest.approx(0, abs=0.7)
    assert hpcai("predict", runs["numbers"], "new.csv").stdout.splitlines()[0] == f"new.csv:1: {found[0]:g}"


def test_a_row_that_cannot_be_read_ends_in_exit_code_3_and_the_rest_goes_on(hpcai, runs):
    Path("bad.csv").write_text("x,kind\n1,red\nmany,red\n-1,blue\n")
    Path("lacks.csv").write_text("kind\nred\n")
    done = hpcai("predict", runs["classes"], "lacks.csv", "bad.csv", "none.csv", "--json")
    assert done.exit_code == 3
    found = lines(done)
    assert [answer.get("label", "error") for answer in found] == ["error", "yes", "error", "no", "error"]
    assert "lack the column 'x'" in found[0]["error"]
    assert found[2]["row"] == 2 and "'many'" in found[2]["error"]
    assert done.stderr.splitlines()[-1].startswith("error: 3 rows or files have no answer; expected CSV files")
    text = hpcai("predict", runs["classes"], "bad.csv")
    assert len(text.stdout.splitlines()) == 2 and "bad.csv:2: line 3" in text.stderr


def test_what_was_not_a_table_has_no_rows(hpcai):
    assert hpcai("train", "linear-regression", "--epochs", 1, "--output", "line").exit_code == 0
    Path("new.csv").write_text("x\n1\n")
    done = hpcai("predict", "line", "new.csv")
    assert done.exit_code == 2
    assert "takes neither images nor rows of a table" in done.stderr


# ---- Every kind of model -------------------------------------------------------------------------------------------

def test_a_checkpoint_a_model_file_and_a_compressed_run_answer_like_the_run(hpcai, runs, tmp_path):
    from hpcai_cli.engine import model_file
    from hpcai_cli.engine.compression import quantization

    Image.fromarray(np.random.default_rng(3).integers(0, 256, (28, 28), dtype=np.uint8)).save("digit.png")
    run, compressed, copy = runs["digits"], tmp_path / "compressed", tmp_path / "copy.keras"
    shutil.copytree(run, compressed)
    content = quantization.convert(model_file.load(run / "model.keras"), (28, 28, 1), kind="float32")
    (compressed / "model.tflite").write_bytes(content)
    (compressed / "model.keras").unlink()
    shutil.copy(run / "model.keras", copy)
    wanted, = lines(hpcai("predict", run, "digit.png", "--json"))
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    for words in ((checkpoint,), (compressed,), (compressed / "model.tflite",), (copy, "--like", run)):
        done = hpcai("predict", words[0], "digit.png", "--json", *words[1:])
        assert done.exit_code == 0, done.stderr
        answer, = lines(done)
        assert answer["label"] == wanted["label"]
        assert answer["probability"] == pytest.approx(wanted["probability"], abs=1e-4)
    done = hpcai("predict", copy, "digit.png")
    assert done.exit_code == 3
    assert "lies in no run folder" in done.stderr and "--like RUN" in done.stderr


def test_rows_by_a_model_file(hpcai, runs, tmp_path):
    Path("new.csv").write_text("kind,x\nred,2.5\nblue,-2.5\n")
    shutil.copy(runs["classes"] / "model.keras", tmp_path / "m.keras")
    wanted = lines(hpcai("predict", runs["classes"], "new.csv", "--json"))
    assert lines(hpcai("predict", tmp_path / "m.keras", "new.csv", "--json", "--like", runs["classes"])) == wanted


def test_a_model_of_another_recipe_is_refused(hpcai, runs, tmp_path):
    shutil.copy(runs["classes"] / "model.keras", tmp_path / "m.keras")
    done = hpcai("predict", tmp_path / "m.keras", "a.png", "--like", runs["digits"])
    assert done.exit_code == 3
    assert "does not take the examples of recipe mnist-mlp" in done.stderr


def test_a_model_whose_answers_are_no_numbers_prints_json_all_the_same(hpcai, runs, tmp_path):
    import keras

    broken = tmp_path / "broken"
    shutil.copytree(runs["numbers"], broken)
    model = keras.saving.load_model(broken / "model.keras")
    for variable in model.trainable_variables:
        variable.assign(np.full(variable.shape, np.nan))
    model.save(broken / "model.keras")
    Path("new.csv").write_text("x,kind\n0.5,red\n")
    done = hpcai("predict", broken, "new.csv", "--json")
    assert done.exit_code == 3
    answer, = (json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines())
    assert answer == {"file": "new.csv", "row": 1, "error": "the model's answer is nan, which is no number"}
    assert done.stderr.splitlines()[-1].startswith("error: 1 row or file has no answer")


def test_without_files_and_without_a_run(hpcai, runs):
    assert hpcai("predict", runs["digits"]).exit_code == 2
    assert hpcai("predict", "nowhere", "a.png").exit_code == 3


@pytest.mark.parametrize("threshold", ["many", [0.5], float("nan"), 1.5, -0.1, True])
def test_a_damaged_threshold_is_refused(hpcai, runs, threshold):
    Path("new.csv").write_text("x,kind\n0.5,red\n")
    file = runs["classes"] / "result.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps({**json.loads(before), "decision_threshold": threshold}))
        for words in (("predict", runs["classes"], "new.csv"), ("evaluate", runs["classes"])):
            done = hpcai(*words)
            assert done.exit_code == 3
            assert "holds no decision_threshold" in done.stderr
    finally:
        file.write_text(before)
