"""The texts of a bundle fit what reads them: people, shells, systemd, Docker and Kubernetes."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from hpcai_cli.engine.deployment import bundle_files
from hpcai_cli.engine.deployment.bundle import write_bundle
from hpcai_cli.errors import DataError

HOSTILE = ["Tiny_digits.v1", "no", "null", "1e3", "0x10", "1.0", "007", "A" * 100, "a" + "-._" * 33, "9-lives", "Z.."]


@pytest.mark.parametrize("name", HOSTILE)
def test_kubernetes_takes_the_manifests_whatever_the_models_name(export, name):
    texts = bundle_files.server_texts(export(name=name), tag="0a1b")
    documents = {Path(file).stem: yaml.safe_load(text) for file, text in texts.items() if file.endswith(".yaml")}
    for document in documents.values():
        kubernetes_validate.validate(document, "1.30", strict=True)
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)
    label = documents["deployment"]["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", label)
    labels = {"app.kubernetes.io/name": label}
    assert documents["deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert documents["deployment"]["spec"]["template"]["metadata"]["labels"] == labels
    assert documents["service"]["spec"]["selector"] == labels
    assert documents["autoscaler"]["spec"]["scaleTargetRef"]["name"] == label


def test_the_pods_are_probed_bounded_and_without_rights(export, tmp_path):
    document = yaml.safe_load((write_bundle(export(), tmp_path / "bundle") / "kubernetes/deployment.yaml").read_text())
    assert document["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0 and "replicas" not in document["spec"]
    pod = document["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] > 30
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                            "capabilities": {"drop": ["ALL"]}}
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert {"startupProbe", "resources"} <= set(container)
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shell_takes_the_script(export, tmp_path, name):
    (tmp_path / "start.sh").write_text(bundle_files.server_texts(export(name=name), tag="0a1b")["start.sh"])
    done = subprocess.run(["sh", "-n", tmp_path / "start.sh"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
@pytest.mark.parametrize("name", HOSTILE)
def test_systemd_takes_the_unit(export, tmp_path, name):
    unit = tmp_path / f"{name}.service"
    text = bundle_files.server_texts(export(name=name), tag="0a1b")[unit.name]
    # What it starts has to be there.
    unit.write_text(text.replace(f"=/opt/{name}/start.sh ", "=/bin/true "))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("name", "label"), [("Mnist_CNN", "mnist-cnn"), ("7", "model-7"), ("a" * 70, "a" * 63),
                                             ("b" * 62 + "..c", "b" * 62), ("9" * 99, "model-" + "9" * 57)])
def test_names_that_dns_takes(name, label):
    assert bundle_files.dns_label(name) == label


def test_the_container_takes_what_it_needs(export, tmp_path):
    folder = write_bundle(export(), tmp_path / "bundle")
    copied = set(re.findall(r"^COPY (\S+) ", (folder / "Dockerfile").read_text(), re.MULTILINE))
    assert copied == {path.lstrip("!") for path in (folder / ".dockerignore").read_text().split() if path[0] == "!"}
    assert copied == {"requirements.txt", "lib", "model", "start.sh"} <= {path.name for path in folder.iterdir()}


def test_memory_follows_what_the_export_has_measured(export):
    def memory(folder: str, **changes) -> tuple[int, int]:
        """Return MiB that are requested and MiB that are allowed."""
        texts = bundle_files.server_texts(export(folder=folder, **changes), tag="0")
        usual, most = re.findall(r"memory: (\d+)Mi", texts["kubernetes/deployment.yaml"])
        assert f"MemoryMax={most}M\n" in texts["Tiny_digits.v1.service"]
        return int(usual), int(most)

    def peak(megabytes: object, kind: str = "tflite") -> dict:
        return {"serving": {"measured": {kind: {"peak_memory_mb": megabytes}}}, "kind": kind}
    small = memory("small")
    assert small == memory("foreign", serving="?") == memory("text", **peak("much")) == (192, 256)
    usual, most = memory("large", **peak(300))
    # 225 MB were measured for four convolutions on 150x150 pixels, and their server took 230 MiB, 1,250 in a reload.
    assert 300 < usual < 1000 and most - usual > 8 * 200
    assert memory("other", **peak(300, "onnx"))[1] < most
    assert memory("tensorflow", **peak(740, "keras"))[0] > 750


def test_the_readme_tells_what_it_is_and_its_commands_are_right(export, tmp_path):
    readme = (write_bundle(export(), tmp_path / "images") / "README.md").read_text()
    assert "28x28 pixels in gray" in readme and "one of 10 classes" in readme and "MODEL_CARD.md" in readme
    assert "curl -F image=@cat.jpg http://127.0.0.1:8000/predict" in readme
    folder = write_bundle(export("features", "table"), tmp_path / "rows")
    readme = (folder / "README.md").read_text()
    assert "    it's \"so\"; ``` (category)\n" in readme and "@example.json" in readme
    assert json.loads((folder / "example.json").read_text()) == {
        "rows": [{"age": 40.0, "it's \"so\"; ```": "north"}]}


def test_a_long_list_of_hostile_names_is_cut_and_made_harmless(export, tmp_path):
    artefact = export(class_names=["\n# Title", "\x1b[2J", *(f"class {number}" for number in range(98))])
    readme = (write_bundle(artefact, tmp_path / "bundle") / "README.md").read_text()
    assert "    \\n# Title\n    \\x1b[2J\n    class 0\n" in readme
    assert "class 47\n    ... and 50 more, in model/artefact.json\n" in readme and "class 48" not in readme


@pytest.mark.parametrize("columns", [None, [{"name": "age"}], [7]])
def test_columns_that_no_export_writes(export, tmp_path, columns):
    with pytest.raises(DataError, match="the columns in .*artefact.json cannot be used: .*; export the model again"):
        write_bundle(export("features", encoding={"columns": columns}), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
