"""hpcai benchmark serve --url as a user meets it, with a server of hpcai's own behind TLS and a token."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import keras
import pytest

from hpcai_cli.engine.compression import quantization


def write_export(folder: Path) -> Path:
    """Write an export of a model that is quick."""
    inputs = keras.Input((4, 4, 1))
    content = quantization.convert(keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs))),
                                   (4, 4, 1), kind="float32")
    folder.mkdir()
    (folder / "model.tflite").write_bytes(content)
    (folder / "artefact.json").write_text(json.dumps({
        "schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite",
        "task": "classification", "class_names": ["a", "b", "c"], "decision_threshold": None, "inputs": "images",
        "input_shape": [4, 4, 1], "files": {"model.tflite": {"sha256": hashlib.sha256(content).hexdigest()}}}))
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server with a token behind TLS: its URL, and the options that it takes."""
    folder = tmp_path_factory.mktemp("served")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=127.0.0.1", "-addext",
                    "subjectAltName=IP:127.0.0.1"], cwd=folder, check=True, capture_output=True)
    (folder / "token").write_text("a-long-token\n")
    command = [sys.executable, "-m", "hpcai_cli.engine.serving.server", write_export(folder / "tiny"), "--port", "0",
               "--trust-model", "--tls-cert", "cert.pem", "--tls-key", "key.pem", "--token-file", "token",
               "--log-file", "requests.log"]
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)
    try:
        until = time.monotonic() + 60
        while "ready: " not in (text := (folder / "said").read_text()) and time.monotonic() < until:
            assert process.poll() is None, text
            time.sleep(0.02)
        yield (text.partition("ready: ")[2].split()[0], folder / "requests.log",
               ("--token-file", folder / "token", "--certificate", folder / "cert.pem"))
    finally:
        process.terminate()
        process.wait()


def test_constant_rates_over_tls_with_a_token(hpcai, served):
    url, log, options = served
    done = hpcai("benchmark", "serve", "--url", url, "--model", "tiny", "--rate", 40, "--seconds", 0.5, *options,
                 "--connections", 4, "--json", "--output", "result")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    values = [figure["value"] for figure in document["figures"]]
    assert len(values) == 3 and 0 < values[0] <= values[1] <= values[2]
    (offered, answered, *_, errors), = document["tables"][0]["rows"]
    assert (offered, errors) == (40, "") and answered <= 40
    # The server's own log has as many: one to try, eight to warm up, three rounds of twenty.
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["path"].endswith("infer")] == [200] * (1 + 8 + 60)
    assert "a-long-token" not in Path("result/result.json").read_text()


def test_json_and_binary_and_several_examples(hpcai, served):
    url, _, options = served
    for tensors in ("json", "binary"):
        done = hpcai("benchmark", "serve", "--url", url, "--model", "tiny", "--rate", 20, "--seconds", 0.2, *options,
                     "--tensors", tensors, "--batch-size", 7, "--output", tensors)
        assert done.exit_code == 0 and "none: " not in done.stdout, done.stderr


def test_what_a_server_refuses(hpcai, served, tmp_path):
    url, _, options = served
    (tmp_path / "other").write_text("another-token")
    for given, code, said in [
            ((url, "--model", "tiny", *options[2:]), 1, "without a token"),
            ((url, "--model", "tiny", "--token-file", tmp_path / "other", *options[2:]), 1, "refuses the token"),
            ((url, "--model", "tiny", *options[:2]), 1, "CERTIFICATE_VERIFY_FAILED"),
            ((url, "--model", "tiny", *options[:2], "--certificate", "none.pem"), 3, "none.pem"),
            ((url.replace("https", "http"), "--model", "tiny", *options), 1, "nobody answers"),
            ((url, "--model", "tny", *options), 2, "expected tiny"),
            ((url, "--model", "tiny", "--shape", "images=1,4,4,2", *options), 2, "another shape"),
            ((url, "--model", "tiny", "--tensors", "text", *options), 2, "--tensors"),
            ((url, "--model", "tiny", "--shape", "images", *options), 2, "--shape"),
            (("http://127.0.0.1:1", "--model", "tiny"), 1, "nobody answers at 127.0.0.1:1"),
            (("http://127.0.0.1:1",), 2, "--model NAME"),
            (("http://127.0.0.1:1", "--model", "tiny", "--peer", "flask=/bin/sh"), 2, "no --peer")]:
        done = hpcai("benchmark", "serve", "--url", *given, "--output", "none")
        assert done.exit_code == code and said in done.stderr, (given, done.stderr)
        assert "Traceback" not in done.stderr and not Path("none").exists()


def test_options_of_a_running_server_need_one(hpcai):
    for words in (("--rate", 5), ("--model", "tiny"), ("--shape", "a=1")):
        done = hpcai("benchmark", "serve", *words)
        assert done.exit_code == 2 and f"{words[0]} is for a server that runs already" in done.stderr
