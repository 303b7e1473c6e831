"""hpcai benchmark horovod: both sides train, by each launcher, and what cannot be is refused."""

import json
import shutil
from importlib.util import find_spec

import pytest


@pytest.mark.long
@pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
@pytest.mark.parametrize("launcher", [
    "horovodrun",
    pytest.param("mpirun", marks=pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed"))])
def test_both_sides_train(hpcai, monkeypatch, launcher):
    monkeypatch.setattr("hpcai_cli.engine.benchmarks.horovod_script.ROUNDS", 1)
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "digits.h5").exit_code == 0
    done = hpcai("benchmark", "horovod", "--data", "digits.h5", "--launcher", launcher, "--json")
    assert done.exit_code == 0, done.stderr
    figures = {figure["name"].partition(": ")[2]: figure for figure in json.loads(done.stdout)["figures"]}
    rates = figures["hpcai train"]["value"], figures["Horovod script"]["value"]
    assert min(rates) > 10 and figures["against the script"]["value"] == pytest.approx(rates[0] / rates[1])
    starts = [figures[f"{side}, start to first step"]["value"] for side in ("hpcai train", "Horovod script")]
    assert min(starts) > 0.5 and figures["first step later than the script's"]["value"] == pytest.approx(
        starts[0] - starts[1])


def test_a_launcher_that_does_not_exist(hpcai):
    done = hpcai("benchmark", "horovod", "--launcher", "none")
    assert done.exit_code == 2 and "no such launcher" in done.stderr
