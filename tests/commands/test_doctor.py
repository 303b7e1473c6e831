"""What `hpcai doctor` prints and with which exit code it ends."""

import json

import pytest
from typer.testing import CliRunner

from hpcai_cli.engine.environment import doctor, horovod_build
from hpcai_cli.engine.environment.doctor import Finding
from hpcai_cli.main import app

HEALTHY = [Finding("TensorFlow", "ok", "2.21.0", required=True),
           Finding("Horovod", "missing", "not installed", "hpcai doctor --build-horovod"),
           Finding("cores", "ok", "2 for this process", metric=("cores", 2))]
BROKEN = [*HEALTHY, Finding("h5py", "missing", "not installed", "pip install 'h5py<3.15'", required=True)]


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def found(monkeypatch):
    """Let the examination, which takes half a minute and has its own tests, find what a test wants."""
    def find(findings):
        monkeypatch.setattr(doctor, "examine", lambda: findings)
    return find


def test_a_machine_without_horovod_is_healthy_and_told_how_to_get_it(found):
    found(HEALTHY)
    done = run()
    assert done.exit_code == 0
    assert "hpcai doctor --build-horovod" in done.stdout
    assert "2.21.0" in done.stdout


def test_json_is_one_document(found):
    found(HEALTHY)
    done = run("--json")
    document = json.loads(done.stdout)
    assert document["schema"] == "hpcai.doctor/1"
    assert document["command"] == "doctor"
    assert document["metrics"] == {"cores": 2}
    assert document["findings"][0] == {"name": "TensorFlow", "status": "ok", "value": "2.21.0", "mend": ""}


def test_something_required_is_missing_after_the_table_was_shown(found):
    found(BROKEN)
    done = run("--json")
    assert json.loads(done.stdout)["findings"][-1]["status"] == "missing"
    assert done.exit_code == 4
    assert done.stderr == "error: h5py: not installed; `pip install 'h5py<3.15'`\n"


@pytest.mark.parametrize("flag", ["--with-mpi", "--without-mpi", "--with-nccl"])
def test_how_to_build_without_building_is_wrong_usage(flag):
    done = run(flag)
    assert done.exit_code == 2
    assert "add --build-horovod" in done.stderr


@pytest.mark.parametrize(("flags", "with_mpi", "with_nccl"), [
    ([], None, False), (["--with-mpi"], True, False), (["--without-mpi"], False, False), (["--with-nccl"], None, True)])
def test_the_build_gets_what_was_asked_for(found, monkeypatch, flags, with_mpi, with_nccl):
    found(HEALTHY)
    asked = []
    monkeypatch.setattr(horovod_build, "build", lambda **how: asked.append(how))
    assert run("--build-horovod", *flags).exit_code == 0
    assert asked == [{"with_mpi": with_mpi, "with_nccl": with_nccl}]
