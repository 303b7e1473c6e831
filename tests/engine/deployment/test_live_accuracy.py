"""Labels that came later, joined with a request log as the server writes it, and with logs that are broken."""

import csv
import json
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from hpcai_cli.engine.deployment import delayed_labels
from hpcai_cli.engine.deployment.live_accuracy import live_accuracy, wilson
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.request_log import RequestLog
from hpcai_cli.errors import DataError

CLASSES = ("cat", "dog", "a \"bird\", or not")


def artefact_of(folder, class_names=CLASSES) -> Artefact:
    return Artefact(folder, {"name": "pets", "class_names": list(class_names), "decision_threshold": None})


def written(folder, labels, requests) -> tuple:
    """Write both files: rows of (id, label), and requests or whole lines."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("id", "label"), *labels])
    lines = [request if isinstance(request, bytes) else json.dumps(request).encode() for request in requests]
    (folder / "log.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder / "labels.csv", [folder / "log.jsonl"]


def request(name: str, *answers, model="pets", version="1", **more) -> dict:
    return {"time": "2024-05-01T10:00:00.000+00:00", "id": name, "model": model, "version": version, "status": 200,
            "answers": list(answers), **more}


def test_the_accuracy_is_that_of_the_joined_answers(tmp_path):
    names = [f"r{number}" for number in range(100)]
    labels = [(name, CLASSES[number % 3]) for number, name in enumerate(names)]
    requests = [request(name, [CLASSES[number % 3 if number < 80 else (number + 1) % 3], 0.9])
                for number, name in enumerate(names)]
    found = live_accuracy(artefact_of(tmp_path), *written(tmp_path, labels, requests))
    assert (found["examples"], found["accuracy"]) == (100, 0.8)
    theirs = stats.binomtest(80, 100).proportion_ci(method="wilson")
    assert found["interval"] == pytest.approx([theirs.low, theirs.high], rel=1e-9)
    assert [row["name"] for row in found["classes"]] == list(CLASSES)
    assert sum(row["right"] for row in found["classes"]) == 80
    first = found["classes"][0]
    assert first["recall"] == first["right"] / first["examples"] == 27 / 34
    assert first["precision"] == first["right"] / first["answered"]
    assert found["counts"] == dict.fromkeys(found["counts"], 0) | {"requests": 100, "labels": 100}


@pytest.mark.parametrize(("right", "count"), [(0, 10), (10, 10), (1, 1), (999, 1000)])
def test_wilsons_interval_is_scipys(right, count):
    theirs = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert wilson(right, count) == pytest.approx([theirs.low, theirs.high], abs=1e-12)
    assert wilson(0, 0) is None


def test_the_servers_own_log_is_read(tmp_path):
    scores = np.array([[5, 0, 0], [0, 5, 0]], np.float32)
    log = RequestLog(str(tmp_path / "server.log"))
    log.request({"id": "one", "model": "pets", "version": "2", "status": 200}, artefact_of(tmp_path), scores[:1])
    log.request({"id": "two", "model": "pets", "version": "2", "status": 200}, artefact_of(tmp_path), scores)
    log.request({"id": "three", "method": "GET", "path": "/metrics", "status": 200})
    log.request({"id": "four", "model": "pets", "version": "2", "status": 503})
    log.event("a model was loaded")
    log.close()
    labels, _ = written(tmp_path, [("one", "cat"), ("two/0", "cat"), ("two/1", "cat"), ("four", "dog")], [])
    found = live_accuracy(artefact_of(tmp_path), labels, [tmp_path / "server.log"])
    assert (found["examples"], found["accuracy"]) == (3, pytest.approx(2 / 3))
    assert found["counts"]["without_answer"] == found["counts"]["unknown"] == 1
    assert found["counts"]["unreadable_requests"] == 0


def test_numbers_give_their_errors(tmp_path):
    source = np.random.default_rng(0)
    true, told = source.normal(50, 10, 400), source.normal(50, 10, 400)
    labels = [(f"r{number}", repr(value)) for number, value in enumerate(true.tolist())]
    requests = [request(f"r{number}", value if number % 2 else {"value": value})
                for number, value in enumerate(told.tolist())]
    found = live_accuracy(artefact_of(tmp_path, ()), *written(tmp_path, labels, requests))
    errors = np.abs(told - true)
    assert found["mean_absolute_error"] == pytest.approx(errors.mean())
    assert found["mean_error"] == pytest.approx((told - true).mean())
    half = 1.96 * errors.std() / 20
    assert found["interval"] == pytest.approx([errors.mean() - half, errors.mean() + half], rel=1e-4)


def test_what_cannot_be_joined_is_counted(tmp_path):
    labels = [("right", "cat"), ("right", "cat"), ("twice", "cat"), ("twice", "dog"), ("never", "dog"),
              ("typo", "catt"), ("empty", "dog"), ("again", "dog"), ("odd", "cat"), ("", "cat"), ("short",),
              ("x" * 400, "cat")]
    requests = [request("right", {"label": "cat", "probability": 0.9}), request("twice", ["cat", 0.9]),
                request("again", ["dog", 0.9]), request("again", ["cat", 0.9]), request("empty"),
                request("empty") | {"answers": None}, request("odd", ["horse", 0.5]), request("odd", [["cat"], 1]),
                request("odd", 7), request("stranger", ["cat", 0.9]), request("right", ["dog", 1], model="other"),
                request("typo", ["cat", 0.9])]
    found = live_accuracy(artefact_of(tmp_path), *written(tmp_path, labels, requests))
    assert (found["examples"], found["accuracy"]) == (2, 1.0)
    assert found["counts"] == {
        "requests": 11, "labels": 9, "unknown": 3, "conflicting": 1, "duplicate_labels": 1, "foreign_labels": 1,
        "without_answer": 2, "asked_again": 1, "without_label": 2, "unreadable_labels": 3, "unreadable_requests": 0,
        "unreadable_answers": 3}


def test_version_and_time_choose_the_requests(tmp_path):
    labels = [(name, "cat") for name in "abcdef"]
    requests = [request("a", ["dog", 1], version=1), request("b", ["cat", 1], version="2"),
                request("c", ["cat", 1], version="2", time=1_900_000_000),
                request("d", ["cat", 1], version="2", time="2029-01-01T00:00:00Z"),
                request("e", ["cat", 1], version="2", time="2029-01-01T00:00:00"),
                request("f", ["cat", 1], version="2", time="<tomorrow>")]
    files = written(tmp_path, labels, requests)
    assert live_accuracy(artefact_of(tmp_path), *files)["examples"] == 6
    assert live_accuracy(artefact_of(tmp_path), *files, version="1")["accuracy"] == 0
    assert live_accuracy(artefact_of(tmp_path), *files, version="2")["examples"] == 5
    assert live_accuracy(artefact_of(tmp_path), *files, since=1_800_000_000)["examples"] == 3


@pytest.mark.parametrize("name", ["a,b", 'quo"te', "猫 и 🐈", "tab\there", "=cmd()", " space", "\x1b[31m", "%s/0",
                                  "new\nline"])
def test_ids_of_odd_signs_are_joined(tmp_path, name):
    files = written(tmp_path, [(name, "cat")], [request(name, ["cat", 0.9])])
    found = live_accuracy(artefact_of(tmp_path), *files)
    # A comma may be followed by spaces, so that one at the beginning of a name is none of it.
    assert found["examples"] == (name != " space")


@pytest.mark.parametrize("line", [
    b"", b"{", b"null", b"[]", b"7", b"\xff\xfe\x00", b"[" * 100_000, b'{"id": 1e999}' * 2, b"9" * 5000, b"\x00" * 100,
    b'{"id": ["x"], "model": "pets"}', b'{"id": {}, "model": {"pets": 1}, "answers": 3}',
    b'{"id": "\\ud800", "model": "pets", "answers": [["cat", 1]]}', b'{"id":"x","model":"pets","answers":[[]]}',
    b'{"id":"x","model":"pets","answers":[null]}', b'{"id":"x","model":"pets","answers":[["cat"],["dog"]]}'])
def test_broken_lines_of_the_log_stop_nothing(tmp_path, line):
    files = written(tmp_path, [("x", "cat"), ("y", "dog")], [line, request("y", ["dog", 0.9]), line])
    found = live_accuracy(artefact_of(tmp_path), *files)
    assert (found["examples"], found["accuracy"], found["counts"]["unknown"]) == (1, 1.0, 1)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, True, "7", None, [7]])
def test_answers_that_are_no_numbers_are_counted(tmp_path, value):
    files = written(tmp_path, [("x", "5"), ("y", "nan"), ("z", "6")], [request("x", value), request("z", 7)])
    found = live_accuracy(artefact_of(tmp_path, ()), *files)
    assert (found["mean_absolute_error"], found["counts"]["unreadable_answers"]) == (1.0, 1)
    assert found["counts"]["foreign_labels"] == 1


@pytest.mark.parametrize(("content", "labels", "unreadable"), [
    (b"\xef\xbb\xbfID, Label ,note\r\nx,cat,\r\ny,dog,\"a\r\nb\"\r\n", 2, 0), (b"label,id\ncat,x\n\n\ndog,y", 2, 0),
    (b"id,label\nx,cat\ny\nz,cat,more\n,cat\n", 1, 3), (b"id,label\nx,\xff\xfe\n", 1, 0),
    (b"id,label\n" + b"x" * 5_000_000 + b",cat\ny,dog\n", 1, 1),
    (b"id,label\nx\x00,cat\n", 1, 0)])
def test_labels_are_read_from_what_there_is(tmp_path, content, labels, unreadable):
    (tmp_path / "labels.csv").write_bytes(content)
    (tmp_path / "log").write_bytes(b"")
    found = live_accuracy(artefact_of(tmp_path), tmp_path / "labels.csv", [tmp_path / "log"])
    assert found["accuracy"] is None and found["interval"] is None
    assert (found["counts"]["labels"], found["counts"]["unreadable_labels"]) == (labels, unreadable)


def test_a_quote_that_never_ends_does_not_take_all_labels_with_it(tmp_path):
    rows = b"".join(b"y%d,dog\n" % number for number in range(40_000))
    (tmp_path / "labels.csv").write_bytes(b'id,label\nx,"cat\n' + rows)
    found = live_accuracy(artefact_of(tmp_path), tmp_path / "labels.csv", [])
    assert found["counts"]["unreadable_labels"] >= 1 and found["counts"]["labels"] > 20_000


@pytest.mark.parametrize("content", [b"", b"\n\n", b"x,cat\n", b"id;label\nx;cat\n", b"\x89PNG\r\n\x1a\n\x00"])
def test_a_file_without_the_columns_is_refused(tmp_path, content):
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match="id,label"):
        live_accuracy(artefact_of(tmp_path), tmp_path / "labels.csv", [])


def test_files_that_are_missing_or_too_large_are_refused(tmp_path, monkeypatch):
    labels, _ = written(tmp_path, [(str(number), "cat") for number in range(11)], [])
    for arguments in ((tmp_path / "none.csv", []), (labels, [tmp_path / "none.log"]), (tmp_path, [])):
        with pytest.raises(DataError, match="cannot read"):
            live_accuracy(artefact_of(tmp_path), *arguments)
    monkeypatch.setattr(delayed_labels, "MOST_LABELS", 10)
    with pytest.raises(DataError, match="at most 10; split the file"):
        live_accuracy(artefact_of(tmp_path), labels, [])


def test_a_long_log_is_not_held_in_memory(tmp_path):
    labels, (log,) = written(tmp_path, [("r7", "cat")], [])
    line = json.dumps(request("r%d", ["cat", 0.9], path="/predict" * 200)).encode() + b"\n"
    with log.open("wb") as file:
        for number in range(20_000):
            file.write(line % number)
        file.write(b"x" * (32 << 20) + b"\n" + line % 7)
    tracemalloc.start()
    found = live_accuracy(artefact_of(tmp_path), labels, [log])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert log.stat().st_size > 64 << 20 and peak < 8 << 20
    assert (found["examples"], found["counts"]["without_label"]) == (1, 19_999)
    assert (found["counts"]["unreadable_requests"], found["counts"]["asked_again"]) == (1, 1)
