"""The straight line: trained by the command line, it is the one of least squares."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcai_cli.engine import model_file


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    return np.linalg.lstsq(np.c_[x, np.ones(len(x))].astype(np.float64), y.astype(np.float64))[0]


@pytest.mark.parametrize("unit", [None, 1000.0])
def test_the_trained_line_is_the_closed_form(hpcai, tmp_path, unit):
    source = "sample"
    if unit:
        points = np.random.default_rng(1)
        x = points.normal(50, 20, 500) * unit
        rows = [f"{a},{b}" for a, b in zip(x, 7 * unit - 0.5 * x + points.normal(0, 4, 500) * unit, strict=True)]
        source = tmp_path / "points"
        source.mkdir()
        (source / "points.csv").write_text("\n".join(["x,y", *rows]))
    assert hpcai("preprocess", "linear-regression", "--source", source, "--output", "line.h5").exit_code == 0
    done = hpcai("train", "linear-regression", "--data", "line.h5", "--output", "run", "--json")
    assert done.exit_code == 0, done.stderr
    with h5py.File("line.h5") as file:
        (x, y), (test_x, test_y) = (
            (file[split]["features"][:], file[split]["labels"][:]) for split in ("train", "test"))
    slope, intercept = least_squares(x, y)
    model = model_file.load(Path("run/model.keras"))
    low, high = model(np.array([[x.min()], [x.max()]], np.float32)).numpy()[:, 0]
    spread = y.std()
    assert abs(low - (slope * x.min() + intercept)) < 1e-5 * spread
    assert abs(high - (slope * x.max() + intercept)) < 1e-5 * spread
    best = np.sqrt(np.mean((slope * test_x[:, 0] + intercept - test_y) ** 2))
    assert json.loads(done.stdout)["metrics"]["root_mean_squared_error"] == pytest.approx(best, rel=1e-5)
