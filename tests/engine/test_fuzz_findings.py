"""Files that the fuzzer once got past a reader's guard with, made anew."""

import io
import struct
import tracemalloc
import zipfile

import keras
import pytest

from hpcai_cli.engine import model_file
from hpcai_cli.engine.raw import archives
from hpcai_cli.errors import DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]).save(path)
    return path.read_bytes()


def refused(call, *words: str) -> None:
    """Assert exit code 3 and one readable line of bounded length that has all the words."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000, text
    for word in words:
        assert word in text, text


def test_a_part_of_a_model_that_says_it_is_stored_in_gigabytes(tmp_path, model):
    # zipfile takes the memory for a read before it reads.
    place = model.index(b"PK\x01\x02") + 20
    (tmp_path / "model.keras").write_bytes(model[:place] + struct.pack("<I", 2**31) + model[place + 4:])
    tracemalloc.start()
    try:
        refused(lambda: model_file.check(tmp_path / "model.keras"), "model.keras")
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_model_whose_weights_point_beyond_every_file(tmp_path, model):
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    weights = parts["model.weights.h5"]
    for place in range(0, 600, 8):
        parts["model.weights.h5"] = weights[:place] + struct.pack("<Q", 2**63 + 8) + weights[place + 8:]
        with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
            for name, content in parts.items():
                archive.writestr(name, content)
        try:
            model_file.check(tmp_path / "model.keras")
        except DataError as error:
            assert str(error).isprintable()


def test_parts_of_a_model_with_names_that_a_terminal_would_obey(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json\x1b[2J\n" + "x" * 5000, "")
    refused(lambda: model_file.check(tmp_path / "model.keras"), "it holds config.json\\x1b[2J\\nx")


@pytest.mark.parametrize("name", ["../" + "x" * 5000, "/\x1b[2J" + "x" * 5000, "y" * 5000 + "\x07\n"])
def test_members_of_an_archive_with_such_names(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, "content")
    refused(lambda: archives.unpack(tmp_path / "a.zip", tmp_path / "files", named="a.zip"), "a.zip")
