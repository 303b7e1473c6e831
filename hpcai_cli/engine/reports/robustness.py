"""How well a model's answers survive noise, blur, brightness and JPEG compression.

The kinds are four of those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations", arXiv 1903.12261; three severities of our own, relative to the picture's size where that matters.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from hpcai_cli.engine.evaluation import figures, main_metric
from hpcai_cli.engine.store import Dataset, Split
from hpcai_cli.errors import UsageError
from hpcai_cli.recipe import Recipe

SEED = 0
SEVERITIES = {
    "noise": ((8, 16, 32), "standard deviation of {} of 255"),
    "blur": ((0.01, 0.02, 0.03), "standard deviation of {} of the shorter side"),
    "brightness": ((32, 64, 96), "{} of 255 added"),
    "jpeg": ((40, 20, 10), "quality {} of 100"),
}
"""The settings of each corruption, milder first, and what they mean."""


@dataclass(frozen=True)
class CorruptedSplit:
    """A split whose pictures are corrupted as they are gathered, so that memory holds one batch of them."""

    split: Split
    corruption: str
    setting: float

    @property
    def inputs(self) -> np.ndarray:
        """Shape and type of the pictures, as `evaluation.scores_of` asks for them."""
        return self.split.inputs

    @property
    def labels(self) -> np.ndarray:
        """The labels, unchanged."""
        return self.split.labels

    def __len__(self) -> int:
        return len(self.split)

    def gather(self, rows: np.ndarray, inputs_out: np.ndarray, labels_out: np.ndarray) -> None:
        """As `Split.gather`. What happens to a picture depends on its row alone, not on the batch or the rank."""
        self.split.gather(rows, inputs_out, labels_out)
        for place, row in enumerate(rows):
            inputs_out[place] = corrupted(inputs_out[place], self.corruption, self.setting, row=int(row))


def corrupted(image: np.ndarray, corruption: str, setting: float, *, row: int) -> np.ndarray:
    """Return a corrupted picture, uint8 (height, width, channels) as the given one; `row` seeds the noise."""
    if corruption == "jpeg":
        return _compressed(image, int(setting))
    if corruption == "noise":
        # Philox takes (seed, row) as its key: the same noise at each severity, and for any number of ranks.
        source = np.random.Generator(np.random.Philox(key=[SEED, row]))
        changed = image + setting * source.standard_normal(image.shape, np.float32)
    elif corruption == "blur":
        from scipy.ndimage import gaussian_filter

        sigma = setting * min(image.shape[:2])
        changed = gaussian_filter(image.astype(np.float32), (sigma, sigma, 0))
    else:
        changed = image + np.float32(setting)
    return np.clip(np.rint(changed), 0, 255).astype(np.uint8)


def _compressed(image: np.ndarray, quality: int) -> np.ndarray:
    # Colours are compressed together; any other channels one by one, as grays.
    parts = [image] if image.shape[-1] == 3 else [image[..., channel] for channel in range(image.shape[-1])]
    back = []
    for part in parts:
        stream = io.BytesIO()
        Image.fromarray(part).save(stream, "JPEG", quality=quality)
        back.append(np.asarray(Image.open(stream), np.uint8))
    return back[0] if image.shape[-1] == 3 else np.stack(back, axis=-1)


def check(dataset: Dataset, recipe: Recipe) -> None:
    """Refuse data whose examples are no pictures of bytes.

    Raises:
        UsageError: they are a table's rows, or have another range.
    """
    inputs = dataset.split("train").inputs
    if recipe.inputs != "images" or inputs.dtype != np.uint8 or len(inputs.shape) != 4:
        raise UsageError("--robustness corrupts pictures, which this data file does not hold",
                         expected="images of type uint8 (height, width, channels)",
                         received=f"{recipe.inputs} of type {inputs.dtype}, {tuple(inputs.shape[1:])}")


def robustness(recipe: Recipe, split: Split, scores_of: Callable, clean: dict,
               threshold: float | None = None) -> dict:
    """Return the main figures under each corruption and severity, as JSON values.

    Args:
        scores_of: from a split to the model's scores on it, float32 (n, columns), on every rank.
        clean: the metrics without any corruption.
    """
    metric, rows = main_metric(recipe), []
    for corruption, (settings, meaning) in SEVERITIES.items():
        for severity, setting in enumerate(settings, 1):
            found = figures(recipe, scores_of(CorruptedSplit(split, corruption, setting)), split.labels, threshold)
            rows.append({"corruption": corruption, "severity": severity, "setting": meaning.format(setting),
                         metric: found[metric], "loss": found["loss"], "change": found[metric] - clean[metric]})
    return {"metric": metric, "clean": clean[metric], "mean": float(np.mean([row[metric] for row in rows])),
            "rows": rows}
