"""The photographs that benchmarks measure with: cuts of two that are at hand, or the user's own that can be used."""

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from hpcai_cli import console
from hpcai_cli.engine.raw.image_files import find_image_files
from hpcai_cli.engine.raw.preprocessing import preprocess
from hpcai_cli.engine.raw.sources import open_source
from hpcai_cli.recipe import Recipe

WIDTH, HEIGHT = 500, 375
"""About the size of Dogs-vs-Cats' photographs; each differs from it by up to a tenth."""
QUALITY = 90


@contextmanager
def photograph_folder(own: Path | None, recipe: Recipe, count: int) -> Iterator[Path]:
    """Yield a folder of at most `count` photographs, cat/*.jpg and dog/*.jpg, the user's own where there are some."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if own is None:
            make_photographs(folder, count, recipe.class_names)
        else:
            with usable_photographs(own, recipe) as splits:
                files = [file for split in splits.values() for file in split]
                # Evenly, since they come sorted by class.
                rows = np.linspace(0, len(files), min(count, len(files)), endpoint=False, dtype=np.int64)
                copy_photographs([files[row] for row in rows], folder, recipe.class_names)
        yield folder


def make_photographs(folder: Path, count: int, class_names: Iterable[str]) -> None:
    """Write so many different JPEG files, cut from scikit-learn's two photographs, the same ones each time."""
    from sklearn.datasets import load_sample_images

    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    source, class_names = np.random.default_rng(0), list(class_names)
    for name in class_names:
        (folder / name).mkdir(parents=True)
    with console.progress("making photographs", total=count, unit="photographs") as shown:
        for number in range(count):
            scene, label = scenes[number % len(scenes)], class_names[number % len(class_names)]
            scale = source.uniform(0.9, 1.1)
            width, height = int(WIDTH * scale), int(HEIGHT * scale)
            left, top = (int(source.integers(0, room + 1)) for room in (scene.width - width, scene.height - height))
            cut = ImageEnhance.Brightness(scene.crop((left, top, left + width, top + height))).enhance(
                source.uniform(0.6, 1.3))
            cut = ImageOps.mirror(cut) if source.random() < 0.5 else cut
            cut.save(folder / label / f"{number:05}.jpg", quality=QUALITY)
            shown.update(number + 1)


@contextmanager
def usable_photographs(source: Path, recipe: Recipe) -> Iterator[dict[str, list[tuple[Path, int]]]]:
    """Yield path and label of the user's photographs by split, without those that a preprocessing leaves out.

    What others would fail on is gone then, so that they are measured on the same photographs.
    """
    def load(folder: Path, recipe: Recipe) -> dict:
        return find_image_files(folder, shape=recipe.input_shape, class_names=recipe.class_names)

    with tempfile.TemporaryDirectory() as name, open_source(str(source.absolute()), downloads=None,
                                                            cache=Path(name)) as folder:
        report = preprocess(recipe, load=load, sample=None, downloads=None, source=str(folder),
                            output=Path(name) / "photographs.h5")
        left_out = {entry["file"] for entry in (*report["rejected"], *report["duplicates"])}
        left_out |= {file for entry in report["conflicts"] for file in entry["files"]}
        yield {split: [(files.folder / file, label)
                       for file, label in zip(files.names, files.labels.tolist(), strict=True) if file not in left_out]
               for split, files in load(folder, recipe).items()}


def copy_photographs(files: Iterable[tuple[Path, int]], folder: Path, class_names: Iterable[str]) -> None:
    """Copy files to CLASS/NUMBER below a folder."""
    class_names = list(class_names)
    for name in class_names:
        (folder / name).mkdir(parents=True)
    for number, (path, label) in enumerate(files):
        shutil.copyfile(path, folder / class_names[label] / f"{number:05}{path.suffix}")
