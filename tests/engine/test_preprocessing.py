"""From arrays to a dataset file: what a recipe's load may not return, what is set aside, what is counted."""

import numpy as np
import pytest

from hpcai_cli.engine import preprocessing, store
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(4, 4, 1), num_classes=3)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)


def good(count: int = 60) -> dict:
    return {"train": (images(count), np.arange(count) % 3), "test": (images(9, 1), np.arange(9) % 3)}


def preprocess(output, splits=None, *, recipe=RECIPE, force: bool = False) -> dict:
    return preprocessing.preprocess(recipe, load=None, sample=lambda: splits or good(), downloads=None,
                                    source="sample", output=output, force=force)


@pytest.mark.parametrize("value", [None, [], {}, {"test": (images(3), np.zeros(3, int))}, (images(3), np.zeros(3))])
def test_no_training_split(value):
    with pytest.raises(UsageError, match="recipe tiny: load gives no training split; expected .*received: '"):
        preprocessing.checked(RECIPE, value)


LABELS = np.zeros(3, np.int64)


@pytest.mark.parametrize(("pair", "words"), [
    (None, "train is no pair of arrays"),
    (images(3), "train is no pair of arrays"),
    ((images(3), LABELS, LABELS), "train is no pair of arrays"),
    (([[1, 2]], LABELS), "train is no pair of arrays"),
    ((images(3), [0, 1, 2]), "train is no pair of arrays"),
    ((np.uint8(3), LABELS), "train is no pair of arrays"),
    ((images(3)[:, :3], LABELS), "train has examples of shape (3, 4, 1) where the recipe has (4, 4, 1)"),
    ((images(3)[..., 0], LABELS), "train has examples of shape (4, 4) where the recipe has (4, 4, 1)"),
    ((images(3).astype(float), LABELS), "train has inputs of type float64 where uint8 and float32 can be stored"),
    ((images(3).astype(object), LABELS), "train has inputs of type object"),
    ((images(3), LABELS[:2]), "train has labels int64 (2,) for 3 examples"),
    ((images(3), np.eye(3, dtype=int)), "train has labels int64 (3, 3) for 3 examples"),
    ((images(3), LABELS.astype(float)), "train has labels float64 (3,) for 3 examples"),
    ((images(3), np.array(["a", "b", "c"])), "train has labels <U1 (3,) for 3 examples"),
    ((images(0), LABELS[:0]), "train is empty"),
    ((images(3), np.array([0, 1, 3])), "train has labels from 0 to 3 where the recipe has 3 classes"),
    ((images(3), np.array([0, -1, 2])), "train has labels from -1 to 2 where the recipe has 3 classes"),
    ((images(3), np.array([0, 2**63, 2], np.uint64)), "train has labels from 0 to 9223372036854775808"),
])
def test_what_cannot_be_trained_on_is_named(pair, words):
    with pytest.raises(DataError) as caught:
        preprocessing.checked(RECIPE, {"train": pair})
    assert str(caught.value) == str(caught.value).split("\n")[0]
    assert str(caught.value).startswith("recipe tiny read something that it cannot train on: ")
    assert words in str(caught.value)


def test_all_problems_are_listed_at_once():
    with pytest.raises(DataError) as caught:
        preprocessing.checked(RECIPE, {"train": (images(3), LABELS[:2]), "val": (images(3), LABELS),
                                       "test": (images(0), LABELS[:0])})
    for words in ("train has labels int64 (2,) for 3 examples", "'val' is no split", "test is empty"):
        assert words in str(caught.value)


def test_labels_of_any_whole_number_type_become_int64():
    splits = preprocessing.checked(RECIPE, {"train": (images(3), np.array([2, 1, 0], np.uint8))})
    assert splits["train"][1].dtype == np.int64
    assert splits["train"][1].tolist() == [2, 1, 0]


def rows(split) -> set[bytes]:
    return {row.tobytes() for row in np.asarray(split.inputs)}


def test_a_share_of_each_class_is_set_aside_twice_the_same(tmp_path):
    recipe = RECIPE.override({"validation_fraction": "0.2", "seed": "4"})
    report = preprocess(tmp_path / "one.h5", recipe=recipe)
    assert report["class_balance"] == {"train": [16, 16, 16], "validation": [4, 4, 4], "test": [3, 3, 3]}
    assert {name: report["metrics"][f"{name}_examples"] for name in ("train", "validation", "test")} == {
        "train": 48, "validation": 12, "test": 9}
    dataset = store.Dataset(tmp_path / "one.h5")
    train, aside = rows(dataset.split("train")), rows(dataset.split("validation"))
    assert not train & aside
    assert train | aside == {image.tobytes() for image in good()["train"][0]}
    lookup = {image.tobytes(): label for image, label in zip(*good()["train"], strict=True)}
    for split in (dataset.split("train"), dataset.split("validation")):
        assert [lookup[row.tobytes()] for row in np.asarray(split.inputs)] == split.labels.tolist()
    assert preprocess(tmp_path / "two.h5", recipe=recipe)["fingerprint"] == report["fingerprint"]
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    other = preprocess(tmp_path / "three.h5", recipe=recipe.override({"seed": "5"}))
    assert other["fingerprint"] != report["fingerprint"]


def test_a_validation_split_of_the_recipe_s_own_stays(tmp_path):
    splits = good() | {"validation": (images(6, 3), np.arange(6) % 3)}
    report = preprocess(tmp_path / "a.h5", splits, recipe=RECIPE.override({"validation_fraction": "0.2"}))
    assert report["metrics"]["train_examples"] == 60
    assert report["metrics"]["validation_examples"] == 6


def test_a_class_of_one_example_cannot_be_shared_out(tmp_path):
    splits = {"train": (images(5), np.array([0, 0, 1, 1, 2]))}
    with pytest.raises(HpcaiError, match="cannot set aside 40.0% of 5 training examples: .*--validation-fraction 0"):
        preprocess(tmp_path / "a.h5", splits, recipe=RECIPE.override({"validation_fraction": "0.4"}))
    assert not (tmp_path / "a.h5").exists()


def test_duplicates_and_conflicting_labels_are_counted(tmp_path):
    """Three images again in the same split, one of them under another label, and one again in the test split."""
    pictures, labels = good()["train"]
    splits = {"train": (np.concatenate([pictures, pictures[[0, 1, 2]]]), np.concatenate([labels, [0, 1, 0]])),
              "test": (np.concatenate([images(4, 1), pictures[[3]]]), np.array([0, 1, 2, 0, 1]))}
    report = preprocess(tmp_path / "a.h5", splits)
    assert report["metrics"]["duplicates"] == 4
    assert report["metrics"]["label_conflicts"] == 2
    assert preprocess(tmp_path / "b.h5")["metrics"]["duplicates"] == 0


def test_the_report_and_the_second_time(tmp_path):
    report = preprocess(tmp_path / "a.h5")
    assert (report["schema"], report["recipe"], report["source"]) == ("hpcai.preprocess/1", "tiny", "sample")
    assert (report["reused"], report["classes"], report["rejected"]) == (False, ["0", "1", "2"], [])
    assert report["metrics"]["bytes"] == (tmp_path / "a.h5").stat().st_size
    before = (tmp_path / "a.h5").stat().st_mtime_ns
    again = preprocess(tmp_path / "a.h5")
    assert again["reused"]
    assert again["fingerprint"] == report["fingerprint"] == store.verify(tmp_path / "a.h5").fingerprint
    assert (tmp_path / "a.h5").stat().st_mtime_ns == before


@pytest.mark.parametrize("there", ["other options", "something else", "damaged"])
def test_what_is_there_is_not_overwritten_unless_asked(tmp_path, there):
    path = tmp_path / "a.h5"
    preprocess(path, recipe=RECIPE.override({"seed": "1"}))
    if there == "something else":
        path.write_text("mine")
    if there == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    before = path.read_bytes()
    words = "made from other input or options" if there == "other options" else "is no valid dataset file"
    with pytest.raises(UsageError, match=f"the output exists and .*{words}.*replace it with --force"):
        preprocess(path)
    assert path.read_bytes() == before
    assert not preprocess(path, force=True)["reused"]
    assert store.verify(path).options["seed"] == 0


def test_a_recipe_without_a_sample_says_what_it_wants(tmp_path):
    with pytest.raises(UsageError, match="recipe tiny has no built-in sample; expected a folder, archive or address"):
        preprocessing.preprocess(RECIPE, load=None, sample=None, downloads=None, source="sample",
                                 output=tmp_path / "a.h5")
