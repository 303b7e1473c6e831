"""A bundle runs where neither this project nor TensorFlow is."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine import tflite_file
from hpcai_cli.engine.deployment import bundle_files, edge_runner
from hpcai_cli.engine.deployment.bundle import write_bundle
from hpcai_cli.engine.evaluation import log_probabilities
from hpcai_cli.engine.raw.images import read_image
from hpcai_cli.engine.serving.artefact import Artefact

DIGIT = Path(__file__).parents[2] / "digit.png"


def run(*words: object, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **settings)


class Server:
    """The bundle's own server, in surroundings that know nothing of this project."""

    def __init__(self, folder: Path, python: Path, log: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.log = folder, log
        self.environ = {"PATH": os.environ["PATH"], "HPCAI_PYTHON": str(python), "HPCAI_PORT": str(self.port),
                        "HPCAI_WORKERS": "2", "PYTHONPROFILEIMPORTTIME": "1"}

    def __enter__(self):
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen([self.folder / "start.sh"], cwd=self.folder.parent, env=self.environ,
                                            stdout=stream, stderr=stream)
        until = time.monotonic() + 60
        while "\nready: " not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        return self

    def __exit__(self, *failure):
        self.process.terminate()
        try:
            assert self.process.wait(40) == 0
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()

    def readme(self, heading: str) -> list[str]:
        """Return what a shell prints for each block of commands under a heading of the README."""
        section = (self.folder / "README.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
        said = []
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
            lines = [line for line in block.replace(":8000", f":{self.port}").replace("cat.jpg", str(DIGIT))
                     .replace("curl ", "curl -sS --fail ").splitlines(True) if not line.startswith("hpcai ")]
            done = run("sh", "-ec", "".join(lines), cwd=self.folder)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        return said

    def imported(self) -> set[str]:
        """Return the names of the modules that its processes have imported."""
        lines = self.log.read_text().splitlines()
        return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@pytest.mark.parametrize("inputs", ["images", "features"])
def test_the_server_answers_without_this_project_and_without_tensorflow(export, tmp_path, bare_python, inputs):
    folder = write_bundle(export(inputs), tmp_path / "bundle")
    folder = folder.rename(tmp_path / "else where")
    with Server(folder, bare_python, tmp_path / "log") as server:
        predicted, inferred = map(json.loads, server.readme("Ask"))
        (answer,) = predicted["answers"]
        assert answer["label"] in Artefact.open(folder / "model").class_names
        assert [output["name"] for output in inferred["outputs"]] == ["probabilities", "label"]
        (watched,) = server.readme("Watch")
        assert '"ready":true' in watched and "# TYPE " in watched and "Tiny_digits.v1" in watched
        healthy = json.loads(re.search(r"CMD (\[.*\])", (folder / "Dockerfile").read_text())[1])
        assert run(bare_python, *healthy[1:], env=server.environ).returncode == 0
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=10) as page:
            assert b"<html" in page.read()
    assert run(bare_python, *healthy[1:], env=server.environ).returncode != 0
    modules = server.imported()
    assert {"hpcai_cli.engine.serving.worker", "hpcai_cli.engine.tflite_file", "ai_edge_litert"} <= modules
    heavy = {"tensorflow", "keras", "h5py", "pandas", "scipy", "sklearn", "matplotlib", "onnx", "onnxruntime"}
    assert not {name.split(".")[0] for name in modules} & heavy


def test_the_packages_are_installed_once(export, tmp_path):
    """A Python that only notes how it is called stands for the real one, which would take a minute."""
    folder = write_bundle(export(), tmp_path / "bundle")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / f"python{bundle_files.PYTHON}"
    fake.write_text('''#!/bin/sh
echo "$0 $*" >> "$CALLS"
case "$2" in
    venv) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    pip) exit "${BROKEN:-0}" ;;
    *) echo "$PYTHONPATH" ;;
esac
''')
    fake.chmod(0o755)
    environ = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}

    def start(*words: str, **settings: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").write_text("")
        done = run(folder / "start.sh", *words, cwd=tmp_path, env=environ | settings)
        return done.returncode, [call.split()[2] for call in (tmp_path / "calls").read_text().splitlines()]

    server = "hpcai_cli.engine.serving.server"
    assert start(BROKEN="7") == (7, ["venv", "pip"])
    assert start() == (0, ["venv", "pip", server])
    assert start("--max-batch", "8", HPCAI_HOST="::1", HPCAI_WORKERS="3") == (0, [server])
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == f"{folder}/.venv/bin/python -m {server} {folder}/model --host ::1 --port 8000 --workers 3 " \
        "--max-batch 8"
    (folder / "requirements.txt").write_text("other==1\n")
    assert start() == (0, ["venv", "pip", server])
    assert start(HPCAI_VENV=str(tmp_path / "venv")) == (0, ["venv", "pip", server])
    assert start(HPCAI_PYTHON=str(fake), HPCAI_VENV="/nowhere") == (0, [server])


def test_images_are_answered_on_a_small_device(export, tmp_path, bare_python, tflite_models):
    folder = write_bundle(export(), tmp_path / "bundle", edge=True)
    assert {path.name for path in folder.iterdir()} == {"README.md", "SHA256SUMS", "lib", "model", "requirements.txt",
                                                        "run.py"}
    one = run(bare_python, "-X", "importtime", folder / "run.py", DIGIT, cwd=tmp_path, env={})
    assert one.returncode == 0, one.stderr
    (answer,) = map(json.loads, one.stdout.splitlines())
    scores = tflite_file.runner(tflite_models["images"], threads=1)(read_image(DIGIT, (28, 28, 1))[None])
    chances = np.exp(log_probabilities(scores))[0]
    assert answer == {"file": str(DIGIT), "label": str(chances.argmax()), "probability": pytest.approx(chances.max())}
    assert "ai_edge_litert" in one.stderr and not re.search(r"\| +(tensorflow|keras|pandas|uvicorn)\b", one.stderr)
    (tmp_path / "not.png").write_text("nothing")
    more = run(bare_python, folder / "run.py", tmp_path / "not.png", "missing.png", DIGIT, cwd=tmp_path, env={})
    assert more.returncode == 3
    said = [json.loads(line) for line in more.stdout.splitlines()]
    assert "not an image" in said[0]["error"] and "No such file" in said[1]["error"] and said[2] == answer


def test_rows_are_answered_on_a_small_device(export, tmp_path, bare_python):
    artefact = export("features")
    folder = write_bundle(artefact, tmp_path / "bundle", edge=True)
    name = artefact.encoding["names"][1]
    rows = [{"age": 31, name: "north"}, {"age": "old", name: "south"}, {"age": None, name: "south"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quoted = '"' + name.replace('"', '""') + '"'
    (tmp_path / "rows.csv").write_text(f"age;{quoted}\n31;north\nold;south\n;south\n1\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    done = run(bare_python, folder / "run.py", "rows.jsonl", "rows.csv", "missing.csv", "broken.jsonl", cwd=tmp_path,
               env={})
    assert done.returncode == 3
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["file"], line.get("row"), "error" in line) for line in said] == [
        ("rows.jsonl", 1, False), ("rows.jsonl", 2, True), ("rows.jsonl", 3, False), ("rows.csv", 1, False),
        ("rows.csv", 2, True), ("rows.csv", 3, False), ("rows.csv", 4, True), ("missing.csv", None, True),
        ("broken.jsonl", None, True)]
    assert said[1]["error"].startswith("row 2: column 'age' holds 'old'")
    assert [line.get("probability") for line in said[:3]] == [line.get("probability") for line in said[3:6]]


@pytest.mark.parametrize("label", ["", ",yes"])
def test_rows_without_a_header(export, tmp_path, capsys, label):
    encoding = export("features").encoding | {"header": False}
    artefact = export("features", "bare", encoding=encoding)
    (tmp_path / "rows.csv").write_text(f"31,north{label}\n?,south{label}\n")
    assert edge_runner.run(artefact.folder, [str(tmp_path / "rows.csv")]) == 0
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == [1, 2]


def test_rows_of_plain_numbers(export, tmp_path, capsys):
    artefact = export("features", encoding={})
    del artefact.document["encoding"]
    (artefact.folder / "artefact.json").write_text(json.dumps(artefact.document))
    (tmp_path / "rows.csv").write_text("1;2;3;4\n1;2;3\n1;2;x;4\n")
    assert edge_runner.run(artefact.folder, [str(tmp_path / "rows.csv")]) == 3
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "probability" in said[0] and ["error" in line for line in said] == [False, True, True]


def test_a_broken_model_ends_the_program_for_small_devices(export, tmp_path, bare_python):
    folder = write_bundle(export(), tmp_path / "bundle", edge=True)
    (folder / "model/model.tflite").write_bytes(b"other")
    done = run(bare_python, folder / "run.py", DIGIT, env={})
    assert done.returncode == 3 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
