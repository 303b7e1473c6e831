"""The dataset file: what is written is found again, by anybody's reader, and a damaged one is refused."""

import os

import h5py
import numpy as np
import pytest

from hpcai_cli.engine import store, store_writer
from hpcai_cli.errors import DataError, HpcaiError
from hpcai_cli.recipe import Recipe

COUNTS = {"train": 23, "validation": 7, "test": 5}
RECIPE = Recipe(name="tiny", summary="", input_shape=(4, 3, 2), num_classes=3)


def splits(seed: int = 1) -> dict:
    source = np.random.default_rng(seed)
    return {name: {"images": source.integers(0, 256, (count, 4, 3, 2), dtype=np.uint8),
                   "labels": source.integers(0, 3, count)} for name, count in COUNTS.items()}


def write(path, arrays=None) -> str:
    return store.write(path, splits() if arrays is None else arrays, recipe="tiny", class_names=("a", "b", "ß"),
                       source_fingerprint="source", options={"seed": 0})


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "tiny.h5")
    return tmp_path / "tiny.h5"


def test_the_same_input_gives_the_same_bytes(tmp_path):
    first, second, other = (tmp_path / name for name in ("first.h5", "second.h5", "other.h5"))
    assert write(first) == write(second)
    assert first.read_bytes() == second.read_bytes()
    assert write(other, splits(seed=2)) != store.verify(first).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["first.h5", "other.h5", "second.h5"]


def test_any_hdf5_tool_reads_it(file):
    with h5py.File(file) as opened:
        for split, arrays in splits().items():
            for name, array in arrays.items():
                item = opened[f"{split}/{name}"]
                assert item.dtype == array.dtype
                assert (item.chunks, item.compression, item.external, item.is_virtual) == (None, None, None, False)
                assert item.id.get_offset() > 0
                assert item.attrs["valid_rows"] == len(array)
                np.testing.assert_array_equal(item, array)


def test_verify_says_what_is_in_the_file(file):
    report = store.verify(file)
    assert report.counts == COUNTS
    assert report.class_names == ("a", "b", "ß")
    assert (report.recipe, report.source_fingerprint, report.options) == ("tiny", "source", {"seed": 0})
    assert report.bytes == file.stat().st_size
    assert report.fingerprint == store.Dataset(file).fingerprint


def test_statistics_are_those_of_the_training_split(file):
    pixels = splits()["train"]["images"].reshape(-1, 2).astype(np.float64)
    found = store.Dataset(file).statistics
    np.testing.assert_allclose(found["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(found["std"], pixels.std(axis=0))


@pytest.mark.parametrize("name", [f"{split}/{kind}" for split in COUNTS for kind in ("images", "labels")])
def test_verify_finds_one_flipped_bit_in_each_dataset(file, name):
    with h5py.File(file) as opened:
        place = opened[name].id.get_offset() + opened[name].id.get_storage_size() - 1
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=f"the checksum of {name} does not match") as caught:
        store.verify(file)
    assert caught.value.exit_code == 3


def test_verify_finds_labels_that_got_other_names(file):
    with h5py.File(file, "a") as opened:
        store_writer.write_attributes(opened, {"class_names": '["b", "a", "c"]'})
    with pytest.raises(DataError, match="the fingerprint does not match the content"):
        store.verify(file)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
@pytest.mark.parametrize("less", [0, 1])
def test_a_truncated_file_is_bad_data(file, part, less):
    content = file.read_bytes()
    file.write_bytes(content[:max(0, int(len(content) * part) - less)])
    with pytest.raises(DataError, match="truncated, damaged or no dataset file"):
        store.verify(file)


def test_a_byte_less_is_bad_data(file):
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(DataError, match="truncated"):
        store.Dataset(file)


def test_gather_is_fancy_indexing(file):
    split = store.Dataset(file).split("train")
    arrays = splits()["train"]
    rows = np.array([22, 0, 7, 7, 13])
    images, labels = np.empty((5, 4, 3, 2), np.uint8), np.empty(5, np.int64)
    split.gather(rows, images, labels)
    np.testing.assert_array_equal(images, arrays["images"][rows])
    np.testing.assert_array_equal(labels, arrays["labels"][rows])
    assert len(split) == 23
    with pytest.raises(ValueError, match="read-only"):
        split.inputs[0] = 0


@pytest.mark.parametrize("layout", [{"chunks": True}, {"compression": "gzip"}, {"compression": "lzf", "shuffle": True}])
def test_a_file_that_another_tool_packed_reads_the_same(file, layout):
    plain = store.Dataset(file)
    packed = file.with_name("packed.h5")
    with h5py.File(file) as source, h5py.File(packed, "w") as target:
        target.attrs.update(source.attrs)
        for split in COUNTS:
            for kind in ("images", "labels"):
                name = f"{split}/{kind}"
                target.create_dataset(name, data=source[name][:], **layout)
                target[name].attrs.update(source[name].attrs)
    assert store.verify(packed).fingerprint == plain.fingerprint
    for name, count in COUNTS.items():
        rows = np.random.default_rng(0).integers(0, count, 50)
        found = []
        for dataset in (plain, store.Dataset(packed)):
            images, labels = np.empty((50, 4, 3, 2), np.uint8), np.empty(50, np.int64)
            dataset.split(name).announce(rows)
            dataset.split(name).gather(rows, images, labels)
            found += [images, labels]
        np.testing.assert_array_equal(found[0], found[2])
        np.testing.assert_array_equal(found[1], found[3])


def test_float_features_and_a_split_without_rows(tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    arrays = {"train": {"features": rows, "labels": np.arange(9) % 3},
              "test": {"features": rows[:0], "labels": np.zeros(0, np.int64)}}
    write(tmp_path / "rows.h5", arrays)
    dataset = store.Dataset(tmp_path / "rows.h5")
    np.testing.assert_array_equal(dataset.split("train").inputs, rows)
    assert store.verify(tmp_path / "rows.h5").counts == {"train": 9, "test": 0}
    with pytest.raises(DataError, match="no validation split; expected one of train, test"):
        dataset.split("validation")


def test_the_statistics_of_many_features_are_kept(tmp_path):
    """Their text is longer than the 64 KiB that HDF5 holds in one attribute."""
    rows = np.random.default_rng(0).normal(size=(4, 4000)).astype(np.float32)
    write(tmp_path / "wide.h5", {"train": {"features": rows, "labels": np.zeros(4, np.int64)}})
    found = store.Dataset(tmp_path / "wide.h5").statistics
    np.testing.assert_allclose(found["std"], rows.astype(np.float64).std(axis=0))


def test_everything_that_does_not_fit_the_recipe_is_listed_at_once(tmp_path):
    arrays = splits()
    arrays["train"]["labels"][3] = 7
    arrays["test"] = {"images": np.zeros((2, 5, 5, 1), np.uint8), "labels": np.zeros(2, np.int64)}
    write(tmp_path / "odd.h5", arrays)
    with pytest.raises(DataError) as caught:
        store.check_fits(store.Dataset(tmp_path / "odd.h5"), RECIPE)
    for words in ("train has labels from 0 to 7 where the recipe has 3 classes", "hpcai preprocess tiny",
                  "test has examples of shape (5, 5, 1) where the recipe has (4, 3, 2)"):
        assert words in str(caught.value)


def test_class_names_of_another_number_do_not_fit(file):
    with pytest.raises(DataError, match="it names 3 classes where the recipe has 4"):
        store.check_fits(store.Dataset(file), RECIPE.override({"num_classes": "4"}))


def test_a_type_that_the_file_does_not_hold_is_refused_and_leaves_nothing(tmp_path):
    arrays = {"train": {"images": np.zeros((2, 3, 3, 1), np.complex64), "labels": np.zeros(2, np.int64)}}
    with pytest.raises(HpcaiError, match="expected uint8, int64, float32.*complex64"):
        write(tmp_path / "new.h5", arrays)
    assert os.listdir(tmp_path) == []


def test_details_are_found_again(tmp_path):
    details = {"rejected": [{"file": f"cat/{number}\udcff.jpg", "reason": "empty file"} for number in range(5_000)]}
    store.write(tmp_path / "a.h5", splits(), recipe="tiny", class_names=("a", "b", "c"), source_fingerprint="",
                options={}, details=details)
    assert store.Dataset(tmp_path / "a.h5").details == store.verify(tmp_path / "a.h5").details == details


@pytest.mark.parametrize("packed", [False, True])
def test_only_the_valid_rows_count(file, packed):
    with h5py.File(file, "a") as opened:
        for kind in ("images", "labels"):
            values = opened[f"train/{kind}"][:]
            if packed:
                del opened[f"train/{kind}"]
                opened.create_dataset(f"train/{kind}", data=values, chunks=True)
            opened[f"train/{kind}"].attrs["valid_rows"] = 20
    split = store.Dataset(file).split("train")
    assert (len(split), split.inputs.shape[0], len(split.inputs[:])) == (20, 20, 20)
    images, labels = np.empty((1, 4, 3, 2), np.uint8), np.empty(1, np.int64)
    split.gather(np.array([19]), images, labels)
    np.testing.assert_array_equal(images[0], splits()["train"]["images"][19])


@pytest.mark.parametrize("counts", [(24, 24), (-1, -1), (20, 21)])
def test_valid_rows_that_cannot_be(file, counts):
    with h5py.File(file, "a") as opened:
        for kind, count in zip(("images", "labels"), counts, strict=True):
            opened[f"train/{kind}"].attrs["valid_rows"] = count
    with pytest.raises(DataError, match="train has 23 rows of which"):
        store.Dataset(file)


def test_other_class_names_do_not_fit(file):
    recipe = RECIPE.override({"class_names": "a,ß,b"})
    with pytest.raises(DataError, match="its classes are a, b, ß where the recipe has a, ß, b"):
        store.check_fits(store.Dataset(file), recipe)
    assert store.check_fits(store.Dataset(file), RECIPE).class_names == ("a", "b", "ß")
