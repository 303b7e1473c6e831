"""Model files from strangers: nothing in them runs, no size is believed; a real one loads and predicts the same."""

import json
import os
import zipfile

import keras
import numpy as np
import pytest
from keras import layers

from hpcai_cli.engine import model_file
from hpcai_cli.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def original():
    keras.utils.set_random_seed(3)
    return keras.Sequential([
        keras.Input((8, 8, 1)), layers.Rescaling(1 / 255), layers.Conv2D(4, 3, use_bias=False, kernel_regularizer="l2"),
        layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D(), layers.Flatten(), layers.Dropout(0.5),
        layers.Dense(6, activation="relu", kernel_constraint=keras.constraints.MaxNorm(3)), layers.Dense(3)])


@pytest.fixture
def path(tmp_path, original):
    original.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def repack(path, changes: dict | None = None, *, add=(), without=(), compression=zipfile.ZIP_STORED):
    """Write the archive again, with some members changed: bytes, or a function of the bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name not in without}
    for name, change in (changes or {}).items():
        members[name] = change(members[name]) if callable(change) else change
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in [*members.items(), *add]:
            archive.writestr(name, content)


def reconfigure(path, change) -> None:
    """Change the configuration: `change` gets the list of the layers' configurations."""
    def apply(content: bytes) -> bytes:
        config = json.loads(content)
        change(config["config"]["layers"])
        return json.dumps(config).encode()

    repack(path, {"config.json": apply})


def refused(path, words: str, *, trust: bool = False) -> None:
    with pytest.raises(DataError, match=words) as caught:
        model_file.load(path, trust=trust)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_saved_model_loads_and_predicts_the_same(path, original):
    found = model_file.load(path)
    np.testing.assert_array_equal(found(IMAGES, training=False), original(IMAGES, training=False))


def test_functional_models_and_other_precisions_load_too(tmp_path):
    image = keras.Input((8, 8, 1))
    wide = layers.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16", kernel_initializer="he_normal")(image)
    deep = layers.Add()([wide, layers.SeparableConv2D(4, 3, padding="same")(image)])
    model = keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.Activation("gelu")(deep))))
    model.save(tmp_path / "model.keras")
    found = model_file.load(tmp_path / "model.keras")
    np.testing.assert_array_equal(found(IMAGES), model(IMAGES))


def test_no_model_file_at_all(tmp_path, path):
    refused(tmp_path / "missing.keras", "the model file does not exist.*hpcai train --resume")
    (tmp_path / "text.keras").write_text("hello")
    refused(tmp_path / "text.keras", "no model file that can be trusted: File is not a zip file")
    (tmp_path / "empty.keras").touch()
    refused(tmp_path / "empty.keras", "not a zip file")
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[:int(len(content) * part)])
        refused(path, "no model file that can be trusted")


def test_damage_anywhere_is_bad_data_or_no_harm(path, original):
    content = path.read_bytes()
    refusals = 0
    for place in range(0, len(content), 211):
        damaged = bytearray(content)
        damaged[place] ^= 255
        path.write_bytes(damaged)
        try:
            model_file.check(path)
        except DataError:
            refusals += 1
    assert refusals > 50


def test_extra_missing_and_double_members(path):
    original = path.read_bytes()
    for changes in ({"add": [("assets/run.sh", "rm -r /")]}, {"add": [("../outside", "x")]},
                    {"without": ["metadata.json"]}, {"without": ["model.weights.h5"]}):
        path.write_bytes(original)
        repack(path, **changes)
        refused(path, "it holds ")
    path.write_bytes(original)
    with pytest.warns(UserWarning, match="Duplicate name"):
        repack(path, add=[("config.json", "{}")])
    refused(path, "it holds ")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_packed_members_are_refused(path, compression):
    repack(path, {"model.weights.h5": bytes(50_000_000)}, compression=compression)
    assert path.stat().st_size < 200_000
    refused(path, "its parts are packed, which Keras never does")


@pytest.mark.parametrize("field", ["both", "size"])
def test_absurd_declared_sizes_are_refused(path, field):
    """The archive's directory says that the weights have 3 GB."""
    content = bytearray(path.read_bytes())
    start = content.rindex(b"PK\x01\x02")
    assert content[start + 46:start + 62] == b"model.weights.h5"
    for place in (20, 24) if field == "both" else (24,):
        content[start + place:start + place + 4] = (3_000_000_000).to_bytes(4, "little")
    path.write_bytes(content)
    refused(path, "its parts are larger than the file, or than any real model's")


def test_a_configuration_that_is_none(path):
    for content in (b"", b"hello", b"\xff\xfe", b"[]", b"null", b"{}", b'{"class_name": []}', b'{"class_name": null}',
                    b'{"config": 1}'):
        repack(path, {"config.json": content})
        refused(path, "model")
    repack(path, {"config.json": b" " * (model_file.LARGEST_CONFIG + 1)})
    refused(path, "than any real model's")


@pytest.mark.parametrize("text", ['[' * 100_000, '{"a":' * 100_000, '[' * 900 + ']' * 900])
def test_deep_nesting(path, text):
    repack(path, {"config.json": text.encode()})
    refused(path, "nested too deeply|recursion|Expecting value")


HARMLESS = {"module": "keras.layers", "class_name": "ReLU", "config": {"name": "x"}, "registered_name": None}
HOSTILE = {
    "os.system": {"module": "os", "class_name": "system", "config": "touch {trap}"},
    "posix.system": {"module": "posix", "class_name": "function", "config": "system"},
    "a downloader": {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "file:///etc/passwd"}},
    "a function of Keras": {"module": "keras.src.utils.file_utils", "class_name": "get_file", "config": {}},
    "builtins": {"module": "builtins", "class_name": "exec", "config": "open('{trap}', 'w')"},
    "a function": {"module": "builtins", "class_name": "function", "config": "exec", "registered_name": "function"},
    "a lambda": {"class_name": "__lambda__", "config": {"value": "4wEAAA==", "defaults": None, "closure": None}},
    "a Lambda layer": {"module": "keras.layers", "class_name": "Lambda", "config": {"function": "os.getcwd"}},
    "a TorchModuleWrapper": {"module": "keras.layers", "class_name": "TorchModuleWrapper", "config": {}},
    "a registered name": HARMLESS | {"registered_name": "Custom>Evil"},
    "no module": {"class_name": "ReLU", "config": {}},
    "another case": HARMLESS | {"class_name": "relu"},
    "a private path": HARMLESS | {"module": "keras.src.layers.activations.relu"},
    "a list as a class": HARMLESS | {"class_name": ["ReLU"]},
    "a number as a module": HARMLESS | {"module": 7},
}


@pytest.mark.parametrize("entry", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["a layer", "an argument", "the build configuration"])
def test_classes_that_are_not_on_the_list(path, tmp_path, entry, place):
    trap = tmp_path / "trap"
    entry = json.loads(json.dumps(entry).replace("{trap}", str(trap)))

    def change(found: list) -> None:
        if place == "a layer":
            found.insert(1, entry)
        elif place == "an argument":
            found[-1]["config"]["activation"] = entry
        else:
            found[-1]["build_config"]["input_shape"] = {"deeper": [entry]}

    reconfigure(path, change)
    refused(path, "which is not on the list of allowed ones; if the file is your own, add --trust-model")
    assert not trap.exists()


def test_a_lambda_layer_is_refused_and_does_not_run(tmp_path):
    trap = str(tmp_path / "trap")
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Lambda(
        lambda values, made=trap: values if __import__("os").mkdir(made) is None else values,
        output_shape=(64,)), layers.Dense(3)])
    if os.path.exists(trap):
        os.rmdir(trap)
    model.save(tmp_path / "model.keras")
    refused(tmp_path / "model.keras", "names the class keras.layers.Lambda")
    assert not os.path.exists(trap)


@keras.saving.register_keras_serializable(package="tests")
class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2


def test_a_class_of_one_s_own_needs_trust(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), Doubled(), layers.Dense(3)])
    model.save(tmp_path / "model.keras")
    refused(tmp_path / "model.keras", "Doubled, which is not on the list of allowed ones; if the file is your own, add "
                                      "--trust-model")
    found = model_file.load(tmp_path / "model.keras", trust=True)
    np.testing.assert_array_equal(found(IMAGES), model(IMAGES))
