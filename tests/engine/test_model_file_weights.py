"""The weights in a model file from a stranger: they lead nowhere else, and are no larger than the file."""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine import model_file
from hpcai_cli.errors import DataError


@pytest.fixture
def path(tmp_path):
    keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(6), layers.Dense(3)]).save(
        tmp_path / "model.keras")
    return tmp_path / "model.keras"


def replace_weights(path, change) -> None:
    """Write the archive again with `change` of its weights."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["model.weights.h5"] = change(members["model.weights.h5"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def rewrite_weights(path, change) -> None:
    def apply(content: bytes) -> bytes:
        stream = io.BytesIO(content)
        with h5py.File(stream, "a") as file:
            change(file)
        return stream.getvalue()

    replace_weights(path, apply)


def refused(path, words: str, *, trust: bool = False) -> None:
    with pytest.raises(DataError, match=words) as caught:
        model_file.load(path, trust=trust)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["external", "soft", "loop", "external storage", "virtual", "absurd", "text", "type",
                                  "many paths"])
def test_weights_that_point_elsewhere_or_say_too_much(path, tmp_path, kind):
    def change(file: h5py.File) -> None:
        name = "layers/dense/vars/0"
        shape = file[name].shape
        if kind == "loop":
            file["layers/again"] = file["layers"]
            return
        if kind == "many paths":
            for level in range(60):
                group = file.create_group(f"level{level}")
                if level:
                    group["one"] = group["two"] = file[f"level{level - 1}"]
            return
        del file[name]
        if kind == "external":
            file[name] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/secret")
        elif kind == "soft":
            file[name] = h5py.SoftLink("/layers/dense/vars/1")
        elif kind == "external storage":
            file.create_dataset(name, shape, "f4", external=[(str(tmp_path / "secret"), 0, h5py.h5f.UNLIMITED)])
        elif kind == "virtual":
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "secret", shape)
            file.create_virtual_dataset(name, layout)
        elif kind == "absurd":
            file.create_dataset(name, (10**6, 10**4), "f4", chunks=(100, 100))
        elif kind == "text":
            file.create_dataset(name, shape, h5py.string_dtype())
        else:
            file[name] = np.dtype("f4")

    rewrite_weights(path, change)
    refused(path, "its weights (have|keep|say)", trust=kind == "soft")


def test_weights_that_are_no_hdf5_or_of_another_model(path):
    for content in (b"hello", b""):
        replace_weights(path, lambda old, content=content: content)
        refused(path, "no model file that can be trusted")
    other = path.parent / "other.keras"
    keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dense(7)]).save(other)
    with zipfile.ZipFile(other) as archive:
        weights = archive.read("model.weights.h5")
    replace_weights(path, lambda old: weights)
    refused(path, "no model that Keras can load")
