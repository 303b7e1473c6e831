"""What `hpcai doctor` prints and with which exit code it ends."""

import importlib.util
import json

import pytest
from typer.testing import CliRunner

from hpcai_cli.engine.environment import doctor, horovod_build
from hpcai_cli.engine.environment.finding import Finding
from hpcai_cli.main import app

HEALTHY = [Finding("TensorFlow", "ok", "2.21.0", required=True),
           Finding("Horovod", "missing", "not installed", "hpcai doctor --build-horovod"),
           Finding("cores", "ok", "2 for this process", metrics={"cores": 2})]
BROKEN = [*HEALTHY, Finding("h5py", "missing", "not installed", "pip install 'h5py<3.15'", required=True)]


def run(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture
def found(monkeypatch):
    """Let the examination, which takes half a minute and has its own tests, find what a test wants."""
    def find(findings):
        monkeypatch.setattr(doctor, "examine", lambda ranks: findings)
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


@pytest.mark.parametrize(("words", "message"), [
    (["--launcher", "mpirun"], "add --hosts a:1,b:1"), (["--interface", "lo"], "add --hosts a:1,b:1"),
    (["--hosts", "a:0"], "cannot read --hosts"), (["--hosts", "b"], "nobody to reduce with"),
    (["--hosts", "a:1,b:1", "--hostfile", "f"], "both name hosts"),
    (["--hosts", "a:1,b:1", "--launcher", "ssh"], "no such launcher")])
@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
def test_hosts_that_make_no_job_are_wrong_usage(found, words, message):
    found(HEALTHY)
    done = run(*words)
    assert done.exit_code == 2 and message in done.stderr and done.stdout == ""


def test_a_hostfile_that_is_not_there(found):
    found(HEALTHY)
    done = run("--hostfile", "none")
    assert done.exit_code == 3 and "cannot read the hostfile" in done.stderr


def test_one_of_several_ranks_tries_them(monkeypatch):
    from hpcai_cli.engine.environment import rank_trial

    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    failed = Finding("training step", "missing", "fails: another result", "hpcai doctor --build-horovod", required=True)
    monkeypatch.setattr(rank_trial, "findings", lambda: [failed])
    done = run("--json")
    assert json.loads(done.stdout)["findings"][0]["value"] == "fails: another result"
    # As rank 0 says it for all.
    assert done.exit_code == 4 and done.stderr.startswith("error: training step: fails")
