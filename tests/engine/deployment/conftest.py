"""Exports of two small TFLite models, and a Python that does not have this project."""

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from hpcai_cli.engine.serving.artefact import Artefact, digest

ENCODING = {
    "columns": [{"name": "age", "kind": "number", "fill": 40.0, "offset": 0.0, "mean": 41.0, "deviation": 9.0,
                 "missing": 2},
                {"name": "it's \"so\"; ```", "kind": "category", "categories": ["north", "south"], "missing": 0}],
    "features": ["age", "age is missing", "north", "south"], "label": {"name": "bought", "classes": ["no", "yes"]},
    "header": True, "names": ["age", "it's \"so\"; ```", "bought"]}
"""Of a table with a name that is hostile to whatever it is written into."""


@pytest.fixture(scope="session")
def tflite_models() -> dict[str, bytes]:
    """TFLite models by the kind of their inputs: of 28x28 images into ten classes, of four features into two."""
    import keras

    from hpcai_cli.engine.compression import quantization

    keras.utils.set_random_seed(3)
    images = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(),
                               keras.layers.Dense(10)])
    rows = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    return {"images": quantization.convert(images, (28, 28, 1), kind="float32"),
            "features": quantization.convert(rows, (4,), kind="float32")}


@pytest.fixture
def export(tmp_path, tflite_models):
    """Return a function that makes an export."""
    def make(inputs: str = "images", folder: str = "export", **changes) -> Artefact:
        images = inputs == "images"
        path = tmp_path / folder
        path.mkdir()
        (path / "model.tflite").write_bytes(tflite_models[inputs])
        (path / "MODEL_CARD.md").write_text("# A card\n")
        document = {
            "schema": "hpcai.artefact/1", "name": "Tiny_digits.v1", "kind": "tflite", "file": "model.tflite",
            "task": "classification", "class_names": [*"0123456789"] if images else ["no", "yes"],
            "decision_threshold": None, "inputs": inputs, "input_shape": [28, 28, 1] if images else [4],
            "files": {file.name: {"sha256": digest(file), "bytes": file.stat().st_size} for file in path.iterdir()}}
        document |= ({} if images else {"encoding": ENCODING}) | changes
        (path / "artefact.json").write_text(json.dumps(document))
        return Artefact.open(path)
    return make


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> Path:
    """Make a Python that has the packages of others and not this project."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # The lines of .pth files in a folder that is named so do not count, those of an editable install among them.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = subprocess.run([folder / "bin/python", "-P", "-c", "import numpy, hpcai_cli"], capture_output=True,
                           text=True)
    assert "No module named 'hpcai_cli'" in found.stderr
    return folder / "bin/python"
