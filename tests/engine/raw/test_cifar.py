"""CIFAR's files, good and bad, are read rightly or refused with a sentence that says why."""

import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest

from hpcai_cli.engine.raw.cifar import has_cifar, read_cifar
from hpcai_cli.errors import DataError, UsageError

COUNT = 12
"""Images in each file of the tests' sets."""
TEN_BINARY = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
TEN_PYTHON = [name.removesuffix(".bin") for name in TEN_BINARY]


def example(seed: int, num_classes: int, count: int = COUNT):
    """Return uint8 (count, 3072) with the channels one after the other, and their labels."""
    source = np.random.default_rng(seed)
    return (source.integers(0, 256, (count, 3072), dtype=np.uint8), source.integers(0, num_classes, count))


def binary(seed: int, num_classes: int = 10, count: int = COUNT) -> bytes:
    rows, labels = example(seed, num_classes, count)
    heads = [labels] if num_classes == 10 else [labels // 5, labels]
    return np.column_stack([*(head.astype(np.uint8) for head in heads), rows]).tobytes()


def python(seed: int, num_classes: int = 10, protocol: int = 4, as_bytes: bool = False, **changes) -> bytes:
    rows, labels = example(seed, num_classes)
    batch = {"batch_label": "training batch", "data": rows, "filenames": [f"{number}.png" for number in range(COUNT)],
             "labels" if num_classes == 10 else "fine_labels": labels.tolist()} | changes
    batch = {name: value for name, value in batch.items() if value is not None}
    return pickle.dumps({name.encode(): value for name, value in batch.items()} if as_bytes else batch, protocol)


def python2(seed: int) -> bytes:
    """Return the bytes that Python 2 wrote for the published files: protocol 2, every text a byte string."""
    rows, labels = example(seed, 10)

    def text(content: bytes) -> bytes:
        return b"U" + bytes([len(content)]) + content + b"q\x01"

    array = (b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09(K\x01M"
             + struct.pack("<H", COUNT) + b"M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b(K\x03U\x01|NNN"
             b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", rows.size) + rows.tobytes() + b"tb")
    return (b"\x80\x02}q\x02(" + text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels") + b"]q\x05("
            + b"".join(b"K" + bytes([label]) for label in labels) + b"e" + text(b"data") + array
            + text(b"filenames") + b"](" + text(b"l\xe9opard.png") * COUNT + b"eu.")


def write_set(folder, names, make, *, num_classes: int = 10):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        (folder / name).write_bytes(make(seed, num_classes) if num_classes != 10 else make(seed))
    return folder


def assert_right(read, num_classes: int = 10, batches: int = 5) -> None:
    """Compare with what the files were made of, pixel by pixel."""
    expected = {"train": range(batches), "test": [batches]}
    for split, seeds in expected.items():
        images, labels = read[split]
        rows, right = map(np.concatenate, zip(*(example(seed, num_classes) for seed in seeds), strict=True))
        assert images.dtype == np.uint8 and labels.dtype == np.int64
        assert images.shape == (len(right), 32, 32, 3)
        np.testing.assert_array_equal(labels, right)
        for channel in range(3):
            plane = rows[:, 1024 * channel:1024 * (channel + 1)].reshape(-1, 32, 32)
            np.testing.assert_array_equal(images[..., channel], plane)


def refused(folder, *words: str, num_classes: int = 10) -> None:
    """Assert exit code 3 and one line that has all the words."""
    with pytest.raises(DataError) as caught:
        read_cifar(folder, num_classes=num_classes)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


@pytest.fixture
def ten(tmp_path):
    return write_set(tmp_path / "cifar-10-batches-bin", TEN_BINARY, binary)


@pytest.fixture
def pickled(tmp_path):
    return write_set(tmp_path / "cifar-10-batches-py", TEN_PYTHON, python)


@pytest.mark.parametrize("below", [".", "cifar-10-batches-bin", "a/b/c"])
def test_the_binary_version(tmp_path, below):
    write_set(tmp_path / below, TEN_BINARY, binary)
    assert has_cifar(tmp_path)
    assert_right(read_cifar(tmp_path))


def test_the_published_python_version(tmp_path):
    write_set(tmp_path / "cifar-10-batches-py", TEN_PYTHON, python2)
    assert has_cifar(tmp_path)
    assert_right(read_cifar(tmp_path))


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_python_versions_that_were_written_again(tmp_path, protocol, as_bytes):
    def make(seed):
        return python(seed, protocol=protocol, as_bytes=as_bytes)

    assert_right(read_cifar(write_set(tmp_path, TEN_PYTHON, make)))


def test_arrays_in_fortran_order_and_labels_in_an_array(tmp_path):
    def make(seed):
        rows, labels = example(seed, 10)
        return python(seed, data=np.asfortranarray(rows), labels=labels.astype(">i4"))

    assert_right(read_cifar(write_set(tmp_path, TEN_PYTHON, make)))


@pytest.mark.parametrize(("names", "make"), [(["train.bin", "test.bin"], binary), (["train", "test"], python)])
def test_cifar_100_has_its_fine_labels(tmp_path, names, make):
    write_set(tmp_path / "cifar-100", names, make, num_classes=100)
    assert has_cifar(tmp_path)
    assert_right(read_cifar(tmp_path, num_classes=100), num_classes=100, batches=1)
    refused(tmp_path, "CIFAR-100", "not CIFAR-10", "data_batch_1.bin")


def test_of_both_versions_the_binary_one_is_read_and_said(ten, pickled, capsys):
    (pickled / "data_batch_1").write_bytes(b"never read")
    assert_right(read_cifar(ten.parent))
    assert "more than one version" in capsys.readouterr().err
    os.remove(ten / "test_batch.bin")
    refused(ten.parent, "data_batch_1", "no pickle")
    assert "Python version" in capsys.readouterr().err


def test_what_is_missing_is_named(ten):
    os.remove(ten / "data_batch_3.bin")
    os.remove(ten / "test_batch.bin")
    refused(ten, "are missing: data_batch_3.bin, test_batch.bin", str(ten))


def test_two_copies_are_not_chosen_between(ten, tmp_path):
    write_set(tmp_path / "copy", TEN_BINARY, binary)
    refused(tmp_path, "more than once", str(ten), "copy")


def test_folders_without_cifar(tmp_path):
    # An image tree has folders of these names.
    for folder in ("train", "test"):
        (tmp_path / "tree" / folder / "cat").mkdir(parents=True)
        (tmp_path / "tree" / folder / "cat" / "1.jpg").touch()
    assert not has_cifar(tmp_path)
    refused(tmp_path, "no files of CIFAR", "data_batch_1.bin")
    refused(tmp_path, "no files of CIFAR", "train.bin", num_classes=100)
    with pytest.raises(UsageError, match="10 classes or 100"):
        read_cifar(tmp_path, num_classes=20)


@pytest.mark.parametrize(("content", "words"), [
    (b"", ["empty"]),
    (b"<!DOCTYPE html><html>gone</html>", ["HTML"]),
    (binary(2)[:-1], ["truncated", "36,875 bytes", "3,073"]),
    (binary(2)[:-3073], ["differ in length", "11 in data_batch_3.bin"]),
    (binary(2, num_classes=100), ["3,074 bytes", "CIFAR-100"]),
    (b"\x0a" + binary(2)[1:], ["outside the classes", "0 to 9", "to 10 in"]),
])
def test_bad_binary_batches(ten, content, words):
    (ten / "data_batch_3.bin").write_bytes(content)
    refused(ten, *words, "data_batch_3.bin")


def test_a_batch_of_ten_given_as_one_of_a_hundred(tmp_path):
    write_set(tmp_path, ["train.bin", "test.bin"], binary)
    refused(tmp_path, "3,073 bytes", "CIFAR-10;", "train.bin", num_classes=100)


ROWS = example(2, 10)[0]


@pytest.mark.parametrize(("content", "words"), [
    (b"", ["empty"]),
    (b"<html>gone", ["HTML"]),
    (b"\x80", ["no pickle"]),
    (python(2)[:-1], ["truncated"]),
    (python(2)[:1000], ["truncated"]),
    (python(2, protocol=0), ["protocol 2 to 5"]),
    (pickle.dumps([1, 2]), ["no batch of CIFAR"]),
    (python(2, data=None), ["no batch of CIFAR", "data and labels"]),
    (python(2, labels=None), ["no labels"]),
    (python(2, num_classes=100), ["batch of CIFAR-100"]),
    (python(2, data=ROWS.astype(np.float32)), ["float32 (12, 3072)", "uint8 (n, 3072)"]),
    (python(2, data=ROWS.reshape(-1, 32, 32, 3)), ["(12, 32, 32, 3)", "uint8 (n, 3072)"]),
    (python(2, data=np.array([[None]])), ["'O8'"]),
    (python(2, data="pixels"), ["str", "uint8 (n, 3072)"]),
    (python(2, data=ROWS[:0], labels=[]), ["empty"]),
    (python(2, labels=[1] * 11), ["not 12 whole numbers"]),
    (python(2, labels=[0.5] * 12), ["not 12 whole numbers"]),
    (python(2, labels=[2**70] * 12), ["not 12 whole numbers"]),
    (python(2, labels=[*range(10), 9, 10]), ["outside the classes", "0 to 10"]),
    (python(2, labels=[-1] * 12), ["outside the classes"]),
])
def test_bad_python_batches(pickled, content, words):
    (pickled / "data_batch_3").write_bytes(content)
    refused(pickled, *words, "data_batch_3")


def test_a_hostile_pickle_among_the_batches_is_never_run(pickled):
    (pickled / "data_batch_3").write_bytes(b"\x80\x02cos\nmkdir\nU\x05proof\x85R.")
    refused(pickled, "os.mkdir", "do not trust this file", "data_batch_3")
    assert not os.path.exists("proof")


def test_memory_is_about_twice_the_data(tmp_path):
    content = binary(0, count=2000)
    for name in TEN_BINARY:
        (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    images = sum(images.nbytes for images, _ in read_cifar(tmp_path).values())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2 * images
