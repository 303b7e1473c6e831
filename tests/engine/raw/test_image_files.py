"""Which files of a folder are photographs, of which class and split; nothing is decoded here."""

import os
from pathlib import Path

import pytest

from hpcai_cli.engine.raw.image_files import find_image_files
from hpcai_cli.errors import DataError

SHAPE = (8, 8, 3)


@pytest.fixture
def made(tmp_path):
    """Return a function that makes empty files and returns their folder."""
    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")
        return tmp_path
    return make


def found(folder: Path, class_names: tuple[str, ...] = ()) -> dict:
    return {split: [(name, files.class_names[label]) for name, label in zip(files.names, files.labels, strict=True)]
            for split, files in find_image_files(folder, shape=SHAPE, class_names=class_names).items()}


def test_a_folder_for_each_class(made):
    folder = made("dog/b.JPG", "cat/2.png", "cat/10.jpeg", "dog/deeper/a.gif")
    files = find_image_files(folder, shape=SHAPE)["train"]
    assert (files.folder, files.names) == (folder, ("cat/10.jpeg", "cat/2.png", "dog/b.JPG", "dog/deeper/a.gif"))
    assert (files.labels.tolist(), files.labels.dtype.name) == ([0, 0, 1, 1], "int64")
    assert (files.class_names, files.shape, files.ignored, len(files)) == (("cat", "dog"), SHAPE, (), 4)


@pytest.mark.parametrize(("folder", "split"), [
    ("validation", "validation"), ("val", "validation"), ("Valid", "validation"), ("test", "test"),
    ("testing", "test")])
def test_folders_of_splits(made, folder, split):
    assert found(made("train/b/1.jpg", "train/a/1.jpg", f"{folder}/a/2.jpg", f"{folder}/b/3.jpg")) == {
        "train": [("train/a/1.jpg", "a"), ("train/b/1.jpg", "b")],
        split: [(f"{folder}/a/2.jpg", "a"), (f"{folder}/b/3.jpg", "b")]}


def test_microsofts_layout(made):
    folder = made("PetImages/Cat/0.jpg", "PetImages/Dog/0.jpg", "PetImages/Cat/Thumbs.db", "PetImages/Dog/.DS_Store",
                  "readme[1].txt", "PetImages/.git/x.jpg")
    files = find_image_files(folder, shape=SHAPE, class_names=("cat", "dog"))["train"]
    assert (files.folder, files.names) == (folder / "PetImages", ("Cat/0.jpg", "Dog/0.jpg"))
    assert files.class_names == ("cat", "dog")
    assert files.ignored == ((".git/", "hidden folder"), ("Cat/Thumbs.db", "not an image name"),
                             ("Dog/.DS_Store", "hidden file"), ("readme[1].txt", "not an image name"))


@pytest.mark.parametrize("prefix", ["", "train/", "train/train/", "dogs-vs-cats/train/", "photos/"])
def test_kaggles_flat_layout(made, prefix):
    folder = made(f"{prefix}cat.0.jpg", f"{prefix}dog.0.jpg", f"{prefix}dog.12.jpg")
    files = find_image_files(folder, shape=SHAPE)["train"]
    assert files.class_names == ("cat", "dog")
    assert files.labels.tolist() == [0, 1, 1]


def test_kaggles_unlabeled_files_are_ignored(made):
    folder = made("train/train/cat.0.jpg", "train/train/dog.0.jpg", "test1/test1/1.jpg", "test1/test1/2.jpg",
                  "sampleSubmission.csv")
    files = find_image_files(folder, shape=SHAPE)
    assert list(files) == ["train"]
    assert files["train"].ignored == (
        ("sampleSubmission.csv", "not an image name"), ("test1/test1/1.jpg", "its name says no class"),
        ("test1/test1/2.jpg", "its name says no class"))


def test_names_like_kaggles_in_folders_of_classes(made):
    folder = made("cat/dog.0.jpg", "dog/cat.0.jpg")
    assert found(folder)["train"] == [("cat/dog.0.jpg", "cat"), ("dog/cat.0.jpg", "dog")]


@pytest.mark.parametrize("folders", [("cat", "dog"), ("Cats", "DOGS"), ("cats", "dog")])
def test_the_recipes_classes_are_found_whatever_the_case_and_number(made, folders):
    assert found(made(*(f"{folder}/1.jpg" for folder in folders)), ("dog", "cat"))["train"] == [
        (f"{folder}/1.jpg", name) for folder, name in zip(folders, ("cat", "dog"), strict=True)]


def test_names_are_bytes(made):
    name = os.fsdecode(b"\xff\xfe, a\nb \xc3\xa9.jpg")
    assert found(made(f"a/{name}", "b/1.jpg"))["train"] == [(f"a/{name}", "a"), ("b/1.jpg", "b")]


def test_links(made, tmp_path_factory):
    folder = made("a/1.jpg", "b/1.jpg")
    secret = tmp_path_factory.mktemp("elsewhere") / "secret.jpg"
    secret.write_bytes(b"")
    (folder / "a/out.jpg").symlink_to(secret)
    (folder / "a/in.jpg").symlink_to("../b/1.jpg")
    (folder / "a/none.jpg").symlink_to("nowhere.jpg")
    (folder / "a/folder").symlink_to(secret.parent)
    os.mkfifo(folder / "a/pipe.jpg")
    files = find_image_files(folder, shape=SHAPE)["train"]
    assert files.names == ("a/1.jpg", "a/in.jpg", "b/1.jpg")
    assert {name for name, _ in files.ignored} == {"a/out.jpg", "a/none.jpg", "a/folder", "a/pipe.jpg"}
    assert dict(files.ignored)["a/out.jpg"] == "a link that leads out of the folder"


@pytest.mark.parametrize(("names", "class_names", "words"), [
    ([], (), "there are no images"), (["a/readme.txt"], (), "there are no images"),
    (["a/1.jpg"], (), "there is only one class: a"), (["1.jpg", "2.jpg"], (), "no image has a class"),
    (["a/1.jpg", "b/1.jpg", "c/readme.txt"], (), "a class has no images: c"),
    (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg"], (), "test has no images of b"),
    (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.jpg", "test/c/1.jpg"], (), "train has no images of c"),
    (["wolf/1.jpg", "dog/1.jpg"], ("cat", "dog"), "the classes are dog, wolf; expected the recipe's: cat, dog"),
    (["cat/1.jpg", "dog/1.jpg", "wolf/1.jpg"], ("cat", "dog"), "the classes are cat, dog, wolf"),
    (["cat/1.jpg"], ("cat", "dog"), "the classes are cat; expected the recipe's: cat, dog")])
def test_what_cannot_be_trained_on_is_said(made, names, class_names, words):
    with pytest.raises(DataError, match=words):
        find_image_files(made(*names), shape=SHAPE, class_names=class_names)


@pytest.mark.parametrize("shape", [(), (8, 8), (8, 8, 4), (3,)])
def test_a_recipe_that_is_not_for_photographs(made, shape):
    with pytest.raises(DataError, match="photographs have a height, a width and 1 or 3 channels"):
        find_image_files(made("a/1.jpg", "b/1.jpg"), shape=shape)
