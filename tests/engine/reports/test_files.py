"""Where a report goes, and that its files belong together."""

import json
from pathlib import Path

import pytest

from hpcai_cli.engine.reports import files
from hpcai_cli.errors import UsageError
from hpcai_cli.run import Run


@pytest.mark.parametrize(("model", "split", "folder"), [
    ("run", "test", "run/evaluation"), ("run/", "validation", "run/evaluation/validation"),
    ("run/checkpoints/step-00000012", "test", "run/evaluation/checkpoints/step-00000012"),
    ("run/exports/tflite/model.tflite", "train", "run/evaluation/exports/tflite/model.tflite/train"),
    ("elsewhere/model.onnx", "test", "elsewhere/model.onnx-evaluation")])
@pytest.mark.parametrize("absolute", [False, True])
def test_each_model_and_split_has_a_place_of_its_own(model, split, folder, absolute):
    given = Path(model).absolute() if absolute else Path(model)
    found = files.folder_of(given, Run(Path("run")), split, None)
    assert found.absolute() == Path(folder).absolute()


def test_an_output_folder_is_new_or_empty_or_holds_a_report():
    def folder(output):
        return files.folder_of(Path("run"), Run(Path("run")), "train", Path(output))

    assert folder("new") == Path("new")
    Path("empty").mkdir()
    assert folder("empty") == Path("empty")
    Path("before").mkdir()
    Path("before/metrics.json").write_text(json.dumps({"schema": files.SCHEMA}))
    assert folder("before") == Path("before")
    Path("thesis").mkdir()
    Path("thesis/report.html").write_text("mine")
    Path("file").touch()
    Path("other").mkdir()
    Path("other/metrics.json").write_text("{}")
    for taken in ("thesis", "file", "other"):
        with pytest.raises(UsageError, match="the output folder is not empty"):
            folder(taken)
