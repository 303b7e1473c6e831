"""Photographs to a dataset file: who stays, in which split; killed or stopped it ends with the same bytes."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine import store
from hpcai_cli.engine.raw import preprocessing
from hpcai_cli.engine.raw.image_files import find_image_files
from hpcai_cli.engine.raw.images import read_image
from hpcai_cli.errors import DataError, HpcaiError, UsageError
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="pets", summary="", input_shape=(20, 24, 3), num_classes=2, class_names=("cat", "dog"))
RECIPE_FILE = '''"""Cats and dogs."""
from hpcai_cli.recipe import Recipe
recipe = Recipe(name="mine", summary="", input_shape=(100, 100, 3), num_classes=2, class_names=("cat", "dog"),
                test_fraction=0.2)
def load(source, recipe):
    from hpcai_cli.engine.raw.image_files import find_image_files
    return find_image_files(source, shape=recipe.input_shape, class_names=recipe.class_names)
def build_model(recipe):
    raise NotImplementedError
'''
HPCAI = Path(sys.executable).parent / "hpcai"


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(folder: Path, name: str, seed: int, **size) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    picture(seed, **size).save(folder / name)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a folder with 30 cats and 30 dogs."""
    for number in range(60):
        save(tmp_path / "pets", f"{('cat', 'dog')[number % 2]}/{number:02}.png", number)
    return tmp_path / "pets"


def write(folder: Path, output: Path, recipe: Recipe = RECIPE, **wishes) -> dict:
    def load(source, recipe):
        return find_image_files(source, shape=recipe.input_shape, class_names=recipe.class_names)

    return preprocessing.preprocess(recipe, load=load, sample=None, downloads=None, source=str(folder), output=output,
                                    wishes=preprocessing.Wishes(**{"processes": 2, "max_bad": 1.0, **wishes}))


def contents(path: Path) -> dict[str, list[tuple[bytes, int]]]:
    return {name: [(np.asarray(row).tobytes(), int(label))
                   for row, label in zip(split.inputs, split.labels, strict=True)]
            for name, split in store.Dataset(path).splits.items()}


# ---- What stays ----------------------------------------------------------------------------------------------------

def test_shares_of_each_class_are_set_aside(folder, tmp_path):
    recipe = RECIPE.override({"test_fraction": "0.2", "validation_fraction": "0.25", "seed": "3"})
    report = write(folder, tmp_path / "a.h5", recipe)
    assert report["class_balance"] == {"train": [18, 18], "validation": [6, 6], "test": [6, 6]}
    rows = [row for split in contents(tmp_path / "a.h5").values() for row in split]
    names = [(name, label) for label, kind in enumerate(("cat", "dog")) for name in sorted((folder / kind).iterdir())]
    assert Counter(rows) == Counter((read_image(name, (20, 24, 3)).tobytes(), label) for name, label in names)
    write(folder, tmp_path / "one.h5", recipe, processes=1)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert write(folder, tmp_path / "b.h5", recipe.override({"seed": "4"}))["fingerprint"] != report["fingerprint"]


def test_statistics_and_checksums_are_those_of_the_rows(folder, tmp_path):
    (folder / "cat/00.png").write_bytes(b"broken")
    write(folder, tmp_path / "a.h5")
    assert store.verify(tmp_path / "a.h5").counts == {"train": 59}
    dataset = store.Dataset(tmp_path / "a.h5")
    pixels = dataset.split("train").inputs.reshape(-1, 3).astype(float)
    np.testing.assert_allclose(dataset.statistics["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(dataset.statistics["std"], pixels.std(axis=0))
    with h5py.File(tmp_path / "a.h5") as file:
        assert (file["train/images"].shape[0], file["train/images"].attrs["valid_rows"]) == (60, 59)
        assert not file["train/images"][59].any()


def test_bad_files_are_listed_with_their_reasons(folder, tmp_path):
    (folder / "cat/empty.jpg").write_bytes(b"")
    (folder / "dog/empty.jpg").write_bytes(b"")
    (folder / "dog/text.jpg").write_text("Dear Sir")
    save(folder, "cat/small.png", 99, width=10, height=100)
    (folder / "notes.txt").write_text("")
    report = write(folder, tmp_path / "a.h5")
    assert report["rejected"] == [
        {"file": "cat/empty.jpg", "reason": "empty file"},
        {"file": "cat/small.png", "reason": "10x100 pixels is smaller than 16"},
        {"file": "dog/empty.jpg", "reason": "empty file"}, {"file": "dog/text.jpg", "reason": "not an image"}]
    assert report["ignored"] == [{"file": "notes.txt", "reason": "not an image name"}]
    assert (report["metrics"]["rejected"], report["conflicts"], report["duplicates"]) == (4, [], [])
    again = write(folder, tmp_path / "a.h5")
    assert again["reused"]
    assert [again[key] for key in ("rejected", "ignored", "class_balance")] == [
        report[key] for key in ("rejected", "ignored", "class_balance")]
    assert len(write(folder, tmp_path / "b.h5", min_size=5)["rejected"]) == 3


def test_of_equal_photographs_one_stays(folder, tmp_path):
    """In other bytes too: the same pixels as a BMP."""
    (folder / "cat/z.png").write_bytes((folder / "cat/04.png").read_bytes())
    Image.open(folder / "dog/05.png").save(folder / "dog/0.bmp")
    report = write(folder, tmp_path / "a.h5")
    assert report["duplicates"] == [{"file": "cat/z.png", "same_as": "cat/04.png"},
                                    {"file": "dog/05.png", "same_as": "dog/0.bmp"}]
    assert report["class_balance"] == {"train": [30, 30]}


def test_what_has_two_labels_stays_nowhere(folder, tmp_path):
    (folder / "dog/z.png").write_bytes((folder / "cat/04.png").read_bytes())
    Image.open(folder / "dog/05.png").save(folder / "cat/y.bmp")
    report = write(folder, tmp_path / "a.h5", RECIPE.override({"test_fraction": "0.2"}))
    assert report["conflicts"] == [{"files": ["cat/04.png", "dog/z.png"], "labels": [0, 1]},
                                   {"files": ["cat/y.bmp", "dog/05.png"], "labels": [0, 1]}]
    assert sum(map(sum, report["class_balance"].values())) == 58
    lost = {read_image(folder / name, (20, 24, 3)).tobytes() for name in ("cat/04.png", "dog/05.png")}
    assert not lost & {row for split in contents(tmp_path / "a.h5").values() for row, _ in split}


def test_a_photograph_in_two_splits_stays_for_the_test(tmp_path):
    for number in range(24):
        split, kind = ("train", "validation", "test")[number // 8], ("cat", "dog")[number % 2]
        save(tmp_path / "pets", f"{split}/{kind}/{number:02}.png", number)
    for source, target in (("test/cat/16.png", "train/cat/a.png"), ("test/cat/16.png", "validation/cat/a.png"),
                           ("validation/dog/09.png", "train/dog/a.png")):
        (tmp_path / "pets" / target).write_bytes((tmp_path / "pets" / source).read_bytes())
    report = write(tmp_path / "pets", tmp_path / "a.h5")
    assert report["duplicates"] == [{"file": "train/cat/a.png", "same_as": "test/cat/16.png"},
                                    {"file": "train/dog/a.png", "same_as": "validation/dog/09.png"},
                                    {"file": "validation/cat/a.png", "same_as": "test/cat/16.png"}]
    assert report["class_balance"] == {"train": [4, 4], "validation": [4, 4], "test": [4, 4]}


# ---- What the user allows ------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("wishes", "words"), [
    ({"on_bad": "fail"}, "2 of 60 files cannot be used .cat/00.png: not an image; dog/01.png: empty file.; "
                         "expected none"),
    ({"max_bad": 0.03}, "2 of 60 files cannot be used .*expected at most 3 %")])
def test_too_many_bad_files_end_it_and_nothing_is_written(folder, tmp_path, wishes, words):
    (folder / "cat/00.png").write_bytes(b"broken")
    (folder / "dog/01.png").write_bytes(b"")
    with pytest.raises(DataError, match=words):
        write(folder, tmp_path / "a.h5", **wishes)
    assert sorted(os.listdir(tmp_path)) == ["pets"]
    write(folder, tmp_path / "a.h5", max_bad=0.04)
    with pytest.raises(DataError, match=words):
        write(folder, tmp_path / "a.h5", **wishes)


def test_a_class_without_a_usable_photograph(folder, tmp_path):
    for name in (folder / "dog").iterdir():
        name.write_bytes(b"broken")
    with pytest.raises(DataError, match="train has no photographs of dog left"):
        write(folder, tmp_path / "a.h5")
    assert sorted(os.listdir(tmp_path)) == ["pets"]


def test_bad_files_are_copied_aside(folder, tmp_path):
    (folder / "cat/a, b\n.jpg").write_bytes(b"broken")
    write(folder, tmp_path / "a.h5", on_bad="quarantine")
    assert (tmp_path / "a.h5.quarantine/cat/a, b\n.jpg").read_bytes() == b"broken"
    assert (folder / "cat/a, b\n.jpg").exists()


# ---- Disturbed -----------------------------------------------------------------------------------------------------

@pytest.fixture
def many(tmp_path) -> Path:
    """Return a folder with 600 photographs, a few of them bad or twice, and the recipe beside it."""
    for number in range(600):
        save(tmp_path / "pets", f"{('cat', 'dog')[number % 2]}/{number:03}.png", number, width=160, height=120)
    for number in range(0, 600, 50):
        (tmp_path / "pets/cat" / f"{number:03}.png").write_bytes(b"broken" + bytes(number))
    (tmp_path / "pets/dog/zz.png").write_bytes((tmp_path / "pets/dog/001.png").read_bytes())
    (tmp_path / "mine.py").write_text(RECIPE_FILE)
    return tmp_path


def command(folder: Path, output: str, *more: str) -> list[str]:
    return [str(HPCAI), "preprocess", str(folder / "mine.py"), "--source", str(folder / "pets"), "--output",
            str(folder / output), "--processes", "1", *more]


def run(folder: Path, output: str, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, output, *more), capture_output=True, text=True, timeout=120)


def disturb(folder: Path, output: str, number: int) -> tuple[int, str]:
    """Start the command, send a signal when some more photographs are done, and return exit code and error output."""
    journal = folder / f".{output}.journal"
    before = journal.stat().st_size if journal.exists() else 0
    process = subprocess.Popen(command(folder, output), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if journal.stat().st_size > before + 15_000:
                process.send_signal(number)
                break
        time.sleep(0.005)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


def test_killed_and_started_again_it_ends_with_the_same_bytes(many):
    assert run(many, "whole.h5").returncode == 0
    codes = []
    while not (many / "killed.h5").exists():
        code, said = disturb(many, "killed.h5", signal.SIGKILL)
        codes.append(code)
        assert ("going on after" in said) == (len(codes) > 1)
    assert codes.count(-signal.SIGKILL) >= 2
    assert (many / "killed.h5").read_bytes() == (many / "whole.h5").read_bytes()
    assert sorted(os.listdir(many)) == ["killed.h5", "mine.py", "pets", "whole.h5"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_stopped_by_a_signal_it_says_how_to_go_on(many, number):
    code, said = disturb(many, "a.h5", number)
    assert code == 75
    assert f"stopped by {number.name} after" in said
    assert "run the same command again to go on from there" in said
    assert "Traceback" not in said
    assert not (many / "a.h5").exists()
    assert run(many, "whole.h5").returncode == 0
    done = run(many, "a.h5")
    assert "going on after" in done.stderr
    assert (many / "a.h5").read_bytes() == (many / "whole.h5").read_bytes()


@pytest.mark.long
def test_what_was_done_is_not_believed_blindly(many):
    """Rows that are no longer what the journal says are decoded again; so is all after a change of options."""
    assert run(many, "whole.h5").returncode == 0
    disturb(many, "a.h5", signal.SIGKILL)
    part = many / ".a.h5.part"
    content = bytearray(part.read_bytes())
    for place in range(20_000, len(content), 100_000):
        content[place] ^= 255
    part.write_bytes(content)
    with (many / ".a.h5.journal").open("a") as journal:
        journal.write('[[3,"torn')
    assert run(many, "a.h5").returncode == 0
    assert (many / "a.h5").read_bytes() == (many / "whole.h5").read_bytes()
    disturb(many, "b.h5", signal.SIGKILL)
    done = run(many, "b.h5", "--set", "seed=7")
    assert done.returncode == 0 and "going on" not in done.stderr
    assert store.verify(many / "b.h5").fingerprint != store.verify(many / "whole.h5").fingerprint


def test_one_process_at_a_time_writes_an_output(folder, tmp_path):
    with open(tmp_path / ".a.h5.part", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is writing the same output"):
            write(folder, tmp_path / "a.h5")
    assert write(folder, tmp_path / "a.h5")["metrics"]["train_examples"] == 60


@pytest.mark.parametrize("output", ["file/a.h5", "/proc/none/a.h5"])
def test_a_folder_that_cannot_be_written(folder, tmp_path, output):
    (tmp_path / "file").write_text("")
    with pytest.raises(HpcaiError, match="cannot write .*what was there is unchanged"):
        write(folder, tmp_path / output)


def test_a_full_disk_leaves_the_old_file_whole(many):
    assert run(many, "a.h5", "--set", "seed=1").returncode == 0
    before = (many / "a.h5").read_bytes()
    done = subprocess.run(["bash", "-c", 'ulimit -f 2000; exec "$@"', "-", *command(many, "a.h5", "--force")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert (many / "a.h5").read_bytes() == before
