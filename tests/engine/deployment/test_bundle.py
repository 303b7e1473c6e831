"""A bundle is whole and like any other of the same export; what is there is never overwritten."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hpcai_cli.engine.deployment.bundle import write_bundle
from hpcai_cli.engine.serving.artefact import Artefact, digest
from hpcai_cli.errors import DataError, HpcaiError, UsageError


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_it_holds_the_export_and_all_that_runs_it(export, tmp_path):
    artefact = export()
    folder = write_bundle(artefact, tmp_path / "new" / "bundle")
    assert folder == tmp_path / "new" / "bundle"
    found = names(folder)
    assert {"Dockerfile", ".dockerignore", "README.md", "SHA256SUMS", "requirements.txt", "start.sh",
            "Tiny_digits.v1.service", "kubernetes/deployment.yaml", "kubernetes/service.yaml",
            "kubernetes/autoscaler.yaml"} == {name for name in found if not name.startswith(("lib/", "model/"))}
    assert {name for name in found if name.startswith("model/")} == {
        "model/artefact.json", "model/model.tflite", "model/MODEL_CARD.md"}
    Artefact.open(folder / "model").verify()
    for name in found:
        assert "{{" not in (folder / name).read_bytes().decode(errors="replace") or name.startswith(("lib/", "model/"))
    assert (folder / "start.sh").stat().st_mode & 0o111 and folder.stat().st_mode & 0o055
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("edge", [False, True])
def test_its_sums_are_those_of_all_files(export, tmp_path, edge):
    folder = write_bundle(export(), tmp_path / "bundle", edge=edge)
    done = subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True,
                          text=True)
    assert (done.returncode, done.stdout) == (0, "")
    listed = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    assert listed == names(folder) - {"SHA256SUMS"}


def test_the_same_export_gives_the_same_bundle_and_another_one_another_image(export, tmp_path):
    artefact = export()
    first, second = (write_bundle(artefact, tmp_path / name) for name in ("one", "two"))
    assert (first / "SHA256SUMS").read_text() == (second / "SHA256SUMS").read_text()
    other = write_bundle(export(folder="other", decision_threshold=None, hpcai="9"), tmp_path / "three")
    images = {yaml.safe_load((folder / "kubernetes/deployment.yaml").read_text())
              ["spec"]["template"]["spec"]["containers"][0]["image"] for folder in (first, second, other)}
    assert len(images) == 2 and all(re.fullmatch(r"tiny-digits-v1:[0-9a-f]{12}", image) for image in images)


def test_what_lies_beside_the_export_stays_behind(export, tmp_path):
    artefact = export()
    (artefact.folder / ".env").write_text("PASSWORD=1")
    folder = write_bundle(artefact, artefact.folder / "bundle")
    assert names(folder / "model") == {"artefact.json", "model.tflite", "MODEL_CARD.md"}


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_is_there_is_never_overwritten(export, tmp_path, there):
    output = tmp_path / "bundle"
    {"folder": output.mkdir, "file": output.touch, "link": lambda: output.symlink_to("nowhere")}[there]()
    with pytest.raises(UsageError, match="something already where the bundle is to be.*give another --output"):
        write_bundle(export(), output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "export"]


def test_an_export_that_is_not_whole_is_refused(export, tmp_path):
    artefact = export()
    (artefact.folder / "model.tflite").write_bytes(b"other")
    with pytest.raises(DataError, match="is not the file that was exported"):
        write_bundle(artefact, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_small_device_runs_tflite_only(export, tmp_path):
    with pytest.raises(UsageError, match="expected an export of kind tflite.*--format tflite.*received: 'onnx'"):
        write_bundle(export(kind="onnx"), tmp_path / "bundle", edge=True)


def test_nothing_is_left_behind_by_a_failure(export, tmp_path, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(HpcaiError, match="cannot write the bundle .*: No space left on device"):
        write_bundle(export(), tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_name_that_no_list_of_sums_can_hold(export, tmp_path):
    artefact = export()
    name = "line\nbreak"
    (artefact.folder / name).touch()
    artefact.document["files"][name] = {"sha256": digest(artefact.folder / name), "bytes": 0}
    with pytest.raises(DataError, match=r"expected printable names; received: 'line\\nbreak'"):
        write_bundle(artefact, tmp_path / "bundle")
