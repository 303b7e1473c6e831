"""hpcai deploy as a user meets it: exports with their proof, versions and the way back."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine.deployment import formats
from hpcai_cli.engine.serving import trial

ROWS = "x,y,kind,label\n"
PROGRAM = str(Path(sys.executable).parent / "hpcai")
DIGIT = Path(__file__).parents[1] / "digit.png"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Train three small runs once: pictures, rows with two classes, rows with a number."""
    from typer.testing import CliRunner

    from hpcai_cli.main import app

    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPCAI_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        source = np.random.default_rng(0)
        x, kind = source.normal(size=300), source.choice(["red", "blue"], 300)
        rows = [f"{a:.3f},{a * 2 + 1:.3f},{b},{'yes' if a > 0 else 'no'}" for a, b in zip(x, kind, strict=True)]
        Path("rows.csv").write_text(ROWS + "\n".join(rows) + "\n")

        def hpcai(*words):
            done = CliRunner().invoke(app, list(map(str, words)))
            assert done.exit_code == 0, done.stderr

        hpcai("preprocess", "mnist", "--source", "sample", "--output", folder / "digits.h5")
        hpcai("train", "mnist-mlp", "--data", folder / "digits.h5", "--epochs", 2, "--output", "digits")
        for name, settings in (("classes", ["label=label", "drop=y"]), ("numbers", ["label=y", "task=regression",
                                                                                     "drop=label"])):
            chosen = [word for setting in settings for word in ("--set", setting)]
            hpcai("preprocess", "table", "--source", "rows.csv", "--output", folder / f"{name}.h5", *chosen)
            hpcai("train", "table", "--data", folder / f"{name}.h5", "--output", name, "--epochs", 12, *chosen[-4:][:2]
                  if name == "numbers" else ())
    return folder


@pytest.fixture
def runs(trained, monkeypatch) -> Path:
    """Copy the runs, and time the exports briefly: what is tested here is not how steady the clock is."""
    for name in ("digits", "classes", "numbers"):
        shutil.copytree(trained / name, name)
    monkeypatch.setattr(trial, "ROUNDS", 1)
    return Path()


def exported(done) -> dict:
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", formats.FILES)
def test_an_export_answers_as_its_run(hpcai, runs, kind):
    document = exported(hpcai("deploy", "export", "digits", "--format", kind, "--json"))
    folder = Path("digits/exports") / kind
    assert (document["schema"], document["folder"], document["format"]) == ("hpcai.export/1", str(folder), kind)
    parity = json.loads((folder / "parity.json").read_text())
    assert parity == document["parity"] and parity["agrees"] and parity["agreement"] == 1
    assert parity["metrics"]["accuracy"]["before"] == json.loads(
        Path("digits/result.json").read_text())["metrics"]["accuracy"]
    said = json.loads((folder / "artefact.json").read_text())
    assert said["input_shape"] == [28, 28, 1] and said["class_names"] == list("0123456789")
    assert set(said["files"]) >= {"parity.json", "MODEL_CARD.md", "reference.json"}
    for name, file in said["files"].items():
        content = (folder / name).read_bytes()
        assert (hashlib.sha256(content).hexdigest(), len(content)) == (file["sha256"], file["bytes"])
    card = (folder / "MODEL_CARD.md").read_text()
    assert "mnist-mlp" in card and "## Limits" in card
    assert f"| accuracy | {parity['metrics']['accuracy']['before']:.6g} |" in card
    # The exported file is a model like any other.
    inner = folder / formats.FILES[kind]
    assert json.loads(hpcai("evaluate", inner, "--json").stdout)["metrics"]["accuracy"] == pytest.approx(
        parity["metrics"]["accuracy"]["after"])


def test_the_quickest_format_is_taken(hpcai, runs):
    document = exported(hpcai("deploy", "export", "classes", "--json"))
    measured = document["serving"]["measured"]
    assert set(measured) == {"tflite", "onnx", "saved_model"}
    best = min(measured, key=lambda kind: measured[kind]["milliseconds"]["1"])
    assert document["format"] == best == document["serving"]["chosen"]
    said = json.loads(Path("classes/exports/auto/artefact.json").read_text())
    assert said["kind"] == best and {column["name"] for column in said["encoding"]["columns"]} == {"x", "kind"}


def test_a_regression(hpcai, runs):
    document = exported(hpcai("deploy", "export", "numbers", "--format", "onnx", "--json"))
    assert document["parity"]["agrees"] and set(document["metrics"]) >= {"mean_absolute_error", "r2"}


def test_an_export_that_differs_is_not_delivered(hpcai, runs):
    first = exported(hpcai("deploy", "export", "digits", "--format", "tflite", "--json"))
    before = sorted((path.name, path.read_bytes()) for path in Path(first["folder"]).iterdir())
    done = hpcai("deploy", "export", "digits", "--format", "tflite", "--force", "--tolerance", "0")
    assert done.exit_code == 5 and done.stdout == ""
    assert "the tflite export does not answer as its model does, and is not delivered" in done.stderr
    assert "largest_difference" in done.stderr
    assert sorted((path.name, path.read_bytes()) for path in Path(first["folder"]).iterdir()) == before
    assert [path.name for path in Path("digits/exports").iterdir()] == ["tflite"]


def test_another_model_under_the_same_name_is_caught(hpcai, runs, monkeypatch):
    write = formats.write

    def spoiled(model, kind, folder, **asked):
        model.layers[-1].kernel.assign(model.layers[-1].kernel * 1.5)
        return write(model, kind, folder, **asked)

    monkeypatch.setattr(formats, "write", spoiled)
    assert hpcai("deploy", "export", "digits", "--format", "keras").exit_code == 5
    assert not Path("digits/exports/keras").exists()


@pytest.mark.long
def test_a_compressed_model(hpcai, runs, monkeypatch):
    from hpcai_cli.engine.compression import inference_cost

    monkeypatch.setattr(inference_cost, "SECONDS", 0.01)
    assert hpcai("compress", "digits", "--quantize", "int8", "--max-drop", "0.1").exit_code == 0
    document = exported(hpcai("deploy", "export", "digits/compressed/int8", "--json"))
    assert document["format"] == "tflite"
    assert Path(document["folder"], "model.tflite").read_bytes() == Path(
        "digits/compressed/int8/model.tflite").read_bytes()
    assert "int8" in Path(document["folder"], "MODEL_CARD.md").read_text()
    done = hpcai("deploy", "export", "digits/compressed/int8", "--format", "onnx")
    assert done.exit_code == 2 and "cannot become another format" in done.stderr


def test_versions_and_the_way_back(hpcai, runs):
    for number in ("1", "2"):
        document = exported(hpcai("deploy", "export", "digits", "--format", "keras", "--into", "models", "--json"))
        assert document["folder"] == f"models/mnist-mlp/{number}"
        assert Path("models/mnist-mlp/current").read_text().strip() == number
    done = exported(hpcai("deploy", "rollback", "models/mnist-mlp", "--json"))
    assert (done["before"], done["after"]) == (2, 1)
    assert Path("models/mnist-mlp/current").read_text().strip() == "1"
    done = hpcai("deploy", "rollback", "models/mnist-mlp")
    assert done.exit_code == 2 and "no version before the current one" in done.stderr
    assert "version 1 answered" in hpcai("deploy", "rollback", "models/mnist-mlp", "--to", "2").stdout


@pytest.mark.parametrize(("words", "code", "said"), [
    (["digits", "--format", "pickle"], 2, "there is no such format; expected auto, keras, tflite"),
    (["nothing"], 3, "not a run folder"),
    (["digits", "--output", "there", "--into", "models"], 2, "an export has one place"),
    (["digits", "--output", "there"], 2, "the folder holds something else than an export"),
    (["digits", "--output", "there", "--force"], 2, "the folder holds something else than an export"),
    (["digits", "--data", "missing.h5"], 3, "missing.h5"),
    (["digits", "--name", "../etc", "--format", "keras"], 2, "this cannot be a model's name"),
])
def test_what_cannot_be(hpcai, runs, words, code, said):
    Path("there").mkdir()
    Path("there/mine.txt").write_text("precious")
    done = hpcai("deploy", "export", *words)
    assert (done.exit_code, done.stdout) == (code, "") and said in done.stderr
    assert Path("there/mine.txt").read_text() == "precious"
    assert not Path("digits/exports").exists()


def test_there_is_one_already(hpcai, runs):
    exported(hpcai("deploy", "export", "digits", "--format", "keras", "--json"))
    done = hpcai("deploy", "export", "digits", "--format", "keras")
    assert done.exit_code == 2 and "replace it with --force" in done.stderr
    exported(hpcai("deploy", "export", "digits", "--format", "keras", "--force", "--json"))


@contextmanager
def serving(*words: str):
    """Run `hpcai deploy serve` in a process of its own, and yield it and its address."""
    process = subprocess.Popen([PROGRAM, "deploy", "serve", "--port", "0", *words], stderr=subprocess.PIPE, text=True)
    try:
        said = [process.stderr.readline()]
        while said[-1] and not said[-1].startswith("ready: "):
            said.append(process.stderr.readline())
        assert said[-1], said
        yield process, said[-1].split()[1]
    finally:
        process.kill()
        process.communicate()


def ask(address: str, document: dict) -> dict:
    request = urllib.request.Request(address, json.dumps(document).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def rows(count: int, shift: float = 0.0, seed: int = 1) -> list[dict]:
    source = np.random.default_rng(seed)
    return [{"x": float(x) + shift, "kind": str(kind)} for x, kind in zip(
        source.normal(size=count), source.choice(["red", "blue"], count), strict=True)]


def test_a_run_is_served_and_ends_on_a_signal(hpcai, runs):
    done = hpcai("deploy", "serve", "digits")
    assert done.exit_code == 3 and "make one with `hpcai deploy export digits`" in done.stderr
    exported(hpcai("deploy", "export", "digits", "--format", "tflite", "--json"))
    with serving("shown=digits", "--log-file", "requests.jsonl") as (process, address):
        content = DIGIT.read_bytes()
        request = urllib.request.Request(f"{address}/v2/models/shown/predict", content, {"Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=30) as said:
            answer = json.load(said)["answers"][0]
        predicted = json.loads(hpcai("predict", "digits", DIGIT, "--json").stdout)
        assert answer["label"] == predicted["label"]
        assert answer["probability"] == pytest.approx(predicted["probability"], abs=1e-5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    (line,) = [json.loads(line) for line in Path("requests.jsonl").read_text().splitlines()]
    assert (line["model"], line["status"]) == ("shown", 200)


def test_a_change_of_the_inputs_is_seen(hpcai, runs):
    exported(hpcai("deploy", "export", "classes", "--format", "onnx", "--into", "models", "--json"))
    with serving("models", "--state", "state", "--log-file", "requests.jsonl") as (_, address):
        asked = ("deploy", "monitor", "models/table")
        few = exported(hpcai(*asked, address, "--json"))
        assert few["holds"] and {check["state"] for check in few["checks"]} <= {"too few to tell", "no threshold"}
        said = ask(f"{address}/v2/models/table/predict", {"rows": rows(400)})
        same = exported(hpcai(*asked, address, "--json"))
        assert same["answers"] == 400 and same["holds"]
        Path("labels.csv").write_text("id,label\n" + "".join(
            f"{said['id']}/{place},{answer['label']}\n" for place, answer in enumerate(said["answers"][:4])))
        known = exported(hpcai(*asked, "state", "--labels", "labels.csv", "--log", "requests.jsonl", "--json"))
        assert known["live_accuracy"]["accuracy"] == 1
        ask(f"{address}/v2/models/table/predict", {"rows": rows(800, shift=3.0)})
        done = hpcai(*asked, "state", "--output", "watch", "--json")
    assert done.exit_code == 5 and "psi of input x" in done.stderr
    assert "psi of input x" in json.loads(done.stdout)["failed"]
    assert json.loads(Path("watch/monitor.json").read_text())["holds"] is False
    assert "<img" in Path("watch/report.html").read_text()
    assert 'hpcai_monitor_holds{model="table"} 0.0' in hpcai(*asked, "state", "--metrics").stdout


@pytest.mark.parametrize(("words", "code", "said"), [
    (["models/table", "nowhere"], 3, "no statistics of the model table here"),
    (["nothing", "state"], 3, "expected the folder of an export"),
    (["models/table", "state", "--labels", "labels.csv"], 2, "belong together"),
    (["models/table", "state", "--accuracy", "0.9"], 2, "an accuracy needs labels"),
    (["models/table", "http://127.0.0.1:9/"], 1, "cannot reach the server"),
    (["models/table", "state", "--json", "--metrics"], 2, "there is one result"),
])
def test_what_cannot_be_watched(hpcai, runs, words, code, said):
    exported(hpcai("deploy", "export", "classes", "--format", "onnx", "--into", "models", "--json"))
    Path("nowhere").mkdir()
    done = hpcai("deploy", "monitor", *words)
    assert (done.exit_code, done.stdout) == (code, "") and said in done.stderr


def test_a_bundle_of_the_current_version(hpcai, runs):
    exported(hpcai("deploy", "export", "digits", "--format", "tflite", "--into", "models", "--json"))
    document = exported(hpcai("deploy", "bundle", "models/mnist-mlp", "--output", "server", "--json"))
    assert (document["model"], document["format"], document["folder"]) == ("mnist-mlp", "tflite", "server")
    assert {"start.sh", "Dockerfile", "kubernetes", "requirements.txt", "model", "lib"} <= {
        path.name for path in Path("server").iterdir()}
    done = hpcai("deploy", "bundle", "models/mnist-mlp", "--output", "server")
    assert done.exit_code == 2 and "server" in done.stderr
    # A bundle is itself something that can be served, bundled and watched.
    assert hpcai("deploy", "bundle", "server", "--edge", "--output", "edge").exit_code == 0
    assert Path("edge/run.py").is_file()
