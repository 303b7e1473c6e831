"""Dataset files from strangers: nothing outside the file is reached, no size is believed, every refusal says why."""

import os

import h5py
import numpy as np
import pytest

from hpcai_cli.engine import store
from hpcai_cli.errors import DataError


@pytest.fixture
def file(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1), dtype=np.uint8)
    labels = np.arange(12) % 3
    store.write(tmp_path / "tiny.h5", {"train": {"images": images, "labels": labels},
                                       "test": {"images": images[:5], "labels": labels[:5]}},
                recipe="tiny", class_names=("a", "b", "c"), source_fingerprint="source", options={})
    return tmp_path / "tiny.h5"


def refused(path, *words: str) -> None:
    """Assert that neither opening nor verifying gets through, with exit code 3 and one line that has all the words."""
    for call in (store.Dataset, store.verify):
        with pytest.raises(DataError) as caught:
            call(path)
        assert caught.value.exit_code == 3
        assert "\n" not in str(caught.value)
        for word in (*words, str(path)):
            assert word in str(caught.value)


def change(path, name: str, make) -> None:
    """Replace one dataset or attribute by what `make(file, name)` puts in its place."""
    with h5py.File(path, "a") as opened:
        if name in opened:
            del opened[name]
        make(opened, name)


def test_files_that_are_no_dataset(tmp_path):
    refused(tmp_path / "missing.h5", "does not exist", "hpcai preprocess")
    refused(tmp_path, "does not exist")
    (tmp_path / "text.h5").write_text("label,pixel\n1,2\n" * 100)
    refused(tmp_path / "text.h5", "no dataset file")
    (tmp_path / "empty.h5").touch()
    refused(tmp_path / "empty.h5", "no dataset file")
    with h5py.File(tmp_path / "foreign.h5", "w") as opened:
        opened["train/images"] = np.zeros((3, 4, 4, 1), np.uint8)
    refused(tmp_path / "foreign.h5", "not one that hpcai wrote")


@pytest.mark.parametrize("name", ["train/images", "train/labels", "test/images", "test/labels"])
@pytest.mark.parametrize("link", ["external", "soft", "none"])
def test_links_are_not_followed(file, tmp_path, name, link):
    with h5py.File(tmp_path / "secret.h5", "w") as opened:
        opened["secret"] = np.zeros((12, 4, 4, 1), np.uint8)
    target = {"external": h5py.ExternalLink("secret.h5", "/secret"), "soft": h5py.SoftLink("/test/images")}.get(link)

    def make(opened, place):
        if target is not None:
            opened[place] = target

    change(file, name, make)
    refused(file, f"{name} is missing or points elsewhere")


def test_a_split_that_is_a_link_is_not_followed(file, tmp_path):
    os.rename(file, tmp_path / "other.h5")
    with h5py.File(tmp_path / "other.h5") as source, h5py.File(file, "w") as opened:
        opened.attrs.update(source.attrs)
        opened["train"] = h5py.ExternalLink("other.h5", "/train")
    refused(file, "it has no train split")


def test_storage_outside_the_file_is_not_read(file, tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"s" * 192)
    change(file, "train/images", lambda opened, name: opened.create_dataset(
        name, (12, 4, 4, 1), np.uint8, external=[(str(tmp_path / "secret.bin"), 0, 192)]))
    refused(file, "train/images keeps its data outside the file")


def test_a_virtual_dataset_is_not_read(file, tmp_path):
    layout = h5py.VirtualLayout((12, 4, 4, 1), np.uint8)
    layout[:] = h5py.VirtualSource(str(tmp_path / "secret.h5"), "secret", (12, 4, 4, 1))
    change(file, "train/images", lambda opened, name: opened.create_virtual_dataset(name, layout))
    refused(file, "train/images keeps its data outside the file")


@pytest.mark.parametrize("name", ["train/images", "train/labels"])
@pytest.mark.parametrize("chunks", [False, True])
def test_absurd_sizes_are_refused_before_memory_is_taken(file, name, chunks):
    """The shapes are declared and never written, so that the file itself stays small."""
    rows = 1 << 40
    shape, dtype = ((rows, 4, 4, 1), np.uint8) if name == "train/images" else ((rows,), np.int64)
    change(file, name, lambda opened, name: opened.create_dataset(
        name, shape, dtype, chunks=(64, *shape[1:]) if chunks else None))
    refused(file)
    change(file, "train", lambda opened, name: opened.create_group(name))
    for kind, shape, dtype in (("images", (rows, 4, 4, 1), np.uint8), ("labels", (rows,), np.int64)):
        change(file, f"train/{kind}", lambda opened, name, shape=shape, dtype=dtype: opened.create_dataset(
            name, shape, dtype, chunks=(64, *shape[1:]) if chunks else None))
    assert file.stat().st_size < 1 << 20
    refused(file, "longer than the file")


@pytest.mark.parametrize(("name", "value"), [
    ("train/images", np.zeros((12, 4, 4, 1), np.float64)),
    ("train/images", ["text"] * 12),
    ("train/images", np.zeros(12, [("a", "u1")])),
    ("train/images", np.zeros((11, 4, 4, 1), np.uint8)),
    ("train/images", np.zeros(12, np.uint8)),
    ("train/images", np.uint8(1)),
    ("train/labels", np.zeros(12, np.float32)),
    ("train/labels", np.zeros(12, np.uint8)),
    ("train/labels", np.zeros((12, 2), np.int64)),
    ("train/labels", np.zeros(13, np.int64)),
    ("train/labels", h5py.Empty("int64")),
    ("test", np.zeros(3, np.uint8)),
])
def test_types_and_shapes_are_checked(file, name, value):
    change(file, name, lambda opened, place: opened.create_dataset(place, data=value))
    refused(file)


def test_numbers_of_the_other_byte_order_are_read_or_refused(file):
    labels = (np.arange(12) % 3).astype(">i8")
    change(file, "train/labels", lambda opened, name: opened.create_dataset(name, data=labels))
    try:
        split = store.Dataset(file).split("train")
    except DataError:
        return
    images, found = np.empty((12, 4, 4, 1), np.uint8), np.empty(12, np.int64)
    split.gather(np.arange(12), images, found)
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize("name", ["format", "version", "inputs", "class_names", "statistics", "fingerprint", "recipe"])
@pytest.mark.parametrize("value", [None, 1.5, np.arange(3), "text of variable size", np.bytes_(b"\xff\xfe"),
                                   np.bytes_(b"[" * 32_000), np.bytes_(b'["a", 1]'), h5py.Empty("f")],
                         ids=["missing", "float", "array", "variable", "bytes", "deep", "mixed", "empty"])
def test_wrong_attributes_are_bad_data(file, name, value):
    with h5py.File(file, "a") as opened:
        del opened.attrs[name]
        if value is not None:
            opened.attrs[name] = value
    if name in ("recipe", "fingerprint") and isinstance(value, bytes) and value[0] < 128:
        # Any text will do there; `verify` alone knows the right fingerprint.
        assert getattr(store.Dataset(file), name) == value.decode()
    else:
        refused(file)


def test_another_version_says_so(file):
    with h5py.File(file, "a") as opened:
        opened.attrs["version"] = 2
    with pytest.raises(DataError, match="another version; expected version 1; write it again .*received: 2"):
        store.verify(file)


@pytest.mark.parametrize("value", [None, 7, np.arange(3), np.bytes_(b"0" * 64)], ids=repr)
def test_verify_wants_each_checksum(file, value):
    with h5py.File(file, "a") as opened:
        del opened["train/labels"].attrs["sha256"]
        if value is not None:
            opened["train/labels"].attrs["sha256"] = value
    with pytest.raises(DataError, match="sha256|the checksum of train/labels does not match"):
        store.verify(file)


def test_damage_anywhere_is_bad_data_or_no_harm(file):
    """Every 37th byte, one after the other, with all its bits turned. A crash of HDF5 itself would end this process."""
    content = file.read_bytes()
    refusals = 0
    for place in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[place] ^= 255
        file.write_bytes(damaged)
        try:
            store.verify(file)
        except DataError:
            refusals += 1
    assert refusals > 10
