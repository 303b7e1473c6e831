"""Models that several ranks share, with real ranks: equal to whole ones, and whole again on disk."""

import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

HPCAI = str(Path(sys.executable).parent / "hpcai")
HOROVODRUN = str(Path(sys.executable).parent / "horovodrun")

needs_horovod = pytest.mark.skipif(find_spec("horovod") is None, reason="Horovod is not built: run make horovod")

WIDE = '''"""A convolution, a pair of dense layers and one alone, with all that treats weights or examples specially."""

from hpcai_cli.recipe import Recipe

recipe = Recipe(name="wide", summary="for tests", input_shape=(4, 4, 1), num_classes=3, epochs=3, batch_size=8,
                learning_rate=0.01, learning_rate_scaling="linear", validation_fraction=0.2, precision="float32",
                clip_norm=0.5, options={"dropout": 0.3, "normalized": False, "penalty": 1e-3})


def sample():
    import numpy as np

    generator = np.random.default_rng(0)
    labels = np.arange(123) % 3
    images = (generator.random((123, 4, 4, 1)) * 60 + labels[:, None, None, None] * 60).astype(np.uint8)
    return {"train": (images[:100], labels[:100]), "test": (images[100:], labels[100:])}


def load(source, recipe):
    return sample()


def augment(images, seed, recipe):
    import tensorflow as tf

    return tf.cast(images, tf.float32) + tf.random.stateless_uniform(tf.shape(images), seed, -5, 5)


def adapt(model, inputs, labels, recipe):
    model.get_layer("pair_first").bias.assign(model.get_layer("pair_first").bias + 0.01)


def build_model(recipe):
    import keras
    from keras import layers, regularizers

    share, penalty = recipe.options["dropout"], recipe.options["penalty"]
    norm = [layers.BatchNormalization()] if recipe.options["normalized"] else []
    # A bias before batch normalization has a gradient of nothing but rounding, which adam makes steps of.
    body = layers.Conv2D(4, 3, activation="relu", use_bias=not norm)
    return keras.Sequential([
        keras.Input(recipe.input_shape), layers.Rescaling(1 / 255), body, *norm, layers.Flatten(),
        layers.Dropout(share),
        layers.Dense(128, activation="relu", kernel_regularizer=regularizers.L2(penalty), name="pair_first"),
        layers.Dropout(share),
        layers.Dense(24, activation="tanh", bias_regularizer=regularizers.L1(penalty), name="pair_second"),
        layers.Dense(130, activation="gelu", use_bias=False, name="alone"), layers.LayerNormalization(),
        layers.Dense(3, dtype="float32", name="last")])
'''
SPLIT = ("--np", "2", "--tensor-parallel", "2")


@pytest.fixture
def folder(tiny_folder) -> Path:
    """A working folder with both recipes in it."""
    (tiny_folder / "wide.py").write_text(WIDE)
    return tiny_folder


def run(*command, timeout=240):
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def train(*words) -> dict:
    done = run(HPCAI, "train", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) | {"said": done.stderr}


def last_arrays(run_folder: str) -> dict[str, np.ndarray]:
    newest = sorted((Path(run_folder) / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "arrays.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_equal(one: str, other: str) -> None:
    """Two runs went the same way and ended in the same place, up to the rounding of sums in another order."""
    ours, theirs = last_arrays(one), last_arrays(other)
    assert {name: array.shape for name, array in ours.items()} == {name: array.shape for name, array in theirs.items()}
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
    ours, theirs = (np.genfromtxt(Path(name) / "history.csv", delimiter=",", names=True) for name in (one, other))
    for name in ("loss", "accuracy", "validation_loss", "validation_accuracy", "learning_rate"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-5, err_msg=name)


@needs_horovod
def test_two_ranks_that_share_a_model_equal_one_and_resume_as_one(folder, hpcai):
    """With dropout on both sides of the split and within, augmentation, clipping, penalties, and what adapt changes."""
    whole = train("./wide.py", "--output", "whole")
    split = train("./wide.py", "--output", "split", *SPLIT)
    assert ("tensor parallel: pair_first by columns, pair_second by rows, alone by columns and gathered; each of 2 "
            "processes holds 53.") in split["said"]
    assert_equal("split", "whole")
    assert json.loads(Path("split/manifest.json").read_text())["tensor_parallel"] == 2
    # The schedule and its learning rate count models, and rank 0 writes the whole model's file.
    assert (split["steps"], split["world_size"], split["parameters"]) == (whole["steps"], 2, whole["parameters"])
    assert split["metrics"]["loss"] == pytest.approx(whole["metrics"]["loss"], rel=1e-4)
    ours, theirs = (keras.saving.load_model(f"{name}/model.keras", compile=False) for name in ("split", "whole"))
    assert ours.get_config() == theirs.get_config()
    judged = hpcai("evaluate", "split", "--json")
    assert judged.exit_code == 0, judged.stderr
    metrics = json.loads(judged.stdout)["metrics"]
    assert metrics["accuracy"] == split["metrics"]["accuracy"] == whole["metrics"]["accuracy"]
    assert metrics["loss"] == pytest.approx(split["metrics"]["loss"], rel=1e-5)
    # From two ranks to one, and from one to two.
    shutil.copytree("whole", "back")
    for name in ("whole", "split"):
        assert hpcai("train", "--resume", name, "--epochs", "5").exit_code == 0
    assert_equal("split", "whole")
    train("--resume", "back", "--epochs", "5", *SPLIT)
    assert_equal("back", "whole")


@pytest.mark.long
@needs_horovod
def test_four_ranks_that_share_two_models_equal_two(folder):
    """Under horovodrun; with batch normalization over all ranks, mixup, accumulation and decay."""
    settings = ["./wide.py", "--set", "normalized=true", "--set", "sync_batch_norm=true", "--set", "mixup=0.3", "--set",
                "accumulation_steps=2", "--set", "optimizer=adamw", "--set", "weight_decay=0.1", "--batch-size", "4",
                "--set", "warmup_epochs=0.5"]
    plain = train(*settings, "--np", "2", "--output", "plain")
    done = run(HOROVODRUN, "-np", "4", "--gloo", "--disable-cache", HPCAI, "train", *settings, "--tensor-parallel", "2",
               "--output", "both", "--json", timeout=240)
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("both/result.json").read_text())["steps"] == plain["steps"]
    assert_equal("both", "plain")


@pytest.mark.long
@needs_horovod
def test_bfloat16_trains_and_ranks_stay_in_step(folder):
    result = train("./wide.py", "--output", "run", "--precision", "mixed_bfloat16", *SPLIT)
    assert result["metrics"]["accuracy"] > 0.8
    history = np.genfromtxt("run/history.csv", delimiter=",", names=True)
    assert history["loss"][-1] < 0.7 * history["loss"][0]


@needs_horovod
@pytest.mark.long
def test_a_signal_ends_in_a_checkpoint_and_resuming_gives_the_undisturbed_weights(folder):
    common = ["./wide.py", *SPLIT, "--epochs", "30"]
    events = folder / "stopped" / "events.jsonl"
    stopped = subprocess.Popen([HPCAI, "train", *common, "--output", "stopped"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not (events.exists() and events.read_text().count('"epoch"') > 4):
        assert stopped.poll() is None and time.monotonic() < end, stopped.communicate()
        time.sleep(0.02)
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate(timeout=120)
    assert stopped.returncode == 75, errors
    train("--resume", "stopped", *SPLIT)
    train(*common, "--output", "whole")
    one, other = last_arrays("stopped"), last_arrays("whole")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.long
@needs_horovod
def test_a_loss_that_is_no_number_and_a_model_without_wide_layers_end_in_one_sentence(folder):
    done = run(HPCAI, "train", "./wide.py", "--output", "nan", *SPLIT, "--set", "optimizer=sgd", "--learning-rate",
               "1e38", "--set", "clip_norm=0")
    assert (done.returncode, done.stderr.count("error:")) == (6, 1), done.stderr
    done = run(HPCAI, "train", "./tiny.py", "--output", "narrow", *SPLIT)
    assert (done.returncode, done.stderr.count("error:")) == (2, 1), done.stderr
    assert ("--tensor-parallel 2 finds no layer to split; expected a dense layer of at least 128 units, a multiple of "
            "2, in a Sequential or a functional model; leave it out; received: 2") in done.stderr


@needs_horovod
@pytest.mark.parametrize(("words", "said"), [
    (("--np", "3"), "splits each model over 2 processes; expected a multiple of 2 processes"), ((), "received: 1"),
    (("--np", "2", "--set", "optimizer=lamb"), "lamb steps by the norm of each whole layer"),
    (("--np", "2", "--precision", "mixed_float16"), "mixed_float16 skips a step by the whole gradient"),
    (("--np", "2", "--set", "gradient_reduction=adasum"), "Adasum combines the gradients of all processes"),
    (("--np", "2", "--autotune"), "--autotune tunes what all processes do together"),
    (("--np", "2", "--profile", "1-2"), "--profile does not know what passes between the parts"),
    (("--tensor-parallel", "0"), "Invalid value for '--tensor-parallel'")])
def test_what_cannot_be_is_refused_before_the_start(folder, hpcai, words, said):
    done = hpcai("train", "./wide.py", "--output", "refused", "--tensor-parallel", "2", *words)
    assert done.exit_code == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert not Path("refused").exists()
    done = hpcai("train", "./wide.py", "--np", "2", "--tensor-parallel", "2", "--prove")
    assert done.exit_code == 2 and "no --tensor-parallel with it" in done.stderr


@pytest.mark.long
@needs_horovod
def test_parts_that_differ_are_found_and_each_rank_holds_its_share_of_the_bytes(folder):
    """Four ranks share two models: ranks 1 and 3 hold the same part."""
    Path("parts.py").write_text("""
import keras
import numpy as np
from hpcai_cli.engine import distributed, rank_groups
from hpcai_cli.engine.replicas import Replicas
from hpcai_cli.errors import DivergedError

ranks = distributed.start(rank_groups.groups(2))
replicas = Replicas(ranks, 2)
assert (replicas.rank, replicas.size) == (ranks.rank // 2, 2)
model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(512, name="first"), keras.layers.Dense(256)])
optimizer = keras.optimizers.Adam()

def held(optimizer):
    return sum(value.numpy().nbytes for value in (*model.variables, *optimizer.variables) if len(value.shape))

whole = keras.optimizers.Adam()
whole.build(model.trainable_variables)
assert held(whole) == 3_154_944
replicas.split(model, (256,))
optimizer.build(model.trainable_variables)
replicas.attach(model, optimizer)
replicas.broadcast(model, optimizer)
variables = [*model.variables, *optimizer.variables]
# All but the second bias and its two moments is halved.
assert held(optimizer) == 1_579_008
replicas.prove(variables, when="before")
first = model.get_layer("first").kernel
assert first.shape == (256, 256)
first.assign(first + 1e-3 * (ranks.rank == 3))
try:
    replicas.prove(variables, when="now")
except DivergedError as error:
    assert "ranks [3]" in str(error), error
else:
    raise SystemExit("nothing was found")
values = replicas.arrays(model, optimizer)
assert bool(values) == (ranks.rank == 0)
if values:
    assert values["model-0"].shape == (256, 512)
    # The same slots are shared, and restored in parts.
    values["model-0"][:] = np.arange(512)
    replicas.restore(values, model, optimizer)
replicas.broadcast(model, optimizer)
assert first[0, 0] == ranks.rank % 2 * 256
replicas.prove(variables, when="after the broadcast")
rows = replicas.gather(np.full((1, 1), ranks.rank))
assert rows.tolist() == [[ranks.rank % 2], [ranks.rank % 2 + 2]]
ranks.stop()
""")
    done = run(HOROVODRUN, "-np", "4", "--gloo", "--disable-cache", sys.executable, "parts.py")
    assert done.returncode == 0, done.stdout + done.stderr
