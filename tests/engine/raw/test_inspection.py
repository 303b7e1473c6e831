"""What `preprocess inspect` says of a file is what is in it, and the contact sheet shows the right pictures."""

import json
import tracemalloc

import h5py
import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine import store
from hpcai_cli.engine.raw import inspection
from hpcai_cli.errors import DataError, HpcaiError, UsageError

COLORS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


def write(path, splits, *, kind="images", class_names=("red", "green", "blue"), details=None):
    store.write(path, {name: {kind: inputs, "labels": labels} for name, (inputs, labels) in splits.items()},
                recipe="tiny", class_names=class_names, source_fingerprint="abc", options={"seed": 7},
                details=details or {})
    return path


def colored(count: int, channels: int = 3, side: int = 8):
    """Pictures of one color each, that of their class, a little darker from one to the next."""
    labels = np.arange(count) % 3
    colors = COLORS[labels] - (COLORS[labels] > 0) * (np.arange(count)[:, np.newaxis] % 50).astype(np.uint8)
    pictures = np.broadcast_to(colors[:, np.newaxis, np.newaxis], (count, side, side, 3))
    return np.ascontiguousarray(pictures[..., :channels]), labels.astype(np.int64)


@pytest.fixture
def pictures(tmp_path):
    return write(tmp_path / "tiny.h5", {"train": colored(31), "test": colored(5)}, details={"rejected": ["a.jpg"]})


def test_images(pictures):
    document = inspection.inspect(pictures)
    json.dumps(document, allow_nan=False)
    assert document["schema"] == "hpcai.inspect/1"
    assert document["command"] == "preprocess inspect"
    assert document["file"] == str(pictures)
    assert document["recipe"] == "tiny"
    assert document["fingerprint"] == store.verify(pictures).fingerprint
    assert document["inputs"] == {"kind": "images", "shape": [8, 8, 3], "dtype": "uint8"}
    assert document["classes"] == ["red", "green", "blue"]
    assert document["options"] == {"seed": 7}
    assert document["details"] == {"rejected": ["a.jpg"]}
    assert document["metrics"]["train_examples"] == 31
    assert document["metrics"]["bytes"] == pictures.stat().st_size
    assert document["splits"]["train"]["class_balance"] == {"red": 11, "green": 10, "blue": 10}
    assert document["splits"]["test"]["class_balance"] == {"red": 2, "green": 2, "blue": 1}
    inputs, _ = colored(31)
    statistics = document["splits"]["train"]["statistics"]
    for name, expected in (("mean", inputs.mean((0, 1, 2))), ("std", inputs.std((0, 1, 2))),
                           ("minimum", [0, 0, 0]), ("maximum", inputs.max((0, 1, 2)))):
        np.testing.assert_allclose(statistics[name], expected)


def test_features_by_name_for_a_regression(tmp_path):
    source = np.random.default_rng(0)
    # A deviation of 1 around 1e6 is lost where squares are summed in float32.
    inputs = np.stack([source.normal(1e6, 1, 500), source.normal(0, 3, 500), np.full(500, np.nan)], 1)
    inputs = inputs.astype(np.float32)
    inputs[:20, 1] = np.nan
    inputs[20, 1] = np.inf
    labels = source.normal(5, 2, 500).astype(np.float32)
    path = write(tmp_path / "t.h5", {"train": (inputs, labels)}, kind="features", class_names=(),
                 details={"features": ["price", "size", "void"]})
    document = inspection.inspect(path)
    json.dumps(document, allow_nan=False)
    assert document["inputs"] == {"kind": "features", "shape": [3], "dtype": "float32"}
    assert document["classes"] == []
    train = document["splits"]["train"]
    assert "class_balance" not in train
    assert train["labels"]["mean"] == pytest.approx(labels.mean(dtype=np.float64))
    assert train["labels"]["std"] == pytest.approx(labels.std(dtype=np.float64))
    assert train["labels"]["minimum"] == labels.min() and train["labels"]["maximum"] == labels.max()
    assert train["statistics"]["price"]["std"] == pytest.approx(inputs[:, 0].std(dtype=np.float64))
    assert train["statistics"]["price"]["missing"] == 0
    there = inputs[21:, 1].astype(np.float64)
    assert train["statistics"]["size"] == pytest.approx({"mean": there.mean(), "std": there.std(), "missing": 21,
                                                         "minimum": there.min(), "maximum": there.max()})
    assert train["statistics"]["void"] == {"mean": None, "std": None, "minimum": None, "maximum": None, "missing": 500}


def test_features_without_names_have_numbers(tmp_path):
    inputs = np.arange(12, dtype=np.float32).reshape(6, 2)
    path = write(tmp_path / "t.h5", {"train": (inputs, np.arange(6) % 3)}, kind="features")
    assert list(inspection.inspect(path)["splits"]["train"]["statistics"]) == ["0", "1"]


def test_blocks_are_joined_rightly_and_memory_stays_flat(tmp_path):
    inputs = np.random.default_rng(0).integers(0, 256, (12_000, 64, 64, 1), dtype=np.uint8)
    labels = np.arange(12_000) % 3
    path = write(tmp_path / "t.h5", {"train": (inputs, labels)})
    tracemalloc.start()
    statistics = inspection.inspect(path)["splits"]["train"]["statistics"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statistics["mean"] == pytest.approx([inputs.mean()])
    assert statistics["std"] == pytest.approx([inputs.std()])
    assert peak < inputs.nbytes / 2


def test_files_that_are_not_whole(pictures, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        inspection.inspect(tmp_path / "none.h5")
    with h5py.File(pictures, "a") as file:
        file["train/images"][3, 0, 0, 0] ^= 1
    with pytest.raises(DataError, match="checksum"):
        inspection.inspect(pictures)


def test_labels_without_a_class(tmp_path):
    path = write(tmp_path / "t.h5", {"train": colored(6)}, class_names=("red", "green"))
    with pytest.raises(DataError, match="0 to 1.*0 to 2"):
        inspection.inspect(path)


def rows_of(path, per_class: int) -> list[list[tuple[int, int, int]]]:
    """Return the color in the middle of each cell of a sheet."""
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        step = inspection._CELL + inspection._GAP
        return [[sheet.getpixel((inspection._NAMES + place * step + inspection._CELL // 2,
                                 inspection._GAP + row * step + inspection._CELL // 2)) for place in range(per_class)]
                for row in range(sheet.height // step)]


@pytest.mark.parametrize("side", [8, 300])
def test_a_row_of_the_sheet_shows_its_class(tmp_path, side):
    path = write(tmp_path / "tiny.h5", {"train": colored(31, side=side)})
    inspection.draw_contact_sheet(path, tmp_path / "new" / "sheet.png", per_class=4)
    rows = rows_of(tmp_path / "new" / "sheet.png", 4)
    assert len(rows) == 3
    for channel, row in enumerate(rows):
        assert len(set(row)) == 4
        for color in row:
            assert color[channel] >= 150
            assert sum(color) == color[channel]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["sheet.png"]


def test_the_seed_chooses_the_samples(pictures, tmp_path):
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        inspection.draw_contact_sheet(pictures, tmp_path / f"{number}.png", per_class=4, seed=seed)
        drawn.append((tmp_path / f"{number}.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_gray_pictures_few_examples_and_many_classes(tmp_path):
    inputs, labels = colored(9, channels=1)
    names = tuple(f"K\u00e4se \u5b57\n {number} and so on and on" for number in range(30))
    path = write(tmp_path / "t.h5", {"train": (inputs, labels)}, class_names=names)
    inspection.draw_contact_sheet(path, tmp_path / "sheet.png", per_class=8)
    rows = rows_of(tmp_path / "sheet.png", 8)
    assert len(rows) == 20
    assert rows[0][0][0] == rows[0][0][1] == rows[0][0][2] >= 150
    assert rows[0][3:] == [(255, 255, 255)] * 5
    assert rows[19] == [(255, 255, 255)] * 8


def test_pictures_of_a_regression_and_in_floats(tmp_path):
    inputs = np.linspace(-3, 3, 5 * 64, dtype=np.float32).reshape(5, 8, 8, 1)
    path = write(tmp_path / "t.h5", {"train": (inputs, np.arange(5, dtype=np.float32))}, class_names=())
    inspection.draw_contact_sheet(path, tmp_path / "sheet.png")
    assert len(rows_of(tmp_path / "sheet.png", 5)) == 1


def test_what_cannot_be_drawn(pictures, tmp_path):
    table = write(tmp_path / "t.h5", {"train": (np.ones((6, 2), np.float32), np.arange(6) % 3)}, kind="features")
    with pytest.raises(UsageError, match="shows pictures"):
        inspection.draw_contact_sheet(table, tmp_path / "sheet.png")
    for per_class in (0, 1000):
        with pytest.raises(UsageError, match="out of range"):
            inspection.draw_contact_sheet(pictures, tmp_path / "sheet.png", per_class=per_class)
    (tmp_path / "file").write_text("here")
    with pytest.raises(HpcaiError, match="cannot write"):
        inspection.draw_contact_sheet(pictures, tmp_path / "file" / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
