"""The monitor against a real HTTP server and a real state folder: reports, pages, metrics, and what goes wrong."""

import contextlib
import json
import threading
import time
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hpcai_cli.engine.deployment import monitoring
from hpcai_cli.engine.deployment.drift import Thresholds
from hpcai_cli.engine.deployment.monitor_page import check_rows, monitor_page
from hpcai_cli.engine.deployment.monitoring import Labels, Server, fetched, monitor, prometheus_text, require, write
from hpcai_cli.engine.serving.artefact import Artefact
from hpcai_cli.engine.serving.statistics import Recorder, files_of, merged, path_of, reference_of
from hpcai_cli.errors import DataError, GateError, HpcaiError, UsageError

CLASSES = ("cat", "<script>alert(1)</script>", "$x^2\"\\")


def draw(count: int, seed: int, kind: str, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    source = np.random.default_rng(seed)
    if kind == "images":
        inputs = (source.uniform(0, 120, (count, 6, 5, 3)) + 60 * shift).astype(np.uint8)
        return inputs, source.normal(0, 2, (count, 3)).astype(np.float32)
    inputs = (source.normal(0, 1, (count, 40)) + shift * (np.arange(40) == 3)).astype(np.float32)
    return inputs, inputs[:, :1] * 3


def exported(folder, kind: str = "images", *, without: bool = False) -> Artefact:
    folder.mkdir(parents=True, exist_ok=True)
    inputs, scores = draw(3000, 0, kind)
    names, files = CLASSES if kind == "images" else (), {"model.tflite": {"sha256": "1" * 64, "bytes": 1}}
    if not without:
        (folder / "reference.json").write_text(json.dumps(reference_of(
            inputs, scores, inputs_kind="images" if names else "features", class_names=names,
            feature_names=[f"column <b>{number}</b>" for number in range(40)])))
        files["reference.json"] = {"sha256": "2" * 64, "bytes": 1}
    (folder / "artefact.json").write_text(json.dumps({
        "schema": "hpcai.artefact/1", "name": "pets", "kind": "tflite", "file": "model.tflite", "files": files,
        "task": "classification" if names else "regression", "class_names": list(names), "decision_threshold": None,
        "inputs": "images" if names else "features", "input_shape": list(inputs.shape[1:])}))
    return Artefact.open(folder)


def recorded(artefact: Artefact, folder, kind: str = "images", *, count: int = 400, shift: float = 0.0) -> None:
    """Let two workers count."""
    folder.mkdir(exist_ok=True)
    inputs, scores = draw(count, 1, kind, shift)
    for worker in range(2):
        recorder = Recorder(artefact, path_of(artefact, folder, worker))
        recorder.record(inputs[worker::2], scores[worker::2])
        for number in range(100):
            recorder.answered(200, 0.001 * (number + 1))
        recorder.close()


@contextlib.contextmanager
def serving(answer):
    """Serve `answer(path, headers) -> (status, headers, body)`; give its address and what was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, dict(self.headers)))
            status, headers, body = answer(self.path, self.headers)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Tags(HTMLParser):
    """Reads a page: its tags must be balanced."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_a_running_server_and_its_state_folder_give_the_same_report(tmp_path):
    artefact = exported(tmp_path / "export")
    recorded(artefact, tmp_path / "state")
    told = json.dumps(merged(artefact, files_of(artefact, tmp_path / "state"))).encode()
    with serving(lambda path, headers: (200, {}, told)) as (url, asked):
        report, statistics = monitor(artefact, Server(url + "/", token="secret", version="3"), Thresholds())
    assert [(path, headers["Authorization"]) for path, headers in asked] == [
        ("/v2/models/pets/versions/3/statistics", "Bearer secret")]
    assert (report, statistics) == monitor(artefact, tmp_path / "state", Thresholds())
    assert report["holds"] and report["answers"] == 400 and report["schema"] == "hpcai.monitor/1"
    require(report)
    # Under another name in the server, with files of that name, they are the same.
    renamed = Artefact(artefact.folder, {**artefact.document, "name": "animals"})
    recorded(renamed, tmp_path / "state")
    again, _ = monitor(artefact, tmp_path / "state", Thresholds(), name="animals")
    assert again | {"model": "pets"} == report


def test_a_shift_fails_the_gate(tmp_path):
    artefact = exported(tmp_path / "export")
    recorded(artefact, tmp_path / "state", shift=1.0)
    report, _ = monitor(artefact, tmp_path / "state", Thresholds(p99_ms=1.0))
    assert {"psi of input brightness", "p99_ms of the latency"} < set(report["failed"])
    with pytest.raises(GateError, match="checks fail: psi of input brightness") as raised:
        require(report)
    assert raised.value.exit_code == 5


def test_hours_look_back_that_far(tmp_path, monkeypatch):
    artefact, start = exported(tmp_path / "export"), time.time() - 10 * 3600
    monkeypatch.setattr(time, "time", lambda: start)
    recorded(artefact, tmp_path / "state", count=300)
    monkeypatch.undo()
    recorded(artefact, tmp_path / "state", count=100)
    assert monitor(artefact, tmp_path / "state", Thresholds(), hours=2)[0]["answers"] == 100
    assert monitor(artefact, tmp_path / "state", Thresholds())[0]["answers"] == 400
    told = merged(artefact, files_of(artefact, tmp_path / "state"))
    with serving(lambda path, headers: (200, {}, json.dumps(told).encode())) as (url, asked):
        with pytest.raises(DataError, match="does not look back"):
            monitor(artefact, Server(url), Thresholds(), hours=2)
        assert float(asked[0][0].partition("?since=")[2]) == pytest.approx(time.time() - 7200, abs=60)
        told["since"] = start
        assert monitor(artefact, Server(url), Thresholds(), hours=20)[0]["answers"] == 400


def test_another_models_statistics_are_refused(tmp_path):
    artefact, other = exported(tmp_path / "export"), exported(tmp_path / "other", "table")
    recorded(other, tmp_path / "state", "table")
    told = json.dumps(merged(other, files_of(other, tmp_path / "state"))).encode()
    with serving(lambda path, headers: (200, {}, told)) as (url, _), pytest.raises(DataError, match="another model"):
        monitor(artefact, Server(url), Thresholds())
    for place in (tmp_path / "state", tmp_path / "nothing"):
        with pytest.raises(DataError, match="there are no statistics of the model pets"):
            monitor(artefact, place, Thresholds())


@pytest.mark.parametrize(("status", "body", "kind", "words"), [
    (401, b'{"error":"who are you"}', HpcaiError, 'answers 401 .*who are you.*give the server\'s token'),
    (404, b"\x1b[31m" + b"x" * 5000, HpcaiError, r"answers 404 .*\\x1b.*name under which"),
    (500, b"", HpcaiError, "answers 500"), (200, b"", DataError, "no statistics"),
    (200, b"[" * 100_000, DataError, "no statistics"), (200, b"<html>", DataError, "no statistics"),
    (200, b"[]", DataError, "no statistics"), (200, b"{}", DataError, "the statistics cannot be used"),
    (200, b"\xff" * 100, DataError, "no statistics"), (200, b" " * 3000, DataError, "no statistics")])
def test_what_a_server_answers_instead_is_told(tmp_path, monkeypatch, status, body, kind, words):
    monkeypatch.setattr(monitoring, "LARGEST_ANSWER", 2000)
    artefact = exported(tmp_path / "export")
    with serving(lambda path, headers: (status, {}, body)) as (url, _), pytest.raises(kind, match=words) as raised:
        monitor(artefact, Server(url), Thresholds())
    assert type(raised.value) is kind and str(raised.value).isprintable()


def test_a_token_goes_to_no_other_server(tmp_path):
    with serving(lambda path, headers: (200, {}, b"{}")) as (there, asked), serving(
            lambda path, headers: (302, {"Location": there + "/elsewhere"}, b"")) as (url, _):
        with pytest.raises(HpcaiError, match="answers 302"):
            fetched(Server(url, token="secret"), "pets")
        assert asked == []


def test_a_server_that_is_slow_or_gone_is_told():
    with serving(lambda path, headers: (time.sleep(1), (200, {}, b"{}"))[1]) as (url, _), pytest.raises(
            HpcaiError, match="cannot reach the server: .*timed out"):
        fetched(Server(url, timeout=0.2), "pets")
    with pytest.raises(HpcaiError, match="cannot reach the server: .*refused"):
        fetched(Server(url), "pets")


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "file:///etc/passwd", "ftp://x/", "http://", "http://[", "http://x?y"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(UsageError, match="no server's address"):
        fetched(Server(url), "pets")


def test_signs_that_cannot_be_sent_are_refused_without_showing_the_token():
    with pytest.raises(UsageError) as raised:
        fetched(Server("http://127.0.0.1:9", token="sec\nret"), "pets")
    assert "sec" not in str(raised.value)


def test_a_certificate_that_is_none_is_refused(tmp_path):
    (tmp_path / "ca.pem").write_text("no certificate")
    for path in (tmp_path / "ca.pem", tmp_path / "none.pem"):
        with pytest.raises(DataError, match="cannot use the certificate"):
            fetched(Server("https://127.0.0.1:9", certificate=path), "pets")


@pytest.mark.parametrize(("right", "state"), [(95, "holds"), (88, "holds"), (60, "fails")])
def test_labels_add_the_live_accuracy_and_its_check(tmp_path, right, state):
    artefact = exported(tmp_path / "export")
    recorded(artefact, tmp_path / "state")
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"r{number},cat\n" for number in range(100)))
    (tmp_path / "log").write_text("".join(json.dumps(
        {"id": f"r{number}", "model": "pets", "version": "1", "time": 1, "answers": [
            ["cat" if number < right else CLASSES[2], 0.5]]}) + "\n" for number in range(100)))
    labels = Labels(tmp_path / "labels.csv", [tmp_path / "log"])
    report, statistics = monitor(artefact, tmp_path / "state", Thresholds(accuracy=0.9), labels=labels)
    row = report["checks"][-1]
    # 88 of 100 can be a model with 90 %.
    assert (row["of"], row["figure"], row["value"], row["state"]) == ("the labels", "accuracy", right / 100, state)
    assert report["holds"] == (state == "holds") and report["live_accuracy"]["examples"] == 100
    page = monitor_page(artefact, report, statistics)
    assert "Labels that came later" in page and f"{right / 100:.4f}" in page
    few = monitor(artefact, tmp_path / "state", Thresholds(accuracy=0.9, min_examples=101), labels=labels)[0]
    assert few["checks"][-1]["state"] == "too few to tell"


@pytest.mark.parametrize("kind", ["images", "table", "without"])
def test_the_page_is_whole_and_holds_nothing_foreign(tmp_path, kind):
    data = "table" if kind == "table" else "images"
    artefact = exported(tmp_path / "export", data, without=kind == "without")
    recorded(artefact, tmp_path / "state", data, shift=1.0)
    report, statistics = monitor(artefact, tmp_path / "state", Thresholds())
    text = monitor_page(artefact, report, statistics)
    page = Tags(text)
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == {"images": 4, "table": 2, "without": 3}[kind]
    assert all(source.startswith("data:image/png;base64,") for source in images)
    assert "script" not in {tag for tag, _ in page.tags} and "b" not in {tag for tag, _ in page.tags}
    attributes = {name for _, given in page.tags for name in given}
    assert attributes <= {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "src", "alt"}
    rows = check_rows(report)
    states = [row[-1] for row in rows]
    assert states[:len(report["failed"])] == ["fails"] * len(report["failed"])
    assert "fails" not in states[len(report["failed"]):]
    assert f"{len(report['failed'])} of {len(rows)} checks fail." in page.words or report["holds"]
    if kind == "table":
        assert "column <b>3</b>" in page.words


def test_a_page_of_a_server_that_was_asked_nothing(tmp_path):
    artefact = exported(tmp_path / "export")
    (tmp_path / "state").mkdir()
    Recorder(artefact, path_of(artefact, tmp_path / "state", 0)).close()
    report, statistics = monitor(artefact, tmp_path / "state", Thresholds())
    page = Tags(monitor_page(artefact, report, statistics))
    assert "img" not in {tag for tag, _ in page.tags} and "No check fails." in page.words


def test_the_files_are_written_beside_each_other(tmp_path):
    artefact = exported(tmp_path / "export")
    recorded(artefact, tmp_path / "state")
    report, statistics = monitor(artefact, tmp_path / "state", Thresholds())
    write(tmp_path / "report", artefact, report, statistics)
    assert json.loads((tmp_path / "report" / "monitor.json").read_text()) == report
    assert json.loads((tmp_path / "report" / "statistics.json").read_text()) == statistics
    assert (tmp_path / "report" / "report.html").read_text().startswith("<!doctype html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(HpcaiError, match="cannot write"):
        write(tmp_path / "file", artefact, report, statistics)


def test_the_metrics_are_read_by_prometheus(tmp_path):
    artefact = exported(tmp_path / "export", "table")
    recorded(artefact, tmp_path / "state", "table", shift=1.0)
    report, _ = monitor(artefact, tmp_path / "state", Thresholds())
    report = report | {"checks": [*report["checks"], report["checks"][0] | {"of": 'a "b"\\\n{x=1}'}]}
    families = {family.name: family.samples for family in text_string_to_metric_families(prometheus_text(report))}
    value = {(sample.labels["of"], sample.labels["figure"]): sample.value for sample in
             families["hpcai_monitor_value"]}
    assert value[("input column <b>3</b>", "psi")] == max(
        check["value"] for check in report["checks"] if check["figure"] == "psi")
    assert ('a "b"\\\n{x=1}', report["checks"][0]["figure"]) in value
    failed = {f"{sample.labels['figure']} of {sample.labels['of']}" for sample in families["hpcai_monitor_failed"]
              if sample.value}
    assert failed == set(report["failed"]) == {"psi of input column <b>3</b>"}
    assert families["hpcai_monitor_holds"][0].value == 0
    assert {sample.labels["model"] for sample in families["hpcai_monitor_examples"]} == {"pets"}
