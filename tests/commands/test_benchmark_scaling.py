"""hpcai benchmark scaling as a user meets it: what is refused, real jobs of a tiny network, Ctrl-C."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from hpcai_cli.engine import machine
from hpcai_cli.engine.benchmarks.scaling import scaling, scaling_trainings

HPCAI = str(Path(sys.executable).parent / "hpcai")
MADE_UP = [(products, size) for products in (16, 32, 64) for size in (1 << 16, 1 << 20, 1 << 22, 1 << 23)]

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
needs_two_cores = pytest.mark.skipif(machine.cores() < 2, reason="one core alone")

TINY = '''"""A small dense network on made-up images."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="tiny", summary="for tests", input_shape=(64, 64, 3), num_classes=3, batch_size=8)


def sample():
    import numpy as np

    labels = np.arange(300) % 3
    images = (np.random.default_rng(0).random((300, 64, 64, 3)) * 200).astype(np.uint8)
    return {"train": (images[:200], labels[:200]), "test": (images[200:], labels[200:])}


def load(source, recipe):
    return sample()


def build_model(recipe):
    import keras

    return keras.Sequential([keras.Input(recipe.input_shape), keras.layers.Flatten(), keras.layers.Dense(3)])
'''


@pytest.fixture
def tiny(hpcai) -> list[str]:
    """A recipe in the working folder, its data, and the words that ask for it."""
    Path("tiny.py").write_text(TINY)
    assert hpcai("preprocess", "./tiny.py", "--source", "sample", "--output", "tiny.h5").exit_code == 0
    return ["benchmark", "scaling", "--recipe", "./tiny.py", "--data", "tiny.h5", "--seconds", "0.001"]


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--np", "two"], 2, "cannot read --np"), (["--np", "1,,2"], 2, "cannot read --np"),
    (["--np", ""], 2, "cannot read --np"), (["--np", "0"], 2, "cannot read --np"),
    (["--np", "1,999"], 2, "cores for 999 ranks"), (["--mode", "sideways"], 2, "weak, strong or both"),
    (["--np", "1,2", "--total-images", "7"], 2, "a multiple of 2"),
    (["--np", "1", "--total-images", "201"], 2, "at most 200"), (["--project", "1"], 2, "--project"),
    (["--recipe", "mnost"], 2, "did you mean `mnist`"), (["--data", "none.h5"], 3, "none.h5"),
    (["--recipe", "mnist"], 3, "does not fit recipe mnist")])
def test_what_cannot_be_is_said_before_anything_is_started(hpcai, tiny, words, code, said):
    done = hpcai(*tiny, *words, "--output", "result")
    assert done.exit_code == code and said in done.stderr, done.stderr
    assert not Path("result").exists()


def test_more_memory_than_there_is_is_said_before_the_start(hpcai, tiny, monkeypatch):
    monkeypatch.setattr(scaling, "RANK_BYTES", 10**15)
    done = hpcai(*tiny, "--np", "1")
    assert done.exit_code == 4 and "of memory" in done.stderr


def test_a_launcher_has_started_its_ranks_already(hpcai, tiny, monkeypatch):
    for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", "2" if name.endswith("SIZE") else "0")
    done = hpcai(*tiny, "--np", "1,2")
    assert done.exit_code == 2 and "mpirun has started 2 processes already" in done.stderr


@needs_horovod
@needs_two_cores
@pytest.mark.long
def test_one_and_two_ranks(hpcai, tiny, monkeypatch):
    monkeypatch.setattr(scaling, "ROUNDS", 1)
    monkeypatch.setattr(scaling_trainings, "measure", lambda *given: [])
    done = hpcai(*tiny, "--np", "1,2", "--project", "64", "--output", "result", "--json")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    figures = {figure["name"]: figure for figure in document["figures"]}
    for name in ("weak, 8 images a step and rank", "weak, 128 images a step and rank", "strong, 128 images a step"):
        rate, efficiency = figures[f"{name}: 2 ranks"], figures[f"{name}: 2 ranks, efficiency"]
        one = figures[f"{name}: 1 rank"]
        assert len(rate["rounds"]) == 8
        assert efficiency["rounds"] == pytest.approx(
            [both / 2 / alone for both, alone in zip(rate["rounds"], one["rounds"], strict=True)])
    assert figures["model: largest error on recipe steps left out"]["limit"] == 0.1
    rows = {table["title"]: table["rows"] for table in document["tables"]}
    slowest = rows["Scaling, strong, 128 images a step"][1]
    assert slowest[5].startswith("rank ") and "core " in slowest[5] and slowest[-1] == "own"
    projected = rows["Projection, not measured: weak, 8 images a step and rank"]
    assert [row[0] for row in projected] == [1, 2, 4, 8, 16, 32, 64]
    assert Path("result/scaling-projection-not-measured-strong-128-images-a-step.png").stat().st_size
    # 4 images, the weak and the strong ones, and the made-up steps, all with and without averaging.
    checked = [row for row in rows["The model on sizes that were left out of its fit"] if row[1] == 2]
    assert {(row[2], row[3]) for row in checked if row[0] == "made-up"} < set(MADE_UP)


@pytest.mark.long
def test_whole_trainings_are_compared(tiny, monkeypatch):
    monkeypatch.setattr(scaling_trainings, "ROUNDS", 1)
    monkeypatch.setattr(scaling_trainings, "SETTINGS", ({},))
    core = min(os.sched_getaffinity(0))
    figures = {figure.name: figure for figure in scaling_trainings.measure("./tiny.py", Path("tiny.h5"), 8, [[core]])}
    one, many, apart = (figures[f"8 images a step and process: {name}"].value for name in (
        "one process on one core", "1 processes on 1 cores", "1 unconnected processes"))
    assert figures["8 images a step and process: efficiency"].value == pytest.approx(many / one)
    assert apart * one > 0 and figures["8 images a step and process: efficiency"].limit is None


@needs_horovod
@needs_two_cores
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
@pytest.mark.long
def test_under_a_launcher_the_job_itself_is_measured(tiny):
    environment = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(["mpirun", "-np", "2", "--bind-to", "core", HPCAI, *tiny, "--mode", "weak", "--output",
                           "result", "--json"], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)["figures"]}
    share = figures["weak, 8 images a step and rank: 2 ranks, communication"]
    efficiency = figures["weak, 8 images a step and rank: 2 ranks, efficiency"]
    assert efficiency["rounds"] == pytest.approx([1 - each for each in share["rounds"]])
    assert "model: latency of averaging between two ranks" in figures


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_benchmark_leaves_nothing_running(tiny, number):
    process = subprocess.Popen([HPCAI, *tiny, "--np", "1", "--output", "result"], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    try:
        assert "steps of 1 rank" in process.stderr.readline()
        time.sleep(0.5)
        job = children(process.pid)
        os.kill(process.pid, number)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "interrupted\n"
    finally:
        process.kill()
        process.stderr.close()
    assert len(job) == 1 and not Path(f"/proc/{job[0]}").exists()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
