"""What training in many ranks needs beside the mean of their gradients, and the proof that they are one; real ranks."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
NORMALIZED = 'keras.layers.Dense(16), keras.layers.BatchNormalization(), keras.layers.Activation("relu"), '
OWN_MEAN = '''

import keras


class OwnMean(keras.Layer):
    """Takes the mean over a batch away, which is each rank's own."""

    def call(self, inputs):
        return inputs - keras.ops.mean(inputs, axis=0)
'''

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="mpirun is not installed")
EITHER = pytest.mark.parametrize("launcher", [pytest.param("horovodrun", marks=pytest.mark.long),
                                              pytest.param("mpirun", marks=needs_mpirun)])
"""Where the launcher should make no difference: one of them is enough for every day."""


@pytest.fixture
def with_layers(tiny_folder, tiny_recipe):
    """Return a function that puts other layers in the place of the recipe's hidden one."""
    def write(layers, more=""):
        text = tiny_recipe.replace('keras.layers.Dense(16, activation="relu"), ', layers)
        assert text != tiny_recipe
        (tiny_folder / "tiny.py").write_text(text + more)
    return write


def train(*words):
    return subprocess.run([HPCAI, "train", "./tiny.py", *map(str, words)], capture_output=True, text=True, timeout=120)


def trained(name, *words):
    """Train, and return the last weights."""
    done = train("--output", name, *words)
    assert done.returncode == 0, done.stderr
    newest = sorted(Path(name, "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as arrays:
        return {key: arrays[key] for key in arrays.files if key.startswith("model") and arrays[key].dtype == np.float32}


def distance(one, other):
    """Return the distance of two models, of the length of the first."""
    apart, length = (sum(np.square(each).sum() for each in found) for found in (
        [one[key] - other[key] for key in one], one.values()))
    return float(np.sqrt(apart / length))


# ---- The proof -----------------------------------------------------------------------------------------------------

@needs_horovod
@EITHER
def test_two_ranks_equal_one_process(with_layers, tiny_folder, launcher):
    with_layers(NORMALIZED + "keras.layers.GaussianNoise(0.1), ")
    done = train("--np", 2, "--launcher", launcher, "--prove", "--json", "--set", "dropout=0.5", "--set", "mixup=0.2",
                 "--set", "accumulation_steps=2", "--set", "clip_norm=0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"]["largest_difference"] < 1e-10
    assert found["steps"] == len(set(found["losses"])) == 5
    assert found["losses"] == pytest.approx(found["losses_of_one"], rel=1e-6)
    assert found["changed"][:4] == ["float64", "no dropout", "no mixup", "no accumulation"]
    assert "batch normalization" in found["changed"][4]
    assert not (tiny_folder / "runs").exists()


@needs_horovod
def test_a_layer_that_sees_its_own_batch_alone_is_found_out(with_layers):
    with_layers("keras.layers.Dense(16), OwnMean(), ", OWN_MEAN)
    done = train("--np", 2, "--prove")
    assert done.returncode == 6, done.stderr
    assert "2 processes with batches of 8 do not train as one with batches of 16" in done.stderr
    assert done.stderr.count("error:") == 1


@needs_horovod
def test_randomness_that_cannot_be_left_out(with_layers):
    with_layers("keras.layers.Reshape((4, 4, 1)), keras.layers.RandomFlip(), keras.layers.Flatten(), ")
    done = train("--np", 2, "--prove")
    assert done.returncode == 2 and "draws random numbers" in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.long
@needs_horovod
def test_adasum_has_nothing_to_prove(tiny_folder):
    done = train("--np", 2, "--prove", "--set", "gradient_reduction=adasum")
    assert done.returncode == 2 and "Adasum does not average gradients" in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1


@pytest.mark.parametrize(("words", "message"), [
    ([], "--prove compares several processes with one"), (["--output", "run"], "no --output with it"),
    (["--energy"], "no --energy with it")])
def test_what_cannot_be_proven(hpcai, words, message):
    done = hpcai("train", "mnist", "--prove", *words)
    assert done.exit_code == 2 and message in done.stderr


# ---- Gradients and statistics --------------------------------------------------------------------------------------

@pytest.mark.long
@needs_horovod
def test_synchronized_batch_normalization_is_that_of_one_process(with_layers):
    with_layers(NORMALIZED)
    # 80 examples are 5 whole steps of 16. With sgd, since Adam makes much of gradients that are rounding alone.
    common = ["--set", "optimizer=sgd", "--epochs", 3]
    alone = trained("alone", *common, "--batch-size", 16)
    own = trained("own", *common, "--np", 2)
    shared = trained("shared", *common, "--np", 2, "--set", "sync_batch_norm=true")
    assert distance(alone, shared) < 1e-5 < 1e-3 < distance(alone, own)
    # Anybody can load it: the layer that is saved is Keras' own.
    done = subprocess.run([HPCAI, "evaluate", "shared", "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@needs_horovod
@EITHER
def test_gradients_that_travel_as_float16(tiny_folder, launcher):
    common = ["--set", "optimizer=sgd", "--np", 2, "--launcher", launcher]
    whole, half = trained("whole", *common), trained("half", *common, "--set", "gradient_compression=float16")
    assert 1e-6 < distance(whole, half) < 1e-3


@pytest.mark.long
@needs_horovod
@needs_mpirun
def test_adasum(tiny_folder):
    (tiny_folder / "adasum.py").write_text("""
import numpy as np
import tensorflow as tf
from hpcai_cli.engine.distributed import start

ranks = start()
both = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
combined, means, sums = tf.function(lambda own: ranks.reduce([own], [own], own[:1], adasum=True))(both[ranks.rank])
a, b = both
product = a @ b
# The formula of arXiv 2006.02924.
expected = (1 - product / (2 * a @ a)) * a + (1 - product / (2 * b @ b)) * b
np.testing.assert_allclose(combined[0], expected, rtol=1e-5)
np.testing.assert_allclose(means[0], (a + b) / 2, rtol=1e-5)
np.testing.assert_allclose(sums, (a + b)[:1], rtol=1e-5)
ranks.stop()
""")
    done = subprocess.run(["mpirun", "-np", "2", "--oversubscribe", sys.executable, "adasum.py"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    common = ["--set", "optimizer=sgd", "--np", 2, "--launcher", "mpirun"]
    average, adasum = trained("average", *common), trained("adasum", *common, "--set", "gradient_reduction=adasum")
    assert distance(average, adasum) > 1e-3


@pytest.mark.long
@needs_horovod
@pytest.mark.parametrize(("words", "exit_code", "message"), [
    (["--np", 2, "--launcher", "horovodrun"], 4, "Adasum needs MPI"),
    pytest.param(["--np", 3, "--launcher", "mpirun"], 2, "a power of two of processes", marks=needs_mpirun)])
def test_adasum_where_it_cannot_be(tiny_folder, words, exit_code, message):
    done = train(*words, "--set", "gradient_reduction=adasum")
    assert done.returncode == exit_code and message in done.stderr and done.stderr.count("error:") == 1, done.stderr


# ---- What the ranks tell -------------------------------------------------------------------------------------------

@needs_horovod
@EITHER
def test_a_rank_that_lags_is_named(tiny_folder, launcher):
    with (tiny_folder / "tiny.py").open("a") as stream:
        stream.write("""

def augment(inputs, seed, recipe):
    import time

    import tensorflow as tf

    from hpcai_cli import launch

    def slow(images):
        time.sleep(0.02 * launch.place().rank)
        return images

    return tf.ensure_shape(tf.py_function(slow, [inputs], inputs.dtype), inputs.shape)
""")
    done = train("--np", 2, "--launcher", launcher, "--output", "run")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    times = [event["own_step_ms"] for event in events if event["event"] == "ranks"]
    assert len(times) == 4 and all(second > first + 15 for first, second in times), times
    named = [line for line in done.stderr.splitlines() if " lags: " in line]
    assert len(named) == 1 and named[0].startswith("rank 1 on "), done.stderr


@pytest.mark.long
@needs_horovod
@EITHER
def test_fusion_settings_reach_the_ranks(tiny_folder, launcher):
    done = train("--np", 2, "--launcher", launcher, "--fusion-mb", 2, "--cycle-ms", 0.25, "--output", "run")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("run/manifest.json").read_text())["horovod"] == {
        "fusion_mb": 2.0, "cycle_ms": 0.25, "autotune": False}


@pytest.mark.long
@needs_horovod
@EITHER
def test_autotune_tells_the_best_that_it_tried(tiny_folder, monkeypatch, launcher):
    monkeypatch.setenv("HOROVOD_AUTOTUNE_STEPS_PER_SAMPLE", "2")
    done = train("--np", 2, "--launcher", launcher, "--autotune", "--epochs", 50, "--output", "run", "--json")
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["autotune"]
    log = np.genfromtxt("run/autotune.csv", delimiter=",", names=True)
    assert best["tried"] == log.size >= 4 and best["score"] == log["score"].max()
    chosen = log[log["score"].argmax()]
    assert (best["fusion_mb"], best["cycle_ms"]) == (chosen["tensor_fusion_threshold"], chosen["cycle_time_ms"])
    # Not the one that we set where nothing is to be tuned.
    assert len(set(log["cycle_time_ms"])) > 1


@pytest.mark.parametrize(("words", "message"), [
    (["--autotune"], "a single process sends no gradients"),
    (["--fusion-mb", 1], "a single process sends no gradients"),
    (["--np", 2, "--autotune", "--cycle-ms", 1], "one or the other")])
def test_fusion_settings_that_contradict(hpcai, words, message):
    done = hpcai("train", "mnist", *words)
    assert done.exit_code == 2 and message in done.stderr
