"""From arrays to a dataset file: what a recipe's load may not return, what is set aside, what is counted."""

import numpy as np
import pytest

from hpcai_cli.engine import store
from hpcai_cli.engine.raw import preprocessing
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="tiny", summary="", input_shape=(4, 4, 1), num_classes=3)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)


def good(count: int = 60) -> dict:
    return {"train": (images(count), np.arange(count) % 3), "test": (images(9, 1), np.arange(9) % 3)}


def preprocess(output, splits=None, *, recipe=RECIPE, force: bool = False) -> dict:
    return preprocessing.preprocess(recipe, load=None, sample=lambda: splits or good(), downloads=None,
                                    source="sample", output=output,
                                    wishes=preprocessing.Wishes(force=force))


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


def test_a_test_split_is_set_aside_and_no_content_is_on_two_sides(tmp_path):
    """Where the split is ours, repeated images are left out, and those under two labels altogether."""
    pictures, labels = images(60), np.arange(60) % 3
    splits = {"train": (np.concatenate([pictures, pictures[[0, 0, 4]]]), np.concatenate([labels, [0, 0, 2]]))}
    recipe = RECIPE.override({"test_fraction": "0.25", "validation_fraction": "0.2"})
    report = preprocess(tmp_path / "a.h5", splits, recipe=recipe)
    assert report["duplicates"] == [{"file": "train[60]", "same_as": "train[0]"},
                                    {"file": "train[61]", "same_as": "train[0]"}]
    assert report["conflicts"] == [{"files": ["train[4]", "train[62]"], "labels": [1, 2]}]
    dataset = store.Dataset(tmp_path / "a.h5")
    parts = [rows(dataset.split(name)) for name in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [35, 9, 15]
    assert len(set.union(*parts)) == 59
    assert pictures[4].tobytes() not in set.union(*parts)


def test_repeated_training_images_go_to_validation_together(tmp_path):
    pictures, labels = images(60), np.arange(60) % 3
    splits = {"train": (np.concatenate([pictures, pictures]), np.concatenate([labels, labels])),
              "test": (images(9, 1), np.arange(9) % 3)}
    report = preprocess(tmp_path / "a.h5", splits, recipe=RECIPE.override({"validation_fraction": "0.2"}))
    assert report["metrics"]["duplicates"] == 60 and report["duplicates"] == []
    dataset = store.Dataset(tmp_path / "a.h5")
    assert [len(dataset.split(name)) for name in ("train", "validation", "test")] == [96, 24, 9]
    assert not rows(dataset.split("train")) & rows(dataset.split("validation"))


def test_a_regression_and_what_the_recipe_leaves_to_the_data(tmp_path):
    line = Recipe(name="line", summary="", task="regression", inputs="features")
    inputs = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    splits = {"train": (inputs, inputs.sum(axis=1).astype(np.float64)), "test": (inputs[:5] + 9, np.arange(5))}
    report = preprocess(tmp_path / "a.h5", splits, recipe=line)
    assert "class_balance" not in report and report["classes"] == []
    dataset = store.Dataset(tmp_path / "a.h5")
    assert dataset.split("train").labels.dtype == np.float32
    np.testing.assert_allclose(dataset.split("train").labels, inputs.sum(axis=1), rtol=1e-6)
    fitted = store.check_fits(dataset, line)
    assert (fitted.input_shape, fitted.num_classes, fitted.class_names) == ((2,), 0, ())
    kinds = Recipe(name="kinds", summary="", inputs="features")
    # Its classes are the data's, and these have numbers: what is left to them is the task too.
    assert store.check_fits(dataset, kinds).task == "regression"
    with pytest.raises(DataError, match="labels of type float32 where a classification has whole numbers"):
        store.check_fits(dataset, Recipe(name="kinds", summary="", inputs="features", num_classes=4))
    preprocess(tmp_path / "b.h5", {"train": (inputs, np.arange(40) % 4)}, recipe=kinds)
    fitted = store.check_fits(store.Dataset(tmp_path / "b.h5"), kinds)
    assert (fitted.input_shape, fitted.num_classes, fitted.class_names) == ((2,), 4, ("0", "1", "2", "3"))
    with pytest.raises(DataError, match="has labels of type int64 where a regression has float32 numbers"):
        store.check_fits(store.Dataset(tmp_path / "b.h5"), line)


@pytest.mark.parametrize("labels", [np.array([1.0, np.nan, 2.0]), np.array([1.0, 2.0, 1e300])])
@pytest.mark.filterwarnings("ignore:overflow")
def test_the_numbers_of_a_regression_are_finite(labels):
    line = Recipe(name="line", summary="", task="regression", inputs="features")
    with pytest.raises(DataError, match="train has labels that are not finite numbers"):
        preprocessing.checked(line, {"train": (np.ones((3, 2), np.float32), labels)})
