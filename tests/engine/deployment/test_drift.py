"""The monitor's judgement: silent while nothing changes, and not when something does."""

import copy
import json

import numpy as np
import pytest

from hpcai_cli.engine.deployment.drift import FAILS, HOLDS, NOT_ASKED, TOO_FEW, Thresholds, examine
from hpcai_cli.engine.serving import statistics as recording
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.statistics import Recorder, merged, path_of, reference_of
from hpcai_cli.errors import DataError, UsageError

CLASSES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def every(monkeypatch):
    """Let all inputs be looked at."""
    monkeypatch.setattr(recording, "INPUTS_PER_SECOND", 1e9)
    monkeypatch.setattr(recording, "NUMBERS_PER_SECOND", 1e12)


def draw(kind: str, count: int, seed: int, *, brighter: float = 1.0, column: float = 0.0, shares=(0.5, 0.3, 0.2),
         sure: float = 3.0, value: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and scores of a distribution that can be shifted in several ways."""
    source = np.random.default_rng(seed)
    if kind == "images":
        light = source.uniform(0.2, 0.7, (count, 1, 1, 1)) * brighter
        inputs = np.minimum(source.uniform(0, 255, (count, 6, 5, 1)) * light, 255).astype(np.uint8)
    else:
        inputs = source.normal(0, 1, (count, 4)).astype(np.float32)
        inputs[:, 2] += column
        inputs[:, 3] = source.integers(0, 2, count)
    if kind == "regression":
        return inputs, (inputs[:, :1] * 2 + value).astype(np.float32)
    scores = source.normal(0, 1, (count, 3)).astype(np.float32)
    scores[np.arange(count), source.choice(3, count, p=shares)] += sure
    return inputs, scores


def exported(folder, kind: str, count: int = 20_000, *, without: bool = False) -> Artefact:
    inputs, scores = draw(kind, count, 0)
    names = () if kind == "regression" else CLASSES
    files = {"model.tflite": {"sha256": "1" * 64, "bytes": 1}}
    if not without:
        folder.joinpath("reference.json").write_text(json.dumps(reference_of(
            inputs, scores, inputs_kind="images" if kind == "images" else "features",
            feature_names=("age", "income", "height", "member"), class_names=names)))
        files["reference.json"] = {"sha256": "2" * 64, "bytes": 1}
    folder.joinpath("artefact.json").write_text(json.dumps({
        "schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite", "files": files,
        "task": "classification" if names else "regression", "class_names": list(names), "decision_threshold": None,
        "inputs": "images" if kind == "images" else "features", "input_shape": list(inputs.shape[1:])}))
    return Artefact.open(folder)


def served(artefact: Artefact, folder, inputs, scores, requests=()) -> dict:
    """Return the statistics of a server that answered these."""
    path = path_of(artefact, folder, 0)
    path.unlink(missing_ok=True)
    recorder = Recorder(artefact, path)
    recorder.record(inputs, scores)
    for status, seconds in requests:
        recorder.answered(status, seconds)
    recorder.close()
    return merged(artefact, [path])


def found(report: dict, figure: str, of: str) -> dict:
    row, = [check for check in report["checks"] if (check["figure"], check["of"]) == (figure, of)]
    return row


@pytest.mark.parametrize("kind", ["images", "table", "regression"])
@pytest.mark.parametrize("count", [100, 1000, 20_000])
def test_where_nothing_changed_nothing_fails(tmp_path, kind, count):
    artefact = exported(tmp_path, kind)
    strict = Thresholds(psi=0.0, ks=0.0, total_variation=0.0, low_confidence=0.0)
    for seed in range(1, 7):
        told = served(artefact, tmp_path, *draw(kind, count, seed))
        # Even with no room at all: what chance gives does not fail.
        report = examine(artefact, told, strict)
        assert report["holds"] and report["failed"] == []
        assert {check["state"] for check in report["checks"] if check["figure"] == "ks"} == {HOLDS}
        json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(("kind", "shift", "failing"), [
    ("images", {"brighter": 1.5}, {"input brightness", "input contrast", "input sharpness"}),
    ("table", {"column": 1.0}, {"input height"}),
    ("images", {"shares": (0.2, 0.3, 0.5)}, {"the classes"}),
    ("regression", {"value": 2.5}, {"the answers"})])
def test_a_shift_is_found_where_it_is(tmp_path, kind, shift, failing):
    artefact = exported(tmp_path, kind)
    told = served(artefact, tmp_path, *draw(kind, 1000, 1, **shift))
    report = examine(artefact, told, Thresholds(ks=0.15, total_variation=0.15))
    assert not report["holds"]
    assert {check["of"] for check in report["checks"] if check["state"] == FAILS} == failing
    psi = {check["of"]: check for check in report["checks"] if check["figure"] == "psi"}
    assert all((check["value"] > 0.2) == (of in failing) for of, check in psi.items() if of != "the confidence")
    other = "total_variation" if failing == {"the classes"} else "ks"
    assert found(report, other, min(failing))["state"] == FAILS


def test_the_threshold_is_of_the_change_and_not_of_what_few_examples_add(tmp_path):
    artefact = exported(tmp_path, "table")
    # The index of this shift is 0.17; with 400 examples chance brings some above the threshold.
    rows = [found(examine(artefact, served(artefact, tmp_path, *draw("table", 400, seed, column=0.42)), Thresholds()),
                  "psi", "input height") for seed in range(1, 9)]
    assert any(row["value"] > 0.2 and row["state"] == HOLDS for row in rows)
    limit = 0.2 + 18 * (1 / 400 + 1 / 20_000)
    assert all(row["limit"] == pytest.approx(limit, abs=0.006) and row["limit"] > row["chance"] for row in rows)
    large = examine(artefact, served(artefact, tmp_path, *draw("table", 20_000, 1, column=0.42)), Thresholds(psi=0.15))
    assert found(large, "psi", "input height")["value"] == pytest.approx(0.17, abs=0.02) and not large["holds"]


def test_a_moved_mean_and_new_values_show_in_the_quantities(tmp_path):
    artefact = exported(tmp_path, "table")
    inputs, scores = draw("table", 1000, 1, column=10.0)
    inputs[:100, 0] = np.nan
    rows = {row["name"]: row for row in examine(artefact, served(artefact, tmp_path, inputs, scores),
                                                Thresholds())["quantities"]}
    assert rows["height"]["mean"] == pytest.approx(10, abs=0.2) and rows["height"]["outside"] > 0.99
    assert rows["height"]["reference_mean"] == pytest.approx(0, abs=0.05)
    assert rows["age"]["missing"] == 100 and rows["age"]["outside"] < 0.01
    assert list(rows) == ["age", "income", "height", "member"]


def test_missing_values_are_a_change(tmp_path):
    artefact = exported(tmp_path, "table")
    inputs, scores = draw("table", 1000, 1)
    inputs[:300, 0] = np.nan
    report = examine(artefact, served(artefact, tmp_path, inputs, scores), Thresholds())
    assert report["failed"] == ["psi of input age"]


def test_answers_that_are_less_sure_fail(tmp_path):
    artefact = exported(tmp_path, "images")
    report = examine(artefact, served(artefact, tmp_path, *draw("images", 1000, 1, sure=0.3)),
                     Thresholds(psi=None))
    row = found(report, "low_confidence_increase", "the confidence")
    assert report["failed"] == ["low_confidence_increase of the confidence"]
    assert row["value"] == pytest.approx(row["share"] - row["reference"]) and row["value"] > 0.2
    # Of the shift of all confidences nothing is asked: a model is surer of what it was trained on.
    assert found(report, "psi", "the confidence")["state"] == NOT_ASKED
    with pytest.raises(UsageError, match="received: 0.42"):
        examine(artefact, served(artefact, tmp_path, *draw("images", 10, 1)), Thresholds(low_bound=0.42))


def test_few_examples_tell_nothing(tmp_path):
    artefact = exported(tmp_path, "images")
    shifted = draw("images", 99, 1, brighter=3.0, shares=(0, 0, 1))
    report = examine(artefact, served(artefact, tmp_path, *shifted, [(500, 1.0)] * 99), Thresholds(p99_ms=1.0))
    assert report["holds"] and {check["state"] for check in report["checks"]} == {TOO_FEW}
    assert {check["examples"] for check in report["checks"]} <= {0, 99}
    report = examine(artefact, served(artefact, tmp_path, *shifted, [(500, 1.0)] * 99), Thresholds(min_examples=50))
    assert not report["holds"]


def test_errors_and_latency(tmp_path):
    artefact = exported(tmp_path, "images")
    requests = [(200, 0.010)] * 950 + [(200, 0.080)] * 20 + [(404, 0.001)] * 20 + [(503, 0.001)] * 10
    told = served(artefact, tmp_path, *draw("images", 970, 1), requests)
    report = examine(artefact, told, Thresholds(error_rate=0.009, client_error_rate=0.03, p99_ms=50.0))
    assert sorted(report["failed"]) == ["error_rate of the requests", "p99_ms of the latency"]
    assert found(report, "error_rate", "the requests")["value"] == pytest.approx(0.01)
    assert found(report, "client_error_rate", "the requests")["value"] == pytest.approx(0.02)
    assert found(report, "p99_ms", "the latency")["value"] == pytest.approx(80, rel=0.09)
    assert found(report, "p50_ms", "the latency") | {"value": 0} == {
        "of": "the latency", "figure": "p50_ms", "value": 0, "threshold": None, "limit": None, "chance": None,
        "examples": 970, "state": NOT_ASKED}
    assert examine(artefact, told, Thresholds(p99_ms=100.0))["holds"]


def test_answers_that_are_no_numbers_fail(tmp_path):
    artefact = exported(tmp_path, "images")
    inputs, scores = draw("images", 1000, 1)
    scores[:20] = np.nan
    report = examine(artefact, served(artefact, tmp_path, inputs, scores), Thresholds())
    assert report["failed"] == ["broken_rate of the answers"] and report["broken"] == 20


@pytest.mark.parametrize("kind", ["images", "regression"])
def test_without_a_reference_requests_are_judged(tmp_path, kind):
    artefact = exported(tmp_path, kind, without=True)
    report = examine(artefact, served(artefact, tmp_path, *draw(kind, 500, 1), [(500, 0.1)] * 200), Thresholds())
    assert report["failed"] == ["error_rate of the requests"] and report["reference"] is False
    assert report["quantities"] == [] and not [check for check in report["checks"] if check["figure"] == "psi"]


def test_a_server_that_has_answered_nothing_holds(tmp_path):
    artefact = exported(tmp_path, "images")
    report = examine(artefact, merged(artefact, []), Thresholds())
    assert report["holds"] and report["from"] is None
    assert {check["state"] for check in report["checks"]} == {TOO_FEW}


def changes():
    def change(*path, to):
        def apply(told):
            *way, last = path
            for step in way:
                told = told[step]
            told[last] = to
        return apply

    return {"schema": change("schema", to="hpcai.statistics/9"), "model": change("reference", to="0" * 64),
            "inputs": change("inputs", to=None), "quantities": change("inputs", "quantities", to=[]),
            "bins": change("inputs", "quantities", 0, "counts", to=[1, 2]),
            "negative": change("inputs", "quantities", 0, "missing", to=-1),
            "mean": change("inputs", "quantities", 0, "mean", to="<b>"),
            "huge": change("answers", "classes", to=[1 << 60] * 3), "float": change("answers", "classes", to=[0.5] * 3),
            "fewer classes": change("answers", "classes", to=[1, 2]), "text": change("answers", "confidence", to="abc"),
            "latency": change("latency", to={}), "requests": change("requests", to={"2xx": 3}),
            "true": change("answers", "examples", to=True), "times": change("from", to="yesterday")}


@pytest.mark.parametrize("name", changes())
def test_statistics_that_cannot_be_are_refused(tmp_path, name):
    artefact = exported(tmp_path, "images", 500)
    told = copy.deepcopy(served(artefact, tmp_path, *draw("images", 200, 1)))
    examine(artefact, told, Thresholds())
    changes()[name](told)
    with pytest.raises(DataError, match="the statistics cannot be used"):
        examine(artefact, told, Thresholds())
