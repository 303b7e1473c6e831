"""IDX files, good and bad, are read rightly or refused with a sentence that says why."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from hpcai_cli.engine.raw import idx
from hpcai_cli.errors import DataError

MNIST = Path(__file__).parents[4] / "shared" / "data" / "mnist"


def idx_bytes(array: np.ndarray, dtype: int = 0x08) -> bytes:
    """Return the array as an IDX file."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, dtype, array.ndim]) + sizes + array.tobytes()


def images(count: int = 6, height: int = 28, width: int = 28) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, height, width), dtype=np.uint8)


def labels(count: int = 6, first: int = 0, num_classes: int = 10) -> np.ndarray:
    return (np.arange(count, dtype=np.uint8) % num_classes + first).astype(np.uint8)


def write_set(folder: Path, prefix: str = "", test: str = "t10k", dot: str = "-", first: int = 0) -> Path:
    for split, count in (("train", 6), (test, 4)):
        (folder / f"{prefix}{split}-images{dot}idx3-ubyte").write_bytes(idx_bytes(images(count)))
        (folder / f"{prefix}{split}-labels{dot}idx1-ubyte").write_bytes(idx_bytes(labels(count, first)))
    return folder


def refused(call, *words: str) -> str:
    """Assert that the call fails with exit code 3 in one line that has all the words."""
    with pytest.raises(DataError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_the_content_decides_whether_it_is_gzipped(tmp_path, packed, name):
    content = idx_bytes(images())
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    array = idx.read_array(tmp_path / name)
    assert array.dtype == np.uint8
    assert array.flags.writeable
    np.testing.assert_array_equal(array, images())


WHOLE = idx_bytes(images())
HEADER = bytes([0, 0, 8, 3])
BAD = {
    "empty": (b"", ["empty"]),
    "two_bytes": (b"\0\0", ["no IDX file", "00 00"]),
    "html": (b"<!DOCTYPE html><html><body>404</body></html>", ["web page", "HTML"]),
    "html_after_blank_lines": (b"\r\n\r\n  <html><body>404</body></html>", ["web page", "HTML"]),
    "wrong_magic": (b"\x89PNG\r\n", ["no IDX file", "89 50 4e 47"]),
    "unknown_dtype": (bytes([0, 0, 7, 1, 0, 0, 0, 1, 5]), ["no IDX file", "00 00 07 01"]),
    "int8": (idx_bytes(labels(), 0x09), ["int8", "uint8"]),
    "int16": (idx_bytes(labels(), 0x0B), ["int16"]),
    "int32": (idx_bytes(labels(), 0x0C), ["int32"]),
    "float32": (idx_bytes(labels(), 0x0D), ["float32"]),
    "float64": (idx_bytes(labels(), 0x0E), ["float64"]),
    "no_dims": (bytes([0, 0, 8, 0, 1]), ["no IDX file", "dimensions"]),
    "many_dims": (bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"\5", ["no IDX file", "dimensions"]),
    "zero_images": (HEADER + bytes([0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 28]), ["no values", "(0, 28, 28)"]),
    "short_header": (HEADER + b"\0\0\0", ["header", "7 of 16 bytes"]),
    "truncated": (WHOLE[:-10], ["truncated", f"{len(WHOLE) - 10:,} bytes", f"{len(WHOLE):,} were expected"]),
    "trailing": (WHOLE + b"\0\0", ["trail", f"{len(WHOLE):,} were expected"]),
    "too_large": (HEADER + b"\xff" * 12, ["declares more", "4,294,967,296"]),
    # 2**32 x 2**32 would wrap round to zero in 64 bits: it must count as large.
    "overflowing": (bytes([0, 0, 8, 4]) + b"\x80\0\0\0" * 4, ["declares more"]),
    "gigabytes_declared": (HEADER + b"\0\0\x40\0\0\0\1\0\0\0\1\0" + b"\1" * 100, ["truncated", "116 bytes"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["raw", "gzipped"])
@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused(tmp_path, case, packed):
    content, words = BAD[case]
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(gzip.compress(content) if packed else content)
    refused(lambda: idx.read_array(path), path.name, *words)


def test_gzipped_twice_is_told(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(gzip.compress(WHOLE)))
    refused(lambda: idx.read_array(path), "gzipped twice", "gunzip")


def test_broken_gzip_streams_are_refused(tmp_path):
    path = tmp_path / "images.gz"
    packed = gzip.compress(WHOLE)
    path.write_bytes(packed[:len(packed) // 2])
    refused(lambda: idx.read_array(path), "truncated", f"{len(WHOLE):,} were expected")
    path.write_bytes(packed[:-4])
    refused(lambda: idx.read_array(path), "breaks off")
    path.write_bytes(packed[:-8] + b"\0\0\0\0" + packed[-4:])
    refused(lambda: idx.read_array(path), "corrupt", "CRC")
    path.write_bytes(packed[:200] + b"\xff" * 50 + packed[250:])
    refused(lambda: idx.read_array(path))


def test_a_gzip_bomb_stays_packed(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(idx_bytes(images(1)) + bytes(64 * 2**20), 1))
    unpacked = []
    original = gzip.GzipFile.read

    def counting(self, size=-1):
        chunk = original(self, size)
        unpacked.append(len(chunk))
        return chunk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gzip.GzipFile, "read", counting)
        refused(lambda: idx.read_array(path), "trail")
    assert sum(unpacked) < 1000


def test_what_is_no_regular_file_is_refused(tmp_path):
    refused(lambda: idx.read_array(tmp_path / "nothing"), "no such file")
    refused(lambda: idx.read_array(tmp_path), "no such file")
    os.mkfifo(tmp_path / "pipe")
    refused(lambda: idx.read_array(tmp_path / "pipe"), "no such file")


@pytest.mark.parametrize(("prefix", "test", "dot"), [("", "t10k", "-"), ("", "t10k", "."), ("", "test", "-"),
                                                     ("fashion-", "test", "-")])
def test_pairs_are_found_by_their_usual_names(tmp_path, prefix, test, dot):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    write_set(folder, prefix, test, dot)
    packed = folder / f"{prefix}train-images{dot}idx3-ubyte"
    packed.with_name(f"{packed.name}.gz").write_bytes(gzip.compress(packed.read_bytes()))
    packed.unlink()
    found = idx.read_images_and_labels(tmp_path, num_classes=10, image_shape=(28, 28, 1))
    assert list(found) == ["train", "test"]
    assert found["train"][0].shape == (6, 28, 28, 1)
    assert found["test"][0].shape == (4, 28, 28, 1)
    assert found["train"][0].dtype == np.uint8
    assert found["train"][1].dtype == np.int64
    np.testing.assert_array_equal(found["train"][0][..., 0], images(6))
    np.testing.assert_array_equal(found["test"][1], [0, 1, 2, 3])


def test_emnist_images_are_turned(tmp_path):
    write_set(tmp_path, "emnist-digits-", "test")
    found = idx.read_images_and_labels(tmp_path)
    np.testing.assert_array_equal(found["train"][0][..., 0], images(6).transpose(0, 2, 1))
    np.testing.assert_array_equal(found["test"][0][..., 0], images(4).transpose(0, 2, 1))


def test_kaggles_layout_with_each_file_twice(tmp_path):
    write_set(tmp_path, dot=".")
    for path in list(tmp_path.iterdir()):
        copy = tmp_path / path.name.replace(".idx", "-idx")
        copy.mkdir()
        (copy / copy.name).write_bytes(path.read_bytes())
    assert len(idx.read_images_and_labels(tmp_path)["train"][0]) == 6
    (tmp_path / "train-labels-idx1-ubyte" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels(6, 1)))
    refused(lambda: idx.read_images_and_labels(tmp_path), "two different files", "train-labels.idx1-ubyte")


def test_all_missing_files_are_listed_at_once(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    (tmp_path / "readme.txt").write_text("")
    text = refused(lambda: idx.read_images_and_labels(tmp_path), "missing: train-labels-idx1-ubyte, t10k-images-idx3",
                   "--source download", "readme.txt")
    assert text.index("received") < text.index("train-images-idx3-ubyte")


def test_folders_without_any_or_too_deep(tmp_path):
    refused(lambda: idx.read_images_and_labels(tmp_path), "t10k-labels-idx1-ubyte", "no files")
    refused(lambda: idx.read_images_and_labels(tmp_path / "none"), "cannot read a folder")
    deep = tmp_path / "1" / "2" / "3" / "4" / "5"
    deep.mkdir(parents=True)
    write_set(deep)
    refused(lambda: idx.read_images_and_labels(tmp_path), "at most 4 folders below")


def test_several_sets_in_one_folder(tmp_path):
    write_set(tmp_path)
    write_set(tmp_path, "emnist-letters-", "test")
    refused(lambda: idx.read_images_and_labels(tmp_path), "several sets", "emnist-letters, mnist")


def test_counts_that_differ(tmp_path):
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels(5)))
    refused(lambda: idx.read_images_and_labels(tmp_path), "6 images", "5 labels")


def test_images_and_labels_exchanged(tmp_path):
    write_set(tmp_path)
    one, other = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    whole = one.read_bytes()
    one.write_bytes(other.read_bytes())
    refused(lambda: idx.read_images_and_labels(tmp_path), "named as images", "holds labels", "exchanged")
    one.write_bytes(whole)
    other.write_bytes(whole)
    refused(lambda: idx.read_images_and_labels(tmp_path), "named as labels", "holds images")


def test_labels_outside_the_classes(tmp_path):
    write_set(tmp_path)
    refused(lambda: idx.read_images_and_labels(tmp_path, num_classes=4), "0 to 3", "num_classes=6", "EMNIST letters",
            "0 to 5")
    letters = tmp_path / "letters"
    letters.mkdir()
    write_set(letters, "emnist-letters-", "test", first=1)
    refused(lambda: idx.read_images_and_labels(letters, num_classes=6), "EMNIST letters", "from 1", "num_classes=7")
    assert idx.read_images_and_labels(letters, num_classes=7)["train"][1].max() == 6


def test_images_of_another_shape(tmp_path):
    write_set(tmp_path)
    refused(lambda: idx.read_images_and_labels(tmp_path, image_shape=(32, 32, 1)), "(32, 32, 1)", "(28, 28, 1)",
            "train-images")
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images(4, 20, 28)))
    refused(lambda: idx.read_images_and_labels(tmp_path), "test images", "(20, 28, 1)")


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"the real MNIST is not in {MNIST}")
def test_real_mnist():
    found = idx.read_images_and_labels(MNIST, num_classes=10, image_shape=(28, 28, 1))
    for split, count in (("train", 60_000), ("test", 10_000)):
        assert found[split][0].shape == (count, 28, 28, 1)
        histogram = np.bincount(found[split][1], minlength=10)
        assert histogram.sum() == count
        assert histogram.min() > count / 12
    np.testing.assert_array_equal(found["train"][1][:5], [5, 0, 4, 1, 9])
    # Ink on a dark ground: the mean that every MNIST script normalizes with.
    assert found["train"][0].mean() / 255 == pytest.approx(0.1307, abs=1e-4)
