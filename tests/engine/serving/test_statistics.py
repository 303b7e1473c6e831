"""What a server counts: the same as a plain histogram would, in bounded space, by killed workers too."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hpcai_cli.engine.evaluation import answers, log_probabilities
from hpcai_cli.engine.serving import counts_file, statistics
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.quantities import CONFIDENCE_EDGES, answered, edges_of, measured, names_of
from hpcai_cli.engine.serving.statistics import Recorder, files_of, merged, path_of, reference_of
from hpcai_cli.engine.serving.statistics_layout import LATENCY_EDGES
from hpcai_cli.errors import DataError

CLASSES = ("a", "b", "c")


def exported(folder, reference, shape, class_names=CLASSES, threshold=None) -> Artefact:
    """Return an export whose model file is of no interest here."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"model.tflite": {"sha256": "1" * 64, "bytes": 1}}
    if reference is not None:
        (folder / "reference.json").write_text(json.dumps(reference))
        files["reference.json"] = {"sha256": "2" * 64, "bytes": 1}
    (folder / "artefact.json").write_text(json.dumps({
        "schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite", "files": files,
        "task": "classification" if class_names else "regression", "class_names": list(class_names),
        "decision_threshold": threshold, "inputs": "images" if len(shape) == 3 else "features",
        "input_shape": list(shape)}))
    return Artefact.open(folder)


def examples(kind: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and scores: gray pictures, coloured ones, or rows with a discrete and a constant feature."""
    source = np.random.default_rng(seed)
    if kind == "features":
        inputs = source.normal(5, 3, (count, 4)).astype(np.float32)
        inputs[:, 1] = source.integers(0, 3, count)
        inputs[:, 2] = 7
        return inputs, source.normal(10, 4, (count, 1)).astype(np.float32)
    shape = (6, 5, 1) if kind == "gray" else (6, 5, 3)
    light = source.uniform(0.2, 1, (count, 1, 1, 1))
    return ((source.uniform(0, 255, (count, *shape)) * light).astype(np.uint8),
            source.normal(0, 3, (count, 3)).astype(np.float32))


def fixture(folder, kind: str, count: int = 900, **more) -> tuple[Artefact, dict, np.ndarray, np.ndarray]:
    inputs, scores = examples(kind, count)
    names = CLASSES if kind != "features" else ()
    found = reference_of(inputs, scores, inputs_kind="features" if kind == "features" else "images",
                         feature_names=("one", "two"), class_names=names, **more)
    return exported(folder, found, inputs.shape[1:], names), found, inputs, scores


@pytest.fixture
def every(monkeypatch):
    """Let all inputs be looked at."""
    monkeypatch.setattr(statistics, "INPUTS_PER_SECOND", 1e9)
    monkeypatch.setattr(statistics, "NUMBERS_PER_SECOND", 1e12)


@pytest.mark.parametrize("kind", ["gray", "colour", "features"])
@pytest.mark.parametrize("batch", [1, 7, 900])
def test_a_server_that_sees_the_training_split_counts_what_the_reference_holds(tmp_path, every, kind, batch):
    artefact, reference, inputs, scores = fixture(tmp_path / "export", kind)
    recorder = Recorder(artefact, path_of(artefact, tmp_path, 0))
    for start in range(0, len(inputs), batch):
        recorder.record(inputs[start:start + batch], scores[start:start + batch])
    found = merged(artefact, files_of(artefact, tmp_path))
    live, then = found["inputs"]["quantities"], reference["inputs"]
    if kind == "features":
        live, then = [*live, found["answers"]["values"]], [*then, reference["answers"]["values"]]
        assert [entry["name"] for entry in live] == ["one", "two", "feature 3", "feature 4", "value"]
    else:
        assert found["answers"]["classes"] == reference["answers"]["classes"]
        assert found["answers"]["confidence"] == reference["answers"]["confidence"]
    assert found["inputs"]["examples"] == found["answers"]["examples"] == 900
    for now, before in zip(live, then, strict=True):
        assert now["counts"] == before["counts"] and sum(now["counts"]) == 900
        assert now["mean"] == pytest.approx(before["mean"]) and now["std"] == pytest.approx(before["std"], abs=1e-6)
    json.dumps(found, allow_nan=False)


def test_the_quantities_of_pictures_are_the_plain_ones():
    images = examples("colour", 40)[0]
    found, wide = measured(images, "images"), images.astype(np.int64)
    down, right = np.abs(np.diff(wide, axis=1)), np.abs(np.diff(wide, axis=2))
    sharpness = (down.sum((1, 2, 3)) + right.sum((1, 2, 3))) / (down[0].size + right[0].size)
    plain = [wide.mean((1, 2, 3)), wide.std((1, 2, 3)), sharpness, *wide.mean((1, 2)).T]
    np.testing.assert_allclose(found.T, plain, rtol=1e-12)
    assert names_of("images", images.shape[1:]) == ["brightness", "contrast", "sharpness", "red", "green", "blue"]
    assert measured(images[:, :1, :1, :1], "images").shape == (40, 3)
    assert measured(images[:, :1, :1, :1], "images")[:, 2].tolist() == [0] * 40


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_answers_and_their_confidence_are_those_of_evaluate(threshold):
    scores = np.random.default_rng(1).normal(0, 4, (500, 2 if threshold else 5)).astype(np.float32)
    classes, confidence = answered(scores, threshold)
    np.testing.assert_array_equal(classes, answers(scores, threshold))
    own = np.exp(log_probabilities(scores))[np.arange(500), classes]
    np.testing.assert_allclose(confidence, own, rtol=1e-12)


def test_bins_hold_about_as_much_each_and_few_values_have_one_each():
    values = np.random.default_rng(2).exponential(3, 20_000)
    edges = edges_of(values)
    counts = np.histogram(values, [-np.inf, *edges, np.inf])[0]
    assert len(counts) == 20 and counts[0] == counts[-1] == 0
    assert counts[1:-1].min() > 1000 and counts[1:-1].max() < 1250
    assert edges_of(np.array([1.0, 2, 2, 3, 9])) == [1.0, 1.5, 2.5, 6.0, np.nextafter(9.0, 10)]
    assert edges_of(np.array([4.0, 4, np.nan, np.inf])) == [4.0, np.nextafter(4.0, 5)]
    assert edges_of(np.full(3, np.nan)) == []
    # More than half of the values are one: its quantiles are one edge.
    assert len(edges_of(np.concatenate([np.zeros(900), np.arange(100)]))) < 10


def test_workers_together_count_what_one_would(tmp_path, every):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    alone, folder = Recorder(artefact, tmp_path / "alone.bin"), tmp_path / "state"
    folder.mkdir()
    workers = [Recorder(artefact, path_of(artefact, folder, number)) for number in range(3)]
    for place in range(0, 900, 10):
        for recorder in (alone, workers[place % 3]):
            recorder.record(inputs[place:place + 10], scores[place:place + 10])
            recorder.answered(200 if place % 20 else 503, 0.001 * place)
    one, three = merged(artefact, [tmp_path / "alone.bin"]), merged(artefact, files_of(artefact, folder))
    assert len(files_of(artefact, folder)) == 3
    for row, other in zip(one["inputs"]["quantities"], three["inputs"]["quantities"], strict=True):
        assert row.pop("mean") == pytest.approx(other.pop("mean"))
        assert row.pop("std") == pytest.approx(other.pop("std"))
    assert one == three
    assert one["requests"] == {"other": 0, "1xx": 0, "2xx": 45, "3xx": 0, "4xx": 0, "5xx": 45}


def test_inputs_are_looked_at_up_to_a_rate_and_answers_are_all_counted(tmp_path, monkeypatch):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    for _ in range(1200):
        recorder.record(inputs[:1], scores[:1])
    assert merged(artefact, [tmp_path / "counts.bin"])["inputs"]["examples"] == 500
    now[0] += 0.1
    recorder.record(inputs[:200], scores[:200])
    found = merged(artefact, [tmp_path / "counts.bin"])
    assert found["answers"]["examples"] == sum(found["answers"]["classes"]) == 1400
    assert found["inputs"]["examples"] == 550
    assert sum(found["inputs"]["quantities"][0]["counts"]) == 550


def test_of_a_batch_that_is_too_large_some_rows_are_taken_from_all_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "NUMBERS_PER_BATCH", 30 * 9)
    artefact, reference, inputs, scores = fixture(tmp_path / "export", "gray")
    # The brightness tells the row.
    rows = np.repeat(np.arange(90, dtype=np.uint8), 30).reshape(90, 6, 5, 1)
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    recorder.record(rows, scores[:90])
    found = merged(artefact, [tmp_path / "counts.bin"])["inputs"]
    assert found["examples"] == 9 and found["quantities"][0]["mean"] == pytest.approx(np.arange(0, 90, 10).mean())


def test_what_is_no_number_counts_apart(tmp_path, every):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "features")
    rows = inputs[:4].copy()
    rows[0, 0], rows[1, 0], rows[2, 0] = np.nan, np.inf, -np.inf
    told = scores[:4].copy()
    told[0], told[1] = np.nan, np.inf
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    recorder.record(rows, told)
    recorder.record(rows[:1], told[:1])
    found = merged(artefact, [tmp_path / "counts.bin"])
    first = found["inputs"]["quantities"][0]
    assert (first["missing"], first["counts"][0], first["counts"][-1], sum(first["counts"])) == (2, 1, 1, 3)
    assert np.isfinite(first["mean"]) and found["answers"]["broken"] == 3 and found["answers"]["examples"] == 5
    assert sum(found["answers"]["values"]["counts"]) == 2


@pytest.mark.parametrize("class_names", [CLASSES, ()])
def test_without_a_reference_answers_and_requests_are_counted(tmp_path, class_names):
    artefact = exported(tmp_path / "export", None, (6, 5, 1), class_names)
    inputs, scores = examples("gray", 50)
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    recorder.record(inputs, scores if class_names else scores[:, :1] + 2e6)
    recorder.answered(200, 0.02)
    found = merged(artefact, [tmp_path / "counts.bin"])
    assert found["inputs"] == {"examples": 0, "quantities": []} and found["answers"]["examples"] == 50
    if class_names:
        assert found["answers"]["classes"] == np.bincount(scores.argmax(axis=1), minlength=3).tolist()
    else:
        assert found["answers"]["values"]["mean"] == pytest.approx(2e6 + scores[:, 0].mean(), rel=1e-6)


def test_requests_count_by_status_and_time(tmp_path):
    artefact = fixture(tmp_path / "export", "gray")[0]
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    for status, seconds in ((200, 0.0123), (204, 1e9), (200, 0.0), (200, -1.0), (200, float("nan")), (404, 0.5),
                            (503, 0.5), (999, 0.5), (0, 0.5)):
        recorder.answered(status, seconds)
    found = merged(artefact, [tmp_path / "counts.bin"])
    assert found["requests"] == {"other": 2, "1xx": 0, "2xx": 5, "3xx": 0, "4xx": 1, "5xx": 1}
    place = int(np.searchsorted(LATENCY_EDGES, 0.0123, side="right"))
    assert found["latency"][place] == 1 and found["latency"][0] == 3 and found["latency"][-1] == 1
    # What fails is no measure of how long the others wait.
    assert sum(found["latency"]) == 5


def test_slots_of_time_are_used_again_and_the_file_stays_as_large(tmp_path, monkeypatch):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    now = [1_700_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    recorder, path = Recorder(artefact, tmp_path / "counts.bin"), tmp_path / "counts.bin"
    size = path.stat().st_size
    for hour in range(30):
        for _ in range(hour + 1):
            recorder.record(inputs[:1], scores[:1])
        now[0] += 3600
    last = range(7, 31)
    assert merged(artefact, [path])["answers"]["examples"] == sum(last)
    two = merged(artefact, [path], since=now[0] - 2 * 3600)
    assert two["answers"]["examples"] == sum(last[-2:]) and two["to"] - two["from"] == 2 * 3600
    nothing = merged(artefact, [path], since=now[0] + 7200)
    assert nothing["answers"]["examples"] == 0 and nothing["from"] is None
    assert path.stat().st_size == size < 100_000
    # A worker that ended two days before the others is not counted with them.
    now[0] += 2 * 24 * 3600
    Recorder(artefact, tmp_path / "other.bin").record(inputs[:1], scores[:1])
    assert merged(artefact, [path, tmp_path / "other.bin"])["answers"]["examples"] == 1


def test_a_worker_that_follows_another_goes_on_with_its_counts(tmp_path):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    for _ in range(3):
        recorder = Recorder(artefact, tmp_path / "counts.bin")
        recorder.record(inputs[:5], scores[:5])
        recorder.close()
    assert merged(artefact, [tmp_path / "counts.bin"])["answers"]["examples"] == 15
    # Other slots cannot be added to these.
    Recorder(artefact, tmp_path / "counts.bin", slot_seconds=60.0)
    assert merged(artefact, [tmp_path / "counts.bin"])["answers"]["examples"] == 0


def test_a_slot_that_was_being_emptied_when_the_worker_died_is_empty(tmp_path):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    recorder = Recorder(artefact, tmp_path / "counts.bin")
    recorder.record(inputs[:5], scores[:5])
    recorder._slots[recorder._slots[:, 0] != counts_file.NEVER, 0] = counts_file.NEVER
    recorder.close()
    assert merged(artefact, [tmp_path / "counts.bin"])["answers"]["examples"] == 0
    Recorder(artefact, tmp_path / "counts.bin").record(inputs[:2], scores[:2])
    assert merged(artefact, [tmp_path / "counts.bin"])["answers"]["examples"] == 2


def test_a_killed_worker_leaves_its_counts(tmp_path):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    np.savez(tmp_path / "data.npz", inputs=inputs[:1], scores=scores[:1])
    program = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from hpcai_cli.engine.serving.artefact import Artefact
        from hpcai_cli.engine.serving.statistics import Recorder
        folder = Path(sys.argv[1])
        data, recorder = np.load(folder / "data.npz"), Recorder(Artefact.open(folder / "export"), folder / "c.bin")
        inputs, scores, count = data["inputs"], data["scores"], 0
        while True:
            recorder.record(inputs, scores)
            count += 1
            if count % 100 == 0:
                print(count, flush=True)
        """
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True) as worker:
        for _ in range(30):
            said = int(worker.stdout.readline())
        os.kill(worker.pid, signal.SIGKILL)
    found = merged(artefact, [tmp_path / "c.bin"])["answers"]["examples"]
    assert said <= found
    Recorder(artefact, tmp_path / "c.bin").record(inputs[:1], scores[:1])
    assert merged(artefact, [tmp_path / "c.bin"])["answers"]["examples"] == found + 1


def test_threads_lose_no_count(tmp_path, every):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    recorder = Recorder(artefact, tmp_path / "counts.bin")

    def work():
        for _ in range(300):
            recorder.record(inputs[:3], scores[:3])
            recorder.answered(200, 0.01)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = merged(artefact, [tmp_path / "counts.bin"])
    assert found["answers"]["examples"] == sum(found["inputs"]["quantities"][0]["counts"]) == 3600
    assert found["requests"]["2xx"] == sum(found["latency"]) == 1200


@pytest.mark.parametrize("other", ["data", "threshold", "classes"])
def test_a_file_of_another_model_is_refused(tmp_path, other):
    artefact, found, inputs, scores = fixture(tmp_path / "export", "gray")
    Recorder(artefact, path_of(artefact, tmp_path, 0)).record(inputs, scores)
    changed = fixture(tmp_path / "other", "gray", count=899)[0] if other == "data" else exported(
        tmp_path / "other", found, (6, 5, 1), **{"threshold": {"threshold": 0.4},
                                                 "classes": {"class_names": ("a", "b", "d")}}[other])
    path = path_of(artefact, tmp_path, 0)
    with pytest.raises(DataError, match="of another model"):
        Recorder(changed, path)
    with pytest.raises(DataError, match="of another model"):
        merged(changed, [path])
    assert path_of(changed, tmp_path, 0) != path and files_of(changed, tmp_path) == []


@pytest.mark.parametrize("damage", ["empty", "short", "long", "noise", "header", "folder", "pipe", "negative"])
def test_a_broken_file_is_refused(tmp_path, damage):
    artefact, _, inputs, scores = fixture(tmp_path / "export", "gray")
    path = tmp_path / "counts.bin"
    recorder = Recorder(artefact, path)
    recorder.record(inputs, scores)
    if damage == "negative":
        recorder._slots[:, 5] = -1
    whole = path.read_bytes()
    recorder.close()
    content = {"empty": b"", "short": whole[:-8], "long": whole + b"x", "noise": os.urandom(len(whole)),
               "header": whole[:40] + b"\xff" * 8 + whole[48:], "negative": whole}.get(damage)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    else:
        path.mkdir() if damage == "folder" else os.mkfifo(path)
    with pytest.raises(DataError, match="holds no statistics|counts that cannot be"):
        merged(artefact, [path])
    if damage != "negative":
        with pytest.raises(DataError, match="holds no statistics"):
            Recorder(artefact, path)


def test_a_file_that_is_gone_is_no_failure(tmp_path):
    artefact = fixture(tmp_path / "export", "gray")[0]
    assert merged(artefact, [tmp_path / "gone.bin"])["answers"]["examples"] == 0


def broken_references():
    def change(*path, to):
        def apply(found):
            *way, last = path
            for step in way:
                found = found[step]
            found[last] = to
        return apply

    return {"no object": None, "schema": change("schema", to="x"), "fewer": change("inputs", to=[]),
            "many": change("inputs", to=[{}] * 300), "edges": change("inputs", 0, "edges", to=[2.0, 1.0]),
            "equal": change("inputs", 0, "edges", to=[1.0, 1.0]), "text": change("inputs", 0, "edges", to="abc"),
            "nan": change("inputs", 0, "edges", to=[float("nan")]), "huge": change("inputs", 0, "edges", to=[1e400]),
            "long": change("inputs", 0, "edges", to=list(map(float, range(1000)))),
            "mean": change("inputs", 1, "mean", to=None), "std": change("inputs", 1, "std", to=-1.0),
            "name": change("inputs", 1, "name", to=5), "counts": change("inputs", 1, "counts", to=[1]),
            "negative": change("answers", "classes", to=[1, -1, 0]), "answers": change("answers", to=[]),
            "confidence": change("answers", "confidence", to=None)}


@pytest.mark.parametrize("name", broken_references())
def test_a_broken_reference_is_refused(tmp_path, name):
    _, found, _, _ = fixture(tmp_path / "export", "gray")
    change = broken_references()[name]
    if change is None:
        found = [found]
    else:
        change(found)
    with pytest.raises(DataError, match="reference statistics in .* cannot be used"):
        Recorder(exported(tmp_path / "export", found, (6, 5, 1)), tmp_path / "counts.bin")


def test_labels_say_how_right_the_reference_is():
    inputs, scores = examples("gray", 100)
    scores[0] = np.nan
    labels = np.where(np.arange(100) < 81, np.nan_to_num(scores).argmax(axis=1), (scores.argmax(axis=1) + 1) % 3)
    found = reference_of(inputs, scores, inputs_kind="images", feature_names=(), class_names=CLASSES, labels=labels)
    assert found["answers"]["accuracy"] == pytest.approx(80 / 99) and found["answers"]["broken"] == 1
    assert sum(found["answers"]["confidence"]) == 99
    assert len(found["answers"]["confidence"]) == len(CONFIDENCE_EDGES) + 1


def test_features_beyond_the_bound_are_not_watched(tmp_path):
    inputs = np.random.default_rng(0).normal(size=(20, 250)).astype(np.float32)
    scores = examples("gray", 20)[1]
    found = reference_of(inputs, scores, inputs_kind="features", feature_names=(), class_names=CLASSES)
    assert len(found["inputs"]) == 200
    recorder = Recorder(exported(tmp_path / "export", found, (250,)), tmp_path / "counts.bin")
    recorder.record(inputs, scores)
    assert (tmp_path / "counts.bin").stat().st_size < 1 << 20


def test_a_server_needs_no_framework_for_it():
    program = "import sys, hpcai_cli.engine.serving.statistics; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"tensorflow", "keras", "pandas", "scipy", "rich", "typer"} & set(loaded)
