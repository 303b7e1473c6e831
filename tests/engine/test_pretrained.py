"""Weights of somebody else: from a file they arrive, and whatever is wrong with file or network is one sentence."""

import functools
import json
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from hpcai_cli import catalog
from hpcai_cli.engine import pretrained
from hpcai_cli.engine.raw import downloads
from hpcai_cli.errors import DataError, MissingError

NOBODY = "http://127.0.0.1:9/"
"""A port where nothing listens."""
KERNEL = "layers/dense/vars/0"
"""Where Keras keeps the first layer's kernel in a file of its own format."""


def network() -> keras.Model:
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, name="one"), layers.BatchNormalization(name="two"),
                             layers.Dense(4, name="three")], name="small")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the weights of a network in both of Keras's HDF5 formats, and of a MobileNetV2."""
    folder = tmp_path_factory.mktemp("weights")
    keras.utils.set_random_seed(99)
    network().save_weights(folder / "new.weights.h5")
    body = mobile_net()
    body.set_weights([weight + 0.01 for weight in body.get_weights()])
    body.save_weights(folder / "mobile.weights.h5")
    return folder


def mobile_net() -> keras.Model:
    return keras.applications.MobileNetV2(input_shape=(32, 32, 3), include_top=False, weights=None, alpha=0.35,
                                          pooling="avg")


def said(kind: type, call, *words: str) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# ---- Finding the file ----------------------------------------------------------------------------------------------

def test_none_is_no_file_and_a_path_is_itself(tmp_path, monkeypatch):
    assert pretrained.weights_file("none", NOBODY) is None
    (tmp_path / "mine.h5").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pretrained.weights_file("~/mine.h5", NOBODY) == tmp_path / "mine.h5"


@pytest.mark.parametrize("wanted", ["none.h5", "", "."])
def test_a_file_that_is_not_there(wanted):
    said(DataError, lambda: pretrained.weights_file(wanted, NOBODY), "does not exist", "--set weights=FILE",
         f"received: {wanted!r}")


def test_the_address_is_asked_once_and_the_cache_remembers(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    (tmp_path / "w.h5").write_bytes(b"weights")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        try:
            file = pretrained.weights_file("imagenet", f"http://127.0.0.1:{server.server_port}/w.h5")
        finally:
            server.shutdown()
    assert file.read_bytes() == b"weights"
    assert pretrained.weights_file("imagenet", f"{NOBODY}w.h5") == file


def test_without_a_network_it_is_said_what_helps(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.01)
    text = said(MissingError, lambda: pretrained.weights_file("imagenet", f"{NOBODY}w.h5"),
                "cannot fetch ImageNet's weights", "refused", "--set weights=FILE", "--set weights=none",
                f"{NOBODY}w.h5")
    # Those are the words of another command.
    assert "--source" not in text


@pytest.mark.parametrize(("width", "name"), [("1.0", "1.0"), ("0.75", "0.75"), ("0.35", "0.35"), ("1.4", "1.4")])
def test_the_recipe_asks_for_the_file_that_keras_would(monkeypatch, width, name):
    entry = catalog.find("dogs-vs-cats-transfer")
    asked = []
    monkeypatch.setattr(pretrained, "weights_file", lambda wanted, address: asked.append(address))
    entry.function("adapt")(None, None, None, entry.recipe.override({"width": width}))
    assert asked == ["https://storage.googleapis.com/tensorflow/keras-applications/mobilenet_v2/"
                     f"mobilenet_v2_weights_tf_dim_ordering_tf_kernels_{name}_224_no_top.h5"]


# ---- Reading it ----------------------------------------------------------------------------------------------------

def test_the_weights_arrive(files):
    keras.utils.set_random_seed(1)
    model = network()
    keras.utils.set_random_seed(99)
    expected = network()
    assert not np.array_equal(model.layers[0].kernel, expected.layers[0].kernel)
    pretrained.load_weights(model, files / "new.weights.h5")
    for got, wanted in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_the_weights_in_the_layout_of_keras_applications_arrive(tmp_path):
    """Their files are of Keras 2: a group for each layer, whose attributes name layers and weights."""
    keras.utils.set_random_seed(99)
    expected = network()
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in expected.layers]
        file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.2.0"
        for layer in expected.layers:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{weight.name}:0" for weight in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, weight in zip(names, layer.weights, strict=True):
                group[name] = weight.numpy()
    keras.utils.set_random_seed(1)
    model = network()
    pretrained.load_weights(model, tmp_path / "old.h5")
    for got, wanted in zip(model.get_weights(), expected.get_weights(), strict=True):
        np.testing.assert_array_equal(got, wanted)


def linked(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        file[KERNEL] = h5py.ExternalLink("/etc/hostname", "/x")


def external(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        file.create_dataset(KERNEL, (6, 5), "f4", external=[("/etc/hostname", 0, 120)])


def other_shape(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        file[KERNEL] = np.zeros((7, 5), np.float32)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def text(path: Path) -> None:
    path.write_text("<html>not here any more</html>")


def nothing_in_it(path: Path) -> None:
    h5py.File(path, "w").close()


def lies(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = 7


@pytest.mark.parametrize("change", [linked, external, other_shape, truncated, text, nothing_in_it, lies],
                         ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", ["new.weights.h5", "old.h5"])
def test_what_can_be_wrong_with_a_file(files, tmp_path, change, name):
    path = tmp_path / name
    shutil.copy(files / "new.weights.h5", path)
    change(path)
    said(DataError, lambda: pretrained.load_weights(network(), path), f"{name} holds no weights for small: ",
         "expected a weights file (.h5)")


# ---- In a training -------------------------------------------------------------------------------------------------

def test_a_training_begins_with_them(hpcai, files, tmp_path):
    """With a frozen body and one short epoch, the network in model.keras still is the one of the file."""
    source = tmp_path / "pets"
    for number in range(24):
        folder = source / ("Cat", "Dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (160, 150, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    assert hpcai("preprocess", "dogs-vs-cats", "--source", source, "--output", "pets.h5").exit_code == 0
    done = hpcai("train", "dogs-vs-cats-transfer", "--data", "pets.h5", "--output", "run", "--epochs", 1,
                 "--set", "width=0.35", "--set", f"weights={files / 'mobile.weights.h5'}", "--set", "frozen=true",
                 "--precision", "float32")
    assert done.exit_code == 0, done.stderr
    expected = mobile_net()
    expected.load_weights(files / "mobile.weights.h5")
    model = keras.saving.load_model("run/model.keras", compile=False)
    body = next(layer for layer in model.layers if layer.name.startswith("mobilenet"))
    found, wanted = ([weight.numpy() for layer in network.layers for weight in layer.weights if "kernel" in weight.path]
                     for network in (body, expected))
    assert len(wanted) > 30
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("weights", "code", "words"), [
    ("none.h5", 3, "the file with the pretrained weights does not exist"),
    ("foreign.h5", 3, "holds no weights for mobilenet"),
    ("imagenet", 4, "cannot fetch ImageNet's weights")])
def test_a_training_without_them_says_why(hpcai, files, monkeypatch, weights, code, words):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(catalog.find("dogs-vs-cats-transfer").module, "ADDRESS", NOBODY)
    shutil.copy(files / "new.weights.h5", "foreign.h5")
    done = hpcai("train", "dogs-vs-cats-transfer", "--output", "run", "--set", "width=0.35", "--set",
                 f"weights={weights}")
    assert done.exit_code == code, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert json.loads(Path("run/failure.json").read_text())["exit_code"] == code
    assert not Path("run/model.keras").exists()
