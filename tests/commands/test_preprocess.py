"""hpcai preprocess: raw files to a proven dataset file, written once and never by accident over something else."""

import csv
import gzip
import json
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

HPCAI = Path(sys.executable).parent / "hpcai"
NAMES = {"train-images-idx3-ubyte": (240, 28, 28), "train-labels-idx1-ubyte": (240,),
         "t10k-images-idx3-ubyte": (40, 28, 28), "t10k-labels-idx1-ubyte": (40,)}


@pytest.fixture
def digits() -> Path:
    """Return a folder with the four files of a small MNIST: random images, each class as often as the others."""
    folder = Path("digits")
    folder.mkdir()
    random = np.random.default_rng(3)
    for number, (name, shape) in enumerate(NAMES.items()):
        values = np.arange(shape[0]) % 10 if len(shape) == 1 else random.integers(0, 256, shape)
        content = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values.astype("u1").tobytes()
        # Mirrors give them gzipped, people unpack some.
        (folder / name).write_bytes(content if number else gzip.compress(content))
    return folder


@pytest.fixture
def made(hpcai):
    """Return the path of a dataset file made of the sample."""
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", "sample.h5").exit_code == 0
    return Path("sample.h5")


def last_line(done, code: int) -> str:
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    return done.stderr.splitlines()[-1]


# ---- Made ----------------------------------------------------------------------------------------------------------

def test_the_sample_becomes_a_file_with_a_short_table(hpcai):
    done = hpcai("preprocess", "mnist", "--source", "sample", "--output", "data/sample.h5")
    assert done.exit_code == 0
    assert done.stdout.startswith("data/sample.h5 written\n")
    for words in ("train_examples            1,318", "Examples by class", "validation"):
        assert words in done.stdout
    assert done.stderr == "reading sample\n"
    assert [path.name for path in Path("data").iterdir()] == ["sample.h5"]
    with h5py.File("data/sample.h5") as file:
        assert {name: len(file[name]["labels"]) for name in file} == {"train": 1318, "validation": 120, "test": 359}
        assert file["train/images"].shape == (1318, 28, 28, 1)
        assert file["train/images"].dtype == np.uint8


def test_the_json_document(hpcai):
    done = hpcai("preprocess", "mnist", "--source", "sample", "--output", "a.h5", "--json")
    document = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    metrics = document.pop("metrics")
    assert metrics.pop("seconds") > 0
    assert metrics == {"train_examples": 1318, "validation_examples": 120, "test_examples": 359, "rejected": 0,
                       "duplicates": 0, "label_conflicts": 0, "ignored": 0, "decoder_warnings": 0,
                       "bytes": Path("a.h5").stat().st_size}
    assert len(document.pop("fingerprint")) == 64
    balance = document.pop("class_balance")
    assert {name: sum(counts) for name, counts in balance.items()} == {"train": 1318, "validation": 120, "test": 359}
    assert document == {"schema": "hpcai.preprocess/1", "command": "preprocess", "recipe": "mnist", "source": "sample",
                        "file": "a.h5", "reused": False, "rejected": [], "duplicates": [], "conflicts": [],
                        "ignored": [],
                        "classes": [str(digit) for digit in range(10)]}


def test_stdout_is_pure_json_in_a_process_of_its_own():
    done = subprocess.run([HPCAI, "preprocess", "mnist", "--source", "sample", "--output", "a.h5", "--json"],
                          capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["metrics"]["train_examples"] == 1318
    assert done.stderr == "reading sample\n"


def test_a_folder_and_its_zip_give_the_same_bytes(hpcai, digits):
    with zipfile.ZipFile("digits.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in digits.iterdir():
            archive.write(path, path.name)
    for source in ("digits", "digits.zip"):
        # HDF5 would note the second in which a dataset was made.
        time.sleep(1.0)
        done = hpcai("preprocess", "mnist", "--source", source, "--output", f"{source}.h5", "--json")
        assert done.exit_code == 0, done.stderr
        metrics = json.loads(done.stdout)["metrics"]
        assert [metrics[f"{name}_examples"] for name in ("train", "validation", "test")] == [220, 20, 40]
    assert Path("digits.h5").read_bytes() == Path("digits.zip.h5").read_bytes()
    with h5py.File("digits.h5") as file:
        labels = file["train/labels"][:]
        assert np.bincount(labels).tolist() == [22] * 10
        assert np.bincount(file["validation/labels"][:]).tolist() == [2] * 10
        raw = gzip.decompress((digits / "train-images-idx3-ubyte").read_bytes())
        all_images = np.frombuffer(raw, np.uint8, offset=16).reshape(240, 28, 28)
        both = np.concatenate([file["train/images"][:], file["validation/images"][:]])[..., 0]
        assert sorted(map(bytes, both)) == sorted(map(bytes, all_images))


def test_a_recipe_that_borrows_its_data_makes_the_lenders_file(hpcai, digits):
    assert hpcai("preprocess", "mnist-mlp", "--source", digits).exit_code == 0
    assert [path.name for path in Path("data").iterdir()] == ["mnist.h5"]


def test_no_validation_split_when_none_is_wanted(hpcai, digits):
    hpcai("preprocess", "mnist", "--source", digits, "--output", "a.h5", "--validation-fraction", 0)
    with h5py.File("a.h5") as file:
        assert {name: len(file[name]["labels"]) for name in file} == {"train": 240, "test": 40}


def test_duplicates_and_contradictions_are_counted(hpcai, digits):
    images, labels = digits / "t10k-images-idx3-ubyte", digits / "t10k-labels-idx1-ubyte"
    content = bytearray(images.read_bytes())
    # The labels of images 0, 10 and 1 are 0, 0 and 1: one repetition that agrees, one that does not.
    for copy in (10, 1):
        content[16 + copy * 784:16 + (copy + 1) * 784] = content[16:16 + 784]
    images.write_bytes(content)
    assert labels.read_bytes()[8:10] == b"\0\1"
    done = hpcai("preprocess", "mnist", "--source", digits, "--output", "a.h5", "--json")
    metrics = json.loads(done.stdout)["metrics"]
    assert (metrics["duplicates"], metrics["label_conflicts"]) == (2, 1)


def test_the_whole_of_mnist(hpcai, shared_data):
    done = hpcai("preprocess", "mnist", "--source", shared_data / "mnist", "--output", "mnist.h5", "--json")
    metrics = json.loads(done.stdout)["metrics"]
    assert [metrics[f"{name}_examples"] for name in ("train", "validation", "test")] == [55_000, 5_000, 10_000]
    assert (metrics["duplicates"], metrics["label_conflicts"]) == (0, 0)


# ---- Made before ---------------------------------------------------------------------------------------------------

def test_the_same_again_is_reused(hpcai, made):
    before = made.stat()
    done = hpcai("preprocess", "mnist", "--source", "sample", "--output", made, "--json")
    document = json.loads(done.stdout)
    assert document["reused"] is True and document["metrics"]["train_examples"] == 1318
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert hpcai("preprocess", "mnist", "--source", "sample", "--output", made).stdout.startswith(
        "sample.h5 is valid already\n")


@pytest.mark.parametrize("options", [["--validation-fraction", "0.2"], ["--set", "seed=1"],
                                     ["--set", "validation_fraction=0"], ["--source", "digits"]])
def test_an_output_of_other_options_or_data_is_replaced_only_when_asked(hpcai, made, digits, options):
    content, line = made.read_bytes(), ["preprocess", "mnist", "--source", "sample", "--output", made, *options]
    text = last_line(hpcai(*line), 2)
    assert "the output exists and was made from other input or options" in text and "--force" in text
    assert made.read_bytes() == content
    assert hpcai(*line, "--force").exit_code == 0
    assert made.read_bytes() != content
    assert hpcai(*line, "--json").exit_code == 0


@pytest.mark.parametrize("content", [b"", b"a letter", b"\x89HDF\r\n\x1a\n" + bytes(100)])
def test_an_output_that_is_something_else_is_replaced_only_when_asked(hpcai, content):
    Path("a.h5").write_bytes(content)
    line = ["preprocess", "mnist", "--source", "sample", "--output", "a.h5"]
    assert "the output exists and is no valid dataset file" in last_line(hpcai(*line), 2)
    assert Path("a.h5").read_bytes() == content
    assert hpcai(*line, "--force").exit_code == 0
    assert hpcai("preprocess", "--verify", "a.h5").exit_code == 0


# ---- Proven --------------------------------------------------------------------------------------------------------

def test_a_whole_file_is_proven(hpcai, made):
    done = hpcai("preprocess", "--verify", made)
    assert done.exit_code == 0
    assert done.stdout.startswith("sample.h5 is whole\n")
    document = json.loads(hpcai("preprocess", "--verify", made, "--json").stdout)
    assert document["schema"] == "hpcai.verify/1" and document["recipe"] == "mnist"
    assert document["metrics"]["test_examples"] == 359


def test_one_changed_byte_is_found(hpcai, made):
    with h5py.File(made) as file:
        place = file["test/images"].id.get_offset() + 1000
    content = bytearray(made.read_bytes())
    content[place] ^= 1
    made.write_bytes(content)
    assert "the checksum of test/images does not match its content" in last_line(
        hpcai("preprocess", "--verify", made), 3)


def test_a_cut_file_is_found(hpcai, made):
    made.write_bytes(made.read_bytes()[:-100_000])
    assert "sample.h5 is truncated, damaged or no dataset file" in last_line(hpcai("preprocess", "--verify", made), 3)


# ---- Refused -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("source", "code", "words"), [
    ("nowhere", 3, "there is no nowhere in"), ("empty", 3, "files are missing: train-images-idx3-ubyte"),
    ("ftp://host/mnist", 2, "addresses with ftp:// are not fetched"), ("", 2, "the source is empty"),
    ("letter.doc", 3, "no archive")])
def test_a_source_that_gives_nothing(hpcai, source, code, words):
    Path("empty").mkdir()
    Path("letter.doc").write_text("Dear Sir")
    assert words in last_line(hpcai("preprocess", "mnist", "--source", source, "--output", "a.h5"), code)
    assert sorted(path.name for path in Path(".").iterdir()) == ["empty", "letter.doc"]


def test_a_broken_source_leaves_no_output(hpcai, digits):
    labels = digits / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    assert "truncated" in last_line(hpcai("preprocess", "mnist", "--source", digits, "--output", "data/a.h5"), 3)
    assert not Path("data/a.h5").exists()


def test_too_few_examples_to_set_any_aside(hpcai, digits):
    line = ["preprocess", "mnist", "--source", digits, "--output", "a.h5", "--validation-fraction", "0.001"]
    assert "give --validation-fraction 0" in last_line(hpcai(*line), 1)
    assert not Path("a.h5").exists()


@pytest.mark.parametrize("output", ["file/a.h5", "/proc/none/a.h5"])
def test_an_output_that_cannot_be_written(hpcai, output):
    Path("file").write_text("")
    assert f"cannot write {output}" in last_line(
        hpcai("preprocess", "mnist", "--source", "sample", "--output", output), 1)


# ---- Photographs ---------------------------------------------------------------------------------------------------

RECIPE = """'Cats and dogs.'
from hpcai_cli.recipe import Recipe
recipe = Recipe(name="pets", summary="", input_shape=(64, 64, 3), num_classes=2, class_names=("cat", "dog"))
def load(source, recipe):
    from hpcai_cli.engine.raw.image_files import find_image_files
    return find_image_files(source, shape=recipe.input_shape, class_names=recipe.class_names)
def build_model(recipe):
    raise NotImplementedError
"""
OUTCOMES = {"reject": "rejected", "ignore": "ignored", "keep": "kept", "keep or reject by --min-size": "small"}


@pytest.fixture
def pets() -> Path:
    """Return a folder with ten cats and ten dogs; the recipe for them is ./pets.py."""
    Path("pets.py").write_text(RECIPE)
    for number in range(20):
        path = Path("pets", ("Cat", "Dog")[number % 2], f"{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return Path("pets")


def outcomes(document: dict, names: list[str]) -> dict[str, str]:
    """Return what became of each file."""
    listed = {name: {entry["file"] for entry in document[name]} for name in ("rejected", "ignored", "duplicates")}
    listed["conflicts"] = {name for entry in document["conflicts"] for name in entry["files"]}
    return {name: next((kind for kind, files in listed.items() if name in files), "kept") for name in names}


def test_the_planted_archive(hpcai, shared_data):
    """Every file as petimages-expected.csv says."""
    Path("pets.py").write_text(RECIPE)
    with (shared_data / "petimages-expected.csv").open(newline="") as file:
        expected = {row["file"]: row["what it is and what must happen"] for row in csv.DictReader(file)}
    assert len(expected) == 23
    line = ["preprocess", "./pets.py", "--source", shared_data / "petimages.zip", "--max-bad", "1%", "--json"]
    done = hpcai(*line, "--output", "a.h5")
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    found = outcomes(document, list(expected))
    for name, text in expected.items():
        words = text.split(":")[0]
        if words in OUTCOMES:
            wanted = OUTCOMES[words].replace("small", "rejected")
        else:
            wanted = "conflicts" if "label conflict" in text else "duplicates"
        assert found[name] == wanted, f"{name}: {text}"
    assert document["conflicts"] == [{"files": ["Cat/0.jpg", "Dog/10021.jpg"], "labels": [0, 1]}]
    assert document["duplicates"] == [{"file": "Cat/10022.jpg", "same_as": "Cat/1.jpg"}]
    reasons = {entry["file"]: entry["reason"] for entry in document["rejected"] + document["ignored"]}
    for name, words in (("Cat/10000.jpg", "empty file"), ("Cat/10002.jpg", "truncated"),
                        ("Dog/10003.jpg", "not an image"), ("Cat/Thumbs.db", "not an image name"),
                        ("Dog/.DS_Store", "hidden file"), ("Cat/10019.jpg", "1x1 pixels is smaller than 16")):
        assert words in reasons[name]
    metrics = document["metrics"]
    assert (metrics["rejected"], metrics["duplicates"], metrics["label_conflicts"], metrics["train_examples"]) == (
        8, 1, 1, 1609)
    assert hpcai("preprocess", "--verify", "a.h5").exit_code == 0
    again = json.loads(hpcai(*line, "--output", "a.h5").stdout)
    assert again["reused"] and again["rejected"] == document["rejected"]
    small = json.loads(hpcai(*line, "--output", "b.h5", "--min-size", 1).stdout)
    assert outcomes(small, ["Cat/10019.jpg", "Dog/10020.jpg"]) == {"Cat/10019.jpg": "kept", "Dog/10020.jpg": "kept"}


def test_the_table_names_twenty_files_and_counts_the_others(hpcai, pets):
    for number in range(25):
        Path(pets, "Cat", f"bad{number:02}.jpg").write_bytes(b"Dear Sir")
    Path(pets, "Cat", "a\x1b[2J.jpg").write_bytes(b"Dear Sir")
    done = hpcai("preprocess", "./pets.py", "--source", pets, "--output", "a.h5", "--max-bad", "60%")
    assert done.exit_code == 0, done.stderr
    assert "Cat/bad18.jpg" in done.stdout and "Cat/bad19.jpg" not in done.stdout
    assert "and 6 more, see --json" in done.stdout
    assert "\x1b" not in done.stdout and "Cat/a\\x1b[2J.jpg" in done.stdout


@pytest.mark.parametrize(("options", "words"), [
    (["--on-bad", "fail"], "1 of 21 files cannot be used (Cat/bad.jpg: not an image); expected none"),
    (["--max-bad", "1%"], "expected at most 1 %"), (["--max-bad", "0.01"], "expected at most 1 %")])
def test_bad_files_end_it_where_they_may_not_be(hpcai, pets, options, words):
    Path(pets, "Cat", "bad.jpg").write_bytes(b"Dear Sir")
    line = ["preprocess", "./pets.py", "--source", pets, "--output", "a.h5"]
    assert words in last_line(hpcai(*line, *options), 3)
    assert sorted(path.name for path in Path(".").iterdir()) == ["pets", "pets.py"]
    assert hpcai(*line, "--on-bad", "quarantine").exit_code == 0
    assert Path("a.h5.quarantine/Cat/bad.jpg").read_bytes() == b"Dear Sir"


@pytest.mark.parametrize("share", ["much", "2", "-1%", "nan", ""])
def test_a_share_that_is_none(hpcai, pets, share):
    assert "cannot read --max-bad" in last_line(
        hpcai("preprocess", "./pets.py", "--source", pets, f"--max-bad={share}"), 2)


def test_a_test_split_is_set_aside(hpcai, pets):
    done = hpcai("preprocess", "./pets.py", "--source", pets, "--output", "a.h5", "--test-fraction", 0.2, "--json")
    assert json.loads(done.stdout)["class_balance"] == {"train": [8, 8], "test": [2, 2]}


# ---- Inspected -----------------------------------------------------------------------------------------------------

def test_what_is_in_a_file(hpcai, pets):
    Path(pets, "Cat", "bad.jpg").write_bytes(b"Dear Sir")
    hpcai("preprocess", "./pets.py", "--source", pets, "--output", "a.h5")
    done = hpcai("preprocess", "inspect", "a.h5", "--output", "sheet.png")
    assert done.exit_code == 0, done.stderr
    for words in ("images, uint8 64x64x3", "train, by class", "Cat/bad.jpg", "not an image"):
        assert words in done.stdout
    with Image.open("sheet.png") as sheet:
        assert sheet.format == "PNG"
    document = json.loads(hpcai("preprocess", "inspect", "a.h5", "--json").stdout)
    assert document["schema"] == "hpcai.inspect/1" and document["metrics"]["train_examples"] == 20


@pytest.mark.parametrize(("line", "code", "words"), [
    (["inspect"], 2, "inspect needs a dataset file"), (["inspect", "none.h5"], 3, "does not exist"),
    (["mnist", "a.h5"], 2, "preprocess takes one recipe")])
def test_what_cannot_be_inspected(hpcai, line, code, words):
    assert words in last_line(hpcai("preprocess", *line), code)
