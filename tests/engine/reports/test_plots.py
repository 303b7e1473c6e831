"""The drawings of a report: that they open, and show what they are of."""

import io

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine.reports import plots, report
from hpcai_cli.recipe import Recipe

STRANGE = [("cat", "dog"), ("$\\nothing$", "costs $5 or $6"), ("ä" * 6000, ""), ("猫", "犬\n"), ("_hidden", "a_b^c")]


def opened(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 200 and max(image.size) < 10_000
        assert len(image.convert("L").getcolors()) > 10
        return image.convert("RGB")


@pytest.mark.parametrize("names", STRANGE)
def test_the_confusion_opens_whatever_the_classes_are_called(names):
    opened(plots.confusion([[7, 1], [0, 1_234_567]], names))


def test_a_thousand_classes_can_be_drawn():
    opened(plots.confusion(np.eye(1000, dtype=int).tolist(), tuple(map(str, range(1000)))))


@pytest.mark.parametrize("names", STRANGE)
def test_curves_and_reliability_open(names):
    source = np.random.default_rng(1)
    recipe = Recipe(name="two", summary="", num_classes=2, class_names=names)
    found = report.report(recipe, source.normal(size=(50, 2)).astype(np.float32), source.integers(0, 2, 50))
    opened(plots.curves(found["curves"]))
    opened(plots.reliability(found["calibration"]))


@pytest.mark.parametrize("count", [1, 30, plots.MOST_DOTS + 1])
def test_residuals_open(count):
    source = np.random.default_rng(2)
    labels = source.normal(size=count).astype(np.float32)
    found = report.report(Recipe(name="n", summary="", task="regression"), labels[:, None] * 0.9, labels)
    opened(plots.residuals(labels * np.float32(0.9), labels, found["residuals"]["histogram"]))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 7])
def test_pictures_are_shown_in_their_colours(count, channels):
    images = np.zeros((count, 8, 8, channels), np.uint8)
    images[..., 0] = 200
    found = opened(plots.contact_sheet(images, ["$x$ -> dog\n97 %"] * count))
    colours = {colour for number, colour in found.getcolors(1 << 20) if number > 1000}
    assert ((200, 0, 0) if channels == 3 else (200, 200, 200)) in colours


def test_robustness_opens():
    rows = [{"corruption": name, "severity": severity, "accuracy": 0.9 - severity / 10}
            for name in ("noise", "blur") for severity in (1, 2)]
    opened(plots.robustness({"metric": "accuracy", "clean": 0.95, "rows": rows}))
