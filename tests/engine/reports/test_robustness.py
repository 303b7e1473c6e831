"""Corruptions: what they do to a picture, and that they do it alike for any batch and any number of ranks."""

import numpy as np
import pytest

from hpcai_cli.engine import evaluation
from hpcai_cli.engine.distributed import Serial
from hpcai_cli.engine.reports import robustness
from hpcai_cli.engine.store import Split
from hpcai_cli.recipe import Recipe

RECIPE = Recipe(name="r", summary="", input_shape=(16, 16, 3), num_classes=2, class_names=("dark", "bright"))


def pictures(count: int, channels: int = 3) -> np.ndarray:
    source = np.random.default_rng(0)
    smooth = np.linspace(40, 200, 16)[None, :, None, None] + source.integers(0, 30, (count, 1, 16, channels))
    return np.broadcast_to(smooth, (count, 16, 16, channels)).astype(np.uint8)


EVERY = [(name, setting) for name, (settings, _) in robustness.SEVERITIES.items() for setting in settings]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("corruption", "setting"), EVERY)
def test_a_corrupted_picture_is_still_that_picture(corruption, setting, channels):
    image = pictures(1, channels)[0]
    found = robustness.corrupted(image, corruption, setting, row=3)
    assert (found.shape, found.dtype) == (image.shape, np.uint8)
    assert 0 < np.abs(found.astype(int) - image).mean() <= 100 or corruption == "blur"
    assert np.corrcoef(found.ravel(), image.ravel())[0, 1] > 0.5


@pytest.mark.parametrize("corruption", robustness.SEVERITIES)
def test_a_higher_severity_changes_more(corruption):
    image = np.random.default_rng(1).integers(0, 150, (32, 32, 3), dtype=np.uint8)
    changes = [np.abs(robustness.corrupted(image, corruption, setting, row=0).astype(int) - image).mean()
               for setting in robustness.SEVERITIES[corruption][0]]
    assert changes == sorted(changes) and changes[0] < changes[-1]


def test_what_each_does():
    image = np.full((40, 40, 1), 250, np.uint8)
    assert (robustness.corrupted(image, "brightness", 32, row=0) == 255).all()
    assert (robustness.corrupted(image, "blur", 0.04, row=0) == 250).all()
    gray = np.full((64, 64, 3), 128, np.uint8)
    noisy = robustness.corrupted(gray, "noise", 16, row=0).astype(float)
    assert (noisy.mean(), noisy.std()) == (pytest.approx(128, abs=1), pytest.approx(16, rel=0.05))
    dot = np.zeros((41, 41, 1), np.uint8)
    dot[20, 20] = 255
    blurred = robustness.corrupted(dot, "blur", 1 / 41, row=0)[..., 0]
    assert blurred[20, 20] == pytest.approx(255 / (2 * np.pi), abs=2) and blurred[20, 21] > blurred[20, 22] > 0


def test_noise_is_a_rows_own_and_always_the_same():
    image = pictures(1)[0]
    first = robustness.corrupted(image, "noise", 16, row=1)
    np.testing.assert_array_equal(robustness.corrupted(image, "noise", 16, row=1), first)
    assert (robustness.corrupted(image, "noise", 16, row=2) != first).any()


class OneOf:
    """A rank of several that gathers what the test has gathered for it."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def gather(self, rows):
        return rows


@pytest.mark.parametrize("corruption", robustness.SEVERITIES)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_see_the_pictures_that_one_sees(corruption, size):
    split = Split(pictures(521), np.zeros(521, np.int64), None, 0)
    spoilt = robustness.CorruptedSplit(split, corruption, robustness.SEVERITIES[corruption][0][1])

    def run_forward(inputs):
        return inputs.reshape(len(inputs), -1)[:, :300].astype(np.float32)

    alone = evaluation.scores_of(run_forward, spoilt, Serial(), columns=300)
    parts = [evaluation.scores_of(run_forward, spoilt, OneOf(rank, size), columns=300) for rank in range(size)]
    np.testing.assert_array_equal(np.concatenate(parts), alone)
    np.testing.assert_array_equal(split.inputs, pictures(521))


def test_the_table_of_a_model_that_looks_at_brightness_alone():
    images = np.repeat(np.array([60, 190], np.uint8), 50)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    split = Split(images, np.repeat([0, 1], 50), None, 0)

    def scores_of(part):
        def forward(inputs):
            brightness = inputs.mean(axis=(1, 2, 3)) - 125
            return np.stack([-brightness, brightness], axis=1).astype(np.float32)
        return evaluation.scores_of(forward, part, Serial(), columns=2)

    clean = evaluation.figures(RECIPE, scores_of(split), split.labels)
    found = robustness.robustness(RECIPE, split, scores_of, clean)
    assert found["clean"] == 1
    brighter = [60 + added < 125 for added in robustness.SEVERITIES["brightness"][0]]
    assert [row["accuracy"] for row in found["rows"] if row["corruption"] == "brightness"] == [
        1 if right else 0.5 for right in brighter]
    assert {row["accuracy"] for row in found["rows"] if row["corruption"] != "brightness"} == {1}
    assert found["mean"] == pytest.approx(np.mean([row["accuracy"] for row in found["rows"]]))
    assert all(row["change"] == row["accuracy"] - 1 for row in found["rows"])
