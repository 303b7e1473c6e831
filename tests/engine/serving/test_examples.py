"""Image files and rows of tables as people send them: what a model gets of them, and what is refused."""

import csv
import io
import json
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine import prediction
from hpcai_cli.engine.raw import csv_files, tables
from hpcai_cli.engine.raw.images import read_image
from hpcai_cli.engine.raw.table_encoding import encode, encode_rows
from hpcai_cli.engine.raw.tables import read_table
from hpcai_cli.engine.serving import examples
from hpcai_cli.engine.serving.artefact import DOCUMENT, Artefact
from hpcai_cli.engine.serving.examples import answers, image_example, row_examples
from hpcai_cli.engine.serving.protocol import Limits
from hpcai_cli.engine.serving.tensors import RequestError, parse_json
from hpcai_cli.errors import DataError
from hpcai_cli.recipe import Recipe


def made(folder, **settings) -> Artefact:
    document = {"schema": "hpcai.artefact/1", "name": "tiny", "kind": "tflite", "file": "model.tflite",
                "task": "classification", "class_names": ["no", "yes"], "decision_threshold": None,
                "inputs": "images", "input_shape": [4, 6, 3],
                "files": {"model.tflite": {"sha256": "0" * 64, "bytes": 1}}} | settings
    (folder / DOCUMENT).write_text(json.dumps(document))
    return Artefact.open(folder)


def refused(call, *words: str, status: int = 400) -> None:
    with pytest.raises(RequestError) as caught:
        call()
    message = caught.value.message
    assert caught.value.status == status and message.isprintable() and len(message) < 1000, message
    for word in words:
        assert word in message, message


# ---- Images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path) -> Artefact:
    return made(tmp_path)


def picture(format: str) -> bytes:
    """Return an image file of 37 by 23 pixels by chance."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (23, 37, 3), dtype=np.uint8)).save(file, format)
    return file.getvalue()


def bomb(format: str) -> bytes:
    """Return a file of a few bytes that declares 60,000 by 60,000 pixels, or what its format can say at most."""
    if format == "PNG":
        chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
        head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        data = b"IDAT" + zlib.compress(bytes(1000))
        return head + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    if format == "GIF":
        return b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0, 0, 0) + b"," + struct.pack(
            "<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x4c\x01\x00;"
    if format == "BMP":
        sizes = struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0)
        return b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + sizes + bytes(6)
    head = b"RIFF" + struct.pack("<I", 100) + b"WEBPVP8X" + struct.pack("<I", 10)
    return head + bytes(4) + b"\xff\xff\x00" * 2 + bytes(80)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_an_image_is_what_predict_makes_of_it(images, tmp_path, format):
    content = picture(format)
    (tmp_path / "image").write_bytes(content)
    found = image_example(images, content)
    assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, (1, 4, 6, 3), True)
    np.testing.assert_array_equal(found[0], read_image(tmp_path / "image", (4, 6, 3)))
    assert found.std() > 1


@pytest.mark.parametrize(("content", "status", "words"), [
    (b"", 400, ["empty"]), (b"hello", 415, ["not an image", "PNG", "WEBP"]), (b"%PDF-1.7\n", 415, ["not an image"]),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, ["not an image"]), (b'{"rows": []}', 415, ["not an image"]),
    (picture("PNG")[:-200], 400, ["truncated or damaged"]), (picture("JPEG")[:300], 400, ["truncated or damaged"])])
def test_what_is_no_image(images, content, status, words):
    refused(lambda: image_example(images, content), *words, status=status)


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP"])
@pytest.mark.parametrize("most", [64_000_000, 1_000_000])
def test_image_bombs_are_refused_by_their_header(images, format, most):
    tracemalloc.start()
    try:
        refused(lambda: image_example(images, bomb(format), Limits(most_pixels=most)), "pixels", status=413)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_the_operator_can_allow_fewer_pixels(images, format):
    content = picture(format)
    assert image_example(images, content, Limits(most_pixels=37 * 23)).shape == (1, 4, 6, 3)
    refused(lambda: image_example(images, content, Limits(most_pixels=37 * 23 - 1)), "37x23 pixels are more than 850",
            status=413)
    refused(lambda: image_example(images, b"hello", Limits(most_pixels=9)), "not an image", status=415)


def test_the_size_of_a_webp_is_read_before_its_decoder_takes_memory(images, monkeypatch):
    content = picture("WEBP")
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("the decoder was started"))
    refused(lambda: image_example(images, content, Limits(most_pixels=850)), "37x23", status=413)


def test_images_and_rows_go_to_models_that_take_them(images, tmp_path):
    refused(lambda: row_examples(images, [{}]), "expected images")
    rows = made(tmp_path, inputs="features", input_shape=[2])
    refused(lambda: image_example(rows, picture("PNG")), "expected rows", status=415)


# ---- Rows ------------------------------------------------------------------------------------------------------------

TRAINING = "age,time,new,color,day,zip,height,y\n" + "".join(
    f"{row if row % 7 else ''},{1.7e9 + row},{'True' if row % 3 else 'False'},"
    f"{('red', 'blue', 'NA', 'größer')[row % 4]},2024-01-{1 + row % 5:02},{('01', '1', '7.0')[row % 3]},"
    f"{row / 7 if row % 5 else '?'},{row % 2}\n" for row in range(60))
NEW = """color,age,time,new,day,zip,height,note
red,39,1700000001.25,True,2024-01-03,01,0.1,x
 blue , ,1700000002,FALSE,2024-01-31,1,-1e-3,
NA,1e39,1700000003,true,,7,,x
green,-0.5,?,1,2024-01-05,7.00,+2.5,
größer,.5,1.7e9,0.0,2024-01-01,,1e400,
null,inf,1700000059,,2024-1-1,1.0,16777217,x
"""
TYPED = [
    {"color": "red", "age": 39, "time": 1700000001.25, "new": True, "day": "2024-01-03", "zip": "01", "height": 0.1},
    {"color": "blue", "age": None, "time": 1700000002, "new": False, "day": "2024-01-31", "zip": 1, "height": -1e-3},
    {"color": None, "age": 1e39, "time": 1700000003.0, "new": "true", "day": None, "zip": 7, "height": None},
    {"color": "green", "age": -0.5, "time": None, "new": 1, "day": "2024-01-05", "zip": 7.0, "height": 2.5},
    {"color": "größer", "age": 0.5, "time": 1.7e9, "new": 0.0, "day": "2024-01-01", "zip": None, "height": None},
    {"color": None, "age": None, "time": 1700000059, "new": None, "day": "2024-1-1", "zip": 1.0, "height": 16777217}]


@pytest.fixture
def trained(tmp_path):
    """Return the encoding of a table with each kind of column, and a model for it."""
    (tmp_path / "data.csv").write_text(TRAINING)
    details = encode(read_table(tmp_path, label="y", categories=("zip",)), Recipe(name="tiny", summary="",
                                                                                  inputs="features")).details
    return details, made(tmp_path, inputs="features", input_shape=[len(details["features"])], encoding=details)


def test_rows_are_encoded_as_those_of_a_file(trained, tmp_path, capsys):
    details, model = trained
    assert [column["kind"] for column in details["columns"]] == [
        "number", "number", "boolean", "category", "category", "category", "number"]
    assert [bool(column["missing"]) for column in details["columns"]] == [True, False, False, True, False, False, True]
    assert details["columns"][1]["offset"] > 1e9
    (tmp_path / "new.csv").write_text(NEW)
    expected, problems = encode_rows(tmp_path / "new.csv", details)
    assert not problems and len(np.unique(expected, axis=0)) == 6
    texts = [*csv.DictReader(io.StringIO(NEW))]
    for rows in (texts, TYPED):
        found = row_examples(model, parse_json(json.dumps(rows).encode()))
        assert (found.dtype, found.flags.c_contiguous) == (np.float32, True)
        assert found.tobytes() == expected.tobytes()
    (tmp_path / "data.csv").write_text(TRAINING)
    expected, _ = encode_rows(tmp_path / "data.csv", details)
    assert row_examples(model, [*csv.DictReader(io.StringIO(TRAINING))]).tobytes() == expected.tobytes()


def test_numbers_are_read_as_pandas_reads_them(trained, tmp_path):
    details, model = trained
    texts = ["1e5", "+1", ".5", "5.", "-.5e-3", "1E+5", "00012", "1e-400", "9" * 30, "Inf", "-infinity", "1_000",
             "0x1A", "1e", ".", "-", "--1", "True", "1d5", "1.5.2", "NAN", "١", "1,5", "infin", "0b1", "e5", "1\u00a0x"]
    row = {key: value for key, value in TYPED[0].items() if key != "age"}
    held = 0
    for text in texts:
        with open(tmp_path / "new.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, [*row, "age"])
            writer.writeheader()
            # The second row keeps the column one of texts, as one mistake in a file does.
            writer.writerows([row | {"age": text}, row | {"age": "none"}])
        expected, problems = encode_rows(tmp_path / "new.csv", details)
        if len(problems) == 2:
            refused(lambda text=text: row_examples(model, [row | {"age": text}]), "row 1", "'age'", "no number")
        else:
            assert row_examples(model, [row | {"age": text}]).tobytes() == expected[:1].tobytes(), text
            held += 1
    assert held == 11


def test_what_stands_for_missing_and_for_infinite_is_as_in_a_file():
    assert examples.MISSING == csv_files.MISSING
    assert tables.LARGEST == examples.LARGEST


@pytest.mark.parametrize(("column", "cell", "words"), [
    ("age", "old", ["'old'", "no number"]), ("age", True, ["True", "no number"]), ("age", [39], ["no number"]),
    ("age", {"value": 39}, ["no number"]), ("age", "39 years", []), ("age", "1" * 100_000, []),
    ("new", "yes", ["'yes'", "no boolean"]), ("new", 2, ["no boolean"]), ("new", [], []), ("new", 0.5, []),
    ("color", True, ["no category"]), ("color", [["red"]], ["no category"]), ("color", {}, []),
    ("color", ["\x1b[31m" * 999], [])])
def test_a_cell_of_another_kind_is_named(trained, column, cell, words):
    rows = [TYPED[0], TYPED[1] | {column: cell}]
    refused(lambda: row_examples(trained[1], rows), "row 2", repr(column), *words)


def test_rows_that_lack_columns_and_have_others(trained):
    model = trained[1]
    found = row_examples(model, [TYPED[0] | {"y": 1, "Age": [], "new column": {}}])
    np.testing.assert_array_equal(found, row_examples(model, TYPED[:1]))
    lacking = {key: value for key, value in TYPED[1].items() if key != "zip"}
    refused(lambda: row_examples(model, [TYPED[0], lacking]), "row 2 lacks the column 'zip'", "'color'")
    refused(lambda: row_examples(model, [{}]), "row 1 lacks the column", "received: none")


@pytest.mark.parametrize("rows", [None, {}, [], "rows", 5, [[]], [[1, 2]], [None], [5], ["x"]])
def test_what_is_no_list_of_rows(trained, rows):
    refused(lambda: row_examples(trained[1], rows), "row")


def test_too_many_rows(trained, monkeypatch):
    model = trained[1]
    assert len(row_examples(model, TYPED[:2], Limits(most_examples=2))) == 2
    refused(lambda: row_examples(model, TYPED[:3], Limits(most_examples=2)), "at most 2", "3", status=413)
    monkeypatch.setattr(examples, "MOST_ENCODED", 8 * model.input_shape[0])
    refused(lambda: row_examples(model, TYPED[:3]), "at most 2", status=413)


def test_a_number_too_far_from_the_others(trained):
    details, _ = trained
    column = next(column for column in details["columns"] if column["name"] == "time")
    column["offset"] = -3e38
    assert np.isfinite(row_examples(trained[1], TYPED)).all()
    model = Artefact(trained[1].folder, {**trained[1].document, "encoding": details})
    refused(lambda: row_examples(model, [TYPED[0] | {"time": 3e38}]), "row 1", "'time'", "too far")


@pytest.mark.parametrize(("place", "column"), [
    (0, None), (0, {}), (0, {"name": 5}), (0, {"fill": float("nan")}), (0, {"fill": "1"}), (0, {"offset": None}),
    (0, {"missing": 0}), (0, {"missing": -1}), (0, {"kind": "date"}), (0, {"kind": "category"}),
    (3, {"categories": ["red"]}), (3, {"categories": "rgb"}), (3, {"categories": [1, 2, 3]}), (3, {"kind": "number"})])
def test_an_encoding_that_is_not_the_models_is_found_before_any_request(trained, place, column):
    details, model = trained
    examples.check_encoding(model)
    columns = [*details["columns"]]
    columns[place] = columns[place] | column if column else column
    for encoding in ({}, {"columns": None}, {"columns": []}, {"columns": columns}):
        wrong = Artefact(model.folder, {**model.document, "encoding": encoding})
        with pytest.raises(DataError, match="encoding of the model tiny is not"):
            examples.check_encoding(wrong)


def test_rows_of_plain_numbers(tmp_path):
    model = made(tmp_path, inputs="features", input_shape=[3])
    found = row_examples(model, [[1, 2.5, -3], [0, 0, 1e-3]])
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([[1, 2.5, -3], [0, 0, 1e-3]]))
    for rows, words in (([1, 2, 3], ["row 1"]), ([[1, 2, 3], [1, 2]], ["row 2", "3 numbers"]), ([{"a": 1}], ["row 1"]),
                        ([[1, 2, "3"]], ["FP32"]), ([[1, 2, True]], ["FP32"]), ([[1, 2, None]], ["FP32"]),
                        ([[1, 2, [3]]], ["FP32"]), ([[1, 2, 1e39]], ["finite"])):
        refused(lambda rows=rows: row_examples(model, rows), *words)


# ---- Answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_answers_are_those_of_predict(tmp_path, threshold):
    model = made(tmp_path, decision_threshold=threshold, inputs="features", input_shape=[2])
    scores = np.random.default_rng(3).normal(size=(30, 2)).astype(np.float32)
    expected = prediction._answered(scores, model.class_names, threshold)
    found = answers(model, scores)
    assert [{key: answer[key] for key in ("label", "probability")} for answer in found] == expected
    assert {answer["label"] for answer in found} == {"no", "yes"}
    for answer in found:
        assert list(answer["probabilities"]) == ["no", "yes"] and math.isclose(sum(answer["probabilities"].values()), 1)
        assert answer["probabilities"][answer["label"]] == answer["probability"]


def test_the_answers_of_a_regression(tmp_path):
    model = made(tmp_path, task="regression", class_names=[])
    assert answers(model, np.float32([[1.5], [-2]])) == [{"value": 1.5}, {"value": -2.0}]
    refused(lambda: answers(model, np.float32([[np.nan]])), "no number", status=500)
    refused(lambda: answers(made(tmp_path), np.float32([[0, np.inf]])), "no number", status=500)
