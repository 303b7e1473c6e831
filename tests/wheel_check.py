"""The wheel, built and installed in an empty environment outside the repository, and run there: `make wheel`.

A sub-package that is missing from setup.cfg's list works in the editable install and breaks here.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    # By way of a source distribution, so that nothing stale in build/ gets in.
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def hpcai(wheel, tmp_path_factory):
    """The installed program, and an empty folder to run it in."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(sys.executable, "-m", "venv", str(folder / "env"), cwd=folder)
    run(str(folder / "env/bin/pip"), "install", "-q", str(wheel), cwd=folder)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment["HPCAI_CACHE"] = str(folder / "cache")
    return lambda *words: run(str(folder / "env/bin/hpcai"), *words, cwd=folder, env=environment)


def test_the_wheel_holds_every_package_and_nothing_else(wheel):
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"hpcai_cli"}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    for source, place in (("hpcai_cli", "hpcai_cli"), ("commands", "hpcai_cli/commands"),
                          ("recipes", "hpcai_cli/recipes")):
        for path in (ROOT / source).rglob("*.py"):
            assert f"{place}/{path.relative_to(ROOT / source)}" in inside
    everything = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("serving", "deployment/templates"):
        for path in (ROOT / "hpcai_cli/engine" / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to(ROOT)) in everything


@pytest.mark.timeout(900)
def test_the_installed_program_goes_from_the_sample_to_predictions(hpcai):
    assert "mnist-mlp" in hpcai("recipes", "list")
    assert hpcai("--help")
    report = json.loads(hpcai("preprocess", "mnist", "--source", "sample", "--output", "sample.h5", "--json"))
    assert report["metrics"]["test_examples"] == 359
    trained = json.loads(hpcai("train", "mnist", "--data", "sample.h5", "--epochs", "8", "--output", "run", "--json"))
    assert trained["metrics"]["accuracy"] > 0.9
    judged = json.loads(hpcai("evaluate", "run", "--require", "accuracy>=0.9", "--json"))
    assert judged["metrics"]["accuracy"] == pytest.approx(trained["metrics"]["accuracy"])
    answer = json.loads(hpcai("predict", "run", str(ROOT / "tests/digit.png"), "--json"))
    assert answer["label"] == "7"


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
